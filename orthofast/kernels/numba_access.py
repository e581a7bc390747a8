# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, unused-ignore"
"""What compiled loops need below Python: elements as stored, addresses, BLAS, a shared counter.

numba's cache on disk watches the file of the loop alone: touch ``numba_folds.py`` after a change here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic, overload


def blas_addresses(compute: np.dtype[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Addresses of the matrix product and the symmetric product in SciPy's BLAS."""
    letter = "d" if compute == np.float64 else "s"
    names = (f"{letter}gemm", f"{letter}syrk")
    return np.array([get_cython_function_address("scipy.linalg.cython_blas", name) for name in names], dtype=np.int64)


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """An integer address as a pointer to the dtype of the array ``like``."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@intrinsic
def call(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a function that takes pointers only, as Fortran does."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [byte] * len(values))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(value, byte) for value in values])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


@intrinsic
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at the address, atomically; return what stood there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(address, types.int64), generate


@intrinsic
def as_float32(typingctx: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_int64(typingctx: Any, value: Any) -> Any:
    """The 64 bits of a float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), generate


def widen(stored: Any, table: Any) -> Any:
    """A stored element as a float, exactly: uint16 holds bfloat16, int16 float16, uint8 a float8 of the table."""
    raise NotImplementedError("only inside compiled loops")


def _widen_float(stored: Any, table: Any) -> Any:
    return stored


def _widen_bfloat16(stored: Any, table: Any) -> Any:
    return as_float32(np.uint32(stored) << np.uint32(16))


def _widen_half(stored: Any, table: Any) -> Any:
    half = np.uint32(np.uint16(stored))
    bits = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
    if (half & np.uint32(0x7C00)) == np.uint32(0x7C00):  # Inf and NaN
        bits |= np.uint32(0x70000000)
    return as_float32(bits) * np.float32(2.0**112)  # exponents are biased by 15 and by 127


def _widen_float8(stored: Any, table: Any) -> Any:
    return table[stored]


@overload(widen)
def _widen_of(stored: Any, table: Any) -> Any:
    if isinstance(stored, types.Float):
        return _widen_float
    return {types.uint16: _widen_bfloat16, types.int16: _widen_half, types.uint8: _widen_float8}[stored]

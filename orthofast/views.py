"""A weight as vectors: which of its slices are compared, as a strided (b, n, d) tensor."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from orthofast.errors import InputError

Floats: TypeAlias = NDArray[np.floating[Any]]
Array: TypeAlias = Tensor | Floats
VECTORS = ("rows", "cols", "heads", "filters", "center_tap")
NUMPY_DTYPES = ("float16", "float32", "float64")


def as_vectors(weight: Array, vectors: str = "rows", heads: int | None = None) -> Tensor:
    """The vectors of a weight as (b, n, d): ``b`` sets of ``n`` vectors of length ``d``.

    A weight is laid out as torch layers store it, (out, in) or (out, in, *kernel). (Transposed convolutions store
    (in, out, *kernel) and GPT-2's Conv1D (in, out): there "rows" and "cols" change places.)

    ============  =======================  ===========================================================
    vectors       shape                    one vector is
    ============  =======================  ===========================================================
    rows          (1, out, in * kernel)    what feeds one output neuron or channel
    cols          (1, in, out * kernel)    what one input feature or channel feeds
    heads         (heads, out / heads, .)  as rows, compared only within equal blocks of rows
    filters       (1, out, in * kernel)    as rows, by the name convolutions use
    center_tap    (1, in, out)             one input channel of the kernel's central tap, conv only
    ============  =======================  ===========================================================

    "center_tap" takes ``W[:, :, k1 // 2, k2 // 2]`` as the public code of Lu et al. 2024 does, and of that (out, in)
    matrix the columns, which are what their Table 2 prints (0.070 and 0.050 at the start: the baselines of R^128 and
    R^256). For its rows pass ``weight[:, :, k1 // 2, k2 // 2]`` with vectors="rows".

    The result shares the weight's memory whenever strides can say it; "cols" of a kernel wider than one tap,
    non-contiguous kernels, and arrays with negative strides or foreign byte order are copied. It is never written to.

    Args:
        weight: a tensor or numpy array, floating point, at least 2-D.
        vectors: "rows", "cols", "heads", "filters" or "center_tap".
        heads: number of equal blocks of rows, with vectors="heads" only.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> conv = torch.zeros(8, 4, 3, 3)
    >>> [tuple(as_vectors(conv, vectors).shape) for vectors in ("rows", "cols", "center_tap")]
    [(1, 8, 36), (1, 4, 72), (1, 4, 8)]
    >>> tuple(as_vectors(torch.zeros(768, 768), "heads", heads=12).shape)
    (12, 64, 768)
    """
    if vectors not in VECTORS:
        raise InputError(f"vectors needs one of {', '.join(VECTORS)}, got {vectors!r}")
    if heads is not None and vectors != "heads":
        raise InputError(f"heads={heads!r} needs vectors='heads', got vectors={vectors!r}; change one of them")
    x = as_tensor(weight)
    if x.dim() < 2:
        raise InputError(
            f"weight needs at least 2 dimensions, (out, in) or (out, in, *kernel), got shape {tuple(x.shape)}; "
            "a bias or a norm has no vectors to compare"
        )
    if vectors == "cols":
        return _flat(x.transpose(0, 1)).unsqueeze(0)
    if vectors == "center_tap":
        return _center_tap(x).T.unsqueeze(0)
    rows = _flat(x)
    if vectors == "heads":
        blocks = _checked_heads(heads, len(rows))
        return _reshaped(rows, (blocks, len(rows) // blocks, rows.shape[1]), "vectors='heads'")
    return rows.unsqueeze(0)


def as_tensor(weight: Array, name: str = "weight") -> Tensor:
    """A tensor of the same values, checked; it shares memory with the input where torch can express that.

    Args:
        weight: a dense floating-point tensor, or a numpy array of float16, float32 or float64.
        name: what to call the argument in an error.

    Raises:
        InputError: if it is neither, or holds no values.
    """
    if isinstance(weight, Tensor):
        return _checked_tensor(weight, name)
    if isinstance(weight, np.ndarray):
        return _from_numpy(weight, name)
    raise InputError(f"{name} needs a torch.Tensor or a numpy array, got {type(weight).__name__}; {_remedy(weight)}")


def _remedy(weight: object) -> str:
    if isinstance(weight, torch.nn.Module):
        return "pass its .weight"
    if isinstance(weight, (list, tuple)):
        return "build one with torch.tensor(...), or call once for each matrix"
    return "wrap it with torch.as_tensor"


def _checked_tensor(x: Tensor, name: str) -> Tensor:
    traced = torch.compiler.is_compiling()  # it cannot follow is_lazy and is_neg
    if not traced and is_lazy(x):
        raise InputError(f"{name} is a lazy parameter without a shape; run the module once on data first")
    if x.is_nested:
        raise InputError(f"{name} needs one dense tensor, got a nested tensor; call once for each of its .unbind()")
    if x.layout is not torch.strided:
        raise InputError(f"{name} needs a dense tensor, got layout {x.layout}; call .to_dense() first")
    if x.is_quantized:
        raise InputError(f"{name} needs floating-point values, got quantised {x.dtype}; call .dequantize() first")
    if not x.dtype.is_floating_point:
        remedy = "take .real, .imag or .abs()" if x.dtype.is_complex else "convert it with .to(torch.float32)"
        raise InputError(f"{name} needs a floating-point dtype, got {x.dtype}; {remedy}")
    if x.device.type == "meta":
        raise InputError(f"{name} is on the meta device and holds no values; load or initialise it first")
    return x.resolve_neg() if not traced and x.is_neg() else x


class _Writeable:
    """An array's memory under a writeable flag: torch warns about the other kind, and nothing here writes."""

    def __init__(self, array: Floats) -> None:
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _from_numpy(array: Floats, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name} needs a plain numpy array, got a masked array; fill it with .filled(0) first")
    if array.dtype.name not in NUMPY_DTYPES:
        raise InputError(
            f"{name} needs a numpy dtype among {', '.join(NUMPY_DTYPES)}, got {array.dtype}; "
            "convert it with .astype('float32')"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    elif any(step < 0 or step % array.itemsize for step in array.strides) or not array.flags.aligned:
        array = array.copy()
    elif not array.flags.writeable:
        array = np.asarray(_Writeable(array))
    return torch.from_numpy(np.asarray(array))


def _flat(x: Tensor) -> Tensor:
    """(n, ...) -> (n, d)."""
    return x if x.dim() == 2 else _reshaped(x, (len(x), math.prod(x.shape[1:])), "a kernel of several taps")


def _reshaped(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    try:
        return x.reshape(shape)
    except RuntimeError as error:
        placements = getattr(x, "placements", None)
        if placements is None:
            raise
        raise InputError(
            f"{what} needs a DTensor whose shards end where blocks of {shape} do, got shape {tuple(x.shape)} with "
            f"placements {placements}; redistribute it first, or measure full_tensor()"
        ) from error


def _center_tap(x: Tensor) -> Tensor:
    """(out, in, *kernel) -> (out, in)."""
    kernel = x.shape[2:]
    if not 1 <= len(kernel) <= 3 or 0 in kernel:
        raise InputError(
            f"vectors='center_tap' needs a convolution weight (out, in, *kernel) with 1 to 3 kernel dimensions, "
            f"got shape {tuple(x.shape)}; use vectors='rows'"
        )
    for size in reversed(kernel):
        x = x.select(-1, size // 2)
    return x


def _checked_heads(heads: int | None, out: int) -> int:
    if heads is None:
        raise InputError("vectors='heads' needs heads, the number of equal blocks of rows; pass heads=")
    if type(heads) is not int or heads < 1:
        raise InputError(f"heads needs a positive integer, got {heads!r}")
    if out % heads:
        raise InputError(f"heads needs a divisor of the {out} rows, got {heads}")
    return heads

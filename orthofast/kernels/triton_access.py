# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""What all Triton kernels of the fold need: columns of the tables, stored bits as numbers, powers of two, a product.

Kernels read where a matrix lies from int64 tables, one row per side (one set of vectors of one item) and one per
problem (one item of one request), so that one launch serves any number of matrices of one dtype.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


def constant(value: float) -> Any:
    """A number that kernels may use by name; the interpreter wants it bare."""
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


# columns of the table of sides
SIDE_COLUMNS = 10
(S_ADDRESS, S_STRIDE_N, S_STRIDE_D, S_COUNT, S_LENGTH, S_FIRST, S_OUT, S_OUT_STRIDE, S_PROBLEM, S_ROLE) = (
    constant(i) for i in range(SIDE_COLUMNS)
)
# columns of the table of problems; operands first left, then right
PROBLEM_COLUMNS = 20
(P_ADDRESS_X, P_STRIDE_NX, P_STRIDE_DX, P_ADDRESS_Y, P_STRIDE_NY, P_STRIDE_DY) = (constant(i) for i in range(6))
(P_N, P_M, P_D, P_FIRST_X, P_FIRST_Y, P_ENTRY, P_ENTRIES) = (constant(i) for i in range(6, 13))
(P_ROW_SLOTS, P_COLUMN_SLOTS, P_OUT_X, P_OUT_STRIDE_X, P_OUT_Y, P_OUT_STRIDE_Y) = (constant(i) for i in range(13, 19))

# how operands are read: through tensor maps, by aligned rows or columns, or element by element
ROWS, COLUMNS, ANY = constant(0), constant(1), constant(2)
# how stored bits become numbers
NATIVE, E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ = (constant(i) for i in range(5))

TARGET = constant(9)  # scaled vectors have their largest entry in [2**8, 2**9): far from both ends of float16
MOST_POWER = constant(126)  # a power of two and its inverse are normal float32 numbers
LOW_BITS = constant(11)  # significant bits of float16: the low part is what the high part leaves, times 2**11

INTERPRETED = constant(triton.knobs.runtime.interpret)


@triton.jit
def power_of_two(exponent):
    """2.0**exponent as float32, exponent int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_power(largest):
    """Exponent of the power of two that brings the largest entry, float32, to [2**8, 2**9); at most 126."""
    field = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(TARGET - (field - 126), MOST_POWER)


@triton.jit
def decoded(stored, FORMAT: tl.constexpr):
    """Stored elements as float32: floats of 32 and 16 bits, or bytes that hold a float8."""
    if FORMAT == NATIVE:
        if stored.dtype == tl.bfloat16:  # the upper half of a float32; the interpreter's own way loses the smallest
            return (stored.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            return stored.to(tl.float32)
    mantissa: tl.constexpr = 2 if FORMAT == E5M2 else 2 if FORMAT == E5M2FNUZ else 3
    bias: tl.constexpr = 7 if FORMAT == E4M3FN else 8 if FORMAT == E4M3FNUZ else 15 if FORMAT == E5M2 else 16
    bits = stored.to(tl.int32) & 0xFF
    size = bits & 0x7F
    field = size >> mantissa
    significand = (size & ((1 << mantissa) - 1)) + tl.where(field > 0, 1 << mantissa, 0)
    value = significand.to(tl.float32) * power_of_two(tl.maximum(field, 1) - bias - mantissa)
    value = tl.where(bits > 0x7F, -value, value)
    if FORMAT == E4M3FN:
        value = tl.where(size == 0x7F, float("nan"), value)
    elif FORMAT == E5M2:
        value = tl.where(size == 0x7C, tl.where(bits > 0x7F, -float("inf"), float("inf")), value)
        value = tl.where(size > 0x7C, float("nan"), value)
    else:
        value = tl.where(bits == 0x80, float("nan"), value)
    return value


@triton.jit
def low_part(value, high):
    """What rounding to float16 left of a scaled value, times 2**11, as float16."""
    return ((value - high.to(tl.float32)) * power_of_two(LOW_BITS + tl.zeros([1], tl.int32))).to(tl.float16)


@triton.jit
def product(left, right, total):
    """total + left @ right in float32; the interpreter would multiply the bits of bfloat16."""
    if INTERPRETED:
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, total)

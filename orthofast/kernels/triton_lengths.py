# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Lengths of the rows and of the columns of a matrix from one read of it.

The first kernel walks tiles of the matrix and leaves, for each of its vectors on either side, the squares of one strip
of entries and the largest of them; the second joins the strips in fixed order, float64, and writes what ``prepare``
would. Memory: 8 bytes a vector and strip. Only for 16-bit input, which the fold reads as it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orthofast.kernels.triton_access import constant, decoded, power_of_two, scale_power
from orthofast.kernels.triton_prepare import SAFE_POWER, inverse_root

JOIN_BLOCK = 256  # vectors of one program that joins strips
# columns of the table of matrices
MATRIX_COLUMNS = 6
MATRIX = constant(MATRIX_COLUMNS)
(M_ADDRESS, M_STRIDE, M_N, M_D, M_ROW_STRIPS, M_COLUMN_STRIPS) = (constant(i) for i in range(MATRIX_COLUMNS))
# columns of the table of ends: rows of a matrix, then its columns
END_COLUMNS = 8
END = constant(END_COLUMNS)
(E_COUNT, E_STRIPS, E_STRIP_COUNT, E_FIRST, E_FACTOR, E_TOTAL, E_FLAG, E_MARK) = (
    constant(i) for i in range(END_COLUMNS)
)


@triton.jit(do_not_specialize=("strips_total",))
def measure_tiles(
    units,
    matrices,
    strips,
    strips_total,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIP: tl.constexpr,  # entries of a row in one unit, a multiple of BLOCK_D
):
    """One tile of BLOCK_N x STRIP: strips of its rows and of its columns, as (squares, largest) float32."""
    unit = tl.program_id(0)
    matrix = matrices + tl.load(units + 3 * unit).to(tl.int64) * MATRIX
    block, strip = tl.load(units + 3 * unit + 1), tl.load(units + 3 * unit + 2)
    n, d = tl.load(matrix + M_N).to(tl.int32), tl.load(matrix + M_D).to(tl.int32)
    stride = tl.load(matrix + M_STRIDE)
    base = tl.load(matrix + M_ADDRESS).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        stride = tl.multiple_of(stride, 8)
        d = tl.multiple_of(d, 8)
    row_strips = strips + tl.load(matrix + M_ROW_STRIPS)
    column_strips = strips + tl.load(matrix + M_COLUMN_STRIPS)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < n
    largest = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    power = scale_power(largest)
    begin = strip * STRIP
    for k in range(begin, tl.minimum(begin + STRIP, d), BLOCK_D):
        entries = k + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (entries < d)[None, :]
        stored = tl.load(
            base + rows.to(tl.int64)[:, None] * stride + entries.to(tl.int64)[None, :], mask=inside, other=0
        )
        value = decoded(stored, 0)
        size = tl.abs(value)

        largest = tl.maximum(largest, tl.max(size, 1))
        before = power
        power = scale_power(largest)
        shrink = power_of_two(tl.maximum(power - before, -126))
        scaled = value * power_of_two(power)[:, None]
        square = square * shrink * shrink + tl.sum(scaled * scaled, 1)

        column_largest = tl.max(size, 0)
        scaled = value * power_of_two(scale_power(column_largest))[None, :]
        at = column_strips + block.to(tl.int64) * d + entries
        tl.store(at, tl.sum(scaled * scaled, 0), mask=entries < d)
        tl.store(at + strips_total, column_largest, mask=entries < d)
    at = row_strips + strip.to(tl.int64) * n + rows
    tl.store(at, square, mask=there)
    tl.store(at + strips_total, largest, mask=there)


@triton.jit(do_not_specialize=("strips_total",))
def join_strips(
    units,
    ends,
    strips,
    strips_total,
    norm_sq,
    factors,
    todo,
    WATCHED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Squared lengths of BLOCK_V vectors of one end, their factors and marks, as ``prepare`` leaves them."""
    unit = tl.program_id(0)
    end = ends + tl.load(units + 2 * unit).to(tl.int64) * END
    vectors = tl.load(units + 2 * unit + 1) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = tl.load(end + E_COUNT)
    there = vectors < count
    base = strips + tl.load(end + E_STRIPS)
    largest = tl.zeros([BLOCK_V], tl.float32)
    square = tl.zeros([BLOCK_V], tl.float64)
    power = scale_power(largest)
    for strip in range(tl.load(end + E_STRIP_COUNT).to(tl.int32)):
        at = base + strip * count + vectors
        part = tl.load(at, mask=there, other=0.0)
        part_largest = tl.load(at + strips_total, mask=there, other=0.0)
        largest = tl.maximum(largest, part_largest)
        before = power
        power = scale_power(largest)
        shrink = power_of_two(tl.maximum(power - before, -126)).to(tl.float64)
        part_shrink = power_of_two(tl.maximum(power - scale_power(part_largest), -126)).to(tl.float64)
        square = square * shrink * shrink + part.to(tl.float64) * part_shrink * part_shrink
    unscale = ((1023 - 2 * power).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    tl.store(norm_sq + tl.load(end + E_FIRST) + vectors, square * unscale, mask=there)

    scale = power_of_two(power)
    if NORMALIZE:
        exact = inverse_root(square)
        factor = exact * scale
    else:
        exact = power_of_two(-power)
        factor = tl.full([BLOCK_V], 1.0, tl.float32)
    if WATCHED:
        wild = (tl.abs(power - 9) > SAFE_POWER) & (square > 0) & (square < float("inf")) & there
        if tl.max(wild.to(tl.int32), 0) > 0:
            tl.store(todo + tl.load(end + E_FLAG), 1)
            tl.store(todo + tl.load(end + E_MARK), 1)
    row = factors + tl.load(end + E_FACTOR) + vectors
    total = tl.load(end + E_TOTAL)
    tl.store(row, factor, mask=there)
    tl.store(row + total, exact, mask=there)
    tl.store(row + 2 * total, scale, mask=there)

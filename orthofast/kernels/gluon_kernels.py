# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Gluon kernel for Hopper: the sum of |cos| over triangle tiles of 16-bit vectors, its warps with different duties.

One warp copies tiles by TMA into a ring of shared memory; two warpgroups multiply, each the upper or lower half of a
tile of 128 x 256 pairs, and finish their own half without waiting for the other: while one folds, the other multiplies.

A stage of the ring belongs to the producer until ``full`` completes a phase, and to the consumers until both have
arrived at ``empty``. Step s uses stage s mod STAGES in round s div STAGES; the parity of the round tells phases apart.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE_ROWS, TILE_COLUMNS = 128, 256
HALVES = 2  # consumers, each a half of the rows
STEP = 64  # entries of a vector per copy: 128 bytes, one swizzle row
STAGES = 4  # 4 * 48 KiB
WARPS = 4  # of each consumer: one warpgroup

HALF_ROWS = gl.constexpr(TILE_ROWS // HALVES)
COLUMNS = gl.constexpr(TILE_COLUMNS)
K = gl.constexpr(STEP)
RING = gl.constexpr(STAGES)
RING_BITS = gl.constexpr(STAGES.bit_length() - 1)
CONSUMERS = gl.constexpr(HALVES)
# registers a thread of the second consumer and of the producer hold; the first consumer gets what is left, as many
WORKER_REGISTERS = gl.constexpr([240, 24])


@gluon.jit
def _entry(work, entry):
    """(item, first row, first column) of an entry of the work list."""
    item = gl.load(work + 2 * entry)
    word = gl.load(work + 2 * entry + 1)
    return item, (word & 0xFFFF) * (CONSUMERS * HALF_ROWS), (word >> 16) * COLUMNS


@gluon.jit
def _produce(left, right, upper, lower, columns, full, empty, work, entries, n, d, ALONG_ROWS: gl.constexpr):
    """Copy the operands of every k-step into the ring, as far ahead as the consumers leave room."""
    step = 0
    for entry in range(gl.program_id(0), entries, gl.num_programs(0)):
        item, row, column = _entry(work, entry)
        for k in range(0, d, K):
            stage = step & (RING - 1)
            mbarrier.wait(empty.index(stage), ((step >> RING_BITS) & 1) ^ 1)  # the first round finds it empty
            arrived = full.index(stage)
            mbarrier.expect(arrived, (CONSUMERS * HALF_ROWS + COLUMNS) * K * 2)
            if ALONG_ROWS:
                tma.async_copy_global_to_shared(left, [item * n + row, k], arrived, upper.index(stage))
                tma.async_copy_global_to_shared(left, [item * n + row + HALF_ROWS, k], arrived, lower.index(stage))
                tma.async_copy_global_to_shared(right, [item * n + column, k], arrived, columns.index(stage))
            else:
                tma.async_copy_global_to_shared(left, [item * d + k, row], arrived, upper.index(stage))
                tma.async_copy_global_to_shared(left, [item * d + k, row + HALF_ROWS], arrived, lower.index(stage))
                tma.async_copy_global_to_shared(right, [item * d + k, column], arrived, columns.index(stage))
            step += 1


@gluon.jit
def _sum_of_half(acc, inverse, n, row, column, layout: gl.constexpr):
    """Sum of |cos| over the pairs of a (64, 256) tile that are above the diagonal and inside the matrix."""
    rows = row + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    by_row = gl.load(inverse + rows, mask=rows < n, other=0.0)
    by_column = gl.load(inverse + columns, mask=columns < n, other=0.0)
    tile = acc * gl.expand_dims(by_column, 0)
    if (row + HALF_ROWS > column) | (row + HALF_ROWS > n) | (column + COLUMNS > n):
        above = gl.expand_dims(columns, 0) > gl.expand_dims(rows, 1)
        # a select, not a factor: beyond an item lies the next one, which may hold NaN
        tile = gl.where(above & gl.expand_dims(columns < n, 0), tile, 0.0)
    return gl.sum(gl.sum(gl.abs(tile), 1) * by_row, 0)


@gluon.jit
def _consume(
    half, columns, full, empty, work, inverse, partials, entries, n, d, PART: gl.constexpr, ALONG_ROWS: gl.constexpr
):
    """Multiply one half of every tile and fold it."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    step = 0
    for entry in range(gl.program_id(0), entries, gl.num_programs(0)):
        item, row, column = _entry(work, entry)
        acc = gl.zeros((HALF_ROWS, COLUMNS), gl.float32, layout)
        for k in range(0, d, K):
            stage = step & (RING - 1)
            mbarrier.wait(full.index(stage), (step >> RING_BITS) & 1)
            if ALONG_ROWS:
                product = warpgroup_mma(half.index(stage), columns.index(stage).permute((1, 0)), acc, is_async=True)
            else:
                product = warpgroup_mma(half.index(stage).permute((1, 0)), columns.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[product])
            # the product before this one has read its operands
            mbarrier.arrive(empty.index((step - 1) & (RING - 1)), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) & (RING - 1)))
        total = _sum_of_half(acc, inverse + item * n, n, row + PART * HALF_ROWS, column, layout)
        gl.store(partials + CONSUMERS * entry + PART, total)


@gluon.jit(do_not_specialize=["entries", "n", "d"])
def abs_sum_kernel(left, right, work, inverse, partials, entries, n, d, ALONG_ROWS: gl.constexpr):
    """Partials (entries, 2) of the sum of |cos| within sets of ``n`` vectors of length ``d``.

    left, right: descriptors of the same memory, in blocks of 64 and of 256 vectors; work: (entries, 2) int32;
    inverse: (b, n) float32 reciprocal lengths, 0 for a zero vector. d is at least 1.
    """
    upper = gl.allocate_shared_memory(left.dtype, [RING] + left.block_shape, left.layout)  # noqa: RUF005
    lower = gl.allocate_shared_memory(left.dtype, [RING] + left.block_shape, left.layout)  # noqa: RUF005
    columns = gl.allocate_shared_memory(right.dtype, [RING] + right.block_shape, right.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(RING):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (upper, columns, full, empty, work, inverse, partials, entries, n, d, 0, ALONG_ROWS)),
            (_consume, (lower, columns, full, empty, work, inverse, partials, entries, n, d, 1, ALONG_ROWS)),
            (_produce, (left, right, upper, lower, columns, full, empty, work, entries, n, d, ALONG_ROWS)),
        ],
        [4, 1],
        WORKER_REGISTERS,
    )

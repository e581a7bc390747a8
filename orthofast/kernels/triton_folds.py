# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""The Triton fold: tiles of dot products reduced in registers, driven by a work list; one source, constexpr switches.

Work  entries * block_m * block_n * d multiply-adds, times 3 where float32 is kept in two parts of 16 bits.
Memory  one float32 per entry and sum; per-vector sums in slots that a tile owns.
Accuracy  exact operands (16 bits, or high and low parts), float32 accumulation; lengths are applied after the product.
Programs are persistent: program p works off entries p, p + P, p + 2P; nothing depends on P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orthofast.kernels.contract import HIST as _HIST
from orthofast.kernels.contract import ROW_ABS as _ROW_ABS
from orthofast.kernels.triton_access import (
    ANY,
    LOW_BITS,
    NATIVE,
    P_ADDRESS_X,
    P_ADDRESS_Y,
    P_COLUMN_SLOTS,
    P_D,
    P_FIRST_X,
    P_FIRST_Y,
    P_M,
    P_N,
    P_OUT_STRIDE_X,
    P_OUT_STRIDE_Y,
    P_OUT_X,
    P_OUT_Y,
    P_ROW_SLOTS,
    P_STRIDE_DX,
    P_STRIDE_DY,
    P_STRIDE_NX,
    P_STRIDE_NY,
    ROWS,
    constant,
    decoded,
    product,
)
from orthofast.kernels.triton_prepare import ABS_MAX, ABS_SUM, PROBLEM, SQ_SUM, SUM

ROW_ABS, HIST = constant(_ROW_ABS), constant(_HIST)
UNCONDITIONAL, IF_MARKED, IF_UNMARKED = constant(0), constant(1), constant(2)


@triton.jit
def _copied(tensor_map, at, k, LAYOUT: tl.constexpr):
    """(vectors, STEP) elements through a tensor map; what lies beyond an edge is zero."""
    if LAYOUT == ROWS:
        block = tensor_map.load([at, k])
    else:
        block = tensor_map.load([k, at]).T
    return block


@triton.jit
def _multiplied_maps(
    x_map, y_map, x_low, y_low, x_at, y_at, d, acc, LAYOUT: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr
):
    """(block_m, block_n) dot products through tensor maps."""
    if PARTS == 3:
        for k in range(0, d, STEP):
            left, right = _copied(x_map, x_at, k, LAYOUT), _copied(y_map, y_at, k, LAYOUT)
            acc = product(left, _copied(y_low, y_at, k, LAYOUT).T, acc)
            acc = product(_copied(x_low, x_at, k, LAYOUT), right.T, acc)
        acc = acc * (1.0 / (1 << LOW_BITS))
    for k in range(0, d, STEP):
        acc = product(_copied(x_map, x_at, k, LAYOUT), _copied(y_map, y_at, k, LAYOUT).T, acc)
    return acc


@triton.jit
def _block(base, vectors, start, count, d, stride, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    """(vectors, STEP) elements from ``start`` on, of rows or columns at aligned addresses."""
    entries = start + tl.arange(0, STEP)
    if LAYOUT == ROWS:
        pointers = base + vectors.to(tl.int64)[:, None] * stride + entries[None, :]
        block = tl.load(pointers, mask=(vectors < count)[:, None] & (entries < d)[None, :], other=0.0)
    else:
        pointers = base + entries.to(tl.int64)[:, None] * stride + vectors[None, :]
        block = tl.load(pointers, mask=(entries < d)[:, None] & (vectors < count)[None, :], other=0.0).T
    return block


@triton.jit
def _multiplied_aligned(
    x,
    y,
    x_low,
    y_low,
    i,
    j,
    n,
    m,
    d,
    stride_x,
    stride_y,
    acc,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The same through pointers whose alignment is known, so that loads are wide and run ahead."""
    if PARTS == 3:
        for k in range(0, d, STEP):
            left = _block(x, i, k, n, d, stride_x, LAYOUT, STEP)
            right = _block(y, j, k, m, d, stride_y, LAYOUT, STEP)
            acc = product(left, _block(y_low, j, k, m, d, stride_y, LAYOUT, STEP).T, acc)
            acc = product(_block(x_low, i, k, n, d, stride_x, LAYOUT, STEP), right.T, acc)
        acc = acc * (1.0 / (1 << LOW_BITS))
    for k in range(0, d, STEP):
        left = _block(x, i, k, n, d, stride_x, LAYOUT, STEP)
        acc = product(left, _block(y, j, k, m, d, stride_y, LAYOUT, STEP).T, acc)
    return acc


@triton.jit
def _scaled(base, vectors, start, count, d, stride_n, stride_d, scale, STEP: tl.constexpr):
    """(vectors, STEP) elements at any strides as float32, each vector times its power of two."""
    entries = start + tl.arange(0, STEP)
    pointers = base + vectors.to(tl.int64)[:, None] * stride_n + entries.to(tl.int64)[None, :] * stride_d
    stored = tl.load(pointers, mask=(vectors < count)[:, None] & (entries < d)[None, :], other=0.0)
    return decoded(stored, NATIVE) * scale[:, None]


@triton.jit
def _multiplied_any(
    x, y, i, j, n, m, d, stride_nx, stride_dx, stride_ny, stride_dy, scale_x, scale_y, acc,
    STEP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same from the input as it lies, at any strides, scaled on the way: slower, and always right."""
    for k in range(0, d, STEP):
        left = _scaled(x, i, k, n, d, stride_nx, stride_dx, scale_x, STEP)
        right = _scaled(y, j, k, m, d, stride_ny, stride_dy, scale_y, STEP)
        acc = product(left.to(DTYPE), right.to(DTYPE).T, acc)
    return acc


@triton.jit
def _count_cosines(cosines, mask, hist, bins, BINS: tl.constexpr, SIZE: tl.constexpr):
    """Add a tile to int64 counters; integers, so the order does not matter."""
    scaled = (tl.where(mask, cosines, 0.0) + 1.0) * (bins * 0.5)
    scaled = tl.where(scaled == scaled, scaled, 0.0)  # NaN is no bin; its item is emptied later
    bin_of = tl.minimum(tl.maximum(tl.floor(scaled).to(tl.int32), 0), bins - 1)
    if BINS > 0:
        # what is masked falls into a bin behind the last
        flat = tl.reshape(tl.where(mask, bin_of, BINS - 1), [SIZE], can_reorder=True)
        found = tl.histogram(flat, BINS)
        numbers = tl.arange(0, BINS)
        tl.atomic_add(hist + numbers, found.to(tl.int64), mask=(numbers < bins) & (found > 0), sem="relaxed")
    else:
        one = tl.full(bin_of.shape, 1, tl.int64)
        tl.atomic_add(hist + bin_of, one, mask=mask, sem="relaxed")


# one compiled form for all sizes: none of these numbers makes the code faster
_SIZES = (
    "begin", "stop", "total", "vectors_total", "row_base", "column_base", "first_column", "last_column", "bins",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def fold(
    entries, problems, x_map, y_map, x_low_map, y_low_map, high, low, factors, partials, arguments,
    row_slots, column_slots, hist, todo, begin, stop, total, vectors_total, row_base, column_base,
    first_column, last_column, bins,
    DTYPE: tl.constexpr,  # of the operands in memory
    LAYOUT: tl.constexpr,
    MAPS: tl.constexpr,  # through tensor maps
    OWN: tl.constexpr,  # operands are parts made by ``prepare``, not the input itself
    PARTS: tl.constexpr,
    WANT: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CONDITION: tl.constexpr,
    FACTOR: tl.constexpr,  # row of ``factors`` that belongs to these operands
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Fold the entries [begin, stop) of the work list, each into its own place of ``partials``."""
    last = stop
    if CONDITION == IF_MARKED:  # mostly nothing is marked: one load, and done
        last = tl.where(tl.load(todo) != 0, stop, begin)
    for entry in range(begin + tl.program_id(0), last, tl.num_programs(0)):
        number = tl.load(entries + 2 * entry)
        word = tl.load(entries + 2 * entry + 1)
        row, column = word & 0xFFFF, word >> 16
        problem = problems + number.to(tl.int64) * PROBLEM
        n, m = tl.load(problem + P_N).to(tl.int32), tl.load(problem + P_M).to(tl.int32)
        d = tl.load(problem + P_D).to(tl.int32)
        runs = True
        if CONDITION == IF_MARKED:
            runs = tl.load(todo + 1 + number) != 0
            d = tl.where(runs, d, 0)
        elif CONDITION == IF_UNMARKED:
            runs = tl.load(todo + 1 + number) == 0
            d = tl.where(runs, d, 0)
        i0, j0 = row * BLOCK_M, column * BLOCK_N
        i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
        first_x, first_y = tl.load(problem + P_FIRST_X), tl.load(problem + P_FIRST_Y)
        fi = tl.load(factors + FACTOR * vectors_total + first_x + i, mask=i < n, other=0.0)
        fj = tl.load(factors + FACTOR * vectors_total + first_y + j, mask=j < m, other=0.0)

        dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if MAPS:
            # items of a batch lie one behind the other: all are one tall matrix
            x_at, y_at = number * n + i0, number * m + j0
            dots = _multiplied_maps(x_map, y_map, x_low_map, y_low_map, x_at, y_at, d, dots, LAYOUT, STEP, PARTS)
        elif LAYOUT == ANY:
            scale_x = tl.full([BLOCK_M], 1.0, tl.float32)
            scale_y = tl.full([BLOCK_N], 1.0, tl.float32)
            if FACTOR == 1:
                scale_x = tl.load(factors + 2 * vectors_total + first_x + i, mask=i < n, other=0.0)
                scale_y = tl.load(factors + 2 * vectors_total + first_y + j, mask=j < m, other=0.0)
            dots = _multiplied_any(
                tl.load(problem + P_ADDRESS_X).to(tl.pointer_type(DTYPE)),
                tl.load(problem + P_ADDRESS_Y).to(tl.pointer_type(DTYPE)),
                i, j, n, m, d,
                tl.load(problem + P_STRIDE_NX), tl.load(problem + P_STRIDE_DX),
                tl.load(problem + P_STRIDE_NY), tl.load(problem + P_STRIDE_DY),
                scale_x, scale_y, dots, STEP, DTYPE,
            )  # fmt: skip
        else:
            x_low = low
            y_low = low
            count_x, count_y, length = n, m, d
            if OWN:
                at_x, at_y = tl.load(problem + P_OUT_X), tl.load(problem + P_OUT_Y)
                stride_x = tl.multiple_of(tl.load(problem + P_OUT_STRIDE_X), 16)
                stride_y = tl.multiple_of(tl.load(problem + P_OUT_STRIDE_Y), 16)
                x = high + tl.multiple_of(at_x, 16)
                y = high + tl.multiple_of(at_y, 16)
                if PARTS == 3:
                    x_low = low + tl.multiple_of(at_x, 16)
                    y_low = low + tl.multiple_of(at_y, 16)
                if LAYOUT == ROWS:  # made with zeros up to the stride
                    length = tl.where(d > 0, stride_x.to(tl.int32), 0)
                else:
                    count_x, count_y = stride_x.to(tl.int32), stride_y.to(tl.int32)
            else:
                x = tl.multiple_of(tl.load(problem + P_ADDRESS_X).to(tl.pointer_type(DTYPE)), 16)
                y = tl.multiple_of(tl.load(problem + P_ADDRESS_Y).to(tl.pointer_type(DTYPE)), 16)
                if LAYOUT == ROWS:
                    stride_x = tl.multiple_of(tl.load(problem + P_STRIDE_NX), 8)
                    stride_y = tl.multiple_of(tl.load(problem + P_STRIDE_NY), 8)
                else:
                    stride_x = tl.multiple_of(tl.load(problem + P_STRIDE_DX), 8)
                    stride_y = tl.multiple_of(tl.load(problem + P_STRIDE_DY), 8)
            if LAYOUT == ROWS:
                length = tl.multiple_of(length, 8)
            else:
                count_x, count_y = tl.multiple_of(count_x, 8), tl.multiple_of(count_y, 8)
            dots = _multiplied_aligned(
                x, y, x_low, y_low, i, j, count_x, count_y, length, stride_x, stride_y, dots, LAYOUT, STEP, PARTS
            )

        ragged = (i0 + BLOCK_M > n) | (j0 + BLOCK_N > m)
        if not CROSS:
            ragged = ragged | (i0 + BLOCK_M > j0)
        if ragged:  # a select, for what lies outside may be NaN
            there = (i < n)[:, None] & (j < m)[None, :]
            if not CROSS:
                there = there & (j[None, :] > i[:, None])
            dots = tl.where(there, dots, 0.0)

        part = dots * fj[None, :]
        if WANT == ABS_SUM:
            tl.store(partials + entry, tl.sum(tl.sum(tl.abs(part), 1) * fi, 0), mask=runs)
        else:
            part = part * fi[:, None]
            size = tl.abs(part)
            if WANT & ABS_SUM:
                tl.store(partials + entry, tl.sum(tl.sum(size, 1), 0), mask=runs)
            if WANT & SQ_SUM:
                tl.store(partials + total + entry, tl.sum(tl.sum(part * part, 1), 0), mask=runs)
            if WANT & SUM:
                tl.store(partials + 2 * total + entry, tl.sum(tl.sum(part, 1), 0), mask=runs)
            if WANT & ROW_ABS:
                slots = row_slots + (tl.load(problem + P_ROW_SLOTS) - row_base)
                place = (column - first_column).to(tl.int64) * n + i
                tl.store(slots + place, tl.sum(size, 1), mask=(i < n) & runs)
                slots = column_slots + (tl.load(problem + P_COLUMN_SLOTS) - column_base)
                left = first_column * BLOCK_N
                width = tl.minimum(last_column * BLOCK_N, m) - left
                tl.store(slots + row.to(tl.int64) * width + (j - left), tl.sum(size, 0), mask=(j < m) & runs)
            if WANT & (ABS_MAX | HIST):
                counted = (i < n)[:, None] & (j < m)[None, :]
                if not CROSS:
                    counted = counted & (j[None, :] > i[:, None])
                if NORMALIZE:  # zero vectors have no pairs
                    counted = counted & (fi > 0)[:, None] & (fj > 0)[None, :]
                if WANT & ABS_MAX:
                    size = tl.where(counted, size, -1.0)
                    top = tl.max(tl.max(size, 1), 0)
                    key = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                    key = tl.where(size == top, key, BLOCK_M * BLOCK_N)
                    key = tl.min(tl.min(key, 1), 0)  # the first of equals
                    pair = ((i0 + key // BLOCK_N).to(tl.int64) << 32) | (j0 + key % BLOCK_N).to(tl.int64)
                    tl.store(partials + 3 * total + entry, top, mask=runs)
                    tl.store(arguments + entry, pair, mask=runs)
                if WANT & HIST:
                    counters = hist + number.to(tl.int64) * bins
                    _count_cosines(part, counted & runs, counters, bins, BINS, BLOCK_M * BLOCK_N)

# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Kernels around the fold: lengths and operands before it, per-vector sums and the record after it.

Traffic  one read of the input; a second, mostly from cache, and one write of 16 bits per element and part where
operands are made (float32, float8).  Lengths are summed in float32 within a step of the row, in float64 between steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from orthofast.kernels.contract import ABS_MAX as _ABS_MAX
from orthofast.kernels.contract import ABS_SUM as _ABS_SUM
from orthofast.kernels.contract import SQ_SUM as _SQ_SUM
from orthofast.kernels.contract import SUM as _SUM
from orthofast.kernels.triton_access import (
    COLUMNS,
    P_COLUMN_SLOTS,
    P_D,
    P_ENTRIES,
    P_ENTRY,
    P_FIRST_X,
    P_FIRST_Y,
    P_M,
    P_N,
    P_ROW_SLOTS,
    PROBLEM_COLUMNS,
    ROWS,
    S_ADDRESS,
    S_COUNT,
    S_FIRST,
    S_LENGTH,
    S_OUT,
    S_OUT_STRIDE,
    S_PROBLEM,
    S_ROLE,
    S_STRIDE_D,
    S_STRIDE_N,
    SIDE_COLUMNS,
    constant,
    decoded,
    low_part,
    power_of_two,
    scale_power,
)

ABS_SUM, SQ_SUM, SUM, ABS_MAX = (constant(bit) for bit in (_ABS_SUM, _SQ_SUM, _SUM, _ABS_MAX))
PROBLEM = constant(PROBLEM_COLUMNS)
SIDE = constant(SIDE_COLUMNS)
SAFE_POWER = constant(40)  # products of unscaled entries up to 2**(2*40) stay far inside float32
PARTIALS = constant(4)  # abs, squares, signed, largest: rows of the table of partial results
RMS_ROUNDING = constant(3.0e-4)  # sqrt(2) * rms relative rounding error of 11 significant bits, 2.07e-4
ROUNDING_ALLOWED = constant(1e-4)  # relative error of the mean |cos| through rounded operands


@triton.jit
def _elements(base, vectors, entries, stride_n, stride_d, LAYOUT: tl.constexpr):
    """(vectors, entries) pointers; the stride that is 1 is a constant, so that loads are wide."""
    v = vectors.to(tl.int64)[:, None]
    e = entries.to(tl.int64)[None, :]
    if LAYOUT == ROWS:
        return base + v * stride_n + e
    if LAYOUT == COLUMNS:
        return base + v + e * stride_d
    return base + v * stride_n + e * stride_d


@triton.jit(do_not_specialize=("vectors_total",))  # one compiled form for all sizes
def prepare(
    units,
    sides,
    norm_sq,
    factors,
    high,
    low,
    todo,
    vectors_total,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,  # 16-bit parts to write: 0, 1 or 2
    SCALED: tl.constexpr,  # operands are scaled by a power of two per vector
    WATCHED: tl.constexpr,  # problems with entries too large or small for unscaled products are marked
    NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CONDITION: tl.constexpr,  # only marked problems
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Lengths of BLOCK_V vectors of one side, what the epilogue multiplies by, and their operands where wanted.

    ``factors`` holds three rows of float32 per vector: the factor of the operand in memory, that of the exactly scaled
    vector, and the scale itself.
    """
    unit = tl.program_id(0)
    side = sides + tl.load(units + 2 * unit).to(tl.int64) * SIDE
    start = tl.load(units + 2 * unit + 1) * BLOCK_V
    count, length = tl.load(side + S_COUNT).to(tl.int32), tl.load(side + S_LENGTH).to(tl.int32)
    stride_n, stride_d = tl.load(side + S_STRIDE_N), tl.load(side + S_STRIDE_D)
    base = tl.load(side + S_ADDRESS).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        if LAYOUT == ROWS:
            stride_n = tl.multiple_of(stride_n, 8)
            length = tl.multiple_of(length, 8)
        else:
            stride_d = tl.multiple_of(stride_d, 8)
            count = tl.multiple_of(count, 8)
    if CONDITION == 1:
        marked = tl.load(todo + 1 + tl.load(side + S_PROBLEM)) != 0
        count = tl.where(marked, count, 0)
        length = tl.where(marked, length, 0)
    vectors = start + tl.arange(0, BLOCK_V)
    there = vectors < count

    largest = tl.zeros([BLOCK_V], tl.float32)
    square = tl.zeros([BLOCK_V], tl.float64)
    power = scale_power(largest)
    for k in range(0, length, BLOCK_D):
        entries = k + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (entries < length)[None, :]
        stored = tl.load(_elements(base, vectors, entries, stride_n, stride_d, LAYOUT), mask=inside, other=0)
        value = decoded(stored, FORMAT)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
        before = power
        power = scale_power(largest)
        shrink = power_of_two(tl.maximum(power - before, -126)).to(tl.float64)
        value *= power_of_two(power)[:, None]
        square = square * shrink * shrink + tl.sum(value * value, 1).to(tl.float64)
    # 4**-power in float64, by its exponent field
    unscale = ((1023 - 2 * power).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    first = tl.load(side + S_FIRST)
    place = first + vectors
    tl.store(norm_sq + place, square * unscale, mask=there)

    scale = power_of_two(power)
    if NORMALIZE:
        exact = inverse_root(square)
    else:
        exact = power_of_two(-power)
    factor = exact
    if PARTS == 0:  # operands are the input itself
        if NORMALIZE:
            factor = exact * scale
        else:
            factor = tl.full([BLOCK_V], 1.0, tl.float32)
    elif not SCALED:
        scale = tl.full([BLOCK_V], 1.0, tl.float32)
        if NORMALIZE:
            factor = exact * power_of_two(power)
        else:
            factor = scale
    if WATCHED:
        # zero vectors and those with NaN or Inf need no rescue
        wild = (tl.abs(power - 9) > SAFE_POWER) & (square > 0) & (square < float("inf")) & there
        if tl.max(wild.to(tl.int32), 0) > 0:
            tl.store(todo, 1)
            tl.store(todo + 1 + tl.load(side + S_PROBLEM), 1)

    if PARTS > 0:
        out = tl.load(side + S_OUT)
        out_stride = tl.multiple_of(tl.load(side + S_OUT_STRIDE), 16)
        width = length
        rows = count
        # zeros up to the aligned end, which the fold reads
        if LAYOUT == COLUMNS:
            rows = tl.where(count > 0, out_stride.to(tl.int32), 0)
        else:
            width = tl.where(length > 0, out_stride.to(tl.int32), 0)
        rounded = tl.zeros([BLOCK_V], tl.float64)
        for k in range(0, width, BLOCK_D):
            entries = k + tl.arange(0, BLOCK_D)
            inside = there[:, None] & (entries < length)[None, :]
            stored = tl.load(_elements(base, vectors, entries, stride_n, stride_d, LAYOUT), mask=inside, other=0)
            value = decoded(stored, FORMAT) * scale[:, None]
            part = value.to(tl.float16)
            kept = (vectors < rows)[:, None] & (entries < width)[None, :]
            # odd strides are brought into rows
            if LAYOUT == COLUMNS:
                offsets = vectors.to(tl.int64)[:, None] + entries.to(tl.int64)[None, :] * out_stride
            else:
                offsets = vectors.to(tl.int64)[:, None] * out_stride + entries.to(tl.int64)[None, :]
            tl.store(high + out + offsets, part, mask=kept)
            if PARTS == 2:
                tl.store(low + out + offsets, low_part(value, part), mask=kept)
            else:
                seen = part.to(tl.float32)
                rounded += tl.sum(seen * seen, 1).to(tl.float64)
        if NORMALIZE and SCALED and PARTS == 1:
            factor = inverse_root(rounded)
    tl.store(factors + place, factor, mask=there)
    tl.store(factors + vectors_total + place, exact, mask=there)
    tl.store(factors + 2 * vectors_total + place, scale, mask=there)


@triton.jit
def inverse_root(square):
    """1/sqrt of a float64 as float32, 0 for 0."""
    root = tl.sqrt(tl.where(square > 0, square, 1.0))
    return tl.where(square == 0, 0.0, tl.where(square > 0, 1.0 / root, square)).to(tl.float32)


@triton.jit(do_not_specialize=("row_base", "column_base", "first_column", "last_column"))
def join_rows(
    units,
    sides,
    problems,
    row_slots,
    column_slots,
    row_abs,
    todo,
    row_base,
    column_base,
    first_column,
    last_column,
    CROSS: tl.constexpr,
    FIRST: tl.constexpr,  # the sums begin here; else they are added to
    CONDITION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Add the slots of BLOCK_V vectors in fixed order, float64: those of their row tile and of their column tile."""
    unit = tl.program_id(0)
    side = sides + tl.load(units + 2 * unit).to(tl.int64) * SIDE
    number = tl.load(side + S_PROBLEM)
    runs = True
    if CONDITION == 1:
        runs = tl.load(todo + 1 + number) != 0
    problem = problems + number * PROBLEM
    n, m = tl.load(problem + P_N).to(tl.int32), tl.load(problem + P_M).to(tl.int32)
    role = tl.load(side + S_ROLE)
    vectors = tl.load(units + 2 * unit + 1) * BLOCK_V + tl.arange(0, BLOCK_V)
    there = (vectors < tl.load(side + S_COUNT)) & runs
    total = tl.zeros([BLOCK_V], tl.float64)
    last = tl.minimum(last_column, (m + BLOCK_N - 1) // BLOCK_N)
    if role == 0:
        slots = row_slots + (tl.load(problem + P_ROW_SLOTS) - row_base)
        lowest = vectors * 0
        heads = there
        if not CROSS:
            row = vectors // BLOCK_M
            lowest = (row * BLOCK_M + 1) // BLOCK_N
            heads = there & (row * BLOCK_M < n - 1)
        for column in range(first_column, last):
            place = (column - first_column).to(tl.int64) * n + vectors
            total += tl.load(slots + place, mask=heads & (lowest <= column), other=0.0).to(tl.float64)
    if role == 1 or not CROSS:
        slots = column_slots + (tl.load(problem + P_COLUMN_SLOTS) - column_base)
        left = first_column * BLOCK_N
        width = tl.minimum(last * BLOCK_N, m) - left
        column = vectors // BLOCK_N
        held = there & (column >= first_column) & (column < last)
        rows = (n + BLOCK_M - 1) // BLOCK_M
        if not CROSS:
            rows = (tl.maximum(n - 1, 0) + BLOCK_M - 1) // BLOCK_M
        for row in range(rows):
            mask = held
            if not CROSS:
                mask = held & ((row * BLOCK_M + 1) // BLOCK_N <= column)
            place = (row + tl.zeros([1], tl.int64)) * width + (vectors - left)
            total += tl.load(slots + place, mask=mask, other=0.0).to(tl.float64)
    target = row_abs + tl.load(side + S_FIRST) + vectors
    if not FIRST:
        total += tl.load(target, mask=there, other=0.0)
    tl.store(target, total, mask=there)


@triton.jit
def _counts(norm_sq, first, count, BLOCK: tl.constexpr):
    """How many of these vectors are zero, and how many hold NaN or Inf."""
    zero = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        vectors = start + tl.arange(0, BLOCK)
        square = tl.load(norm_sq + first + vectors, mask=vectors < count, other=1.0)
        zero += (square == 0).to(tl.int32)
        bad += 1 - (tl.abs(square) < float("inf")).to(tl.int32)
    return tl.sum(zero, 0).to(tl.int64), tl.sum(bad, 0).to(tl.int64)


@triton.jit(do_not_specialize=("total", "problems_total"))
def finish(
    problems,
    norm_sq,
    partials,
    arguments,
    sums,
    counts,
    todo,
    total,
    problems_total,
    WANT: tl.constexpr,
    CROSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECIDES: tl.constexpr,  # operands were rounded: mark problems whose mean is near the floor
    CONDITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One problem's record: partial results in entry order, float64, fixed order; counts; NaN where a vector is bad.

    ``sums`` (5, problems) float64: abs, squares, signed, largest, floor. ``counts`` (5, problems) int64: pairs, zero,
    nonfinite, and the pair that attains the largest.
    """
    number = tl.program_id(0)
    problem = problems + number * PROBLEM
    runs = True
    if CONDITION == 1:
        runs = tl.load(todo + 1 + number) != 0
    n, m, d = tl.load(problem + P_N), tl.load(problem + P_M), tl.load(problem + P_D)
    first, entries = tl.load(problem + P_ENTRY), tl.load(problem + P_ENTRIES)
    entries = tl.where(runs, entries, 0)
    zero, bad = _counts(norm_sq, tl.load(problem + P_FIRST_X), n, BLOCK)
    if CROSS:
        zero_y, bad_y = _counts(norm_sq, tl.load(problem + P_FIRST_Y), m, BLOCK)
        pairs = n * m
        if NORMALIZE:
            pairs = (n - zero) * (m - zero_y)
        zero += zero_y
        bad += bad_y
    else:
        kept = n
        if NORMALIZE:
            kept = n - zero
        pairs = kept * (kept - 1) // 2
    tl.store(counts + number, pairs)
    tl.store(counts + problems_total + number, zero)
    tl.store(counts + 2 * problems_total + number, bad)

    nan = tl.full([1], float("nan"), tl.float64)
    here = number + tl.arange(0, 1)
    for sort in tl.static_range(3):
        if WANT & (1 << sort):
            added = tl.zeros([BLOCK], tl.float64)
            for start in range(0, entries, BLOCK):
                at = start + tl.arange(0, BLOCK)
                part = tl.load(partials + sort * total + first + at, mask=at < entries, other=0.0)
                added += part.to(tl.float64)
            whole = tl.sum(added, 0)
            answer = tl.where(bad > 0, nan, whole)
            tl.store(sums + sort * problems_total + here, answer, mask=runs)
            if sort == 0 and DECIDES:
                floor = RMS_ROUNDING / tl.sqrt(tl.maximum(d, 1).to(tl.float32)).to(tl.float64)
                mean = whole / tl.maximum(pairs, 1).to(tl.float64)
                near = (0.5 * floor * floor > ROUNDING_ALLOWED * mean * mean) & (pairs > 0) & (bad == 0)
                tl.store(todo + 1 + number, near.to(tl.int32))
                tl.store(todo, 1, mask=near)
                tl.store(sums + 4 * problems_total + number, tl.where(near, 0.0, floor))
    if WANT & ABS_MAX:
        best = tl.full([BLOCK], -1.0, tl.float32)
        name = tl.full([BLOCK], (1 << 62), tl.int64)
        for start in range(0, entries, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(partials + 3 * total + first + at, mask=at < entries, other=-1.0)
            pair = tl.load(arguments + first + at, mask=at < entries, other=(1 << 62))
            wins = (value > best) | ((value == best) & (pair < name))
            best = tl.where(wins, value, best)
            name = tl.where(wins, pair, name)
        top = tl.max(best, 0)
        pair = tl.min(tl.where(best == top, name, (1 << 62)), 0)
        none = (bad > 0) | (top < 0)
        answer = tl.where(none, nan, top.to(tl.float64))
        tl.store(sums + 3 * problems_total + here, answer, mask=runs)
        tl.store(counts + 3 * problems_total + number, tl.where(none, -1, pair >> 32), mask=runs)
        tl.store(counts + 4 * problems_total + number, tl.where(none, -1, pair & 0xFFFFFFFF), mask=runs)


@triton.jit(do_not_specialize=("problems_total",))
def poison_vectors(units, sides, counts, row_abs, problems_total, BLOCK_V: tl.constexpr):
    """NaN into the per-vector sums of problems that hold a bad vector."""
    unit = tl.program_id(0)
    side = sides + tl.load(units + 2 * unit).to(tl.int64) * SIDE
    vectors = tl.load(units + 2 * unit + 1) * BLOCK_V + tl.arange(0, BLOCK_V)
    bad = tl.load(counts + 2 * problems_total + tl.load(side + S_PROBLEM)) > 0
    mask = (vectors < tl.load(side + S_COUNT)) & bad
    tl.store(row_abs + tl.load(side + S_FIRST) + vectors, tl.full([BLOCK_V], float("nan"), tl.float64), mask=mask)

# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator, unused-ignore"
"""The compiled loops of the numba backend: lengths of vectors, tiles through BLAS, sums over a tile.

Every loop takes its next piece of work from a shared counter, holds no Python lock, and writes only to its own place.
Tensors come as addresses and strides, so one call serves any number of tensors of one dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM
from orthofast.kernels.numba_access import as_int64, blas_addresses, call, fetch_add, pointer, widen

__all__ = ["blas_addresses", "fold", "measure", "survey"]

UNIT = 256  # vectors measured at a time
STRIP = 16  # vectors transposed at a time: one cache line of float32

# columns of the table of sides (one set of vectors each)
ADDRESS, VECTOR_STRIDE, ELEMENT_STRIDE, COUNT, LENGTH, FIRST, FIRST_UNIT, LAYOUT, ZERO, NONFINITE = range(10)
SIDE_COLUMNS = 10
# columns of the table of items (one fold each)
LEFT, RIGHT, BLOCK, FIRST_TILE, OUTPUT = range(5)
ITEM_COLUMNS = 5
# layouts: copied into panels first, or read by BLAS where they are
PACKED, ROWS, COLUMNS = 0, 1, 2
MAX_LEADING = 2**31 - 1  # BLAS takes 32-bit strides
_T, _N, _L = ord("T"), ord("N"), ord("L")


def _entry(function: Any) -> Any:
    """A loop called from Python: compiled on first use, kept on disk where any place for it can be written."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package nor the user's cache folder can be written
        return njit(nogil=True, error_model="numpy")(function)


def _inner(function: Any) -> Any:
    return njit(nogil=True, error_model="numpy")(function)


def _regrouped(function: Any) -> Any:
    """Sums may be regrouped into vector lanes; NaN and Inf keep their meaning."""
    return njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)


@_inner
def _last_at_most(starts: Any, value: int) -> int:
    """Index of the last start not above the value; starts ascend."""
    low, high = 0, len(starts)
    while high - low > 1:
        middle = (low + high) // 2
        if starts[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@_regrouped
def _sum_squares(source: Any, table: Any, side: Any, start: int, squares: Any) -> None:
    """Squared lengths of the vectors from ``start``, in float64, along whichever axis is contiguous."""
    step, stride, length = side[VECTOR_STRIDE], side[ELEMENT_STRIDE], side[LENGTH]
    rows = len(squares)
    squares[:] = 0.0
    if stride == 1:
        for i in range(rows):
            vector = source[(start + i) * step : (start + i) * step + length]
            total = 0.0
            for k in range(length):
                value = np.float64(widen(vector[k], table))
                total += value * value
            squares[i] = total
    elif step == 1:
        for k in range(length):
            across = source[start + k * stride : start + k * stride + rows]
            for i in range(rows):
                value = np.float64(widen(across[i], table))
                squares[i] += value * value
    else:
        for i in range(rows):
            for k in range(length):
                value = np.float64(widen(source[(start + i) * step + k * stride], table))
                squares[i] += value * value


@_inner
def _rescaled_square(source: Any, table: Any, side: Any, vector: int) -> tuple[float, int]:
    """Squared length as (square, e): times 4**e, so that float64 neither over- nor underflows."""
    step, stride, length = side[VECTOR_STRIDE], side[ELEMENT_STRIDE], side[LENGTH]
    largest = 0.0
    for k in range(length):
        value = abs(np.float64(widen(source[vector * step + k * stride], table)))
        if not value <= largest:
            largest = value
        if not math.isfinite(value):
            return value, 0
    if largest == 0.0:
        return 0.0, 0
    exponent = math.frexp(largest)[1]
    total = 0.0
    for k in range(length):
        small = math.ldexp(np.float64(widen(source[vector * step + k * stride], table)), -exponent)
        total += small * small
    return total, exponent


@_entry
def measure(
    like: Any, table: Any, sides: Any, units: int, queue: Any, norm_sq: Any, inverse: Any, scale: Any, limit: int
) -> None:
    """Squared length, power-of-two scale and inverse scaled length of every vector.

    ``scale`` has the compute dtype, whose exponents reach ``limit``; a zero or non-finite vector has inverse 0.
    """
    buffer = np.empty(UNIT)
    while True:
        unit = fetch_add(queue.ctypes.data, 1)
        if unit >= units:
            return
        side = sides[_last_at_most(sides[:, FIRST_UNIT], unit)]
        start = (unit - side[FIRST_UNIT]) * UNIT
        rows = min(UNIT, side[COUNT] - start)
        span = (side[COUNT] - 1) * side[VECTOR_STRIDE] + (side[LENGTH] - 1) * side[ELEMENT_STRIDE] + 1
        source = carray(pointer(side[ADDRESS], like), (max(span, 0),))
        squares = buffer[:rows]
        _sum_squares(source, table, side, start, squares)
        for i in range(rows):
            square, power = squares[i], 0
            if not 1e-270 < square < 1e270:
                square, power = _rescaled_square(source, table, side, start + i)
            at = side[FIRST] + start + i
            norm_sq[at] = math.ldexp(square, 2 * power)
            scale[at], inverse[at] = 1, 0.0
            if square > 0.0 and math.isfinite(square):
                length, exponent = math.frexp(math.sqrt(square))
                wanted = exponent + power
                used = min(max(wanted, -limit), limit)
                scale[at] = math.ldexp(1.0, -used)
                inverse[at] = 1.0 / math.ldexp(length, wanted - used)
            elif not math.isfinite(square):
                inverse[at] = math.nan


@_entry
def survey(like: Any, sides: Any, inverse: Any, scale: Any, normalize: bool, safe: int) -> None:
    """Count zero and non-finite vectors; decide which sides BLAS may read where they are.

    That needs a contiguous axis, the compute dtype, and lengths within 2**(+-safe).
    """
    high, low = math.ldexp(1.0, safe), math.ldexp(1.0, -safe)
    for side in sides:
        first, count = side[FIRST], side[COUNT]
        zero, bad, moderate = 0, 0, True
        for at in range(first, first + count):
            if inverse[at] == 0.0:
                zero += 1
            elif math.isnan(inverse[at]):
                bad += 1
            elif not low < np.float64(scale[at]) < high:
                moderate = False
            if not normalize:
                scale[at], inverse[at] = 1, 1.0
        side[ZERO], side[NONFINITE] = zero, bad
        side[LAYOUT] = PACKED
        if like.dtype == scale.dtype and (moderate or not normalize):
            if side[ELEMENT_STRIDE] == 1 and max(1, side[LENGTH]) <= side[VECTOR_STRIDE] <= MAX_LEADING:
                side[LAYOUT] = ROWS
            elif side[VECTOR_STRIDE] == 1 and max(1, count) <= side[ELEMENT_STRIDE] <= MAX_LEADING:
                side[LAYOUT] = COLUMNS
        if side[LAYOUT] != PACKED and normalize:
            for at in range(first, first + count):
                inverse[at] *= np.float64(scale[at])
                scale[at] = 1


@_inner
def _pack(like: Any, table: Any, side: Any, start: int, rows: int, begin: int, scale: Any, panel: Any) -> None:
    """Copy (rows, panel width) elements from ``begin`` on, widened and scaled, into a panel of contiguous vectors."""
    step, stride = side[VECTOR_STRIDE], side[ELEMENT_STRIDE]
    width = min(panel.shape[1], side[LENGTH] - begin)
    span = (side[COUNT] - 1) * step + (side[LENGTH] - 1) * stride + 1
    source = carray(pointer(side[ADDRESS], like), (span,))
    factors = scale[side[FIRST] + start : side[FIRST] + start + rows]
    if stride == 1:
        for i in range(rows):
            at = (start + i) * step + begin
            vector, target, factor = source[at : at + width], panel[i], factors[i]
            for k in range(width):
                target[k] = widen(vector[k], table) * factor
    else:
        for top in range(0, rows, STRIP):
            for k in range(width):
                for i in range(top, min(top + STRIP, rows)):
                    panel[i, k] = widen(source[(start + i) * step + (begin + k) * stride], table) * factors[i]


@_inner
def _multiply(
    blas: Any, letters: Any, sizes: Any, numbers: Any, diagonal: bool, rows: int, columns: int, depth: int,
    left: int, left_ld: int, left_rows: bool, right: int, right_ld: int, right_rows: bool, add: bool, tile: Any,
) -> None:  # fmt: skip
    """tile (rows, columns), row after row, becomes or grows by left @ right.T; on the diagonal its upper part only."""
    # Fortran sees every array transposed: its result is (columns, rows)
    sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] = columns, rows, depth, right_ld, left_ld, columns
    numbers[0], numbers[1] = 1, 1 if add else 0
    letters[0] = _T if right_rows else _N
    letters[1] = _N if left_rows else _T
    letters[2] = _L
    letter, size, number = letters.ctypes.data, sizes.ctypes.data, numbers.ctypes.data
    one, other = number, number + numbers.itemsize
    if diagonal:
        call(blas[1], (letter + 2, letter, size, size + 8, one, right, size + 12, other, tile.ctypes.data, size + 20))
    else:
        call(
            blas[0],
            (letter, letter + 1, size, size + 4, size + 8, one, right, size + 12, left, size + 16, other,
             tile.ctypes.data, size + 20),
        )  # fmt: skip


@_regrouped
def _sum_row(row: Any, weights: Any, start: int) -> float:
    total = 0.0
    for j in range(start, len(row)):
        total += abs(np.float64(row[j])) * weights[j]
    return total


@_regrouped
def _more_sums(row: Any, weights: Any, start: int) -> tuple[float, float]:
    square, signed = 0.0, 0.0
    for j in range(start, len(row)):
        value = np.float64(row[j]) * weights[j]
        square += value * value
        signed += value
    return square, signed


@_inner
def _max_of_row(row: Any, weights: Any, start: int) -> int:
    """Largest |value| as the bits of a float64, which order as integers; -1 where no vector is left."""
    largest = -1
    for j in range(start, len(row)):
        bits = as_int64(abs(np.float64(row[j])) * weights[j])
        largest = max(largest, bits if weights[j] > 0.0 else -1)
    return largest


@_inner
def _where_in_row(row: Any, weights: Any, start: int, largest: int) -> int:
    for j in range(start, len(row)):
        if weights[j] > 0.0 and as_int64(abs(np.float64(row[j])) * weights[j]) == largest:
            return j
    return -1


@_inner
def _count_row(row: Any, weights: Any, start: int, weight: float, counts: Any) -> None:
    bins = len(counts)
    for j in range(start, len(row)):
        if weights[j] > 0.0:
            cosine = np.float64(row[j]) * weights[j] * weight
            counts[min(max(int((cosine + 1.0) * (bins / 2)), 0), bins - 1)] += 1


@_regrouped
def _add_row(row: Any, weights: Any, start: int, weight: float, across: Any) -> None:
    for j in range(start, len(row)):
        across[j] += abs(np.float64(row[j])) * weights[j] * weight


@_inner
def _abs_sum_of_tile(tile: Any, rows: int, columns: int, diagonal: bool, down: Any, across: Any) -> float:
    """The common case; ``down`` (rows,) and ``across`` (columns,) are the inverse lengths."""
    total = 0.0
    for i in range(rows):
        total += _sum_row(tile[i * columns : (i + 1) * columns], across, i + 1 if diagonal else 0) * down[i]
    return total


@_inner
def _sum_tile(
    tile: Any, rows: int, columns: int, diagonal: bool, down: Any, across: Any, want: int,
    sums: Any, pair: Any, row_part: Any, column_part: Any, counts: Any,
) -> None:  # fmt: skip
    """Everything but the plain sum of absolute values."""
    square, signed, best = 0.0, 0.0, -1.0
    pair[0], pair[1] = -1, -1
    column_part[:] = 0.0
    for i in range(rows):
        row, weight = tile[i * columns : (i + 1) * columns], down[i]
        start = i + 1 if diagonal else 0
        if want & ROW_ABS:
            row_part[i] = _sum_row(row, across, start) * weight
            _add_row(row, across, start, weight, column_part)
        if want & (SQ_SUM | SUM):
            two = _more_sums(row, across, start)
            square += two[0] * (weight * weight)
            signed += two[1] * weight
        if weight == 0.0:
            continue
        if want & ABS_MAX:
            bits = _max_of_row(row, across, start)
            if bits >= 0:
                j = _where_in_row(row, across, start, bits)
                value = abs(np.float64(row[j])) * across[j] * weight
                if value > best:
                    best = value
                    pair[0], pair[1] = i, j
        if want & HIST:
            _count_row(row, across, start, weight, counts)
    sums[1], sums[2], sums[3] = square, signed, best


@_inner
def _place(local: int, across: int, cross: bool) -> tuple[int, int]:
    """Row block and column block of an item's tile: all of a cross fold, the upper triangle of a set with itself."""
    if cross:
        return local // across, local % across
    back = across * (across + 1) // 2 - 1 - local  # counted from the last tile
    up = int((math.sqrt(8.0 * back + 1.0) - 1.0) / 2.0)
    while up * (up + 1) // 2 > back:
        up -= 1
    while (up + 1) * (up + 2) // 2 <= back:
        up += 1
    return across - 1 - up, across - 1 - (back - up * (up + 1) // 2)


@_entry
def fold(
    like: Any, table: Any, sides: Any, items: Any, begin: int, end: int, queue: Any, inverse: Any, scale: Any,
    blas: Any, letters: Any, sizes: Any, numbers: Any, tile: Any, panels: Any, want: int,
    sums: Any, pairs: Any, row_parts: Any, column_parts: Any, counts: Any, hist: Any,
) -> None:  # fmt: skip
    """Take tiles from ``begin`` to ``end`` from the queue: multiply, fold, leave one partial result each.

    ``sums`` (tiles, 4) abs, square, signed, max; ``pairs`` (tiles, 4) its pair, the tile's first row and column.
    ``counts`` is None where only the sum of absolute values is wanted: the rest is then not even compiled.
    """
    width, itemsize = panels.shape[2], scale.itemsize
    while True:
        number = begin + fetch_add(queue.ctypes.data, 1)
        if number >= end:
            return
        item = items[_last_at_most(items[:, FIRST_TILE], number)]
        left, right, block = sides[item[LEFT]], sides[item[RIGHT]], item[BLOCK]
        slot = number - begin
        cross = item[LEFT] != item[RIGHT]
        upper, beside = _place(number - item[FIRST_TILE], (right[COUNT] + block - 1) // block, cross)
        top, side = upper * block, beside * block
        sums[slot, :3], sums[slot, 3] = 0.0, -1.0
        pairs[slot, :2], pairs[slot, 2], pairs[slot, 3] = -1, top, side
        rows, columns = min(block, left[COUNT] - top), min(block, right[COUNT] - side)
        if left[NONFINITE] + right[NONFINITE] > 0:  # its sums will be NaN
            row_parts[slot], column_parts[slot] = 0.0, 0.0
            continue
        length = left[LENGTH]
        diagonal = not cross and top == side
        if length == 0:
            tile[: rows * columns] = 0
        direct = left[LAYOUT] != PACKED and right[LAYOUT] != PACKED
        left_rows, right_rows = not direct or left[LAYOUT] == ROWS, not direct or right[LAYOUT] == ROWS
        left_at = left[ADDRESS] + top * left[VECTOR_STRIDE] * itemsize
        right_at = right[ADDRESS] + side * right[VECTOR_STRIDE] * itemsize
        left_ld = left[VECTOR_STRIDE] if left_rows else left[ELEMENT_STRIDE]
        right_ld = right[VECTOR_STRIDE] if right_rows else right[ELEMENT_STRIDE]
        if not direct:
            left_at, right_at = np.int64(panels[0].ctypes.data), np.int64(panels[1].ctypes.data)
            left_ld, right_ld = width, width
        step = length if direct else width
        for start in range(0, length, max(1, step)):
            if not direct:
                _pack(like, table, right, side, columns, start, scale, panels[1])
                if not diagonal:
                    _pack(like, table, left, top, rows, start, scale, panels[0])
            _multiply(
                blas, letters, sizes, numbers, diagonal, rows, columns, min(step, length - start),
                left_at, left_ld, left_rows, right_at, right_ld, right_rows, start > 0, tile,
            )  # fmt: skip
        down = inverse[left[FIRST] + top : left[FIRST] + top + rows]
        across = inverse[right[FIRST] + side : right[FIRST] + side + columns]
        if want & ABS_SUM:
            sums[slot, 0] = _abs_sum_of_tile(tile, rows, columns, diagonal, down, across)
        if counts is not None:
            _sum_tile(
                tile, rows, columns, diagonal, down, across, want,
                sums[slot], pairs[slot], row_parts[slot], column_parts[slot], counts,
            )  # fmt: skip
            if pairs[slot, 0] >= 0:
                pairs[slot, 0] += top
                pairs[slot, 1] += side
            if want & HIST:
                target = hist[item[OUTPUT]]
                for k in range(len(counts)):
                    if counts[k]:
                        fetch_add(target.ctypes.data + 8 * k, counts[k])
                        counts[k] = 0

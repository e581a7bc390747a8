"""Tiles of all pairs as an int32 work list: order, grouping of many matrices, shares; pure numpy.

An entry is (problem, row tile | column tile << 16). A problem is one item of one request. A tile covers vectors
``[row * block_m, ...)`` of the left side and ``[column * block_n, ...)`` of the right one. Within one set the list
holds the tiles that have a pair ``i < j``, in a cross fold all tiles.

Order: problems of long vectors first, so that short tiles fill the tail. Inside a problem, bands of 8 tile columns,
rows outer, the band's columns inner: the band's vectors stay in the second-level cache while the rows stream past.
A problem's entries are contiguous, so its partial sums are one segment in a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from orthofast.errors import InputError

BAND = 8  # tile columns in a band
MOST_TILES = 1 << 15  # of one side: two tile numbers share a signed 32-bit word

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Problem:
    """``n`` vectors of length ``d``, paired among themselves, or with ``m`` others."""

    n: int
    d: int
    m: int | None = None
    items: int = 1  # so many problems of this shape, numbered one after another


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """Entries in the order they are worked off, and where each problem's segment lies.

    Attributes:
        entries: (entries, 2) int32, read-only.
        first: (problems,) int64, first entry of each problem, by problem number.
        count: (problems,) int64, its number of entries.
        cost: (problems,) int64, length of vectors: work of one entry up to a factor.
    """

    entries: Int32
    first: Int64
    count: Int64
    cost: Int64

    def __len__(self) -> int:
        return len(self.entries)

    def shares(self, parts: int) -> list[tuple[int, int]]:
        """Cut the list into ``parts`` ranges [start, stop) of about equal work, covering all of it.

        Raises:
            InputError: if ``parts`` is not positive.
        """
        if parts < 1:
            raise InputError(f"shares needs a positive number of parts, got {parts}")
        done = np.cumsum(self.cost[self.entries[:, 0]], dtype=np.int64)
        total = int(done[-1]) if len(done) else 0
        goals = [total * part // parts for part in range(1, parts)]
        cuts = [0, *np.searchsorted(done, goals, side="left").tolist(), len(self)]
        return list(itertools.pairwise(cuts))


@lru_cache(maxsize=256)
def tiles_of(n: int, m: int | None, block_m: int, block_n: int, band: int = BAND) -> Int32:
    """Packed tiles (row | column << 16) of one problem in order, (tiles,) int32, read-only.

    Raises:
        InputError: if one side has more tiles than 15 bits can number.
    """
    columns = -(-(n if m is None else m) // block_n)
    rows = -(-n // block_m) if m is not None else -(-max(0, n - 1) // block_m)  # the last vector heads no pair
    if max(rows, columns) > MOST_TILES:
        raise InputError(
            f"a fold of {n} vectors has {max(rows, columns)} tiles on one side, the most is {MOST_TILES}; split the set"
        )
    row = np.arange(rows)
    lowest = np.zeros(rows, np.int64) if m is not None else first_column(row, block_m, block_n)
    start = np.arange(0, columns, band)[:, None]  # of each band
    begin = np.maximum(start, lowest[None, :])  # (bands, rows)
    length = np.maximum(np.minimum(start + band, columns) - begin, 0).ravel()
    total = int(length.sum())
    within = np.arange(total) - np.repeat(np.cumsum(length) - length, length)
    column = np.repeat(begin.ravel(), length) + within
    row_of = np.repeat(np.broadcast_to(row, begin.shape).ravel(), length)
    packed: Int32 = (row_of | column << 16).astype(np.int32)
    packed.flags.writeable = False
    return packed


def first_column(row: Int64, block_m: int, block_n: int) -> Int64:
    """First tile column that holds a pair i < j with i in this tile row."""
    return (row * block_m + 1) // block_n


@lru_cache(maxsize=256)
def work_list(problems: tuple[Problem, ...], block_m: int, block_n: int, band: int = BAND) -> WorkList:
    """The tiles of all problems; kept for shapes that come again.

    >>> made = work_list((Problem(n=5, d=3), Problem(n=2, d=9, m=3)), 2, 2)
    >>> [(p, tile & 0xFFFF, tile >> 16) for p, tile in made.entries.tolist()]
    [(1, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2)]
    """
    counts = np.fromiter((problem.items for problem in problems), np.int64, len(problems))
    offsets = np.cumsum(counts) - counts
    total = int(counts.sum())
    first, count, cost = (np.zeros(total, np.int64) for _ in range(3))
    parts: list[Int32] = []
    at = 0
    for index in sorted(range(len(problems)), key=lambda i: -problems[i].d):
        problem, offset = problems[index], int(offsets[index])
        tiles = tiles_of(problem.n, problem.m, block_m, block_n, band)
        numbers = np.arange(offset, offset + problem.items)
        part = np.empty((problem.items, len(tiles), 2), np.int32)
        part[:, :, 0], part[:, :, 1] = numbers[:, None], tiles
        first[numbers] = at + len(tiles) * np.arange(problem.items)
        count[numbers], cost[numbers] = len(tiles), max(1, problem.d)
        parts.append(part.reshape(-1, 2))
        at += len(parts[-1])
    entries = np.concatenate(parts) if parts else np.zeros((0, 2), np.int32)
    for array in (entries, first, count, cost):
        array.flags.writeable = False
    return WorkList(entries, first, count, cost)


def unpack(entries: Int32) -> tuple[Int64, Int64, Int64]:
    """Problem, row tile and column tile of each entry."""
    packed = entries[:, 1].astype(np.int64)
    return entries[:, 0].astype(np.int64), packed & 0xFFFF, packed >> 16


def bands(columns: int, most: int, band: int = BAND) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of tile columns, whole bands each, of at most ``most`` columns; one band is the least."""
    step = max(1, most // band) * band
    return ((start, min(start + step, columns)) for start in range(0, columns, step))


def tile_count(problems: Sequence[Problem], block_m: int, block_n: int) -> int:
    """Entries of the list of these problems, without building it."""
    total = 0
    for problem in problems:
        total += problem.items * _count(problem.n, problem.m, block_m, block_n)
    return total


@lru_cache(maxsize=4096)
def _count(n: int, m: int | None, block_m: int, block_n: int) -> int:
    columns = -(-(n if m is None else m) // block_n)
    if m is not None:
        return -(-n // block_m) * columns
    rows = np.arange(-(-max(0, n - 1) // block_m))
    return int((columns - first_column(rows, block_m, block_n)).sum())

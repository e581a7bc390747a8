"""The work list covers every pair exactly once, for any shapes, tiles and cuts, in the order it promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthofast.errors import InputError
from orthofast.kernels.schedule import (
    BAND,
    MOST_TILES,
    Problem,
    WorkList,
    bands,
    first_column,
    tile_count,
    tiles_of,
    unpack,
    work_list,
)

BLOCKS = st.sampled_from([1, 2, 3, 8, 16, 32, 64, 128, 256])
PROBLEMS = st.builds(
    Problem, n=st.integers(0, 90), d=st.integers(0, 9), m=st.none() | st.integers(0, 70), items=st.integers(1, 3)
)


def counted(made: WorkList, shapes: list[tuple[int, int | None]], block_m: int, block_n: int) -> list[np.ndarray]:
    """How often each pair (i, j) of each problem is folded by the entries, under the kernel's own mask."""
    seen = [np.zeros((n, n if m is None else m), np.int64) for n, m in shapes]
    for problem, row, column in zip(*unpack(made.entries), strict=True):
        n, m = shapes[problem]
        i = np.arange(row * block_m, min((row + 1) * block_m, n))
        j = np.arange(column * block_n, min((column + 1) * block_n, n if m is None else m))
        mask = np.ones((len(i), len(j)), bool) if m is not None else j[None, :] > i[:, None]
        assert mask.any(), f"the tile {row}, {column} of {n} and {m} holds no pair"
        seen[problem][np.ix_(i, j)] += mask
    return seen


def wanted(n: int, m: int | None) -> np.ndarray:
    return np.triu(np.ones((n, n), np.int64), 1) if m is None else np.ones((n, m), np.int64)


def flat(problems: tuple[Problem, ...]) -> list[tuple[int, int | None]]:
    return [(p.n, p.m) for p in problems for _ in range(p.items)]


@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 128), (128, 256), (64, 128), (256, 64), (16, 16)])
def test_every_pair_of_one_set_once_for_all_sizes(block_m: int, block_n: int) -> None:
    for n in range(301):
        made = work_list((Problem(n, 5),), block_m, block_n)
        assert np.array_equal(counted(made, [(n, None)], block_m, block_n)[0], wanted(n, None)), n
        assert len(made) == tile_count([Problem(n, 5)], block_m, block_n)


@settings(max_examples=150)
@given(problems=st.lists(PROBLEMS, max_size=5).map(tuple), block_m=BLOCKS, block_n=BLOCKS)
def test_every_pair_of_a_group_once(problems: tuple[Problem, ...], block_m: int, block_n: int) -> None:
    made = work_list(problems, block_m, block_n)
    shapes = flat(problems)
    for seen, (n, m) in zip(counted(made, shapes, block_m, block_n), shapes, strict=True):
        assert np.array_equal(seen, wanted(n, m))
    assert len(made) == tile_count(problems, block_m, block_n)


@given(problems=st.lists(PROBLEMS, max_size=5).map(tuple), block_m=BLOCKS, block_n=BLOCKS)
def test_a_problem_is_one_segment_and_long_vectors_come_first(
    problems: tuple[Problem, ...], block_m: int, block_n: int
) -> None:
    made = work_list(problems, block_m, block_n)
    problem, _, _ = unpack(made.entries)
    for number in range(len(made.first)):
        segment = slice(made.first[number], made.first[number] + made.count[number])
        assert np.array_equal(np.flatnonzero(problem == number), np.arange(len(made))[segment])
    assert np.all(np.diff(made.cost[problem]) <= 0)


@given(
    problems=st.lists(PROBLEMS, max_size=4).map(tuple),
    block_m=BLOCKS,
    block_n=BLOCKS,
    parts=st.integers(1, 9),
)
def test_shares_are_disjoint_complete_and_even(
    problems: tuple[Problem, ...], block_m: int, block_n: int, parts: int
) -> None:
    made = work_list(problems, block_m, block_n)
    ranges = made.shares(parts)
    assert len(ranges) == parts
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == len(made)
    costs = made.cost[made.entries[:, 0]]
    if len(costs):
        work = [int(costs[start:stop].sum()) for start, stop in ranges]
        assert max(work) <= costs.sum() / parts + costs.max()


@pytest.mark.parametrize(("n", "m"), [(3000, None), (2500, 3100)])
def test_bands_of_columns_rows_outer_columns_inner(n: int, m: int | None) -> None:
    packed = tiles_of(n, m, 64, 128).astype(np.int64)
    row, column = packed & 0xFFFF, packed >> 16
    keys = np.stack([column // BAND, row, column], 1).tolist()
    assert keys == sorted(keys)


@given(rows=st.integers(0, 300), block_m=BLOCKS, block_n=BLOCKS)
def test_first_column_holds_a_pair_and_the_one_before_holds_none(rows: int, block_m: int, block_n: int) -> None:
    column = int(first_column(np.array([rows]), block_m, block_n)[0])
    assert (column + 1) * block_n - 1 > rows * block_m
    assert column == 0 or column * block_n - 1 <= rows * block_m


@given(columns=st.integers(0, 700), most=st.integers(0, 300))
def test_ranges_of_columns_are_whole_bands_within_the_budget(columns: int, most: int) -> None:
    ranges = list(bands(columns, most))
    assert Counter(c for start, stop in ranges for c in range(start, stop)) == Counter(range(columns))
    for start, stop in ranges:
        assert start % BAND == 0
        assert stop - start <= max(most, BAND)


def test_a_side_of_too_many_tiles_is_refused() -> None:
    assert len(tiles_of(MOST_TILES, 1, 1, 1)) == MOST_TILES
    assert int(tiles_of(1, MOST_TILES, 1, 1)[-1]) >> 16 == MOST_TILES - 1
    with pytest.raises(InputError, match="split the set"):
        tiles_of(MOST_TILES + 1, 1, 1, 1)


def test_shares_of_no_parts_are_refused() -> None:
    with pytest.raises(InputError, match="positive number of parts, got 0"):
        work_list((Problem(3, 3),), 2, 2).shares(0)


def test_a_list_that_comes_again_is_the_same_object() -> None:
    assert work_list((Problem(33, 3),), 16, 16) is work_list((Problem(33, 3),), 16, 16)

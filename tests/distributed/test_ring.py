"""The plan of the half ring, without any process: every pair meets once, on ranks that work alike."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthofast.distributed.placement import _shares, parts_of
from orthofast.distributed.ring import meeting


def folded(counts: list[int]) -> list[list[tuple[int, int]]]:
    """Per rank, the pairs of global rows it folds, smaller first."""
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    pairs: list[list[tuple[int, int]]] = []
    for place, count in enumerate(counts):
        mine = list(combinations(range(starts[place], starts[place] + count), 2))
        for hop in range(1, len(counts) // 2 + 1):
            at = meeting(hop, place, counts)
            rows = range(starts[place], starts[place] + count)[at.mine]
            others = range(starts[at.owner], starts[at.owner] + counts[at.owner])[at.theirs]
            mine += [(min(i, j), max(i, j)) for i in rows for j in others]
        pairs.append(mine)
    return pairs


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_every_pair_is_folded_once(counts: list[int]) -> None:
    done = sorted(pair for pairs in folded(counts) for pair in pairs)
    assert done == list(combinations(range(sum(counts)), 2))


@pytest.mark.parametrize("ranks", range(1, 10))
def test_ranks_with_equal_blocks_do_equal_work(ranks: int) -> None:
    sizes = [len(pairs) for pairs in folded([6] * ranks)]
    assert max(sizes) == min(sizes)


def test_a_block_travels_at_most_half_way_round() -> None:
    for ranks in range(1, 10):
        assert {meeting(hop, 0, [1] * ranks).owner for hop in range(1, ranks // 2 + 1)} == {
            (-hop) % ranks for hop in range(1, ranks // 2 + 1)
        }


@pytest.mark.parametrize("size", [0, 1, 2, 7, 12, 1003])
@pytest.mark.parametrize("splits", [(), ((3, 1),), ((2, 1), (3, 1)), ((2, 2), (2, 1)), ((3, 2), (2, 1))])
def test_shares_hold_every_index_once(size: int, splits: tuple[tuple[int, int], ...]) -> None:
    assert sorted(torch.cat(_shares(size, splits)).tolist()) == list(range(size))


def test_parts_are_cut_as_torch_cuts_them() -> None:
    assert [part.tolist() for part in parts_of(torch.arange(5), 4)] == [[0, 1], [2, 3], [4], []]
    assert [part.tolist() for part in parts_of(torch.arange(0), 2)] == [[], []]

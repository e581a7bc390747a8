"""Models trained on several ranks compute what one process computes; calls that go wrong say so on every rank."""

from __future__ import annotations

import re

import pytest

from tests.distributed import claims_training as claims
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel"])
def test_a_penalty_trains_as_in_one_process(ranks: Ranks, kind: str) -> None:
    seen = ranks(claims.sharded_training_is_that_of_one_process, kind)
    assert all(values == seen[0] for values in seen)
    assert seen[0][-1] < seen[0][0], "the penalty has no effect"


@pytest.mark.parametrize("kind", ["hsdp", "fsdp and tensor parallel"])
def test_a_penalty_trains_on_a_mesh_of_two_dimensions(four: Ranks, kind: str) -> None:
    seen = four(claims.sharded_training_is_that_of_one_process, kind)
    assert all(values == seen[0] for values in seen)


def test_every_mesh_measures_alike(four: Ranks) -> None:
    four(claims.every_mesh_measures_alike)


def test_pending_sums_are_added_up(ranks: Ranks) -> None:
    ranks(claims.pending_sums_are_added_up)


def test_lists_mix_sharded_and_whole_matrices(ranks: Ranks) -> None:
    ranks(claims.lists_mix_sharded_and_whole_matrices)


@pytest.mark.parametrize("nan", [False, True], ids=["numbers", "nan"])
def test_records_of_ranks_are_joined(ranks: Ranks, nan: bool) -> None:
    seen = ranks(claims.records_of_ranks_are_joined, nan)
    assert all(values == seen[0] for values in seen)


def test_bad_calls_are_refused_by_a_sentence(ranks: Ranks) -> None:
    needed = [
        "y cannot be combined with a DTensor",
        "y cannot be combined with a DTensor",
        "sample cannot be combined with a DTensor",
        "sample cannot be combined with a DTensor",
        "want needs names among",
        "precision needs one of",
        "backend needs one of",
        "needs a DTensor whose shards end where blocks" if ranks.count == 2 else "nothing",
        "x needs shards as torch splits",
        r"x needs shape \(b, n, d\)",
        "records needs at least one GramStats",
        "records needs folds of all pairs",
    ]
    for rank, said in enumerate(ranks(claims.bad_calls_are_refused)):
        for sentence, start in zip(said, needed, strict=True):
            assert re.search(start, sentence), f"rank {rank} said {sentence!r}, not {start!r}"


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_a_missing_rank_is_named(ranks: Ranks, gradient: bool) -> None:
    said = ranks(claims.a_missing_rank_is_named, gradient)
    assert said[-1] == "was not there"
    for rank, sentence in enumerate(said[:-1]):
        assert re.match(rf"rank {rank} gave up while (passing on|gathering)[^:]*: .+; another rank failed", sentence)

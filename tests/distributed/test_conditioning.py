"""Covariances over several ranks are those of one process, with the same bits on every rank."""

from __future__ import annotations

import pytest

from tests.distributed import claims_conditioning as claims
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize(("kind", "labels"), [("ddp", "exact"), ("fsdp", "empirical")])
def test_a_pass_of_its_own_adds_up_all_rows(ranks: Ranks, kind: str, labels: str) -> None:
    seen = ranks(claims.a_pass_over_all_ranks_is_that_of_one_process, kind, labels)
    assert all(values == seen[0] for values in seen)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_riding_on_steps_adds_up_all_rows(ranks: Ranks, kind: str) -> None:
    seen = ranks(claims.a_ride_over_all_ranks_is_that_of_one_process, kind)
    assert all(values == seen[0] for values in seen)


@pytest.mark.parametrize("method", ["gram", "qr"])
def test_moments_are_joined_in_the_order_of_ranks(ranks: Ranks, method: str) -> None:
    seen = ranks(claims.moments_are_joined_in_the_order_of_ranks, method)
    assert all(values == seen[0] for values in seen)


def test_tensor_parallel_layers_are_refused(ranks: Ranks) -> None:
    for said in ranks(claims.tensor_parallel_layers_are_refused):
        assert "0 computes with a DTensor, as under tensor parallelism" in said

"""Quantiles, turns, repeats and the sharing of the time budget, against numbers worked out by hand."""

from __future__ import annotations

import time
from itertools import permutations

import pytest

from benchmarks.timing import Budget, calls_for, plan_rounds, quantile, sample, spread, turns


@pytest.mark.parametrize(
    ("samples", "q", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], 0.2, 10.0),
        ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], 0.8, 40.0),
        ([0.0, 1.0, 2.0], 0.8, 1.6),
        ([4.0, 2.0], 0.0, 2.0),
        ([4.0, 2.0], 1.0, 4.0),
    ],
)
def test_quantiles_are_linear_between_ranked_samples(samples, q, expected):
    assert quantile(samples, q) == pytest.approx(expected, abs=1e-12)


def test_quantile_without_samples_says_so():
    with pytest.raises(ValueError, match="at least one sample"):
        quantile([], 0.5)


def test_one_slow_sample_does_not_move_the_median():
    assert spread([1.0, 1.1, 1.2, 1.0, 99.0]).median == 1.1


def test_every_round_is_everybody_once():
    names = ["a", "b", "c", "d", "e"]
    for number in range(12):
        assert sorted(turns(names, number)) == names


def test_each_pair_goes_in_both_orders_within_two_rounds():
    names = ["a", "b", "c", "d"]
    for number in range(0, 10, 2):
        one, two = turns(names, number), turns(names, number + 1)
        for first, second in permutations(names, 2):
            assert (one.index(first) < one.index(second)) != (two.index(first) < two.index(second))


def test_the_contestant_that_starts_changes():
    names = ["a", "b", "c"]
    assert {turns(names, number)[0] for number in range(6)} == set(names)


@pytest.mark.parametrize(("call_s", "calls"), [(1.0, 1), (0.01, 1), (0.003, 4), (1e-4, 100), (0.0, 2000)])
def test_short_calls_are_repeated_until_a_sample_lasts(call_s, calls):
    assert calls_for(call_s, 0.01) == calls


def test_rounds_are_alike_while_the_time_lasts():
    plan = plan_rounds({"core": 1.0, "peer": 1.0}, frozenset(["core"]), least=3, most=7, allowance_s=10.0)
    assert dict(plan.of) == {"core": 5, "peer": 5}
    plan = plan_rounds({"core": 1.0, "peer": 1.0}, frozenset(["core"]), least=3, most=7, allowance_s=1000.0)
    assert dict(plan.of) == {"core": 7, "peer": 7}


def test_peers_run_once_when_time_is_short_and_not_at_all_when_it_is_spent():
    cost, core = {"core": 2.0, "peer": 1.0}, frozenset(["core"])
    assert dict(plan_rounds(cost, core, 3, 7, 7.0).of) == {"core": 3, "peer": 1}
    assert dict(plan_rounds(cost, core, 3, 7, 6.5).of) == {"core": 3, "peer": 0}


def test_the_core_always_has_its_least_rounds():
    plan = plan_rounds({"core": 100.0}, frozenset(["core"]), least=3, most=7, allowance_s=0.0)
    assert dict(plan.of) == {"core": 3}
    assert plan.largest == 3


def test_a_budget_shares_what_is_left_by_cost():
    now = [100.0]
    budget = Budget(60.0, clock=lambda: now[0])
    assert budget.allowance_s(1.0, 4.0) == 15.0
    now[0] += 40.0
    assert budget.allowance_s(1.0, 2.0) == 10.0
    now[0] += 400.0
    assert budget.left_s == 0.0


def test_a_sample_is_seconds_per_call_and_counts_waiting_as_wall_only():
    wall, cpu, result = sample(lambda: time.sleep(0.01) or "done", 3)
    assert result == "done"
    assert 0.01 <= wall < 1.0
    assert cpu < wall


def test_a_sample_drops_each_result_before_the_next_call():
    alive: list[int] = []
    most: list[int] = []

    class Large:
        def __init__(self) -> None:
            alive.append(1)
            most.append(len(alive))

        def __del__(self) -> None:
            alive.pop()

    sample(Large, 5)
    assert max(most) == 1

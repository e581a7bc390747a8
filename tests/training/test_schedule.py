"""The schedule: which steps are due, and how the interval keeps the budget."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from orthofast.errors import InputError
from orthofast.training import Monitor
from orthofast.training.schedule import Mark, Schedule, mark


def run(schedule: Schedule, steps: int, own_s: float, step_s: float) -> list[int]:
    """The due steps of a training whose steps and measurements take as long as given."""
    due, last = [], 0
    for step in range(1, steps + 1):
        if step >= schedule.due:
            due.append(step)
            schedule.passed(step)
            schedule.stretch(schedule.settle(own_s, (step - last) * step_s, step - last))
            last = step
    return due


def test_without_a_budget_multiples_are_due() -> None:
    assert run(Schedule(3, None), 10, own_s=100.0, step_s=0.001) == [3, 6, 9]


def test_cheap_measurements_keep_the_interval() -> None:
    assert run(Schedule(10, 0.01), 50, own_s=0.09, step_s=1.0) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(("own_s", "interval"), [(0.11, 20), (0.2, 20), (0.21, 30), (1.0, 100)])
def test_dear_ones_stretch_it_to_the_multiple_that_keeps_the_budget(own_s: float, interval: int) -> None:
    schedule = Schedule(10, 0.01)
    due = run(schedule, 1000, own_s, step_s=1.0)
    # the first loads kernels and stretches nothing
    assert due[:3] == [10, 20, 20 + interval]
    assert {b - a for a, b in pairwise(due[1:])} == {interval}
    assert all(step % 10 == 0 for step in due)
    assert own_s / interval <= 0.01 + 1e-12


def test_a_slow_first_measurement_and_one_interruption_stretch_nothing() -> None:
    schedule, due = Schedule(10, 0.01), []
    costs = {10: 60.0, 40: 30.0}
    last = 0
    for step in range(1, 101):
        if step >= schedule.due:
            due.append(step)
            schedule.passed(step)
            schedule.stretch(schedule.settle(costs.get(step, 0.05), float(step - last), step - last))
            last = step
    assert due == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_it_shrinks_again_when_measuring_becomes_cheap() -> None:
    schedule = Schedule(10, 0.01)
    run(schedule, 400, own_s=1.0, step_s=1.0)
    assert schedule.interval == 100
    last = schedule.due
    for _ in range(5):
        step = schedule.due
        schedule.passed(step)
        schedule.stretch(schedule.settle(0.01, 100.0, 100))
        assert step % 10 == 0
    assert schedule.interval == 10
    assert schedule.due > last


def test_overhead_is_own_time_over_training_time() -> None:
    schedule = Schedule(10, None)
    assert math.isnan(schedule.overhead_frac)
    schedule.settle(0.5, 10.0, 10)
    schedule.settle(0.3, 10.0, 10)
    assert schedule.overhead_frac == pytest.approx(0.04)


def test_state_goes_on_where_it_was_taken() -> None:
    schedule = Schedule(10, 0.01)
    run(schedule, 250, own_s=1.0, step_s=1.0)
    again = Schedule(10, 0.01)
    again.load_state_dict(schedule.state_dict())
    assert (again.due, again.interval, again.own_s) == (schedule.due, schedule.interval, schedule.own_s)
    other = Schedule(50, 0.01)
    other.load_state_dict(Schedule(10, None).state_dict())
    assert other.due == 50


def test_a_numbering_that_began_earlier_is_joined() -> None:
    schedule = Schedule(10, None)
    schedule.begin(33)
    assert schedule.due == 40
    schedule.begin(40)
    assert schedule.due == 50


@pytest.mark.parametrize("given", [(0,), (1.5,), ("9",), (10, -0.1), (10, math.inf), (10, "x")])
def test_bad_arguments_get_a_sentence(given: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=r"needs a positive (integer|share)"):
        Schedule(*given)  # type: ignore[arg-type]


def test_marks_measure_by_the_slower_clock() -> None:
    class Event:
        def __init__(self, at_ms: float) -> None:
            self.at_ms = at_ms

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    assert Mark(2.0, Event(4000.0)).since_s(Mark(1.0, Event(1000.0))) == 3.0
    assert Mark(9.0, Event(4000.0)).since_s(Mark(1.0, Event(1000.0))) == 8.0
    assert Mark(2.0).since_s(Mark(1.0, Event(0.0))) == 1.0
    here = mark(torch.device("cpu"))
    assert here.event is None
    assert here.reached


def test_a_monitor_stretches_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep stands for a dear measurement: 5 ms against steps of about 1 ms, at most a tenth allowed."""
    from orthofast.training import probe

    real = probe.of_weights

    def dear(*given: object) -> object:
        time.sleep(0.005)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "of_weights", dear)
    steps: list[int] = []
    monitor = Monitor(
        nn.Linear(4, 4), every_n_steps=5, metrics=("pii",), overhead=0.1, log=lambda values, step: steps.append(step)
    )
    started = time.perf_counter()
    for _ in range(200):
        time.sleep(0.001)
        monitor.step()
    whole_s = time.perf_counter() - started
    assert steps[:2] == [5, 10]
    assert min(b - a for a, b in pairwise(steps[1:])) >= 15
    assert 0 < monitor.latest["orthofast/overhead"] < 0.005 * 10 * len(steps) / whole_s

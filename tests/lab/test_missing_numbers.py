"""Networks that diverged: without a recorded number an experiment is judged and drawn, and no condition on it holds."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from docs.recorded import records
from orthofast.lab.axes import axis_of
from orthofast.lab.drawing import declaration
from orthofast.lab.experiment import Experiment, Raw
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.verdict import NOT_REPRODUCED, Verdict

Path = tuple[str | int, ...]
RAWS: dict[str, list[Raw]] = {key: run.raws for record in reversed(records()) for key, run in record.runs.items()}
MOST = 25  # numbers tried of each experiment
# closed forms and places on an axis, which no network can lose
FIXED = {"S0-F1": ("cosines",), "S0-X3": ("baseline",), "S3-F1": ("path", "rate")}
# a run whose accuracy is missing is not chosen, the others are compared
CHOOSING = ("S0-T1", "S0-T1b", "S0-T2", "S0-A2", "S0-X3")

every_experiment = pytest.mark.parametrize("key", [key for key in RUNNABLE if key in RAWS])


def numbers(value: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(one, (*path, key))
    elif isinstance(value, float):
        yield path


def tried(key: str) -> list[Path]:
    """The last number of each kind, then any."""
    found = [path for path in numbers(RAWS[key][0]) if path[0] not in FIXED.get(key, ())]
    kinds = {tuple(part for part in path if isinstance(part, str)): path for path in found}
    generator = random.Random(key)
    chosen = generator.sample(list(kinds.values()), min(MOST, len(kinds)))
    return chosen + generator.sample(found, max(0, min(MOST, len(found)) - len(chosen)))


def replaced(raws: list[Raw], path: Path, value: float | None) -> list[Raw]:
    """The first seed's number replaced."""
    changed = [copy.deepcopy(raws[0]), *raws[1:]]
    held: Any = changed[0]
    for part in path[:-1]:
        held = held[part]
    held[path[-1]] = value if value is None else held[path[-1]] * value + value / 1000
    return changed


def without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_numbers(one) for one in value]
    return None if isinstance(value, float) else value


def drawn(experiment: Experiment, raws: list[Raw]) -> None:
    declaration(experiment.figure(raws), experiment.title, len(raws))


def held(verdict: Verdict) -> set[str]:
    return {check.what for check in verdict.checks if check.holds}


@every_experiment
def test_a_missing_number_stops_nothing_and_helps_no_condition(key: str) -> None:
    experiment, raws = RUNNABLE[key], RAWS[key]
    whole = experiment.verdict(raws)
    for place, path in enumerate(tried(key)):
        verdict = experiment.verdict(replaced(raws, path, None))
        assert held(verdict) <= held(whole), path
        if place % 3 == 0:
            drawn(experiment, replaced(raws, path, None))


@pytest.mark.parametrize("key", [key for key in RUNNABLE if key in RAWS and key not in CHOOSING])
def test_a_condition_on_a_number_does_not_hold_without_it(key: str) -> None:
    experiment, raws = RUNNABLE[key], RAWS[key]
    whole = {check.what: check.measured for check in experiment.verdict(raws).checks}
    for path in tried(key):
        moved: set[str] = set()
        for factor in (0.97, 1.03):
            checks = experiment.verdict(replaced(raws, path, factor)).checks
            moved |= {check.what for check in checks if check.measured != whole.get(check.what)}
        missing = experiment.verdict(replaced(raws, path, None))
        assert not moved & held(missing), path
        assert all(check.measured is None for check in missing.checks if check.what in moved), path


@every_experiment
def test_a_seed_without_any_number_reproduces_nothing(key: str) -> None:
    experiment = RUNNABLE[key]
    raws = [
        {name: value if name in FIXED.get(key, ()) else without_numbers(value) for name, value in RAWS[key][0].items()},
        *RAWS[key][1:],
    ]
    verdict = experiment.verdict(raws)
    if key != "S1-F3":  # judged by widths, which are counts
        assert verdict.status == NOT_REPRODUCED
    drawn(experiment, raws)


def test_levels_without_a_number_and_bars_of_no_height_are_drawn() -> None:
    bars = Panel("x", "y", [Series("one", ["a"], [[None]])], kind="bars", levels=[("theory", None)])
    lines = Panel("x", "y", [Series("one", [1.0], [[None]])], y_log=True, levels=[("theory", None), ("other", 2.0)])
    written = str(declaration(Figure([bars, lines]), "title", 1))
    assert "theory" not in written
    assert "other" in written
    axis = axis_of([0.0], zero=True)
    assert axis.low == 0 < axis.high

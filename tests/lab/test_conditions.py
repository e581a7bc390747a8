"""Every condition of every verdict decides: some change of finite numbers that hold breaks it, and the verdict."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from orthofast.lab.experiment import Raw, Settings
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.runs import plain
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED
from tests.lab import (
    test_conditioning_experiments,
    test_conditioning_tables,
    test_independence_verdicts,
    test_modern_blocks,
    test_verdicts,
)

Path = tuple[str | int, ...]
ID_OF = {one.verdict: key for key, one in RUNNABLE.items()}
# numbers that hold, of each experiment
HELD: dict[str, Raw] = {
    **{key: right for key, right, _ in test_verdicts.CASES},
    **{ID_OF[judged]: held() for judged, held, _ in test_independence_verdicts.CASES},
    **test_conditioning_experiments.GOOD,
    **{key: test_conditioning_tables.as_printed(key) for key in test_conditioning_tables.PRINTED},
    **{key: held() for key, held in test_modern_blocks.GOOD.items()},
    "S0-A2": test_independence_verdicts.table2(),
    "S3-F1": RUNNABLE["S3-F1"].run(Settings()),
}
# by the verdict of Table 4; a verdict that does not hold has a test of its own
WITHOUT = {"S0-A3", "S0-T5b"}
# how many of them decide: none is lost unseen
# fmt: off
CONDITIONS = {
    "S0-T1": 6, "S0-T1b": 6, "S0-T2": 5, "S0-A2": 5, "S0-T3": 12, "S0-A4": 1, "S0-T4": 11, "S0-T5": 2,
    "S0-M1": 2, "S0-M2": 9, "S0-F1": 3, "S0-F1b": 1, "S0-F2": 4, "S0-X1": 9, "S0-X2": 2, "S0-X3": 2,
    "S1-F1": 4, "S1-F2a": 8, "S1-F2b": 2, "S1-F3": 1, "S1-T1": 5, "S1-F6b": 5, "S1-F6": 8, "S1-F4a": 2,
    "S1-F4b": 3, "S1-F5": 4, "S1-F7": 2, "S1-X1": 4, "S1-X4": 26, "S1-X5": 15, "S2-F1": 12, "S2-F2": 20,
    "S2-X2": 10, "S2-F3": 9, "S2-F4": 12, "S2-F5": 12, "S2-F6": 7, "S2-F7": 6, "S2-F8": 5, "S2-T1": 5,
    "S2-T1b": 2, "S2-T2": 5, "S2-X3": 6, "S3-T1": 5, "S3-F1": 4, "S3-F2": 1, "S3-T2": 4,
}
# fmt: on
FAR = 1e6
FACTORS = (-1.0, 3.0, 1 / 3, 1.3, 1 / 1.3, 100.0, 0.01, 1.02, 1 / 1.02, FAR)


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Of all numbers, and of all lists of numbers."""
    if isinstance(value, dict | list):
        if isinstance(value, list) and value and all(isinstance(one, float | int) for one in value):
            yield path
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*path, key))
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield path


def scaled(raw: Raw, path: Path, factor: float) -> Raw:
    changed: Any = copy.deepcopy(raw)
    held = changed
    for part in path[:-1]:
        held = held[part]
    value = held[path[-1]]
    shift = 1 if factor == FAR else 0  # moves zeros
    held[path[-1]] = [one * factor + shift for one in value] if isinstance(value, list) else value * factor + shift
    return changed  # type: ignore[no-any-return]


def broken(key: str, held: Raw, wanted: set[str]) -> set[str]:
    """Conditions that one change or another breaks, all but those that none does."""
    verdict, found = RUNNABLE[key].verdict, set()
    tried = list(places(held))
    random.Random(0).shuffle(tried)
    for factor in FACTORS:
        for path in tried:
            try:
                judged = verdict([held, scaled(held, path, factor)])  # one seed is enough
            except (TypeError, ValueError):
                continue  # powers of negative numbers, which nothing measures
            failing = {check.what for check in judged.checks if check.holds is False}
            assert not failing or judged.status == NOT_REPRODUCED
            found |= failing
            if found >= wanted:
                return found
    return found


@pytest.mark.parametrize("key", HELD)
def test_every_condition_can_fail_and_then_nothing_is_reproduced(key: str) -> None:
    held = plain(HELD[key])
    verdict = RUNNABLE[key].verdict([held, held])
    assert verdict.status == REPRODUCED
    decisive = [check.what for check in verdict.checks if check.holds is not None]
    assert len(decisive) == CONDITIONS[key]
    assert len({check.what for check in verdict.checks}) == len(verdict.checks), "verdicts.json goes by these names"
    assert broken(key, held, set(decisive)) >= set(decisive)


def test_every_experiment_has_numbers_that_hold() -> None:
    assert set(HELD) == set(RUNNABLE) - WITHOUT == set(CONDITIONS)

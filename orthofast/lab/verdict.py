"""Verdicts: whether a claim of a paper holds, computed from raw numbers, with the published ones beside them.

A comparison holds only if it holds in every seed; a number that is missing or not finite holds nothing. What is shown
for information alone decides nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeAlias

REPRODUCED, NOT_REPRODUCED, NOT_RUN, FAILED = "reproduced", "not reproduced", "not run here", "failed"

Number: TypeAlias = "float | int | None"
Seeds: TypeAlias = "Sequence[Number]"  # one number a seed
Published: TypeAlias = "float | str | None"


@dataclass(frozen=True, slots=True)
class Check:
    """One number, or one condition on numbers.

    Attributes:
        what: is measured, in words.
        measured: mean over seeds; None if a seed has none.
        spread: standard deviation between seeds, of a sample; None for one seed.
        published: what the paper prints, or says.
        needed: the condition, in words; empty for information alone.
        holds: whether it does, in every seed; None for information alone.
    """

    what: str
    measured: float | None
    spread: float | None = None
    published: Published = None
    needed: str = ""
    holds: bool | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an experiment.

    Attributes:
        status: "reproduced", "not reproduced", "not run here" or "failed".
        checks: what it rests on.
        note: what a reader should know of it: differences from the paper's setup, why it is not run.
    """

    status: str
    checks: tuple[Check, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Verdict:
        """Read back what :meth:`to_dict` gave."""
        return cls(kept["status"], tuple(Check(**check) for check in kept["checks"]), kept["note"])


def judge(checks: Iterable[Check], note: str = "") -> Verdict:
    """A verdict: reproduced where all conditions hold, and there is one.

    >>> judge([below("loss", [0.1, 0.2], 1.0)]).status, judge([shown("loss", [0.1])]).status
    ('reproduced', 'not reproduced')
    """
    checks = tuple(checks)
    decisive = [check.holds for check in checks if check.holds is not None]
    return Verdict(REPRODUCED if decisive and all(decisive) else NOT_REPRODUCED, checks, note)


def not_run(reason: str) -> Verdict:
    """For what cannot run here."""
    return Verdict(NOT_RUN, (), reason)


def failed(reason: str) -> Verdict:
    """For what stopped with an error."""
    return Verdict(FAILED, (), reason)


def shown(what: str, values: Seeds, published: Published = None) -> Check:
    """A number for information."""
    return Check(what, *_summary(values), published)


def below(what: str, values: Seeds, limit: float, published: Published = None) -> Check:
    """Every seed's number is below a limit."""
    return _checked(what, values, lambda value: value < limit, f"below {limit:.4g}", published)


def above(what: str, values: Seeds, limit: float, published: Published = None) -> Check:
    """Every seed's number is above a limit."""
    return _checked(what, values, lambda value: value > limit, f"above {limit:.4g}", published)


def between(what: str, values: Seeds, low: float, high: float, published: Published = None) -> Check:
    """Every seed's number is within limits, both allowed."""
    return _checked(what, values, lambda value: low <= value <= high, f"from {low:.4g} to {high:.4g}", published)


def near(what: str, values: Seeds, target: float, tolerance: float, published: Published = None) -> Check:
    """Every seed's number is within a tolerance of a target, both absolute."""
    published = target if published is None else published
    return _checked(
        what, values, lambda value: abs(value - target) <= tolerance, f"{target:.4g} ± {tolerance:.2g}", published
    )


def less(what: str, small: Seeds, large: Seeds, published: Published = None, *, margin: float = 0.0) -> Check:
    """In every seed the first number is below the second, by more than a margin; their difference is what is shown.

    >>> less("loss with BN minus without", [0.1, 0.2], [0.3, 0.1]).holds
    False
    """
    differences = [
        None if not (_finite(one) and _finite(other)) else one - other  # type: ignore[operator]
        for one, other in zip(small, large, strict=True)
    ]
    return _checked(what, differences, lambda value: value < -margin, f"below {-margin or 0:.4g}", published)


def ordered(what: str, sequences: Sequence[Seeds], published: Published = None, *, slack: float = 0.0) -> Check:
    """In every seed the numbers rise from one sequence to the next, or fall by ``slack`` at most.

    What is shown is the smallest step of each seed.

    Args:
        what: is ordered.
        sequences: one a place in the order, each with one number a seed; at least two.
        published: of the paper.
        slack: by how much a step may fall.
    """
    steps: list[Number] = []
    for values in zip(*sequences, strict=True):
        known = all(map(_finite, values)) and len(values) > 1
        steps.append(min(later - earlier for earlier, later in pairwise(values)) if known else None)
    return _checked(
        f"{what}: smallest step",
        steps,
        lambda step: step >= -slack if slack else step > 0,
        f"at least {-slack:.4g}" if slack else "above 0",
        published,
    )


def slope(x: Sequence[float], y: Sequence[Number]) -> float | None:
    """Least-squares slope of y over x; None where a number is missing or x does not vary.

    >>> slope([0, 1, 2], [1, 3, 5])
    2.0
    """
    if len(x) < 2 or not all(map(_finite, y)) or len(set(x)) < 2:
        return None
    return statistics.linear_regression(x, [float(value) for value in y if value is not None]).slope


def log_slope(x: Sequence[float], y: Sequence[Number]) -> float | None:
    """The exponent of a power law: slope of log y over log x; None where a number is not positive.

    >>> round(log_slope([1, 2, 4], [1, 4, 16]), 12)
    2.0
    """
    if not all(_finite(value) and value > 0 for value in (*x, *y)):  # type: ignore[operator]
        return None
    return slope([math.log(value) for value in x], [math.log(value) for value in y])  # type: ignore[arg-type]


def _checked(what: str, values: Seeds, holds: Callable[[float], bool], needed: str, published: Published) -> Check:
    passed = len(values) > 0 and all(_finite(value) and holds(value) for value in values)  # type: ignore[arg-type]
    return Check(what, *_summary(values), published, needed, passed)


def _summary(values: Seeds) -> tuple[float | None, float | None]:
    if not values or not all(map(_finite, values)):
        return None, None
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _finite(value: Number) -> bool:
    return value is not None and math.isfinite(value)

"""Statistics and order: quantiles, alternating turns, repeats per sample, rounds within a time budget."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

MIN_SAMPLE_S = 0.01  # shorter samples are repeated inside: the clock and the turn-taking vanish
MAX_CALLS = 2000


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of some samples, and the quantiles that hold the middle 60 % of them."""

    median: float
    p20: float
    p80: float


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1), linear between the two nearest samples.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("quantile needs at least one sample, got none")
    ranked = sorted(samples)
    place = q * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def spread(samples: Sequence[float]) -> Spread:
    """Median, p20 and p80."""
    return Spread(quantile(samples, 0.5), quantile(samples, 0.2), quantile(samples, 0.8))


def turns(names: Sequence[str], number: int) -> list[str]:
    """Who goes after whom in round ``number``: every second round is the one before it, backwards.

    Each pair of rounds also starts with another contestant, so nobody always follows the same one.
    """
    if not names:
        return []
    shift = (number // 2) % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if number % 2 else rotated


def calls_for(call_s: float, sample_s: float = MIN_SAMPLE_S) -> int:
    """Calls inside one sample so that it lasts at least ``sample_s``."""
    return max(1, min(MAX_CALLS, math.ceil(sample_s / max(call_s, 1e-9))))


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds for each contestant; 0 where the budget has no room."""

    of: Mapping[str, int]
    largest: int


def plan_rounds(sample_s: Mapping[str, float], core: Set[str], least: int, most: int, allowance_s: float) -> Rounds:
    """Share a block's allowance: all alike while it lasts; then the others once; then the core alone.

    Args:
        sample_s: contestant -> seconds of one of its samples.
        core: contestants a target speaks of; never fewer than ``least`` rounds.
        least: rounds of the core, whatever it costs.
        most: rounds of anybody.
        allowance_s: seconds this block should take.
    """
    whole = sum(sample_s.values())
    needed = least * sum(seconds for name, seconds in sample_s.items() if name in core)
    others = sum(seconds for name, seconds in sample_s.items() if name not in core)
    if least * whole <= allowance_s or not others:
        fitting = int(allowance_s / whole) if whole > 0 else most
        number = max(least, min(most, fitting))
        return Rounds(dict.fromkeys(sample_s, number), number)
    once = 1 if needed + others <= allowance_s else 0
    return Rounds({name: least if name in core else once for name in sample_s}, least)


@dataclass(slots=True)
class Budget:
    """A share of the time that is left, in proportion to what each block is expected to cost."""

    total_s: float
    clock: Callable[[], float] = time.perf_counter
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    @property
    def left_s(self) -> float:
        """Seconds left; 0 when overdrawn."""
        return max(0.0, self.total_s - (self.clock() - self.started_s))

    def allowance_s(self, cost_s: float, coming_s: float) -> float:
        """Seconds for a block that costs ``cost_s`` of the ``coming_s`` still to come (itself included)."""
        return self.left_s * cost_s / coming_s if coming_s > 0 else self.left_s


def sample(call: Callable[[], object], calls: int) -> tuple[float, float, object]:
    """Wall and process CPU seconds per call over ``calls`` calls, and what the last one returned."""
    collecting = gc.isenabled()
    gc.disable()
    result: object = None
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            result = None  # an N x N result is freed before the next is made
            result = call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        if collecting:
            gc.enable()
    return wall / calls, cpu / calls, result

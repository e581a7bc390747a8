"""What was promised, and whether these samples keep it: verdicts by code, from a results file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import DTYPES, all_cases
from benchmarks.measured import Results

BIG = ("4096x4096", "8192x8192", "11008x4096")
NAMED = (*BIG, "3072x768", "30522x384")
THREADS = (1, 2)
Place = tuple[str, str, int | str]


@dataclass(frozen=True, slots=True)
class Target:
    """One promise: ``measure`` of every place must be on the right side of ``bound``.

    Attributes:
        places: (shape, dtype, threads, or side of the matrix) at which it was promised; all of them count.
        at_least: whether the bound is a floor; else what is measured must stay below it.
        limit: the best value arithmetic allows at a place on this machine, where it can be told.
    """

    text: str
    unit: str
    bound: float
    places: Sequence[Place]
    measure: Callable[[Any, str, str, Any], float | None]
    at_least: bool = True
    moonshot: float | None = None
    limit: Callable[[Any, str, str, Any], float | None] | None = None

    def holds(self, value: float) -> bool:
        """Whether one value is on the right side."""
        return value >= self.bound if self.at_least else value < self.bound


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured at one place; ``met`` is None where nothing was."""

    place: Place
    value: float | None
    met: bool | None
    limit: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target with its findings: "met" only if every place was measured and holds."""

    target: Target
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """met, not met, or not measured."""
        if any(finding.met is False for finding in self.findings):
            return "not met"
        if not self.findings or any(finding.met is None for finding in self.findings):
            return "not measured"
        return "met"

    @property
    def worst(self) -> float | None:
        """The measured value furthest on the wrong side."""
        values = [finding.value for finding in self.findings if finding.value is not None]
        if not values:
            return None
        return min(values) if self.target.at_least else max(values)


def judge(target: Target, results: Any) -> Verdict:
    """Measure a target at each of its places."""
    findings = []
    for place in target.places:
        value = target.measure(results, *place)
        if value is not None and math.isnan(value):
            value = None
        met = None if value is None else target.holds(value)
        findings.append(Finding(place, value, met, target.limit(results, *place) if target.limit else None))
    return Verdict(target, tuple(findings))


def judge_all(results: Any, targets: Sequence[Target] | None = None) -> list[Verdict]:
    """All verdicts, in the order of the promises."""
    return [judge(target, results) for target in (TARGETS if targets is None else targets)]


def _places(shapes: Sequence[str], dtype: str) -> tuple[tuple[str, str, int], ...]:
    return tuple((shape, dtype, threads) for shape in shapes for threads in THREADS)


def _faster(rival: str, ours: str) -> Callable[[Results, str, str, int], float | None]:
    return lambda results, shape, dtype, threads: results.ratio(shape, dtype, threads, rival, ours)


def _bound(rival: str, arithmetic: str) -> Callable[[Results, str, str, int], float | None]:
    return lambda results, shape, dtype, threads: results.bound(shape, dtype, threads, rival, arithmetic)


def _speed(
    text: str, bound: float, ours: str, rival: str, shapes: Sequence[str], moonshot: float | None = None
) -> Target:
    dtype = "bfloat16" if "bfloat16" in text else "float32"
    arithmetic = "bfloat16" if ours.endswith("@high") else dtype
    places = _places(shapes, dtype)
    return Target(text, "x", bound, places, _faster(rival, ours), True, moonshot, _bound(rival, arithmetic))


def _memory(name: str, dtype: str) -> Target:
    shapes = tuple(dict.fromkeys(case.shape for case in all_cases()))
    return Target(
        f"{dtype}, {name}: extra memory, every shape",
        "MiB",
        64.0,
        tuple((shape, dtype, 2) for shape in shapes),
        lambda results, shape, dtype, _threads: results.memory_mib(shape, dtype, name),
        at_least=False,
    )


def _small(results: Results, _shape: str, dtype: str, threads: int) -> float | None:
    taken = results.small_call_us(dtype, threads, "native_cpu")
    return None if taken is None else taken.median


def _imported(results: Results, _shape: str, _dtype: str, _threads: int) -> float | None:
    taken = results.import_ms()
    return None if taken is None else max(taken)  # the difference of two noisy medians can come out too small


TARGETS: tuple[Target, ...] = (
    _speed("float32 exact, faster than naive torch", 4.2, "native_cpu", "naive", BIG, 5.0),
    _speed("float32 exact, faster than naive torch", 5.2, "native_cpu", "naive", ("3072x768",)),
    _speed("float32 exact, faster than naive torch", 9.0, "native_cpu", "naive", ("30522x384",)),
    Target(
        "float32 exact, half the time of the best float32 product over ours",
        "",
        0.85,
        _places(NAMED, "float32"),
        lambda results, shape, dtype, threads: results.product_frac(shape, dtype, threads, "native_cpu"),
    ),
    _speed("bfloat16, faster than naive torch", 2.6, "native_cpu", "naive", ("4096x4096",), 2.8),
    _speed("bfloat16, faster than naive torch", 7.5, "native_cpu", "naive", ("30522x384",), 8.0),
    Target(
        "bfloat16, error of naive torch over ours",
        "x",
        1000.0,
        _places(("4096x4096", "30522x384"), "bfloat16"),
        lambda results, shape, dtype, threads: results.error_ratio(shape, dtype, threads, "naive", "native_cpu"),
    ),
    _speed('float32 precision="high", faster than naive torch', 8.5, "native_cpu@high", "naive", BIG, 10.0),
    _speed('float32 exact, faster than naive torch set to "medium"', 1.9, "native_cpu", "naive_medium", BIG),
    _speed(
        'float32 precision="high", faster than naive torch set to "medium"', 4.0, "native_cpu@high", "naive_medium", BIG
    ),
    _speed("float32, numba backend, faster than naive torch", 2.2, "numba_cpu", "naive", BIG),
    _speed("float32, reference backend, faster than naive torch", 3.5, "reference", "naive", BIG),
    _memory("native_cpu", "float32"),
    _memory("native_cpu@high", "float32"),
    _memory("native_cpu", "bfloat16"),
    Target(
        "a 64x576 call from Python",
        "µs",
        60.0,
        tuple(("64x576", dtype, threads) for dtype in DTYPES for threads in THREADS),
        _small,
        at_least=False,
    ),
    Target("`import orthofast` after `import torch`", "ms", 60.0, (("import", "", 1),), _imported, at_least=False),
)

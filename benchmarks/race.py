"""One case, one number of threads: gate every contestant, then time them in turns on fresh data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import Case, draw
from benchmarks.peers import OURS, PRODUCT, Contestant
from benchmarks.timing import Rounds, calls_for, plan_rounds, sample, turns

TIMED, LEFT_OUT, FAILED = "timed", "left out", "failed"
EVERY_ROUND_FLOPS = 3e9  # float64 costs little up to here: the gate is repeated in every round
ESTIMATES = 3  # calls of which the fastest sets the repeats: one alone may have been interrupted
SCALED_SIDE = 2048  # huge cases are warmed and estimated on this many vectors and entries


@dataclass(slots=True)
class Measurement:
    """What one contestant did on one case with some threads; times are seconds per call, one per round.

    ``cpu_s`` is process CPU time over the threads. ``error`` is the largest relative error of any gated round.
    """

    shape: str
    n: int
    d: int
    dtype: str
    threads: int
    contestant: str
    group: str
    status: str = TIMED
    reason: str = ""
    calls: int = 0
    rounds: list[int] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    expected: float | None = None
    value: float | None = None
    error: float | None = None
    tolerance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Expected:
    """The float64 value of each data set, computed once and shared by all numbers of threads."""

    def __init__(self, compute: Callable[[Tensor], float] = gate.expected_pii, threads: int | None = None) -> None:
        self.compute = compute
        self.threads = threads or torch.get_num_threads()
        self.known: dict[tuple[str, str, int], float] = {}

    def of(self, case: Case, seed: int, vectors: Tensor) -> float:
        """Expected mean |cos| of these vectors."""
        key = (case.shape, case.dtype, seed)
        if key not in self.known:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            self.known[key] = self.compute(vectors)
            torch.set_num_threads(before)
        return self.known[key]


def race(
    case: Case, threads: int, contestants: Sequence[Contestant], allowance_s: float, expected: Expected, seed: int = 0
) -> list[Measurement]:
    """Gate and time the contestants on one case, in turns, within about ``allowance_s`` seconds.

    Round ``r`` uses data of seed ``seed + r``, drawn once and shared by all. A contestant of ours whose value is wrong
    is marked "failed" and keeps no times.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _race(case, threads, contestants, allowance_s, expected, seed)
    finally:
        torch.set_num_threads(before)


def _race(
    case: Case, threads: int, contestants: Sequence[Contestant], allowance_s: float, expected: Expected, seed: int
) -> list[Measurement]:
    found = {c.name: Measurement(case.shape, case.n, case.d, case.dtype, threads, c.name, c.group) for c in contestants}
    entered: dict[str, Contestant] = {}
    for contestant in contestants:
        reason = contestant.refuses(case)
        if reason is None:
            entered[contestant.name] = contestant
        else:
            found[contestant.name].status, found[contestant.name].reason = LEFT_OUT, reason

    vectors = draw(case, seed)
    sample_s = _warm(case, threads, vectors, entered, found, expected.of(case, seed, vectors))
    core = frozenset(name for name, contestant in entered.items() if contestant.core)
    plan = plan_rounds(sample_s, core, case.least, case.most, allowance_s)
    for name in sample_s:
        if not plan.of[name]:
            found[name].status = LEFT_OUT
            found[name].reason = "left out here to keep the run within its time"
    _rounds(case, threads, {n: entered[n] for n in sample_s}, found, plan, vectors, expected, seed)
    for name in entered:
        _close(found[name])
    return list(found.values())


def _warm(
    case: Case,
    threads: int,
    vectors: Tensor,
    entered: dict[str, Contestant],
    found: dict[str, Measurement],
    truth: float,
) -> dict[str, float]:
    """Call everybody once and once more: compiles, gates (not when huge), estimates seconds of a sample."""
    trial, scale = vectors, 1.0
    if case.huge:
        trial = draw(Case(min(case.n, SCALED_SIDE), min(case.d, SCALED_SIDE), case.dtype), 0)
        scale = case.flops / (len(trial) ** 2 * trial.shape[1])
    sample_s: dict[str, float] = {}
    for name, contestant in entered.items():
        measured = found[name]
        try:
            with contestant.around(threads):
                call = contestant.bind(trial)
                measured.first_call_s, _, result = sample(call, 1)
                if not case.huge:
                    _gate(measured, contestant, result, vectors, truth)
                result = None
                call_s = min(sample(call, 1)[0] for _ in range(1 if measured.first_call_s > 1 else ESTIMATES))
        except Exception as error:  # noqa: BLE001 - why a peer cannot is a result too
            measured.status = FAILED
            measured.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            continue
        if measured.status == FAILED:
            continue
        measured.calls = calls_for(call_s * scale)
        sample_s[name] = call_s * scale * measured.calls
    return sample_s


def _rounds(
    case: Case,
    threads: int,
    running: dict[str, Contestant],
    found: dict[str, Measurement],
    plan: Rounds,
    vectors: Tensor,
    expected: Expected,
    seed: int,
) -> None:
    for number in range(plan.largest):
        if number:
            vectors = draw(case, seed + number)
        gated = (number == 0 and case.huge) or case.flops <= EVERY_ROUND_FLOPS
        for name in turns(list(running), number):
            measured, contestant = found[name], running[name]
            if number >= plan.of[name] or measured.status == FAILED:
                continue
            gc.collect()
            with contestant.around(threads):
                call = contestant.bind(vectors)
                if measured.calls > 1:
                    call()  # caches hold this contestant's data, not its predecessor's
                wall_s, cpu_s, result = sample(call, measured.calls)
            if gated:
                _gate(measured, contestant, result, vectors, expected.of(case, seed + number, vectors))
            del result, call
            measured.rounds.append(number)
            measured.wall_s.append(wall_s)
            measured.cpu_s.append(cpu_s / threads)


def _gate(measured: Measurement, contestant: Contestant, result: Any, vectors: Tensor, truth: float) -> None:
    """Record the error; ours beyond its tolerance, or a rival that computes something else, has failed."""
    if contestant.group == PRODUCT or contestant.value is None:
        error, limit = gate.product_error(result, vectors), gate.RIVAL_TOLERANCE
    else:
        value = contestant.value(result)
        error = gate.relative_error(value, truth)
        ours = contestant.group == OURS
        limit = gate.tolerance(len(vectors), exact=contestant.exact) if ours else gate.RIVAL_TOLERANCE
        if measured.value is None:
            measured.value, measured.expected = value, truth
    measured.tolerance = limit
    measured.error = error if measured.error is None else max(measured.error, error)
    if not error <= limit:
        measured.status = FAILED
        measured.reason = f"relative error {error:.2g} is above the gate's {limit:.2g}; no speed is reported"


def _close(measured: Measurement) -> None:
    """No speed without a passed gate."""
    if measured.status == TIMED and measured.error is None:
        measured.status, measured.reason = FAILED, "the value was never checked; no speed is reported"
    if measured.status != TIMED:
        measured.rounds, measured.wall_s, measured.cpu_s = [], [], []


def failures(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Ours that did not pass: the run as a whole has failed."""
    return [m for m in measurements if m.group == OURS and m.status == FAILED]

"""One case on a device: gate every contestant, then time them in turns on fresh data, within an allowance."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.gpu_cases import GpuCase, copies, draw
from benchmarks.gpu_device import MIB, Device, host_us
from benchmarks.gpu_journal import Journal
from benchmarks.peers import OURS, PRODUCT, Contestant
from benchmarks.race import FAILED, LEFT_OUT, TIMED
from benchmarks.timing import plan_rounds, turns
from orthofast.errors import BackendError

SAMPLE_MS = 20.0  # of device time; a shorter burst would run at clocks a longer one cannot hold
MOST_CALLS = 100
REST_S = 0.02  # between samples, so that nobody inherits its predecessor's heat
HOST_SAMPLES = 5
PER_PAIR_FLOOR = 3e-7  # of one |cos|: float32 sums in a tile, as in the tests
ROUNDED_TOLERANCE = 1e-5  # relative; operands of 11 bits, errors of many pairs average out
EVERY_ROUND_FLOPS = 1e12  # float64 of the whole costs tens of milliseconds up to here
ESTIMATES = 2
PLAIN = "block_rows"


@dataclass(slots=True)
class GpuMeasurement:
    """What one contestant did on one case. Times are of one call, a sample each; ``device_ms`` by the device's events.

    ``error`` is relative to the float64 value, the largest of any gated round; ``tolerance`` is what the gate allowed.
    """

    shape: str
    side: str
    n: int
    d: int
    dtype: str
    contestant: str
    group: str
    status: str = TIMED
    reason: str = ""
    calls: int = 0
    copies: int = 0
    rounds: list[int] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    telemetry: list[dict[str, Any]] = field(default_factory=list)
    first_call_s: float | None = None
    extra_mib: float | None = None
    expected: float | None = None
    value: float | None = None
    error: float | None = None
    tolerance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def fail(self, reason: str) -> None:
        """No speed of this contestant is reported."""
        self.status, self.reason = FAILED, reason
        self.rounds, self.device_ms, self.host_us, self.telemetry = [], [], [], []


def describe(error: BaseException) -> str:
    """Kind and first line of an error, for the results file."""
    first = str(error).splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"[:240]


def allowed(expected: float, plain_error: float, *, exact: bool) -> float:
    """Relative error the gate allows one of ours: twice plain torch's, a floor per pair, the rounding of operands."""
    return 2 * plain_error + PER_PAIR_FLOOR / max(abs(expected), 1e-12) + (0.0 if exact else ROUNDED_TOLERANCE)


class Contest(Protocol):
    """What is raced over: its data, its truth, how often.

    Attributes:
        least: rounds of the core, whatever the allowance.
        most: rounds of anybody.
        every_round: whether the gate is cheap enough to be repeated with every data.
    """

    least: int
    most: int
    item_bytes: int
    every_round: bool

    def blank(self, contestant: Contestant) -> GpuMeasurement:
        """A measurement before anything is measured."""

    def refuses(self, contestant: Contestant) -> str | None:
        """Why a contestant takes no part."""

    def draw(self, seed: int) -> Any:
        """Fresh random data; the same for the same seed."""

    def check(self, measured: GpuMeasurement, contestant: Contestant, result: Any, seed: int, data: Any) -> None:
        """Record the error of a result (``settle``)."""


def settle(measured: GpuMeasurement, error: float, limit: float) -> None:
    """Keep the largest error; beyond what is allowed there is no speed."""
    measured.tolerance = limit
    measured.error = error if measured.error is None else max(measured.error, error)
    if not error <= limit:
        measured.fail(f"relative error {error:.2g} is above the gate's {limit:.2g}; no speed is reported")


class MatrixContest:
    """One matrix against float64; plain torch's own error is measured on the first data, once."""

    def __init__(self, case: GpuCase, device: Device, plain: Callable[[Tensor], Tensor]) -> None:
        self.case, self.device, self.plain = case, device, plain
        self.least, self.most, self.item_bytes = case.least, case.most, case.item_bytes
        self.every_round = case.flops <= EVERY_ROUND_FLOPS
        self.known: dict[int, float] = {}
        self.plain_error: float | None = None

    def blank(self, contestant: Contestant) -> GpuMeasurement:
        case = self.case
        return GpuMeasurement(case.shape, case.side, case.n, case.d, case.dtype, contestant.name, contestant.group)

    def refuses(self, contestant: Contestant) -> str | None:
        return contestant.refuses(self.case)

    def draw(self, seed: int) -> Tensor:
        return draw(self.case, seed, self.device.torch_device)

    def check(self, measured: GpuMeasurement, contestant: Contestant, result: Any, seed: int, data: Tensor) -> None:
        if contestant.group == PRODUCT or contestant.value is None:
            settle(measured, gate.product_error(result, data), gate.RIVAL_TOLERANCE)
            return
        if seed not in self.known:
            self.known[seed] = gate.expected_pii(data)
        truth, value = self.known[seed], contestant.value(result)
        limit = gate.RIVAL_TOLERANCE
        if contestant.group == OURS:
            if self.plain_error is None:
                self.plain_error = gate.relative_error(float(self.plain(data)), truth)
            limit = allowed(truth, self.plain_error, exact=contestant.exact or self.case.dtype != "float32")
        if measured.value is None:
            measured.value, measured.expected = value, truth
        settle(measured, gate.relative_error(value, truth), limit)


def race(
    contest: Contest, contestants: Sequence[Contestant], device: Device, allowance_s: float, journal: Journal
) -> list[GpuMeasurement]:
    """All contestants of one contest; whoever refuses, fails, is wrong or has no time is named with its reason."""
    deadline = time.perf_counter() + allowance_s
    found = {contestant.name: contest.blank(contestant) for contestant in contestants}
    entered: dict[str, Contestant] = {}
    for contestant in contestants:
        culprit = journal.refusal(contestant.name)
        reason = culprit or contest.refuses(contestant)
        if reason is None:
            entered[contestant.name] = contestant
        elif culprit:
            found[contestant.name].fail(culprit)
        else:
            found[contestant.name].status, found[contestant.name].reason = LEFT_OUT, reason
    count = copies(contest.item_bytes, device.l2_bytes())
    data = [contest.draw(copy) for copy in range(count)]
    sample_s = _warm(entered, found, device, data, contest, journal)
    core = frozenset(name for name in sample_s if entered[name].core)
    plan = plan_rounds(sample_s, core, contest.least, contest.most, max(0.0, deadline - time.perf_counter()))
    for name in sample_s:
        if not plan.of[name]:
            found[name].status, found[name].reason = LEFT_OUT, "left out here to keep the run within its time"
    del data
    for number in range(plan.largest):
        if number and time.perf_counter() > deadline:
            break
        first = number * count
        data = [contest.draw(first + copy) for copy in range(count)]
        gated = number > 0 and contest.every_round  # the first data passed it before the race
        for name in turns(list(sample_s), number):
            if number < plan.of[name] and found[name].status == TIMED:
                _sample(entered[name], found[name], device, data, journal, number)
                if gated and found[name].status == TIMED:
                    _gate_again(entered[name], found[name], device, data, contest, journal, first)
        del data
    for measured in found.values():
        if measured.status == TIMED and (measured.error is None or not measured.device_ms):
            measured.fail("was never checked or timed; no speed is reported")
    return list(found.values())


def _warm(
    entered: Mapping[str, Contestant],
    found: Mapping[str, GpuMeasurement],
    device: Device,
    data: Sequence[Any],
    contest: Contest,
    journal: Journal,
) -> dict[str, float]:
    """Call everybody: compiles, gates, measures memory, estimates the seconds of one sample."""
    sample_s: dict[str, float] = {}
    for name, contestant in entered.items():
        measured = found[name]
        try:
            with journal.turn(name), contestant.around(0):
                call = contestant.bind(data[0])
                device.synchronize()
                start = time.perf_counter()
                result = call()
                device.synchronize()
                measured.first_call_s = time.perf_counter() - start
                contest.check(measured, contestant, result, 0, data[0])
                del result
                if measured.status == FAILED:
                    continue
                extra = device.extra_bytes(call)
                measured.extra_mib = None if extra is None else extra / MIB
                host_s = min(host_us(device, call, ESTIMATES)) / 1e6
                once_ms = min(device.device_ms(_numbered(call), 1, host_s) for _ in range(ESTIMATES))
        except BackendError as error:
            measured.status, measured.reason = LEFT_OUT, describe(error)
            recover(device, journal, name, measured.reason)
            continue
        except Exception as error:  # noqa: BLE001 - why a contestant cannot is a result too
            measured.fail(describe(error))
            recover(device, journal, name, measured.reason)
            continue
        measured.copies = len(data)
        longest = MOST_CALLS if not device.dry else 2
        measured.calls = max(1, min(longest, round(SAMPLE_MS / max(once_ms, 1e-3))))
        sample_s[name] = measured.calls * max(once_ms / 1e3, host_s) + REST_S + HOST_SAMPLES * host_s
    return sample_s


def _numbered(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda _number: call()


def _sample(
    contestant: Contestant,
    measured: GpuMeasurement,
    device: Device,
    data: Sequence[Any],
    journal: Journal,
    number: int,
) -> None:
    """One sample: a burst on the device over all inputs in rotation, and single calls for the host."""
    if not device.dry:
        time.sleep(REST_S)
    try:
        with journal.turn(contestant.name), contestant.around(0):
            calls = [contestant.bind(vectors) for vectors in data]
            calls[-1]()  # not the first of its kind since another contestant ran
            host = host_us(device, calls[0], HOST_SAMPLES)
            start = time.perf_counter()
            taken = device.device_ms(lambda turn: calls[turn % len(calls)](), measured.calls, min(host) / 1e6)
            stop = time.perf_counter()
    except Exception as error:  # noqa: BLE001 - out of memory beside another contestant, for one
        measured.fail(describe(error))
        recover(device, journal, contestant.name, measured.reason)
        return
    measured.rounds.append(number)
    measured.device_ms.append(taken)
    measured.host_us.extend(host)
    measured.telemetry.append(device.telemetry.between(start, stop))


def _gate_again(
    contestant: Contestant,
    measured: GpuMeasurement,
    device: Device,
    data: Sequence[Any],
    contest: Contest,
    journal: Journal,
    seed: int,
) -> None:
    try:
        with journal.turn(contestant.name), contestant.around(0):
            contest.check(measured, contestant, contestant.bind(data[0])(), seed, data[0])
    except Exception as error:  # noqa: BLE001 - a call that fails now is no contestant
        measured.fail(describe(error))
        recover(device, journal, contestant.name, measured.reason)


def recover(device: Device, journal: Journal, contestant: str, reason: str) -> None:
    """After a failure: return cached memory to the driver; end the process if the device serves nobody any more."""
    if device.torch_device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
        float(torch.ones(8, device=device.torch_device).sum())
    except Exception:  # noqa: BLE001 - whatever it is, the context is gone
        journal.broken(contestant, reason)

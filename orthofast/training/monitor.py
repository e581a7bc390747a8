"""Monitor: plan once, fold on due steps, hand the numbers over without blocking, and never disturb the training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.training.capture import CURE
from orthofast.training.layers import Select, Skipped
from orthofast.training.measures import COVARIANCES, DEFAULT, MEASURES, Part, of_covariances, still
from orthofast.training.probe import Probe, checked
from orthofast.training.rows import PREFIX, Row, add_metric
from orthofast.training.schedule import Mark, Schedule, mark
from orthofast.training.sinks import Log, Sinks, report
from orthofast.training.worker import Done, Worker

NEVER = sys.maxsize
COUNTS = ("nonfinite", "zero")  # logged where above 0


@dataclass(slots=True)
class _Pending:
    """Numbers on their way to the host."""

    step: int
    names: list[tuple[str, tuple[str, ...]]]
    host: Tensor  # float64, pinned where a device writes it
    errors: dict[str, str]
    own_s: float  # what was spent outside begin to end
    since: Mark | None
    steps: int
    begin: Mark
    end: Mark


class Monitor:
    """Measures a model while it trains, on every ``every_n_steps``-th optimizer step.

    Three lines: make it before the first step, call :meth:`step` after ``optimizer.step()``, close it (or use it as a
    context manager). On other steps it costs one comparison of integers. It draws no random numbers and leaves weights,
    autocast and hooks of others alone: a monitored run computes the same weights, bit for bit. What fails inside it is
    reported once as a warning; training goes on.

    ====================  ===========  ============================================================================
    metric                of           one value per layer
    ====================  ===========  ============================================================================
    pii                   weights      :func:`orthofast.pii`
    pii_ratio             weights      pii over :func:`orthofast.isotropic_baseline`
    max_coherence         weights      :func:`orthofast.max_coherence`
    mean_squared_cosine   weights      :func:`orthofast.metrics.mean_squared_cosine`
    diagonal_dominance    weights      mean ratio of :func:`orthofast.diagonal_dominance`
    conformal_drift       weights      :func:`orthofast.metrics.drift.conformal_drift`, ``absolute``, since it was made
    weight_domination     gradients    :func:`orthofast.metrics.domination.weight_domination`
    orthogonality_gap     activations  :func:`orthofast.orthogonality_gap` of up to 256 outputs of the layer
    dying_frac full_frac  activations  :mod:`orthofast.metrics.neurons`, of ReLU modules; without any, of all outputs
    bn_rate               statistics   alpha of batch norm, from running variances, the mean over its neurons
    lambda_max_x, _g, _F  covariances  largest eigenvalue of the inputs', the output gradients' covariance, and both's
    kappa_x_50, _80, ...  covariances  their condition number kappa_p, p = 50 % or 80 %; and kappa_g, kappa_F
    last_lambda_max_x     covariances  of the layer called last alone; also last_lambda_max_F, largest second moment of
                                       its weight's gradient
    last_weight_norm      weights      Frobenius norm of the last layer's weight
    ====================  ===========  ============================================================================

    Covariances are those of one batch, with the training's own labels and its loss taken as a mean over the batch, see
    :class:`orthofast.training.CovarianceTracker`. They are measured on every fifth due step unless ``metrics`` says
    otherwise, and less often where they would exceed the budget. Spectra are computed in a thread; they join the first
    row after they are done, and ``orthofast/covariance_step`` says which step they are of.

    Keys are ``orthofast/<metric>/mean``, ``/max`` (``/min`` for weight_domination), ``/argmax`` (the layer), and
    ``orthofast/<metric>/<module.path>`` for the ``worst_k`` worst layers. Where there are any,
    ``orthofast/nonfinite/<module.path>`` counts vectors with NaN or Inf and ``orthofast/zero/<module.path>`` those of
    length 0; ``orthofast/error/<module.path>`` is a sentence. ``orthofast/overhead`` is the monitor's own time over
    training time so far.

    Args:
        model: whose layers are measured; read anew on every due step.
        every_n_steps: optimizer steps between measurements.
        metrics: names of the table above, or name -> steps between its measurements, multiples of ``every_n_steps``.
        layers: which layers, as in :func:`orthofast.training.find_layers`; None for all.
        log: where rows go: a ``callable(values, step=step)``, a sink of :mod:`orthofast.training.sinks`, or a list of
            these. None prints a line a row to stderr; [] keeps :attr:`latest` only. Of several processes, rank 0 logs.
        worst_k: how many of the worst layers of each metric get a key of their own; None for all layers.
        overhead: the interval stretches by itself where measuring would take more than this share of the training
            time; None for no limit.

    Attributes:
        latest: the newest row's values; empty before the first.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, every_n_steps=2, log=[]) as monitor:
    ...     for _ in range(4):
    ...         model(torch.randn(16, 8)).square().mean().backward()
    ...         optimizer.step()
    ...         monitor.step()
    ...         optimizer.zero_grad()
    >>> sorted(monitor.latest)[:2]
    ['orthofast/max_coherence/argmax', 'orthofast/max_coherence/max']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every_n_steps: int = 100,
        metrics: Sequence[str] | Mapping[str, int] = DEFAULT,
        layers: Select = None,
        log: Log = None,
        worst_k: int | None = 5,
        overhead: float | None = 0.01,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model needs a torch.nn.Module, got {type(model).__name__}")
        if worst_k is not None and (type(worst_k) is not int or worst_k < 0):
            raise InputError(f"worst_k needs a number of layers, or None for all of them, got {worst_k!r}")
        self.worst_k = worst_k
        self.latest: dict[str, Any] = {}
        self._schedule = Schedule(every_n_steps, overhead)
        self._sinks = Sinks(log)
        self._say = _Once()  # the probe holds it too, and not the monitor: a cycle would keep the model in memory
        model = getattr(model, "_orig_mod", model)
        with torch.no_grad(), still(model):
            self._probe = Probe(model, checked(metrics, every_n_steps), layers, self._say)
        self._count = 0
        self._next = 1  # step on which something happens
        self._gradients: list[Part] = []
        self._observed = -1  # step these belong to
        self._pending: _Pending | None = None
        self._since: Mark | None = None  # end of the last due step, or of the first one seen
        self._since_step = 0
        self._side_s = 0.0  # own time outside of begin to end: gradients, sinks
        self._wanted = every_n_steps
        self._worker = Worker()
        self._heavy_s = 0.0  # what the last covariances cost, hooks and spectra
        self._dropped = 0
        self._ready: list[Done] = []
        self._arm_before(self._schedule.due)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Matrices that are not measured, with reasons."""
        return self._probe.skipped

    def step(self, step: int | None = None) -> None:
        """One optimizer step is done; measure if it is due.

        Args:
            step: its number, from 1; None counts the calls.
        """
        count = self._count = self._count + 1 if step is None else step
        if count < self._next:
            return
        with self._harmless():
            self._act(count)

    def observe_gradients(self) -> None:
        """Measure the gradients of the coming step now, if it is due: for loops that clear them before :meth:`step`."""
        coming = self._count + 1
        if coming < self._schedule.due or self._observed == coming or self._next == NEVER:
            return
        with self._harmless():
            started = time.perf_counter()
            self._gradients, self._observed = self._probe.gradients({}), coming
            self._side_s += time.perf_counter() - started

    def flush(self) -> None:
        """Wait for numbers still on their way and hand them to the sinks."""
        self._deliver()
        self._worker.drain()
        row = Row(self._count)
        self._add_spectra(row, flushed=True)
        if row.values and _writes():
            self.latest |= row.values
            self._sinks.write(row)

    def close(self) -> None:
        """Flush, remove all hooks, close the sinks. Further steps do nothing."""
        self.flush()
        if self._probe.capture is not None:
            self._probe.capture.close()
        if self._probe.tracker is not None:
            self._probe.tracker.close()
        self._worker.close()
        self._sinks.close()
        self._next = NEVER

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, the schedule, warm starts, and for conformal_drift the first weights."""
        self.flush()
        return {"step": self._count, "schedule": self._schedule.state_dict(), "probe": self._probe.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._count = int(state["step"])
        self._schedule.load_state_dict(state["schedule"])
        self._probe.load_state_dict(state["probe"])
        self._pending = self._since = None
        self._next = self._count + 1
        self._arm_before(self._schedule.due)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """No gradients, no autocast, and no exception that reaches the training."""
        try:
            device = self._probe.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False), still(self._probe.model):
                yield
        except Exception as error:  # noqa: BLE001 - the last line of defence
            self._next = NEVER
            self._say(f"the monitor stopped at step {self._count}: {type(error).__name__}: {error}; training goes on")

    def _act(self, count: int) -> None:
        started = time.perf_counter()
        if self._since is None:
            self._begin(count)
        pending = self._pending
        if pending is not None and (count >= self._schedule.due or pending.end.reached):
            self._deliver()  # may put the next due step off
        self._side_s += time.perf_counter() - started
        if count >= self._schedule.due:
            self._measure(count)
        due = self._schedule.due
        self._arm_before(due)
        soon = due - 1 if self._probe.must_arm else due
        self._next = max(count + 1, min(soon, count + 1 if self._pending is not None else soon))

    def _begin(self, count: int) -> None:
        """The first step seen: time runs from here, and hooks show whether the model is compiled."""
        self._since, self._since_step = mark(self._probe.device), count
        if count > self._schedule.due:  # numbered by a caller who started before
            self._schedule.begin(count)
        watch = self._probe.capture
        if watch is not None:
            if watch.ignored:
                self._say(CURE)
            if not watch.armed:
                watch.settle()
        if self._probe.tracker is not None and not self._probe.tracker.armed:
            self._probe.tracker.rest()

    def _arm_before(self, due: int) -> None:
        if self._count >= due - 1:
            self._probe.arm(covariances=_writes())

    def _measure(self, count: int) -> None:
        probe, errors = self._probe, dict[str, str]()
        begin = mark(probe.device)
        hooks_s = 0.0 if probe.capture is None else probe.capture.own_s
        parts = probe.measure(self._gradients if self._observed == count else None, errors)
        hooks_s += self._send_covariances(count)
        probe.turn += 1
        own_s = self._side_s + hooks_s
        self._gradients, self._side_s = [], 0.0
        vectors = [part.values.to(probe.device, torch.float64, non_blocking=True) for part in parts]
        host = _sent(torch.cat([*vectors, self._interval()]))
        end = mark(probe.device)
        names = [(part.metric, part.paths) for part in parts]
        self._pending = _Pending(count, names, host, errors, own_s, self._since, count - self._since_step, begin, end)
        self._since, self._since_step = end, count
        self._schedule.passed(count)
        if end.event is None:  # nothing is on its way
            started = time.perf_counter()
            self._deliver()
            self._side_s += time.perf_counter() - started

    def _send_covariances(self, count: int) -> float:
        """Hand what was added up to the thread; host seconds of the hooks, spread over the steps until the next."""
        tracker = self._probe.tracker
        if tracker is None or not tracker.armed:
            return 0.0
        own_s, tracker.own_s = tracker.own_s, 0.0
        asked, layers = self._probe.covariances()
        if layers and not self._worker.submit(count, lambda: of_covariances(asked, layers)):
            self._say("spectra are dropped, as those before are not done; measure covariances less often")
        self._heavy_s = own_s
        return own_s

    def _add_spectra(self, row: Row, flushed: bool = False) -> None:
        """Spectra of earlier steps that are done by now; the newest of each metric stays."""
        ready, self._ready = self._ready + self._worker.finished(), []
        for done in ready:
            if done.step >= row.step and not flushed:  # whether these are done by now is chance
                self._ready.append(done)
                continue
            if done.error:
                self._say(f"spectra failed: {done.error}; training goes on")
                continue
            self._keep_budget(done)
            for metric, values in done.value.items():
                low = MEASURES[metric].low_is_worse
                paths, numbers = list(values), list(values.values())
                add_metric(row, metric, paths, numbers, low_is_worse=low, worst_k=self.worst_k)
            row.values[f"{PREFIX}/covariance_step"] = float(done.step)
        if self._worker.dropped > self._dropped:
            self._dropped = self._worker.dropped
            row.values[f"{PREFIX}/dropped_spectra"] = float(self._dropped)

    def _keep_budget(self, done: Done) -> None:
        """Covariances may take half of the budget; where they take more, their interval is stretched."""
        self._side_s += done.own_s
        schedule, probe = self._schedule, self._probe
        steps = schedule.due - schedule.every_n_steps  # about how many there were
        if schedule.overhead is None or schedule.training_s <= 0 or steps < 1:
            return
        a_due_s = schedule.training_s / steps * schedule.interval  # training time between due steps
        every = min(measure.every for measure in probe.measures if measure.source == COVARIANCES)
        allowed_s = schedule.overhead / 2 * a_due_s * every
        probe.seldom = max(1, math.ceil((self._heavy_s + done.own_s) / allowed_s))

    def _interval(self) -> Tensor:
        """(1,) the interval that keeps the budget; of sharded models the longest any process wants: all must agree."""
        wanted = torch.full((1,), float(self._wanted), dtype=torch.float64, device=self._probe.device)
        if self._probe.sharded:
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        return wanted

    def _deliver(self) -> None:
        """The numbers as a row to the sinks; waits for them if they are still on their way."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.end.wait()
        *numbers, interval = pending.host.tolist()
        own_s = pending.end.since_s(pending.begin) + pending.own_s
        training_s = pending.begin.since_s(pending.since) if pending.since is not None else 0.0
        self._wanted = self._schedule.settle(own_s, max(0.0, training_s - pending.own_s), pending.steps)
        self._schedule.stretch(int(interval) if self._probe.sharded else self._wanted)
        if not _writes():
            return
        row = self._row(pending, numbers)
        self._add_spectra(row)
        self.latest = dict(row.values)
        self._sinks.write(row)

    def _row(self, pending: _Pending, numbers: list[float]) -> Row:
        row, start = Row(pending.step), 0
        for metric, paths in pending.names:
            values = numbers[start : start + len(paths)]
            start += len(paths)
            if metric in COUNTS:
                row.values.update({f"{PREFIX}/{metric}/{p}": v for p, v in zip(paths, values, strict=True) if v > 0})
                continue
            low = MEASURES[metric].low_is_worse
            add_metric(row, metric, paths, values, low_is_worse=low, worst_k=self.worst_k)
        row.values.update({f"{PREFIX}/error/{name}": sentence for name, sentence in pending.errors.items()})
        overhead = self._schedule.overhead_frac
        if not math.isnan(overhead):
            row.values[f"{PREFIX}/overhead"] = overhead
        return row


class _Once:
    """Reports every sentence once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            report(sentence)


def _sent(vector: Tensor) -> Tensor:
    """The vector on the host, or where it will be once the device has come this far."""
    if vector.device.type == "cpu":
        return vector
    host = torch.empty(vector.shape, dtype=vector.dtype, device="cpu", pin_memory=vector.device.type == "cuda")
    return host.copy_(vector, non_blocking=vector.device.type == "cuda")


def _writes() -> bool:
    """Of several processes, the first one logs."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0

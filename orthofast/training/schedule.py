"""When to measure: every so many steps, and more rarely by itself where that would cost more than its share."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from orthofast.errors import InputError

REMEMBERED = 3  # costs of which the median counts: one alone may have been interrupted


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment, by the host's clock and, where the work is queued on a device, by an event in its queue."""

    host_s: float
    event: Any = None

    @property
    def reached(self) -> bool:
        """Whether the device has come this far."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        """Block until the device has come this far."""
        if self.event is not None:
            self.event.synchronize()

    def since_s(self, earlier: Mark) -> float:
        """Seconds from an earlier mark: the longer of the host's and the device's, which must have reached both."""
        host_s = self.host_s - earlier.host_s
        if self.event is None or earlier.event is None:
            return host_s
        return max(host_s, float(earlier.event.elapsed_time(self.event)) / 1000)


def mark(device: torch.device) -> Mark:
    """This moment. Queues an event on a CUDA device and waits for nothing."""
    event = None
    if device.type == "cuda":
        with torch.cuda.device(device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
    return Mark(time.perf_counter(), event)


class Schedule:
    """Which steps are due.

    Steps count from 1, and multiples of ``every_n_steps`` are due. With a budget, a due step's own time is held against
    the training time since the one before it; where it exceeds ``overhead`` of that, the interval grows to the next
    multiple that keeps the budget, and shrinks again when it can. The first due step loads and compiles kernels: its
    time is reported but stretches nothing.

    Attributes:
        every_n_steps: least interval.
        overhead: own time over training time, at most; None for no limit.
        due: the next due step.
        interval: steps between the last due step and the next.
        own_s: seconds spent measuring so far.
        training_s: seconds of training so far, measuring left out.
    """

    def __init__(self, every_n_steps: int = 100, overhead: float | None = 0.01) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise InputError(f"every_n_steps needs a positive integer, got {every_n_steps!r}")
        if overhead is not None and not (isinstance(overhead, int | float) and 0 < overhead < math.inf):
            raise InputError(f"overhead needs a positive share such as 0.01, or None for no limit, got {overhead!r}")
        self.every_n_steps = every_n_steps
        self.overhead = overhead
        self.interval = every_n_steps
        self.due = every_n_steps
        self.own_s = 0.0
        self.training_s = 0.0
        self._last = 0  # due step
        self._settled = 0  # how many of them have their times
        self._costs: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def overhead_frac(self) -> float:
        """Own time over training time so far; NaN before any."""
        return self.own_s / self.training_s if self.training_s > 0 else math.nan

    def begin(self, step: int) -> None:
        """Count from this step on: the next multiple of ``every_n_steps`` is due."""
        self._last = step
        self.due = (step // self.every_n_steps + 1) * self.every_n_steps

    def passed(self, step: int) -> None:
        """A due step was measured; the next one is as far as the last interval says."""
        self._last = step
        self._place()

    def settle(self, own_s: float, training_s: float, steps: int) -> int:
        """Take the times of the last due step, and say which interval keeps the budget.

        Args:
            own_s: seconds it took.
            training_s: seconds of training since the due step before it.
            steps: training steps within these.
        """
        self.own_s += own_s
        self.training_s += training_s
        self._settled += 1
        if self._settled > 1:
            self._costs.append(own_s)
        if self.overhead is None or not self._costs or training_s <= 0 or steps < 1:
            return self.every_n_steps
        needed = statistics.median(self._costs) / (self.overhead * training_s / steps)
        return self.every_n_steps * max(1, math.ceil(needed / self.every_n_steps - 1e-9))

    def stretch(self, interval: int) -> None:
        """Place the next due step this far behind the last one."""
        self.interval = max(self.every_n_steps, interval)
        self._place()

    def _place(self) -> None:
        every = self.every_n_steps
        self.due = max(self._last + 1, (self._last + self.interval) // every * every)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to be due on the same steps."""
        return {
            "last": self._last,
            "due": self.due,
            "interval": self.interval,
            "own_s": self.own_s,
            "training_s": self.training_s,
            "costs": list(self._costs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a run resumed with another ``every_n_steps`` is due by its own."""
        self._last = int(state["last"])
        self.interval = max(self.every_n_steps, int(state["interval"]))
        self.own_s, self.training_s = float(state["own_s"]), float(state["training_s"])
        self._costs = deque((float(cost) for cost in state["costs"]), maxlen=REMEMBERED)
        self._settled = 0  # kernels are loaded anew
        self._place()

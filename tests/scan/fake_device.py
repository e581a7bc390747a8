"""A device on the host whose copies run as late as a real one's may: what is not waited for is not there."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

GARBAGE = 0x5A


@dataclass
class FakeEvent:
    """The end of everything enqueued on a queue so far."""

    device: FakeDevice
    number: int
    fetched: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def synchronize(self) -> None:
        if self.values is not None:
            assert self.fetched is not None
            self.fetched.copy_(self.values)
            self.device.leave(self)
        else:
            self.device.catch_up(self.number)


@dataclass
class FakeDevice:
    """Copies wait in a queue until somebody waits for them; the ranges that folds read are watched."""

    free: int = 1 << 30
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = "fake"
    copied_bytes: int = 0
    pinned_bytes: int = 0
    ring_bytes: int = 0
    relieved: int = 0
    settled: int = 0
    violations: list[str] = field(default_factory=list)
    most_queued: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run = 0
        self._reading: list[tuple[int, int, FakeEvent | None]] = []  # ranges that folds read, until their fetch
        self._ranges: dict[int, tuple[int, int]] = {}

    def scope(self) -> AbstractContextManager[object]:
        return nullcontext()

    def free_bytes(self) -> int:
        return self.free

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.pinned_bytes += nbytes
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def memory(self, nbytes: int) -> torch.Tensor:
        self.ring_bytes += nbytes
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> FakeEvent:
        with self._lock:
            start = target.data_ptr()
            stop = start + len(target)
            for first, last, event in self._reading:
                if start < last and first < stop:
                    self.violations.append(f"a copy into a region whose folds are not done ({event})")
            self._queue.append((target, source))
            self.most_queued = max(self.most_queued, len(self._queue) - self._run)
            self.copied_bytes += len(target)
            number = len(self._queue)
            self._ranges[number] = start, stop
            return FakeEvent(self, number)

    def await_copy(self, event: FakeEvent) -> None:
        with self._lock:
            self.catch_up(event.number)
            self._reading.append((*self._ranges[event.number], None))

    def fetch(self, values: torch.Tensor) -> tuple[torch.Tensor, FakeEvent]:
        with self._lock:
            host = torch.full_like(values, float("nan"))
            event = FakeEvent(self, 0, host, values)
            self._reading = [(a, b, event if known is None else known) for a, b, known in self._reading]
            return host, event

    def settle(self) -> None:
        self.settled += 1

    def relieve(self) -> None:
        self.relieved += 1

    def catch_up(self, number: int) -> None:
        with self._lock:
            while self._run < number:
                target, source = self._queue[self._run]
                target.copy_(source)
                self._run += 1

    def leave(self, event: FakeEvent) -> None:
        with self._lock:
            self._reading = [entry for entry in self._reading if entry[2] is not event]

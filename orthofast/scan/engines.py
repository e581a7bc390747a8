"""Groups of weights brought to where they are folded: read ahead by threads, in memory that stays within a bound.

On the processor a group is read straight into the memory it is folded from. For a GPU it passes through pinned slabs:
a thread reads into a slab, a copy stream empties it, the event behind the copy gives it back. Whoever is behind waits,
so nothing grows: readers wait for slabs, groups wait for memory, memory comes back when a group has been folded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.devices import Device
from orthofast.scan.plan import Item
from orthofast.scan.reading import READ_BYTES, Files, Layout, Segment, lay_out, stored_tensor
from orthofast.scan.slabs import Event, Ring, Slabs

AHEAD = 2  # groups read while one is folded
REGION_ALIGNMENT = 256  # of a group in a ring: what allocators of devices give
READERS = 4  # threads that wait for disks; the processor's time goes to the fold
DEVICE_READERS = 8  # where it does not, and copies are faster than one disk

Parts = dict[str, Tensor]


@dataclass(slots=True)
class Group:
    """Weights whose stored parts are at hand.

    Attributes:
        items: the weights and the matrices in them.
        parts: for each, role of a part -> stored tensor; or why it cannot be had.
        nbytes: bytes read.
        region: the memory the parts lie in; given back by ``Engine.release``.
    """

    items: list[Item]
    parts: list[Parts | CheckpointError]
    nbytes: int = 0
    region: Tensor | None = None


class Engine(Protocol):
    """Brings weights to the memory where they are decoded and folded."""

    read_s: float  # seconds of reading, added up over the threads

    def groups(self, batches: Iterable[list[Item]]) -> Iterator[Group | None]:
        """Each batch as a group, in order; None when a group must be released before the next can be had."""

    def release(self, group: Group) -> None:
        """The group's parts are needed no more; groups are released in the order they came."""

    def close(self) -> None:
        """Stop reading and give all memory back."""


class Staging(Protocol):
    """Memory for whole groups, and the way of bytes into it."""

    def reserve(self, nbytes: int) -> Tensor | None:
        """Memory of this size, or None until other memory is released.

        Raises:
            CheckpointError: if it will never be there.
        """

    def release(self, region: Tensor) -> None:
        """Memory is free again."""

    def fill(self, region: Tensor, start: int, stop: int, read: Reads) -> Event | None:
        """Bring one window of a region in; the event, where there is one, is the end of its copy."""

    def await_copy(self, event: Event) -> None:
        """Let the folds enqueued from now on wait for a copy."""

    def close(self) -> None:
        """Let no reader wait any longer."""


class Reads(Protocol):
    """The reads of one window."""

    def __call__(self, into: memoryview, first: int) -> None:
        """Read them into memory whose first byte is byte ``first`` of the group."""


class HostStaging:
    """Memory of the processor: groups are read where they are folded; small ones share buffers of one size.

    Args:
        limit: bytes held at a time, unless one weight alone is larger.
        slab_bytes: size of a buffer that is kept for the next group.
    """

    def __init__(self, limit: int, slab_bytes: int) -> None:
        self._limit, self._slab_bytes = limit, slab_bytes
        self._kept: list[Tensor] = []
        self._used = 0

    def reserve(self, nbytes: int) -> Tensor | None:
        """A buffer, kept or new."""
        size = max(nbytes, self._slab_bytes)
        if self._used and self._used + size > self._limit:
            return None
        if size == self._slab_bytes and self._kept:
            region = self._kept.pop()
        else:
            while self._kept and self._used + len(self._kept) * self._slab_bytes + size > self._limit:
                self._kept.pop()
            try:
                region = torch.empty(size, dtype=torch.uint8)
            except (MemoryError, RuntimeError):
                self._kept.clear()
                if self._used:
                    return None
                raise CheckpointError(f"no memory for {nbytes} bytes that belong together") from None
        self._used += size
        return region

    def release(self, region: Tensor) -> None:
        """Keep buffers of the usual size, free the others."""
        self._used -= len(region)
        if len(region) == self._slab_bytes:
            self._kept.append(region)

    def fill(self, region: Tensor, start: int, stop: int, read: Reads) -> Event | None:
        """Read in place."""
        read(region.numpy().data[start:stop], start)
        return None

    def await_copy(self, event: Event) -> None:
        """There are no copies."""

    def close(self) -> None:
        """Nobody waits here."""


class DeviceStaging:
    """A ring of memory on a device, filled through pinned slabs.

    Args:
        device: the device.
        ring_bytes: size of the ring, at least that of the largest group it is to hold.
        slabs: how many slabs.
        slab_bytes: size of each: one window.
    """

    def __init__(self, device: Device, ring_bytes: int, slabs: int, slab_bytes: int) -> None:
        self._device = device
        self._ring = Ring(ring_bytes)
        self._memory = device.memory(ring_bytes)
        self._slabs = Slabs(slabs, slab_bytes, device.pinned)

    def reserve(self, nbytes: int) -> Tensor | None:
        """A region of the ring."""
        size = -(-nbytes // REGION_ALIGNMENT) * REGION_ALIGNMENT
        if size > self._ring.nbytes:
            raise CheckpointError(
                f"{nbytes} bytes that belong together exceed the {self._ring.nbytes} held on the device; raise gpu_mem"
            )
        start = self._ring.reserve(size)
        return None if start is None else self._memory[start : start + nbytes]

    def release(self, region: Tensor) -> None:
        """The oldest region is free: its folds are done."""
        self._ring.release()

    def fill(self, region: Tensor, start: int, stop: int, read: Reads) -> Event | None:
        """Read into a slab and enqueue the copy that empties it."""
        slab = self._slabs.take()
        try:
            read(slab.numpy().data[: stop - start], start)
            copied = self._device.copy(region[start:stop], slab[: stop - start])
        except BaseException:
            self._slabs.give(slab)
            raise
        self._slabs.give(slab, copied)
        return copied

    def await_copy(self, event: Event) -> None:
        """Let the folds wait, not the host."""
        self._device.await_copy(event)

    def close(self) -> None:
        """Wake readers that wait for a slab."""
        self._slabs.close()


@dataclass(slots=True)
class _Started:
    group: Group
    layout: Layout
    region: Tensor | None = None
    errors: dict[int, CheckpointError] = field(default_factory=dict)  # by index of the weight
    fills: list[Future[Event | None]] = field(default_factory=list)


class PositionalEngine:
    """Reader threads with positional reads; the default.

    Args:
        staging: memory for the groups.
        window_bytes: bytes that one thread reads in one go, a slab where there are slabs.
        memory: tensors that need no reading, by name.
        device: where those go before they are folded.
        readers: threads.
    """

    def __init__(
        self,
        staging: Staging,
        *,
        window_bytes: int = READ_BYTES,
        memory: Mapping[str, Tensor] | None = None,
        device: torch.device | None = None,
        readers: int = READERS,
    ) -> None:
        self.read_s = 0.0
        self._staging, self._window_bytes = staging, window_bytes
        self._memory, self._device = memory or {}, device
        self._files = Files()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="orthofast-read")

    def groups(self, batches: Iterable[list[Item]]) -> Iterator[Group | None]:
        """Each batch as a group, in order; None when a group must be released before the next can be had."""
        source = iter(batches)
        waiting: list[Item] | None = next(source, None)
        started: deque[_Started] = deque()
        while waiting or started:
            while waiting and len(started) <= AHEAD:
                begun = self._start(waiting)
                if begun is None:
                    break
                started.append(begun)
                waiting = next(source, None)
            yield self._finish(started.popleft()) if started else None

    def release(self, group: Group) -> None:
        """Give a group's memory back."""
        region, group.region = group.region, None
        group.parts = []
        if region is not None:
            self._staging.release(region)

    def close(self) -> None:
        """Wait for reads under way, drop the others, close the files."""
        self._staging.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def _start(self, items: list[Item]) -> _Started | None:
        """Reads of a batch handed to the threads; None while there is no memory for it."""
        layout = lay_out([item.weight for item in items], self._memory)
        started = _Started(Group(items, []), layout)
        if layout.nbytes:
            try:
                started.region = self._staging.reserve(layout.nbytes)
            except CheckpointError as error:
                started.errors = {index: _about(item, error) for index, item in enumerate(items)}
                return started
            if started.region is None:
                return None
            for start, stop, segments in layout.windows(self._window_bytes):
                started.fills.append(self._readers.submit(self._fill, started, start, stop, segments))
        return started

    def _fill(self, started: _Started, start: int, stop: int, segments: list[Segment]) -> Event | None:
        def read(into: memoryview, first: int) -> None:
            began = time.perf_counter()
            for segment in segments:
                at = segment.at - first
                try:
                    self._files.read(segment, into[at : at + segment.nbytes])
                except CheckpointError as error:
                    started.errors[segment.weight] = error
            with self._lock:
                self.read_s += time.perf_counter() - began

        assert started.region is not None
        return self._staging.fill(started.region, start, stop, read)

    def _finish(self, started: _Started) -> Group:
        """A group whose bytes have come, or are on their way on the device."""
        for fill in started.fills:
            copied = fill.result()
            if copied is not None:
                self._staging.await_copy(copied)
        group, region = started.group, started.region
        group.region, group.nbytes = region, started.layout.nbytes
        for index, item in enumerate(group.items):
            found: Parts | CheckpointError | None = started.errors.get(index)
            if found is None:
                try:
                    found = self._parts(item, started.layout.places[index], region)
                except CheckpointError as error:
                    found = error
            group.parts.append(found)
        return group

    def _parts(self, item: Item, places: Mapping[str, int], region: Tensor | None) -> Parts:
        parts: Parts = {}
        for role, extent in item.weight.parts.items():
            if role in places:
                assert region is not None
                at = places[role]
                parts[role] = stored_tensor(region[at : at + extent.nbytes], extent)
            else:
                value = self._memory[extent.name].detach()
                parts[role] = value if self._device is None else value.to(self._device, non_blocking=True)
        return parts


def _about(item: Item, error: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{item.weight.first.file.name}: {item.weight.name!a}: {error}")

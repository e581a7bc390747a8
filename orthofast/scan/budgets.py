"""Sizes of slabs, groups and rings from the memory allowed and the weights at hand: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from orthofast.errors import InputError
from orthofast.scan.adapters_update import update_bytes
from orthofast.scan.decoders import decoded_bytes, decoded_dtype
from orthofast.scan.devices import Device
from orthofast.scan.engines import (
    AHEAD,
    DEVICE_READERS,
    REGION_ALIGNMENT,
    DeviceStaging,
    Engine,
    HostStaging,
    PositionalEngine,
)
from orthofast.scan.fastsafetensors_engine import HELD, FastsafetensorsEngine, refuse_others
from orthofast.scan.folding import is_shortage
from orthofast.scan.options import FASTSAFETENSORS, GIB, LEAST_BYTES, ScanOptions
from orthofast.scan.plan import Item, Plan
from orthofast.scan.reading import ALIGNMENT, READ_BYTES, scratch_bytes

HOST_GROUP_BYTES = 64 << 20  # weights handed to the fold together
DEVICE_GROUP_BYTES = 256 << 20
SLABS = 3 * DEVICE_READERS  # one being read and one being emptied for each, and as many again
FREE_FRAC = 0.8  # of a GPU's free memory that a scan takes at most


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of a scan's memory, in bytes.

    Attributes:
        group: weights that are read and folded together, unless one alone is larger.
        ring: region of a device that holds stored weights; 0 on the processor.
        slab: one pinned slab; 0 on the processor.
        slabs: how many.
    """

    group: int
    ring: int = 0
    slab: int = 0
    slabs: int = 0


def stored_bytes(item: Item) -> int:
    """Bytes a weight's parts take in a group's memory, gaps counted."""
    return item.weight.nbytes + ALIGNMENT * len(item.weight.parts)


def working_bytes(item: Item) -> int:
    """Bytes a weight takes beside its stored form while it is folded: decoded values, pieces joined, runs joined."""
    weight = item.weight
    decoded = decoded_bytes(weight)
    if any(matrix.stack for matrix in item.matrices):  # one expert after the other
        decoded //= max(weight.shape[0], 1) if len(weight.shape) == 3 else 1
    copied = max((m.out * m.inward for m in item.matrices if m.copies), default=0) * decoded_dtype(weight).itemsize
    return scratch_bytes(weight) + decoded + copied + update_bytes(weight)


def budget_for(items: Iterable[Item], options: ScanOptions, free_bytes: int | None = None) -> Budget:
    """Sizes for these weights.

    Args:
        items: all of a plan's.
        options: with ``host_mem`` and ``gpu_mem``.
        free_bytes: free memory of the device; None on the processor.
    """
    if free_bytes is None:
        return Budget(min(HOST_GROUP_BYTES, options.host_mem // (AHEAD + 1)))
    stored, working, total = 1, 0, 0
    for item in items:
        size = stored_bytes(item)
        stored, working, total = max(stored, size), max(working, working_bytes(item)), total + size
    if working:  # several small weights are decoded together
        working = max(working, min(DEVICE_GROUP_BYTES, 3 * total))
    most = int(FREE_FRAC * free_bytes)
    allowed = options.gpu_mem or max(2 * GIB, 3 * (stored + REGION_ALIGNMENT) + working)
    ring = max(1, min(allowed, most) - working)
    if options.engine == FASTSAFETENSORS:
        return Budget(min(DEVICE_GROUP_BYTES, max(1, ring // HELD)))
    group = min(DEVICE_GROUP_BYTES, max(1, ring // (AHEAD + 1)))
    slab = max(1, min(READ_BYTES, options.host_mem // 4))
    slabs = max(2, min(SLABS, options.host_mem // slab))
    return Budget(group, min(ring, total + stored), slab, slabs)


def batches(items: Sequence[Item], budget: Budget) -> Iterator[list[Item]]:
    """Weights in reading order, about a group at a time; what decoding adds counts too."""
    batch: list[Item] = []
    size = 0
    for item in items:
        needed = stored_bytes(item) + working_bytes(item)
        if batch and size + needed > budget.group:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += needed
    if batch:
        yield batch


def open_engine(
    plan: Plan, budget: Budget, options: ScanOptions, device: Device | None = None
) -> tuple[Engine, Budget]:
    """The engine that the options name, with its memory, and the budget as the device could grant it.

    Raises:
        MissingPackageError: if it needs a package that is not installed.
        InputError: if it cannot read this checkpoint.
    """
    memory = plan.catalog.memory
    if options.engine == FASTSAFETENSORS:
        refuse_others(plan.items, memory)
        return FastsafetensorsEngine(device), budget
    if device is None:
        return PositionalEngine(HostStaging(options.host_mem, budget.group), memory=memory), budget
    staging, budget = _device_staging(device, budget)
    engine = PositionalEngine(
        staging, window_bytes=budget.slab, memory=memory, device=device.device, readers=DEVICE_READERS
    )
    return engine, budget


def _device_staging(device: Device, budget: Budget) -> tuple[DeviceStaging, Budget]:
    """The ring and its slabs; where the device has less than it said, a smaller ring.

    Raises:
        InputError: if it has next to nothing.
    """
    while True:
        try:
            return DeviceStaging(device, budget.ring, budget.slabs, budget.slab), budget
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
        device.relieve()
        ring = budget.ring // 2
        budget = replace(budget, ring=ring, group=min(budget.group, max(1, ring // (AHEAD + 1))))
        if ring < LEAST_BYTES:
            raise InputError(
                f"the memory of {device.device} is taken: not even {LEAST_BYTES} bytes can be had for weights"
            )

"""Sizes of slabs, groups and rings from the memory allowed and the weights at hand: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from orthofast.scan.devices import Device
from orthofast.scan.engines import AHEAD, READERS, DeviceStaging, Engine, HostStaging, PositionalEngine
from orthofast.scan.options import GIB, ScanOptions
from orthofast.scan.plan import Item
from orthofast.scan.reading import ALIGNMENT, READ_BYTES, scratch_bytes
from orthofast.scan.weights import PLAIN, Weight

HOST_GROUP_BYTES = 64 << 20  # weights handed to the fold together
DEVICE_GROUP_BYTES = 256 << 20
SLABS = 4 * READERS  # one being read, one being emptied for each reader, and as many again
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


def decoded_bytes(weight: Weight) -> int:
    """Bytes a weight takes beside its stored form while it is folded."""
    scratch = scratch_bytes(weight)
    if weight.coding == PLAIN:
        return scratch
    size = 4  # float32
    for axis in weight.shape:
        size *= axis
    return scratch + size


def budget_for(weights: Iterable[Weight], options: ScanOptions, free_bytes: int | None = None) -> Budget:
    """Sizes for these weights.

    Args:
        weights: all of a plan's.
        options: with ``host_mem`` and ``gpu_mem``.
        free_bytes: free memory of the device; None on the processor.
    """
    if free_bytes is None:
        return Budget(min(HOST_GROUP_BYTES, options.host_mem // (AHEAD + 1)))
    stored, decoded, total = 1, 0, 0
    for weight in weights:
        stored, decoded = (
            max(stored, weight.nbytes + ALIGNMENT * len(weight.parts)),
            max(decoded, decoded_bytes(weight)),
        )
        total += weight.nbytes + ALIGNMENT * len(weight.parts)
    most = int(FREE_FRAC * free_bytes)
    allowed = options.gpu_mem or max(2 * GIB, 3 * stored + decoded)
    ring = max(1, min(allowed, most) - decoded)
    group = min(DEVICE_GROUP_BYTES, max(1, ring // (AHEAD + 1)))
    slab = max(1, min(READ_BYTES, options.host_mem // 4))
    slabs = max(2, min(SLABS, options.host_mem // slab))
    return Budget(group, min(ring, total + stored), slab, slabs)


def batches(items: Sequence[Item], budget: Budget) -> Iterator[list[Item]]:
    """Weights in reading order, about a group at a time; what decoding adds counts too."""
    batch: list[Item] = []
    size = 0
    for item in items:
        weight = item.weight
        needed = weight.nbytes + ALIGNMENT * len(weight.parts) + decoded_bytes(weight)
        if batch and size + needed > budget.group:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += needed
    if batch:
        yield batch


def open_engine(
    budget: Budget, options: ScanOptions, memory: Mapping[str, Tensor], device: Device | None = None
) -> Engine:
    """The engine that the options name, with its memory.

    Raises:
        MissingPackageError: if it needs a package that is not installed.
    """
    if device is None:
        return PositionalEngine(HostStaging(options.host_mem, budget.group), memory=memory)
    staging = DeviceStaging(device, budget.ring, budget.slabs, budget.slab)
    return PositionalEngine(staging, window_bytes=budget.slab, memory=memory, device=device.device)

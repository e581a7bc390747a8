"""Groups of weights read by the package fastsafetensors (GPU Direct Storage, or its own threads): an optional engine.

One group is read while another is folded. The package reads each group's tensors in chunks of at most the group's size
and hands out copies of them; so up to four groups are held: being read, its chunk, being folded, values on their way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from torch import Tensor

from orthofast.errors import CheckpointError, InputError, MissingPackageError
from orthofast.scan.catalog import Extent
from orthofast.scan.devices import Device
from orthofast.scan.engines import Group, Parts
from orthofast.scan.plan import Item

HELD = 4  # groups in memory at a time
SLACK_BYTES = 1 << 20  # between tensors of a chunk: it spans what lies between the first and the last
INSTALL = "pip install 'orthofast[fast]'"


class FastsafetensorsEngine:
    """Reads through ``fastsafetensors.ParallelLoader``; the device's memory is the package's and torch's affair.

    Args:
        device: where weights go; None for the processor.

    Raises:
        MissingPackageError: if the package is not installed.
    """

    def __init__(self, device: Device | None = None) -> None:
        try:
            from fastsafetensors import ParallelLoader  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingPackageError(
                f"engine 'fastsafetensors' needs the package of that name ({error}): {INSTALL}"
            ) from None
        self.read_s = 0.0
        self._loader = ParallelLoader
        self._device = device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="orthofast-fast")

    def groups(self, batches: Iterable[list[Item]]) -> Iterator[Group | None]:
        """Each batch as a group, in order."""
        started: deque[Future[Group]] = deque()
        for items in batches:
            started.append(self._reader.submit(self._read, items))
            if len(started) > 1:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()

    def release(self, group: Group) -> None:
        """Let torch have the memory back."""
        group.parts = []

    def close(self) -> None:
        """Wait for the read under way and drop the others."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, items: list[Item]) -> Group:
        began = time.perf_counter()
        extents = {extent.name: extent for item in items for extent in item.weight.parts.values()}
        found: dict[str, Tensor] = {}
        reason = None
        try:
            self._load(extents, found)
        except Exception as error:  # noqa: BLE001 - the package raises many kinds
            reason = f"fastsafetensors: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        if self._device is not None:
            self._device.settle()
        group = Group(items, [], sum(item.weight.nbytes for item in items))
        for item in items:
            parts: Parts = {role: found[e.name] for role, e in item.weight.parts.items() if e.name in found}
            if len(parts) == len(item.weight.parts):
                group.parts.append(parts)
            else:
                why = reason or "it gave no such tensor"
                group.parts.append(CheckpointError(f"{item.weight.first.file.name}: {item.weight.name!a}: {why}"))
        self.read_s += time.perf_counter() - began
        return group

    def _load(self, extents: dict[str, Extent], found: dict[str, Tensor]) -> None:
        """Every tensor by name, as far as the package gets."""
        files = sorted({str(extent.file) for extent in extents.values()})
        chunk = sum(extent.nbytes for extent in extents.values())
        place = "cpu" if self._device is None else str(self._device.device)
        loader = self._loader(
            None,
            files,
            queue_size=-1,
            use_tqdm_on_load=False,
            device=place,
            nogds=self._device is None,
            tensor_filter=extents.__contains__,
            max_batch_bytes=chunk + SLACK_BYTES,
        )
        try:
            with closing(loader.iterate_weights()) as tensors:
                found.update(tensors)  # what comes before an error stays
        finally:
            loader.close()


def refuse_others(items: Iterable[Item], memory: Iterable[str]) -> None:
    """The package reads whole tensors of safetensors files and nothing else.

    Raises:
        InputError: if a weight is stored in another way.
    """
    known = frozenset(memory)
    for item in items:
        for extent in item.weight.parts.values():
            if extent.name in known or extent.pieces or extent.strides or extent.file.suffix != ".safetensors":
                raise InputError(
                    f"engine 'fastsafetensors' reads safetensors files only, and {extent.name!a} is stored in another "
                    "way; leave engine as it is"
                )

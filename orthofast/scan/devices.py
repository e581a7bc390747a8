"""A GPU as the pipeline sees it: copies, events, memory; the only file of the scan that calls CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.scan.slabs import Event


class Device(Protocol):
    """What the pipeline asks of a device with memory of its own."""

    device: torch.device
    name: str

    def scope(self) -> AbstractContextManager[object]:
        """The block in which this is the current device."""

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""

    def pinned(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the host that copies may read without the processor's help."""

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Enqueue a copy from pinned memory on the copy stream; the event follows it. Any thread may call."""

    def await_copy(self, event: Event) -> None:
        """Let the work enqueued from now on wait for a copy; the host does not."""

    def fetch(self, values: Tensor) -> tuple[Tensor, Event]:
        """Enqueue a copy to the host behind the work so far: the host's tensor, and when it may be read."""

    def settle(self) -> None:
        """Wait for the work that the calling thread has enqueued."""

    def relieve(self) -> None:
        """Give back cached memory after an allocation failed."""


class CudaDevice:
    """A CUDA device: one stream for copies, the caller's stream for decoding and folding."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self._copies = torch.cuda.Stream(device)

    def scope(self) -> AbstractContextManager[object]:
        """The block in which this is the current device."""
        return torch.cuda.device(self.device)

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""
        return torch.cuda.mem_get_info(self.device)[0]

    def pinned(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 in page-locked memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device."""
        found = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have had another owner
        found.record_stream(self._copies)
        return found

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Enqueue a copy on the copy stream."""
        with self.scope(), torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._copies)
        return event

    def await_copy(self, event: Event) -> None:
        """Let the caller's stream wait for a copy."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(event)

    def fetch(self, values: Tensor) -> tuple[Tensor, Event]:
        """Enqueue a copy to pinned memory on the caller's stream."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        with self.scope():
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return host, event

    def settle(self) -> None:
        """Wait for the calling thread's stream."""
        torch.cuda.current_stream(self.device).synchronize()

    def relieve(self) -> None:
        """Give the allocator's cache back."""
        torch.cuda.empty_cache()


def open_device(device: str | torch.device | None) -> Device | None:
    """The device to fold on; None for the processor and its memory.

    Raises:
        InputError: if there is no such device.
    """
    try:
        found = torch.device(device or "cpu")
    except RuntimeError:
        raise InputError(f"device needs a name such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from None
    if found.type == "cpu":
        return None
    if found.type != "cuda":
        raise InputError(f"device needs 'cpu' or 'cuda', got {str(device)!r}; the scan folds nowhere else")
    count = torch.cuda.device_count()
    if count == 0:
        raise InputError(f"device is {str(device)!r}, but torch finds no GPU here; use device='cpu'")
    if found.index is not None and found.index >= count:
        raise InputError(f"device is {str(device)!r}, but torch finds only {count} GPUs here, counted from 0")
    return CudaDevice(torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index))

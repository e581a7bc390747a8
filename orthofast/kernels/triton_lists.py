"""Lists that kernels read, copied to a device once per shape and kept: nothing waits for the device.

The copy is asynchronous; other streams wait for its event on the device. A graph reads what it captured for as long
as it lives, so that is never freed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthofast.errors import BackendError

MOST_LISTS = 64
_captured: dict[int, Tensor] = {}  # by id: held, so that no other tensor takes the number


class DeviceLists:
    """Lists of one kind, by what they were made from."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[Tensor, Any]] = OrderedDict()

    def get(self, device: torch.device, key: Hashable, make: Callable[[], NDArray[np.int32]]) -> Tensor:
        """The list made for this key, on the device.

        Raises:
            BackendError: if it is new during graph capture, when nothing can be copied.
        """
        place = device, key
        known = self._kept.get(place)
        if known is None:
            if is_capturing(device):
                raise BackendError(
                    "triton_gpu needs its tables on the device before a graph is captured: "
                    "call it once on tensors of the same shapes"
                )
            tensor = copied(torch.from_numpy(np.array(make())), device)
            known = self._kept[place] = tensor, recorded(device)
            while len(self._kept) > MOST_LISTS:
                self._kept.popitem(last=False)
        hold(device, known)
        return known[0]


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copied(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the copy."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


def recorded(device: torch.device) -> Any:
    """An event of this moment in the current stream; None without a GPU."""
    return torch.cuda.current_stream().record_event() if device.type == "cuda" else None


def hold(device: torch.device, *made: tuple[Tensor, Any]) -> None:
    """Let the current stream read these tensors after their events, for as long as it needs them."""
    if device.type != "cuda":
        return
    if is_capturing(device):
        _captured.update((id(tensor), tensor) for tensor, _ in made)
        return
    stream = torch.cuda.current_stream()
    for tensor, event in made:
        stream.wait_event(event)  # another stream may have copied it
        tensor.record_stream(stream)

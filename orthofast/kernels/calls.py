"""Calls that come again: a monitor folds the same weights every time, so what was checked and chosen is remembered.

The key holds all that the checks and the choice look at: type, dtype, shape, strides, device and alignment of every
tensor, the other arguments, and which backend is forced. Values and addresses are no part of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from orthofast.kernels.contract import Request
from orthofast.records import GramStats

ALIGNED_BYTES = 16
MOST_CALLS = 64
KINDS = (Tensor, Parameter)  # a subclass may mean anything

Again = Callable[[Sequence[Tensor]], list[GramStats]]
Prepare = Callable[[Sequence[Request]], Again | None]  # what a backend offers as ``again``
_known: OrderedDict[Hashable, Again] = OrderedDict()


def key_of(xs: Sequence[Tensor], *others: Hashable) -> Hashable | None:
    """Key of a call on dense tensors that have memory; None for any other."""
    try:
        parts = tuple(
            [
                (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % ALIGNED_BYTES)
                for x in xs
                if type(x) in KINDS and x.layout is torch.strided and not x.is_neg()
            ]
        )
        key = (parts, others)
        hash(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensors, no memory, arguments that cannot be keys
        return None
    return key if len(parts) == len(xs) and parts else None


def find(key: Hashable | None) -> Again | None:
    """How this call was served before; None for a new one."""
    return None if key is None else _known.get(key)


def remember(key: Hashable, prepare: Prepare | None, requests: Sequence[Request]) -> None:
    """Keep how a call is served, where its backend can serve it again; the oldest of many is forgotten."""
    again = None if prepare is None else prepare(requests)
    if again is None:
        return
    _known[key] = again
    while len(_known) > MOST_CALLS:
        _known.popitem(last=False)

"""Tensors of other kinds at the fold's door: a table from type to who folds it, filled in by rooms above.

A room registers a handler when it is imported. ``BROUGHT_BY`` names, as text, the room to import when a type comes by
for the first time, as ``dispatch`` does with backends: nothing here knows what a handler does, and a program that never
shows such a tensor never loads that room.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from orthofast.kernels.gradients import Curve
from orthofast.kernels.sampling import Sample
from orthofast.records import GramStats

BROUGHT_BY = {
    ("torch.distributed.tensor", "DTensor"): "orthofast.distributed",
    ("orthofast.views", "BlockScaled"): "orthofast.kernels.block_scaled",
}


class FoldRecord(Protocol):
    """:func:`orthofast.kernels.gram_stats`, for one type of tensor."""

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None,
        *,
        normalize: bool,
        want: tuple[str, ...],
        bins: int,
        sample: int | Sample | None,
        precision: str,
        backend: str | None,
    ) -> GramStats:
        """Fold all pairs into a record."""


class FoldMean(Protocol):
    """:func:`orthofast.kernels.autograd.pair_mean`, for one type of tensor."""

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None,
        curve: Curve,
        sample: int | Sample | None,
        precision: str,
        backend: str | None,
    ) -> Tensor:
        """Average a curve of the cosines of all pairs."""


@dataclass(frozen=True, slots=True)
class Handler:
    """Who folds one type of tensor: ``gram_stats`` makes records, ``pair_mean`` differentiable means (b,)."""

    gram_stats: FoldRecord
    pair_mean: FoldMean


_handlers: dict[type, Handler] = {}


def register(kind: type, handler: Handler) -> None:
    """Let a handler fold tensors of exactly this type, instead of a backend."""
    _handlers[kind] = handler


def handler_of(*tensors: Tensor | None) -> Handler | None:
    """The handler of the first argument that has one; None where all are for the backends.

    >>> import torch
    >>> handler_of(torch.ones(2, 3), None) is None
    True
    """
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter or tensor is None:
            continue
        room = BROUGHT_BY.get((kind.__module__, kind.__qualname__))
        if room is not None and kind not in _handlers:
            importlib.import_module(room)
        if kind in _handlers:
            return _handlers[kind]
    return None

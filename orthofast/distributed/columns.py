"""Column shards: every rank trades its entries of all vectors for all entries of its share of the vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.distributed.placement import Layout, parts_of


def whole_vectors(layout: Layout, local: Tensor) -> Tensor:
    """(b, rows, entries) -> (b, its share of these rows, d): an all-to-all that moves each element at most once.

    The entries come in the order of the ranks, the same for all vectors of a matrix: no dot product notices.
    """
    if len(layout.columns) == 1:
        return local
    parts = parts_of(torch.arange(local.shape[1]), len(layout.columns))
    sent = [local[:, _span(part)] for part in parts]
    mine = len(parts[layout.columns.place])
    shapes = [(len(local), mine, len(entries)) for entries in layout.column_shares]
    return torch.cat(layout.columns.swap(sent, shapes, "trading column shards for row shards"), 2)


def shard_of(layout: Layout, whole: Tensor, rows: int) -> Tensor:
    """The way back: (b, share of the rows, d) -> (b, rows, entries)."""
    if len(layout.columns) == 1:
        return whole
    parts = parts_of(torch.arange(rows), len(layout.columns))
    sent = list(whole.split([len(entries) for entries in layout.column_shares], 2))
    mine = len(layout.column_shares[layout.columns.place])
    shapes = [(len(whole), len(part), mine) for part in parts]
    return torch.cat(layout.columns.swap(sent, shapes, "trading row shards of a gradient for column shards"), 1)


def _span(indices: Tensor) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)

"""Which rank holds which vectors of a DTensor (b, n, d): computed on every rank alike, nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from orthofast.distributed.transfers import Circle, circle, phase
from orthofast.errors import InputError

Splits = tuple[tuple[int, int], ...]  # (ranks, split factor) of each mesh dimension that splits a tensor dimension


@dataclass(frozen=True)
class Layout:
    """A DTensor (b, n, d) and the ranks among which each of its dimensions is split.

    Mesh dimensions that replicate it appear nowhere: their ranks do the same work on the same values.

    Attributes:
        x: the DTensor, split or replicated along every mesh dimension.
        items: ranks that hold different items.
        rows: ranks that hold different vectors of the same items.
        columns: ranks that hold different entries of the same vectors.
        both: ranks that hold different parts of the same items: those of ``rows``, each with its ``columns``.
        item_shares: per place in ``items``, the indices of its items.
        row_shares: per place in ``rows``, the indices of its vectors.
        column_shares: per place in ``columns``, the indices of its entries.
    """

    x: DTensor
    items: Circle
    rows: Circle
    columns: Circle
    both: Circle
    item_shares: list[Tensor]
    row_shares: list[Tensor]
    column_shares: list[Tensor]

    @property
    def local(self) -> Tensor:
        """This rank's part (items, rows, columns), without a graph."""
        local = cast(DTensor, self.x.detach()).to_local()
        wait = getattr(local, "wait", None)  # of a tensor that is still on its way
        return local if wait is None else cast(Tensor, wait())

    @property
    def turned_shares(self) -> list[Tensor]:
        """Per place in ``both``, the indices of its vectors once the ranks of ``columns`` share them whole."""
        return [part for rows in self.row_shares for part in parts_of(rows, len(self.columns))]


def layout_of(x: Tensor, name: str = "x") -> Layout:
    """The layout of a DTensor (n, d) or (b, n, d); pending sums are added up and split by rows first.

    Raises:
        InputError: if ``x`` is no DTensor of that form, is not split as torch does it, or lives on other ranks.
    """
    if not isinstance(x, DTensor):
        raise InputError(f"{name} needs a DTensor like the other argument, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise InputError(f"{name} needs shape (b, n, d) or (n, d), got {tuple(x.shape)}; see orthofast.views")
    x = cast(DTensor, x.unsqueeze(0)) if x.dim() == 2 else x
    mesh = x.device_mesh
    if mesh.get_coordinate() is None:
        raise InputError(f"{name} lives on ranks {mesh.mesh.flatten().tolist()}, to which this rank does not belong")
    if any(placement.is_partial() for placement in x.placements):
        with phase("adding up a DTensor of pending sums"):
            x = x.redistribute(placements=[Shard(1) if p.is_partial() else p for p in x.placements])
    dims: tuple[list[int], list[int], list[int]] = ([], [], [])
    splits: tuple[list[tuple[int, int]], ...] = ([], [], [])
    for mesh_dim, placement in enumerate(x.placements):
        if not isinstance(placement, Replicate):
            split = _dimension(placement, name)
            dims[split].append(mesh_dim)
            splits[split].append((mesh.size(mesh_dim), int(getattr(placement, "split_factor", 1))))
    shares = [list(_shares(size, tuple(split))) for size, split in zip(x.shape, splits, strict=True)]
    items, rows, columns, both = (circle(mesh, along) for along in (*dims, dims[1] + dims[2]))
    found = Layout(x, items, rows, columns, both, *shares)
    places = (found.items.place, found.rows.place, found.columns.place)
    expected = tuple(len(share[place]) for share, place in zip(shares, places, strict=True))
    if tuple(found.local.shape) != expected:
        raise InputError(
            f"{name} needs shards as torch splits {tuple(x.shape)} for {x.placements}, {expected} on this rank, "
            f"got {tuple(found.local.shape)}; build it with distribute_tensor"
        )
    return found


def _dimension(placement: Placement, name: str) -> int:
    dim = getattr(placement, "dim", None)
    if not isinstance(dim, int) or not -3 <= dim < 3:
        raise InputError(f"{name} needs placements Shard, Replicate or Partial, got {placement}; redistribute it first")
    return dim % 3


def parts_of(indices: Tensor, count: int) -> list[Tensor]:
    """Cut in ``count`` parts as torch.chunk does, the last ones shorter or empty."""
    parts = list(indices.chunk(count)) if len(indices) else []
    return parts + [indices[:0]] * (count - len(parts))


@lru_cache(maxsize=256)
def _shares(size: int, splits: Splits) -> tuple[Tensor, ...]:
    """Indices held at each coordinate of the splitting mesh dimensions, the last running fastest.

    Splits go from left to right; one with a split factor (FSDP2 over tensor parallel shards) cuts into that many
    pieces first and takes its share of each.
    """
    shares = [torch.arange(size)]
    for ranks, factor in splits:
        shares = [part for share in shares for part in _split(share, ranks, factor)]
    return tuple(shares)


def _split(indices: Tensor, ranks: int, factor: int) -> list[Tensor]:
    pieces = [parts_of(piece, ranks) for piece in parts_of(indices, factor)]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in range(ranks)]

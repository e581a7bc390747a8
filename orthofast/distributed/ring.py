"""Half ring: every pair of row blocks meets on one rank, while the next block is already on its way.

Rank r of P holds block r. In hop k = 1 .. floor(P / 2) it holds block r - k beside its own, folds the pairs between the
two, and passes the block on to rank r + 1. For even P two ranks meet in the last hop with the same two blocks: each
takes half the rows of the lower rank's. So every unordered pair of blocks is folded once, on P ranks alike.

What a fold finds out about the travelling block (gradients, sums per vector) is handed on after it and then home.

Traffic per rank  n d / P * floor(P / 2) elements, sent during the fold; as much again for gradients.
Memory per rank  3 blocks of ceil(n / P) vectors, and 4 more in the gradient's dtype; never the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orthofast.distributed.transfers import Circle, Pending


@dataclass(frozen=True, slots=True)
class Meeting:
    """Which rows of this rank's block and of a travelling one this rank folds against each other.

    Attributes:
        mine: rows of the own block.
        owner: place of the rank at home with the other block.
        theirs: rows of the other block.
    """

    mine: slice
    owner: int
    theirs: slice


class Work(Protocol):
    """What is done with blocks where they meet.

    Attributes:
        parcels: tensors (b, longest, ...), sums about the own block; what others find out is added to them.
    """

    parcels: list[Tensor]

    def within(self, block: Tensor) -> None:
        """Fold the pairs within the own block (b, rows, d)."""

    def between(self, mine: Tensor, theirs: Tensor, meeting: Meeting) -> Sequence[Tensor]:
        """Fold the pairs between rows of two blocks; what belongs to theirs, a tensor per parcel (b, rows, ...)."""


def meeting(hop: int, place: int, counts: Sequence[int]) -> Meeting:
    """What the rank at ``place`` folds in a hop, for blocks of ``counts`` rows.

    >>> meeting(1, 0, [4, 4]), meeting(1, 1, [4, 4])  # two ranks share the pairs between their blocks
    (Meeting(mine=slice(0, 2, None), owner=1, theirs=slice(0, 4, None)), \
Meeting(mine=slice(0, 4, None), owner=0, theirs=slice(2, 4, None)))
    """
    ranks = len(counts)
    owner = (place - hop) % ranks
    mine, theirs = slice(0, counts[place]), slice(0, counts[owner])
    if 2 * hop == ranks:
        lower = min(place, owner)
        half = (counts[lower] + 1) // 2
        if place == lower:
            mine = slice(0, half)
        else:
            theirs = slice(half, counts[lower])
    return Meeting(mine, owner, theirs)


def half_ring(circle: Circle, block: Tensor, counts: Sequence[int], work: Work) -> None:
    """Fold all pairs of the vectors that the ranks of a circle hold, on each rank its share.

    Args:
        circle: the ranks.
        block: (b, rows, d), this rank's vectors; ``rows`` may be 0.
        counts: rows of every rank.
        work: told of each pair of blocks; the same calls to the process group follow on every rank.
    """
    hops = len(circle) // 2
    longest = max(counts) if len(block) else 0  # without items there is nothing to send
    coming = carried = None
    if hops and longest:
        coming = circle.exchange([_padded(block, longest)], 1, f"passing on block 1 of {hops}")
    work.within(block)
    for hop in range(1, hops + 1) if longest else ():
        assert coming is not None
        (travelled,) = coming.wait()
        if hop < hops:
            coming = circle.exchange([travelled], 1, f"passing on block {hop + 1} of {hops}")
        parcels = _met(work, block, travelled, meeting(hop, circle.place, counts))
        _add(parcels, carried)
        if parcels:
            step, what = (1, "on") if hop < hops else (-hops, "home")
            carried = circle.exchange(parcels, step, f"handing {what} the sums of hop {hop} of {hops}")
    _add(work.parcels, carried)


def _padded(block: Tensor, longest: int) -> Tensor:
    """A contiguous copy of ``longest`` rows, so that all messages are alike; the block itself where it is that."""
    b, rows, d = block.shape
    if rows == longest:
        return block.contiguous()
    whole = block.new_empty((b, longest, d))
    whole[:, :rows] = block
    return whole


def _met(work: Work, block: Tensor, travelled: Tensor, at: Meeting) -> list[Tensor]:
    parcels = [torch.zeros_like(parcel) for parcel in work.parcels]
    mine, theirs = block[:, at.mine], travelled[:, at.theirs]
    if mine.shape[1] and theirs.shape[1]:
        for parcel, made in zip(parcels, work.between(mine, theirs, at), strict=True):
            parcel[:, at.theirs] = made
    return parcels


def _add(parcels: Sequence[Tensor], carried: Pending | None) -> None:
    if carried is not None:
        for parcel, came in zip(parcels, carried.wait(), strict=True):
            parcel.add_(came)

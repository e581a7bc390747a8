"""Records of several ranks become one with the same bits on every rank: one gather, then additions in one order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.distributed.transfers import Circle, world
from orthofast.errors import InputError
from orthofast.kernels.contract import poison
from orthofast.records import GramStats, merge

COUNTS = ("pairs", "zero", "nonfinite", "argmax", "hist")  # exact in float64 up to 2^53
FIELDS = (
    *("pairs", "zero", "nonfinite", "abs_sum", "sq_sum", "sum", "abs_max", "argmax", "hist"),
    *("floor", "norm_sq", "row_abs"),
)


def packed(record: GramStats) -> Tensor:
    """The fields of a record side by side, (b, width) float64."""
    columns = [getattr(record, name) for name in FIELDS]
    b = len(record.pairs)
    return torch.cat([field.reshape(b, field[:1].numel()).double() for field in columns if field is not None], 1)


def unpacked(table: Tensor, like: GramStats) -> GramStats:
    """(b, width) as a record with the fields of ``like``, for as many items as the table has."""
    record = GramStats(table[:, 0].long(), table[:, 1].long(), table[:, 2].long(), cross=like.cross)
    at = 0
    for name in FIELDS:
        model = getattr(like, name)
        if model is None:
            continue
        width = math.prod(model.shape[1:])
        field = table[:, at : at + width].reshape(len(table), *model.shape[1:])
        setattr(record, name, field.long() if name in COUNTS else field)
        at += width
    return record


def over_rows(record: GramStats, circle: Circle, shares: Sequence[Tensor]) -> GramStats:
    """The record of all pairs from each rank's share of them, with fields per vector and the pair in global numbering.

    Args:
        record: this rank's; norm_sq and row_abs (b, longest share), argmax in slots ``place * longest + row``.
        circle: the ranks.
        shares: per place, the indices of its vectors.
    """
    tables = circle.gather(packed(record), "gathering the records of all ranks")
    parts = [unpacked(table, record) for table in tables]
    whole = merge(parts, [(0, 0)] * len(parts))
    longest = max(len(share) for share in shares)
    slots = torch.cat([place * longest + torch.arange(len(share)) for place, share in enumerate(shares)])
    indices = torch.cat(list(shares))
    for name in ("norm_sq", "row_abs"):
        if getattr(record, name) is not None:
            held = torch.cat([getattr(part, name) for part in parts], 1)[:, slots.to(record.pairs.device)]
            setattr(whole, name, torch.empty_like(held).index_copy_(1, indices.to(held.device), held))
    if whole.argmax is not None:
        index_of = torch.zeros(max(1, longest * len(shares)), dtype=torch.int64)
        index_of[slots] = indices
        named = index_of.to(whole.argmax.device)[whole.argmax.clamp(min=0)].sort(1).values
        whole.argmax = torch.where(whole.argmax < 0, whole.argmax, named)
    return poison(whole)


def over_items(record: GramStats, circle: Circle, shares: Sequence[Tensor]) -> GramStats:
    """The record of all items from each rank's, in global order."""
    if len(circle) == 1:
        return record
    return unpacked(rows_of_all(packed(record), circle, shares), record)


def rows_of_all(table: Tensor, circle: Circle, shares: Sequence[Tensor]) -> Tensor:
    """(b of this rank, width) -> (b, width): per place in ``circle``, its rows have the indices ``shares``."""
    longest = max(len(share) for share in shares)
    padded = table.new_zeros((longest, *table.shape[1:]))
    padded[: len(table)] = table
    held = circle.gather(padded, "gathering the items of all ranks")
    whole = table.new_empty((sum(map(len, shares)), *table.shape[1:]))
    for part, share in zip(held, shares, strict=True):
        whole[share.to(table.device)] = part[: len(share)]
    return whole


def merge_over_ranks(records: Sequence[GramStats], group: object = None) -> list[GramStats]:
    """Join each record with its namesakes on the other ranks: what a data-parallel run measures of its activations.

    Every rank has folded the pairs within its own batch; pairs across ranks are in no record. One gather for all
    records, then the same additions in the same order: replicated plain tensors with the same bits on every rank.
    Fields per vector (norm_sq, row_abs) and the names of pairs (argmax) speak of one rank and are left out.

    Args:
        records: as many on every rank, in the same order, of the same items and fields; a rank without data passes
            records without pairs.
        group: a process group; None for all ranks. Without torch.distributed the rank is alone.

    Raises:
        BackendError: where the process group gives up.
        InputError: if a record holds estimates from sampled pairs, or none is given.

    >>> import torch
    >>> from orthofast.kernels import gram_stats
    >>> [joined] = merge_over_ranks([gram_stats(torch.ones(3, 2))])
    >>> joined.pairs.item(), round(joined.abs_sum.item(), 6)
    (3, 3.0)
    """
    if not records:
        raise InputError("records needs at least one GramStats, got an empty sequence")
    if any(record.standard_error is not None for record in records):
        raise InputError("records needs folds of all pairs, got an estimate from a sample; fold without sample=")
    kept = [merge([record]) for record in records]
    for record in kept:
        record.floor = torch.zeros_like(record.pairs, dtype=torch.float64) if record.floor is None else record.floor
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return kept
    circle = world(group)
    tables = [packed(record) for record in kept]
    flat = torch.cat([table.flatten() for table in tables])
    rows = circle.gather(flat, f"gathering {len(records)} records of all ranks")
    joined, at = [], 0
    for record, table in zip(kept, tables, strict=True):
        held = rows[:, at : at + table.numel()].reshape(len(circle), *table.shape)
        joined.append(poison(merge([unpacked(part, record) for part in held])))
        at += table.numel()
    return joined

"""The record a fold leaves behind: sums over pairs of vectors, which merge by addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthofast.errors import InputError


@dataclass(slots=True, eq=False)
class GramStats:
    """Sums over the unordered pairs of ``n`` vectors of length ``d``, for each of ``b`` items.

    A field is None when the fold was not asked for it. Sums are float64, on the input's device.
    Where ``nonfinite`` is positive, the float sums of that item are NaN: NaN in, NaN out.

    Attributes:
        pairs: (b,) int64, pairs folded, each counted once; zero vectors have no pairs when normalised.
        zero: (b,) int64, vectors of length 0.
        nonfinite: (b,) int64, vectors that hold NaN or Inf.
        norm_sq: (b, n) float64, squared lengths (the Gram diagonal, kept apart from the sums).
        abs_sum: (b,) float64, sum of |cos| over the pairs (of |dot product| when not normalised).
        sq_sum: (b,) float64, sum of squares.
        sum: (b,) float64, signed sum.
        abs_max: (b,) float64, largest absolute value; NaN where no pair exists.
        argmax: (b, 2) int64, the pair (i, j) that attains it, smallest first; (-1, -1) where none.
        row_abs: (b, n) float64, per vector the sum of |cos| over its partners.
        hist: (b, bins) int64, signed cosines in equal bins on [-1, 1].
        norm_sq_y: (b, m) float64, cross folds only: squared lengths of the other side.
        row_abs_y: (b, m) float64, cross folds only: per vector of the other side.
        floor: (b,) float64, rounding floor of one |cos| in this arithmetic; None or 0 when operands are exact.
        standard_error: (b,) float64, of abs_sum / pairs when pairs were sampled.
        cross: whether the record is of pairs between two different sets.
    """

    pairs: Tensor
    zero: Tensor
    nonfinite: Tensor
    norm_sq: Tensor | None = None
    abs_sum: Tensor | None = None
    sq_sum: Tensor | None = None
    sum: Tensor | None = None
    abs_max: Tensor | None = None
    argmax: Tensor | None = None
    row_abs: Tensor | None = None
    hist: Tensor | None = None
    norm_sq_y: Tensor | None = None
    row_abs_y: Tensor | None = None
    floor: Tensor | None = None
    standard_error: Tensor | None = None
    cross: bool = False

    def __repr__(self) -> str:
        fields = []
        for name in GramStats.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                shown = str(value.tolist()) if value.numel() <= 8 else f"<{tuple(value.shape)} {value.dtype}>"
                fields.append(f"{name}={shown}")
        return f"GramStats({', '.join(fields)})"


@dataclass(slots=True, eq=False)
class DriftStats:
    """How the cosines of the same pairs differ between two versions of ``n`` vectors, for each of ``b`` items.

    Pairs with a vector that is zero in either version are left out. Where ``nonfinite`` is positive, the sums are NaN.

    Attributes:
        pairs: (b,) int64, pairs compared, each once.
        zero: (b,) int64, vectors of length 0 in one version or both.
        nonfinite: (b,) int64, vectors that hold NaN or Inf in one version or both.
        abs_change: (b,) float64, sum over the pairs of abs(abs(cos before) - abs(cos after)).
        change: (b,) float64, sum over the pairs of abs(cos before - cos after).
    """

    pairs: Tensor
    zero: Tensor
    nonfinite: Tensor
    abs_change: Tensor
    change: Tensor


ADDED = ("abs_sum", "sq_sum", "sum", "hist")


def merge(records: Sequence[GramStats], offsets: Sequence[tuple[int, int]] | None = None) -> GramStats:
    """Join the records of disjoint sets of pairs into the record of their union.

    Per-vector fields (norm_sq, row_abs) speak of different vectors and are not carried over.

    Args:
        records: folds of the same items ``b``; a field present in all of them is merged.
        offsets: for each record, what to add to (i, j) of its argmax; without it argmax is left out.

    Raises:
        InputError: if there is nothing to merge, or the items differ.
    """
    if not records:
        raise InputError("merge needs at least one record, got an empty sequence")
    if len({record.pairs.shape for record in records}) > 1:
        shapes = [tuple(record.pairs.shape) for record in records]
        raise InputError(f"merge needs records of the same items, got pairs of shapes {shapes}")
    if offsets is not None and len(offsets) != len(records):
        raise InputError(f"merge needs one offset per record ({len(records)}), got {len(offsets)}")

    whole = GramStats(
        pairs=_added([record.pairs for record in records]),
        # a cross fold sees vectors that a fold of one set has counted already
        zero=_added([r.zero for r in records if not r.cross] or [records[0].zero]),
        nonfinite=_added([r.nonfinite for r in records if not r.cross] or [records[0].nonfinite]),
        cross=all(record.cross for record in records),
    )
    for name in ADDED:
        parts = [getattr(record, name) for record in records]
        if all(part is not None for part in parts):
            setattr(whole, name, _added(parts))
    floors = [record.floor for record in records if record.floor is not None]
    if floors:
        whole.floor = torch.stack(floors).amax(0)
    _merge_max(whole, records, offsets)
    return whole


def _added(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _merge_max(whole: GramStats, records: Sequence[GramStats], offsets: Sequence[tuple[int, int]] | None) -> None:
    maxima = [record.abs_max for record in records if record.abs_max is not None]
    if len(maxima) != len(records):
        return
    stacked = torch.stack(maxima)  # (records, b); NaN: no pair in that record, or NaN in its vectors
    poisoned = torch.stack([r.nonfinite > 0 for r in records]).any(0)
    filled = torch.where(stacked.isnan(), -1.0, stacked)
    best, which = filled.max(0)
    nan = torch.full_like(best, float("nan"))
    whole.abs_max = torch.where((best < 0) | poisoned, nan, best)
    if offsets is None or any(record.argmax is None for record in records):
        return
    pairs = torch.stack(
        [
            r.argmax + torch.tensor(o, device=best.device)
            for r, o in zip(records, offsets, strict=True)
            if r.argmax is not None
        ]
    )  # (records, b, 2)
    chosen = pairs.gather(0, which.view(1, -1, 1).expand(1, -1, 2)).squeeze(0)
    whole.argmax = torch.where(whole.abs_max.isnan().unsqueeze(1), torch.full_like(chosen, -1), chosen)

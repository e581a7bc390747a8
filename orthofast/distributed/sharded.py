"""Folds of a DTensor: records, and means with their gradient; replicated plain tensors come out on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthofast.distributed.columns import shard_of, whole_vectors
from orthofast.distributed.gathering import over_items, over_rows, rows_of_all
from orthofast.distributed.placement import Layout, layout_of
from orthofast.distributed.ring import Meeting, half_ring
from orthofast.errors import InputError
from orthofast.kernels import Sample, dispatch, gradients
from orthofast.kernels import gram_stats as fold
from orthofast.kernels.contract import make_request
from orthofast.kernels.gradients import Curve, PairGradient, gradient_dtype
from orthofast.records import GramStats, merge


def gram_stats(
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
    """:func:`orthofast.kernels.gram_stats` of a DTensor (b, n, d), split in any way: the record of the whole matrix.

    Raises:
        InputError: for a second set, for a sample, and as for a plain tensor.
        BackendError: where the process group gives up, and as for a plain tensor.
    """
    layout = _checked(x, y, sample)
    options = {"normalize": normalize, "want": want, "bins": bins, "precision": precision, "backend": backend}
    # a bad argument is refused here, on every rank, before anything is sent
    request = make_request(layout.local, normalize=normalize, want=want, bins=bins, precision=precision)
    dispatch.choose(request, backend)
    block = whole_vectors(layout, layout.local)
    shares = layout.turned_shares
    work = _Records(block, shares, layout.both.place, options)
    half_ring(layout.both, block, [len(share) for share in shares], work)
    return over_items(over_rows(work.record(), layout.both, shares), layout.items, layout.item_shares)


def pair_mean(
    x: Tensor, y: Tensor | None, curve: Curve, sample: int | Sample | None, precision: str, backend: str | None
) -> Tensor:
    """:func:`orthofast.kernels.autograd.pair_mean` of a DTensor (b, n, d), split in any way.

    The gradient is made in the same sweep, so backward sends nothing; it has the placements of ``x``.

    Raises:
        InputError: for a second set, for a sample, and as for a plain tensor.
        BackendError: where the process group gives up, and as for a plain tensor.
    """
    gradient = torch.is_grad_enabled() and x.requires_grad
    layout = _checked(x, y, sample)
    local = layout.local
    dispatch.choose(make_request(local, precision=precision), backend)
    block = whole_vectors(layout, local)
    counts = [len(share) for share in layout.turned_shares]
    work = _Means(block, max(counts), curve, precision, backend, gradient)
    half_ring(layout.both, block, counts, work)
    sums = torch.stack([work.pairs.double(), work.total], 1)  # (b, 2)
    pairs, total = _added(layout.both.gather(sums, "gathering the sums of all ranks")).unbind(1)
    mean = total / pairs
    if curve.kind in ("abs", "square"):
        mean.clamp_(max=1)  # parallel vectors may round to 1 + 1e-16
    means = rows_of_all(mean.unsqueeze(1), layout.items, layout.item_shares).squeeze(1)
    if not gradient:
        return means
    slope = work.parcels[0][:, : block.shape[1]] / pairs.clamp(min=1).view(-1, 1, 1)
    slope.masked_fill_(total.isnan().view(-1, 1, 1), float("nan"))
    slope = shard_of(layout, slope, local.shape[1])
    mine = layout.item_shares[layout.items.place].to(local.device)
    found: Tensor = _Attached.apply(layout.x.to_local(), means, slope, mine)  # type: ignore[no-untyped-call]
    return found


def _checked(x: Tensor, y: Tensor | None, sample: int | Sample | None) -> Layout:
    if y is not None:
        raise InputError(
            "y cannot be combined with a DTensor: only the pairs within one sharded matrix are folded; "
            "pass plain tensors, e.g. x.full_tensor() and y.full_tensor()"
        )
    if sample is not None:
        raise InputError(
            "sample cannot be combined with a DTensor: a random group has members on every rank; "
            "leave it out to fold all pairs on all ranks, or pass x.full_tensor()"
        )
    return layout_of(x)


class _Records:
    """Folds blocks into records; sums per vector travel home in float64."""

    def __init__(self, block: Tensor, shares: Sequence[Tensor], place: int, options: dict[str, Any]) -> None:
        self.options, self.place = options, place
        self.longest = max(len(share) for share in shares)
        self.records: list[GramStats] = []
        self.offsets: list[tuple[int, int]] = []
        wants = options["want"]
        per_vector = block.new_zeros((len(block), self.longest), dtype=torch.float64)
        self.parcels = [per_vector] if "row_abs" in ((wants,) if isinstance(wants, str) else wants) else []

    def within(self, block: Tensor) -> None:
        self._keep(fold(block, **self.options), 0, self.place, 0)

    def between(self, mine: Tensor, theirs: Tensor, meeting: Meeting) -> Sequence[Tensor]:
        found = fold(mine, theirs, **self.options)
        self._keep(found, meeting.mine.start, meeting.owner, meeting.theirs.start)
        return [] if found.row_abs_y is None else [found.row_abs_y]

    def _keep(self, found: GramStats, row: int, owner: int, column: int) -> None:
        self.records.append(found)
        self.offsets.append((self.place * self.longest + row, owner * self.longest + column))
        if found.row_abs is not None:
            self.parcels[0][:, row : row + found.row_abs.shape[1]] += found.row_abs

    def record(self) -> GramStats:
        """This rank's pairs; fields per vector padded to the longest block, argmax in slots."""
        own = self.records[0]
        whole = merge(self.records, self.offsets)
        whole.cross = False
        assert own.norm_sq is not None
        rows = own.norm_sq.shape[1]
        whole.norm_sq = own.norm_sq.new_zeros((len(own.norm_sq), self.longest))
        whole.norm_sq[:, :rows] = own.norm_sq
        whole.row_abs = self.parcels[0] if self.parcels else None
        if whole.floor is None:  # every rank's table needs the same columns
            whole.floor = torch.zeros_like(whole.pairs, dtype=torch.float64)
        return whole


class _Means:
    """Folds blocks into sums of a curve, with gradients that travel home."""

    def __init__(
        self, block: Tensor, longest: int, curve: Curve, precision: str, backend: str | None, gradient: bool
    ) -> None:
        self.curve, self.precision, self.backend, self.gradient = curve, precision, backend, gradient
        b, _, d = block.shape
        self.pairs = torch.zeros(b, dtype=torch.int64, device=block.device)
        self.total = torch.zeros(b, dtype=torch.float64, device=block.device)
        dtype = gradient_dtype(block.dtype, precision)
        self.parcels = [torch.zeros((b, longest, d), dtype=dtype, device=block.device)] if gradient else []

    def within(self, block: Tensor) -> None:
        self._fold(block, None, slice(0, block.shape[1]))

    def between(self, mine: Tensor, theirs: Tensor, meeting: Meeting) -> Sequence[Tensor]:
        by_theirs = self._fold(mine, theirs, meeting.mine).dy
        return [] if by_theirs is None else [by_theirs]

    def _fold(self, x: Tensor, y: Tensor | None, rows: slice) -> PairGradient:
        request = make_request(x, y, precision=self.precision)
        chosen = dispatch.choose(request, self.backend)
        slope = getattr(chosen, "abs_gradient", gradients.abs_gradient)
        found: PairGradient = slope(request, self.curve, gradient=self.gradient)
        self.pairs += found.pairs
        self.total += found.total
        if found.dx is not None:
            self.parcels[0][:, rows] += found.dx
        return found


class _Attached(torch.autograd.Function):
    """Means (b,) with a gradient by this rank's shard that is already known."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, means: Tensor, slope: Tensor, mine: Tensor) -> Tensor:
        ctx.save_for_backward(slope, mine)
        ctx.dtype = local.dtype
        return means.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        slope, mine = ctx.saved_tensors
        return (slope * grad[mine].to(slope.dtype).view(-1, 1, 1)).to(ctx.dtype), None, None, None


def _added(tables: Tensor) -> Tensor:
    total = tables[0].clone()
    for table in tables[1:]:
        total += table
    return total

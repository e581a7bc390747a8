"""Estimate a fold from random groups of vectors: unbiased, seeded, with its standard error.

Each round permutes the vectors and cuts the permutation into groups of ``g``; the pairs inside a group are folded.
Every vector takes part equally often, so one heavy vector cannot dominate. A group's pairs are a random sample
of all pairs, the groups' spread gives the standard error (ratio estimator, zero vectors left out). It is exact where
few of the vectors are drawn, and up to twice too large where each is drawn several times: rounds are balanced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels.contract import ABS_SUM, FLOAT8, ROW_ABS, Request, poison
from orthofast.records import GramStats

GROUP = 64  # vectors in a group: 2016 pairs, a small tile
MIN_GROUPS = 32  # fewer give no trustworthy standard error
GATHER_BYTES = 16 << 20  # gathered vectors held at a time


@dataclass(frozen=True, slots=True)
class Sample:
    """How many pairs to draw (about), and the seed of the draw."""

    pairs: int
    seed: int = 0


def gram_stats_sampled(request: Request, sample: int | Sample, fold: Callable[[Request], GramStats]) -> GramStats:
    """Fold about ``sample`` random pairs of each item instead of all; exact when there are no more than that.

    ``pairs`` of the record counts the pairs drawn, so sums over ``pairs`` estimate the mean without bias.

    Raises:
        InputError: if the number of pairs is not positive, or per-vector sums are wanted.
    """
    plan = checked_sample(sample)
    if request.want & ROW_ABS:
        raise InputError(
            "sample cannot be combined with want='row_abs': a per-vector sum needs all its pairs; drop one of them"
        )
    n, m = request.x.shape[1], None if request.y is None else request.y.shape[1]
    total = n * (n - 1) // 2 if m is None else n * m
    if plan.pairs >= total:
        exact = fold(request)
        exact.standard_error = torch.zeros_like(exact.abs_sum) if exact.abs_sum is not None else None
        return exact

    record = fold(replace(request, want=0, bins=0))  # norms, zero and nonfinite of all vectors: one read
    wanted = request.want | ABS_SUM
    totals: list[GramStats] = []
    for indices, indices_y in sample_groups(request, plan):
        part = replace(request, x=gather(request.x, indices), want=wanted)
        if request.y is not None and indices_y is not None:
            part.y = gather(request.y, indices_y)
        totals.append(_named(fold(part), indices, indices_y, request.x.shape[0]))
    _combine(record, totals, request)
    return poison(record)


def checked_sample(sample: int | Sample) -> Sample:
    """What a caller passed as ``sample``, with a seed.

    Raises:
        InputError: if the number of pairs is not a positive integer.
    """
    plan = sample if isinstance(sample, Sample) else Sample(sample)
    if isinstance(plan.pairs, bool) or not isinstance(plan.pairs, int) or plan.pairs < 1:
        raise InputError(f"sample needs a positive number of pairs (int or Sample), got {plan.pairs!r}")
    return plan


def sample_groups(request: Request, plan: Sample) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Index tensors (groups, g) on the request's device, a bounded number of groups at a time."""
    b, n, d = request.x.shape
    m = None if request.y is None else request.y.shape[1]
    side = min(n, n if m is None else m)
    per_group = plan.pairs / MIN_GROUPS
    fitting = int((1 + math.sqrt(1 + 8 * per_group)) / 2) if m is None else int(math.sqrt(per_group))
    g = max(2 if m is None else 1, min(GROUP, side, fitting))
    pairs = g * (g - 1) // 2 if m is None else g * g
    left = max(MIN_GROUPS, -(-plan.pairs // pairs))
    bytes_per_group = max(1, b * g * d * request.x.element_size() * (1 if m is None else 2))
    at_once = max(1, GATHER_BYTES // bytes_per_group)
    generator = torch.Generator().manual_seed(plan.seed)
    while left > 0:
        round_x = torch.randperm(n, generator=generator)[: n // g * g].view(-1, g)
        round_y = None if m is None else torch.randperm(m, generator=generator)[: m // g * g].view(-1, g)
        count = min(left, len(round_x), len(round_x) if round_y is None else len(round_y))
        round_x = _on(request.x.device, round_x[:count])
        round_y = None if round_y is None else _on(request.x.device, round_y[:count])
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            yield round_x[start:stop], None if round_y is None else round_y[start:stop]
        left -= count


def _on(device: torch.device, indices: Tensor) -> Tensor:
    """Drawn on the host for the same groups everywhere; the copy is not waited for."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """(b, n, d) -> (b * groups, g, d)."""
    flat = indices.reshape(-1)
    if x.dtype in FLOAT8:  # not every torch indexes these
        picked = x.view(torch.uint8).index_select(1, flat).view(x.dtype)
    else:
        picked = x.index_select(1, flat)
    return picked.reshape(x.shape[0] * indices.shape[0], indices.shape[1], x.shape[2])


def _named(part: GramStats, indices: Tensor, indices_y: Tensor | None, b: int) -> GramStats:
    """Fields per (b, groups); argmax in the numbering of the whole."""
    groups = indices.shape[0]
    if part.argmax is not None:
        local = part.argmax.view(b, groups, 2)
        rows = torch.arange(groups, device=local.device)
        other = indices if indices_y is None else indices_y
        i = indices[rows, local[..., 0].clamp(min=0)]
        j = other[rows, local[..., 1].clamp(min=0)]
        pair = torch.stack((i, j), -1)
        if indices_y is None:
            pair = pair.sort(-1).values
        part.argmax = torch.where(local < 0, local, pair)
    for name in ("pairs", "abs_sum", "sq_sum", "sum", "abs_max"):
        value = getattr(part, name)
        if value is not None:
            setattr(part, name, value.view(b, groups))
    if part.hist is not None:
        part.hist = part.hist.view(b, groups, -1).sum(1)
    return part


def _joined(parts: list[GramStats], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts], 1)


def _combine(record: GramStats, parts: list[GramStats], request: Request) -> None:
    pairs, sums = _joined(parts, "pairs"), _joined(parts, "abs_sum")  # (b, groups)
    record.pairs = pairs.sum(1)
    record.abs_sum = sums.sum(1)
    groups = pairs.shape[1]
    mean = (record.abs_sum / record.pairs).unsqueeze(1)
    spread = (sums - mean * pairs).square().sum(1) * (groups / (groups - 1))
    record.standard_error = spread.sqrt() / record.pairs
    for name in ("sq_sum", "sum"):
        if getattr(parts[0], name) is not None:
            setattr(record, name, _joined(parts, name).sum(1))
    if parts[0].hist is not None:
        record.hist = torch.stack([part.hist for part in parts if part.hist is not None]).sum(0)
    if parts[0].abs_max is not None:
        maxima, arg = _joined(parts, "abs_max"), _joined(parts, "argmax")
        best = torch.where(maxima.isnan(), -1.0, maxima).argmax(1)
        record.abs_max = maxima.gather(1, best.unsqueeze(1)).squeeze(1)
        record.argmax = arg.gather(1, best.view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)
    if parts[0].floor is not None:
        record.floor = parts[0].floor.view(request.x.shape[0], -1).amax(1)

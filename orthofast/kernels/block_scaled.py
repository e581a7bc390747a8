"""Folds of block-scaled float8 matrices: by a backend's own kernel where it has one, else dequantised row by row.

The float32 products of stored values and factors are what is folded, on every path. A backend may offer
``block_scaled_problem(x, y, request)``, None or the sentence why not, and ``block_scaled_gram_stats(x, y, request)``;
``request`` then carries what is asked, not the values. Everything else gets panels of rows in float32.

Memory  two panels of at most PANEL_BYTES each, whatever the size of the whole; with ``sample`` all of it, in float32.
Work  dequantising adds n / panel rows reads of the matrix, small beside n^2 d multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import autograd, dispatch, doors
from orthofast.kernels.contract import Request, make_request, poison
from orthofast.kernels.gradients import Curve
from orthofast.kernels.sampling import Sample, gram_stats_sampled
from orthofast.records import GramStats, merge
from orthofast.views import BlockScaled

PANEL_BYTES = 128 << 20  # float32 values dequantised at a time, per side

Fold = Callable[[Request], GramStats]


def gram_stats(
    x: Any,
    y: Any,
    *,
    normalize: bool,
    want: tuple[str, ...],
    bins: int,
    sample: int | Sample | None,
    precision: str,
    backend: str | None,
) -> GramStats:
    """:func:`orthofast.kernels.gram_stats` of :class:`BlockScaled` matrices.

    With precision="high" a GPU may multiply the 8-bit values natively; otherwise products are exact, as everywhere.
    """
    left, right = _checked(x, "x"), None if y is None else _checked(y, "y")
    if right is not None and (left.shape[0], left.shape[2]) != (right.shape[0], right.shape[2]):
        raise InputError(f"y needs shape (b, m, d) with b and d of x {tuple(left.shape)}, got {tuple(right.shape)}")
    if right is not None and right.device != left.device:
        raise InputError(f"y needs the device of x, {left.device}, got {right.device}; move one of them")
    # 64 values stand for the matrix: the arguments are checked, and a backend is chosen, without any dequantising
    few = _stand_in(left)
    asked = make_request(
        few, None if right is None else few, normalize=normalize, want=want, bins=bins, precision=precision
    )
    exact = asked.precision if precision == "float64" else "highest"

    def fold(request: Request) -> GramStats:
        return dispatch.choose(request, backend).gram_stats(request)

    if sample is not None:
        dense = replace(asked, x=left.dequantized(), y=None if right is None else right.dequantized(), precision=exact)
        return gram_stats_sampled(dense, sample, fold)
    chosen: Any = dispatch.choose(asked, backend)
    reason = getattr(chosen, "block_scaled_problem", None)
    if reason is not None and reason(left, right, asked) is None:
        return cast(GramStats, chosen.block_scaled_gram_stats(left, right, asked))
    return _by_panels(left, right, replace(asked, precision=exact), fold)


def pair_mean(x: Any, y: Any, curve: Curve, sample: int | Sample | None, precision: str, backend: str | None) -> Tensor:
    """:func:`orthofast.kernels.autograd.pair_mean` of :class:`BlockScaled` matrices, which have no gradient."""
    field = {"abs": "abs_sum", "square": "sq_sum"}.get(curve.kind)
    if field is None:
        left, right = _checked(x, "x").dequantized(), None if y is None else _checked(y, "y").dequantized()
        return autograd.pair_mean(left, right, curve, sample, precision, backend)
    stats = gram_stats(x, y, normalize=True, want=(field,), bins=0, sample=sample, precision=precision, backend=backend)
    return cast(Tensor, getattr(stats, field)) / stats.pairs


def _checked(x: Any, name: str) -> BlockScaled:
    """(b, n, d)."""
    if not isinstance(x, BlockScaled):
        raise InputError(
            f"{name} needs a BlockScaled as the other side is, got {type(x).__name__}; pass .dequantized() of the other"
        )
    if x.data.device.type == "meta":
        raise InputError(f"{name} is on the meta device and holds no values; load or initialise it first")
    return x if x.data.dim() == 3 else BlockScaled(x.data.unsqueeze(0), x.scale.unsqueeze(0), x.block)


def _stand_in(x: BlockScaled) -> Tensor:
    return torch.ones((1, 8, 8), dtype=torch.float32, device=x.device)


def _by_panels(x: BlockScaled, y: BlockScaled | None, asked: Request, fold: Fold) -> GramStats:
    b, n, d = x.shape
    m = n if y is None else y.shape[1]
    most = max(1, PANEL_BYTES // max(1, 4 * b * d))

    def starts(side: BlockScaled, count: int) -> range:
        height = side.block[0]
        return range(0, max(count, 1), max(1, most // height) * height if most >= height else most)

    rows, columns = starts(x, n), starts(x if y is None else y, m)
    parts: list[GramStats] = []
    offsets: list[tuple[int, int]] = []
    for i in rows:
        left = x.dequantized(slice(i, i + rows.step))
        for j in columns:
            if y is None and j < i:
                continue
            alone = y is None and i == j
            right = None if alone else (x if y is None else y).dequantized(slice(j, j + columns.step))
            parts.append(fold(replace(asked, x=left, y=right)))
            offsets.append((i, j))
    return parts[0] if len(parts) == 1 else _joined(parts, offsets, n, m, y is not None)


def _joined(parts: list[GramStats], offsets: list[tuple[int, int]], n: int, m: int, cross: bool) -> GramStats:
    """The record of all pairs from those of pairs of panels."""
    whole = merge(parts, offsets)
    whole.cross = cross
    b, device = whole.pairs.shape[0], whole.pairs.device

    def floats(count: int) -> Tensor:
        return torch.zeros((b, count), dtype=torch.float64, device=device)

    whole.norm_sq, whole.norm_sq_y = floats(n), floats(m) if cross else None
    sums, sums_y = floats(n), floats(m) if cross else None
    wanted = parts[0].row_abs is not None
    for part, (i, j) in zip(parts, offsets, strict=True):
        assert part.norm_sq is not None
        count = part.norm_sq.shape[1]
        whole.norm_sq[:, i : i + count] = part.norm_sq
        if part.norm_sq_y is not None and whole.norm_sq_y is not None:
            whole.norm_sq_y[:, j : j + part.norm_sq_y.shape[1]] = part.norm_sq_y
        if wanted and part.row_abs is not None:
            sums[:, i : i + count] += part.row_abs
        if wanted and part.row_abs_y is not None:
            other = sums if sums_y is None else sums_y
            other[:, j : j + part.row_abs_y.shape[1]] += part.row_abs_y
    if wanted:
        whole.row_abs, whole.row_abs_y = sums, sums_y
    lengths = [whole.norm_sq] if whole.norm_sq_y is None else [whole.norm_sq, whole.norm_sq_y]
    # values are float32: no square of one over- or underflows in float64
    whole.zero = torch.stack([(side == 0).sum(1) for side in lengths]).sum(0)
    whole.nonfinite = torch.stack([(~side.isfinite()).sum(1) for side in lengths]).sum(0)
    return poison(whole)


doors.register(BlockScaled, doors.Handler(gram_stats, pair_mean))

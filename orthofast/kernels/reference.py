"""Reference backend: plain torch, blocks of rows; the meaning of every field of the record.

Work  b*n*(n+1)/2*d multiply-adds and a little more on diagonal blocks.  Extra memory  O(BLOCK*(n + d)).
Accuracy  products and dot products in float32 (float64 on request), sums in float64.
Refuses nothing: every device torch has, every floating-point dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM, Request, poison
from orthofast.records import GramStats

NAME = "reference"
BLOCK = 256  # rows of a tile: its float32 columns stay in cache up to n of a few thousand


def supports(request: Request) -> str | None:
    """None: the reference serves every checked request."""
    return None


def gram_stats_many(requests: Sequence[Request]) -> list[GramStats]:
    """Fold the requests one after another."""
    return [gram_stats(request) for request in requests]


def gram_stats(request: Request) -> GramStats:
    """Fold one request, an item at a time."""
    x, y = request.x, request.y
    b, n, _ = x.shape
    m = n if y is None else y.shape[1]
    record = _empty(request, b, n, m)
    for item in range(b):
        _fold_item(record, item, x[item], None if y is None else y[item], request)
    return poison(record)


def _empty(request: Request, b: int, n: int, m: int) -> GramStats:
    device, want = request.x.device, request.want

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def counts(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    cross = request.y is not None
    return GramStats(
        pairs=counts(b),
        zero=counts(b),
        nonfinite=counts(b),
        norm_sq=floats(b, n),
        abs_sum=floats(b) if want & ABS_SUM else None,
        sq_sum=floats(b) if want & SQ_SUM else None,
        sum=floats(b) if want & SUM else None,
        abs_max=floats(b).fill_(float("nan")) if want & ABS_MAX else None,
        argmax=counts(b, 2).fill_(-1) if want & ABS_MAX else None,
        row_abs=floats(b, n) if want & ROW_ABS else None,
        hist=counts(b, request.bins) if want & HIST else None,
        norm_sq_y=floats(b, m) if cross else None,
        row_abs_y=floats(b, m) if cross and want & ROW_ABS else None,
        floor=floats(b),
        cross=cross,
    )


def _fold_item(record: GramStats, item: int, x: Tensor, y: Tensor | None, request: Request) -> None:
    compute = torch.float64 if request.precision == "float64" else torch.float32
    left, sq, zero, bad = _scaled(x, compute)
    assert record.norm_sq is not None
    record.norm_sq[item] = sq
    if y is None:
        right, keep, keep_y = left, ~zero, ~zero
        zeros, nonfinite = zero.sum(), bad.sum()
        kept = keep.sum()
        pairs = kept * (kept - 1) // 2 if request.normalize else torch.tensor(len(x) * (len(x) - 1) // 2)
    else:
        right, sq_y, zero_y, bad_y = _scaled(y, compute)
        assert record.norm_sq_y is not None
        record.norm_sq_y[item] = sq_y
        keep, keep_y = ~zero, ~zero_y
        zeros, nonfinite = zero.sum() + zero_y.sum(), bad.sum() + bad_y.sum()
        pairs = keep.sum() * keep_y.sum() if request.normalize else torch.tensor(len(x) * len(y))
    record.zero[item], record.nonfinite[item], record.pairs[item] = zeros, nonfinite, pairs
    if not request.want:
        return
    if not request.normalize:
        left = x.to(compute)
        right = left if y is None else y.to(compute)
        keep, keep_y = torch.ones_like(keep), torch.ones_like(keep_y)
    for start in range(0, len(x), BLOCK):
        stop = min(start + BLOCK, len(x))
        first = start if y is None else 0  # columns left of the diagonal block are done
        tile = left[start:stop] @ right[first:].T  # (rows, m - first)
        mask = keep[start:stop].unsqueeze(1) & keep_y[first:]
        if y is None:
            mask = mask.triu(1)
        _fold_tile(record, item, tile, mask, (start, first), request)


def _scaled(x: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors in the compute dtype, squared lengths, and which vectors are zero or hold NaN or Inf."""
    wide = x.to(torch.float64)
    bad = ~wide.isfinite().all(1)
    largest = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    zero = (largest == 0) & ~bad
    # a power of two: exact, and no square over- or underflows
    _, exponent = torch.frexp(torch.where(zero | bad, 1.0, largest))
    small = torch.ldexp(wide, -exponent.unsqueeze(1))
    square = small.square().sum(1)
    unit = small / torch.where(zero, 1.0, square.sqrt()).unsqueeze(1)
    return unit.to(compute), torch.ldexp(square, 2 * exponent), zero, bad


def _fold_tile(record: GramStats, item: int, tile: Tensor, mask: Tensor, origin: tuple[int, int], request: Request) -> None:
    want = request.want
    tile = tile.masked_fill(~mask, 0)
    size = tile.abs()
    if record.abs_sum is not None:
        record.abs_sum[item] += size.sum(dtype=torch.float64)
    if record.sq_sum is not None:
        record.sq_sum[item] += tile.square().sum(dtype=torch.float64)
    if record.sum is not None:
        record.sum[item] += tile.sum(dtype=torch.float64)
    if record.abs_max is not None and record.argmax is not None and bool(mask.any()):
        ranked = size.masked_fill(~mask, -1)
        flat = int(ranked.argmax())  # the first of equals
        row, column = divmod(flat, tile.shape[1])
        best = ranked[row, column].to(torch.float64)
        if not best <= record.abs_max[item]:  # also true while it is NaN
            record.abs_max[item] = best
            record.argmax[item] = torch.tensor((origin[0] + row, origin[1] + column))
    if record.row_abs is not None:
        rows, columns = size.sum(1, dtype=torch.float64), size.sum(0, dtype=torch.float64)
        record.row_abs[item, origin[0] : origin[0] + len(rows)] += rows
        other = record.row_abs if record.row_abs_y is None else record.row_abs_y
        other[item, origin[1] : origin[1] + len(columns)] += columns
    if record.hist is not None and want & HIST:
        bins = record.hist.shape[1]
        index = ((tile[mask].to(torch.float64) + 1) * (bins / 2)).floor().clamp(0, bins - 1).to(torch.int64)
        record.hist[item] += torch.bincount(index, minlength=bins)

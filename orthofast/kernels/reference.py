"""Reference backend: plain torch, blocks of vectors; the meaning of every field of the record.

Work  b*n*(n+1)/2*d multiply-adds and a little more on diagonal blocks.
Memory  O(n) per item, and at most about 50 MiB of unit vectors and tiles, whatever the shape.
Accuracy  unit vectors and dot products in float32 (float64 on request), lengths and sums in float64.
Refuses nothing: every device torch has, every floating-point dtype. Sums alone never wait for a device.

Large float32 products on the CPU go to oneDNN through its own tensors (``Tensor.to_mkldnn``): it is as exact as
``torch.mm`` and on some processors twice as fast. ``torch.set_float32_matmul_precision`` would reach it too, but is
global: other threads would see it, and some processors would round to bfloat16. Where the user has set it so, the
products here are formed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM, Request, poison
from orthofast.records import GramStats

NAME = "reference"
ROWS, COLUMNS = 256, 512  # a float32 tile stays in a second-level cache
HELD_BYTES = 6 << 20  # unit vectors of the right side kept at a time, of the left side half of that
SERIAL = 1 << 14  # elements of a row that torch sums on one thread
ONEDNN_LENGTH = 256  # shorter vectors do not pay for the copy into oneDNN's tensors
ONEDNN_WORK = 1 << 26  # n*m*d from which its set-up, once per shape, pays


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
    with torch.autocast(x.device.type, enabled=False):  # it would round the operands
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
    left = measured(x, request)
    right = left if y is None else measured(y, request)
    assert record.norm_sq is not None
    record.norm_sq[item] = left.norm_sq
    record.zero[item], record.nonfinite[item] = left.zero.sum(), left.bad.sum()
    n, m = (side.keep.sum() for side in (left, right))
    if y is None:
        record.pairs[item] = n * (n - 1) // 2
    else:
        assert record.norm_sq_y is not None
        record.norm_sq_y[item] = right.norm_sq
        record.zero[item] += right.zero.sum()
        record.nonfinite[item] += right.bad.sum()
        record.pairs[item] = n * m
    if not request.want:
        return
    masked = bool(request.want & (ABS_MAX | HIST))  # a sum may hold the zeros of pairs that do not exist
    gaps = masked and not bool(left.keep.all() & right.keep.all())
    for origin, tile in tiles(left, right):
        diagonal = y is None and origin[0] == origin[1]
        if diagonal:
            tile.triu_(1)
        mask = None
        if gaps or (masked and diagonal):
            rows, columns = tile.shape
            mask = left.keep[origin[0] : origin[0] + rows].unsqueeze(1) & right.keep[origin[1] : origin[1] + columns]
            mask = mask.triu(1) if diagonal else mask
        _fold_tile(record, item, tile, mask, origin)


@dataclass(slots=True)
class Side:
    """One set of vectors and what is known of each, (n,)."""

    x: Tensor  # (n, d), as it came
    scale: Tensor  # (n, 1) a power of two, so that no square over- or underflows; exact
    inverse: Tensor  # (n, 1) of the length after scaling
    norm_sq: Tensor
    zero: Tensor
    bad: Tensor  # holds NaN or Inf
    keep: Tensor  # takes part in pairs
    normalize: bool

    @property
    def compute(self) -> torch.dtype:
        """Dtype of the products."""
        return self.scale.dtype

    def vectors(self, start: int, stop: int) -> Tensor:
        """(stop - start, d) in the compute dtype, divided by their lengths if pairs are cosines."""
        wide = self.x[start:stop].to(self.compute)
        if not self.normalize:
            return wide
        return (wide * self.scale[start:stop]).mul_(self.inverse[start:stop])


def measured(x: Tensor, request: Request) -> Side:
    """Lengths in float64, and which vectors are zero or hold NaN or Inf."""
    n, d = x.shape
    wide_products = request.precision == "float64" or _products_are_rounded(x.device.type)
    compute = torch.float64 if wide_products else torch.float32
    square = torch.zeros(n, dtype=torch.float64, device=x.device)
    largest, exponent = torch.zeros_like(square), torch.zeros_like(square)
    scale = torch.ones((n, 1), dtype=compute, device=x.device)
    # reciprocals of the largest and smallest powers of two are still normal numbers
    limit = 1022 if compute == torch.float64 else 126
    for at in _steps(n, d):
        wide = x[at].to(compute)
        largest[at] = torch.linalg.vector_norm(wide, math.inf, dim=1)  # NaN where one is
        _, power = torch.frexp(torch.where(largest[at].isfinite(), largest[at], 0.0))
        exponent[at] = power.clamp(-limit, limit).to(torch.float64)
        scale[at] = torch.exp2(-exponent[at]).to(compute).unsqueeze(1)
        square[at] = row_sums((wide * scale[at]).to(torch.float64).square_())
    zero, bad = largest == 0, ~largest.isfinite()
    return Side(
        x=x,
        scale=scale,
        inverse=torch.where(zero, 1.0, square).rsqrt().to(compute).unsqueeze(1),
        norm_sq=torch.ldexp(torch.ldexp(square, exponent), exponent),  # 4**exponent alone may overflow
        zero=zero,
        bad=bad,
        keep=~zero if request.normalize else torch.ones_like(zero),
        normalize=request.normalize,
    )


def row_sums(values: Tensor) -> Tensor:
    """(rows, d) -> (rows,), in an order that does not depend on the number of threads."""
    # torch shares out the sum of a single long row among its threads
    return torch.stack([part.sum(1) for part in values.split(SERIAL, dim=1)], 1).sum(1)


def _products_are_rounded(device: str) -> bool:
    """Whether torch was allowed to round float32 operands of a product, which only float64 escapes."""
    owner: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    allowed = {torch.backends, owner, owner.matmul}
    return any(getattr(place, "fp32_precision", "none") in ("bf16", "tf32") for place in allowed)


def _steps(n: int, d: int) -> Iterator[slice]:
    """Cut n vectors so that a float64 copy of each part stays small; no parts where vectors hold nothing."""
    step = max(1, (HELD_BYTES >> 2) // (8 * max(1, d)))
    return (slice(start, min(start + step, n)) for start in range(0, n if d else 0, step))


def tiles(left: Side, right: Side) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Dot products of all pairs of two sides, or of the upper triangle of one: (first row, first column), tile."""
    (n, d), m, alone = left.x.shape, len(right.x), left is right
    vector_bytes = max(1, d * (8 if left.compute == torch.float64 else 4))
    rows = min(ROWS, max(1, (HELD_BYTES >> 1) // vector_bytes))
    columns = max(1, COLUMNS // rows) * rows  # whole blocks: no diagonal crosses an edge
    panel = max(1, HELD_BYTES // vector_bytes // rows) * rows
    onednn = _suits_onednn(left, m)
    for first in range(0, m, panel):
        last = min(first + panel, m)
        held = right.vectors(first, last)
        chunks = [_operand(held[at : at + columns], onednn) for at in range(0, last - first, columns)]
        for start in range(0, last if alone else n, rows):
            stop, done = min(start + rows, n), 0
            inside = alone and start >= first
            block = _operand(held[start - first : stop - first] if inside else left.vectors(start, stop), onednn)
            if inside:  # the chunk that holds the diagonal, from there on
                done = (start - first) // columns + 1
                beside = held[start - first : done * columns]
                yield (start, start), _product(block, _operand(beside, onednn))
            for index in range(done, len(chunks)):
                yield (start, first + index * columns), _product(block, chunks[index])


def _suits_onednn(left: Side, m: int) -> bool:
    """Whether oneDNN gains: a choice by shape alone, so that the bits stay the same."""
    n, d = left.x.shape
    float32_on_cpu = left.compute == torch.float32 and left.x.device.type == "cpu"
    return float32_on_cpu and d >= ONEDNN_LENGTH and n * m * d >= ONEDNN_WORK and torch.backends.mkldnn.is_available()


def _operand(vectors: Tensor, onednn: bool) -> Tensor:
    return vectors.to_mkldnn() if onednn else vectors


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(rows, d), (columns, d) -> (rows, columns) dot products."""
    return functional.linear(left, right).to_dense() if left.is_mkldnn else left @ right.T


def tile_sum(tile: Tensor) -> Tensor:
    """Sum in float64, row by row first: the order does not depend on the number of threads."""
    return tile.sum(1, dtype=torch.float64).sum()


def _fold_tile(record: GramStats, item: int, tile: Tensor, mask: Tensor | None, origin: tuple[int, int]) -> None:
    """Add a tile that holds 0 where ``mask`` says no pair is; it is overwritten."""
    if record.sq_sum is not None:
        record.sq_sum[item] += tile_sum(tile.square())
    if record.sum is not None:
        record.sum[item] += tile_sum(tile)
    if record.hist is not None:
        bins = record.hist.shape[1]
        cosines = (tile.flatten() if mask is None else tile[mask]).to(torch.float64)
        cosines.nan_to_num_(0.0)  # poison empties the histograms that held NaN
        index = ((cosines + 1) * (bins / 2)).floor().clamp(0, bins - 1).to(torch.int64)
        record.hist[item] += torch.bincount(index, minlength=bins)
    size = tile.abs_()
    if record.abs_sum is not None:
        record.abs_sum[item] += tile_sum(size)
    if record.row_abs is not None:
        rows, columns = size.sum(1, dtype=torch.float64), size.sum(0, dtype=torch.float64)
        record.row_abs[item, origin[0] : origin[0] + len(rows)] += rows
        other = record.row_abs if record.row_abs_y is None else record.row_abs_y
        other[item, origin[1] : origin[1] + len(columns)] += columns
    if record.abs_max is not None and record.argmax is not None:
        ranked = size if mask is None else size.masked_fill_(~mask, -1)
        flat = int(ranked.argmax())  # the first of equals
        row, column = divmod(flat, tile.shape[1])
        best = float(ranked[row, column])
        if best < 0:
            return
        pair = torch.tensor((origin[0] + row, origin[1] + column), device=tile.device)
        most = float(record.abs_max[item])
        if not best <= most or (best == most and pair.tolist() < record.argmax[item].tolist()):  # NaN at first
            record.abs_max[item], record.argmax[item] = best, pair

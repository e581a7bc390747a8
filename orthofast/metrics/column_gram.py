"""Squared cosines of many short vectors from the d x d side, block by block in float64.

For unit rows X^ (n, d) without zero rows, the off-diagonal squares of X^ X^T are those of the smaller X^T X^:

    sum over i != j of cos(i, j)^2  =  || X^T X^ - I ||_F^2 + n - d

Both terms are sums of squares or counts when n >= d, so nothing cancels near the minimum, where the first is 0.
Work  n d^2 multiply-adds.  Extra memory  O(n) + a few MiB, never d x d: the matrix is made in blocks of BLOCK columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512  # columns: a float64 block of the matrix is 2 MiB
CHUNK = 1024  # rows: a float64 operand is 4 MiB
CHEAPER_FROM = 4  # n / d: half the speed of float32, twice the flops on diagonal blocks


def is_cheaper(n: int, d: int) -> bool:
    """Whether the d x d side costs less than folding the pairs."""
    return d > 0 and n >= CHEAPER_FROM * d


def mean_square(x: Tensor) -> Tensor:
    """Mean squared cosine over the pairs of non-zero vectors, (b, n, d) -> (b,) float64; NaN with fewer than two."""
    return torch.stack([_item(item) for item in x.detach()]) if len(x) else x.new_zeros(0, dtype=torch.float64)


def _item(x: Tensor) -> Tensor:
    """(n, d) -> ()."""
    n, d = x.shape
    largest, length = _lengths(x)
    kept = n - (length == 0).sum()
    squares = x.new_zeros((), dtype=torch.float64)
    for left in range(0, d, BLOCK):
        for right in range(left, d, BLOCK):
            block = _block(x, largest, length, left, right)
            if left == right:
                block.diagonal().sub_(1)
                squares += block.square_().sum()
            else:
                squares += 2 * block.square_().sum()
    total = (squares + (kept - d)).clamp(min=0)
    return torch.where(kept < 2, float("nan"), total / (kept * (kept - 1))).clamp(max=1)


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the largest absolute entry, and the length after division by it: no square over- or underflows."""
    largest, length = (x.new_empty(len(x), dtype=torch.float64) for _ in range(2))
    rows = max(1, CHUNK * BLOCK // x.shape[1])
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows].to(torch.float64)
        top = chunk.abs().amax(1)
        largest[start : start + rows] = torch.where(top == 0, 1.0, top)
        length[start : start + rows] = (chunk / largest[start : start + rows, None]).square_().sum(1).sqrt_()
    return largest, length


def _block(x: Tensor, largest: Tensor, length: Tensor, left: int, right: int) -> Tensor:
    """One block of X^T X^, (columns from left, columns from right)."""
    divisor = torch.where(length == 0, 1.0, length)
    d = x.shape[1]
    block = x.new_zeros(min(BLOCK, d - left), min(BLOCK, d - right), dtype=torch.float64)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)

        def unit(column: int, rows: slice = rows) -> Tensor:
            entries = x[rows, column : column + BLOCK].to(torch.float64)
            return entries / largest[rows, None] / divisor[rows, None]

        first = unit(left)
        block.addmm_(first.T, first if left == right else unit(right))
    return block

"""The gate before any speed: the value in float64, blocked, and how far a contestant may be from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT_TOLERANCE = 1e-6  # exact operands, float32 products, float64 sums
BF16_ROUNDING = 2.0**-9  # half a unit in the last place of bfloat16
RIVAL_TOLERANCE = 5e-2  # beyond this a rival computes something else
BLOCK = 1024


def expected_pii(vectors: Tensor, block: int = BLOCK) -> float:
    """Mean of |cos| over all pairs i < j of the rows (n, d), all in float64, blocks of rows against the rest."""
    n = len(vectors)
    unit = vectors.to(torch.float64)
    unit = unit / unit.square().sum(1, keepdim=True).sqrt()
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for start in range(0, n, block):
        stop = min(start + block, n)
        tile = unit[start:stop] @ unit[start:].T
        total += tile[:, stop - start :].abs().sum()
        total += tile[:, : stop - start].triu(1).abs().sum()
    return float(total) / (n * (n - 1) / 2)


def relative_error(value: float, expected: float) -> float:
    """|value - expected| / |expected|; infinite where it is no number."""
    if not math.isfinite(value) or not math.isfinite(expected):
        return math.inf
    if expected == 0:
        return 0.0 if value == 0 else math.inf
    return abs(value - expected) / abs(expected)


def tolerance(n: int, *, exact: bool) -> float:
    """Largest relative error one of our backends may show on Gaussian data of ``n`` vectors.

    Exact operands: 1e-6. Operands rounded to bfloat16: each cosine moves at random, so the mean of n(n-1)/2 moves by
    one to 1.6 roundings over the root of their number (64x576: 7e-5, rms of 60 draws). Allowed are eight roundings,
    five such deviations, and 1e-5 for what is not random.
    """
    if exact:
        return EXACT_TOLERANCE
    return 1e-5 + 8 * BF16_ROUNDING / math.sqrt(max(1, n * (n - 1) // 2))


def product_error(product: Tensor, vectors: Tensor, rows: int = 16) -> float:
    """Relative Frobenius error of the first rows of a stored product W W^T, against float64."""
    wide = vectors.to(torch.float64)
    exact = wide[:rows] @ wide.T
    return float((product[:rows].to(torch.float64) - exact).norm() / exact.norm())

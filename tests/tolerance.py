"""The one error rule of the kernel tests, and what a histogram may do near the edges of its bins.

Error against the float64 truth is at most twice the error of plain torch (normalise, matmul, abs, sum), plus a floor.
Errors are per pair, in units of a cosine; for raw dot products in units of the largest possible product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthofast.records import GramStats
from tests.oracle import Truth

# what plain torch computes in: operands of 16 and 8 bits are exact, so float32 is asked of them too
PLAIN_DTYPE = {torch.float64: torch.float64}
# a few units in the last place of a cosine near 1
FLOOR = {torch.float64: 1e-15, torch.float32: 3e-7}

Array = NDArray[np.float64]


@dataclass
class Plain:
    """One item as plain torch folds it: the rival whose error is doubled."""

    abs_sum: float
    sq_sum: float
    sum: float
    row_abs: Array  # (n,)
    row_abs_y: Array | None  # (m,)
    largest_error: float  # of a single pair


def compute_dtype(x: Tensor, precision: str = "auto") -> torch.dtype:
    return torch.float64 if precision == "float64" else PLAIN_DTYPE.get(x.dtype, torch.float32)


def plain(x: Tensor, y: Tensor | None, truth: Truth, *, normalize: bool = True, dtype: torch.dtype) -> Plain:
    """Fold one item (n, d) the naive way: the whole matrix of products, in ``dtype``."""

    def ready(vectors: Tensor) -> Tensor:
        vectors = vectors.to(dtype)
        if not normalize:
            return vectors
        lengths = vectors.norm(dim=1, keepdim=True)
        return vectors / torch.where(lengths == 0, 1, lengths)

    left = ready(x)
    products = left @ (left if y is None else ready(y)).T  # (n, m)
    products = products.triu(1) if y is None else products
    sizes = products.abs()
    rows, columns = sizes.sum(1).double().numpy(), sizes.sum(0).double().numpy()
    each = products[tuple(torch.from_numpy(truth.indices).T)].double().numpy()
    return Plain(
        abs_sum=sizes.sum().item(),
        sq_sum=products.square().sum().item(),
        sum=products.sum().item(),
        row_abs=rows + columns if y is None else rows,
        row_abs_y=None if y is None else columns,
        largest_error=float(np.max(np.abs(each - truth.cosines), initial=0.0)),
    )


def assert_error(what: str, got: float, truth: float, rival: float, scale: float, floor: float) -> None:
    """The rule itself, on one number: ``scale`` turns it into units of one cosine."""
    error, allowed = abs(got - truth) / scale, abs(rival - truth) / scale
    assert math.isfinite(allowed), f"{what}: plain torch gives {rival}, so the rule would hold for anything"
    limit = 2 * allowed + floor
    assert error <= limit, (
        f"{what}: error {error:.3g} is over {limit:.3g} (got {got!r}, truth {truth!r}, plain {rival!r})"
    )


def assert_norms(got: Tensor | None, truth: Array, floor: float, what: str = "norm_sq") -> None:
    """Squared lengths, each relative to itself; not finite where the truth is not."""
    assert got is not None, f"{what} is missing"
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(np.isfinite(got.numpy()), finite, err_msg=what)
    np.testing.assert_allclose(got.numpy()[finite], truth[finite], rtol=4 * floor, atol=0, err_msg=what)


def assert_within_rule(
    got: GramStats,
    item: int,
    truth: Truth,
    rival: Plain,
    *,
    floor: float,
    size: float = 1.0,
) -> None:
    """Every field of one item that the record carries.

    ``size`` is the largest possible value of one pair: 1 for cosines.
    """
    assert got.pairs[item].item() == truth.pairs, f"pairs: got {got.pairs[item].item()}, truth {truth.pairs}"
    assert got.zero[item].item() == truth.zero, f"zero: got {got.zero[item].item()}, truth {truth.zero}"
    assert got.nonfinite[item].item() == truth.nonfinite, (
        f"nonfinite: got {got.nonfinite[item]}, truth {truth.nonfinite}"
    )
    assert got.norm_sq is not None
    assert_norms(got.norm_sq[item], truth.norm_sq, floor)
    if truth.norm_sq_y is not None:
        assert got.norm_sq_y is not None
        assert_norms(got.norm_sq_y[item], truth.norm_sq_y, floor, "norm_sq_y")
    pairs = max(truth.pairs, 1)
    for name in ("abs_sum", "sq_sum", "sum"):
        value = getattr(got, name)
        if value is None:
            continue
        power = 2 if name == "sq_sum" else 1
        true, other = getattr(truth, name), getattr(rival, name)
        _same_or_within(name, value[item].item(), true, other, pairs * size**power, power * floor)
    for name, others in (("row_abs", truth.row_abs_y), ("row_abs_y", truth.row_abs)):
        value, true, other = getattr(got, name), getattr(truth, name), getattr(rival, name)
        if value is None or true is None:
            continue
        partners = max(1, len(true) - 1 if others is None else len(others))
        assert value[item].shape == true.shape, f"{name}: shape {tuple(value[item].shape)}, truth {true.shape}"
        worst = float(np.max(np.abs(other - true), initial=0.0))
        for vector, (g, t) in enumerate(zip(value[item].tolist(), true.tolist(), strict=True)):
            _same_or_within(f"{name}[{vector}]", g, t, t + worst, partners * size, floor)
    if got.abs_max is not None:
        assert_maximum(got, item, truth, rival.largest_error, floor=floor, size=size)


def assert_maximum(got: GramStats, item: int, truth: Truth, allowed: float, *, floor: float, size: float = 1.0) -> None:
    """abs_max within the rule, and argmax a pair whose true value is as large as that."""
    assert got.abs_max is not None
    assert got.argmax is not None
    i, j = got.argmax[item].tolist()
    if math.isnan(truth.abs_max):
        assert math.isnan(got.abs_max[item].item()), f"abs_max: got {got.abs_max[item].item()}, truth NaN"
        assert (i, j) == (-1, -1), f"argmax: got {(i, j)} where no pair is"
        return
    limit = 2 * allowed / size + floor
    error = abs(got.abs_max[item].item() - truth.abs_max) / size
    assert error <= limit, f"abs_max: error {error:.3g} is over {limit:.3g}"
    named = np.flatnonzero((truth.indices == (i, j)).all(1))
    assert len(named) == 1, f"argmax: {(i, j)} is no counted pair"
    short = (truth.abs_max - abs(truth.cosines[named[0]])) / size
    assert short <= 2 * limit, f"argmax: {(i, j)} falls short of the largest by {short:.3g}"


def _same_or_within(what: str, got: float, truth: float, rival: float, scale: float, floor: float) -> None:
    if math.isnan(truth):
        assert math.isnan(got), f"{what}: got {got!r}, truth NaN"
    else:
        assert_error(what, got, truth, rival, scale, floor)


def assert_hist_within_band(hist: Tensor, cosines: Array, band: float) -> None:
    """Counts of one item: pairs farther than ``band`` from an edge match, those inside may be with the neighbour."""
    bins = len(hist)
    width = 2 / bins
    assert 2 * band < width, f"a band of {band:.3g} around each edge leaves nothing to check in {bins} bins"
    assert bool((hist >= 0).all()), f"hist: negative counts {hist.tolist()}"
    assert int(hist.sum()) == len(cosines), f"hist: counts {int(hist.sum())} pairs of {len(cosines)}"
    edges = -1 + width * np.arange(1, bins)
    below = np.cumsum(hist.numpy())[:-1]  # pairs counted left of each inner edge
    ordered = np.sort(cosines)
    fewest = np.searchsorted(ordered, edges - band, side="left")
    most = np.searchsorted(ordered, edges + band, side="right")
    wrong = np.flatnonzero((below < fewest) | (below > most))
    assert len(wrong) == 0, (
        f"hist: left of {edges[wrong[0]]:.4f} lie {fewest[wrong[0]]} to {most[wrong[0]]} pairs, "
        f"counted {below[wrong[0]]}"
    )

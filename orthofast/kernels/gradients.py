"""Sums over pairs of a curve of the cosine, and their gradients, in plain torch: one sweep over blocks of rows.

For a curve f (``abs`` and its smooth forms) and unit vectors u_i = w_i / |w_i|,

    S = sum over i < j of f(u_i . u_j),    G_i = sum over j of f'(u_i . u_j) u_j,
    dS/dw_i = (G_i - (G_i . u_i) u_i) / |w_i|

A tile of cosines is made once and serves both of its sides, so the sweep costs 3/2 of a full product and not the 3 of
autograd. f' = sign for ``abs``; its subgradient at 0, and f' on the diagonal, are 0.
Work  1.5*b*n*n*d multiply-adds (3*b*n*m*d between two sets).
Memory  the gradient, the unit vectors and a tile of ROWS x COLUMNS.
Accuracy  float32 (float64 for float64 input or on request), sums of the curve in float64 between tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels.contract import Request
from orthofast.kernels.reference import Side, measured, row_sums

CURVES = ("abs", "huber", "sqrt", "square")
ROWS, COLUMNS = 512, 512  # a tile of 1 MiB stays in a second-level cache
SQUARE_SIDE = 2  # n / d from which the d x d side of the squares is cheaper


@dataclass(frozen=True, slots=True)
class Curve:
    """What is summed of each cosine c, and its derivative.

    ========  ===================================================  =================================
    kind      f(c)                                                 f'(c)
    ========  ===================================================  =================================
    abs       |c|                                                  sign(c), 0 at 0
    huber     c^2 / (2 width) for |c| <= width, |c| - width / 2    c / width, cut to [-1, 1]
    sqrt      sqrt(c^2 + width^2) - width                          c / sqrt(c^2 + width^2)
    square    c^2                                                  2 c
    ========  ===================================================  =================================
    """

    kind: str = "abs"
    width: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in CURVES:
            raise InputError(f"a curve needs a kind among {', '.join(CURVES)}, got {self.kind!r}")
        if self.kind in ("huber", "sqrt") and not 0 < self.width < float("inf"):
            raise InputError(f"width needs a positive number, the |cosine| below which it bends, got {self.width!r}")


ABS = Curve()


@dataclass(slots=True, eq=False)
class PairGradient:
    """The sum of a curve over all pairs of each item, and its gradient.

    Where ``nonfinite`` is positive, all of that item is NaN. Vectors of length 0 are in no pair: their gradient is 0.

    Attributes:
        pairs: (b,) int64, pairs summed.
        total: (b,) float64, sum over the pairs of the curve.
        dx: (b, n, d) float32 or float64, gradient of ``total`` by x; None if it was not asked for.
        dy: (b, m, d), the same by y; None without y.
    """

    pairs: Tensor
    total: Tensor
    dx: Tensor | None = None
    dy: Tensor | None = None


def gradient_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """Dtype in which a gradient of vectors of this dtype is returned."""
    return torch.float64 if dtype == torch.float64 or precision == "float64" else torch.float32


def abs_gradient(request: Request, curve: Curve = ABS, *, gradient: bool = True) -> PairGradient:
    """Sum a curve of the cosines of a request's pairs, with its gradient or without; ``want`` plays no part.

    Args:
        request: checked, with ``normalize``.
        curve: what is summed of each cosine.
        gradient: whether the gradients are made too; they are two thirds of the work.
    """
    x, y = request.x, request.y
    b, n, d = x.shape
    dtype = gradient_dtype(x.dtype, request.precision)
    pairs = torch.zeros(b, dtype=torch.int64, device=x.device)
    total = torch.zeros(b, dtype=torch.float64, device=x.device)
    dx = torch.zeros((b, n, d), dtype=dtype, device=x.device) if gradient else None
    dy = None if y is None or not gradient else torch.zeros(y.shape, dtype=dtype, device=x.device)
    # the kernels of torch that autocast would round, and a gradient that nobody asks for
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for item in range(b):
            left = measured(x[item], request)
            right = left if y is None else measured(y[item], request)
            out, out_y = (None if at is None else at[item] for at in (dx, dy))
            pairs[item] = _pairs(left, right)
            total[item] = _item(left, right, curve, out, out_y)
    return PairGradient(pairs, total, dx, dy)


def _pairs(left: Side, right: Side) -> Tensor:
    n, m = left.keep.sum(), right.keep.sum()
    return n * (n - 1) // 2 if left is right else n * m


def _item(left: Side, right: Side, curve: Curve, dx: Tensor | None, dy: Tensor | None) -> Tensor:
    """One item: its sum, and its gradients written where they belong."""
    alone = left is right
    units = left.vectors(0, len(left.x))
    others = units if alone else right.vectors(0, len(right.x))
    grad = None if dx is None else torch.zeros_like(units)
    grad_y = grad if alone else None if dy is None else torch.zeros_like(others)
    if curve.kind == "square" and prefers_square_side(units, others):
        total = _square_side(units, others, left.keep.sum(), grad, None if alone else grad_y)
    elif alone:
        total = _triangle(units, curve, grad)
    else:
        total = _rectangle(units, others, curve, grad, grad_y)
    bad = left.bad.any() | right.bad.any()
    for side, unit, sums, out in ((left, units, grad, dx), (right, others, grad_y, dy)):
        if sums is not None and out is not None:
            _finish(side, unit, sums)
            out.copy_(sums.masked_fill_(bad, float("nan")))
    return torch.where(bad, float("nan"), total)


def _triangle(units: Tensor, curve: Curve, grad: Tensor | None) -> Tensor:
    """Pairs within one set: tiles on and right of the diagonal."""
    n = len(units)
    total = torch.zeros((), dtype=torch.float64, device=units.device)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        block = units[rows]
        for first in range(start, n, COLUMNS):
            columns = slice(first, min(first + COLUMNS, n))
            cosines = block @ units[columns].T
            diagonal = first == start
            if diagonal:
                cosines.fill_diagonal_(0)
            value = bend(cosines, curve, grad is not None)
            total += value / 2 if diagonal else value
            if grad is not None:
                grad[rows].addmm_(cosines, units[columns])
                if not diagonal:
                    grad[columns].addmm_(cosines.T, block)
    return total


def _rectangle(units: Tensor, others: Tensor, curve: Curve, grad: Tensor | None, grad_y: Tensor | None) -> Tensor:
    """Pairs between two sets: all tiles."""
    total = torch.zeros((), dtype=torch.float64, device=units.device)
    for rows in _cuts(len(units), ROWS):
        for columns in _cuts(len(others), COLUMNS):
            cosines = units[rows] @ others[columns].T
            total += bend(cosines, curve, grad is not None)
            if grad is not None and grad_y is not None:
                grad[rows].addmm_(cosines, others[columns])
                grad_y[columns].addmm_(cosines.T, units[rows])
    return total


def _cuts(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def bend(cosines: Tensor, curve: Curve, gradient: bool) -> Tensor:
    """Sum of the curve over a tile, in float64; the tile becomes derivatives if ``gradient``, and scratch if not."""
    width = curve.width
    if curve.kind == "square":
        value = _total(cosines.square())
        if gradient:
            cosines.mul_(2)
    elif curve.kind == "sqrt":
        length = (cosines.square() + width * width).sqrt_()
        # c^2 / (sqrt + width) and not sqrt - width, which cancels
        value = _total(cosines.square().div_(length + width))
        cosines.div_(length)
    elif curve.kind == "huber":
        size = cosines.abs()
        inside = size.clamp(max=width)
        value = _total(size.sub_(inside).add_(inside.square_(), alpha=0.5 / width))
        cosines.div_(width).clamp_(-1, 1)
    else:
        value = _total(cosines.abs())
        if gradient:
            cosines.sign_()
    return value


def _total(tile: Tensor) -> Tensor:
    # row by row first: the order does not depend on the number of threads
    return tile.sum(1, dtype=torch.float64).sum()


def _finish(side: Side, units: Tensor, sums: Tensor) -> None:
    """From gradients by the unit vectors to gradients by the vectors, in place."""
    step = max(1, (ROWS * COLUMNS) // max(1, units.shape[1]))
    for rows in _cuts(len(units), step):
        unit = units[rows]
        radial = row_sums(sums[rows] * unit).unsqueeze(1)
        # two factors: their product, 1 / length, may overflow where its use does not
        sums[rows].addcmul_(unit, radial, value=-1).mul_(side.inverse[rows]).mul_(side.scale[rows])


def prefers_square_side(x: Tensor, y: Tensor | None = None) -> bool:
    """Whether squares of the cosines of (..., n, d), and (..., m, d), cost less on the d x d side."""
    n, d = x.shape[-2:]
    return 0 < SQUARE_SIDE * d <= (n if y is None else min(n, y.shape[-2]))


def _square_side(units: Tensor, others: Tensor, kept: Tensor, grad: Tensor | None, grad_y: Tensor | None) -> Tensor:
    """Squares of the cosines from the d x d side, a block of its columns at a time.

    Within one set of k unit vectors   sum over i != j of c^2 = || M - (k/d) I ||_F^2 + k^2 / d - k,   M = U^T U;
    nothing cancels, and what is taken from the diagonal of M changes G along u_i alone, which drops out.
    Between two sets                   sum over i, j of c^2 = <U^T U, V^T V>_F.
    """
    d = units.shape[1]
    total = torch.zeros((), dtype=torch.float64, device=units.device)
    for columns in _cuts(d, COLUMNS):
        own = units.T @ units[:, columns]  # (d, columns)
        if others is units:
            own.diagonal(-columns.start).sub_((kept / d).to(own.dtype))
            total += _total(own.square()) / 2
            if grad is not None:
                grad[:, columns] = (units @ own).mul_(2)
        else:
            other = others.T @ others[:, columns]
            total += _total(own * other)
            if grad is not None and grad_y is not None:
                grad[:, columns] = (units @ other).mul_(2)
                grad_y[:, columns] = (others @ own).mul_(2)
    if others is units:
        count = kept.to(torch.float64)
        total += (count * count / d - count) / 2
    return total.clamp_(min=0)

"""Gradients of means over pairs by float64 matrices in numpy, and the naive autograd whose error is doubled.

Nothing but the curves' formulas is shared with what is tested; those are written anew here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orthofast.kernels.gradients import Curve
from tests import oracle
from tests.oracle import Floats

KINK = 1e-6  # a cosine below this may come out with either sign


@dataclass
class GradientTruth:
    """One item: the mean, its gradients, and how far each vector's may jump for cosines near 0."""

    mean: float
    dx: Floats  # (n, d)
    dy: Floats | None  # (m, d)
    jump_x: Floats  # (n,) in units of 1 / length
    jump_y: Floats | None  # (m,)


def curve_of(curve: Curve) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """The curve and its derivative."""
    width = curve.width
    if curve.kind == "abs":
        return np.abs, np.sign
    if curve.kind == "square":
        return np.square, lambda c: 2 * c
    if curve.kind == "sqrt":
        return lambda c: np.hypot(c, width) - width, lambda c: c / np.hypot(c, width)
    return (
        lambda c: np.where(np.abs(c) <= width, c * c / (2 * width), np.abs(c) - width / 2),
        lambda c: np.where(np.abs(c) <= width, c / width, np.sign(c)),
    )


def gradient_truth(x: Floats, y: Floats | None, curve: Curve) -> GradientTruth:
    """The mean over one item (n, d) and its gradients."""
    value, slope = curve_of(curve)
    left = oracle.units(x)
    right = left if y is None else oracle.units(y)
    real_x, real_y = np.any(left, 1), np.any(right, 1)
    cosines = left @ right.T
    mask = np.outer(real_x, real_y)
    if y is None:
        mask &= ~np.eye(len(x), dtype=bool)
    pairs = int(mask.sum()) // (2 if y is None else 1)
    scale = 1 / max(pairs, 1)
    slopes = np.where(mask, slope(cosines), 0) * scale
    total = float(np.sum(np.where(mask, value(cosines), 0))) / (2 if y is None else 1)
    near = mask & (np.abs(cosines) < KINK) if curve.kind == "abs" else np.zeros_like(mask)
    return GradientTruth(
        mean=total * scale if pairs else float("nan"),
        dx=_by_vectors(x, left, slopes @ right),
        dy=None if y is None else _by_vectors(y, right, slopes.T @ left),
        jump_x=2 * near.sum(1) * scale,
        jump_y=None if y is None else 2 * near.sum(0) * scale,
    )


def _by_vectors(x: Floats, unit: Floats, by_unit: Floats) -> Floats:
    lengths = np.sqrt(oracle.squared_lengths(x))
    tangent = by_unit - np.sum(by_unit * unit, 1, keepdims=True) * unit
    by_vectors = np.zeros_like(x)
    np.divide(tangent, lengths[:, None], out=by_vectors, where=lengths[:, None] > 0)
    return by_vectors


def naive_mean(x: Tensor, y: Tensor | None, curve: Curve) -> Tensor:
    """(n, d) -> (): the mean as autograd would differentiate it, through the whole matrix."""

    def unit(vectors: Tensor) -> Tensor:
        lengths = vectors.norm(dim=1, keepdim=True)
        return vectors / torch.where(lengths == 0, 1, lengths)

    left = unit(x)
    right = left if y is None else unit(y)
    cosines, width = left @ right.T, curve.width
    if y is None:
        cosines = cosines.triu(1)
    if curve.kind == "abs":
        values = cosines.abs()
    elif curve.kind == "square":
        values = cosines.square()
    elif curve.kind == "sqrt":
        values = (cosines.square() + width * width).sqrt() - width
    else:
        values = torch.where(cosines.abs() <= width, cosines.square() / (2 * width), cosines.abs() - width / 2)
    real_x, real_y = (x != 0).any(1).sum(), (x if y is None else y).ne(0).any(1).sum()
    return values.sum() / (real_x * (real_x - 1) / 2 if y is None else real_x * real_y).clamp(min=1)


def naive_gradients(x: Tensor, y: Tensor | None, curve: Curve) -> tuple[Floats, Floats | None]:
    """What plain autograd makes of one item, in the dtype of its input."""
    x = x.detach().clone().requires_grad_()
    y = None if y is None else y.detach().clone().requires_grad_()
    naive_mean(x, y, curve).backward()
    found = [None if side is None or side.grad is None else side.grad.double().numpy() for side in (x, y)]
    assert found[0] is not None
    return found[0], found[1]


def assert_gradient(
    what: str, got: Floats, truth: Floats, rival: Floats, x: Floats, jump: Floats, partners: float, floor: float
) -> None:
    """Per vector, error times length is at most twice plain autograd's worst, plus a floor for each partner."""
    lengths = np.sqrt(oracle.squared_lengths(x))
    errors = np.linalg.norm(got - truth, axis=1) * lengths
    allowed = np.max(np.linalg.norm(rival - truth, axis=1) * lengths, initial=0.0)
    limit = 2 * allowed + floor * partners + jump
    worst = int(np.argmax(errors - limit)) if len(errors) else 0
    assert np.all(errors <= limit), f"{what}[{worst}]: error {errors[worst]:.3g} is over {limit[worst]:.3g}"

"""What batch norm's rate does: the penalty it makes of noise, its constrained problem, and the ridge it is likened to.

Annamalai et al. 2022, Section III. Weights are (out, ...), one neuron a row, rates those of
:func:`orthofast.metrics.bn_rate`; everything is float64, without gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from orthofast.errors import InputError

Number: TypeAlias = "float | Tensor"


class ConstrainedMinimum(NamedTuple):
    """The shortest weight that keeps its projection on w, and the multiplier of that constraint.

    Attributes:
        weight: (out, ...) float64, ``w / |w|^2``.
        multiplier: (out,) float64, ``2 alpha / |w|^2``.
    """

    weight: Tensor
    multiplier: Tensor


def noise_penalty(weight: Tensor, rate: Tensor, noise_variance: Number, gamma: Number = 1.0) -> Tensor:
    """Squared error that independent noise on the inputs adds per neuron, with batch norm on the noisy data.

    ``sigma^2 gamma^2 |w|^2 / (alpha^2 + sigma^2 |w|^2)``. Annamalai et al. 2022, Eq. 18: its denominator
    ``sum((lambda_j + sigma^2) c_j^2)``, with c the coordinates of w in R's eigenvectors, is ``w^T (R + sigma^2 I) w``.
    Without batch norm it is ``sigma^2 |w|^2``, Eq. 16: a ridge penalty.

    Range [0, gamma^2]: batch norm caps it. Noise well below the signal costs ``sigma^2 |w_bn|^2``.

    Args:
        weight: (out, ...), raw.
        rate: (out,), alpha ("std") of the data without the noise.
        noise_variance: sigma^2 of each input.
        gamma: of the batch norm, a number or (out,).

    Returns:
        (out,) float64.

    Raises:
        InputError: if the noise's variance is negative, or there is not one rate a neuron.

    >>> noise_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]), 1.0)  # R = I: 1 / (1 + 1)
    tensor([0.5000], dtype=torch.float64)
    """
    _not_negative(noise_variance, "noise_variance")
    _one_each(weight, rate)
    squared = weight.detach().to(torch.float64).flatten(1).square().sum(1) * noise_variance
    total = rate.detach().to(torch.float64).square() + squared
    share = squared / torch.where(total == 0, 1.0, total)
    penalty: Tensor = share * _float64(gamma).square()
    return penalty


def isotropic_noise_penalty(noise_variance: Number, eigenvalue: Number, gamma: Number = 1.0) -> Tensor:
    """The same where all directions of the data have one variance lambda: the weight drops out.

    ``sigma^2 gamma^2 / (lambda + sigma^2)``, Annamalai et al. 2022, Eq. 19: gamma^2 for sigma^2 far above lambda, and
    ``sigma^2 gamma^2 / lambda`` far below (where the text leaves out sigma^2). With a signal-to-noise ratio of
    ``lambda / sigma^2`` it is ``gamma^2 / (1 + SNR)``.

    Returns:
        float64, in the shape the arguments broadcast to; 0 without noise.

    Raises:
        InputError: if a variance is negative.

    >>> isotropic_noise_penalty(0.5, 1.0, gamma=3.0)
    tensor(3., dtype=torch.float64)
    """
    _not_negative(noise_variance, "noise_variance")
    _not_negative(eigenvalue, "eigenvalue")
    noise = _float64(noise_variance)
    total = _float64(eigenvalue) + noise
    penalty: Tensor = noise * _float64(gamma).square() / torch.where(total == 0, 1.0, total)
    return penalty


def rate_from_second_moment(weight: Tensor, second_moment: Tensor) -> Tensor:
    """alpha of each neuron from R itself: ``(w^T R w)^(1/2) = (sum lambda_i c_i^2)^(1/2)``, (out,) float64.

    Annamalai et al. 2022, Eq. 8 and 13 to 15, where c are coordinates of w in the eigenvectors of R (the paper writes
    w_i). R centred gives the centred rate.

    Args:
        weight: (out, ...), flattened to (out, d).
        second_moment: (d, d).

    Raises:
        InputError: if the shapes do not fit.
    """
    w = weight.detach().to(torch.float64).flatten(1)
    moment = _square(second_moment, w.shape[1], "second_moment")
    return (w @ moment * w).sum(1).clamp(min=0).sqrt()


def ridge_shrinkage(eigenvalues: Tensor, rates: Tensor) -> Tensor:
    """What ridge regression leaves of each component of a weight: ``lambda_i / (lambda_i + alpha)``, (rates, d).

    Annamalai et al. 2022, Section III A: directions of little curvature go first, as alpha grows. 1 where both are 0.

    Args:
        eigenvalues: (d,) of the curvature, not negative.
        rates: (rates,) alpha, not negative.

    Raises:
        InputError: if one is negative.

    >>> ridge_shrinkage(torch.tensor([9.0, 1.0]), torch.tensor([0.0, 1.0]))
    tensor([[1.0000, 1.0000],
            [0.9000, 0.5000]], dtype=torch.float64)
    """
    _not_negative(eigenvalues, "eigenvalues")
    _not_negative(rates, "rates")
    values = _float64(eigenvalues)[None]
    alpha = _float64(rates).reshape(-1, 1).to(values.device)
    total = values + alpha
    return torch.where(total == 0, 1.0, values / torch.where(total == 0, 1.0, total))


def ridge_path(weight: Tensor, curvature: Tensor, rates: Tensor) -> Tensor:
    """The regularised weight for each rate: ``w_r = Q (Lambda + alpha I)^(-1) Lambda Q^T w``, (rates, out, d) float64.

    Annamalai et al. 2022, Section III A (printed without the inverse), and Fig. 1 for d = 2.

    Args:
        weight: (out, ...), the minimum without regularisation, flattened to (out, d).
        curvature: (d, d) Hessian of the loss around it, symmetric and positive semi-definite, ``Q Lambda Q^T``.
        rates: (rates,) alpha.

    Raises:
        InputError: if the shapes do not fit, or a rate is negative.
    """
    w = weight.detach().to(torch.float64).flatten(1)
    values, directions = torch.linalg.eigh(_square(curvature, w.shape[1], "curvature"))
    kept = ridge_shrinkage(values.clamp(min=0), rates)  # (rates, d)
    path: Tensor = (w @ directions)[None] * kept[:, None] @ directions.T
    return path


def constrained_minimum(weight: Tensor, rate: Tensor) -> ConstrainedMinimum:
    """Batch norm's constrained problem per neuron: least ``alpha |v|^2`` with ``v^T w = 1``.

    The minimum-norm solution ``v = w / |w|^2``, whatever alpha; its multiplier is ``2 alpha / |w|^2``. Annamalai et al.
    2022, Eq. 3 to 11, which drop the 2. Batch norm's own weight ``gamma w / alpha`` meets the constraint where
    ``gamma = alpha / |w|^2``.

    Args:
        weight: (out, ...).
        rate: (out,), alpha ("std").

    Returns:
        :class:`ConstrainedMinimum`; NaN for a weight of zeros, which no v meets.

    Raises:
        InputError: if there is not one rate a neuron.
    """
    _one_each(weight, rate)
    w = weight.detach().to(torch.float64)
    squared = w.flatten(1).square().sum(1)
    lengths = torch.where(squared == 0, float("nan"), squared)
    return ConstrainedMinimum(w / lengths.view(-1, *[1] * (w.dim() - 1)), 2 * _float64(rate) / lengths)


def _square(matrix: Tensor, d: int, name: str) -> Tensor:
    if tuple(matrix.shape) != (d, d):
        raise InputError(f"{name} needs shape ({d}, {d}), got {tuple(matrix.shape)}")
    return matrix.detach().to(torch.float64)


def _one_each(weight: Tensor, rate: Tensor) -> None:
    if weight.dim() < 2 or tuple(rate.shape) != (len(weight),):
        raise InputError(
            f"weight and rate need (out, in, ...) and (out,), got {tuple(weight.shape)} and {tuple(rate.shape)}"
        )


def _not_negative(value: Number, name: str) -> None:
    found = _float64(value)
    if not bool((found >= 0).all()) or not math.isfinite(float(found.sum())):
        raise InputError(f"{name} needs finite values of at least 0, got {value!r}")


def _float64(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()

"""Closed forms for random networks with batch normalisation: bounds, stationary level, distance to a Gaussian.

Daneshmand et al. 2021, in its letters: n samples, width d, H the representations with one sample a column and
``|H|_F = 1``; here a sample is a row, as torch lays batches out. V is :func:`orthofast.orthogonality_gap`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.answers import answer
from orthofast.views import Array, dense_vectors


class GapBounds(NamedTuple):
    """Least and largest orthogonality gap of n samples in d dimensions.

    Attributes:
        low: of d orthogonal features, or of n orthogonal samples of one length: 0.
        high: of samples that are all parallel.
    """

    low: float
    high: float


def gap_bounds(n: int, d: int) -> GapBounds:
    """Between which values the orthogonality gap of n vectors of length d lies.

    ``sqrt(max(0, 1 / d - 1 / n)) <= V <= sqrt(1 - 1 / n)``, both attained. (Eq. 2 of Daneshmand et al. 2021: the
    eigenvalues of ``H^T H`` are at most d positive numbers of sum 1.)

    Raises:
        InputError: if n or d is no positive integer.

    >>> gap_bounds(4, 32)
    GapBounds(low=0.0, high=0.8660254037844386)
    >>> round(gap_bounds(192, 64).low, 5)
    0.10206
    """
    _positive(n, "n")
    _positive(d, "d")
    return GapBounds(math.sqrt(max(0.0, (n - d) / (n * d))), math.sqrt(1 - 1 / n))


def gap_contraction(n: int) -> float:
    """By which factor one layer of a wide BN chain shrinks a small deviation of ``H^T H`` from ``I / n``.

    ``n / (n + 2)``: linearised around orthogonal samples, where a row of ``W H`` is isotropic and normalising it costs
    twice the share 1 / (n + 2) of each deviation. It is the geometric drift of Daneshmand et al. 2021, Section 3.2, for
    which the paper gives no number; the factor itself is not in the paper.

    Raises:
        InputError: if n is no positive integer.
    """
    _positive(n, "n")
    return n / (n + 2)


def stationary_gap(n: int, d: int, *, center: bool = False) -> float:
    """Level around which the gap of a deep BN chain settles: the root mean square of V over deep layers.

    ``V_inf = sqrt((n - 1) (n + 2)^2 / (4 n (n + 1) d))``: each layer adds the variance ``(n - 1) / (n d)`` of a mean of
    d unit vectors' outer products and keeps ``n / (n + 2)`` of the deviation it got (:func:`gap_contraction`). A
    linearisation, good to some per cent for d >= 8 n and n >= 2, of what Daneshmand et al. 2021, Fig. 2b, measure; they
    state the order ``1 / sqrt(d)``.

    Args:
        n: samples.
        d: width.
        center: of a chain that subtracts each feature's mean, as torch does: samples then stay in n - 1 dimensions,
            and the level is ``sqrt(stationary_gap(n - 1, d)^2 + 1 / (n - 1) - 1 / n)``.

    Raises:
        InputError: if n or d is no positive integer, or n is 1 with ``center``.

    >>> round(math.log(stationary_gap(4, 32)), 2), round(math.log(stationary_gap(4, 512)), 2)
    (-1.58, -2.97)
    """
    _positive(n, "n")
    _positive(d, "d")
    if center:
        if n == 1:
            raise InputError("n needs at least 2 samples with center=True, got 1: its centred features are all 0")
        return math.sqrt(stationary_gap(n - 1, d) ** 2 + 1 / (n * (n - 1)))
    return math.sqrt((n - 1) * (n + 2) ** 2 / (4 * n * (n + 1) * d))


def theorem1_bound(alpha: float, layers: int, n: int, d: int) -> float:
    """Bound on the expected gap after ``layers`` layers and one more.

    ``E V(H_{l+1}) <= 2 (1 - 2/3 alpha)^l + 3 n / (alpha sqrt(d))`` under assumption A1(alpha, l): no singular value
    of H_1 to H_l is below alpha. Daneshmand et al. 2021, Theorem 1, Eq. 3.

    It holds, and says something only where it is below ``gap_bounds(n, d).high``: with the best possible alpha,
    ``1 / sqrt(n)``, from d > 144 on for n = 2, d > 768 for n = 4, d > 39322 for n = 16.

    Args:
        alpha: in (0, 1 / sqrt(n)], since ``|H|_F = 1``.
        layers: l, at least 0.
        n: samples.
        d: width, at least n.

    Raises:
        InputError: if an argument is outside these ranges.

    >>> round(theorem1_bound(0.66, 1000, 2, 512), 3)
    0.402
    """
    _assumed(alpha, layers, n, d)
    return 2 * (1 - 2 / 3 * alpha) ** layers + 3 * n / (alpha * math.sqrt(d))


def corollary3_bound(alpha: float, layers: int, n: int, d: int) -> float:
    """Bound on the squared Wasserstein-2 distance of ``W_l H_l`` to a Gaussian matrix: 2 n times Theorem 1.

    ``W2^2 <= 4 n (1 - 2/3 alpha)^l + 6 n^2 / (alpha sqrt(d))``. Daneshmand et al. 2021, Corollary 3, Eq. 5. It is below
    the trivial ``2 (1 - 1 / sqrt(n))`` from d of about 3360 on at n = 2. Arguments and errors as in
    :func:`theorem1_bound`.
    """
    return 2 * n * theorem1_bound(alpha, layers, n, d)


def gaussian_w2_squared(weight: Array, *, vectors: str = "rows", heads: int | None = None) -> Tensor:
    """Squared Wasserstein-2 distance of ``W H``, W random and H given, to a Gaussian matrix of the same size.

    ``W2(W H, G / sqrt(n))^2 = 2 (1 - sum(s) / sqrt(n))`` with the singular values s of ``H / |H|_F`` and the entries of
    W and G independent, N(0, 1 / d). Computed as ``sum((s - 1 / sqrt(n))^2) + (n - k) / n`` over the k = min(n, d)
    values, where nothing cancels. Daneshmand et al. 2021, Lemma 2, bounds it by ``2 n V(H)``; given H the distance is
    exact, and at most ``n V(H)^2``.

    Range [0, 2 - 2 / sqrt(n)]. 0: orthogonal samples of one length. The maximum: rank one.

    Args:
        weight: the n samples as vectors, (n, d): a batch of representations. Scaled to ``|H|_F = 1``.
        vectors: as in :func:`orthofast.pii`.
        heads: as in :func:`orthofast.pii`.

    Returns:
        () float64, or (heads,). NaN for an empty or zero matrix, or with NaN or Inf in it. Detached.

    Raises:
        InputError: if an argument cannot be used.

    >>> gaussian_w2_squared(torch.eye(4, 32)), gaussian_w2_squared(torch.ones(4, 32))
    (tensor(0., dtype=torch.float64), tensor(1.0000, dtype=torch.float64))
    """
    x = dense_vectors(weight, vectors, heads).detach()
    n, k = x.shape[1], min(x.shape[1:])
    if k == 0:
        return answer(torch.full((len(x),), float("nan"), dtype=torch.float64, device=x.device), vectors)
    unit = singular_shares(x)
    nearest = (unit - n**-0.5).square().sum(1)
    return answer(nearest + (n - k) / n, vectors)


def singular_shares(x: Tensor) -> Tensor:
    """Singular values of (b, n, d) matrices scaled to Frobenius norm 1, (b, k) float64, largest first.

    NaN for a matrix of zeros or with NaN or Inf in it.
    """
    whole = getattr(x, "full_tensor", None)  # the decomposition of a DTensor needs it on every rank
    x = (x if whole is None else whole()).to(torch.float64)
    finite = x.isfinite().flatten(1).all(1)[:, None, None]
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0))
    scaled = values / values.amax(1, keepdim=True)  # squares stay in range
    shares: Tensor = scaled / scaled.square().sum(1, keepdim=True).sqrt()
    return shares


def gap_from_shares(shares: Tensor, n: int) -> Tensor:
    """The orthogonality gap of n samples from :func:`singular_shares`, (b, k) -> (b,): no term cancels."""
    k = shares.shape[1]
    return ((shares.square() - 1 / n).square().sum(1) + (n - k) / n**2).sqrt()


def _positive(value: int, name: str) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{name} needs a positive integer, got {value!r}")


def _assumed(alpha: float, layers: int, n: int, d: int) -> None:
    _positive(n, "n")
    _positive(d, "d")
    if d < n:
        raise InputError(f"d needs a width of at least the {n} samples, got {d}: no singular value could stay above 0")
    if type(layers) is not int or layers < 0:
        raise InputError(f"layers needs an integer of at least 0, got {layers!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= n**-0.5 * (1 + 1e-12):
        raise InputError(f"alpha needs a number in (0, 1 / sqrt(n)], here up to {n**-0.5:.6g}, got {alpha!r}")

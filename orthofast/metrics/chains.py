"""Random networks as Markov chains of representations: with batch normalisation, without, and where they start.

Daneshmand et al. 2021, Eq. 1 and Fig. 1 to 3. A state is (n, d) or (runs, n, d): one sample a row, the transpose of the
paper's H, with Frobenius norm 1 in each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import gram_stats
from orthofast.metrics.coherence import pii_from
from orthofast.metrics.theory import gap_bounds, gap_from_shares, singular_shares
from orthofast.views import Array, as_tensor

Activation: TypeAlias = "Callable[[Tensor], Tensor]"


class ChainTrace(NamedTuple):
    """What :func:`chain_trace` reads off each state; fields are (layers,) float64, or (runs, layers).

    Attributes:
        gap: orthogonality gap V, Eq. 2.
        min_singular: least of the min(n, d) singular values at Frobenius norm 1. Assumption A1(alpha, l) of the paper
            is ``(min_singular[..., :l] >= alpha).all(-1)``; it is at most ``1 / sqrt(n)``.
        pii: mean absolute cosine of the samples; for two of them, what Fig. 1 plots.
    """

    gap: Tensor
    min_singular: Tensor
    pii: Tensor


class GramFluctuation(NamedTuple):
    """What :func:`gram_fluctuation` finds; with runs in front where the chain has them.

    Attributes:
        mean: (n, n), the Gram matrix of the samples averaged over layers, K.
        distance: (), the mean Frobenius distance of one layer's Gram matrix from it, L.
    """

    mean: Tensor
    distance: Tensor


def bn_chain(
    start: Array,
    layers: int,
    *,
    center: bool = False,
    activation: Activation | None = None,
    feature_norm: float = 1.0,
    draw_weights: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """States H_1, H_2, ... of a random network with batch normalisation, one a layer.

    ``H_{l+1} = BN(W_l H_l) / sqrt(d)``, ``BN(M) = diag(M M^T)^(-1/2) M``: every feature is divided by its norm over the
    samples. Entries of W are independent and Gaussian; their variance cancels. Daneshmand et al. 2021, Eq. 1, and for
    other activations Appendix G: ``BN(W f(H))``.

    Given H, the rows of ``W H`` are independent N(0, H^T H), and so are those of ``Z R`` with d x n noise Z and the
    triangular factor R of ``H = Q R``. That takes d n^2 operations a layer instead of d^2 n, with the same law.

    Args:
        start: (n, d) samples, or (runs, n, d) for independent chains from each.
        layers: how many states.
        center: subtract each feature's mean over the samples first, as torch's batch norm does.
        activation: f, elementwise; None for the linear chain of the paper's theorems.
        feature_norm: length of each feature over the samples as f gets it. It does not matter to a linear chain or to a
            ReLU; torch's batch norm makes ``sqrt(n)``, the paper's Appendix G 1.
        draw_weights: draw W itself, d x d a layer. For comparison: the law is the same.
        generator: of the noise, on its own device.

    Yields:
        float64 states of Frobenius norm 1. A feature that is 0 for all samples stays 0.

    Raises:
        InputError: if an argument cannot be used; at the call.

    >>> start = nearly_parallel_start(2, 32)
    >>> noise = torch.Generator().manual_seed(0)
    >>> gap = chain_trace(bn_chain(start, 30, generator=noise)).gap
    >>> gap.shape, gap[0].item() > 0.7, gap[20:].mean().item() < 0.3  # parallel at first, nearly orthogonal in the end
    (torch.Size([30]), True, True)
    """
    h = _state(start, layers)
    if not isinstance(feature_norm, int | float) or not 0 < feature_norm < math.inf:
        raise InputError(f"feature_norm needs a positive number, got {feature_norm!r}")

    def states() -> Iterator[Tensor]:
        now = h
        for _ in range(layers):
            if activation is not None:
                now = activation(now * (feature_norm * math.sqrt(now.shape[-1])))
            now = batch_normalized(_mixed(now, draw_weights, generator), center=center)
            yield now

    return states()


def vanilla_chain(
    start: Array,
    layers: int,
    *,
    activation: Activation | None = None,
    draw_weights: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """States of the same network without batch normalisation: ``H_{l+1} = W_l f(H_l)``.

    Each state is scaled to Frobenius norm 1, without which it would overflow or vanish after some hundred layers; gaps
    and cosines do not see it. The samples align: the gap tends to its maximum. Daneshmand et al. 2021, Fig. 1.

    Args:
        start: as in :func:`bn_chain`, like the arguments not named here.
        layers: how many states.
        activation: f; one with ``f(c h) = c f(h)`` for c > 0, such as a ReLU, for the scaling not to matter.
        draw_weights: draw W itself.
        generator: of the noise.

    Yields:
        float64 states of Frobenius norm 1.

    Raises:
        InputError: if an argument cannot be used; at the call.
    """
    h = _state(start, layers)
    if activation is not None:
        for sign in (1.0, -1.0):
            if not torch.allclose(activation(2 * sign * h), 2 * activation(sign * h), rtol=1e-9, atol=0):
                raise InputError(
                    "activation needs f(2 h) = 2 f(h) in a chain without normalisation, whose states are scaled to "
                    "norm 1 to stay in range; use a ReLU, or bn_chain"
                )

    def states() -> Iterator[Tensor]:
        now = h
        for _ in range(layers):
            now = _mixed(now if activation is None else activation(now), draw_weights, generator)
            now = _unit(now)
            yield now

    return states()


def batch_normalized(h: Tensor, *, center: bool = False) -> Tensor:
    """``BN(M) / sqrt(d)`` of Daneshmand et al. 2021, Eq. 1, with a sample a row: (..., n, d) -> the same.

    Every feature (column) is divided by its norm over the samples, without an epsilon, after its mean is subtracted
    where ``center`` says so. Features of zeros stay zeros; without any, the result has Frobenius norm 1.
    """
    if center:
        h = h - h.mean(-2, keepdim=True)
    largest = h.abs().amax(-2, keepdim=True)
    h = h / torch.where(largest == 0, 1.0, largest)  # squares stay in range
    norms = h.square().sum(-2, keepdim=True).sqrt()
    normalized: Tensor = h / (torch.where(norms == 0, 1.0, norms) * math.sqrt(h.shape[-1]))
    return normalized


def whitened(h: Tensor) -> Tensor:
    """What batch normalisation approximates: ``M^(-1)`` in place of ``diag(M)^(-1)``, with M the features' Gram matrix.

    ``(H H^T)^(-1/2) H``, scaled to Frobenius norm 1: the polar factor of H. Its non-zero singular values are equal, so
    that n independent samples become exactly orthogonal. Daneshmand et al. 2021, the remark under Theorem 1.

    Args:
        h: (..., n, d), a sample a row. Directions below ``max(n, d) eps`` of the largest are taken as absent.

    Returns:
        In h's shape; in its dtype, 16-bit ones as float32.

    Raises:
        InputError: if it is no floating-point tensor of such a shape.

    >>> import orthofast
    >>> h = torch.randn(5, 20, dtype=torch.float64)
    >>> orthofast.orthogonality_gap(h).item() > 0.1, orthofast.orthogonality_gap(whitened(h)).item() < 1e-12
    (True, True)
    """
    if not isinstance(h, Tensor) or not h.dtype.is_floating_point or h.dim() < 2:
        told = f"{h.dtype} {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise InputError(f"h needs a floating-point tensor (..., n, d), got {told}")
    u, s, vh = torch.linalg.svd(h.to(torch.promote_types(h.dtype, torch.float32)), full_matrices=False)
    kept = (s > s[..., :1] * max(h.shape[-2:]) * torch.finfo(s.dtype).eps).to(s.dtype)
    equal = kept / kept.sum(-1, keepdim=True).clamp(min=1).sqrt()
    polar: Tensor = (u * equal.unsqueeze(-2)) @ vh
    return polar


def chain_trace(states: Iterable[Tensor]) -> ChainTrace:
    """Gap, least singular value and mean absolute cosine of each state, along the last dimension of each field.

    Takes any states: of a chain, or the activations of a network layer after layer, each (n, d) or (runs, n, d).

    Raises:
        InputError: if there is none, or one is not of that shape.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    runs: tuple[int, ...] = ()
    for number, state in enumerate(states):
        h = _checked(state, f"states[{number}]")
        runs = runs if found else tuple(h.shape[:-2])
        if tuple(h.shape[:-2]) != runs:
            raise InputError(f"states[{number}] needs runs {runs} as the first state has, got {tuple(h.shape)}")
        h = h if runs else h.unsqueeze(0)
        shares = singular_shares(h)
        cosines = pii_from(gram_stats(h, want=("abs_sum",), precision="float64"))
        found.append((gap_from_shares(shares, h.shape[1]), shares[:, -1], cosines))
    if not found:
        raise InputError("states needs at least one state, got none; a chain can be walked through once only")
    gap, least, cosine = (torch.stack(row, -1) for row in zip(*found, strict=True))
    return ChainTrace(gap, least, cosine) if runs else ChainTrace(gap[0], least[0], cosine[0])


def gram_fluctuation(states: Iterable[Tensor]) -> GramFluctuation:
    """Around which Gram matrix of the samples a chain settles, and how closely.

    ``K = mean_l H_l^T H_l`` and ``L = mean_l |H_l^T H_l - K|_F``: the orthogonality of chains with a non-linear
    activation, whose samples settle at a fixed angle that need not be a right one. L falls as ``1 / sqrt(d)``.
    Daneshmand et al. 2021, Appendix G. Leave out the first layers with ``itertools.islice``.

    Args:
        states: (n, d) or (runs, n, d) each. Kept of each are n x n numbers.

    Raises:
        InputError: if there is none.
    """
    grams = [h @ h.mT for h in states]
    if not grams:
        raise InputError("states needs at least one state, got none; a chain can be walked through once only")
    stacked = torch.stack(grams)
    mean = stacked.mean(0)
    return GramFluctuation(mean, torch.linalg.matrix_norm(stacked - mean).mean(0))


def diagonal_start(n: int, d: int, *, rest: float = 1e-6) -> Tensor:
    """``diag(1, rest, ..., rest)`` as n samples of length d, float64: independent, and of a gap near its maximum.

    Daneshmand et al. 2021, Fig. 2, with rest = 1e-6.

    Raises:
        InputError: if n > d, where the diagonal holds fewer than n entries.
    """
    _sizes(n, d)
    if n > d:
        raise InputError(f"n needs at most d = {d} samples for a diagonal, got {n}")
    h = torch.eye(n, d, dtype=torch.float64) * rest
    h[0, 0] = 1
    return _unit(h)


def nearly_parallel_start(n: int, d: int, *, tilt: float = 1e-3) -> Tensor:
    """Samples ``e_1`` and ``(1 - tilt) e_1 + tilt e_i``, i = 2 to n, (n, d) float64.

    Daneshmand et al. 2021, Fig. 1, with n = 2 and tilt = 0.001. With tilt = 0 the start has rank one, and so has every
    state that follows: assumption A1 fails and the gap stays at its maximum. (In float64 it does for about ten layers;
    then a BN chain has made samples of what rounding left between them.)

    Raises:
        InputError: if n > d, where there are not enough directions.
    """
    _sizes(n, d)
    if n > d:
        raise InputError(f"n needs at most d = {d} samples, one direction each, got {n}")
    h = torch.eye(n, d, dtype=torch.float64) * tilt
    h[:, 0] = 1 - tilt
    h[0, 0] = 1
    return _unit(h)


def samples_with_gap(
    n: int, d: int, gap: float, *, exact: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random samples with a prescribed orthogonality gap, (n, d) float64 of Frobenius norm 1.

    Args:
        n: samples.
        d: their length.
        gap: with ``exact``, V(H) itself, within :func:`orthofast.metrics.gap_bounds`: all singular values are equal but
            one, left and right singular vectors are random. Otherwise the number g in [0, 1 - 1 / d] of the public code
            of Daneshmand et al. 2021: Gaussian samples, one random coordinate times ``1 / d + g``, the others times
            ``1 / d - g / (d - 1)``; V then grows with g, and is not equal to it.
        exact: which of the two.
        generator: of the noise, on its own device.

    Raises:
        InputError: if an argument is outside these ranges.

    >>> import orthofast
    >>> round(orthofast.orthogonality_gap(samples_with_gap(20, 50, 0.3)).item(), 12)
    0.3
    """
    low, high = gap_bounds(n, d)
    if isinstance(gap, bool) or not isinstance(gap, int | float):
        raise InputError(f"gap needs a number, got {gap!r}")
    device = torch.device("cpu") if generator is None else generator.device
    if not exact:
        if not 0 <= gap <= 1 - 1 / d:
            raise InputError(f"gap needs a number from 0 to 1 - 1 / d = {1 - 1 / d:.6g}, got {gap!r}")
        h = torch.randn(n, d, dtype=torch.float64, generator=generator, device=device)
        scale = h.new_full((d,), 1 / d - gap / (d - 1) if d > 1 else 0.0)
        scale[torch.randint(d, (), generator=generator, device=device)] = 1 / d + gap
        return _unit(h * scale)
    if not low <= gap <= high:
        raise InputError(f"gap needs a number from {low:.6g} to {high:.6g} for {n} samples of length {d}, got {gap!r}")
    k = min(n, d)
    away = math.sqrt(max(0.0, (gap**2 - low**2) * (k - 1) / k))  # of the first eigenvalue from 1 / k
    shares = torch.full((k,), 1 / k - (away / (k - 1) if k > 1 else 0.0), dtype=torch.float64, device=device)
    shares[0] = 1 / k + away
    left, right = (_orthonormal(size, k, generator, device) for size in (n, d))
    made: Tensor = (left * shares.clamp(min=0).sqrt()) @ right.T
    return made


def _orthonormal(rows: int, columns: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform among matrices with orthonormal columns: signs fixed by the diagonal of R (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator, device=device))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed


def _mixed(h: Tensor, draw_weights: bool, generator: torch.Generator | None) -> Tensor:
    """``W H`` in law with standard Gaussian W, (..., n, d) -> the same."""
    *runs, n, d = h.shape
    if not draw_weights and n < d:
        h = torch.linalg.qr(h.mT, mode="r").R.mT  # (..., n, n)
    device = h.device if generator is None else generator.device
    noise = torch.randn(*runs, d, h.shape[-1], dtype=h.dtype, generator=generator, device=device)
    mixed: Tensor = h @ noise.to(h.device).mT
    return mixed


def _state(start: Array, layers: int) -> Tensor:
    if type(layers) is not int or layers < 1:
        raise InputError(f"layers needs a positive integer, got {layers!r}")
    h = _checked(as_tensor(start, "start").detach(), "start").to(torch.float64)
    largest = h.abs().amax((-2, -1), keepdim=True) if h.numel() else h.new_zeros(())
    if not bool(((largest > 0) & largest.isfinite()).all()):
        raise InputError("start needs finite values, not all 0 in any run")
    return _unit(h / largest)


def _unit(h: Tensor) -> Tensor:
    """Each run's state at Frobenius norm 1; zeros, such as of a ReLU that no sample passes, stay zeros."""
    norm = torch.linalg.matrix_norm(h, keepdim=True)
    unit: Tensor = h / torch.where(norm == 0, 1.0, norm)
    return unit


def _checked(h: Tensor, name: str) -> Tensor:
    if h.dim() not in (2, 3):
        raise InputError(f"{name} needs shape (n, d) or (runs, n, d), a sample a row, got {tuple(h.shape)}")
    return h


def _sizes(n: int, d: int) -> None:
    gap_bounds(n, d)  # refuses what is no size

"""How far raw dot products are from a multiple of the identity: orthogonality gaps and diagonal dominance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from orthofast.kernels import gram_stats
from orthofast.metrics.answers import answer, needed
from orthofast.records import GramStats
from orthofast.views import Array, as_vectors, dense_vectors


class DiagonalDominance(NamedTuple):
    """Ratios ``sum over j != i of |G_ij| / G_ii`` over the rows i of a Gram matrix without zero vectors.

    Attributes:
        mean: () float64, or (heads,): mean ratio.
        min: smallest ratio.
        max: largest ratio; below 1, the matrix is strictly diagonally dominant.
        dominant_frac: share of rows with a ratio below 1.
    """

    mean: Tensor
    min: Tensor
    max: Tensor
    dominant_frac: Tensor


def orthogonality_gap_from(stats: GramStats, n: int | None = None) -> Tensor:
    """The formula of :func:`orthogonality_gap` on a record of raw dot products with ``sq_sum``, (b,).

    With k folded vectors, D their squared lengths, tr = sum D and S = ``sq_sum``:

    ``V^2 = sum_i (D_i / tr - 1 / n)^2 + 2 S / tr^2 + (n - k) / n^2``

    Every term is non-negative: nothing cancels near 0, as it does in ``||G||^2 / tr^2 - 1 / n``.

    Args:
        stats: the fold of the n vectors (k = n), or of its d features where n > d (k = d): the same V.
        n: number of vectors when the record is of the features.
    """
    square_sum = needed(stats.sq_sum, "orthogonality_gap", "sq_sum")
    diagonal = needed(stats.norm_sq, "orthogonality_gap", "sq_sum")  # (b, k)
    k = diagonal.shape[1]
    n = k if n is None else n
    if n == 0:
        return torch.full_like(square_sum, float("nan"))
    trace = diagonal.sum(1)
    spread = (diagonal / trace.unsqueeze(1) - 1 / n).square().sum(1)
    return (spread + 2 * square_sum / trace.square() + (n - k) / n**2).sqrt()


def orthogonality_gap(
    weight: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Distance of the Gram matrix of n vectors, scaled to trace 1, from the identity, scaled to trace 1.

    ``V = || G / tr(G) - I / n ||_F`` with ``G_ij = <w_i, w_j>``. Daneshmand et al. 2021, Eq. 2, where the vectors are
    the samples of a batch: pass activations as (samples, features), or (features, samples) with vectors="cols".

    Range [0, sqrt(1 - 1 / n)]. 0: orthogonal and of equal length. The maximum: rank one. For n > d not below
    ``sqrt(1 / d - 1 / n)``. Vectors of length 0 count among the n.

    For n > d the d features are folded instead, which gives the same number.

    Args:
        weight: as in :func:`orthofast.pii`, like the arguments not named here.
        vectors: as in :func:`orthofast.pii`.
        heads: as in :func:`orthofast.pii`.
        precision: "auto" is float64 here, to resolve a gap near 0 and because raw products have no natural scale;
            "highest" and "high" fold float32 in float32, with squares of dot products within 1e-38 to 1e38.
        backend: as in :func:`orthofast.pii`.

    Returns:
        () float64, or (heads,). 0 for one vector; NaN without any, where all are zero, or with NaN or Inf among them.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> orthogonality_gap(3 * torch.eye(4)), orthogonality_gap(torch.ones(4, 2))  # sqrt(1 - 1 / 4)
    (tensor(0., dtype=torch.float64), tensor(0.8660, dtype=torch.float64))
    """
    x = _in_range(as_vectors(weight, vectors, heads))
    _, n, d = x.shape
    smaller = x.transpose(1, 2) if n > d else x
    return answer(orthogonality_gap_from(_fold_raw(smaller, ("sq_sum",), precision, backend), n), vectors)


def singular_value_gap_from(values: Tensor) -> Tensor:
    """The formula of :func:`singular_value_gap` on singular values, (b, k) -> (b,)."""
    if values.shape[1] == 0:
        return values.new_full((len(values),), float("nan"))
    scaled = values / values.amax(1, keepdim=True)  # squares stay in range
    unit = scaled / scaled.square().sum(1, keepdim=True).sqrt()
    away: Tensor = unit - float(values.shape[1]) ** -0.5
    return away.square().sum(1).sqrt()


def singular_value_gap(weight: Array, *, vectors: str = "rows", heads: int | None = None) -> Tensor:
    """Distance of a matrix's singular values, scaled to length 1, from all equal.

    ``| s / |s| - 1 / sqrt(k) |_2`` with the k = min(n, d) singular values s; its square is
    ``2 (1 - sum(s) / (|s| sqrt(k)))``. What the training experiments of Daneshmand et al. 2021, Section 5, record
    of the logits of each batch in their public code, in place of Eq. 2.

    Range [0, sqrt(2 - 2 / sqrt(k))]. 0: orthogonal and of equal length on the smaller side. The maximum: rank one.

    A float64 singular value decomposition: O(n d k) operations, a float64 copy of the weight, no backend.

    Returns:
        () float64, or (heads,). NaN for an empty or zero matrix, or with NaN or Inf in it. Detached.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> [round(singular_value_gap(matrix).item(), 6) for matrix in (torch.eye(4), torch.ones(4, 4))]
    [0.0, 1.0]
    """
    x = dense_vectors(weight, vectors, heads).detach()
    whole = getattr(x, "full_tensor", None)  # the decomposition of a DTensor needs it on every rank
    x = (x if whole is None else whole()).to(torch.float64)
    finite = x.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0))  # a matrix of zeros comes out as NaN
    return answer(singular_value_gap_from(values), vectors)


def diagonal_dominance_from(stats: GramStats) -> DiagonalDominance:
    """The formula of :func:`diagonal_dominance` on a record of raw dot products with ``row_abs``; fields are (b,)."""
    off_diagonal = needed(stats.row_abs, "diagonal_dominance", "row_abs")  # (b, n)
    diagonal = needed(stats.norm_sq, "diagonal_dominance", "row_abs")
    if diagonal.shape[1] == 0:
        nothing = diagonal.new_full((len(diagonal),), float("nan"))
        return DiagonalDominance(nothing, nothing, nothing, nothing)
    kept = diagonal != 0
    count = kept.sum(1)
    ratio = off_diagonal / torch.where(kept, diagonal, 1.0)  # zero vectors: 0

    def known(value: Tensor) -> Tensor:
        return torch.where((count < 2) | ratio.isnan().any(1), float("nan"), value)

    return DiagonalDominance(
        mean=known(ratio.sum(1) / count),
        min=known(torch.where(kept, ratio, float("inf")).amin(1)),
        max=known(ratio.amax(1)),
        dominant_frac=known((kept & (ratio < 1)).sum(1) / count.to(torch.float64)),
    )


def diagonal_dominance(
    weight: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> DiagonalDominance:
    """How far each vector's own squared length outweighs its dot products with all others.

    ``r_i = sum over j != i of |<w_i, w_j>| / |w_i|^2``; strict diagonal dominance of the Gram matrix is r_i < 1 for all
    i, as Lu et al. 2024 suppose it of Fig. 1. Equally long vectors have a mean ratio of ``(n - 1) PII``, so untrained
    ones are dominant only while ``n - 1 < 1 / isotropic_baseline(d)``.

    Range [0, inf). 0: orthogonal. Below 1: dominant. Vectors of length 0 are left out. Arguments and errors as in
    :func:`orthogonality_gap`.

    Returns:
        :class:`DiagonalDominance`; NaN with fewer than two non-zero vectors, or with NaN or Inf among them.

    >>> import torch
    >>> [value.item() for value in diagonal_dominance(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))]
    [0.75, 0.5, 1.0, 0.5]
    """
    stats = _fold_raw(as_vectors(weight, vectors, heads), ("row_abs",), precision, backend)
    mean, least, most, dominant_frac = diagonal_dominance_from(stats)
    return DiagonalDominance(*(answer(value, vectors) for value in (mean, least, most, dominant_frac)))


def _in_range(x: Tensor) -> Tensor:
    """Float64 vectors (b, n, d) times a power of two each item: fourth powers then neither overflow nor vanish."""
    if getattr(x, "dtype", None) != torch.float64 or x.numel() == 0 or hasattr(x, "full_tensor"):
        return x  # narrower types, block-scaled ones too, stay in float64's range
    largest = x.detach().abs().amax((1, 2), keepdim=True)
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent.clamp(-1000, 1000)
    return x.detach() * torch.float_power(2.0, -exponent)


def _fold_raw(x: Tensor, want: Iterable[str], precision: str, backend: str | None) -> GramStats:
    """The record of raw dot products of (b, n, d)."""
    precision = "float64" if precision == "auto" else precision
    return gram_stats(x, normalize=False, want=want, precision=precision, backend=backend)

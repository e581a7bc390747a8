"""The matrices the other measures never store: all dot products, and all cosines, for pictures of small weights."""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.answers import answer
from orthofast.views import Array, dense_vectors

LIMIT = 4096  # vectors: 128 MiB of float64


def gram_matrix(weight: Array, *, vectors: str = "rows", heads: int | None = None, limit: int = LIMIT) -> Tensor:
    """All dot products of a weight's vectors, ``G_ij = <w_i, w_j>``.

    What Lu et al. 2024 draw in Fig. 1 and 2: ``W W^T`` for rows, ``W^T W`` for columns. Measures of it that need no
    such matrix: :func:`orthofast.diagonal_dominance`, :func:`orthofast.orthogonality_gap`.

    Args:
        weight: as in :func:`orthofast.pii`, like the arguments not named here.
        vectors: as in :func:`orthofast.pii`.
        heads: as in :func:`orthofast.pii`.
        limit: the largest number of vectors, whose square is stored.

    Returns:
        (n, n) float64, or (heads, n, n). Detached.

    Raises:
        InputError: if an argument cannot be used, or there are more vectors than ``limit``.

    >>> import torch
    >>> gram_matrix(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([[25.,  8.],
            [ 8.,  4.]], dtype=torch.float64)
    """
    x = _small(weight, vectors, heads, limit)
    return answer(x @ x.mT, vectors)


def cosine_matrix(weight: Array, *, vectors: str = "rows", heads: int | None = None, limit: int = LIMIT) -> Tensor:
    """All cosines of a weight's vectors; their off-diagonal absolute mean is :func:`orthofast.pii`.

    Lu et al. 2024, Fig. 1 and 2 (which show absolute values). Arguments and errors as in :func:`gram_matrix`.

    Returns:
        (n, n) float64 in [-1, 1], or (heads, n, n); the diagonal is 1. NaN in rows and columns of zero vectors, which
        have no angle, and of vectors with NaN or Inf. Detached.

    >>> import torch
    >>> cosine_matrix(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([[1.0000, 0.8000],
            [0.8000, 1.0000]], dtype=torch.float64)
    """
    x = _small(weight, vectors, heads, limit)
    largest = x.abs().amax(2, keepdim=True) if x.shape[2] else x.new_zeros(*x.shape[:2], 1)
    unit = x / largest  # squares stay in range; 0 / 0 is NaN
    unit = unit / unit.square().sum(2, keepdim=True).sqrt()
    cosines = (unit @ unit.mT).clamp(-1, 1)
    known = unit.isfinite().all(2) & (largest[:, :, 0] > 0)
    cosines = torch.where(known[:, :, None] & known[:, None, :], cosines, float("nan"))
    torch.diagonal(cosines, dim1=1, dim2=2).copy_(torch.where(known, 1.0, float("nan")))
    return answer(cosines, vectors)


def _small(weight: Array, vectors: str, heads: int | None, limit: int) -> Tensor:
    """The vectors in float64, (b, n, d), if there are few enough."""
    if type(limit) is not int or limit < 1:
        raise InputError(f"limit needs a positive integer, got {limit!r}")
    x = dense_vectors(weight, vectors, heads).detach()
    b, n, _ = x.shape
    if n > limit:
        raise InputError(
            f"weight has {n} vectors, whose matrix takes {b * n * n * 8 / 1e6:.0f} MB, and limit is {limit}; "
            "pass a part of it or raise limit="
        )
    whole = getattr(x, "full_tensor", None)
    return (x if whole is None else whole()).to(torch.float64)

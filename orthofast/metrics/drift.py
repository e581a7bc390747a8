"""Conformal drift: how far training has turned the angles between a layer's vectors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels.drift import drift_stats
from orthofast.metrics.answers import answer
from orthofast.records import DriftStats
from orthofast.views import Array, as_vectors


class ConformalDrift(NamedTuple):
    """Mean change of the cosine of a pair between two versions of a matrix.

    Attributes:
        absolute: () float64, or (heads,): mean of abs(abs(cos before) - abs(cos after)), range [0, 1].
        signed: the same of abs(cos before - cos after), range [0, 2]; not below ``absolute``.
    """

    absolute: Tensor
    signed: Tensor


def conformal_drift_from(stats: DriftStats) -> ConformalDrift:
    """The formula of :func:`conformal_drift` on a record of two versions: sums over pairs, (b,)."""
    return ConformalDrift(
        (stats.abs_change / stats.pairs).clamp_max_(1),  # sums of rounded cosines may pass their range by 1e-16
        (stats.change / stats.pairs).clamp_max_(2),
    )


def conformal_drift(
    before: Array,
    after: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> ConformalDrift:
    """How far the angles between a weight's vectors moved between two versions of it, pair by pair.

    ``absolute = 2 / (n (n - 1)) * sum over i < j of | |cos(v_i, v_j)| - |cos(w_i, w_j)| |`` and, without the inner
    absolute values, ``signed``; v before, w after. A conformal update leaves every angle as it was and gives 0.

    Range [0, 1] for ``absolute``, [0, 2] for ``signed``. 0: no pair changed its |cos|, or its cosine. What Theorem 2 of
    Lu et al. 2024 speaks about (the conformal capability of an optimiser), measured on the pairs themselves: the
    paper's tables show the difference of two PII values, which is never larger than ``absolute`` and is 0 where pairs
    change in opposite directions. Lengths play no part. One pass over both versions; no n x n matrix is stored.

    Args:
        before: (out, in) or (out, in, *kernel); a tensor or numpy array of any float dtype and any strides.
        after: the same weight later, on the same device; its dtype may differ.
        vectors: "rows", "cols", "heads", "filters" or "center_tap", see :func:`orthofast.views.as_vectors`.
        heads: number of equal blocks of rows, with vectors="heads" only.
        precision: "auto", "highest", "high" (no faster here) or "float64".
        backend: obeyed or refused; None takes the fastest that can serve.

    Returns:
        :class:`ConformalDrift`, on the weights' device, never waited for. NaN with fewer than two vectors that are
        non-zero in both versions, or where a vector holds NaN or Inf. Detached.

    Raises:
        InputError: if an argument cannot be used, or the two differ in shape or device.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> drift = conformal_drift(torch.eye(3), 5 * torch.eye(3))  # lengths play no part
    >>> drift.absolute.item(), drift.signed.item()
    (0.0, 0.0)
    >>> turned = conformal_drift(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [-0.6, 0.8]]))
    >>> [round(value.item(), 6) for value in turned]
    [0.0, 1.2]
    """
    x, y = as_vectors(before, vectors, heads), as_vectors(after, vectors, heads)
    if x.shape != y.shape:
        raise InputError(
            f"after needs the shape of before, got {tuple(after.shape)} against {tuple(before.shape)}; "
            "compare two versions of one weight"
        )
    found = conformal_drift_from(drift_stats(x, y, precision=precision, backend=backend))
    return ConformalDrift(answer(found.absolute, vectors), answer(found.signed, vectors))

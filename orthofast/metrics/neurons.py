"""Dying and full neurons: those that fire for none, or for all, of the examples seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthofast.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class FiringCounts:
    """How often each of n neurons fired; records of disjoint examples merge by addition.

    Attributes:
        fired: (n,) int64, examples (or positions) with an activation above 0.
        examples: () int64, how many were seen.
        nonfinite: () int64, activations that were NaN or Inf.
    """

    fired: Tensor
    examples: Tensor
    nonfinite: Tensor


def firing_counts(activations: Tensor, dim: int = -1) -> FiringCounts:
    """Count activations above 0 per neuron, over all other dimensions.

    Args:
        activations: outputs of a ReLU, or what is fed into it: both are above 0 for the same neurons.
        dim: the dimension the neurons lie along; 1 for convolutions.

    Raises:
        InputError: if it is no floating-point tensor with such a dimension.
    """
    if not isinstance(activations, Tensor) or not activations.dtype.is_floating_point:
        raise InputError(f"activations needs a floating-point tensor, got {type(activations).__name__}")
    if not -activations.dim() <= dim < activations.dim():
        raise InputError(f"dim needs a dimension of activations, shape {tuple(activations.shape)}, got {dim}")
    x = activations.detach()
    rest = [axis for axis in range(x.dim()) if axis != dim % x.dim()]
    above = x > 0
    fired = above.sum(rest) if rest else above.long()
    return FiringCounts(
        fired=fired,
        examples=torch.full((), x.numel() // max(1, len(fired)), dtype=torch.int64, device=x.device),
        nonfinite=(~x.isfinite()).sum(),
    )


def merge_counts(records: Sequence[FiringCounts]) -> FiringCounts:
    """The record of all examples together.

    Raises:
        InputError: if there is none, or the neurons differ in number.
    """
    if len({record.fired.shape for record in records}) != 1:
        raise InputError(f"merge_counts needs records of the same neurons, got {[len(r.fired) for r in records]}")
    first, *others = records
    fired, examples, nonfinite = first.fired, first.examples, first.nonfinite
    for record in others:
        fired, examples = fired + record.fired, examples + record.examples
        nonfinite = nonfinite + record.nonfinite
    return FiringCounts(fired, examples, nonfinite)


def dying_frac(counts: FiringCounts) -> Tensor:
    """Share of neurons that fired for no example: their output is 0 and so is every gradient through them.

    Range [0, 1], () float64. Huang et al. 2020, Section 4.2, "dying neurons". NaN without examples or neurons, or
    where an activation was NaN or Inf.

    >>> import torch
    >>> dying_frac(firing_counts(torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]])))
    tensor(0.3333, dtype=torch.float64)
    """
    return _known(counts, (counts.fired == 0).to(torch.float64).mean())


def full_frac(counts: FiringCounts) -> Tensor:
    """Share of neurons that fired for every example: to these, the nonlinearity was none.

    Range [0, 1], () float64. Huang et al. 2020, Section 4.2, "full neurons". NaN as in :func:`dying_frac`.

    >>> import torch
    >>> full_frac(firing_counts(torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]])))
    tensor(0.3333, dtype=torch.float64)
    """
    return _known(counts, (counts.fired == counts.examples).to(torch.float64).mean())


def _known(counts: FiringCounts, frac: Tensor) -> Tensor:
    return torch.where((counts.nonfinite > 0) | (counts.examples == 0), float("nan"), frac)

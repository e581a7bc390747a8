"""TorchMetrics: metrics that add up over batches and processes, from the same folds as the functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthofast.errors import InputError, MissingPackageError

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingPackageError(f"{__name__} needs the package torchmetrics; pip install torchmetrics") from error

from orthofast.kernels import gram_stats
from orthofast.metrics import max_coherence, orthogonality_gap
from orthofast.metrics.neurons import FiringCounts, dying_frac, firing_counts, full_frac
from orthofast.views import as_vectors


class _OfPairs(Metric):
    """A mean over pairs; pairs of all updates and processes count alike, and only within one update.

    Args:
        vectors: which slices of an update are compared: "rows" or "cols", see :func:`orthofast.pii`.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    total: Tensor
    pairs: Tensor
    _field: str

    def __init__(self, vectors: str = "rows", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vectors = vectors
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Fold the pairs of one set of vectors.

        Args:
            x: (n, d) vectors; a weight, or the representations of a batch.
        """
        record = gram_stats(as_vectors(x, self.vectors).detach(), want=(self._field,))
        self.total = self.total + getattr(record, self._field)[0]
        self.pairs = self.pairs + record.pairs[0]

    def compute(self) -> Tensor:
        """The mean over all pairs so far, () float64; NaN without any."""
        return (self.total / self.pairs).clamp_max(1)


class MeanAbsCosine(_OfPairs):
    """:func:`orthofast.pii` over updates: mean |cos| of all pairs within each.

    >>> metric = MeanAbsCosine()
    >>> metric.update(torch.eye(3))
    >>> metric.update(torch.ones(3, 3))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    _field = "abs_sum"


class MeanSquaredCosine(_OfPairs):
    """:func:`orthofast.metrics.mean_squared_cosine` over updates."""

    _field = "sq_sum"


class MaxCoherence(Metric):
    """:func:`orthofast.max_coherence` over updates: the largest |cos| within any of them; NaN where one held NaN.

    Args:
        vectors: which slices of an update are compared.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    largest: Tensor

    def __init__(self, vectors: str = "rows", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vectors = vectors
        self.add_state("largest", torch.full((), -1.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, x: Tensor) -> None:
        """Fold the pairs of one set of vectors, (n, d)."""
        self.largest = torch.maximum(self.largest, max_coherence(x.detach(), vectors=self.vectors).value)

    def compute(self) -> Tensor:
        """() float64; NaN before any update."""
        return torch.where(self.largest < 0, torch.full_like(self.largest, float("nan")), self.largest)


class OrthogonalityGap(Metric):
    """:func:`orthofast.orthogonality_gap` of each update's representations, averaged over updates and processes.

    Args:
        vectors: "rows" where an update is (samples, features), "cols" for (features, samples).
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    total: Tensor
    updates: Tensor

    def __init__(self, vectors: str = "rows", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vectors = vectors
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Take one batch of representations."""
        self.total = self.total + orthogonality_gap(x.detach(), vectors=self.vectors)
        self.updates = self.updates + 1

    def compute(self) -> Tensor:
        """() float64; NaN before any update."""
        return self.total / self.updates


class _OfNeurons(Metric):
    """A share of neurons by how often they fired over all updates and processes.

    Args:
        num_neurons: of the layer.
        dim: along which dimension of an update they lie; 1 for convolutions.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        InputError: if ``num_neurons`` is no positive integer, or an update has another number.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    fired: Tensor
    examples: Tensor
    nonfinite: Tensor

    def __init__(self, num_neurons: int, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if type(num_neurons) is not int or num_neurons < 1:
            raise InputError(f"num_neurons needs a positive integer, got {num_neurons!r}")
        self.num_neurons, self.dim = num_neurons, dim
        self.add_state("fired", torch.zeros(num_neurons, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, activations: Tensor) -> None:
        """Count activations above 0 per neuron."""
        counts = firing_counts(activations, self.dim)
        if len(counts.fired) != self.num_neurons:
            raise InputError(
                f"activations needs {self.num_neurons} neurons along dim {self.dim}, "
                f"got shape {tuple(activations.shape)}"
            )
        self.fired = self.fired + counts.fired
        self.examples = self.examples + counts.examples
        self.nonfinite = self.nonfinite + counts.nonfinite

    @property
    def counts(self) -> FiringCounts:
        """The record so far."""
        return FiringCounts(self.fired, self.examples, self.nonfinite)


class DyingNeurons(_OfNeurons):
    """Share of neurons that fired for none of the examples, :func:`orthofast.metrics.neurons.dying_frac`."""

    def compute(self) -> Tensor:
        """() float64; NaN before any update."""
        return dying_frac(self.counts)


class FullNeurons(_OfNeurons):
    """Share of neurons that fired for all of the examples, :func:`orthofast.metrics.neurons.full_frac`."""

    def compute(self) -> Tensor:
        """() float64; NaN before any update."""
        return full_frac(self.counts)

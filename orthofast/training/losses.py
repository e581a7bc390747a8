"""Orthogonality penalties for training: functions of a tensor or a whole model, and modules bound to a model's layers.

=======================  ====================================================  ================================
function                 of the rows x_i of X, (n, d)                          from
=======================  ====================================================  ================================
pii_loss                 mean over i < j of abs cos(x_i, x_j)                  Lu et al. 2024, Eq. 6
frame_potential_loss     mean over i < j of cos(x_i, x_j)^2                    Benedetto and Fickus 2003
soft_orthogonality_loss  F(X X^T - I); double adds F(X^T X - I)                Bansal et al. 2018, Sections 3.1, 3.2
mutual_coherence_loss    max abs (X X^T - I), entry by entry                   Bansal et al. 2018, Section 3.3
srip.SRIP                spectral norm of X X^T - I, on the smaller side       Bansal et al. 2018, Section 3.4
conv_orthogonality_loss  F(conv(K, K) - delta)                                 Wang et al. 2020, Section 3.2
=======================  ====================================================  ================================

F is the squared Frobenius norm. Each is summed over the layers of a model and multiplied by ``weight``. Values are 0-d,
float32 (float64 for float64 weights), on the weights' device. ``add_penalty_grad_`` makes the gradients alone, with no
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.kernels import Sample, mean_abs_cosine
from orthofast.training import accumulate
from orthofast.training.accumulate import Term
from orthofast.training.conv_orthogonality import (
    CONVOLUTIONS,
    Geometry,
    conv_orthogonality,
    conv_orthogonality_gradient,
)
from orthofast.training.layers import Layer, Select, Skipped, Source, find_layers
from orthofast.training.penalties import PENALTIES, Penalty, pair_penalty
from orthofast.views import as_vectors

Target: TypeAlias = "Tensor | Source"
CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pii_loss(
    source: Target,
    *,
    weight: float = 1.0,
    select: Select = None,
    vectors: str = "rows",
    smooth: str | None = None,
    width: float = 0.01,
    sample: int | Sample | None = None,
) -> Tensor:
    """The Parameters Independence Index as a penalty: ``weight`` times the mean |cos| of all pairs, summed over layers.

    ``2 / (n (n - 1)) * sum over i < j of |<w_i, w_j>| / (|w_i| |w_j|)`` (Lu et al. 2024, Definition 1, Eq. 6). Value
    and gradient come from one sweep over tiles; no n x n matrix is stored. Between 0 and ``weight`` per layer; no set
    of n > d vectors reaches 0. It does not change when vectors change length.

    Args:
        source: a weight (out, in) or (out, in, *kernel); or a model, or an iterable of layers, as in
            :func:`orthofast.training.find_layers`.
        weight: what the sum is multiplied by.
        select: of a model's layers, which; as in :func:`orthofast.training.find_layers`.
        vectors: of a single tensor, which of its slices, as in :func:`orthofast.views.as_vectors`.
        smooth: None, "huber" or "sqrt": round the kink of |cos| at 0 off.
        width: the |cos| below which it is rounded.
        sample: estimate from about this many random pairs of each layer; an int, or a
            :class:`orthofast.kernels.Sample`. Give another seed each step.

    Returns:
        (), differentiable once. 0 for layers without a pair; NaN where a weight holds NaN or Inf.

    Raises:
        InputError: if an argument cannot be used, or a model holds nothing that can be measured.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> loss = pii_loss(model, weight=0.1)
    >>> loss.backward()
    >>> [parameter.grad is not None for parameter in model.parameters()]
    [True, False, True, False]
    """
    mean = partial(mean_abs_cosine, smooth=smooth, width=width, sample=sample)
    return _vector_loss(source, pair_penalty(mean), weight, select, vectors)


def frame_potential_loss(
    source: Target, *, weight: float = 1.0, select: Select = None, vectors: str = "rows"
) -> Tensor:
    """``weight`` times the mean squared cosine over all pairs, summed over layers.

    ``2 / (n (n - 1)) * sum over i < j of cos(w_i, w_j)^2``: the frame potential of the unit vectors (Benedetto and
    Fickus 2003) without its constant n, per pair. At least the Welch bound, reached exactly by tight frames. Smooth,
    and for many short vectors it costs a d x d Gram matrix: the choice for embeddings.

    Arguments, result and errors as in :func:`pii_loss`.

    >>> import torch
    >>> frame_potential_loss(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor(0.5000)
    """
    return _vector_loss(source, PENALTIES["frame_potential"], weight, select, vectors)


def soft_orthogonality_loss(
    source: Target, *, double: bool = False, weight: float = 1.0, select: Select = None, vectors: str = "rows"
) -> Tensor:
    """``weight * ||W W^T - I||_F^2``, and with ``double`` also ``||W^T W - I||_F^2``, summed over layers.

    Bansal et al. 2018, Sections 3.1 and 3.2. Rows are drawn to right angles and to length 1. Formed once, on the
    smaller side: the other's value differs by the constant |n - d|, which is added, and has the same gradient.

    Args:
        source: as in :func:`pii_loss`, like the arguments not named here.
        double: penalise both sides.
        weight: as in :func:`pii_loss`.
        select: as in :func:`pii_loss`.
        vectors: as in :func:`pii_loss`.

    >>> import torch
    >>> soft_orthogonality_loss(2 * torch.eye(3)), soft_orthogonality_loss(torch.eye(3, 2), double=True)
    (tensor(27.), tensor(1.))
    """
    name = "double_soft_orthogonality" if double else "soft_orthogonality"
    return _vector_loss(source, PENALTIES[name], weight, select, vectors)


def mutual_coherence_loss(
    source: Target, *, normalize: bool = False, weight: float = 1.0, select: Select = None, vectors: str = "rows"
) -> Tensor:
    """``weight`` times the largest entry of ``|W W^T - I|``, summed over layers; one pair of rows gets a gradient.

    Bansal et al. 2018, Section 3.3. The fold finds the pair; no n x n matrix is stored.

    Args:
        source: as in :func:`pii_loss`, like the arguments not named here.
        normalize: the largest |cos| instead, whatever the lengths.
        weight: as in :func:`pii_loss`.
        select: as in :func:`pii_loss`.
        vectors: as in :func:`pii_loss`.

    >>> import torch
    >>> mutual_coherence_loss(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    tensor(0.6000)
    """
    return _vector_loss(
        source, PENALTIES["max_abs_cosine" if normalize else "mutual_coherence"], weight, select, vectors
    )


def conv_orthogonality_loss(
    source: Target,
    *,
    flattened: bool = False,
    geometry: Geometry | None = None,
    weight: float = 1.0,
    select: Select = None,
) -> Tensor:
    """``weight * ||conv(K, K) - delta||_F^2``, summed over a model's convolutions: the convolution itself orthogonal.

    Wang et al. 2020, Orthogonal Convolutional Neural Networks, Section 3.2. Filters are correlated at every shift their
    stride allows, so that the rows of the convolution as a matrix come orthonormal; where only the flattened filters
    are, they need not be. With stride 1 it is computed on the smaller side of channels, and the constant added.

    Args:
        source: a kernel (out, in / groups, *size) of 1 to 3 dimensions; or a model, whose Conv1d to Conv3d count.
        flattened: flattened kernels instead: :func:`soft_orthogonality_loss` of the same layers.
        geometry: stride, dilation and groups of a kernel given by itself; of a model's layers they are known.
        weight: as in :func:`pii_loss`.
        select: as in :func:`pii_loss`.

    Returns:
        (), differentiable.

    Raises:
        InputError: if an argument cannot be used, or a model holds no convolution.

    >>> import torch
    >>> kernel = torch.nn.init.dirac_(torch.empty(3, 3, 5, 5))
    >>> conv_orthogonality_loss(kernel)
    tensor(0.)
    """
    if isinstance(source, Tensor):
        terms = [_kernel_term(Layer.of_tensor(source), flattened, geometry)]
    elif geometry is not None:
        raise InputError("geometry= needs a single kernel; the layers of a model know their own")
    else:
        terms = _conv_terms(source, select, flattened)[0]
    return accumulate.total(terms, checked_weight(weight))


def add_penalty_grad_(
    params: Source,
    penalty: str | Penalty = "mean_abs_cosine",
    *,
    weight: float = 1.0,
    select: Select = None,
) -> Tensor:
    """Add ``weight`` times a penalty's gradient to ``.grad`` of the parameters: no graph, one call for all layers.

    Call it between ``backward()`` and ``optimizer.step()``, after gradients were unscaled; before clipping or after it,
    as the penalty shall be clipped or not. (The public code of Brock et al. 2019 writes its gradient directly, too.)
    Layers of one shape are handled together, parameters that need no gradient left out, a missing ``.grad`` is made.

    Args:
        params: a model, or an iterable of modules, parameters or (name, parameter) pairs, as in
            :func:`orthofast.training.find_layers`.
        penalty: "mean_abs_cosine", "frame_potential", "soft_orthogonality", "double_soft_orthogonality",
            "mutual_coherence", "max_abs_cosine" or "conv_orthogonality"; or a ``Penalty`` of your own. SRIP, which
            keeps state, has its own ``add_grad_``.
        weight: what the gradient is multiplied by.
        select: which layers, as in :func:`orthofast.training.find_layers`.

    Returns:
        (), ``weight`` times the penalty, detached.

    Raises:
        InputError: if an argument cannot be used, nothing is left to penalise, or a weight is computed by a
            parametrisation and so has no ``.grad``.

    >>> import torch
    >>> model = torch.nn.Linear(3, 4)
    >>> add_penalty_grad_(model, "soft_orthogonality", weight=0.5).requires_grad, model.weight.grad.shape
    (False, torch.Size([4, 3]))
    """
    if penalty == "conv_orthogonality":
        terms = _conv_terms(params, select, flattened=False)[0]
    else:
        terms = _vector_terms(params, select, _named(penalty))[0]
    return accumulate.add_grad_(terms, checked_weight(weight))


class OrthogonalityPenalty(nn.Module):
    """A penalty bound to the layers of a model: ``forward()`` is the weighted sum, ``add_grad_()`` adds its gradient.

    The layers are looked up once, so a step pays for the penalty alone; the module holds no parameters of its own, and
    its ``state_dict`` does not repeat the model's.

    Attributes:
        layers: names of the layers penalised.
        skipped: what was left out, and why.
        weight: what the sum is multiplied by; may be changed at any time.
    """

    def __init__(self, terms: list[Term], skipped: Iterable[Skipped], weight: float) -> None:
        super().__init__()
        self._terms = tuple(terms)
        self.layers = tuple(term.layer.name for term in terms)
        self.skipped = tuple(skipped)
        self.weight = checked_weight(weight)

    def forward(self) -> Tensor:
        """The penalty, (), differentiable."""
        return accumulate.total(self._terms, self.weight)

    def add_grad_(self) -> Tensor:
        """Add the penalty's gradient to ``.grad`` of the layers, as :func:`add_penalty_grad_` does."""
        return accumulate.add_grad_(self._terms, self.weight)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"layers={len(self.layers)}, weight={self.weight}"


class MeanAbsCosine(OrthogonalityPenalty):
    """:func:`pii_loss` bound to a model.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    >>> penalty = MeanAbsCosine(model, weight=0.01)
    >>> penalty
    MeanAbsCosine(layers=2, weight=0.01)
    >>> penalty().backward()
    """

    def __init__(
        self,
        source: Source,
        *,
        weight: float = 1.0,
        select: Select = None,
        smooth: str | None = None,
        width: float = 0.01,
        sample: int | Sample | None = None,
    ) -> None:
        mean = partial(mean_abs_cosine, smooth=smooth, width=width, sample=sample)
        super().__init__(*_vector_terms(source, select, pair_penalty(mean)), weight)


class FramePotential(OrthogonalityPenalty):
    """:func:`frame_potential_loss` bound to a model."""

    def __init__(self, source: Source, *, weight: float = 1.0, select: Select = None) -> None:
        super().__init__(*_vector_terms(source, select, PENALTIES["frame_potential"]), weight)


class SoftOrthogonality(OrthogonalityPenalty):
    """:func:`soft_orthogonality_loss` bound to a model, of one side or of both."""

    def __init__(self, source: Source, *, double: bool = False, weight: float = 1.0, select: Select = None) -> None:
        name = "double_soft_orthogonality" if double else "soft_orthogonality"
        super().__init__(*_vector_terms(source, select, PENALTIES[name]), weight)


class MutualCoherence(OrthogonalityPenalty):
    """:func:`mutual_coherence_loss` bound to a model."""

    def __init__(self, source: Source, *, normalize: bool = False, weight: float = 1.0, select: Select = None) -> None:
        name = "max_abs_cosine" if normalize else "mutual_coherence"
        super().__init__(*_vector_terms(source, select, PENALTIES[name]), weight)


class ConvOrthogonality(OrthogonalityPenalty):
    """:func:`conv_orthogonality_loss` bound to a model."""

    def __init__(self, source: Source, *, flattened: bool = False, weight: float = 1.0, select: Select = None) -> None:
        super().__init__(*_conv_terms(source, select, flattened), weight)


def checked_weight(weight: float) -> float:
    """The factor of a penalty.

    Raises:
        InputError: if it is no finite number.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"weight needs a finite number, the factor of the penalty, got {weight!r}")
    return float(weight)


def found_in(
    source: Source, select: Select, kinds: tuple[type[nn.Module], ...] = ()
) -> tuple[list[Layer], list[Skipped]]:
    """The layers of a source, at least one; of these module types only, where some are named.

    Raises:
        InputError: if there are none.
    """
    found, skipped = find_layers(source, select)
    kept = [layer for layer in found if not kinds or isinstance(layer.module, kinds)]
    if not kept:
        wanted = ", ".join(kind.__name__ for kind in kinds) or "layers with vectors to compare"
        first = f"; {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise InputError(f"source needs {wanted}, got none{first}")
    return kept, list(skipped)


def _named(penalty: str | Penalty) -> Penalty:
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        raise InputError(
            f"penalty needs one of {', '.join(PENALTIES)}, conv_orthogonality, or a Penalty, got {penalty!r}"
        )
    return PENALTIES[penalty]


def _vector_terms(source: Source, select: Select, penalty: Penalty) -> tuple[list[Term], list[Skipped]]:
    found, skipped = found_in(source, select)
    return [Term(layer, penalty) for layer in found], skipped


def _vector_loss(source: Target, penalty: Penalty, weight: float, select: Select, vectors: str) -> Tensor:
    weight = checked_weight(weight)
    if isinstance(source, Tensor):
        if select is not None:
            raise InputError("select= chooses among the layers of a model; a single tensor has none")
        return penalty.value(as_vectors(source, vectors)).squeeze(0) * weight
    if vectors != "rows":
        raise InputError(f"vectors={vectors!r} needs a single tensor; the layers of a model know their orientation")
    return accumulate.total(_vector_terms(source, select, penalty)[0], weight)


def _conv_terms(source: Source, select: Select, flattened: bool) -> tuple[list[Term], list[Skipped]]:
    found, skipped = found_in(source, select, CONV_TYPES)
    return [_kernel_term(layer, flattened, None) for layer in found], skipped


def _kernel_term(layer: Layer, flattened: bool, geometry: Geometry | None) -> Term:
    kernel = layer.parameter
    if kernel.dim() not in CONVOLUTIONS:
        raise InputError(
            f"a convolution's kernel has 3 to 5 dimensions, (out, in / groups, *size), got shape {tuple(kernel.shape)}"
        )
    if flattened:
        return Term(layer, PENALTIES["soft_orthogonality"])
    module, once = layer.module, (1,) * (kernel.dim() - 2)
    if isinstance(module, CONV_TYPES):
        geometry = Geometry(tuple(module.stride), tuple(module.dilation), module.groups)
    used = geometry or Geometry(once, once)
    _check(used, kernel)
    value: Callable[[Tensor], Tensor] = partial(conv_orthogonality, geometry=used)
    return Term(layer, Penalty(value, partial(conv_orthogonality_gradient, geometry=used)), stored=True)


def _check(geometry: Geometry, kernel: Tensor) -> None:
    sizes = kernel.dim() - 2
    for name in ("stride", "dilation"):
        steps = getattr(geometry, name)
        if len(steps) != sizes or any(type(step) is not int or step < 1 for step in steps):
            raise InputError(
                f"geometry.{name} needs {sizes} positive integers, one per kernel dimension, got {steps!r}"
            )
    if type(geometry.groups) is not int or geometry.groups < 1 or kernel.shape[0] % geometry.groups:
        raise InputError(f"geometry.groups needs a divisor of the {kernel.shape[0]} filters, got {geometry.groups!r}")

"""Batch norm as a regulariser that tunes itself: the weight it makes of a layer's, and its rate per neuron.

Annamalai et al. 2022. Per neuron with weight w and input x, of second moment ``R = E[x x^T]``: batch norm computes
``gamma w^T x / alpha + beta`` with ``alpha = (w^T R w)^(1/2)``, so that the layer's weight is in effect
``w_bn = gamma w / alpha``, whatever the length of w. Everything is float64, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthofast.errors import InputError

POWERS = ("std", "var")
LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class EffectiveNorms(NamedTuple):
    """Norms of each neuron's weight as batch norm makes it.

    Attributes:
        l1: (out,) float64.
        l2: (out,) float64.
    """

    l1: Tensor
    l2: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OutputMoments:
    """Moments of what a layer's weight makes of data, bias left out; records of disjoint data merge.

    Attributes:
        count: samples, times positions of a convolution.
        mean: (out,) float64.
        squares: (out,) float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor


def bn_rate(
    layer: nn.Module,
    bn: nn.Module | None = None,
    x: Tensor | None = None,
    *,
    power: str = "std",
    center: bool = True,
    samples: int | None = None,
) -> Tensor:
    """Regularisation rate alpha of each neuron that batch norm follows.

    ``alpha = E[(w^T x)^2]^(1/2)``, Annamalai et al. 2022, Section III A, where inputs have mean 0. With ``center`` it
    is the standard deviation of ``w^T x``, which batch norm divides by whatever the mean. The bias does not enter.

    Args:
        layer: Linear, Conv1d to 3d, or a transposed convolution; alpha of a channel is over all positions.
        bn: the batch norm after it; alpha then comes from its running statistics alone, without data.
        x: inputs of the layer; alpha then comes from these.
        power: "std" as in the formula; "var" for alpha^2, which is what the paper's Table I prints: its alpha grows
            with the square of the data's scale.
        center: subtract the mean. False: the second moment of the formula.
        samples: how many values a neuron had in a batch (times positions), for running statistics to become those of
            the batches: torch keeps the unbiased variance. None: as batch norm uses them in eval mode.

    Returns:
        (out,) float64.

    Raises:
        InputError: if an argument cannot be used, or neither ``bn`` with running statistics nor ``x`` is given.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> bn_rate(layer, x=torch.eye(2), center=False), bn_rate(layer, x=torch.eye(2), power="var")
    (tensor([3.5355], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    _powered(power)
    _weight(layer)
    if x is not None:
        moments = moments_of(layer, x)
        variance = variance_from(moments, center=center)
    elif bn is not None:
        variance = running_variance(layer, bn, center=center, samples=samples)
    else:
        raise InputError("bn_rate needs x, inputs of the layer, or bn with running statistics; got neither")
    return variance if power == "var" else variance.sqrt()


@torch.no_grad()
def bn_equivalent_weight(
    layer: nn.Module,
    bn: nn.Module,
    x: Tensor | None = None,
    *,
    power: str = "std",
    center: bool = True,
    samples: int | None = None,
) -> Tensor:
    """The weight a layer has in effect, with the batch norm that follows it.

    ``w_bn = gamma w / sqrt(alpha^2 + eps)``, Annamalai et al. 2022, Eq. 2 and 12. Scaling w leaves it as it is; scaling
    the data by s divides it by s. Without x it is the weight that ``torch.nn.utils.fusion.fuse_conv_bn_eval`` makes.

    Args:
        layer: as in :func:`bn_rate`, like the arguments not named here.
        bn: its batch norm, for gamma and eps.
        x: inputs of the layer; None takes the running statistics.
        power: "std" as in Eq. 12; "var" divides by ``alpha^2 + eps``, whose norms fall with the square of the data's
            scale, as those of the paper's Tables I and II do.
        center: as in :func:`bn_rate`.
        samples: as in :func:`bn_rate`.

    Returns:
        In the weight's shape, float64.

    Raises:
        InputError: as :func:`bn_rate`.

    >>> layer, bn = torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5).eval()
    >>> fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer.eval(), bn)
    >>> torch.allclose(bn_equivalent_weight(layer, bn).float(), fused.weight)
    True
    """
    _powered(power)
    _paired(layer, bn)
    variance = bn_rate(layer, bn, x, power="var", center=center, samples=samples)
    return equivalent_from(layer, bn, variance, power)


def equivalent_from(layer: nn.Module, bn: nn.Module, variance: Tensor, power: str = "std") -> Tensor:
    """The formula of :func:`bn_equivalent_weight` on alpha^2, (out,)."""
    total = variance + _number(bn, "eps")
    return per_output(layer, gamma_of(bn, total) / (total if power == "var" else total.sqrt()))


def effective_norms(layer: nn.Module, weight: Tensor) -> EffectiveNorms:
    """L1 and L2 norm of each neuron's weight, such as :func:`bn_equivalent_weight` gives it.

    Annamalai et al. 2022, Tables I and II, print their means over the neurons of a layer.

    Args:
        layer: whose weight it is: where its outputs lie depends on the type.
        weight: in the shape of the layer's.

    Raises:
        InputError: if the layer is of another type, or the shapes differ.
    """
    if weight.shape != _weight(layer).shape:
        raise InputError(f"weight needs the layer's shape {tuple(_weight(layer).shape)}, got {tuple(weight.shape)}")
    vectors = outputs_first(layer, weight.detach().to(torch.float64)).flatten(1)
    return EffectiveNorms(vectors.abs().sum(1), vectors.square().sum(1).sqrt())


@torch.no_grad()
def moments_of(layer: nn.Module, x: Tensor) -> OutputMoments:
    """Moments of what the layer's weight makes of inputs.

    Raises:
        InputError: if the layer does not take them.
    """
    try:
        outputs = layer(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        told = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"x needs inputs of the layer, whose weight is {_weight(layer).dtype} {tuple(_weight(layer).shape)}, "
            f"got {told}"
        ) from error
    return moments_of_outputs(layer, outputs)


@torch.no_grad()
def moments_of_outputs(layer: nn.Module, outputs: Tensor) -> OutputMoments:
    """The same from the layer's outputs, whose bias is taken off."""
    z = outputs.detach().to(torch.float64)
    axis = z.dim() - 1 if isinstance(layer, LINEAR) else z.dim() - _weight(layer).dim() + 1
    z = z.movedim(axis, 0).flatten(1)  # (out, values)
    mean = z.mean(1)
    squares = (z - mean[:, None]).square().sum(1)
    return OutputMoments(z.shape[1], mean - _bias(layer), squares)


def merge_moments(records: Sequence[OutputMoments]) -> OutputMoments:
    """The record of all data together, by pairwise updates that do not cancel (Chan et al. 1983).

    Raises:
        InputError: if there is none.
    """
    if not records:
        raise InputError("merge_moments needs at least one record, got none")
    total = records[0]
    for part in records[1:]:
        count = total.count + part.count
        apart = part.mean - total.mean
        weight = total.count * part.count / max(count, 1)
        total = OutputMoments(
            count,
            total.mean + apart * (part.count / max(count, 1)),
            total.squares + part.squares + apart.square() * weight,
        )
    return total


def variance_from(moments: OutputMoments, *, center: bool = True) -> Tensor:
    """alpha^2 from a record, (out,): the population variance, or the mean square; NaN without data."""
    variance = moments.squares / (moments.count or float("nan"))
    return variance if center else variance + moments.mean.square()


@torch.no_grad()
def running_variance(layer: nn.Module, bn: nn.Module, *, center: bool = True, samples: int | None = None) -> Tensor:
    """alpha^2 from a batch norm's running statistics; arguments as in :func:`bn_rate`."""
    _paired(layer, bn)
    variance, mean = getattr(bn, "running_var", None), getattr(bn, "running_mean", None)
    if not isinstance(variance, Tensor) or not isinstance(mean, Tensor):
        raise InputError("bn keeps no running statistics (track_running_stats=False); pass x, inputs of the layer")
    variance = variance.to(torch.float64)
    if samples is not None:
        if type(samples) is not int or samples < 2:
            raise InputError(f"samples needs an integer of at least 2, values of a neuron in a batch, got {samples!r}")
        variance = variance * ((samples - 1) / samples)
    return variance if center else variance + (mean.to(torch.float64) - _bias(layer)).square()


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or a tensor of its shape, with the layer's outputs along the first dimension, (out, in, *kernel)."""
    if not isinstance(layer, TRANSPOSED):
        return weight
    blocks: Tensor = weight.unflatten(0, (layer.groups, -1))  # (groups, in, out, *kernel)
    return blocks.transpose(1, 2).flatten(0, 1)


def per_output(layer: nn.Module, factor: Tensor) -> Tensor:
    """The layer's weight with each output's part times a factor, (out,) -> the weight's shape, float64."""
    weight = _weight(layer).detach().to(torch.float64)
    if not isinstance(layer, TRANSPOSED):
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))
    blocks = weight.unflatten(0, (layer.groups, -1))
    factors = factor.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    scaled: Tensor = (blocks * factors).flatten(0, 1)
    return scaled


def gamma_of(bn: nn.Module, like: Tensor) -> Tensor:
    """Its gamma, (out,) float64; ones in the shape of ``like`` without an affine part."""
    gamma = getattr(bn, "weight", None)
    return gamma.detach().to(torch.float64) if isinstance(gamma, Tensor) else torch.ones_like(like)


def _weight(layer: nn.Module) -> Tensor:
    if not isinstance(layer, LINEAR + CONVOLUTIONS + TRANSPOSED):
        raise InputError(f"layer needs a Linear, Conv1d to 3d or ConvTranspose1d to 3d, got {type(layer).__name__}")
    return layer.weight


def _bias(layer: nn.Module) -> Tensor | float:
    bias = getattr(layer, "bias", None)
    return bias.detach().to(torch.float64) if isinstance(bias, Tensor) else 0.0


def _paired(layer: nn.Module, bn: nn.Module) -> None:
    weight = _weight(layer)
    if not isinstance(bn, BATCH_NORMS):
        raise InputError(f"bn needs a BatchNorm1d to 3d or a SyncBatchNorm, got {type(bn).__name__}")
    out = weight.shape[1] * layer.groups if isinstance(layer, TRANSPOSED) else weight.shape[0]
    if bn.num_features != out:
        raise InputError(f"bn needs the {out} features the layer gives, got {bn.num_features}; pair them otherwise")


def _number(bn: nn.Module, name: str) -> float:
    value: float = getattr(bn, name)
    return value


def _powered(power: str) -> None:
    if power not in POWERS:
        raise InputError(f"power needs one of {', '.join(POWERS)}, got {power!r}")

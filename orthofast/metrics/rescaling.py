"""What multiplying each layer's weights by a factor does to a network, without and with batch normalisation.

Huang et al. 2020, Theorems 1 and 2: factors a_k multiply through a ReLU network and make its gradients explode or
vanish; with batch normalisation after every linear layer, the last one included, layer k alone answers with 1 / a_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from orthofast.errors import InputError


class Rescaling(NamedTuple):
    """One number per linear layer, of three kinds.

    Attributes:
        activations: (K,) of what enters the next layer; for the last one, what leaves the network.
        output_gradients: (K,) of the derivative by what leaves layer k.
        weight_gradients: (K,) of the derivative by its weight.
    """

    activations: Tensor
    output_gradients: Tensor
    weight_gradients: Tensor


def rescaling_ratios(factors: Sequence[float], *, normalized: bool = False, upstream: float = 1.0) -> Rescaling:
    """By what activations and gradients are multiplied when layer k's weights are multiplied by ``factors[k]``.

    Theorem 1, ReLU or linear layers: activations by ``prod_{i<=k} a_i``, derivatives by the outputs of layer k by
    ``mu prod_{i>k} a_i``, by its weight by ``mu prod_{i!=k} a_i``. Theorem 2, batch normalisation after every linear
    layer: 1, ``mu / a_k`` and ``mu / a_k``. Huang et al. 2020.

    Args:
        factors: a_1 to a_K, positive.
        normalized: Theorem 2.
        upstream: mu, by what the derivative by the network's output is multiplied.

    Raises:
        InputError: if there is no factor or one is not positive.

    >>> rescaling_ratios([2.0, 3.0]).weight_gradients
    tensor([3., 2.], dtype=torch.float64)
    >>> rescaling_ratios([2.0, 4.0], normalized=True).weight_gradients
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    a = torch.tensor([float(factor) for factor in factors], dtype=torch.float64)
    if not len(a) or not bool((a > 0).all() & a.isfinite().all()):
        raise InputError(f"factors needs positive numbers, one per linear layer, got {list(factors)!r}")
    if normalized:
        return Rescaling(torch.ones_like(a), upstream / a, upstream / a)
    before = a.cumprod(0)
    after = torch.cat([a.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    return Rescaling(before, upstream * after, upstream * before / a * after)


def rescale_weights_check(
    model: nn.Module,
    inputs: Tensor,
    factors: Sequence[float],
    *,
    normalized: bool = False,
    upstream: Tensor | None = None,
) -> Rescaling:
    """How far a network is from the ratios of :func:`rescaling_ratios`: worst relative deviation per layer.

    Huang et al. 2020, Theorems 1 and 2, measured: one forward and backward pass with the weights as they are and one
    with the factors; no parameter changes. About 1e-13 in float64 where a theorem applies; large where it does not, as
    in a normalised network whose last linear layer has no batch normalisation behind it.

    Args:
        model: linear layers without bias, called in the order they are registered, with ReLU between them and, for
            ``normalized``, batch normalisation in training mode behind each. Its eps is part of the deviation.
        inputs: (N, d).
        factors: one per linear layer, positive.
        normalized: compare with Theorem 2 in place of Theorem 1.
        upstream: derivative by the model's output, fixed; ones by default.

    Raises:
        InputError: if the linear layers do not match the factors, or have biases.

    >>> import torch
    >>> layers = torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 2, bias=False)
    >>> model = torch.nn.Sequential(*layers)
    >>> check = rescale_weights_check(model.double(), torch.randn(5, 3).double(), [2.0, 0.5])
    >>> max(part.max().item() for part in check) < 1e-12
    True
    """
    expected = rescaling_ratios(factors, normalized=normalized)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if len(layers) != len(expected.activations) or any(layer.bias is not None for layer in layers.values()):
        raise InputError(
            f"factors needs one number per linear layer, and those no bias: got {len(expected.activations)} factors, "
            f"{len(layers)} layers, {sum(layer.bias is not None for layer in layers.values())} biases"
        )
    plain = _pass(model, layers, inputs, [1.0] * len(layers), upstream)
    scaled = _pass(model, layers, inputs, factors, upstream)
    return Rescaling(
        *(
            torch.stack(
                [_deviation(new, old * ratio) for new, old, ratio in zip(after, before, ratios.tolist(), strict=True)]
            )
            for before, after, ratios in zip(plain, scaled, expected, strict=True)
        )
    )


def _pass(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    inputs: Tensor,
    factors: Sequence[float],
    upstream: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Activations, derivatives by layers' outputs and by their weights; buffers and gradients stay as they were."""
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        entered.append(arguments[0].detach())
        left.append(output)

    state = {name: value.detach() for name, value in model.named_parameters()}
    state |= {name: value.clone() for name, value in model.named_buffers()}
    weights = []
    for (name, layer), factor in zip(layers.items(), factors, strict=True):
        weight = (layer.weight.detach() * factor).requires_grad_()
        state[f"{name}.weight" if name else "weight"] = weight
        weights.append(weight)
    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    try:
        with torch.enable_grad():
            output = functional_call(model, state, (inputs.detach(),))
    finally:
        for handle in handles:
            handle.remove()
    if len(left) != len(layers):
        raise InputError(f"model needs to call each linear layer once, got {len(left)} calls of {len(layers)} layers")
    given = torch.ones_like(output) if upstream is None else upstream
    found = torch.autograd.grad(output, [*left, *weights], given)
    return [*entered[1:], output.detach()], list(found[: len(left)]), list(found[len(left) :])


def _deviation(new: Tensor, expected: Tensor) -> Tensor:
    scale = expected.abs().max()
    worst = (new - expected).abs().max().double()
    return torch.where(scale > 0, worst / torch.where(scale > 0, scale, 1.0), worst)

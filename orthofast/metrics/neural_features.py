"""Average gradient outer products, and how far the Gram matrix of a layer's weight follows them.

The neural feature ansatz, Lu et al. 2024, Eq. 5: ``W^T W`` of a trained layer is proportional to
``1/N sum_n J_n^T J_n``, J_n the derivative of the network's outputs by what enters the layer. For an untrained ReLU
network with Gaussian inputs both are equal in the limit of width (their Theorem 1, Eq. 4, with every hidden layer
scaled by ``sqrt(2 / width)``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError

AT_ONCE = 16  # outputs differentiated in one backward pass


def agop(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Average gradient outer product ``1/N sum_n J_n^T J_n`` of a function of vectors.

    Lu et al. 2024, Eq. 4 and 5. The samples must not mix: a network with batch normalisation in ``eval()``.

    Args:
        function: (N, ..., d) to (N, C), each row of the result from the same row of the inputs. For the layers behind
            a module of a network, see :func:`layer_agop`.
        inputs: (N, d), or (N, T, d) with T positions, whose products are summed.

    Returns:
        (d, d) float64 on the inputs' device, symmetric.

    Raises:
        InputError: if shapes do not fit, or the result does not depend on the inputs.

    >>> import torch
    >>> agop(lambda x: x @ torch.tensor([[1.0], [2.0]]), torch.randn(5, 2))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    if not isinstance(inputs, Tensor) or not inputs.dtype.is_floating_point or inputs.dim() < 2 or not len(inputs):
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"inputs needs a floating-point tensor (N, ..., d) with N at least 1, got {shape}")
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        return _outer_products(function(leaf), leaf)


def layer_agop(model: nn.Module, layer: str | nn.Module, inputs: Any) -> Tensor:
    """Average gradient outer product of a network by what enters one of its layers: the right side of Eq. 5.

    One forward pass, and a backward pass through the layers behind for every 16 outputs. Parameters get no gradient.
    The network stays in the mode it is in: with dropout, call ``eval()`` before; with batch normalisation one has to.

    Args:
        model: maps ``inputs`` to (N, C).
        layer: a module of it or its name; its first argument must be (N, ..., d), as that of ``nn.Linear``. Of a
            convolution, its patches are what enters: the derivative by one is ``W^T g`` with g that by its output.
        inputs: what the model is called with.

    Returns:
        (d, d) float64, (in * kernel, in * kernel) of a convolution, summed over positions; compare it with the layer's
        weight by :func:`neural_feature_correlation`.

    Raises:
        InputError: if there is no such layer, the model does not call it exactly once, shapes do not fit, or batch
            normalisation in training mode mixes the samples.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    >>> W = model[1].weight.detach().double()
    >>> torch.allclose(layer_agop(model, "1", torch.randn(5, 3)), W.T @ W)
    True
    """
    named = dict(model.named_modules())
    module = named.get(layer) if isinstance(layer, str) else layer
    if module is None:
        raise InputError(f"layer needs the name of a module of the model, got {layer!r}; see named_modules()")
    convolution = module if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
    if convolution is not None and convolution.groups != 1:
        raise InputError(f"layer needs a convolution of one group, got {convolution.groups} groups")
    for path, norm in named.items():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or norm.running_var is None):
            raise InputError(
                f"model has batch normalisation with the batch's own statistics, {path or type(norm).__name__}, which "
                "mixes samples; call eval() before, with running statistics"
            )
    leaves: list[Tensor] = []

    def leaf_of(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    def entering(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (leaf_of(arguments[0]), *arguments[1:])

    def leaving(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return leaf_of(output)

    if convolution is None:
        handle = module.register_forward_pre_hook(entering)
    else:
        handle = module.register_forward_hook(leaving)
    try:
        with torch.enable_grad():
            outputs = model(inputs)
    finally:
        handle.remove()
    if len(leaves) != 1:
        raise InputError(f"layer needs a module that the model calls once, got one it called {len(leaves)} times")
    with torch.enable_grad():
        products = _outer_products(outputs, leaves[0], -1 if convolution is None else 1)
    if convolution is None:
        return products
    kernel = convolution.weight.detach().flatten(1).double()
    return kernel.T @ products @ kernel


def neural_feature_correlation(weight: Tensor, outer_products: Tensor) -> Tensor:
    """Cosine between ``W^T W`` and an average gradient outer product, both flattened.

    Range [0, 1]; 1: proportional, as the neural feature ansatz says of trained layers (Lu et al. 2024, Eq. 5).

    Args:
        weight: (out, in) or (out, in, *kernel), as layers store it; kernels are flattened.
        outer_products: (in, in), or (in * kernel, in * kernel), from :func:`agop` or :func:`layer_agop`.

    Returns:
        () float64 on the weight's device; NaN where one is 0, or with NaN or Inf.

    Raises:
        InputError: if the shapes do not fit.

    >>> import torch
    >>> W = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> round(neural_feature_correlation(W, 7 * W.T @ W).item(), 12)
    1.0
    """
    if weight.dim() < 2 or outer_products.shape != (weight[0].numel(),) * 2:
        raise InputError(
            f"weight and outer_products need (out, in, ...) and (in, in), got {tuple(weight.shape)} and "
            f"{tuple(outer_products.shape)}; in counts the taps of a kernel too"
        )
    vectors = weight.detach().flatten(1).double()
    gram, other = vectors.T @ vectors, outer_products.detach().double()
    scales = gram.abs().max(), other.abs().max()
    gram, other = gram / scales[0], other / scales[1]  # no square over- or underflows
    cosine: Tensor = (gram * other).sum() / (gram.norm() * other.norm())
    return cosine.clamp(max=1)


def _outer_products(outputs: Any, leaf: Tensor, dim: int = -1) -> Tensor:
    """Products of the derivatives by the leaf, d at ``dim``, summed over outputs and positions; mean over samples."""
    n, d = leaf.shape[0], leaf.shape[dim]
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2) or len(outputs) != n:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"the function needs to give (N, C) with N = {n}, one row per sample, got {shape}")
    if not outputs.requires_grad:
        raise InputError("the function needs to depend on its inputs, got a result without a gradient")
    summed = outputs.reshape(n, -1).sum(0)  # samples do not mix: one derivative serves all
    total = torch.zeros(d, d, dtype=torch.float64, device=leaf.device)
    for start in range(0, len(summed), AT_ONCE):
        some = torch.eye(len(summed), dtype=summed.dtype, device=summed.device)[start : start + AT_ONCE]
        (found,) = torch.autograd.grad(summed, leaf, some, retain_graph=True, is_grads_batched=True)
        rows = found.flatten(0, 1).movedim(dim, -1).reshape(-1, d).double()
        total.addmm_(rows.T, rows)
    return total / n

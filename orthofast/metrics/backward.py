"""What normalisation and a skip do to the gradients that pass them: two projections, and an identity.

Lu et al. 2024, appendix, Eq. 7 to 16. Layouts are torch's: a sample a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.errors import InputError


@torch.no_grad()
def normalization_gradient(
    gradient: Tensor,
    x: Tensor,
    *,
    dims: int | tuple[int, ...] = 0,
    eps: float = 0.0,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Gradient of the loss by the inputs of a normalisation, from that by its outputs, in closed form.

    ``1 / sigma * P_1 P_y (scale * g)`` with ``y = (x - mean) / sigma``, ``P_1 g = g - mean(g)`` and
    ``P_y g = g - y mean(g * y)``: of each feature's gradient over the batch, what is constant is taken out, and what
    lies along the normalised activations; then it is divided by their standard deviation. The projections commute.
    Thus the result has mean 0 over ``dims``, and is orthogonal to x there. Lu et al. 2024, appendix, Eq. 7 to 13.

    Args:
        gradient: of the loss by the outputs, in x's shape.
        x: inputs of the normalisation.
        dims: over which mean and deviation are taken: 0 for batch norm, (0, 2, 3) for images, -1 for a layer norm.
        eps: added to the variance. With eps > 0 it is the exact gradient still, and P_y no exact projection.
        scale: gamma, in a shape that broadcasts to x's.

    Returns:
        In x's shape and dtype.

    Raises:
        InputError: if the shapes differ.

    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> normalization_gradient(x, x).abs().max().item() < 1e-6  # along the activations: nothing passes
    True
    """
    if gradient.shape != x.shape:
        raise InputError(f"gradient needs the shape of x, {tuple(x.shape)}, got {tuple(gradient.shape)}")
    centred = x - x.mean(dims, keepdim=True)
    sigma = (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    y = centred / sigma
    g = gradient * scale
    passed: Tensor = (g - g.mean(dims, keepdim=True) - y * (g * y).mean(dims, keepdim=True)) / sigma
    return passed


@torch.no_grad()
def residual_gradient(gradient: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """Gradient of the loss by the inputs of ``x + f(W x + b)``, from that by its outputs.

    ``(I + diag(f'(z)) W)^T u``, row by row ``u + (f'(z) * u) W``: the skip adds an identity to what a layer passes.
    Lu et al. 2024, appendix, Eq. 16 (whose printed shapes do not fit: f'(z) belongs to W u, not to the identity).

    Args:
        gradient: u, (n, d).
        weight: (d, d), as torch's Linear keeps it.
        slope: f'(z), (n, d).

    Returns:
        (n, d).

    Raises:
        InputError: if the shapes do not fit.

    >>> u, w = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> residual_gradient(u, w, torch.tensor([[1.0, 0.0]]))
    tensor([[2., 3.]])
    """
    d = gradient.shape[-1]
    if tuple(weight.shape) != (d, d):
        raise InputError(f"weight needs shape ({d}, {d}), the inputs' width on both sides, got {tuple(weight.shape)}")
    if slope.shape != gradient.shape:
        raise InputError(f"slope needs the shape of gradient, {tuple(gradient.shape)}, got {tuple(slope.shape)}")
    return gradient + (slope * gradient) @ weight

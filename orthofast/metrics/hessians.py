"""Hessians of linear models as Kronecker products, learning-rate limits, and layers as proximal problems.

Huang et al. 2020, Sections 2 and 3, with two corrections. The Hessian of ``(y - w^T x)^2`` is ``2 E[x x^T]``: their
``E[x x^T]`` belongs to half of it. In Eq. 2, ``S = (1/C) (I - (1/C) 1 1^T)`` with the vector 1 of C ones; with a
matrix of ones in its place S would have a negative eigenvalue, which no such Hessian has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.spectra import inner_products


def squared_error_hessian(x: Tensor, outputs: int = 1, *, half: bool = True) -> tuple[Tensor, Tensor]:
    """Hessian of the mean of ``|y - W x|^2 / 2`` by W, as Kronecker factors ``(E[x x^T], I)``.

    Huang et al. 2020, Eq. 1. It does not depend on y or W.

    Args:
        x: (N, d).
        outputs: rows of W.
        half: of half the squared error; False for the squared error itself, twice as large.

    Returns:
        (d, d) and (outputs, outputs) float64. For W flattened row by row the Hessian is ``kron(second, first)``; the
        spectrum is that of either order.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> squared_error_hessian(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), half=False)[1]
    tensor([[2.]], dtype=torch.float64)
    """
    if type(outputs) is not int or outputs < 1:
        raise InputError(f"outputs needs a positive integer, the rows of W, got {outputs!r}")
    covariance = _covariance(x)
    scale = 1.0 if half else 2.0
    return covariance, torch.eye(outputs, dtype=torch.float64, device=covariance.device) * scale


def softmax_hessian(x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Hessian of the mean cross-entropy of ``softmax(W x)`` by W, at W = 0, as factors ``(E[x x^T], S)``.

    Huang et al. 2020, Eq. 2: ``S = (1/C) (I - (1/C) 1 1^T)``, whose eigenvalues are 1 / C, C - 1 times, and 0.

    Args:
        x: (N, d).
        classes: C, rows of W, at least 2.

    Returns:
        (d, d) and (C, C) float64, ordered as in :func:`squared_error_hessian`.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> softmax_hessian(torch.ones(3, 1), 2)[1]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]], dtype=torch.float64)
    """
    if type(classes) is not int or classes < 2:
        raise InputError(f"classes needs an integer of at least 2, got {classes!r}")
    covariance = _covariance(x)
    ones = torch.ones(classes, 1, dtype=torch.float64, device=covariance.device)
    identity = torch.eye(classes, dtype=torch.float64, device=covariance.device)
    return covariance, (identity - ones @ ones.T / classes) / classes


def largest_stable_step(largest_eigenvalue: Tensor) -> Tensor:
    """The learning rate beyond which gradient descent on a quadratic diverges: ``2 / lambda_max`` of its Hessian.

    Huang et al. 2020, Section 2; half of it is the fastest safe rate. inf for a Hessian of zeros.

    >>> import torch
    >>> largest_stable_step(torch.tensor(4.0))
    tensor(0.5000)
    """
    return 2 / largest_eigenvalue


def proximal_gradient(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Gradient of a layer's proximal problem: ``1/2 |target - W x|^2`` with the target one step down its output.

    Huang et al. 2020, Eq. 5-7: back-propagation gives each layer the target ``h - dL/dh``; at the present weight the
    layer's own least-squares problem has the gradient ``dL/dW`` of the whole network, so that one step on either is
    the same. Its Hessian is ``E[x x^T]``: why the spectrum of a layer's inputs tells how hard the layer is to train.

    Args:
        weight: (out, in).
        inputs: (N, in), what enters the layer.
        gradients: (N, out), ``dL/dh`` by what leaves it.

    Returns:
        (out, in), summed over the samples.

    Raises:
        InputError: if the shapes do not fit.

    >>> import torch
    >>> proximal_gradient(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5]]))
    tensor([[0.5000, 1.5000]])
    """
    if weight.dim() != 2 or inputs.shape[1:] != weight.shape[1:] or gradients.shape != (len(inputs), len(weight)):
        raise InputError(
            f"weight, inputs and gradients need (out, in), (N, in) and (N, out), got {tuple(weight.shape)}, "
            f"{tuple(inputs.shape)} and {tuple(gradients.shape)}"
        )
    outputs = inputs @ weight.T
    target = outputs - gradients
    return (outputs - target).T @ inputs


def _covariance(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point or x.dim() != 2 or not len(x):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x needs a floating-point tensor (N, d) with at least one row, got {shape}")
    return inner_products(x.T) / len(x)

"""Orthogonality of a convolution as the linear map it is: conv(K, K) - delta, its value and its gradient.

Rows of the convolution's Toeplitz matrix are shifted filters; they are orthonormal exactly when the filters, correlated
with each other at every shift the stride allows, give 1 for a filter with itself unshifted and 0 for everything else
(Wang et al. 2020, Orthogonal Convolutional Neural Networks, Section 3.2). That is more than orthogonality of the
flattened kernel, which looks at the unshifted correlation alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from orthofast.training.penalties import ValueAndGradient, full_precision

CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
TRANSPOSED = {3: functional.conv_transpose1d, 4: functional.conv_transpose2d, 5: functional.conv_transpose3d}


class Geometry(NamedTuple):
    """How a kernel is applied.

    Attributes:
        stride: per kernel dimension.
        dilation: per kernel dimension.
        groups: of channels.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


class _Plan(NamedTuple):
    kernel: Tensor  # as correlated with itself: (filters, channels, *size)
    stride: list[int]
    padding: list[int]
    constant: int  # of the larger side
    turned: bool


def _plan(kernel: Tensor, geometry: Geometry) -> _Plan:
    size = kernel.shape[2:]
    # shifts are multiples of the stride, and filters overlap at multiples of the dilation
    stride = [step // math.gcd(step, gap) for step, gap in zip(geometry.stride, geometry.dilation, strict=True)]
    padding = [(extent - 1) // step * step for extent, step in zip(size, stride, strict=True)]
    turned = geometry.groups == 1 and kernel.shape[1] < kernel.shape[0] and all(step == 1 for step in geometry.stride)
    if turned:  # |K K^H - I|^2 and |K^H K - I|^2 differ by the difference of their sizes at every frequency
        return _Plan(kernel.transpose(0, 1), stride, padding, kernel.shape[0] - kernel.shape[1], True)
    return _Plan(kernel, stride, padding, 0, False)


def _residual(plan: _Plan, groups: int) -> Tensor:
    """conv(K, K) - delta: (filters per group, filters, *shifts)."""
    kernel = plan.kernel
    filters = kernel.shape[0] // groups
    # filters of one group side by side, groups among the channels
    images = kernel.unflatten(0, (groups, filters)).transpose(0, 1).flatten(1, 2)
    correlated: Tensor = CONVOLUTIONS[kernel.dim()](
        images, kernel, stride=plan.stride, padding=plan.padding, groups=groups
    )
    delta = torch.zeros_like(correlated)
    unshifted = delta  # (filters per group, filters) in the end
    for width, step in zip(plan.padding, plan.stride, strict=True):
        unshifted = unshifted.select(2, width // step)
    unshifted.copy_(torch.eye(filters, dtype=delta.dtype, device=delta.device).repeat(1, groups))
    return correlated - delta


def conv_orthogonality(kernel: Tensor, geometry: Geometry) -> Tensor:
    """``|conv(K, K) - delta|_F^2`` of a kernel (out, in / groups, *size), (), differentiable."""
    with full_precision(kernel) as wide:
        plan = _plan(wide, geometry)
        return _residual(plan, geometry.groups).square().sum() + plan.constant


@torch.no_grad()
def conv_orthogonality_gradient(kernel: Tensor, geometry: Geometry) -> ValueAndGradient:
    """The value, and ``4 conv_transpose(conv(K, K) - delta, K)``: the residual is symmetric in filters and shift."""
    groups = geometry.groups
    with full_precision(kernel) as wide:
        plan = _plan(wide, geometry)
        residual = _residual(plan, groups)
        value = residual.square().sum() + plan.constant
        images: Tensor = TRANSPOSED[wide.dim()](
            residual, plan.kernel, stride=plan.stride, padding=plan.padding, groups=groups
        )  # (filters per group, groups * channels, *size)
        slope = images.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1).mul_(4)
        return value, slope.transpose(0, 1) if plan.turned else slope

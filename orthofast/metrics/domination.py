"""Weight domination: how small the largest singular value of a gradient is beside that of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.views import Array, as_vectors

STEPS = 12  # of Lanczos: two products with the matrix each
SQUARINGS = 24  # of a STEPS x STEPS matrix; what is left of lower eigenvalues is below 2^-24
BREAKDOWN = 1e-6  # a residual below this share of the first one is rounding


def weight_domination(weight: Array, gradient: Array) -> Tensor:
    """Largest singular value of a gradient over that of its weight.

    ``sigma_max(dL/dW) / sigma_max(W)``. Huang et al. 2020, Definition 1: where the ratio is far below 1, weights
    dominate their gradients and training of that layer stands still. The paper names no threshold.

    Range [0, inf). 0: no gradient. Both values come from a Lanczos process of 12 steps, which approaches the largest
    singular value from below; with less than 12 rows or columns it is exact to rounding.

    Args:
        weight: (out, in) or (out, in, *kernel), kernels flattened.
        gradient: of the same shape.

    Returns:
        () float64 on the weight's device; NaN with NaN or Inf in either, or for a weight of zeros.

    Raises:
        InputError: if an argument cannot be used, or the shapes differ.

    >>> import torch
    >>> weight_domination(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([0.0, 0.5])))
    tensor(0.2500, dtype=torch.float64)
    """
    w, g = as_vectors(weight), as_vectors(gradient)
    if w.shape != g.shape:
        raise InputError(f"gradient needs the weight's shape {tuple(w.shape[1:])}, got {tuple(g.shape[1:])}")
    matrices = [w[0].detach(), g[0].detach()]
    values, _ = largest_singular_values(matrices, [starting_vector(w.shape[2], w.device)] * 2)
    return domination_from(values[0], values[1])


def domination_from(of_weight: Tensor, of_gradient: Tensor) -> Tensor:
    """The ratio of largest singular values, elementwise; NaN where the weight's is 0."""
    nothing: Tensor = of_weight == 0
    ratio: Tensor = of_gradient / of_weight
    return ratio.masked_fill(nothing, float("nan"))


def starting_vector(d: int, device: torch.device) -> Tensor:
    """(d,) float32 of length 1: seeded noise, the same on every device and rank; no global generator is used."""
    noise = torch.randn(d, generator=torch.Generator("cpu").manual_seed(d), dtype=torch.float32, device="cpu")
    length: Tensor = noise.norm()
    unit = noise / length
    if device.type == "cuda":  # from pinned memory the copy makes nobody wait
        return unit.pin_memory().to(device, non_blocking=True)
    return unit.to(device)


def largest_singular_values(matrices: Sequence[Tensor], starts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """sigma_max of every matrix, without a synchronisation and without a Gram matrix.

    Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation, ``STEPS`` steps from the given start; the
    largest eigenvalue of the small ``B^T B`` by repeated squaring, for all matrices at once.

    Args:
        matrices: (n, d) each, of one device; 16- and 8-bit ones are read as float32.
        starts: (d,) each; what an earlier call returned makes a slowly changing matrix converge further each time.

    Returns:
        (len,) float64, each at most the true value but for rounding; and a unit vector near the singular vector each.
    """
    bases, squares = [], []
    for matrix, start in zip(matrices, starts, strict=True):
        wide = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        basis, square = _krylov(wide, start.to(wide.dtype))
        bases.append(basis)
        squares.append(square)
    if not squares:
        return torch.zeros(0, dtype=torch.float64), []
    small = torch.stack(squares)  # (len, STEPS, STEPS) float64
    trace = _trace(small)
    unit = small / torch.where(trace == 0, 1.0, trace)
    power = unit
    for _ in range(SQUARINGS):
        power = power @ power
        scale = _trace(power)
        power = power / torch.where(scale == 0, 1.0, scale)
    values = ((unit * power).sum((1, 2)) * trace[:, 0, 0]).clamp(min=0).sqrt()
    nearest = [
        _unit_or(basis.T @ column.to(basis.dtype), start)
        for basis, column, start in zip(bases, power[:, :, 0], starts, strict=True)
    ]
    return values, nearest


def _trace(small: Tensor) -> Tensor:
    """(len, k, k) -> (len, 1, 1)."""
    return small.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _unit_or(vector: Tensor, otherwise: Tensor) -> Tensor:
    length = vector.norm()
    usable = (length > 0) & length.isfinite()  # no NaN may stay in a start for good
    return torch.where(usable, vector / torch.where(usable, length, 1.0), otherwise.to(vector.dtype))


def _krylov(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Basis (STEPS, d) and B^T B (STEPS, STEPS) float64; past the matrix's rank both hold zeros."""
    basis = start.new_zeros(STEPS, len(start))
    alpha = [torch.zeros((), dtype=torch.float64, device=start.device)] * STEPS
    beta = list(alpha)
    right = start / start.norm()
    left, link = None, None
    first = None
    for step in range(min(STEPS, *matrix.shape)):
        basis[step] = right
        image = _times(matrix, right)
        if left is not None and link is not None:
            image = image - link * left
        length = image.norm()
        first = length if first is None else torch.maximum(first, length)
        length = torch.where(length > BREAKDOWN * first, length, length * 0)  # NaN stays NaN
        left = image / torch.where(length == 0, 1.0, length) * (length != 0)
        back = _times(matrix.T, left) - length * right
        known = basis[: step + 1]
        for _ in range(2):  # once leaves what cancellation brought back
            back = back - known.T @ (known @ back)
        link = back.norm()
        link = torch.where(link > BREAKDOWN * first, link, link * 0)
        right = back / torch.where(link == 0, 1.0, link) * (link != 0)
        alpha[step], beta[step] = length.to(torch.float64), link.to(torch.float64)
    bidiagonal = torch.diag_embed(torch.stack(alpha)) + torch.diag_embed(torch.stack(beta[:-1]), 1)
    return basis, bidiagonal.T @ bidiagonal


def _times(matrix: Any, vector: Tensor) -> Tensor:
    """A product with a plain vector; of a sharded matrix, the whole product on every rank."""
    if hasattr(matrix, "full_tensor"):
        product = matrix @ type(matrix).from_local(
            vector, matrix.device_mesh, [_replicate(matrix)] * matrix.device_mesh.ndim, run_check=False
        )
        whole: Tensor = product.full_tensor()
        return whole
    plain: Tensor = matrix @ vector
    return plain


def _replicate(matrix: Any) -> Any:
    """The placement of a tensor every rank holds whole, from the sharded matrix's own package."""
    return torch.distributed.tensor.Replicate()

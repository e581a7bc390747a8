"""Spectra of Fisher matrices from per-sample gradients: exact by the dual, and by Kronecker factors.

With J the (N, P) matrix of per-sample gradients, ``F = J^T J / N``. The gradient of a layer's weight for sample n is
``sum_t g_nt x_nt^T`` over the positions t of a sequence or an image, x what enters the layer and g the derivative of
the sample's loss by what leaves it. F shares its nonzero eigenvalues with the N x N dual ``J J^T / N``, in which

    (J J^T)_nm  =  sum_t,s <x_nt, x_ms> <g_nt, g_ms>        for one position  (X X^T) o (G G^T)

so the spectrum of one layer's block (sub-FIM) or of several together is exact without ever forming J. Huang et al.
2020, Section 3; K-FAC there (Eq. 4) is ``E[x x^T] (x) E[g g^T]``.

Which labels g is taken with decides what F is: the true ones give the second moment M (the empirical Fisher), labels
drawn from the model the Fisher by Monte Carlo, all labels weighted by sqrt(p_c) the Fisher itself. With batch
normalisation the samples of a batch do not separate; g is then N times the derivative of the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.operators import Floats, symmetric_operator
from orthofast.metrics.spectra import BLOCK, covariance_spectrum, inner_products, spectrum

Layer: TypeAlias = tuple[Tensor, Tensor]


def label_gradients(gradients: Tensor, probabilities: Tensor) -> Tensor:
    """Gradients by all labels, weighted so that their squares are the model's expectation: ``sqrt(p_c) g_c``.

    ``sum_c p_c g_c g_c^T`` is the expectation over labels in the Fisher matrix (Huang et al. 2020, Section 2), exact
    where sampled labels are an estimate of it.

    Args:
        gradients: (C, N, ..., d_out), by label c of sample n.
        probabilities: (N, C), of the model.

    Returns:
        As ``gradients``: what :func:`sub_fisher_spectrum` and its kin take as g.

    Raises:
        InputError: if the shapes do not fit.

    >>> import torch
    >>> label_gradients(torch.ones(2, 1, 3), torch.tensor([[0.25, 0.75]])).square().sum(0)
    tensor([[1., 1., 1.]])
    """
    if gradients.dim() < 3 or probabilities.shape != (gradients.shape[1], gradients.shape[0]):
        raise InputError(
            f"gradients and probabilities need (C, N, ..., d_out) and (N, C), "
            f"got {tuple(gradients.shape)} and {tuple(probabilities.shape)}"
        )
    weights = probabilities.T.sqrt().to(gradients.dtype)
    return gradients * weights.reshape(*weights.shape, *[1] * (gradients.dim() - 2))


def gradient_gram(x: Tensor, g: Tensor) -> Tensor:
    """Inner products of the per-sample gradients of a layer's weight, ``J J^T``.

    For one position ``(X X^T) o (G G^T)``; for T of them by whichever is less work: all pairs of positions, or the
    gradients themselves in pieces of 8 MiB.

    Args:
        x: (N, d_in) or (N, T, d_in), what enters the layer; more position dimensions are flattened. For a
            convolution its patches, (N, positions, in * kernel). A column of ones adds the bias.
        g: (N, d_out) or (N, T, d_out), the derivative of each sample's own loss by what leaves it. With one dimension
            more in front, (C, N, ...): several labels per sample, weighted (:func:`label_gradients`).

    Returns:
        (N, N) float64 on their device, (C N, C N) with labels, label by label.

    Raises:
        InputError: if the shapes do not fit.

    >>> import torch
    >>> gradient_gram(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0], [3.0]]))
    tensor([[ 4.,  6.],
            [ 6., 18.]], dtype=torch.float64)
    """
    x, g = _ready(x, g)
    labels, n, positions, outputs = g.shape
    inputs = x.shape[2]
    if positions == 1:
        products = inner_products(g.reshape(labels * n, outputs)).view(labels, n, labels, n)
        return products.mul_(inner_products(x[:, 0])[:, None]).view(labels * n, labels * n)
    rows = labels * n
    by_pairs = (n * positions) ** 2 * inputs + (rows * positions) ** 2 * (outputs + 2)
    by_gradients = 2 * rows * positions * inputs * outputs + rows**2 * inputs * outputs
    return _gram_of_pairs(x, g) if by_pairs < by_gradients else _gram_of_gradients(x, g)


def sub_fisher_spectrum(x: Tensor, g: Tensor) -> Tensor:
    """Nonzero eigenvalues of one layer's block of the Fisher matrix, exact: the sub-FIM of Huang et al. 2020, Eq. 4.

    By the N x N dual, or by the P x P block itself where P = d_in d_out is smaller than the number of gradients.

    Args:
        x: as in :func:`gradient_gram`.
        g: as in :func:`gradient_gram`.

    Returns:
        (min(N, P),) float64 on the host, largest first; (min(C N, P),) with labels. All others of the P eigenvalues
        are 0: pass ``dimension=d_in * d_out`` to :func:`condition_number` to count them. NaN in, NaN out.

    Raises:
        InputError: if the shapes do not fit, or there is no sample.

    >>> import torch
    >>> sub_fisher_spectrum(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0], [3.0]]))
    tensor([10.1098,  0.8902], dtype=torch.float64)
    """
    return fisher_spectrum([(x, g)])


def fisher_spectrum(layers: Sequence[Layer]) -> Tensor:
    """Nonzero eigenvalues of the Fisher matrix of several layers together, blocks between layers included.

    The dual of all is the sum of the layers' duals. Huang et al. 2020, Fig. 1, compares it with the sub-FIMs.

    Args:
        layers: pairs (x, g) as in :func:`gradient_gram`, of the same samples and labels.

    Returns:
        As :func:`sub_fisher_spectrum`, with P the parameters of all layers.

    Raises:
        InputError: if shapes do not fit, or there is no layer or sample.

    >>> import torch
    >>> x, g = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0], [3.0]])
    >>> fisher_spectrum([(x, g), (x, g)])
    tensor([20.2195,  1.7805], dtype=torch.float64)
    """
    ready = _same_samples(layers)
    labels, n = ready[0][1].shape[:2]
    size = sum(x.shape[2] * g.shape[3] for x, g in ready)
    if size < labels * n:
        total = torch.zeros(size, size, dtype=torch.float64, device=ready[0][0].device)
        rows = max(1, BLOCK // size)
        for label in range(labels):
            for start in range(0, n, rows):
                piece = [_gradients(x, g[label], slice(start, start + rows)) for x, g in ready]
                total += inner_products(torch.cat(piece, 1).T)
    else:
        total = gradient_gram(*ready[0])
        for x, g in ready[1:]:
            total += gradient_gram(x, g)
    return spectrum(total) / n


def kronecker_factor_spectra(x: Tensor, g: Tensor) -> Layer:
    """Eigenvalues of the two factors of K-FAC: of ``A = E[x x^T]`` and ``G = E[sum over positions of g g^T]``.

    Huang et al. 2020, Eq. 4: ``F ~ A (x) G``, both uncentred; their products are the eigenvalues of the sub-FIM so
    approximated (:func:`kronecker_condition_number`). A is a mean over samples and positions, G over samples.

    Args:
        x: as in :func:`gradient_gram`.
        g: as in :func:`gradient_gram`.

    Returns:
        (d_in,) and (d_out,) float64 on the host, largest first.

    Raises:
        InputError: if the shapes do not fit.

    >>> import torch
    >>> kronecker_factor_spectra(torch.eye(2), torch.tensor([[2.0], [4.0]]))
    (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([10.], dtype=torch.float64))
    """
    x, g = _ready(x, g)
    labels, _, positions, _ = g.shape
    of_outputs = covariance_spectrum(g.reshape(-1, g.shape[3])) * (labels * positions)
    return covariance_spectrum(x.reshape(-1, x.shape[2])), of_outputs


def fisher_linear_operator(layers: Sequence[Layer]) -> Any:
    """The exact Fisher matrix of several layers as a ``scipy.sparse.linalg.LinearOperator``, nothing formed.

    A vector is the layers' weights (d_out, d_in) flattened row by row, one after the other, as torch stores them. A
    product costs 4 N T d_in d_out multiply-adds per layer, in float64. For ``eigsh``, stochastic Lanczos and traces.

    Args:
        layers: as in :func:`fisher_spectrum`.

    Raises:
        InputError: as in :func:`fisher_spectrum`.

    >>> import torch
    >>> x, g = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0], [3.0]])
    >>> fisher_linear_operator([(x, g)]) @ [1.0, 0.0]
    array([6.5, 4.5])
    """
    ready = [(x.detach().double(), g.detach().double()) for x, g in _same_samples(layers)]
    n = ready[0][0].shape[0]
    sizes = [x.shape[2] * g.shape[3] for x, g in ready]
    device = ready[0][0].device

    def times(vector: Floats) -> Floats:
        weights = torch.from_numpy(vector).to(device).split(sizes)
        along = torch.zeros(ready[0][1].shape[:2], dtype=torch.float64, device=device)  # <gradient, vector>
        for (x, g), weight in zip(ready, weights, strict=True):
            along += ((x @ weight.view(g.shape[3], x.shape[2]).T) * g).sum((2, 3))
        images = []
        for x, g in ready:
            scaled = (g * along[:, :, None, None]).sum(0)  # (N, T, d_out): labels share x
            images.append((scaled.flatten(0, 1).T @ x.flatten(0, 1)).flatten() / n)
        product: Floats = torch.cat(images).cpu().numpy()
        return product

    return symmetric_operator(sum(sizes), times)


def as_linear_operator(covariance: Tensor, other: Tensor | None = None) -> Any:
    """A covariance, or a Kronecker product of two, as a ``scipy.sparse.linalg.LinearOperator`` in float64.

    With ``A = E[x x^T]`` and ``G = E[g g^T]``, K-FAC of a layer is ``as_linear_operator(A, G)``: to a weight flattened
    row by row as torch stores it, ``V -> G V A`` (Huang et al. 2020, Eq. 4, whose vectors are column by column).

    Args:
        covariance: (d_in, d_in), symmetric.
        other: (d_out, d_out), symmetric; without it the operator is ``covariance`` alone.

    Raises:
        InputError: if one is no square matrix.

    >>> import torch
    >>> as_linear_operator(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[10.0]])) @ [1.0, 1.0]
    array([20., 30.])
    """
    for name, matrix in (("covariance", covariance), ("other", covariance if other is None else other)):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"{name} needs a square matrix, got {tuple(matrix.shape)}")
    inner = covariance.detach().cpu().double().numpy()
    if other is None:
        return symmetric_operator(len(inner), lambda vector: inner @ vector)
    outer = other.detach().cpu().double().numpy()

    def times(vector: Floats) -> Floats:
        product: Floats = (outer @ vector.reshape(len(outer), len(inner)) @ inner).ravel()
        return product

    return symmetric_operator(len(inner) * len(outer), times)


def _ready(x: Tensor, g: Tensor) -> Layer:
    """(N, T, d_in) and (C, N, T, d_out)."""
    for name, value in (("x", x), ("g", g)):
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            raise InputError(f"{name} needs a floating-point tensor, got {type(value).__name__}")
    g = g.unsqueeze(0) if g.dim() == x.dim() else g
    if x.dim() < 2 or g.dim() != x.dim() + 1 or g.shape[1:-1] != x.shape[:-1] or 0 in (*x.shape, *g.shape):
        raise InputError(
            "x and g need the same samples and positions, (N, ..., d_in) and (N, ..., d_out) or (C, N, ..., d_out), "
            f"none empty, got {tuple(x.shape)} and {tuple(g.shape)}"
        )
    n, labels = x.shape[0], g.shape[0]
    positions = math.prod(x.shape[1:-1])
    return x.detach().reshape(n, positions, x.shape[-1]), g.detach().reshape(labels, n, positions, g.shape[-1])


def _same_samples(layers: Sequence[Layer]) -> list[Layer]:
    ready = [_ready(x, g) for x, g in layers]
    if not ready:
        raise InputError("layers needs at least one pair (x, g), got none")
    if len({g.shape[:2] for _, g in ready}) > 1:
        raise InputError(
            "layers need the same samples and labels in each, got (C, N) of "
            + ", ".join(str(tuple(g.shape[:2])) for _, g in ready)
        )
    return ready


def _gradients(x: Tensor, g: Tensor, samples: slice) -> Tensor:
    """Per-sample gradients of the weight, (samples, d_out * d_in) float64, for one label."""
    return torch.bmm(g[samples].double().mT, x[samples].double()).flatten(1)


def _gram_of_pairs(x: Tensor, g: Tensor) -> Tensor:
    """Every pair of positions, block by block of samples: each block of products is at most 8 MiB or T x T."""
    labels, n, positions, outputs = g.shape
    rows = labels * n
    flat = g.reshape(rows, positions, outputs).double()
    step = max(1, math.isqrt(BLOCK) // positions)
    total = x.new_zeros(rows, rows, dtype=torch.float64)
    of_inputs: dict[tuple[int, int], Tensor] = {}
    for first, second, label, other in _pairs(n, step, labels):
        if label == other == 0:
            of_inputs.clear()
        block = (slice(first, first + step), slice(second, second + step))
        if (first, second) not in of_inputs:
            left, right = (x[part].double() for part in block)
            of_inputs[first, second] = left.flatten(0, 1) @ right.flatten(0, 1).T
        left, right = flat[label * n : (label + 1) * n][block[0]], flat[other * n : (other + 1) * n][block[1]]
        products = (left.flatten(0, 1) @ right.flatten(0, 1).T).mul_(of_inputs[first, second])
        sums = products.view(len(left), positions, len(right), positions).sum((1, 3))
        at = (label * n + first, other * n + second)
        total[at[0] : at[0] + len(left), at[1] : at[1] + len(right)] = sums
        total[at[1] : at[1] + len(right), at[0] : at[0] + len(left)] = sums.T
    return total


def _pairs(n: int, step: int, labels: int) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of samples and pairs of labels that make one triangle, those that share inputs together."""
    for first in range(0, n, step):
        for second in range(first, n, step):
            for label in range(labels):
                for other in range(label if first == second else 0, labels):
                    yield first, second, label, other


def _gram_of_gradients(x: Tensor, g: Tensor) -> Tensor:
    """The gradients themselves, some outputs and inputs at a time."""
    labels, n, _, outputs = g.shape
    rows = labels * n
    wide = max(1, min(x.shape[2], BLOCK // rows))
    high = max(1, min(outputs, BLOCK // (rows * wide)))
    total = x.new_zeros(rows, rows, dtype=torch.float64)
    for left in range(0, x.shape[2], wide):
        inputs = x[:, :, left : left + wide].double()
        for top in range(0, outputs, high):
            above = g[:, :, :, top : top + high].double()
            pieces = [torch.bmm(of_label.mT, inputs).flatten(1) for of_label in above]
            total += inner_products(torch.cat(pieces))
    return total

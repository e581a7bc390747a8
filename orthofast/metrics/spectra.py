"""Spectra of covariances: all eigenvalues, the largest, condition numbers kappa_p and what noise alone gives.

Huang et al. 2020, Section 2, measures how hard a layer is to train by ``kappa_p = lambda_max / lambda_p``, lambda_p the
(p d)-th largest of d eigenvalues. Eigenvalues below ``max(N, d) * eps * lambda_max`` are rounding: they bound
kappa_p from below, and no small number is ever added to them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.domination import largest_singular_values, starting_vector
from orthofast.metrics.operators import largest_eigenvalue

BLOCK = 1 << 20  # elements read as float64 at a time: 8 MiB
ROUNDS = 4  # Lanczos processes on a device, each from where the last one ended


class ConditionNumber(NamedTuple):
    """lambda_max / lambda_p, and whether it was resolved.

    Attributes:
        value: () float64, at least 1; NaN for a matrix of zeros.
        resolved_rank: () int64, eigenvalues above the tolerance.
        is_lower_bound: () bool, lambda_p lies below the tolerance: the value is lambda_max over the tolerance.
    """

    value: Tensor
    resolved_rank: Tensor
    is_lower_bound: Tensor


def spectrum(covariance: Tensor) -> Tensor:
    """All eigenvalues of a symmetric matrix, largest first, by LAPACK in float64 on the host.

    Work about 4/3 d^3 multiply-adds. Memory d^2 float64. The covariances are those of Huang et al. 2020, Eq. 4.

    Args:
        covariance: (d, d), any float dtype, on any device; only the lower triangle is read.

    Returns:
        (d,) float64 on the host, which is waited for. All NaN where an entry is NaN or Inf. Eigenvalues that are 0
        come out as rounding, of either sign: see :func:`eigenvalue_tolerance`.

    Raises:
        InputError: if it is no square floating-point matrix.

    >>> import torch
    >>> spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([3., 1.], dtype=torch.float64)
    """
    matrix = _square(covariance).detach().to("cpu", torch.float64)
    if not _finite_below_diagonal(matrix):
        return matrix.new_full((len(matrix),), float("nan"))
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.flip(0)


def lambda_max(covariance: Tensor) -> Tensor:
    """Largest eigenvalue of a symmetric positive semi-definite matrix.

    On the host by ARPACK, to float64 rounding, reading the lower triangle: far below the cost of all eigenvalues
    (Huang et al. 2020, Section 2: one over it bounds the learning rate). On a GPU by a few Lanczos processes over the
    whole matrix, without a synchronisation: it approaches from below, to about six digits where the spectrum is flat.

    Args:
        covariance: (d, d), any float dtype.

    Returns:
        () float64 on the covariance's device; NaN with NaN or Inf in it, or without entries.

    Raises:
        InputError: if it is no square floating-point matrix.

    >>> import torch
    >>> lambda_max(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor(3., dtype=torch.float64)
    """
    matrix = _square(covariance).detach()
    if len(matrix) == 0:
        return torch.full((), float("nan"), dtype=torch.float64, device=matrix.device)
    if matrix.device.type != "cpu":
        return _lambda_max_by_lanczos(matrix)
    rows = matrix.to(torch.float64).contiguous().numpy()
    start = starting_vector(len(rows), matrix.device).to(torch.float64).numpy()
    return torch.tensor(largest_eigenvalue(rows, start), dtype=torch.float64)


def _lambda_max_by_lanczos(matrix: Tensor) -> Tensor:
    """The largest singular value, which a semi-definite matrix shares; from below, with no synchronisation."""
    values = matrix.new_zeros(1, dtype=torch.float64)
    starts = [starting_vector(len(matrix), matrix.device)]
    for _ in range(ROUNDS):
        values, starts = largest_singular_values([matrix], starts)
    return values[0]


def covariance_spectrum(rows: Tensor) -> Tensor:
    """All eigenvalues of the uncentred covariance ``X^T X / N`` of N rows, from the smaller side.

    For N < d the N x N matrix ``X X^T / N`` has the same eigenvalues but for d - N zeros, which are given as such.
    Accumulated in float64 from blocks of 8 MiB; no d x d array is made where N is smaller.

    Args:
        rows: (N, d), any float dtype and strides.

    Returns:
        (d,) float64 on the host, largest first. NaN without rows, or with NaN or Inf among them.

    Raises:
        InputError: if it is no floating-point matrix.

    >>> import torch
    >>> covariance_spectrum(torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]]))
    tensor([12.5000,  2.0000,  0.0000], dtype=torch.float64)
    """
    if not isinstance(rows, Tensor) or not rows.dtype.is_floating_point or rows.dim() != 2:
        raise InputError(f"rows needs a floating-point tensor (N, d), got {_told(rows)}")
    n, d = rows.shape
    if n == 0:
        return torch.full((d,), float("nan"), dtype=torch.float64)
    values = spectrum(inner_products(rows if n < d else rows.T)) / n
    return torch.cat([values, values.new_zeros(max(0, d - n))])


def inner_products(rows: Tensor) -> Tensor:
    """``X X^T`` of (n, d), (n, n) float64 on their device: half the work of a product on the host."""
    n, d = rows.shape
    total = rows.new_zeros(n, n, dtype=torch.float64)
    width = max(1, BLOCK // max(1, n))
    for start in range(0, d, width):
        block = rows[:, start : start + width].detach().to(torch.float64)
        if block.device.type == "cpu":
            array = block.numpy()
            total += torch.from_numpy(np.matmul(array, array.T))  # a symmetric product to NumPy, not to torch
        else:
            total.addmm_(block, block.T)
    return total


def eigenvalue_tolerance(d: int, count: int | None = None, dtype: torch.dtype = torch.float64) -> float:
    """Share of lambda_max below which an eigenvalue is rounding: ``max(N, d) * eps``.

    Args:
        d: side of the matrix.
        count: N, how many rows it was averaged over.
        dtype: what it was accumulated in; of 16-bit rows too, where sums are wider than their terms, the rows' own.

    >>> eigenvalue_tolerance(1000) < 1e-12 < eigenvalue_tolerance(1000, dtype=torch.float32)
    True
    """
    return max(d, count or 0, 1) * torch.finfo(dtype).eps


def condition_number(
    eigenvalues: Tensor,
    p: float = 1.0,
    *,
    count: int | None = None,
    tol: float | None = None,
    nonzero: bool = False,
    dimension: int | None = None,
) -> ConditionNumber:
    """``kappa_p = lambda_max / lambda_p``, lambda_p the ``ceil(p d)``-th largest of d eigenvalues.

    Huang et al. 2020, Section 2. The product of two kappa_p is not that of a Kronecker product for p < 1: see
    :func:`kronecker_condition_number`.

    Args:
        eigenvalues: (d,) in any order, of a positive semi-definite matrix.
        p: share of the eigenvalues, above 0, at most 1. 0.9 of 10 is the 9th, as written, not as rounded.
        count: N, how many rows the matrix was averaged over; it widens the default tolerance.
        tol: share of lambda_max at and below which an eigenvalue counts as 0; :func:`eigenvalue_tolerance`.
        nonzero: count only the eigenvalues above the tolerance: with p = 1, the paper's kappa, which divides by the
            smallest eigenvalue that is not 0.
        dimension: d, where the eigenvalues given are the nonzero ones only, as from a dual.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> condition_number(torch.tensor([8.0, 4.0, 2.0, 0.0]), 0.75)
    ConditionNumber(value=tensor(4., dtype=torch.float64), resolved_rank=tensor(3), is_lower_bound=tensor(False))
    """
    values, tol = checked_eigenvalues(eigenvalues, "eigenvalues", count, tol)
    d = len(values) if dimension is None else dimension
    if type(d) is not int or d < len(values):
        raise InputError(f"dimension needs an integer of at least {len(values)}, the eigenvalues given, got {d!r}")
    place = rank_of(p, d)
    top = values[0] if len(values) else torch.tensor(float("nan"), dtype=torch.float64)
    if not bool(top > 0):
        return of_nothing(top)
    floor = tol * top
    rank = int((values > floor).sum())
    if nonzero:
        place = rank_of(p, rank)
    chosen = values[place] if place < len(values) else torch.zeros_like(top)
    return ConditionNumber(top / torch.maximum(chosen, floor), torch.tensor(rank), chosen <= floor)


def rank_of(p: float, d: int) -> int:
    """Place of lambda_p among d eigenvalues, from 0: ``ceil(p d) - 1`` of the decimal number p as written.

    Raises:
        InputError: if p is not above 0 and at most 1.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p <= 1:
        raise InputError(f"p needs a share of the eigenvalues, above 0 and at most 1, got {p!r}")
    return max(1, math.ceil(Fraction(repr(float(p))) * d)) - 1


def marchenko_pastur_condition(n: int, d: int, p: float = 1.0) -> float:
    """kappa_p that N rows of white noise in R^d show, whose true kappa is 1: what to compare a measured one with.

    Eigenvalues of ``X^T X / N`` fill ``(1 +- sqrt(r))^2``, r = d / N (Marchenko and Pastur 1967, N and d large):
    ``kappa = ((1 + sqrt(r)) / (1 - sqrt(r)))^2``, 34 at N = 2 d, 2.8 at 16 d. For p < 1 the quantile of their density.

    Args:
        n: number of rows.
        d: their length.
        p: as in :func:`condition_number`.

    Returns:
        At least 1; inf where fewer than ``p d`` eigenvalues are nonzero.

    Raises:
        InputError: if an argument cannot be used.

    >>> [round(marchenko_pastur_condition(n, 256), 2) for n in (256, 512, 4096)]
    [inf, 33.97, 2.78]
    >>> round(marchenko_pastur_condition(512, 256, 0.5), 2)
    3.51
    """
    if type(n) is not int or n < 1 or type(d) is not int or d < 1:
        raise InputError(f"n and d need positive integers, rows and their length, got {n!r} and {d!r}")
    rank_of(p, d)
    root = math.sqrt(d / n)
    least, whole = abs(1 - root), min(1.0, n / d)  # of the square roots; share that is not 0
    if p > whole:
        return math.inf
    if p == whole:
        return ((1 + root) / least) ** 2 if least > 0 else math.inf
    # eigenvalues are 1 + r + 2 sqrt(r) cos(angle): the share above, by the angle
    middle, half = 1 + root * root, 2 * root
    slope = least / (1 + root)

    def share(angle: float) -> float:
        turned = math.atan2(slope * math.sin(angle / 2), math.cos(angle / 2))
        edges = 2 * abs(1 - root * root) * turned
        return 2 / math.pi * (middle * angle - half * math.sin(angle) - edges) / half**2

    low, high = 0.0, math.pi
    while (angle := (low + high) / 2) not in (low, high):
        low, high = (angle, high) if share(angle) < p else (low, angle)
    # (1 - root)^2 + 4 root cos^2(angle / 2): nothing cancels near the lower edge
    return (1 + root) ** 2 / (least**2 + 4 * root * math.cos(high / 2) ** 2)


def _square(covariance: Tensor) -> Tensor:
    if (
        not isinstance(covariance, Tensor)
        or not covariance.dtype.is_floating_point
        or covariance.dim() != 2
        or covariance.shape[0] != covariance.shape[1]
    ):
        raise InputError(f"covariance needs a square floating-point matrix (d, d), got {_told(covariance)}")
    return covariance


def _told(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _finite_below_diagonal(matrix: Tensor) -> bool:
    height = max(1, BLOCK // max(1, len(matrix)))
    return all(
        bool(matrix[start : start + height, : start + height].tril(start).isfinite().all())
        for start in range(0, len(matrix), height)
    )


def checked_eigenvalues(eigenvalues: Tensor, name: str, count: int | None, tol: float | None) -> tuple[Tensor, float]:
    """Largest first in float64 on the host, and the tolerance; where one is NaN or Inf, all are NaN."""
    if not isinstance(eigenvalues, Tensor) or not eigenvalues.dtype.is_floating_point or eigenvalues.dim() != 1:
        raise InputError(f"{name} needs a floating-point tensor (d,), got {_told(eigenvalues)}")
    if count is not None and (type(count) is not int or count < 1):
        raise InputError(f"count needs a positive integer, the rows averaged over, got {count!r}")
    if tol is None:
        tol = eigenvalue_tolerance(len(eigenvalues), count, eigenvalues.dtype)
    elif not 0 <= tol < 1:
        raise InputError(f"tol needs a share of lambda_max, at least 0 and below 1, got {tol!r}")
    values = eigenvalues.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        return torch.full_like(values, float("nan")), tol
    return values.sort(descending=True).values, tol


def of_nothing(top: Tensor) -> ConditionNumber:
    """Of a matrix of zeros, of nothing, or of NaN."""
    return ConditionNumber(torch.full_like(top, float("nan")), torch.tensor(0), torch.tensor(False))

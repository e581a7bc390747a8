"""What SciPy is asked for: the largest eigenvalue by ARPACK, and Fishers and covariances as linear operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SMALL = 48  # sides: below, LAPACK's whole spectrum is faster than an iteration


def largest_eigenvalue(matrix: Floats, start: Floats) -> float:
    """Largest eigenvalue of a symmetric positive semi-definite matrix, to float64 rounding, by ARPACK.

    Work about 40 d^2 multiply-adds, half of the matrix read per product; no copy of it is made. NaN in, NaN out.

    Args:
        matrix: (d, d), rows contiguous; the lower triangle is read.
        start: (d,), without zeros; the same one gives the same bits.
    """
    from scipy.linalg.blas import dsymv
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    columns = matrix.T  # the same memory as BLAS reads it: the lower triangle becomes the upper
    if not np.isfinite(dsymv(1.0, columns, start)).all():
        return float("nan")
    if not matrix.diagonal().any():
        return 0.0
    if len(matrix) <= SMALL:
        return float(np.linalg.eigvalsh(matrix)[-1])
    operator = LinearOperator(matrix.shape, matvec=lambda vector: dsymv(1.0, columns, vector), dtype=np.float64)
    options: dict[str, Any] = {"k": 1, "which": "LA", "v0": start, "return_eigenvectors": False}
    if "rng" in inspect.signature(eigsh).parameters:
        options["rng"] = np.random.default_rng(len(matrix))  # what an invariant subspace is left by
    try:
        return float(eigsh(operator, **options)[0])
    except ArpackError:  # no convergence within its iterations
        return float(np.linalg.eigvalsh(matrix)[-1])


def symmetric_operator(size: int, times: Callable[[Floats], Floats]) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` of a symmetric matrix in float64.

    Args:
        size: its side.
        times: the product with a vector (size,) float64, contiguous and not to be written to.
    """
    from scipy.sparse.linalg import LinearOperator

    def product(vector: Any) -> Floats:
        return times(np.array(vector, dtype=np.float64).ravel())

    return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=np.float64)

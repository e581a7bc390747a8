"""Order statistics of a Kronecker product's spectrum, all a_i b_j, without the array of products.

Huang et al. 2020, Proposition 1: with ``F = A (x) G``, lambda_max and kappa are the products of the factors'. kappa_p
for p < 1 is not; it needs the k-th largest of the m n products. The number of products at or above t,

    #{(i, j) : a_i b_j >= t}  =  sum_i #{j : b_j >= t / a_i},

is one sorted search per a_i. t is bisected over the bit patterns of float64, each a_i keeping the range of b_j still
open, until few products are left between the bounds: these are made and the one at its place is taken, the same
float64 as sorting all products gives.
Work  about 20 m log n.  Memory  O(m + n) + 0.5 MiB.  Products below 2^-960 of the largest count as 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.spectra import ConditionNumber, checked_eigenvalues, of_nothing, rank_of

Floats = NDArray[np.float64]
CANDIDATES = 1 << 14  # products: fewer are made and partitioned
LEAST = 2.0**-960  # of the largest product: under it products lose digits


def kronecker_quantile(a: Tensor, b: Tensor, p: float) -> Tensor:
    """lambda_p of a Kronecker product: the ``ceil(p m n)``-th largest of all products ``a_i b_j``.

    Args:
        a: (m,) eigenvalues of one factor, in any order; negative ones are rounding and count as 0.
        b: (n,) of the other.
        p: share of the products, above 0, at most 1.

    Returns:
        () float64 on the host, exactly the product that sorting them all would give; NaN with NaN or Inf among the
        eigenvalues, or without any.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> kronecker_quantile(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.0]), 0.75)
    tensor(3., dtype=torch.float64)
    """
    place = rank_of(p, len(a) * len(b))
    (first, _), (second, _) = checked_eigenvalues(a, "a", None, None), checked_eigenvalues(b, "b", None, None)
    return torch.tensor(_largest(first.numpy(), second.numpy(), place), dtype=torch.float64)


def kronecker_spectrum(a: Tensor, b: Tensor, k: int | None = None) -> Tensor:
    """The k largest eigenvalues of a Kronecker product, largest first; all of them with ``k=None``.

    Arguments and errors as in :func:`kronecker_quantile`. Memory O(m + n + k).

    >>> import torch
    >>> kronecker_spectrum(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.0]), 3)
    tensor([12.,  8.,  3.], dtype=torch.float64)
    """
    (first, _), (second, _) = checked_eigenvalues(a, "a", None, None), checked_eigenvalues(b, "b", None, None)
    size = len(first) * len(second)
    k = size if k is None else k
    if type(k) is not int or not 0 <= k <= size:
        raise InputError(f"k needs an integer from 0 to {size}, the number of products, got {k!r}")
    if k == 0 or bool(first.isnan().any() | second.isnan().any()):
        return torch.full((k,), float("nan"), dtype=torch.float64)
    left, right, shift = _ready(first.numpy(), second.numpy())
    threshold = _kth(left, right, k - 1)
    pieces, known = [], 0
    for value in left:  # largest first: what is above the threshold is a prefix
        row = value * right[::-1]
        above = row[row > threshold] if threshold > 0 else row[row >= LEAST]
        if not len(above):
            break
        pieces.append(above)
        known += len(above)
    found = np.concatenate([*pieces, np.full(k - known, threshold)])
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ldexp(np.sort(found)[::-1], shift))


def kronecker_condition_number(
    a: Tensor,
    b: Tensor,
    p: float = 1.0,
    *,
    count: int | None = None,
    tol: float | tuple[float, float] | None = None,
    nonzero: bool = False,
) -> ConditionNumber:
    """kappa_p of a Kronecker product from the eigenvalues of its factors.

    Huang et al. 2020, Eq. 4 and Proposition 1: ``F = A (x) G``, the sub-FIM of a layer by K-FAC. For p = 1 it is the
    product of the factors' kappa, for other p it is not: at p = 0.5, (8, 4, 2, 1) and (9, 3, 1) have 2 and 3, their
    product has 8.

    An eigenvalue below its factor's tolerance is known only to lie between 0 and the tolerance. With the tolerance in
    its place, lambda_p is at most too large, and the value a lower bound; where 0 in its place gives the same
    lambda_p, the value is exact.

    Args:
        a: (m,) eigenvalues of one factor, in any order.
        b: (n,) of the other.
        p: as in :func:`condition_number`, of the m n products.
        count: N, how many rows both factors were averaged over.
        tol: share of its factor's largest at and below which an eigenvalue counts as 0, one for both factors or one
            each; :func:`eigenvalue_tolerance`.
        nonzero: count only products of eigenvalues above the tolerance.

    Returns:
        :class:`ConditionNumber`; its rank is the product of the factors' ranks.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> kronecker_condition_number(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.0]), 0.75).value
    tensor(4., dtype=torch.float64)
    """
    kept, raised, exact = [], [], []
    of_a, of_b = tol if isinstance(tol, tuple) else (tol, tol)
    for values, limit in (checked_eigenvalues(a, "a", count, of_a), checked_eigenvalues(b, "b", count, of_b)):
        array = values.numpy()
        if not len(array) or not array[0] > 0:
            rank_of(p, 1)
            return of_nothing(torch.zeros((), dtype=torch.float64))
        array = np.ldexp(array, -int(np.frexp(array[0])[1]))  # products of eigenvalues near 1 stay in range
        floor = limit * array[0]
        kept.append(array[array > floor])
        raised.append(np.maximum(array, floor))
        exact.append(np.where(array > floor, array, 0))
    rank = len(kept[0]) * len(kept[1])
    top = kept[0][0] * kept[1][0]
    size = len(raised[0]) * len(raised[1])
    if nonzero or rank == size:
        least, known = _largest(kept[0], kept[1], rank_of(p, rank)), True
    else:
        place = rank_of(p, size)
        least = _largest(raised[0], raised[1], place)
        known = least == _largest(exact[0], exact[1], place)
    value = top / least if least > 0 else math.inf
    return ConditionNumber(torch.tensor(value, dtype=torch.float64), torch.tensor(rank), torch.tensor(not known))


def kronecker_histogram(a: Tensor, b: Tensor, edges: Tensor) -> Tensor:
    """How many eigenvalues of a Kronecker product lie in each bin: ``edges[k] <= a_i b_j < edges[k + 1]``.

    The last bin is closed. The histograms of FIM spectra in Huang et al. 2020, Fig. 1, without the spectrum.

    Args:
        a: (m,) eigenvalues of one factor; negative ones count as 0.
        b: (n,) of the other.
        edges: (bins + 1,) ascending, at least 0; even in the logarithm for spectra, with 0 in front for the rest.

    Returns:
        (bins,) int64 on the host. Memory O(m + n + bins).

    Raises:
        InputError: if an argument cannot be used, NaN or Inf among the eigenvalues included.

    >>> import torch
    >>> kronecker_histogram(torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.0]), torch.tensor([0.0, 3.0, 12.0]))
    tensor([1, 3])
    """
    (first, _), (second, _) = checked_eigenvalues(a, "a", None, None), checked_eigenvalues(b, "b", None, None)
    if bool(first.isnan().any() | second.isnan().any()):
        raise InputError("kronecker_histogram needs finite eigenvalues, got NaN or Inf")
    limits = edges.detach().to("cpu", torch.float64)
    if limits.dim() != 1 or len(limits) < 2 or bool((limits.diff() <= 0).any() | (limits[:1] < 0).any()):
        raise InputError(f"edges needs at least two ascending numbers (bins + 1,), from 0 on, got {edges!r}")
    left, right, shift = _ready(first.numpy(), second.numpy())
    total = len(first) * len(second)
    with np.errstate(all="ignore"):  # an edge may leave the range of float64 with the scale
        scaled = np.ldexp(limits.numpy(), -shift)
    scaled[-1] = np.nextafter(scaled[-1], math.inf)
    above = [total if edge == 0 else _count(left, right, edge) for edge in scaled.tolist()]
    return torch.from_numpy(-np.diff(above))


def _largest(a: Floats, b: Floats, place: int) -> float:
    """The product at that place, largest first, from 0; NaN without products or with NaN in either."""
    if not len(a) * len(b) or np.isnan(a[0]) or np.isnan(b[0]):
        return math.nan
    left, right, shift = _ready(a, b)
    with np.errstate(over="ignore"):  # a product beyond float64 is inf
        return float(np.ldexp(_kth(left, right, place), shift))


def _ready(a: Floats, b: Floats) -> tuple[Floats, Floats, int]:
    """The shorter one largest first, the other smallest first, both scaled below 1 by powers of two, and the power."""
    left, right = (np.sort(np.maximum(values, 0)) for values in sorted((a, b), key=len))
    powers = [int(np.frexp(values[-1])[1]) if len(values) else 0 for values in (left, right)]
    return np.ldexp(left, -powers[0])[::-1].copy(), np.ldexp(right, -powers[1]), sum(powers)


def _kth(left: Floats, right: Floats, place: int) -> float:
    """The product at that place, largest first, of what :func:`_ready` gives."""
    rows = left[left > 0]
    first = np.full(len(rows), len(right))  # partners from here on reach the upper bound: none
    last = np.searchsorted(right, _partners(rows, LEAST))  # and from here on the lower one
    above = 0  # products at or above the upper bound, in all rows
    if len(rows) * len(right) - int(last.sum()) <= place:
        return 0.0
    # positive floats are ordered as their bits are
    low = int(np.float64(LEAST).view(np.int64))
    high = int(np.float64(left[0] * right[-1]).view(np.int64)) + 1
    while high - low > 1 and int((first - last).sum()) > CANDIDATES:
        middle = (low + high) // 2
        split = np.searchsorted(right, _partners(rows, float(np.int64(middle).view(np.float64))))
        count = above + int((first - split).sum())
        if count > place:
            low, last = middle, split
        else:
            high, first, above = middle, split, count
        open_rows = first > last
        rows, first, last = rows[open_rows], first[open_rows], last[open_rows]
    if high - low == 1:  # all that is left are ties
        return float(np.int64(low).view(np.float64))
    each = first - last
    partners = np.arange(int(each.sum())) + np.repeat(last - np.cumsum(each) + each, each)
    products = np.repeat(rows, each) * right[partners]
    at = len(products) - 1 - (place - above)
    return float(np.partition(products, at)[at])


def _count(left: Floats, right: Floats, t: float) -> int:
    """Products at or above t > 0, as rounded to float64."""
    rows = left[left > 0]
    return len(rows) * len(right) - int(np.searchsorted(right, _partners(rows, max(t, LEAST))).sum())


def _partners(rows: Floats, t: float) -> Floats:
    """Per row the least number whose product with it, as rounded, is at or above t: within two steps of t / row."""
    with np.errstate(over="ignore"):
        partner = np.nextafter(np.nextafter(t / rows, 0), 0)
        for _ in range(4):
            partner = np.where(rows * partner < t, np.nextafter(partner, np.inf), partner)
    return partner

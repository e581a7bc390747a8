"""How far a set of vectors is from pairwise orthogonal: PII and the other sums over pairs of cosines."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import Sample, gram_stats, mean_abs_cosine, mean_square_cosine
from orthofast.kernels.autograd import needs_operator
from orthofast.kernels.doors import handler_of
from orthofast.metrics import column_gram
from orthofast.metrics.answers import answer, needed
from orthofast.records import GramStats
from orthofast.views import Array, as_vectors

GAMMA_LIMIT = 300  # math.gamma overflows beyond 171, half of 342
EXACT = ("auto", "highest", "float64")  # precisions the float64 side of the mean square satisfies


class MaxCoherence(NamedTuple):
    """The largest absolute cosine and the pair that attains it.

    Attributes:
        value: () float64, or (heads,); NaN where no pair exists or a vector holds NaN or Inf.
        pair: (2,) int64, or (heads, 2); indices i < j of the two vectors; (-1, -1) where ``value`` is NaN.
    """

    value: Tensor
    pair: Tensor


class CosineHistogram(NamedTuple):
    """Signed cosines counted in equal bins on [-1, 1].

    Attributes:
        counts: (bins,) int64, or (heads, bins); all zero where a vector holds NaN or Inf.
        edges: (bins + 1,) float64.
    """

    counts: Tensor
    edges: Tensor


def pii_from(stats: GramStats) -> Tensor:
    """The formula of :func:`pii` on a record of cosines with ``abs_sum``: ``abs_sum / pairs``, (b,)."""
    total = needed(stats.abs_sum, "pii", "abs_sum")
    return (total / stats.pairs).clamp_max_(1)  # parallel vectors may round to 1 + 1e-16


def pii(
    weight: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Parameters Independence Index: the mean absolute cosine over all pairs of a weight's vectors.

    ``PII = 2 / (n (n - 1)) * sum over i < j of |<w_i, w_j>| / (|w_i| |w_j|)``

    Range [0, 1]. 0: all vectors are pairwise orthogonal (impossible for n > d, see :func:`welch_bound`).
    1: all are parallel or antiparallel. Vectors without structure give :func:`isotropic_baseline`.
    Pairs with a vector of length 0 are left out. Lu et al. 2024, Definition 1, Eq. 6.

    Args:
        weight: (out, in) or (out, in, *kernel); a tensor or numpy array of any float dtype and any strides.
        vectors: "rows", "cols", "heads", "filters" or "center_tap", see :func:`orthofast.views.as_vectors`.
        heads: number of equal blocks of rows, with vectors="heads" only.
        sample: estimate from about this many random pairs; an int, or a :class:`orthofast.kernels.Sample` with a seed.
        precision: "highest" (exact operands), "high" (float32 rounded to 16 bits, faster), "float64", or "auto":
            "highest", but "high" for float32 on CUDA. There "high" is one fp16 pass, each vector scaled by a power of
            two; items whose mean is near the rounding floor (``floor``) are folded again with full operands.
        backend: obeyed or refused; None takes the fastest that can serve.

    Returns:
        () float64 on the weight's device, (heads,) for vectors="heads". NaN with fewer than two non-zero vectors, or
        where a vector holds NaN or Inf. Differentiable wherever the weight requires a gradient, which is made in the
        same sweep and costs twice the value (:func:`orthofast.kernels.mean_abs_cosine` has the formula and a smooth
        form); measure under ``torch.no_grad()`` to save it.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> pii(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    tensor(0.3333, dtype=torch.float64)
    >>> pii(torch.eye(4), vectors="heads", heads=2)
    tensor([0., 0.], dtype=torch.float64)
    """
    x = as_vectors(weight, vectors, heads)
    if needs_operator(x):
        return answer(mean_abs_cosine(x, sample=sample, precision=precision, backend=backend), vectors)
    stats = gram_stats(x, sample=sample, precision=precision, backend=backend)
    return answer(pii_from(stats), vectors)


def max_coherence_from(stats: GramStats) -> MaxCoherence:
    """The formula of :func:`max_coherence` on a record of cosines with ``abs_max``: values (b,) and pairs (b, 2)."""
    value = needed(stats.abs_max, "max_coherence", "abs_max")
    return MaxCoherence(value.clamp(0, 1), needed(stats.argmax, "max_coherence", "abs_max"))


def max_coherence(
    weight: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> MaxCoherence:
    """The largest absolute cosine between two of a weight's vectors, and which two: near 1, they are duplicates.

    ``max over i < j of |<w_i, w_j>| / (|w_i| |w_j|)``, the mutual coherence of the set.

    Range [0, 1]. 0: pairwise orthogonal. 1: some pair is parallel. Not below the square root of :func:`welch_bound`
    (Welch 1974). Arguments and errors as in :func:`pii`; a sample would miss the maximum.

    Returns:
        :class:`MaxCoherence`; among equal maxima the pair is the same from run to run.

    >>> import torch
    >>> value, pair = max_coherence(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -2.0]]))
    >>> value.item(), pair.tolist()
    (1.0, [1, 2])
    """
    x = as_vectors(weight, vectors, heads)
    found = max_coherence_from(gram_stats(x, want=("abs_max",), precision=precision, backend=backend))
    return MaxCoherence(answer(found.value, vectors), answer(found.pair, vectors))


def cosine_histogram_from(stats: GramStats) -> CosineHistogram:
    """The formula of :func:`cosine_histogram` on a record of cosines with ``hist``: counts (b, bins) and edges."""
    counts = needed(stats.hist, "cosine_histogram", "hist")
    edges = torch.linspace(-1, 1, counts.shape[1] + 1, dtype=torch.float64, device=counts.device)
    return CosineHistogram(counts, edges)


def cosine_histogram(
    weight: Array,
    *,
    bins: int = 64,
    vectors: str = "rows",
    heads: int | None = None,
    sample: int | Sample | None = None,
    backend: str | None = None,
) -> CosineHistogram:
    """Signed cosines of all pairs of a weight's vectors, counted in equal bins on [-1, 1].

    ``counts[k] = #{i < j : edges[k] <= cos(w_i, w_j) < edges[k + 1]}``, the last bin closed: the values behind
    Lu et al. 2024, Fig. 1. Isotropic vectors give a bell of width ``1 / sqrt(d)`` around 0; a count at either end is a
    pair of duplicates. A cosine within rounding of an edge may be counted on either side of it.

    Args:
        weight: as in :func:`pii`, like the arguments not named here.
        bins: number of bins, at least 1.
        vectors: as in :func:`pii`.
        heads: as in :func:`pii`.
        sample: count about this many random pairs instead of all.
        backend: as in :func:`pii`.

    Returns:
        :class:`CosineHistogram`.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> cosine_histogram(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), bins=4).counts
    tensor([1, 0, 2, 0])
    """
    if type(bins) is not int or bins < 1:
        raise InputError(f"bins needs a positive integer, the number of bins on [-1, 1], got {bins!r}")
    x = as_vectors(weight, vectors, heads)
    found = cosine_histogram_from(gram_stats(x, want=("hist",), bins=bins, sample=sample, backend=backend))
    return CosineHistogram(answer(found.counts, vectors), found.edges)


def mean_squared_cosine_from(stats: GramStats) -> Tensor:
    """The formula of :func:`mean_squared_cosine` on a record of cosines with ``sq_sum``: ``sq_sum / pairs``, (b,)."""
    total = needed(stats.sq_sum, "mean_squared_cosine", "sq_sum")
    return (total / stats.pairs).clamp(0, 1)


def mean_squared_cosine(
    weight: Array,
    *,
    vectors: str = "rows",
    heads: int | None = None,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """The mean squared cosine over all pairs of a weight's vectors.

    ``2 / (n (n - 1)) * sum over i < j of cos(w_i, w_j)^2  =  (||X^T X||_F^2 - n) / (n (n - 1))``, rows of X normalised.

    Range [0, 1]. 0: pairwise orthogonal. 1: all parallel. Isotropic vectors give 1 / d, and no set goes below
    :func:`welch_bound` (Welch 1974). It bounds PII from both sides: ``msc <= pii <= sqrt(msc)``.

    Many short vectors (n >= 4 d) are measured in float64 on the d x d side, at d / n of the cost, without any backend;
    the pairs are folded otherwise, with ``sample``, with precision="high", and where a ``backend`` is named.
    Arguments, result, gradient and errors as in :func:`pii`.

    >>> import torch
    >>> mean_squared_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    x = as_vectors(weight, vectors, heads)
    if needs_operator(x):
        return answer(mean_square_cosine(x, sample=sample, precision=precision, backend=backend), vectors)
    whole = sample is None and backend is None and precision in EXACT and handler_of(x) is None
    if whole and column_gram.is_cheaper(*x.shape[1:]):
        return answer(column_gram.mean_square(x), vectors)
    stats = gram_stats(x, want=("sq_sum",), sample=sample, precision=precision, backend=backend)
    return answer(mean_squared_cosine_from(stats), vectors)


def isotropic_baseline(d: int) -> float:
    """Expected |cos| of two independent isotropic vectors in R^d: what PII is without any structure.

    ``E|cos| = gamma(d / 2) / (sqrt(pi) * gamma((d + 1) / 2))``, the mean of |x_1| over the unit sphere, about
    ``sqrt(2 / (pi d))``. 1 for d = 1, towards 0 with d. The PII of untrained layers in Lu et al. 2024, Tables 1 and 2:
    0.035 at d = 512, 0.070 at 128, 0.050 at 256.

    Args:
        d: length of the vectors, at least 1.

    Raises:
        InputError: if ``d`` is not a positive integer.

    >>> [round(isotropic_baseline(d), 5) for d in (3, 128, 512, 4096)]
    [0.5, 0.07066, 0.03528, 0.01247]
    """
    if type(d) is not int or d < 1:
        raise InputError(f"d needs a positive integer, the length of the vectors, got {d!r}")
    x = d / 2
    if d < GAMMA_LIMIT:
        return math.gamma(x) / (math.sqrt(math.pi) * math.gamma(x + 0.5))
    # gamma(x + 1/2) / gamma(x) / sqrt(x); the next term is below 1e-16 from here on
    series = 1 - 1 / (8 * x) + 1 / (128 * x**2) + 5 / (1024 * x**3) - 21 / (32768 * x**4) - 399 / (262144 * x**5)
    return 1 / (math.sqrt(math.pi * x) * series)


def welch_bound(n: int, d: int) -> float:
    """The least mean squared cosine that n vectors in R^d can have: a floor of PII too, and 0 for n <= d.

    ``max(0, (n - d) / (d (n - 1)))``. Welch 1974, k = 1; as a bound of PII: ``PII >= mean cos^2``.
    Any k stacked orthonormal bases attain it for the square, k times the same basis for PII too:
    ``(k - 1) / (k d - 1)``.
    Its square root bounds the largest coherence, and the regular simplex (n = d + 1) attains that: ``1 / d``.

    Args:
        n: number of vectors; fewer than 2 have no pairs and give NaN.
        d: their length, at least 1.

    Raises:
        InputError: if ``n`` or ``d`` is not such an integer.

    >>> welch_bound(12, 4), welch_bound(4, 12)
    (0.18181818181818182, 0.0)
    """
    if type(n) is not int or n < 0:
        raise InputError(f"n needs a non-negative integer, the number of vectors, got {n!r}")
    if type(d) is not int or d < 1:
        raise InputError(f"d needs a positive integer, the length of the vectors, got {d!r}")
    return max(0.0, (n - d) / (d * (n - 1))) if n > 1 else math.nan

"""How far a set of vectors is from pairwise orthogonal: PII and the other sums over pairs of cosines."""

from __future__ import annotations

import math

from torch import Tensor

from orthofast.errors import InputError
from orthofast.records import GramStats

GAMMA_LIMIT = 300  # math.gamma overflows beyond 171, half of 342


def isotropic_baseline(d: int) -> float:
    """Expected |cos| of two independent isotropic vectors: what PII is without any structure.

    ``E|cos| = gamma(d/2) / (sqrt(pi) * gamma((d+1)/2))``, about ``sqrt(2 / (pi * d))``; 1 for d = 1.
    The mean |x_1| over the unit sphere of R^d; the level of the "PII at initialisation" column of Lu et al. 2024, Table 1.

    Args:
        d: length of the vectors, at least 1.

    Raises:
        InputError: if ``d`` is not a positive integer.

    >>> round(isotropic_baseline(512), 5), isotropic_baseline(3)
    (0.03528, 0.5)
    """
    if type(d) is not int or d < 1:
        raise InputError(f"d needs a positive integer, the length of the vectors, got {d!r}")
    x = d / 2
    if d < GAMMA_LIMIT:
        return math.gamma(x) / (math.sqrt(math.pi) * math.gamma(x + 0.5))
    # gamma(x + 1/2) / gamma(x); the next term is below 1e-18 from here on
    series = 1 - 1 / (8 * x) + 1 / (128 * x**2) + 5 / (1024 * x**3) - 21 / (32768 * x**4) - 399 / (262144 * x**5)
    return 1 / (math.sqrt(math.pi * x) * series)


def pii_from(stats: GramStats) -> Tensor:
    """The formula of PII: ``abs_sum / pairs``, (b,), in [0, 1]; NaN without pairs or with NaN or Inf among the vectors."""
    if stats.abs_sum is None:
        raise InputError("pii needs a record folded with want='abs_sum'; add it to want")
    return (stats.abs_sum / stats.pairs).clamp(0, 1)  # parallel vectors may round to 1 + 1e-16

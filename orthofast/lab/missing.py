"""Arithmetic on numbers some of which may be missing: what comes of a missing one is missing, and holds nothing.

A network that diverges has no PII and no loss; ``max`` and ``min`` over such numbers would fail, or pass them over.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from orthofast.lab.verdict import Number


def minus(one: Number, other: Number) -> float | None:
    """Their difference.

    >>> minus(3.0, 1.0), minus(None, 1.0), minus(1.0, float("nan"))
    (2.0, None, None)
    """
    both = _known([one, other])
    return None if both is None else both[0] - both[1]


def distance(one: Number, other: Number) -> float | None:
    """Between them.

    >>> distance(1.0, 3.0), distance(None, 1.0)
    (2.0, None)
    """
    apart = minus(one, other)
    return None if apart is None else abs(apart)


def over(one: Number, other: Number) -> float | None:
    """Their quotient; missing where the second is 0.

    >>> over(3.0, 2.0), over(3.0, 0.0), over(None, 2.0)
    (1.5, None, None)
    """
    both = _known([one, other])
    return None if both is None or not both[1] else both[0] / both[1]


def times(factor: float, one: Number) -> float | None:
    """Their product.

    >>> times(100, 0.5), times(100, None)
    (50.0, None)
    """
    known = _known([one])
    return None if known is None else factor * known[0]


def root(one: Number) -> float | None:
    """Its square root; missing of a negative number.

    >>> root(4.0), root(-1.0), root(None)
    (2.0, None, None)
    """
    known = _known([one])
    return None if known is None or known[0] < 0 else math.sqrt(known[0])


def length(vector: Sequence[Number]) -> float | None:
    """Euclidean.

    >>> length([3.0, 4.0]), length([3.0, None])
    (5.0, None)
    """
    known = _known(vector)
    return None if known is None else math.hypot(*known)


def least(values: Sequence[Number]) -> float | None:
    """The least of all.

    >>> least([2.0, 1.0]), least([2.0, None]), least([])
    (1.0, None, None)
    """
    known = _known(values)
    return min(known) if known else None


def largest(values: Sequence[Number]) -> float | None:
    """The largest of all.

    >>> largest([2.0, 1.0]), largest([float("nan"), 1.0]), largest([1.0, float("nan")])
    (2.0, None, None)
    """
    known = _known(values)
    return max(known) if known else None


def mean(values: Sequence[Number]) -> float | None:
    """The mean of all.

    >>> mean([2.0, 1.0]), mean([2.0, None])
    (1.5, None)
    """
    known = _known(values)
    return statistics.fmean(known) if known else None


def _known(values: Sequence[Number]) -> list[float] | None:
    """All values, or None if one of them is missing."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(values) else None

"""Matrices whose PII is known without folding them: random ones, and structures with closed forms.

``bump``: p where the column is the row's number modulo d, q elsewhere: for n = d it is (p - q) I + q 1 1^T, the
identity with a rank-1 bump. All rows of different residue have the cosine (2 p q + (d - 2) q^2) / (p^2 + (d - 1) q^2),
rows of the same residue 1; columns fall into two classes by how often p occurs. q = 0 gives orthogonal rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

EXACT = 1e-5  # of closed forms: products of the stored numbers are summed in float32
SIGMAS = 6.0
P = 1.0


@dataclass(frozen=True, slots=True)
class Planted:
    """What a scan must find on one side of one matrix.

    Attributes:
        name: of the tensor.
        structure: see :data:`STRUCTURES`, or "random".
        side: "rows" or "cols".
        n: vectors.
        d: their length.
        pii: expected; None where the scan must report an error.
        tolerance: largest difference of an honest scan.
        zero: vectors of length 0.
        adapter: "base", or "merged" or "delta" of a low-rank adapter.
    """

    name: str
    structure: str
    side: str
    n: int
    d: int
    pii: float | None
    tolerance: float
    zero: int = 0
    adapter: str = "base"


def baseline(d: int) -> float:
    """Mean |cos| of independent isotropic vectors of length d: gamma(d/2) / (sqrt(pi) gamma((d+1)/2))."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def random_tolerance(n: int, d: int) -> float:
    """Six standard errors of a mean over n(n-1)/2 cosines, and what entries that are not normal add, of order 1/d."""
    spread = math.sqrt(max(1 / d - baseline(d) ** 2, 0.0))
    pairs = max(n * (n - 1) / 2, 1)
    return SIGMAS * spread / math.sqrt(pairs) + 3 * baseline(d) / d


def random_rows(n: int, d: int) -> tuple[float, float, int]:
    """(PII, tolerance, zero vectors) of independent symmetric entries."""
    return baseline(d), random_tolerance(n, d), 0


def pairs_of(n: int) -> float:
    """Unordered pairs."""
    return n * (n - 1) / 2


def bump_rows(n: int, d: int, p: float, q: float) -> tuple[float, float, int]:
    """Rows of the bump: one cosine, and 1 among rows n = k d + r that repeat."""
    often, more = divmod(n, d)
    same = more * pairs_of(often + 1) + (d - more) * pairs_of(often)
    cosine = abs((2 * p * q + (d - 2) * q * q) / (p * p + (d - 1) * q * q))
    return (same + (pairs_of(n) - same) * cosine) / pairs_of(n), EXACT, 0


def bump_cols(n: int, d: int, p: float, q: float) -> tuple[float, float, int]:
    """Columns: ``more`` of them hold p one time more often than the rest; those without p are zero where q is."""
    often, more = divmod(n, d)
    groups = [(more, often + 1), (d - more, often)]
    zero = groups[1][0] if q == 0 and often == 0 else 0
    groups = [(count, times) for count, times in groups if count and not (q == 0 and times == 0)]
    total = weighted = 0.0
    for index, (count, times) in enumerate(groups):
        for other, (count2, times2) in enumerate(groups[: index + 1]):
            pairs = pairs_of(count) if other == index else float(count * count2)
            dot = p * q * (times + times2) + q * q * (n - times - times2)
            lengths = [k * p * p + (n - k) * q * q for k in (times, times2)]
            weighted += pairs * abs(dot) / math.sqrt(lengths[0] * lengths[1])
            total += pairs
    return weighted / total, EXACT, zero


def duplicate_rows(n: int, d: int) -> tuple[float, float, int]:
    """Every row twice (the last alone if n is odd): n // 2 cosines of 1 among random ones."""
    same = n // 2
    found = (same + (pairs_of(n) - same) * baseline(d)) / pairs_of(n)
    return found, 2 * random_tolerance(n, d), 0  # each distinct cosine counts four times


def duplicate_cols(n: int, d: int) -> tuple[float, float, int]:
    """Columns of that: as good as random ones of half the length."""
    pii, tolerance, _ = random_rows(d, -(-n // 2))
    return pii, tolerance + pii / n, 0


def zero_count(n: int) -> int:
    """Rows that ``zero_rows`` empties: every eighth."""
    return -(-n // 8)


def zero_rows(n: int, d: int) -> tuple[float, float, int]:
    """Random rows of which every eighth is zero and left out of all pairs."""
    empty = zero_count(n)
    return baseline(d), random_tolerance(n - empty, d), empty


def zero_cols(n: int, d: int) -> tuple[float, float, int]:
    """Columns of that: random ones as long as there are rows left."""
    return random_rows(d, n - zero_count(n))


Expectation = Callable[[int, int], tuple[float, float, int]]
BUMPS = {"bump": 2.0**-5, "near_orthogonal": 2.0**-8, "orthogonal": 0.0}  # q; p and q are exact in every type
STRUCTURES: dict[str, tuple[Expectation, Expectation]] = {
    **{
        name: (lambda n, d, q=q: bump_rows(n, d, P, q), lambda n, d, q=q: bump_cols(n, d, P, q))  # type: ignore[misc]
        for name, q in BUMPS.items()
    },
    "duplicates": (duplicate_rows, duplicate_cols),
    "zeros": (zero_rows, zero_cols),
    "random": (random_rows, lambda n, d: random_rows(d, n)),
}
# last part of a tensor's name -> what the first layer that has it holds
PLACES = {
    "q_proj": "bump", "q_a_proj": "bump", "o_proj": "orthogonal", "v_proj": "near_orthogonal",
    "q_b_proj": "near_orthogonal", "gate_proj": "duplicates", "w1": "duplicates", "down_proj": "zeros", "w2": "zeros",
}  # fmt: skip
BROKEN = ("up_proj", "w3")  # the first of these holds one NaN where that is asked for


def leaf(name: str) -> str:
    """The layer's own name within a tensor's."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def expected(name: str, structure: str, shape: tuple[int, ...]) -> list[Planted]:
    """Both sides of one matrix."""
    n, d = shape
    found = []
    for side, sizes, calculate in zip(("rows", "cols"), ((n, d), (d, n)), STRUCTURES[structure], strict=True):
        pii, tolerance, zero = calculate(n, d)
        found.append(Planted(name, structure, side, *sizes, pii, tolerance, zero))
    return found


def broken(name: str, shape: tuple[int, ...]) -> list[Planted]:
    """Both sides of a matrix that holds NaN: the scan must say so."""
    return [replace(one, structure="nan", pii=None, tolerance=0.0) for one in expected(name, "random", shape)]

"""Sets of vectors whose cosines are known in closed form, as float64 rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """Rows, and what their cosines come to."""

    name: str
    rows: Callable[[], Tensor]
    pii: float
    largest: float
    mean_square: float

    def __str__(self) -> str:
        return self.name


@cache
def rotation(d: int, seed: int = 0) -> Tensor:
    """A random orthogonal (d, d) matrix; shared between tests, never written to."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]


def simplex(d: int) -> Tensor:
    """d + 1 vectors in R^d, all cosines -1 / d."""
    centred = torch.eye(d + 1, dtype=torch.float64) - 1 / (d + 1)
    along, _, _ = torch.linalg.svd(centred)
    return centred @ along[:, :d] @ rotation(d)


def repeated(n: int, d: int) -> Tensor:
    """One direction n times, at different lengths and signs."""
    lengths = torch.linspace(-2, 3, n, dtype=torch.float64).unsqueeze(1)
    return (lengths + (lengths == 0)) * rotation(d)[0]


def orthonormal(n: int, d: int) -> Tensor:
    """The first n rows of a rotation."""
    return rotation(d)[:n]


def stacked(k: int, d: int) -> Tensor:
    """The same orthonormal basis k times over."""
    return rotation(d).repeat(k, 1)


def two_groups(n: int, d: int) -> Tensor:
    """Two orthogonal directions, n / 2 times each, taking turns."""
    return rotation(d)[:2].repeat(n // 2, 1)


def shifted_identity(n: int, a: float) -> Tensor:
    """Rows of I + a 11^T."""
    return torch.eye(n, dtype=torch.float64) + a


def _shifted(n: int, a: float) -> float:
    return (2 * a + n * a * a) / (1 + 2 * a + n * a * a)


ARRANGEMENTS = (
    *(Arrangement(f"simplex-{d}", lambda d=d: simplex(d), 1 / d, 1 / d, 1 / d**2) for d in (2, 3, 17, 130)),
    *(
        Arrangement(f"repeated-{n}x{d}", lambda n=n, d=d: repeated(n, d), 1, 1, 1)
        for n, d in ((2, 5), (9, 1), (200, 33))
    ),
    *(
        Arrangement(f"orthonormal-{n}x{d}", lambda n=n, d=d: orthonormal(n, d), 0, 0, 0)
        for n, d in ((2, 2), (64, 64), (90, 257))
    ),
    *(
        Arrangement(
            f"stacked-{k}-bases-of-R{d}",
            lambda k=k, d=d: stacked(k, d),
            (k - 1) / (k * d - 1),
            1,
            (k - 1) / (k * d - 1),
        )
        for k, d in ((2, 4), (5, 16), (3, 100))
    ),
    *(
        Arrangement(
            f"two-groups-{n}x{d}",
            lambda n=n, d=d: two_groups(n, d),
            (n / 2 - 1) / (n - 1),
            1,
            (n / 2 - 1) / (n - 1),
        )
        for n, d in ((4, 2), (300, 12))
    ),
    *(
        Arrangement(
            f"identity-plus-{a}-at-{n}",
            lambda n=n, a=a: shifted_identity(n, a),
            _shifted(n, a),
            _shifted(n, a),
            _shifted(n, a) ** 2,
        )
        for n, a in ((3, 0.5), (70, 0.01), (513, 0.001))
    ),
)

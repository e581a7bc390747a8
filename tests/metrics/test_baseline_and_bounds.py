"""The isotropic baseline and the Welch bound: published values, recurrences, and arguments that have none."""

from __future__ import annotations

import math

import pytest
import torch

from orthofast.errors import InputError
from orthofast.metrics import isotropic_baseline, pii, welch_bound

PUBLISHED = {
    3: 0.5,
    8: 0.29103,
    24: 0.16457,
    64: 0.10013,
    128: 0.07066,
    256: 0.04992,
    500: 0.03570,
    512: 0.03528,
    768: 0.02880,
    784: 0.02850,
    1024: 0.02494,
    3072: 0.01440,
    4096: 0.01247,
    11008: 0.00760,
}


@pytest.mark.parametrize(("d", "value"), PUBLISHED.items())
def test_the_baseline_has_its_known_values(d: int, value: float) -> None:
    assert isotropic_baseline(d) == pytest.approx(value, abs=5.1e-6)


def test_the_baseline_follows_its_recurrence_across_the_change_of_formula() -> None:
    # gamma(x + 1) = x gamma(x): E(d + 2) = E(d) d / (d + 1)
    assert isotropic_baseline(1) == pytest.approx(1, abs=1e-15)
    assert isotropic_baseline(2) == pytest.approx(2 / math.pi, abs=1e-15)
    for d in (*range(1, 700), 10**4, 10**6):
        assert isotropic_baseline(d + 2) == pytest.approx(isotropic_baseline(d) * d / (d + 1), rel=2e-15)


def test_the_baseline_is_the_mean_cosine_of_gaussian_vectors() -> None:
    d, n = 48, 3000
    sample = torch.randn(n, d, dtype=torch.float64)
    spread = math.sqrt(1 / d - isotropic_baseline(d) ** 2)  # of one |cos|
    # pairs share vectors, yet are uncorrelated for isotropic ones
    assert pii(sample).item() == pytest.approx(isotropic_baseline(d), abs=5 * spread / math.sqrt(n * (n - 1) / 2))


def test_the_spread_of_one_cosine_at_4096_is_as_published() -> None:
    assert math.sqrt(1 / 4096 - isotropic_baseline(4096) ** 2) == pytest.approx(0.00942, abs=5e-6)


@pytest.mark.parametrize("d", [0, -3, 2.0, True, "512", None], ids=repr)
def test_the_baseline_refuses_what_is_no_length(d: object) -> None:
    with pytest.raises(InputError, match=r"^d needs a positive integer"):
        isotropic_baseline(d)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "d", "bound"),
    [(8, 4, 1 / 7), (64, 3, 61 / 189), (5, 4, 1 / 16), (4, 4, 0), (2, 9, 0), (10, 1, 1)],
)
def test_the_welch_bound_has_its_known_values(n: int, d: int, bound: float) -> None:
    assert welch_bound(n, d) == pytest.approx(bound, rel=1e-15)


@pytest.mark.parametrize("n", [0, 1])
def test_the_welch_bound_of_fewer_than_two_vectors_is_nan(n: int) -> None:
    assert math.isnan(welch_bound(n, 5))


@pytest.mark.parametrize(("n", "d", "named"), [(-1, 4, "n"), (2.0, 4, "n"), (True, 4, "n"), (4, 0, "d"), (4, 1.5, "d")])
def test_the_welch_bound_refuses_what_is_no_count(n: object, d: object, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named} needs"):
        welch_bound(n, d)  # type: ignore[arg-type]

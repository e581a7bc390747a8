"""Order statistics of Kronecker spectra, bit for bit those of the sorted products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthofast import metrics
from orthofast.errors import InputError
from orthofast.metrics import kronecker

SHARES = (1e-6, 0.1, 0.5, 0.8, 0.9, 0.999, 1.0)


def eigenvalues(size: int, power: float, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(size) ** power)


def products(a: Tensor, b: Tensor) -> np.ndarray:
    return np.sort(np.multiply.outer(a.double().numpy(), b.double().numpy()).ravel())[::-1]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No array of products is made, however small."""
    monkeypatch.setattr(kronecker, "CANDIDATES", 0)


@pytest.mark.parametrize("candidates", [0, 7, 1000, 1 << 62], ids=["counted", "some", "more", "sorted"])
@pytest.mark.parametrize("shape", [(257, 64), (785, 256), (1, 9), (9, 1), (1, 1)], ids=str)
def test_a_quantile_is_the_product_that_sorting_gives(
    shape: tuple[int, int], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker, "CANDIDATES", candidates)
    a, b = eigenvalues(shape[0], 8, 1), eigenvalues(shape[1], 6, 2)
    whole = products(a, b)
    for p in SHARES:
        place = max(1, math.ceil(p * len(whole))) - 1
        assert metrics.kronecker_quantile(a, b, p).item() == whole[place]


SPECTRA = st.lists(
    st.one_of(
        st.floats(0, 1e60),
        st.sampled_from([0.0, 1.0, 1.5, 3.0, 1e-40, 1.0 + 2**-52, 1.0 - 2**-53, math.pi]),
    ),
    min_size=1,
    max_size=12,
)


@given(SPECTRA, SPECTRA, st.floats(0.001, 1), st.integers(-90, 90), st.integers(0, 9))
def test_counting_is_exact_with_ties_zeros_and_any_scale(
    left: list, right: list, p: float, exponent: int, candidates: int
) -> None:
    a = torch.tensor(left, dtype=torch.float64)
    b = torch.tensor(right, dtype=torch.float64) * 10.0**exponent
    whole = products(a, b)
    whole = np.where(whole < whole[0] * 2.0**-950, 0, whole)  # what counts as 0 lies a little lower
    expected = whole[metrics.spectra.rank_of(p, len(whole))]
    before, kronecker.CANDIDATES = kronecker.CANDIDATES, candidates
    try:
        found = metrics.kronecker_quantile(a, b, p).item()
        top = metrics.kronecker_spectrum(a, b).numpy()
    finally:
        kronecker.CANDIDATES = before
    assert found == expected
    np.testing.assert_array_equal(top, whole)


@pytest.mark.usefixtures("counting")
def test_the_largest_eigenvalues_are_those_of_the_product_matrix() -> None:
    a, b = eigenvalues(6, 2, 3), eigenvalues(5, 3, 4)
    dense = torch.linalg.eigvalsh(torch.kron(torch.diag(a), torch.diag(b))).flip(0)
    for k in (0, 1, 7, 30):
        torch.testing.assert_close(metrics.kronecker_spectrum(a, b, k), dense[:k], rtol=1e-12, atol=0)


def test_proposition_1_holds_for_lambda_max_and_kappa_and_not_for_kappa_p() -> None:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([8.0, 4.0, 2.0, 1.0, 0.0], [9.0, 3.0, 1.0, 0.0, 0.0]))
    assert metrics.kronecker_spectrum(a, b, 1).item() == a[0] * b[0]
    whole = metrics.kronecker_condition_number(a, b, nonzero=True).value.item()
    parts = [metrics.condition_number(v, nonzero=True).value.item() for v in (a, b)]
    assert whole == math.prod(parts) == 72
    half = metrics.kronecker_condition_number(a, b, 0.5, nonzero=True).value.item()
    assert half == 8
    assert math.prod(metrics.condition_number(v, 0.5, nonzero=True).value.item() for v in (a, b)) == 6


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("seed", range(4))
def test_kappa_p_of_full_rank_factors_is_that_of_all_products(seed: int) -> None:
    a, b = eigenvalues(40, 3, seed) + 1e-6, eigenvalues(23, 2, seed + 9) + 1e-6
    whole = products(a, b)
    for p in (0.5, 0.8, 0.9, 1.0):
        kappa = metrics.kronecker_condition_number(a, b, p)
        assert kappa.value.item() == pytest.approx(whole[0] / whole[math.ceil(p * len(whole)) - 1], rel=1e-15)
        assert (int(kappa.resolved_rank), bool(kappa.is_lower_bound)) == (920, False)


@pytest.mark.parametrize("p", [0.2, 0.45, 0.5, 0.6, 0.9, 1.0])
def test_a_bound_is_below_kappa_whatever_the_unresolved_eigenvalues_are(p: float) -> None:
    tol = 1e-3
    a = torch.tensor([1.0, 0.3, 0.1, 0.0, 0.0], dtype=torch.float64)
    b = torch.tensor([2.0, 0.7, 0.02, 0.01, 0.0], dtype=torch.float64)
    kappa = metrics.kronecker_condition_number(a, b, p, tol=tol)
    assert int(kappa.resolved_rank) == 12
    seen = set()
    for share in (0.0, 1e-9, 0.5, 1.0):
        x = torch.where(a == 0, tol * a[0] * share, a)
        y = torch.where(b == 0, tol * b[0] * share, b)
        whole = products(x, y)
        chosen = whole[math.ceil(p * len(whole)) - 1]
        seen.add(whole[0] / chosen if chosen > 0 else math.inf)
    assert kappa.value.item() == pytest.approx(min(seen), rel=1e-12)
    assert bool(kappa.is_lower_bound) == (len(seen) > 1)


def test_each_factor_may_have_a_tolerance_of_its_own() -> None:
    a, b = (torch.tensor([1.0, 0.5, small], dtype=torch.float64) for small in (1e-5, 1e-3))
    both = [metrics.kronecker_condition_number(a, b, tol=tol) for tol in ((1e-4, 1e-4), 1e-4)]
    assert both[0] == both[1]
    assert int(both[0].resolved_rank) == 6
    assert int(metrics.kronecker_condition_number(a, b, tol=(1e-6, 1e-2)).resolved_rank) == 6
    assert int(metrics.kronecker_condition_number(a, b, tol=(1e-4, 1e-2)).resolved_rank) == 4
    resolved = metrics.kronecker_condition_number(a, b, tol=(1e-6, 1e-4))
    assert (resolved.value.item(), int(resolved.resolved_rank)) == (pytest.approx(1e8), 9)


def test_a_histogram_counts_every_product_once() -> None:
    a, b = eigenvalues(30, 4, 0), eigenvalues(20, 4, 1)
    a[:3] = 0
    whole = products(a, b)
    edges = torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.logspace(-9, math.log10(whole[0]), 12, dtype=torch.float64)]
    )
    edges[-1], edges[6] = whole[0], whole[whole > edges[6].item()][-1]  # a count must not lose what lies on an edge
    counts = metrics.kronecker_histogram(a, b, edges)
    np.testing.assert_array_equal(counts.numpy(), np.histogram(whole, edges.numpy())[0])
    assert int(counts.sum()) == 600
    wide = metrics.kronecker_histogram(a * 1e200, b * 1e-200, torch.tensor([0.0, 1e-300, 1e300], dtype=torch.float64))
    assert int(wide.sum()) == 600


def test_rounding_below_zero_counts_as_zero() -> None:
    a = torch.tensor([1.0, -1e-17, -2e-17])
    assert metrics.kronecker_quantile(a, a, 1.0).item() == 0
    assert metrics.kronecker_spectrum(a, a, 9)[1:].tolist() == [0.0] * 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    a, b = torch.tensor([1.0, bad]), torch.tensor([2.0, 1.0])
    assert math.isnan(metrics.kronecker_quantile(a, b, 0.5).item())
    assert math.isnan(metrics.kronecker_condition_number(b, a, 0.5).value.item())
    assert bool(metrics.kronecker_spectrum(a, b, 2).isnan().all())
    assert math.isnan(metrics.kronecker_condition_number(torch.zeros(2), b).value.item())
    with pytest.raises(InputError, match="finite"):
        metrics.kronecker_histogram(a, b, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda a: metrics.kronecker_quantile(a, a, 0.0), "p needs"),
        (lambda a: metrics.kronecker_quantile(a[None], a, 0.5), "a needs"),
        (lambda a: metrics.kronecker_spectrum(a, a, 5), "k needs"),
        (lambda a: metrics.kronecker_condition_number(a, a.long()), "b needs"),
        (lambda a: metrics.kronecker_condition_number(a, torch.zeros(2), 3.0), "p needs"),
        (lambda a: metrics.kronecker_histogram(a, a, torch.tensor([1.0, 0.0])), "edges"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("scale", [1e-200, 1e-300, 1e200])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_kappa_does_not_see_the_scale_of_covariances(scale: float, p: float) -> None:
    a = torch.tensor([1.0, 1e-2, 1e-3], dtype=torch.float64)
    plain = metrics.kronecker_condition_number(a, a, p)
    scaled = metrics.kronecker_condition_number(scale * a, scale * a, p)
    assert scaled.value.item() == pytest.approx(plain.value.item(), rel=1e-12)
    assert scaled.resolved_rank == plain.resolved_rank == 9
    assert not scaled.is_lower_bound

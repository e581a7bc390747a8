"""Spectra, lambda_max, kappa_p and their noise floor against dense float64 algebra and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from orthofast import metrics
from orthofast.errors import InputError
from orthofast.metrics import spectra


def covariance(d: int, decay: float = 0.0, rank: int | None = None) -> Tensor:
    """(d, d) float64 with eigenvalues 10^(-decay * k), those past the rank 0, in a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    values = 10.0 ** (-decay * torch.arange(d, dtype=torch.float64))
    values[rank:] = 0
    return basis * values @ basis.T


def rows_with(values: Tensor, n: int) -> Tensor:
    """(n, d) float64 whose uncentred covariance has exactly these eigenvalues."""
    left, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return math.sqrt(n) * left * values.sqrt() @ right.T


MATRICES = {
    "small": covariance(7),
    "side of 48": covariance(48, 0.1),
    "side of 49": covariance(49, 0.1),
    "flat": torch.eye(60, dtype=torch.float64),
    "rank one": torch.ones(70, 70, dtype=torch.float64),
    "wishart": torch.cov(torch.randn(200, 300, dtype=torch.float64)),
    "steep": covariance(120, 0.2),
    "rank deficient": covariance(90, 0.01, rank=5),
    "float32": covariance(64, 0.05).float(),
    "bfloat16": covariance(64, 0.05).bfloat16(),
    "tiny scale": covariance(64, 0.05) * 1e-200,
}
each = pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))


@each
def test_spectrum_is_that_of_numpy_largest_first(matrix: Tensor) -> None:
    expected = np.linalg.eigvalsh(matrix.double().numpy())[::-1]
    found = metrics.spectrum(matrix)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13 * expected[0])


@each
def test_lambda_max_is_the_largest_of_the_spectrum(matrix: Tensor) -> None:
    expected = np.linalg.eigvalsh(matrix.double().numpy())[-1]
    assert metrics.lambda_max(matrix).item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(metrics.lambda_max(matrix), metrics.lambda_max(matrix.clone()))


@pytest.mark.parametrize("d", [20, 80])
@pytest.mark.parametrize("measure", [metrics.spectrum, metrics.lambda_max], ids=["spectrum", "lambda_max"])
def test_only_the_lower_triangle_is_read(measure, d: int) -> None:
    matrix = covariance(d, 0.05)
    lower = matrix.tril() + torch.full_like(matrix, float("nan")).triu(1)
    torch.testing.assert_close(measure(lower), measure(matrix), rtol=1e-12, atol=1e-15)
    assert bool(lower.triu(1).isnan().sum() == d * (d - 1) // 2)


def test_lambda_max_of_a_larger_matrix_takes_no_whole_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = covariance(80, 0.05)
    expected = metrics.spectrum(matrix)[0].item()
    monkeypatch.delattr(np.linalg, "eigvalsh")
    lower = matrix.tril() + torch.full_like(matrix, float("nan")).triu(1)
    assert metrics.lambda_max(lower).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["flat", "wishart", "steep", "rank deficient", "float32"])
def test_lambda_max_on_a_device_approaches_from_below(name: str) -> None:
    matrix = MATRICES[name]
    expected = metrics.spectrum(matrix)[0].item()
    found = spectra._lambda_max_by_lanczos(matrix).item()
    rounding = 1e-6 if matrix.dtype == torch.float32 else 1e-9
    assert expected * (1 - 1e-5) <= found <= expected * (1 + rounding)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("d", [5, 64])
@pytest.mark.parametrize("place", [(3, 3), (4, 1)], ids=["diagonal", "below"])
def test_an_entry_that_is_no_number_leaves_nan(bad: float, d: int, place: tuple[int, int]) -> None:
    matrix = covariance(d)
    matrix[place] = bad
    assert bool(metrics.spectrum(matrix).isnan().all())
    assert math.isnan(metrics.lambda_max(matrix).item())


def test_zeros_and_nothing() -> None:
    assert metrics.lambda_max(torch.zeros(60, 60)).item() == 0
    assert metrics.spectrum(torch.zeros(3, 3)).tolist() == [0, 0, 0]
    assert metrics.spectrum(torch.zeros(0, 0)).shape == (0,)
    assert math.isnan(metrics.lambda_max(torch.zeros(0, 0)).item())
    assert bool(metrics.covariance_spectrum(torch.zeros(0, 3)).isnan().all())


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (1, 9), (30, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_smaller_side_has_the_spectrum_of_the_covariance(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randn(2 * shape[0], shape[1]).to(dtype)[::2]  # strided
    wide = rows.double()
    expected = np.linalg.eigvalsh((wide.T @ wide / len(rows)).numpy())[::-1].clip(0)
    found = metrics.covariance_spectrum(rows)
    assert found.shape == (shape[1],)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13 * expected[0])
    assert not found[shape[0] :].any()


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(37, 11)
    whole = metrics.covariance_spectrum(rows)
    monkeypatch.setattr(spectra, "BLOCK", 40)
    torch.testing.assert_close(metrics.covariance_spectrum(rows), whole, rtol=1e-12, atol=1e-15)
    broken = covariance(30)
    broken[29, 0] = float("nan")
    assert bool(metrics.spectrum(broken).isnan().all())


def test_condition_numbers_of_float32_rows_are_resolved_in_float64_and_not_below() -> None:
    d, n = 64, 128
    values = 10.0 ** (-10 * torch.arange(d, dtype=torch.float64) / (d - 1))
    rows = rows_with(values, n).float()
    found = metrics.covariance_spectrum(rows)
    for p in (0.5, 0.8, 0.9, 1.0):
        expected = (values[0] / values[math.ceil(p * d) - 1]).item()
        kappa = metrics.condition_number(found, p, count=n)
        assert kappa.value.item() == pytest.approx(expected, rel=2e-2)
        assert not kappa.is_lower_bound
    narrow = metrics.spectrum(rows.T @ rows / n)  # sums in float32
    tol = metrics.eigenvalue_tolerance(d, n, torch.float32)
    kappa = metrics.condition_number(narrow, 1.0, tol=tol)
    assert bool(kappa.is_lower_bound)
    assert kappa.value.item() == pytest.approx(1 / tol)
    assert int(kappa.resolved_rank) < d
    assert not metrics.condition_number(narrow, 0.3, tol=tol).is_lower_bound


@pytest.mark.parametrize(
    ("d", "p", "place"),
    [(10, 0.7, 7), (10, 0.9, 9), (10, 0.91, 10), (3, 0.1, 1), (3, 1.0, 3), (3, 1, 3), (7, 0.5, 4), (1000, 0.001, 1),
     (100, 0.29, 29), (100, 0.07, 7), (100, 0.55, 55), (100, 0.57, 57), (4096, 0.5, 2048)],
)  # fmt: skip
def test_lambda_p_is_the_eigenvalue_at_the_ceiling(d: int, p: float, place: int) -> None:
    values = torch.arange(d, 0, -1, dtype=torch.float64)
    shuffled = values[torch.randperm(d)]
    assert metrics.condition_number(shuffled, p).value.item() == d / (d - place + 1)


def test_what_lies_below_the_tolerance_bounds_kappa_and_is_never_divided_by() -> None:
    values = torch.tensor([1.0, 0.5, 0.25, 1e-18, 0.0, -1e-17], dtype=torch.float64)
    tol = metrics.eigenvalue_tolerance(6, 1000)
    kappa = metrics.condition_number(values, count=1000)
    assert kappa.value.item() == pytest.approx(1 / tol)
    assert (int(kappa.resolved_rank), bool(kappa.is_lower_bound)) == (3, True)
    assert metrics.condition_number(values, 0.5) == (4.0, 3, False)
    assert metrics.condition_number(values, nonzero=True) == (4.0, 3, False)
    assert metrics.condition_number(values, 0.5, nonzero=True) == (2.0, 3, False)
    assert math.isinf(metrics.condition_number(values, tol=0.0).value.item())


def test_zeros_that_are_not_given_count() -> None:
    given = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    padded = torch.cat([given, torch.zeros(5, dtype=torch.float64)])
    for p in (0.1, 0.25, 0.375, 0.5, 1.0):
        a = metrics.condition_number(given, p, dimension=8, tol=1e-12)
        b = metrics.condition_number(padded, p, tol=1e-12)
        assert a == b


@pytest.mark.parametrize("values", [[0.0, 0.0], [], [float("nan"), 1.0], [float("inf"), 1.0]], ids=str)
def test_kappa_of_nothing_is_nan(values: list[float]) -> None:
    kappa = metrics.condition_number(torch.tensor(values))
    assert math.isnan(kappa.value.item())
    assert int(kappa.resolved_rank) == 0


def test_float32_eigenvalues_have_the_tolerance_of_float32() -> None:
    kappa = metrics.condition_number(torch.tensor([1.0, 1e-8], dtype=torch.float32))
    assert bool(kappa.is_lower_bound)
    assert not metrics.condition_number(torch.tensor([1.0, 1e-8], dtype=torch.float64)).is_lower_bound


@pytest.mark.parametrize(("n", "published"), [(2, 34), (4, 9), (16, 2.78), (64, 1.65)])
def test_noise_alone_shows_the_published_condition_numbers(n: int, published: float) -> None:
    assert metrics.marchenko_pastur_condition(n * 256, 256) == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("n", [300, 600, 100])
def test_kappa_p_of_white_noise_is_that_of_the_law(n: int) -> None:
    d = 200
    found = metrics.covariance_spectrum(torch.randn(n, d, dtype=torch.float64))
    for p in (0.25, 0.5, 0.8, 0.9):
        expected = metrics.marchenko_pastur_condition(n, d, p)
        kappa = metrics.condition_number(found, p, count=n)
        if p * d > n:
            assert expected == math.inf
            assert bool(kappa.is_lower_bound)
        elif p * d < n:
            assert kappa.value.item() == pytest.approx(expected, rel=0.08)


def test_the_law_at_its_ends() -> None:
    assert metrics.marchenko_pastur_condition(256, 256) == math.inf
    assert metrics.marchenko_pastur_condition(100, 400, 0.25) == pytest.approx(9)
    assert metrics.marchenko_pastur_condition(512, 256, 1.0) == pytest.approx(
        metrics.marchenko_pastur_condition(512, 256, 1 - 1e-12), rel=1e-6
    )
    assert metrics.marchenko_pastur_condition(512, 256, 1e-9) == pytest.approx(1, abs=1e-4)
    assert metrics.marchenko_pastur_condition(10**9, 1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.spectrum(torch.ones(3)), "covariance"),
        (lambda: metrics.spectrum(torch.ones(3, 4)), "(3, 4)"),
        (lambda: metrics.lambda_max(torch.ones(3, 3, dtype=torch.int64)), "int64"),
        (lambda: metrics.covariance_spectrum(torch.ones(3)), "rows"),
        (lambda: metrics.condition_number(torch.ones(3), 0.0), "p needs"),
        (lambda: metrics.condition_number(torch.ones(3), 1.5), "p needs"),
        (lambda: metrics.condition_number(torch.ones(3), True), "p needs"),
        (lambda: metrics.condition_number(torch.ones(3, 3)), "eigenvalues"),
        (lambda: metrics.condition_number(torch.ones(3), tol=1.0), "tol"),
        (lambda: metrics.condition_number(torch.ones(3), count=0), "count"),
        (lambda: metrics.condition_number(torch.ones(3), dimension=2), "dimension"),
        (lambda: metrics.marchenko_pastur_condition(0, 3), "n and d"),
        (lambda: metrics.marchenko_pastur_condition(3, 3, 2.0), "p needs"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named.replace("(", r"\(").replace(")", r"\)")):
        call()

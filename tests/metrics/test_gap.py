"""The orthogonality gap: near its zero, where a subtraction loses everything, its bounds, and its variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import gram_stats
from orthofast.metrics import orthogonality_gap, singular_value_gap
from orthofast.metrics.gram import orthogonality_gap_from
from tests.metrics.arrangements import rotation


def true_gap(vectors: Tensor) -> float:
    """Eq. 2 as it is written, in float64."""
    gram = vectors.double() @ vectors.double().T
    n = len(gram)
    return (gram / gram.trace() - torch.eye(n, dtype=torch.float64) / n).norm().item()


def nearly_orthogonal(n: int, d: int, noise: float) -> Tensor:
    """Float32 vectors with a gap of about ``noise / sqrt(d)``."""
    return (rotation(max(n, d))[:n, :d] + noise * torch.randn(n, d, dtype=torch.float64) / math.sqrt(d)).float()


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize(("n", "d"), [(8, 512), (64, 512), (60, 60)])
def test_a_small_gap_keeps_its_digits(n: int, d: int, noise: float, measure: Any) -> None:
    vectors = nearly_orthogonal(n, d, noise)
    truth = true_gap(vectors)
    assert truth < 2 * noise
    assert measure(orthogonality_gap, vectors).item() == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize(("noise", "relative"), [(1e-3, 1e-3), (1e-4, 2e-3)])
def test_float32_arithmetic_keeps_them_where_the_subtraction_has_none_left(
    noise: float, relative: float, measure: Any
) -> None:
    vectors = nearly_orthogonal(8, 512, noise)
    truth = true_gap(vectors)
    gram = vectors @ vectors.T
    subtracted = (gram.square().sum() / gram.trace().square() - 1 / 8).clamp(min=0).sqrt().item()
    assert abs(subtracted - truth) > 0.5 * truth, "the case is meant to be one the subtraction cannot resolve"
    assert measure(orthogonality_gap, vectors, precision="highest").item() == pytest.approx(truth, rel=relative)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 5), (30, 7), (7, 30), (300, 2)])
def test_both_sides_and_the_definition_agree_within_the_bounds(n: int, d: int, measure: Any) -> None:
    vectors = torch.randn(n, d, dtype=torch.float64)
    truth = true_gap(vectors)
    assert measure(orthogonality_gap, vectors).item() == pytest.approx(truth, rel=1e-13)
    assert measure(orthogonality_gap, vectors.T, vectors="cols").item() == pytest.approx(truth, rel=1e-13)
    assert math.sqrt(max(0, 1 / d - 1 / n)) <= truth <= math.sqrt(1 - 1 / n)
    of_vectors = gram_stats(vectors, normalize=False, want=["sq_sum"])
    assert orthogonality_gap_from(of_vectors).item() == pytest.approx(truth, rel=1e-13)
    if n > d:
        of_features = gram_stats(vectors.T, normalize=False, want=["sq_sum"])
        assert orthogonality_gap_from(of_features, n).item() == pytest.approx(truth, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e12, 1e18])
@pytest.mark.parametrize(("n", "d"), [(6, 9), (9, 6)])
def test_the_scale_of_float32_vectors_does_not_matter(n: int, d: int, scale: float, measure: Any) -> None:
    vectors = torch.randn(n, d)
    got = measure(orthogonality_gap, vectors * scale).item()
    assert got == pytest.approx(true_gap(vectors), rel=1e-6)


@pytest.mark.parametrize("exponent", [-1050, -300, -160, 90, 160, 300], ids=str)
@pytest.mark.parametrize(("n", "d"), [(6, 9), (9, 6)])
def test_nor_does_that_of_float64_vectors_whose_fourth_powers_leave_its_range(
    n: int, d: int, exponent: int, measure: Any
) -> None:
    vectors = torch.randn(n, d, dtype=torch.float64)
    scaled = vectors * 2.0**exponent if exponent > -1000 else (vectors * 2.0**-500) * 2.0**-520
    assert measure(orthogonality_gap, scaled).item() == pytest.approx(true_gap(vectors), rel=1e-13)
    heads = torch.cat([scaled, vectors])
    found = measure(orthogonality_gap, heads, vectors="heads", heads=2)
    assert found.tolist() == pytest.approx([true_gap(vectors)] * 2, rel=1e-13)


def test_a_zero_vector_counts_among_the_n(measure: Any) -> None:
    vectors = torch.eye(3, 5)
    vectors[2] = 0
    assert measure(orthogonality_gap, vectors).item() == pytest.approx(math.sqrt(1 / 2 - 1 / 3), abs=1e-15)


def test_one_vector_has_gap_zero_and_none_has_no_gap(measure: Any) -> None:
    assert measure(orthogonality_gap, torch.ones(1, 4)).item() == 0
    for empty in (torch.ones(0, 4), torch.ones(4, 0), torch.zeros(4, 4), torch.zeros(9, 2)):
        assert math.isnan(measure(orthogonality_gap, empty).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_nan_and_infinity_give_nan(shape: tuple[int, int], bad: float, measure: Any) -> None:
    vectors = torch.randn(shape)
    vectors[3, 2] = bad
    assert math.isnan(measure(orthogonality_gap, vectors).item())
    assert math.isnan(singular_value_gap(vectors).item())


def test_the_formula_names_the_field_it_lacks() -> None:
    with pytest.raises(InputError, match="orthogonality_gap needs a record folded with want='sq_sum'"):
        orthogonality_gap_from(gram_stats(torch.ones(3, 2), normalize=False))


@pytest.mark.parametrize(("n", "d"), [(10, 500), (500, 10), (6, 6)])
def test_the_singular_value_gap_is_its_closed_form(n: int, d: int) -> None:
    logits = torch.randn(n, d, dtype=torch.float64)
    values = torch.linalg.svdvals(logits)
    k = min(n, d)
    closed = 2 * (1 - (values / values.norm()).sum() / math.sqrt(k))
    assert singular_value_gap(logits).square().item() == pytest.approx(closed.item(), rel=1e-10)
    if k == 10:
        assert singular_value_gap(logits).item() == pytest.approx(0.065, abs=0.02)  # of random 10 x 500 logits


def test_the_singular_value_gap_has_its_extremes() -> None:
    assert singular_value_gap(5 * rotation(12)[:4]).item() < 1e-14
    assert singular_value_gap(torch.ones(9, 7)).item() == pytest.approx(math.sqrt(2 - 2 / math.sqrt(7)), rel=1e-12)
    huge = torch.diag(torch.tensor([3e200, 4e200], dtype=torch.float64))
    assert singular_value_gap(huge).square().item() == pytest.approx(2 - 2 * 1.4 / math.sqrt(2), rel=1e-12)
    assert singular_value_gap(torch.eye(6), vectors="heads", heads=2).tolist() == pytest.approx([0, 0], abs=1e-15)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 3)], ids=str)
def test_the_singular_value_gap_of_nothing_is_nan(shape: tuple[int, int]) -> None:
    assert math.isnan(singular_value_gap(torch.zeros(shape)).item())


def test_the_singular_value_gap_of_one_bad_head_spares_the_others() -> None:
    weight = torch.eye(4)
    weight[3, 3] = math.inf
    first, second = singular_value_gap(weight, vectors="heads", heads=2).tolist()
    assert first == pytest.approx(0, abs=1e-15)
    assert math.isnan(second)

"""Metrics of arrangements whose cosines are known in closed form, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from orthofast.metrics import (
    cosine_histogram,
    diagonal_dominance,
    max_coherence,
    mean_squared_cosine,
    orthogonality_gap,
    pii,
    welch_bound,
)
from tests.metrics.arrangements import (
    ARRANGEMENTS,
    Arrangement,
    orthonormal,
    repeated,
    rotation,
    shifted_identity,
    simplex,
    stacked,
    two_groups,
)

# float32: rounding of the entries and of a dot product, in cosines
TOLERANCE = {torch.float64: 2e-14, torch.float32: 3e-7}
DTYPES = tuple(TOLERANCE)
exactly = pytest.mark.parametrize("case", ARRANGEMENTS, ids=str)
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@exactly
@in_both
def test_pii_of_known_arrangements(case: Arrangement, dtype: torch.dtype, measure: Any) -> None:
    got = measure(pii, case.rows().to(dtype))
    assert got.dtype == torch.float64
    assert got.shape == ()
    assert 0 <= got.item() <= 1
    assert got.item() == pytest.approx(case.pii, abs=TOLERANCE[dtype])


@exactly
@in_both
def test_max_coherence_of_known_arrangements_names_a_pair_that_attains_it(
    case: Arrangement, dtype: torch.dtype, measure: Any
) -> None:
    rows = case.rows()
    value, pair = measure(max_coherence, rows.to(dtype))
    assert 0 <= value.item() <= 1
    assert value.item() == pytest.approx(case.largest, abs=TOLERANCE[dtype])
    i, j = pair.tolist()
    assert 0 <= i < j < len(rows)
    cosine = rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()
    assert abs(cosine.item()) == pytest.approx(case.largest, abs=TOLERANCE[dtype])


@exactly
@in_both
def test_mean_squared_cosine_of_known_arrangements(case: Arrangement, dtype: torch.dtype, measure: Any) -> None:
    got = measure(mean_squared_cosine, case.rows().to(dtype))
    assert got.item() == pytest.approx(case.mean_square, abs=TOLERANCE[dtype])


@exactly
def test_columns_of_the_transpose_are_the_rows(case: Arrangement, measure: Any) -> None:
    rows = case.rows()
    assert measure(pii, rows.T.contiguous(), vectors="cols").item() == pytest.approx(case.pii, abs=2e-14)


@exactly
def test_filters_of_a_kernel_are_its_flattened_rows(case: Arrangement, measure: Any) -> None:
    rows = case.rows()
    kernel = rows.reshape(*rows.shape, 1, 1).repeat(1, 1, 1, 3)  # three equal taps leave all cosines as they are
    assert measure(pii, kernel, vectors="filters").item() == pytest.approx(case.pii, abs=2e-14)


def test_no_pii_is_below_the_welch_bound_and_stacked_bases_attain_it(measure: Any) -> None:
    for k, d in ((2, 4), (7, 9)):
        got = measure(pii, stacked(k, d)).item()
        assert got == pytest.approx(welch_bound(k * d, d), abs=1e-14)
        different = torch.cat([rotation(d, seed) for seed in range(k)])
        assert measure(mean_squared_cosine, different).item() == pytest.approx(welch_bound(k * d, d), abs=1e-14)
        assert measure(pii, different).item() > welch_bound(k * d, d) * 1.1
    assert welch_bound(8, 4) == pytest.approx(1 / 7, abs=1e-16)


def test_the_simplex_attains_the_welch_bound_of_the_largest_cosine(measure: Any) -> None:
    assert measure(max_coherence, simplex(12)).value.item() == pytest.approx(math.sqrt(welch_bound(13, 12)), abs=1e-14)


def test_heads_are_measured_each_for_itself(measure: Any) -> None:
    blocks = (two_groups(6, 8), repeated(6, 8), orthonormal(6, 8), shifted_identity(8, 0.5)[:6])
    weight = torch.cat(blocks).to(torch.float32)
    expected = [2 / 5, 1, 0, (2 * 0.5 + 8 * 0.25) / (1 + 2 * 0.5 + 8 * 0.25)]
    got = measure(pii, weight, vectors="heads", heads=4)
    assert got.shape == (4,)
    assert got.tolist() == pytest.approx(expected, abs=3e-7)
    largest = measure(max_coherence, weight, vectors="heads", heads=4)
    assert largest.value.tolist() == pytest.approx([1, 1, 0, expected[3]], abs=3e-7)
    assert largest.pair.shape == (4, 2)
    assert int(largest.pair.max()) < 6
    for metric in (mean_squared_cosine, orthogonality_gap):
        assert measure(metric, weight, vectors="heads", heads=4).shape == (4,)
    assert all(value.shape == (4,) for value in measure(diagonal_dominance, weight, vectors="heads", heads=4))
    assert measure(cosine_histogram, weight, bins=8, vectors="heads", heads=4).counts.shape == (4, 8)


def test_one_head_is_still_a_vector_of_results(measure: Any) -> None:
    assert measure(pii, torch.eye(4), vectors="heads", heads=1).shape == (1,)


def test_the_histogram_counts_each_pair_once_in_its_bin(measure: Any) -> None:
    # cosines of the simplex: 45 times -1/9
    counts, edges = measure(cosine_histogram, simplex(9).to(torch.float32), bins=20)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [0] * 8 + [45] + [0] * 11
    assert edges.shape == (21,)
    assert (edges[8] < -1 / 9) & (edges[9] > -1 / 9)
    # an antiparallel pair, and two right angles
    counts, _ = measure(cosine_histogram, torch.tensor([[1.0, 0], [-3, 0], [0, 2]]), bins=5)
    assert counts.tolist() == [1, 0, 2, 0, 0]


@pytest.mark.parametrize("n", [2, 3, 4, 30])
def test_the_gap_of_equal_vectors_is_the_rank_one_maximum(n: int, measure: Any) -> None:
    got = measure(orthogonality_gap, torch.ones(n, 7)).item()
    assert got == pytest.approx(math.sqrt(1 - 1 / n), abs=1e-14)
    if n == 4:
        assert math.log(got) == pytest.approx(-0.1438, abs=5e-5)


@in_both
@pytest.mark.parametrize(("n", "d"), [(64, 64), (20, 65), (192, 64), (128, 2)])
def test_the_gap_of_a_tight_frame_is_the_least_possible(n: int, d: int, dtype: torch.dtype, measure: Any) -> None:
    size = max(n, d)
    frame = rotation(size)[:n, :d].to(dtype)
    least = math.sqrt(max(0, 1 / d - 1 / n))
    got = measure(orthogonality_gap, frame).item()
    assert got == pytest.approx(least, abs=3e-8 if dtype == torch.float32 else 1e-14)
    if (n, d) == (192, 64):
        assert least == pytest.approx(0.10206, abs=5e-6)


def test_diagonal_dominance_of_the_shifted_identity(measure: Any) -> None:
    n, a = 40, 0.25
    ratio = (n - 1) * (2 * a + n * a * a) / (1 + 2 * a + n * a * a)
    got = measure(diagonal_dominance, shifted_identity(n, a))
    assert [value.item() for value in got] == pytest.approx([ratio, ratio, ratio, 0], abs=1e-11)
    weak = measure(diagonal_dominance, shifted_identity(3, 0.1))
    ratio = 2 * (0.2 + 0.03) / (1 + 0.2 + 0.03)
    assert [value.item() for value in weak] == pytest.approx([ratio, ratio, ratio, 1], abs=1e-14)


def test_diagonal_dominance_is_strict_and_counts_each_row(measure: Any) -> None:
    rows = torch.tensor([[2.0, 0.0], [1.0, 1.0]])  # ratios 2/4 and 2/2
    assert [value.item() for value in measure(diagonal_dominance, rows)] == [0.75, 0.5, 1.0, 0.5]

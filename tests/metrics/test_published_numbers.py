"""Numbers of freshly initialised layers: those of the public code (seed 42) and those any seed comes near."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orthofast.metrics import diagonal_dominance, mean_squared_cosine, pii


def both_sides(measure: Any, weight: torch.Tensor) -> tuple[float, float]:
    return measure(pii, weight).item(), measure(pii, weight, vectors="cols").item()


def test_the_mlp_of_the_public_code_at_seed_42(measure: Any) -> None:
    torch.manual_seed(42)
    first = nn.Linear(784, 500)
    hidden = [nn.Linear(500, 500) for _ in range(3)]
    assert both_sides(measure, first.weight) == pytest.approx((0.028491, 0.035696), abs=6e-7)
    assert both_sides(measure, hidden[0].weight) == pytest.approx((0.035690, 0.035671), abs=6e-7)
    assert both_sides(measure, hidden[2].weight) == pytest.approx((0.035715, 0.035726), abs=6e-7)


def test_the_central_taps_of_the_cnn_of_the_public_code_at_seed_42(measure: Any) -> None:
    torch.manual_seed(42)
    _, second, third = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 64), (64, 128), (128, 256)))
    # Lu et al. 2024, Table 2 prints 0.070 and 0.050: columns of the taps, vectors of R^128 and R^256
    assert measure(pii, second.weight, vectors="center_tap").item() == pytest.approx(0.0701, abs=5e-5)
    assert measure(pii, third.weight, vectors="center_tap").item() == pytest.approx(0.0502, abs=5e-5)
    assert measure(pii, second.weight[:, :, 1, 1]).item() == pytest.approx(0.0997, abs=5e-4)  # rows of the same tap


# rows, columns: means over seeds, and about four standard deviations of one draw
UNIFORM = {
    (500, 500): (0.03567, 0.03567, 2e-4),
    (512, 512): (0.03525, 0.03525, 2e-4),
    (500, 784): (0.02851, 0.03569, 2e-4),
    (128, 64): (0.1000, 0.0705, 2e-3),
    (256, 128): (0.0706, 0.0498, 1e-3),
}


@pytest.mark.parametrize("shape", UNIFORM, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_uniform_initialisation_gives_the_published_level(shape: tuple[int, int], measure: Any) -> None:
    rows, columns, spread = UNIFORM[shape]
    weight = nn.Linear(shape[1], shape[0]).weight
    got = both_sides(measure, weight)
    assert got == pytest.approx((rows, columns), abs=spread)


def test_no_row_of_a_500_wide_initialisation_is_diagonally_dominant(measure: Any) -> None:
    weight = nn.Linear(500, 500).weight
    got = measure(diagonal_dominance, weight)
    assert got.mean.item() == pytest.approx(17.80, abs=0.15)
    assert got.mean.item() == pytest.approx(499 * measure(pii, weight).item(), rel=2e-3)
    assert got.dominant_frac.item() == 0
    assert got.min.item() > 14


def test_a_constant_layer_has_pii_1_on_both_sides(measure: Any) -> None:
    assert both_sides(measure, torch.full((64, 27), 0.1)) == pytest.approx((1, 1), abs=1e-6)


def test_the_estimator_of_the_public_code_agrees_without_zero_rows(measure: Any) -> None:
    rows = torch.randn(40, 30)
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    n = len(rows)
    seed_code = abs((unit @ unit.T).abs().mean().item() - 1 / n) * n / (n - 1)
    assert measure(pii, rows).item() == pytest.approx(seed_code, abs=3e-8)


def test_the_square_sum_of_the_small_gram_matrix_is_that_of_the_pairs(measure: Any) -> None:
    rows = torch.randn(300, 40, dtype=torch.float64)
    by_pairs = measure(mean_squared_cosine, rows).item() * 300 * 299
    by_columns = mean_squared_cosine(rows).item() * 300 * 299
    assert by_columns == pytest.approx(by_pairs, rel=1e-14)
    assert by_pairs == pytest.approx(300 * 299 / 40, rel=0.02)  # isotropic: 1 / d a pair

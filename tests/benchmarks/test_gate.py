"""The float64 value against plain loops and closed forms, and what the gate lets through."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import gate
from benchmarks.cases import Case, draw


def by_loops(vectors):
    rows = vectors.to(torch.float64).tolist()
    total, pairs = 0.0, 0
    for i, left in enumerate(rows):
        for right in rows[i + 1 :]:
            dot = math.fsum(a * b for a, b in zip(left, right, strict=True))
            total += abs(dot) / math.sqrt(math.fsum(a * a for a in left) * math.fsum(b * b for b in right))
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_the_expected_value_is_that_of_plain_loops_for_any_blocking(dtype, block):
    vectors = draw(Case(19, 11, dtype), 3)
    assert gate.expected_pii(vectors, block) == pytest.approx(by_loops(vectors), rel=1e-13)


def test_the_expected_value_of_a_simplex_is_one_over_n_less_one():
    n = 9
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    assert gate.expected_pii(simplex, 4) == pytest.approx(1 / (n - 1), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "expected", "error"),
    [
        (1.0, 1.0, 0.0),
        (1.1, 1.0, 0.1),
        (-1.0, 1.0, 2.0),
        (0.0, 0.0, 0.0),
        (1e-9, 0.0, math.inf),
        (math.nan, 1.0, math.inf),
    ],
)
def test_relative_errors(value, expected, error):
    assert gate.relative_error(value, expected) == pytest.approx(error)


def test_rounded_operands_are_allowed_more_on_few_pairs_and_exact_ones_are_not():
    assert gate.tolerance(64, exact=True) == gate.tolerance(9999, exact=True) == 1e-6
    assert 2e-4 < gate.tolerance(64, exact=False) < 4e-4
    assert gate.tolerance(30522, exact=False) < 1.1e-5


def test_bf16_rounding_passes_as_rounded_and_fails_as_exact():
    vectors = draw(Case(64, 576, "float32"), 0)
    error = gate.relative_error(gate.expected_pii(vectors.bfloat16()), gate.expected_pii(vectors))
    assert gate.tolerance(64, exact=True) < error < gate.tolerance(64, exact=False)


def test_a_product_is_compared_row_by_row():
    vectors = draw(Case(32, 8, "float32"), 0)
    right = vectors @ vectors.T
    assert gate.product_error(right, vectors) < 1e-6
    assert gate.product_error(right * 1.01, vectors) == pytest.approx(0.01, rel=1e-3)

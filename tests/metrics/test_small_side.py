"""The mean squared cosine of many short vectors from the d x d side, against the pairs themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from orthofast.errors import BackendError, InputError
from orthofast.metrics import column_gram, mean_squared_cosine
from tests.metrics.arrangements import rotation


def by_pairs(rows: Tensor) -> float:
    """All pairs at once, in float64; zero vectors left out."""
    rows = rows.double()
    rows = rows[rows.abs().amax(1) > 0]
    unit = rows / rows.abs().amax(1, keepdim=True)
    unit = unit / unit.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[tuple(torch.triu_indices(len(unit), len(unit), 1))]
    return cosines.square().mean().item()


SHAPES = [(4, 1), (40, 10), (300, 40), (2100, 3), (1025, 7), (2052, 513)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_small_side_equals_the_pairs(n: int, d: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(n, d) + 0.3).to(dtype)
    assert column_gram.is_cheaper(n, d)
    assert mean_squared_cosine(rows).item() == pytest.approx(by_pairs(rows), rel=1e-12)


def test_blocks_smaller_than_the_matrix_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(100, 11, dtype=torch.float64)
    whole = column_gram.mean_square(rows.unsqueeze(0)).item()
    monkeypatch.setattr(column_gram, "BLOCK", 4)
    monkeypatch.setattr(column_gram, "CHUNK", 16)
    assert column_gram.mean_square(rows.unsqueeze(0)).item() == pytest.approx(whole, rel=1e-14)
    assert whole == pytest.approx(by_pairs(rows), rel=1e-13)


@pytest.mark.parametrize("copies", [4, 9])
def test_nothing_cancels_at_the_least_value(copies: int) -> None:
    d = 20
    rows = rotation(d).repeat(copies, 1)
    n = copies * d
    assert mean_squared_cosine(rows).item() == pytest.approx((copies - 1) / (n - 1), rel=1e-14)


def test_a_single_basis_gives_zero_to_the_square_of_rounding() -> None:
    # n = d: the whole value is the residual, 1e-32 rather than 1e-16
    assert column_gram.mean_square(rotation(64).unsqueeze(0)).item() < 1e-30


def test_lengths_at_the_ends_of_float64_do_not_matter() -> None:
    rows = torch.randn(60, 5, dtype=torch.float64)
    scaled = rows * torch.logspace(-300, 300, 60, dtype=torch.float64).unsqueeze(1)
    assert mean_squared_cosine(scaled).item() == pytest.approx(mean_squared_cosine(rows).item(), rel=1e-13)


def test_zero_vectors_are_left_out() -> None:
    rows = torch.randn(50, 4)
    holed = torch.cat([torch.zeros(9, 4), rows, torch.zeros(3, 4)])
    assert mean_squared_cosine(holed).item() == pytest.approx(mean_squared_cosine(rows).item(), rel=1e-13)


@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_than_two_vectors_that_count_give_nan(kept: int) -> None:
    rows = torch.zeros(12, 3)
    rows[:kept] = 1
    assert math.isnan(mean_squared_cosine(rows).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_infinity_give_nan(bad: float) -> None:
    rows = torch.randn(30, 3)
    rows[7, 1] = bad
    assert math.isnan(mean_squared_cosine(rows).item())


def test_heads_are_measured_each_for_itself() -> None:
    rows = torch.randn(60, 5, dtype=torch.float64)
    got = mean_squared_cosine(rows, vectors="heads", heads=3)
    assert got.tolist() == pytest.approx([by_pairs(block) for block in rows.split(20)], rel=1e-13)


def test_strides_do_not_matter() -> None:
    storage = torch.randn(14, 200)
    rows = storage.T[::2, 3:]
    assert mean_squared_cosine(rows).item() == pytest.approx(by_pairs(rows), rel=1e-13)


def test_a_parameter_is_measured_without_a_graph_where_gradients_are_off() -> None:
    weight = torch.nn.Parameter(torch.randn(40, 4))
    with torch.no_grad():
        assert not mean_squared_cosine(weight).requires_grad


def test_a_named_backend_or_precision_is_still_checked() -> None:
    rows = torch.randn(40, 4)
    with pytest.raises(BackendError, match="backend needs one of"):
        mean_squared_cosine(rows, backend="abacus")
    with pytest.raises(InputError, match="precision needs one of"):
        mean_squared_cosine(rows, precision="sloppy")


def test_one_vector_among_zeros_gives_nan_whatever_rounding_leaves_of_it() -> None:
    weight = torch.zeros(200, 12, 3)
    weight[:, 4] = torch.randn(200, 3)
    assert mean_squared_cosine(weight.view(2400, 3), vectors="heads", heads=200).isnan().all()

"""Exact cases and extreme values: closed forms, zero vectors, NaN and Inf, ends of a dtype, duplicates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import ALL, DTYPES, SHORT, assert_record, gaussian, truth_of, wide
from tests.kernels.conftest import Fold


def mean_abs(fold: Fold, x: Tensor) -> float:
    record = fold(x)
    assert record.abs_sum is not None
    return record.abs_sum.item() / record.pairs.item()


@pytest.mark.parametrize("n", [2, 7, 48, 97, 400])
def test_regular_simplex_is_one_over_d(fold: Fold, n: int) -> None:
    x = torch.eye(n, dtype=torch.float64) - 1 / n
    assert mean_abs(fold, x.float()) == pytest.approx(1 / (n - 1), abs=2e-7)


@pytest.mark.parametrize("layout", ["expanded", "copied"])
def test_repeated_rows_are_one(fold: Fold, layout: str) -> None:
    x = gaussian((1, 100), 0).expand(97, 100)
    x = x if layout == "expanded" else x.contiguous()
    record = fold(x, want=ALL)
    assert_record(record, x.unsqueeze(0))
    assert mean_abs(fold, x) == pytest.approx(1, abs=5e-7)


def test_entries_may_share_one_address(fold: Fold) -> None:
    x = gaussian((97, 1), 0).expand(97, 100)  # every vector a multiple of (1, ..., 1)
    assert_record(fold(x, want=ALL), x.unsqueeze(0))
    assert mean_abs(fold, x) == pytest.approx(1, abs=2e-6)  # equal entries round alike


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_axis_vectors_are_exactly_orthogonal(fold: Fold, dtype: torch.dtype) -> None:
    record = fold((torch.eye(97, 130) * 4).to(dtype), want=ALL, bins=2)
    for name in ("abs_sum", "sq_sum", "sum", "abs_max"):
        assert getattr(record, name).item() == 0
    assert record.hist is not None
    assert record.hist.tolist() == [[0, 97 * 48]]


def test_orthonormal_rows_are_zero(fold: Fold) -> None:
    assert mean_abs(fold, torch.linalg.qr(gaussian((200, 97), 0).double()).Q.T.float()) < 1e-7


@pytest.mark.parametrize(("d", "k"), [(4, 2), (16, 5), (64, 7)])
def test_stacked_bases_meet_the_welch_bound(fold: Fold, d: int, k: int) -> None:
    bases = [torch.linalg.qr(gaussian((d, d), seed).double()).Q for seed in range(k)]
    record = fold(torch.cat(bases).float(), want="sq_sum")
    assert record.sq_sum is not None
    assert record.sq_sum.item() / record.pairs.item() == pytest.approx((k - 1) / (k * d - 1), rel=1e-6)


def test_two_orthogonal_groups(fold: Fold) -> None:
    x = torch.zeros(96, 10)
    x[:48, :5], x[48:, 5:] = gaussian((5,), 0), gaussian((5,), 1)
    assert mean_abs(fold, x) == pytest.approx(47 / 95, abs=5e-7)


@pytest.mark.parametrize("n", [3, 97, 300])
def test_identity_plus_constant(fold: Fold, n: int) -> None:
    a = 0.125
    expected = (2 * a + n * a * a) / (1 + 2 * a + n * a * a)
    assert mean_abs(fold, torch.eye(n) + a) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    "where", [(0,), (96,), (0, 47, 48, 96), tuple(range(90)), tuple(range(96)), tuple(range(97))], ids=len
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=SHORT.get)
def test_zero_vectors_are_left_out_and_counted(fold: Fold, where: tuple[int, ...], dtype: torch.dtype) -> None:
    x = wide(gaussian((1, 97, 33), 0))
    x[0, list(where)] = 0
    x[0, where[0], 0] = -0.0
    x = x.to(dtype)
    got = fold(x, want=ALL, bins=8)
    assert got.zero.item() == len(where)
    assert_record(got, x, bins=8)


def test_zero_vectors_on_both_sides_of_a_cross_fold(fold: Fold) -> None:
    x, y = gaussian((1, 50, 33), 0), gaussian((1, 97, 33), 1)
    x[0, [1, 49]] = 0
    y[0, [0, 50, 96]] = 0
    got = fold(x, y, want=ALL, bins=8)
    assert (got.zero.item(), got.pairs.item()) == (5, 48 * 94)
    assert_record(got, x, y, bins=8)


BAD = {"nan": float("nan"), "inf": float("inf"), "minus-inf": -float("inf")}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("normalize", [True, False], ids=["cosines", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=SHORT.get)
def test_bad_values_stay_in_their_item(fold: Fold, value: str, normalize: bool, dtype: torch.dtype) -> None:
    x = gaussian((3, 97, 33), 0, dtype)
    x[1, 5, 32] = BAD[value]
    x[1, 96, 0] = BAD[value]
    x[1, 96, 1] = BAD[value]
    x[1, 7] = 0
    bins = 4 if normalize else 0
    got = fold(x, want=ALL, bins=bins, normalize=normalize)
    assert got.nonfinite.tolist() == [0, 2, 0]
    assert_record(got, x, normalize=normalize)
    if bins:
        assert got.hist is not None
        assert got.hist.sum(1).tolist() == [97 * 48, 0, 97 * 48]


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=SHORT.get
)
def test_nan_of_8_bits_is_seen(fold: Fold, dtype: torch.dtype) -> None:
    x = wide(gaussian((2, 20, 33), 0))
    x[0, 3, 3] = float("nan")
    x = x.to(dtype)
    got = fold(x, want=ALL)
    assert got.nonfinite.tolist() == [1, 0]
    assert_record(got, x)


@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_values_of_either_side_poison_a_cross_fold(fold: Fold, side: str) -> None:
    x, y = gaussian((2, 50, 33), 0), gaussian((2, 20, 33), 1)
    (x if side == "x" else y)[0, 19, 4] = float("nan")
    got = fold(x, y, want=ALL)
    assert got.nonfinite.tolist() == [1, 0]
    assert_record(got, x, y)


def test_a_lone_bad_vector_is_counted(fold: Fold) -> None:
    got = fold(torch.full((1, 3), float("inf")), want=ALL)
    assert (got.nonfinite.item(), got.pairs.item(), got.zero.item()) == (1, 0, 0)
    assert got.argmax is not None
    assert got.argmax.tolist() == [[-1, -1]]


def balanced(x: Tensor) -> Tensor:
    """The same directions with the largest entry of each vector between 1/2 and 1, as float32."""
    values = wide(x)
    _, exponent = torch.frexp(values.abs().amax(-1, keepdim=True))
    return torch.ldexp(values, -exponent).float()


EXTREMES = {
    "f32-1e-30": (torch.float32, -100, -100),
    "f32-1e30": (torch.float32, 100, 100),
    "f32-1e38": (torch.float32, 123, 124),
    "f32-all-over": (torch.float32, -100, 100),
    "f32-denormal": (torch.float32, -132, -130),
    "bf16-1e-30": (torch.bfloat16, -100, -100),
    "bf16-1e-38": (torch.bfloat16, -124, -120),
    "bf16-1e38": (torch.bfloat16, 123, 124),
    "bf16-all-over": (torch.bfloat16, -120, 123),
    "bf16-denormal": (torch.bfloat16, -128, -126),
    "f16-denormal": (torch.float16, -20, -18),
    "f16-all-over": (torch.float16, -14, 12),
    "f64-all-over": (torch.float64, -900, 900),
    "f64-1e-300": (torch.float64, -1000, -1000),
    "e5m2-denormal": (torch.float8_e5m2, -16, -15),
    "e4m3fn-denormal": (torch.float8_e4m3fn, -8, -7),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("n", [2, 97])
def test_extreme_scales_do_not_hurt(fold: Fold, name: str, n: int) -> None:
    dtype, low, high = EXTREMES[name]
    exponents = torch.from_numpy(np.random.default_rng(0).integers(low, high, (1, n, 1), endpoint=True))
    x = torch.ldexp(wide(gaussian((1, n, 65), 0)).clamp(-4, 4), exponents).to(dtype)
    assert bool((wide(x) != 0).any(2).all())
    rival = x if dtype == torch.float64 else balanced(x)
    if dtype == torch.float64:
        rival = torch.ldexp(x, -exponents)
    assert_record(fold(x, want=ALL), x, rival_x=rival)


def test_one_vector_may_hold_huge_and_tiny_entries(fold: Fold) -> None:
    x = gaussian((1, 49, 65), 0)
    x[..., ::2] *= 1e-30
    x[..., 1::4] *= 1e15
    assert_record(fold(x, want=ALL), x, rival_x=balanced(x))


def test_smallest_number_is_no_zero_vector(fold: Fold) -> None:
    x = torch.zeros(3, 5)
    x[0, 1] = x[1, 1] = x[2, 4] = 1e-45
    got = fold(x, want=ALL)
    assert (got.zero.item(), got.pairs.item()) == (0, 3)
    assert got.abs_sum is not None
    assert got.abs_sum.item() == 1
    assert got.argmax is not None
    assert got.argmax.tolist() == [[0, 1]]


@pytest.mark.parametrize("n", [5, 97, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=SHORT.get)
def test_argmax_names_the_first_of_equal_pairs(fold: Fold, n: int, dtype: torch.dtype) -> None:
    # signs of length 64: every product and norm is exact, so equal pairs are equal in every order of summation
    signs = torch.where(gaussian((1, n, 64), 0) > 0, 1.0, -1.0)
    first, second, third, fourth = 1, n // 2, n - 2, n - 1
    signs[0, third] = -signs[0, first]
    signs[0, fourth] = signs[0, second]
    got = fold((2 * signs).to(dtype), want="abs_max")
    assert got.argmax is not None
    assert got.abs_max is not None
    assert got.abs_max.item() == pytest.approx(1, abs=2e-7)
    assert got.argmax.tolist() == [[first, third]]
    assert truth_of(signs)[0].argmax == (first, third)


def test_argmax_of_all_equal_pairs_is_the_first_pair(fold: Fold) -> None:
    for n in (2, 48, 97, 600):
        got = fold(torch.ones(n, 4), want="abs_max")
        assert got.argmax is not None
        assert got.argmax.tolist() == [[0, 1]]
        cross = fold(torch.ones(n, 4), torch.ones(2 * n, 4), want="abs_max")
        assert cross.argmax is not None
        assert cross.argmax.tolist() == [[0, 0]]


def test_argmax_exists_when_all_cosines_are_zero(fold: Fold) -> None:
    x = torch.eye(60)
    x[0] = 0
    got = fold(x, want="abs_max")
    assert got.argmax is not None
    assert got.abs_max is not None
    assert (got.abs_max.item(), got.argmax.tolist()) == (0, [[1, 2]])


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 0, 0), (3, 0, 4), (3, 1, 4), (3, 4, 0)], ids=str)
def test_empty_shapes_have_a_defined_record(fold: Fold, shape: tuple[int, int, int]) -> None:
    b, n, _ = shape
    got = fold(torch.zeros(shape), want=ALL, bins=3)
    assert got.pairs.tolist() == [0] * b
    assert got.zero.tolist() == [n] * b
    for name, size in {"abs_sum": (b,), "argmax": (b, 2), "row_abs": (b, n), "norm_sq": (b, n), "hist": (b, 3)}.items():
        assert getattr(got, name).shape == size
    assert got.abs_sum is not None
    assert got.abs_sum.tolist() == [0.0] * b
    assert got.abs_max is not None
    assert all(map(math.isnan, got.abs_max.tolist()))

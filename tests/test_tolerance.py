"""The error rule and the oracle are themselves right: exact values pass, wrong numbers fail."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from orthofast.kernels import gram_stats
from orthofast.records import GramStats
from tests import oracle, tolerance

FLOOR = tolerance.FLOOR[torch.float32]
WANT = ("abs_sum", "sq_sum", "sum", "abs_max", "row_abs")


@pytest.fixture
def item() -> tuple[GramStats, oracle.Truth, tolerance.Plain]:
    x = torch.randn(40, 25, generator=torch.Generator().manual_seed(3))
    truth = oracle.gram_stats(x.double().numpy())
    return gram_stats(x, want=WANT, bins=16, backend="reference"), truth, rival_of(x, truth)


def rival_of(x: Tensor, truth: oracle.Truth) -> tolerance.Plain:
    return tolerance.plain(x, None, truth, dtype=torch.float32)


def check(got: GramStats, truth: oracle.Truth, rival: tolerance.Plain) -> None:
    tolerance.assert_within_rule(got, 0, truth, rival, floor=FLOOR)


def test_oracle_agrees_with_loops_in_plain_python() -> None:
    x = np.random.default_rng(0).standard_normal((5, 3)).tolist()
    truth = oracle.gram_stats(np.array(x))
    cosines = [cosine(a, b) for a, b in itertools.combinations(x, 2)]
    assert truth.pairs == 10
    assert truth.abs_sum == pytest.approx(sum(map(abs, cosines)), abs=1e-14)
    assert truth.sq_sum == pytest.approx(sum(c * c for c in cosines), abs=1e-14)
    assert truth.sum == pytest.approx(sum(cosines), abs=1e-14)
    assert truth.row_abs.sum() == pytest.approx(2 * truth.abs_sum, abs=1e-14)
    assert truth.abs_max == pytest.approx(max(map(abs, cosines)), abs=1e-14)


def cosine(a: list[float], b: list[float]) -> float:
    def dot(u: list[float], v: list[float]) -> float:
        return sum(p * q for p, q in zip(u, v, strict=True))

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


@pytest.mark.parametrize(
    ("vectors", "mean"),
    [
        (np.ones((7, 4)), 1.0),
        (np.eye(6, 9), 0.0),
        (np.concatenate([np.eye(4), np.linalg.qr(np.vander([1.0, 2.0, 3.0, 4.0]))[0].T]), None),
        (np.eye(6) - 1 / 6, 1 / 5),
        (np.repeat(np.eye(2), 5, 0), 4 / 9),
        (np.eye(8) + 0.3, (2 * 0.3 + 8 * 0.09) / (1 + 2 * 0.3 + 8 * 0.09)),
    ],
    ids=["equal-rows", "orthonormal", "two-bases", "simplex", "two-groups", "i-plus-a"],
)
def test_oracle_gives_the_closed_forms(vectors: np.ndarray, mean: float | None) -> None:
    truth = oracle.gram_stats(vectors)
    if mean is None:  # two orthonormal bases: the mean of squares meets the Welch bound (k - 1) / (kd - 1)
        assert truth.sq_sum / truth.pairs == pytest.approx(1 / 7, abs=1e-14)
    else:
        assert truth.abs_sum / truth.pairs == pytest.approx(mean, abs=1e-14)


def test_oracle_leaves_zero_vectors_out_and_keeps_nan_in() -> None:
    x = np.random.default_rng(1).standard_normal((6, 4))
    x[2] = 0
    without = oracle.gram_stats(np.delete(x, 2, 0))
    truth = oracle.gram_stats(x)
    assert (truth.zero, truth.pairs) == (1, 10)
    assert truth.abs_sum == without.abs_sum
    assert truth.row_abs[2] == 0
    x[4, 1] = np.inf
    poisoned = oracle.gram_stats(x)
    assert (poisoned.nonfinite, poisoned.pairs, poisoned.argmax) == (1, 10, (-1, -1))
    assert math.isnan(poisoned.abs_sum)
    assert math.isnan(poisoned.abs_max)
    assert np.isnan(poisoned.row_abs).all()


def test_rule_accepts_right_numbers(item: tuple[GramStats, oracle.Truth, tolerance.Plain]) -> None:
    check(*item)


@pytest.mark.parametrize("name", [*WANT, "norm_sq"])
@pytest.mark.parametrize("wrong", ["off", "nan"])
def test_rule_refuses_wrong_floats(
    item: tuple[GramStats, oracle.Truth, tolerance.Plain], name: str, wrong: str
) -> None:
    got, truth, rival = item
    value = getattr(got, name).clone()
    pairs = truth.pairs if name in ("abs_sum", "sq_sum", "sum") else 39 if name == "row_abs" else 1
    value.view(-1)[-1] += 1e-5 * pairs * (10 if name == "norm_sq" else 1) if wrong == "off" else float("nan")
    with pytest.raises(AssertionError, match=name):
        check(replace(got, **{name: value}), truth, rival)


@pytest.mark.parametrize("name", ["pairs", "zero", "nonfinite"])
def test_rule_refuses_wrong_counts(item: tuple[GramStats, oracle.Truth, tolerance.Plain], name: str) -> None:
    got, truth, rival = item
    with pytest.raises(AssertionError, match=name):
        check(replace(got, **{name: getattr(got, name) + 1}), truth, rival)


@pytest.mark.parametrize("pair", [(0, 0), (-1, -1), (0, 40), None], ids=str)
def test_rule_refuses_a_pair_that_is_not_the_largest(
    item: tuple[GramStats, oracle.Truth, tolerance.Plain], pair: tuple[int, int] | None
) -> None:
    got, truth, rival = item
    named = truth.indices[np.argsort(np.abs(truth.cosines))[-2]].tolist() if pair is None else pair
    with pytest.raises(AssertionError, match="argmax"):
        check(replace(got, argmax=torch.tensor([named])), truth, rival)


def test_rule_refuses_a_number_where_the_truth_is_nan(item: tuple[GramStats, oracle.Truth, tolerance.Plain]) -> None:
    got, truth, rival = item
    with pytest.raises(AssertionError, match="truth NaN"):
        check(got, replace(truth, abs_sum=float("nan")), rival)


def test_rule_refuses_to_judge_by_a_broken_rival() -> None:
    with pytest.raises(AssertionError, match="would hold for anything"):
        tolerance.assert_error("abs_sum", 1.0, 1.0, float("nan"), 1.0, FLOOR)


def test_rule_allows_twice_the_error_of_plain_torch_and_no_more() -> None:
    tolerance.assert_error("sum", 1.019, 1.0, 1.01, 1.0, FLOOR)
    tolerance.assert_error("sum", 0.981, 1.0, 1.01, 1.0, FLOOR)
    with pytest.raises(AssertionError, match=r"error 0\.021 is over 0\.02"):
        tolerance.assert_error("sum", 1.021, 1.0, 1.01, 1.0, FLOOR)


def test_rule_notices_bfloat16_rounding() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    truth = oracle.gram_stats(x.double().numpy())
    rounded = gram_stats(x.bfloat16().float(), want=("row_abs", "abs_max"), backend="reference")
    rounded.norm_sq = gram_stats(x, backend="reference").norm_sq
    with pytest.raises(AssertionError, match="row_abs"):
        check(rounded, truth, rival_of(x, truth))


COSINES = np.array([-1.0, -0.9, -0.26, -0.2501, -0.2499, 0.1, 0.4, 0.6, 1.0])  # 8 bins: edges at multiples of 0.25


def test_band_accepts_exact_counts_and_moves_at_an_edge() -> None:
    tolerance.assert_hist_within_band(torch.tensor([2, 0, 2, 1, 1, 1, 1, 1]), COSINES, 1e-3)
    tolerance.assert_hist_within_band(torch.tensor([2, 0, 1, 2, 1, 1, 1, 1]), COSINES, 1e-3)
    tolerance.assert_hist_within_band(torch.tensor([2, 0, 3, 0, 1, 1, 1, 1]), COSINES, 1e-3)


@pytest.mark.parametrize(
    ("counts", "band"),
    [
        ([2, 0, 0, 3, 1, 1, 1, 1], 1e-3),
        ([2, 1, 1, 1, 1, 1, 1, 1], 1e-3),
        ([2, 0, 1, 2, 1, 1, 1, 1], 1e-5),
        ([2, 0, 2, 1, 1, 1, 2, 0], 1e-3),
        ([1, 0, 2, 1, 1, 1, 1, 2], 1e-3),
        ([2, 0, 2, 1, 1, 1, 1, 0], 1e-3),
        ([2, 0, 2, 1, 1, 1, 2, -1], 1e-3),
        ([2, 0, 2, 1, 1, 1, 1, 1], 0.2),
    ],
    ids=[
        "too-many-moved",
        "two-bins-on",
        "outside-band",
        "last",
        "ends-swapped",
        "one-lost",
        "negative",
        "band-too-wide",
    ],
)
def test_band_refuses_wrong_counts(counts: list[int], band: float) -> None:
    with pytest.raises(AssertionError):
        tolerance.assert_hist_within_band(torch.tensor(counts), COSINES, band)

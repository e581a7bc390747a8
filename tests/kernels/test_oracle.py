"""Every field of the record is right: each backend against float64 loops, over shapes, dtypes, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import dispatch, gram_stats_many
from orthofast.kernels.contract import make_request
from tests import tolerance
from tests.kernels.cases import (
    ALL,
    CROSSES,
    SHAPES,
    SHORT,
    TYPES,
    Case,
    assert_record,
    case_truth,
    gaussian,
    same_bits,
    truth_of,
)
from tests.kernels.conftest import Fold

BINS = 16  # bins so wide that no band around an edge covers them


@pytest.mark.parametrize("case", [*SHAPES, *TYPES, *CROSSES], ids=str)
def test_matches_oracle(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL, bins=BINS)
    assert got.cross == (y is not None)
    assert_record(got, x, y, truth=case_truth(case), bins=BINS)
    assert got.floor is None or not bool(got.floor.any())  # operands are exact


@pytest.mark.parametrize("case", [Case(97, 130, b=2), Case(49, 257, torch.bfloat16), Case(50, 66, m=97)], ids=str)
@pytest.mark.parametrize("name", [*ALL, "hist"])
def test_each_field_alone_matches_oracle(fold: Fold, case: Case, name: str) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=() if name == "hist" else (name,), bins=BINS if name == "hist" else 0)
    asked = {
        name,
        "argmax" if name == "abs_max" else name,
        "row_abs_y" if name == "row_abs" and y is not None else name,
    }
    for field in (*ALL, "argmax", "hist", "row_abs_y"):
        assert (getattr(got, field) is not None) == (field in asked), f"{field} when only {name} is wanted"
    assert_record(got, x, y, truth=case_truth(case), bins=BINS if name == "hist" else 0)


@pytest.mark.parametrize("case", [Case(97, 130, b=2), Case(0, 3), Case(5, 0), Case(50, 66, m=97)], ids=str)
def test_nothing_wanted_gives_norms_and_counts(fold: Fold, case: Case) -> None:
    got = fold(case.x(), case.y(), want=())
    assert all(getattr(got, name) is None for name in (*ALL, "argmax", "hist", "row_abs_y", "standard_error"))
    assert_record(got, case.x(), case.y(), truth=case_truth(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(97, 130, b=2),
        Case(385, 33),
        Case(63, 513, torch.bfloat16),
        Case(63, 100, torch.float16, "cols"),
        Case(63, 100, torch.float64),
        Case(63, 100, torch.float8_e4m3fn),
        Case(50, 66, m=97),
        Case(2, 0),
    ],
    ids=str,
)
def test_raw_dot_products_match_oracle(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL, normalize=False)
    assert_record(got, x, y, truth=case_truth(case, normalize=False), normalize=False)


def test_raw_dot_products_count_pairs_of_zero_vectors(fold: Fold) -> None:
    x = gaussian((1, 9, 5), 0)
    x[0, 4] = 0
    got = fold(x, want=ALL, normalize=False)
    assert (got.pairs.item(), got.zero.item()) == (36, 1)
    assert_record(got, x, normalize=False)


@pytest.mark.parametrize("case", [Case(97, 130), Case(385, 33, layout="cols"), Case(50, 66, m=97)], ids=str)
def test_float64_precision_on_float32_input(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL, bins=BINS, precision="float64")
    assert_record(got, x, y, truth=case_truth(case), bins=BINS, precision="float64")


@pytest.mark.parametrize("bins", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_histogram_within_band(fold: Fold, bins: int, dtype: torch.dtype) -> None:
    x = torch.cat([gaussian((1, 60, 3), 1, dtype), gaussian((1, 60, 3), 1, dtype), -gaussian((1, 30, 3), 1, dtype)], 1)
    assert_record(fold(x, bins=bins, want=()), x, bins=bins)


def test_histogram_keeps_the_ends(fold: Fold) -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    got = fold(x, bins=4)
    assert got.hist is not None
    assert got.hist.tolist() == [[2, 0, 3, 1]]  # -1 twice, 0 three times (left edge of its bin), 1 once


@pytest.mark.parametrize("case", [Case(97, 130), Case(385, 600), Case(300, 64, b=2)], ids=str)
def test_high_precision_stays_within_its_reported_floor(fold: Fold, case: Case) -> None:
    x = case.x()
    got = fold(x, want=ALL, precision="high")
    assert got.floor is not None
    if not bool(got.floor.any()):  # served with exact operands: then the strict rule holds
        assert_record(got, x, truth=case_truth(case))
        return
    for item, true in enumerate(case_truth(case)):
        floor = got.floor[item].item()
        assert 0 < floor < 2**-7
        assert got.abs_sum is not None
        assert got.row_abs is not None
        assert abs(got.abs_sum[item].item() / true.abs_sum - 1) < 1e-4
        error = (got.row_abs[item] - torch.from_numpy(true.row_abs)).abs().max().item() / (case.n - 1)
        assert error <= floor
        # the floor is a root mean square; the largest of 75000 normal errors is under six of them
        tolerance.assert_maximum(got, item, true, 0.0, floor=6 * floor)
        tolerance.assert_norms(got.norm_sq[item] if got.norm_sq is not None else None, true.norm_sq, 1e-7)


@pytest.mark.parametrize("case", [Case(64, 96), Case(96, 96), Case(385, 400)], ids=str)
def test_high_precision_recomputes_orthonormal_vectors_exactly(fold: Fold, case: Case) -> None:
    x = torch.linalg.qr(case.x()[0].double().T).Q.T.float()
    got = fold(x, want=ALL, precision="high")
    assert got.abs_sum is not None
    assert got.floor is not None
    assert got.abs_sum.item() / got.pairs.item() < 1e-7
    assert got.floor.item() == 0
    assert_record(got, x.unsqueeze(0))


def test_high_precision_decides_per_item(fold: Fold) -> None:
    x = torch.stack([torch.linalg.qr(gaussian((64, 64), 0).double()).Q.float(), gaussian((64, 64), 1)])
    got = fold(x, precision="high")
    assert got.floor is not None
    assert got.abs_sum is not None
    assert got.floor[0].item() == 0
    assert got.abs_sum[0].item() / 2016 < 1e-7
    assert abs(got.abs_sum[1].item() / truth_of(x)[1].abs_sum - 1) < 1e-4


def test_high_precision_of_16_bit_input_is_exact(fold: Fold) -> None:
    x = gaussian((1, 63, 100), 0, torch.bfloat16)
    assert same_bits(fold(x, want=ALL, precision="high"), fold(x, want=ALL))


MANY = [
    Case(48, 33),
    Case(97, 130, b=2),
    Case(50, 257, torch.bfloat16),
    Case(0, 5),
    Case(63, 64, layout="cols"),
    Case(64, 64, torch.float16),
    Case(385, 100),
    Case(1, 1),
    Case(9, 4, torch.float8_e5m2),
    Case(20, 30, torch.float64),
]


@pytest.mark.parametrize("precision", ["auto", "high"])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosines", "raw"])
def test_many_equal_single_calls_bit_for_bit(backend: str, precision: str, normalize: bool) -> None:
    options: dict[str, Any] = {
        "want": ALL,
        "bins": BINS if normalize else 0,
        "precision": precision,
        "normalize": normalize,
    }
    xs = [case.x() for case in MANY]
    served = [x for x in xs if dispatch.load(backend).supports(make_request(x, **options)) is None]
    assert len(served) >= 6
    records = gram_stats_many(served, backend=backend, **options)
    assert len(records) == len(served)
    for x, record in zip(served, records, strict=True):
        assert same_bits(record, gram_stats_many([x], backend=backend, **options)[0])
        if precision == "auto":
            assert_record(record, x, normalize=normalize)


def test_many_equal_single_calls_through_the_single_door(fold: Fold, backend: str) -> None:
    xs = [gaussian((n, d), n) for n, d in ((5, 7), (97, 64), (300, 33))]
    for x, record in zip(xs, gram_stats_many(xs, want=ALL, backend=backend), strict=True):
        assert same_bits(record, fold(x, want=ALL))


def test_many_of_nothing_is_nothing(backend: str) -> None:
    assert gram_stats_many([], backend=backend) == []


def test_many_keep_the_order_when_backends_differ() -> None:
    xs: list[Tensor] = [
        gaussian((n, 8), n, dtype) for n, dtype in ((4, torch.float64), (3, torch.float32), (5, torch.float16))
    ]
    assert [record.pairs.item() for record in gram_stats_many(xs)] == [6, 3, 10]


def test_a_generator_of_wants_is_read_once_for_all(backend: str) -> None:
    records = gram_stats_many([torch.eye(3), torch.eye(4)], want=(name for name in ("sum", "sq_sum")), backend=backend)
    assert all(record.sum is not None and record.sq_sum is not None for record in records)


@pytest.mark.parametrize(
    "bad", [[torch.eye(3), torch.ones(2, dtype=torch.int32)], [torch.eye(3), None]], ids=["integer", "none"]
)
def test_many_refuse_a_bad_tensor(backend: str, bad: list[Tensor]) -> None:
    with pytest.raises(InputError):
        gram_stats_many(bad, backend=backend)

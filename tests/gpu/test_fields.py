"""Every field of the record on the device: each CUDA backend against float64 loops, ragged shapes, all layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orthofast.kernels import gram_stats_many
from tests.gpu.conftest import Fold, landed, moved, served
from tests.kernels.cases import (
    ALL,
    CROSSES,
    DTYPES,
    SHAPES,
    TYPES,
    Case,
    assert_record,
    case_truth,
    gaussian,
    same_bits,
)

pytestmark = pytest.mark.gpu
BINS = 16
LONGEST = 10_000  # entries of a vector; the few longer ones say nothing more on this device
# one below, at and above the tiles and steps of every table
EDGES = [
    Case(n, d, dtype, layout)
    for n in (64, 65, 127, 128, 129, 255, 257, 513)
    for d, dtype, layout in (
        (64, torch.bfloat16, "rows"),
        (72, torch.bfloat16, "cols"),
        (200, torch.float16, "rows"),
        (63, torch.float32, "rows"),
    )
]
RAGGED = [
    case
    for case in [*EDGES, Case(33, 40, b=2), *SHAPES, *TYPES, *CROSSES]
    if case.d < LONGEST and (case.n, case.b) != (0, 0)
]
REHEARSED = Case(33, 40, b=2)


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_matches_oracle(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL, bins=BINS, precision="highest")
    assert_record(got, x, y, truth=case_truth(case), bins=BINS)


@pytest.mark.parametrize("name", [*ALL, "hist"])
@pytest.mark.parametrize("case", [REHEARSED, Case(300, 136, torch.bfloat16), Case(150, 66, m=97)], ids=str)
def test_each_field_alone(fold: Fold, case: Case, name: str) -> None:
    x, y = case.x(), case.y()
    bins = BINS if name == "hist" else 0
    got = fold(x, y, want=() if bins else (name,), bins=bins, precision="highest")
    assert_record(got, x, y, truth=case_truth(case), bins=bins)


@pytest.mark.parametrize(
    "case", [Case(300, 136), Case(385, 600), Case(129, 64, layout="cols"), Case(70, 33, m=140)], ids=str
)
def test_default_precision_of_float32_stays_within_its_floor(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL)
    for item, true in enumerate(case_truth(case)):
        assert got.abs_sum is not None
        floor = 3e-7 if got.floor is None else max(3e-7, 2 * got.floor[item].item())
        assert abs(got.abs_sum[item].item() - true.abs_sum) <= floor * true.pairs


@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_orthogonal_float32_vectors_are_not_lost_in_rounding(fold: Fold, precision: str) -> None:
    x = torch.linalg.qr(gaussian((300, 300), 3).double()).Q[:200].float().unsqueeze(0)
    got = fold(x, precision=precision)
    assert got.abs_sum is not None
    assert got.abs_sum.item() / got.pairs.item() < 1e-6


@pytest.mark.parametrize("case", [Case(97, 130), Case(63, 100, layout="cols"), Case(50, 66, m=97)], ids=str)
def test_float64_precision(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    assert_record(fold(x, y, want=ALL, precision="float64"), x, y, truth=case_truth(case), precision="float64")


@pytest.mark.parametrize("case", [Case(97, 130, torch.bfloat16, b=2), Case(150, 33), Case(50, 66, m=97)], ids=str)
def test_raw_dot_products(fold: Fold, case: Case) -> None:
    x, y = case.x(), case.y()
    got = fold(x, y, want=ALL, normalize=False, precision="highest")
    assert_record(got, x, y, truth=case_truth(case, normalize=False), normalize=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_poisons_its_item_alone(fold: Fold, dtype: torch.dtype, value: float) -> None:
    x = gaussian((3, 140, 72), 0, dtype)
    x[1, 77, 5] = value
    got = fold(x, want=ALL)
    assert got.nonfinite.tolist() == [0, 1, 0]
    for name in ("abs_sum", "sq_sum", "sum", "abs_max"):
        assert torch.isnan(getattr(got, name)).tolist() == [False, True, False], name


def test_zero_vectors_are_in_no_pair(fold: Fold) -> None:
    x = gaussian((2, 140, 72), 0, torch.bfloat16)
    x[0, 3] = 0
    x[0, 130] = 0
    got = fold(x, want=ALL, precision="highest")
    assert got.zero.tolist() == [2, 0]
    assert_record(got, x)


@pytest.mark.parametrize("exponent", [-60, -30, 30, 60])
def test_lengths_far_from_one_do_not_matter(fold: Fold, exponent: int) -> None:
    x = gaussian((1, 70, 40), 0)
    got = fold(torch.ldexp(x, torch.tensor(exponent)), want=ALL, precision="highest")
    assert_record(got, torch.ldexp(x, torch.tensor(exponent)), rival_x=x)


GROUP: list[tuple[Case, dict[str, Any]]] = [
    (case, {})
    for case in (
        Case(768, 96, torch.bfloat16),
        Case(64, 576, torch.bfloat16, b=20),
        Case(300, 72, torch.bfloat16, "cols"),
        Case(1, 8, torch.bfloat16),
        Case(0, 8, torch.bfloat16),
        Case(130, 100),
        Case(63, 65, torch.float16, "strided"),
        Case(40, 24, torch.float8_e4m3fn),
        Case(20, 30, torch.float64),
    )
]


def test_many_matrices_in_one_call_equal_the_oracle_and_single_calls(
    fold: Fold, gpu_backend: str, device: torch.device
) -> None:
    xs = [case.x() for case, _ in GROUP]
    there = [moved(x, device) for x in xs]
    for x in there:
        served(gpu_backend, x, want=ALL, precision="highest")
    records = gram_stats_many(there, want=ALL, precision="highest", backend=gpu_backend)
    for (case, _), x, record in zip(GROUP, xs, records, strict=True):
        found = landed(record)
        assert_record(found, x, truth=case_truth(case))
        assert same_bits(found, fold(x, want=ALL, precision="highest")), str(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "cols"])
def test_two_runs_give_the_same_bits(fold: Fold, dtype: torch.dtype, layout: str) -> None:
    x = Case(700, 136, dtype, layout).x()
    first, second = (fold(x, want=ALL, bins=BINS) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize(("n", "d", "dtype"), [(3001, 520, torch.bfloat16), (2500, 264, torch.float32)])
def test_a_matrix_of_many_tiles_against_float64_on_the_device(
    fold: Fold, device: torch.device, n: int, d: int, dtype: torch.dtype
) -> None:
    if device.type == "cpu":
        pytest.skip("takes minutes in the interpreter")
    x = gaussian((1, n, d), 7, dtype)
    got = fold(x, want=ALL, precision="highest")
    unit = torch.nn.functional.normalize(x[0].to(device).double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    assert got.abs_sum is not None
    assert got.sq_sum is not None
    assert got.row_abs is not None
    pairs = n * (n - 1) / 2
    assert abs(got.abs_sum.item() - cosines.abs().sum().item() / 2) / pairs < 3e-7
    assert abs(got.sq_sum.item() - cosines.square().sum().item() / 2) / pairs < 3e-7
    rows = cosines.abs().sum(1).cpu()
    assert float((got.row_abs[0] - rows).abs().max()) / n < 3e-7
    largest, place = _largest(cosines)
    assert got.abs_max is not None
    assert got.argmax is not None
    assert abs(got.abs_max.item() - largest) < 1e-6
    i, j = got.argmax[0].tolist()
    assert abs(float(cosines[i, j].abs()) - largest) < 2e-6, f"named {(i, j)}, the largest is {place}"


def _largest(cosines: Tensor) -> tuple[float, tuple[int, int]]:
    flat = int(cosines.abs().argmax())
    i, j = divmod(flat, len(cosines))
    return float(cosines[i, j].abs()), (min(i, j), max(i, j))

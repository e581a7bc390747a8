"""A sharded matrix measures like a whole one: value, record, gradient, work and memory, on two and three ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import claims
from tests.distributed.ranks import Ranks

WHERE = tuple(claims.PLACEMENTS)
# uneven rows, empty shards, more columns than rows, one vector
SHAPES = [(1003, 37), (2, 5), (40, 200), (1, 9)]


def assert_same_bits(answers: list[Any]) -> None:
    assert all(answer == answers[0] for answer in answers), "ranks differ in some bit"


@pytest.mark.parametrize("where", WHERE)
# not the columns of one row: vectors of length 1 are all parallel, and any pair may be named
@pytest.mark.parametrize(
    ("n", "d", "vectors"), [(*s, v) for s in SHAPES for v in ("rows", "cols") if s[0] > 1 or v == "rows"]
)
def test_measures_are_those_of_one_process(ranks: Ranks, n: int, d: int, where: str, vectors: str) -> None:
    assert_same_bits(ranks(claims.measures_are_those_of_one_process, n, d, where, vectors))


@pytest.mark.parametrize("marks", ["plain", "zero", "nan"])
@pytest.mark.parametrize("normalize", [True, False], ids=["cosines", "products"])
@pytest.mark.parametrize("where", WHERE)
def test_records_are_those_of_one_process(ranks: Ranks, where: str, normalize: bool, marks: str) -> None:
    assert_same_bits(ranks(claims.records_are_those_of_one_process, torch.float32, where, normalize, marks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("where", ["rows", "columns"])
def test_every_dtype_travels(ranks: Ranks, dtype: torch.dtype, where: str) -> None:
    assert_same_bits(ranks(claims.records_are_those_of_one_process, dtype, where, True, "zero"))


@pytest.mark.parametrize("vectors", ["rows", "cols"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("name", ["pii", "mean_squared_cosine"])
def test_gradients_are_those_of_one_process(ranks: Ranks, name: str, n: int, d: int, where: str, vectors: str) -> None:
    assert_same_bits(ranks(claims.gradients_are_those_of_one_process, name, n, d, where, vectors, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["rows", "columns"])
def test_gradients_keep_the_dtype(ranks: Ranks, dtype: torch.dtype, where: str) -> None:
    arguments = ("pii", 101, 24, where, "rows", dtype)
    assert_same_bits(ranks(claims.gradients_are_those_of_one_process, *arguments))


@pytest.mark.parametrize("where", WHERE)
def test_heads_have_values_and_gradients(ranks: Ranks, where: str) -> None:
    ranks(claims.several_items_have_gradients, where)


@pytest.mark.parametrize("where", ["rows", "columns"])
@pytest.mark.parametrize("n", [2, 7, 120])
def test_every_pair_is_folded_once(ranks: Ranks, n: int, where: str) -> None:
    work = ranks(claims.work_of, n, where)
    assert sum(work) == n * (n - 1) // 2
    if n % (2 * ranks.count) == 0:
        assert max(work) - min(work) <= n // 2, "the ranks share the work evenly"


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize(("where", "vectors"), [("rows", "rows"), ("columns", "rows"), ("rows", "cols")])
def test_no_rank_ever_holds_the_whole_matrix(ranks: Ranks, where: str, vectors: str, gradient: bool) -> None:
    whole = 900 * 256
    n, d = (900, 256) if vectors == "rows" else (256, 900)
    for largest, message in ranks(claims.memory_of, where, vectors, gradient):
        assert message == -(-n // ranks.count) * d
        assert largest < whole, f"a tensor of {largest} elements, of the matrix' {whole}"

"""A fold is a pure function: same bits from run to run and for any number of threads, and the input stays as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from orthofast.kernels import gram_stats_many
from tests.kernels.cases import ALL, Case, gaussian, same_bits
from tests.kernels.conftest import Fold

CASES = [
    Case(500, 257),
    Case(1200, 40),
    Case(97, 33, b=7),
    Case(300, 513, torch.bfloat16, "cols"),
    Case(300, 130, torch.float8_e4m3fn),
    Case(300, 130, torch.float64),
    Case(400, 65, m=500),
    Case(3, 100_003),
]


@pytest.mark.parametrize("precision", ["auto", "high", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_run_or_the_threads(fold: Fold, case: Case, precision: str) -> None:
    x, y = case.x(), case.y()
    options = {"want": ALL, "bins": 50, "precision": precision}
    torch.set_num_threads(1)
    first = fold(x, y, **options)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert same_bits(first, fold(x, y, **options)), f"{threads} threads"


def test_bits_of_many_do_not_depend_on_threads(backend: str) -> None:
    xs = [gaussian((n, 65), n) for n in (5, 100, 385, 0, 600, 48)]
    torch.set_num_threads(1)
    first = gram_stats_many(xs, want=ALL, backend=backend)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = gram_stats_many(xs, want=ALL, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_bits_do_not_depend_on_where_the_input_lies(fold: Fold) -> None:
    x = gaussian((97, 65), 0)
    first = fold(x, want=ALL, bins=9)
    for shift in range(1, 17):
        room = torch.zeros(x.numel() + shift)
        moved = room[shift:].view(97, 65)
        moved.copy_(x)
        assert same_bits(first, fold(moved, want=ALL, bins=9)), f"shifted by {shift} entries"


@pytest.mark.parametrize("case", [Case(97, 65, b=2), Case(97, 65, torch.bfloat16, "cols"), Case(30, 65, m=97)], ids=str)
@pytest.mark.parametrize("precision", ["auto", "high"])
def test_does_not_write_input(fold: Fold, case: Case, precision: str) -> None:
    x, y = case.x(), case.y()
    x[:, 3] = 0
    x[:, 4, 1] = float("nan")
    kept, kept_y = x.clone(), None if y is None else y.clone()
    fold(x, y, want=ALL, bins=9, precision=precision)
    assert torch.equal(x.isnan(), kept.isnan())
    assert torch.equal(x.nan_to_num(), kept.nan_to_num())
    assert y is None or (kept_y is not None and torch.equal(y, kept_y))


def test_record_shares_no_memory_with_the_input_or_an_earlier_record(fold: Fold) -> None:
    x = gaussian((97, 65), 0)
    first = fold(x, want=ALL, bins=9)
    again = fold(x, want=ALL, bins=9)
    fold(gaussian((97, 65), 1), want=ALL, bins=9)  # a workspace that is reused is overwritten now
    x.zero_()
    assert same_bits(first, again)


def test_threads_of_torch_are_left_as_they_were(fold: Fold) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fold(gaussian((385, 65), 0), want=ALL)
        assert torch.get_num_threads() == threads


def test_calls_from_several_python_threads_do_not_disturb_each_other(fold: Fold) -> None:
    xs = [gaussian((n, 65), n) for n in (97, 200, 385)]
    alone = [fold(x, want=ALL) for x in xs]
    wrong: list[str] = []

    def work(index: int) -> None:
        same = [same_bits(alone[index], fold(xs[index], want=ALL)) for _ in range(10)]
        if not all(same):
            wrong.append(f"input {index}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_fold_leaves_the_random_state_alone(fold: Fold) -> None:
    before = torch.get_rng_state()
    fold(gaussian((97, 65), 0), want=ALL)
    fold(gaussian((97, 65), 0), sample=200)
    assert torch.equal(before, torch.get_rng_state())


def test_input_that_wants_a_gradient_is_read_without_a_graph(fold: Fold) -> None:
    x = gaussian((20, 9), 0).requires_grad_()
    record = fold(x, want=ALL)
    assert record.abs_sum is not None
    assert not record.abs_sum.requires_grad
    assert same_bits(record, fold(x.detach(), want=ALL))


def test_inference_mode_and_autocast_change_nothing(fold: Fold) -> None:
    x = gaussian((97, 65), 0)
    expected = fold(x, want=ALL)
    with torch.inference_mode():
        assert same_bits(expected, fold(x, want=ALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(expected, fold(x, want=ALL))


def test_default_dtype_changes_nothing(fold: Fold) -> None:
    x = gaussian((500, 257), 0)
    expected = fold(x, want=ALL)
    torch.set_default_dtype(torch.float64)
    try:
        assert same_bits(expected, fold(x, want=ALL))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_lower_matmul_precision_never_rounds_the_operands(fold: Fold, backend: str) -> None:
    x = gaussian((500, 257), 0)
    expected, truth = fold(x, want=ALL), fold(x, want=ALL, precision="float64")
    torch.set_float32_matmul_precision("medium")
    try:
        got = fold(x, want=ALL)
    finally:
        torch.set_float32_matmul_precision("highest")
    if backend == "reference":  # it steps up to float64 then: other bits, nearer the truth
        assert same_bits(truth, got)
    else:
        assert same_bits(expected, got)

"""The Triton drift kernel in the interpreter, against float64: ragged edges, dtypes, strides, faults.

Not collected by itself: ``test_drift_kernel.py`` runs it in a process that starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from orthofast.kernels import triton_drift
from orthofast.kernels.contract import make_request
from orthofast.kernels.drift import by_blocks, drift_stats
from orthofast.records import DriftStats
from tests.metrics.test_drift import plain, truth
from tests.tolerance import FLOOR

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float8": (torch.float8_e5m2, torch.float8_e4m3fn),
    "mixed": (torch.bfloat16, torch.float32),
}


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_poisoned(poisoned_memory: None) -> None:
    """A partial or a padded entry that is not written shows as NaN."""


def folded(before: Tensor, after: Tensor) -> DriftStats:
    return drift_stats(before, after, backend="triton_gpu")


def assert_within_rule(before: Tensor, after: Tensor) -> None:
    found = folded(before, after)
    absolute, signed, pairs = truth(before, after)
    assert found.pairs.item() == pairs
    for got, true, rival in zip(
        (found.abs_change, found.change), (absolute, signed), plain(before, after), strict=True
    ):
        assert abs(got.item() / pairs - true) <= 2 * abs(rival - true) + FLOOR[torch.float32]


@pytest.mark.parametrize("shape", [(2, 3), (31, 32), (33, 33), (70, 40)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
def test_it_is_the_sum_over_pairs(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    before = torch.randn(shape)
    after = (before + 0.3 * torch.randn(shape)).to(dtypes[1])
    assert_within_rule(before.to(dtypes[0]), after)


def test_a_small_drift_of_float32_is_resolved() -> None:
    before = torch.randn(60, 50, dtype=torch.float64)
    after = (before + 1e-4 * torch.randn(60, 50, dtype=torch.float64)).float()
    before = before.float()
    absolute, signed, pairs = truth(before, after)
    found = folded(before, after)
    assert absolute < 4e-5
    assert found.abs_change.item() / pairs == pytest.approx(absolute, rel=2e-3)
    assert found.change.item() / pairs == pytest.approx(signed, rel=2e-3)


def test_items_strides_and_lengths_of_any_size() -> None:
    before, after = torch.randn(3, 40, 24), torch.randn(3, 40, 24)
    expected = by_blocks(make_request(before), make_request(after))
    for x, y in (
        (before, after),
        (before.mT.contiguous().mT, torch.stack((after, after), 3)[..., 1]),
        (before * 2.0**-120, after * 2.0**100),
    ):
        found = folded(x, y)
        torch.testing.assert_close(found.abs_change, expected.abs_change, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.change, expected.change, rtol=1e-5, atol=1e-5)
        assert found.pairs.tolist() == [780] * 3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, at inf - inf
def test_zero_and_bad_vectors_are_counted_as_the_reference_counts_them() -> None:
    before, after = torch.randn(2, 35, 9), torch.randn(2, 35, 9)
    before[0, 3] = 0
    after[0, 7] = 0
    before[1, 2, 4] = math.nan
    after[1, 30, 1] = -math.inf
    expected, found = by_blocks(make_request(before), make_request(after)), folded(before, after)
    for name in ("pairs", "zero", "nonfinite"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert found.abs_change[0].item() == pytest.approx(expected.abs_change[0].item(), rel=1e-5)
    assert found.change[1].isnan()
    assert found.abs_change[1].isnan()


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 0)], ids=str)
def test_nothing_to_compare(shape: tuple[int, int]) -> None:
    found = folded(torch.ones(shape), torch.ones(shape))
    assert (found.pairs.item(), found.change.item()) == (0, 0)


def test_the_bits_do_not_depend_on_how_many_programs_share_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.randn(2, 100, 20), torch.randn(2, 100, 20)
    first = folded(before, after)
    monkeypatch.setattr(triton_drift.tiles, "programs", lambda tile, entries, processors: entries)
    again = folded(before, after)
    assert torch.equal(first.change, again.change)
    assert torch.equal(first.abs_change, again.abs_change)


def test_float64_goes_to_the_reference() -> None:
    before, after = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    assert folded(before, after).change.item() / 190 == pytest.approx(truth(before, after)[1], rel=1e-13)

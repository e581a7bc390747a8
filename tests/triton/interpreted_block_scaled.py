"""The block-scaled Triton kernel in the interpreter, against float64: ragged edges, rows and columns, faults.

Not collected by itself: ``test_block_scaled_kernel.py`` runs it in a process that starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import orthofast
from orthofast.kernels import gram_stats, triton_block_scaled
from orthofast.kernels.contract import Request, make_request
from orthofast.records import GramStats
from orthofast.views import BlockScaled
from tests.kernels.cases import assert_record, gaussian, same_bits
from tests.kernels.test_block_scaled import dense, weight

ALL_SUMS = ("abs_sum", "sq_sum", "sum")
SIDES = (1, 127, 128, 129, 260)


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_poisoned(poisoned_memory: None) -> None:
    """A partial that is not written shows as NaN."""


def asked(want: Any = ALL_SUMS, **options: Any) -> Request:
    return make_request(torch.ones(1, 8, 8), want=want, **options)


def folded(
    x: BlockScaled,
    y: BlockScaled | None = None,
    request: Request | None = None,
    processors: int = 3,
    source: ModuleType = triton_block_scaled,
) -> GramStats:
    x, y = (v if v is None or v.data.dim() == 3 else items(v) for v in (x, y))
    assert x is not None
    request = request or asked()
    assert source.problem(x, y, request) is None
    record: GramStats = source.gram_stats(x, y, request, processors)
    return record


def items(x: BlockScaled) -> BlockScaled:
    return BlockScaled(x.data.unsqueeze(0), x.scale.unsqueeze(0), x.block)


@pytest.mark.parametrize("n", SIDES)
@pytest.mark.parametrize("d", SIDES)
def test_rows_of_any_shape(n: int, d: int) -> None:
    x = weight(n, d)
    assert_record(folded(x), dense(x))


@pytest.mark.parametrize(("n", "d"), [(1, 129), (130, 257), (257, 130), (128, 128)])
def test_columns_turn_with_their_factors(n: int, d: int) -> None:
    x = items(weight(n, d)).transpose(1, 2)
    assert_record(folded(x), dense(x))


@pytest.mark.parametrize("dtype", triton_block_scaled.CONVERTED, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 384)], ids=str)
def test_formats_and_larger_blocks(dtype: torch.dtype, block: tuple[int, int]) -> None:
    x = weight(300, 400, block, dtype=dtype)
    assert_record(folded(x), dense(x))


def test_items_do_not_mix() -> None:
    x = weight(150, 140, b=3)
    x.scale[1] = float("nan")  # the interpreter reads the 8-bit NaN as a number, devices do not
    got = folded(x)
    assert got.nonfinite.tolist() == [0, 150, 0]
    assert_record(got, dense(x))


@pytest.mark.parametrize("m", [1, 128, 200])
def test_cross_folds(m: int) -> None:
    x, y = weight(150, 200), weight(m, 200, (256, 128), seed=5)
    x.data[3] = 0
    y.data[0] = 0
    assert_record(folded(x, y), dense(x), dense(y))


def test_a_cross_fold_of_rows_with_columns() -> None:
    x, y = items(weight(150, 200)), items(weight(200, 140, seed=5)).transpose(1, 2)
    assert_record(folded(x, y), dense(x), dense(y))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_zero_vectors_zero_factors_and_infinite_ones() -> None:
    x = weight(300, 200, b=2)
    x.data[0, [0, 299]] = 0
    x.scale[0, 1] = 0
    x.scale[1, 2, 1] = float("inf")
    got = folded(x)
    assert got.zero.tolist() == [130, 0]
    assert got.nonfinite.tolist() == [0, 44]
    assert_record(got, dense(x))


def test_factors_far_from_one_cost_no_accuracy() -> None:
    x = weight(200, 260)
    x.scale.mul_(torch.tensor([[1e-30], [1e30]]))
    # what plain torch can square without overflow
    rival = BlockScaled(x.data, x.scale * torch.tensor([[1e30], [1e-30]]))
    assert_record(folded(x), dense(x), rival_x=dense(rival))


@pytest.mark.parametrize("want", [("abs_sum",), ("sq_sum",), ("sum", "abs_sum"), ()], ids=str)
def test_only_what_is_asked_comes_back(want: tuple[str, ...]) -> None:
    x = weight(140, 130)
    got = folded(x, request=asked(want))
    assert {name for name in ALL_SUMS if getattr(got, name) is not None} == set(want)
    assert_record(got, dense(x))


def test_any_number_of_programs_gives_the_same_bits() -> None:
    x = weight(400, 200)
    assert all(same_bits(folded(x, processors=1), folded(x, processors=count)) for count in (2, 5, 99))


def test_native_products_say_how_far_they_can_be_off() -> None:
    x = weight(200, 260)
    request = asked()
    request.precision = "high"
    got = folded(x, request=request)
    assert got.floor is not None
    assert got.floor.tolist() == [2.0**-13]
    assert_record(got, dense(x))  # the interpreter adds exactly
    exact = folded(x).floor
    assert exact is not None
    assert exact.tolist() == [0]


@pytest.mark.parametrize(
    ("x", "request_", "word"),
    [
        (weight(9, 9, (64, 128)), asked(), "multiples of 128"),
        (weight(9, 9, dtype=torch.float8_e4m3fnuz), asked(), "float8_e4m3fn and float8_e5m2"),
        (weight(9, 9), asked("row_abs"), "sums cosines"),
        (weight(9, 9), asked("abs_sum", normalize=False), "sums cosines"),
        (weight(9, 0), asked(), "at least one"),
        (BlockScaled(gaussian((9, 18), 0, torch.float8_e5m2)[:, ::2], torch.ones(1, 1)), asked(), "one piece"),
    ],
    ids=["block", "dtype", "row_abs", "raw", "empty", "strided"],
)
def test_the_rest_is_refused_with_a_sentence(x: BlockScaled, request_: Request, word: str) -> None:
    reason = triton_block_scaled.problem(items(x), None, request_)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize("vectors", ["rows", "cols"])
def test_the_door_and_the_measures_use_this_kernel(vectors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = triton_block_scaled.gram_stats

    def watched(*arguments: Any) -> GramStats:
        seen.append(arguments[0].shape)
        return real(*arguments)

    monkeypatch.setattr(triton_block_scaled, "gram_stats", watched)
    x = weight(140, 200)
    got = orthofast.pii(x, vectors=vectors, backend="triton_gpu")
    expected = orthofast.pii(dense(x)[0], vectors=vectors, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert len(seen) == 1
    # per-vector sums have no kernel of their own: dequantised, by the same backend
    record = gram_stats(x, want=("abs_sum", "row_abs"), backend="triton_gpu")
    assert len(seen) == 1
    assert_record(record, dense(x))


BROKEN = {
    "the factor is dropped": ("total += step * factor", "total += step"),
    "only one side's factor": (" * tl.load(factors_y + (k // WIDTH_Y) * scale_dy)", ""),
    "the factor of the first block": ("(column // HEIGHT_Y) * scale_ny", "0"),
    "lengths without factors": (".to(tl.float64) * factor * factor", ".to(tl.float64)"),
    "elements beyond the edge": ("(elements < d)[None, :]", "(elements < d + 1)[None, :]"),
    "the diagonal": ("columns[None, :] > rows[:, None]", "columns[None, :] >= rows[:, None]"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    broken = altered(*BROKEN[fault], tmp_path)
    whole = weight(300, 301)
    # a window: what lies beyond its edges is not zero
    x = BlockScaled(whole.data[:299, :300], whole.scale, whole.block)
    assert_record(folded(x), dense(x))
    with pytest.raises(AssertionError):
        assert_record(folded(x, source=broken), dense(x))


def altered(old: str, new: str, folder: Path) -> ModuleType:
    """The kernel's module with one place changed."""
    text = inspect.getsource(triton_block_scaled)
    assert text.count(old) == 1, f"the kernel says {text.count(old)} times {old!r}"
    path = folder / "altered_block_scaled.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("altered_block_scaled", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

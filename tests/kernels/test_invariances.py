"""What must not matter does not: scale, sign, order and rotation of vectors, and how the pairs are split into folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthofast.errors import InputError
from orthofast.records import GramStats, merge
from tests import tolerance
from tests.kernels.cases import ALL, SHORT, Case, assert_record, gaussian, same_bits, truth_of, wide
from tests.kernels.conftest import Fold

SIDES = st.integers(1, 70)
LENGTHS = st.integers(1, 140)
SEEDS = st.integers(0, 2**16)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SCALES = {
    torch.float64: (-300, 300),
    torch.float32: (-96, 96),  # 1e-29 to 1e29
    torch.bfloat16: (-96, 96),
    torch.float16: (-8, 8),
}


def field(record: GramStats, name: str = "row_abs") -> Tensor:
    value = getattr(record, name)
    assert isinstance(value, Tensor)
    return value


def scales(n: int, seed: int, low: int, high: int) -> Tensor:
    """(n, 1) powers of two of either sign: multiplication by them is exact."""
    random = np.random.default_rng(seed)
    values = np.ldexp(random.choice([-1.0, 1.0], n), random.integers(low, high, n, endpoint=True))
    return torch.from_numpy(values).unsqueeze(1)


@given(n=SIDES, d=LENGTHS, seed=SEEDS, dtype=TYPES)
def test_scale_and_sign_of_a_vector_do_not_matter(fold: Fold, n: int, d: int, seed: int, dtype: torch.dtype) -> None:
    x = gaussian((1, n, d), seed, dtype).clamp(-16, 16)
    x = torch.where(x.abs() < 2**-6, 0.5, x.double()).to(dtype)  # no entry leaves the range of float16
    factor = scales(n, seed, *SCALES[dtype])
    scaled = (wide(x) * factor).to(dtype)
    assert torch.equal(wide(scaled), wide(x) * factor)
    got = fold(scaled, want=ALL)
    assert_record(got, scaled, rival_x=(wide(x) * factor.sign()).to(dtype))
    plain = fold(x, want=ALL)
    assert torch.equal(got.pairs, plain.pairs)
    np.testing.assert_allclose(field(got, "abs_sum"), field(plain, "abs_sum"), rtol=0, atol=1e-6 * n * n)


@given(n=SIDES, d=LENGTHS, seed=SEEDS, dtype=TYPES)
def test_order_of_vectors_does_not_matter(fold: Fold, n: int, d: int, seed: int, dtype: torch.dtype) -> None:
    x = gaussian((1, n, d), seed, dtype)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    left, right = fold(x, want=ALL), fold(x[:, order], want=ALL)
    floor = 2 * tolerance.FLOOR[tolerance.compute_dtype(x)] * 4
    for name in ("abs_sum", "sq_sum", "sum"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=0, atol=floor * n * n, err_msg=name)
    np.testing.assert_allclose(field(left)[:, order], field(right), rtol=0, atol=floor * n)
    np.testing.assert_allclose(field(left, "abs_max"), field(right, "abs_max"), rtol=0, atol=floor)


@given(n=SIDES, d=LENGTHS, seed=SEEDS)
def test_rotation_does_not_matter(fold: Fold, n: int, d: int, seed: int) -> None:
    x = gaussian((1, n, d), seed, torch.float64)
    rotation = torch.linalg.qr(gaussian((d, d), seed + 1, torch.float64)).Q
    rotated = (x @ rotation).float()
    left, right = fold(x.float(), want=ALL), fold(rotated, want=ALL)
    # float32 rounding of the rotated entries moves a cosine by about an ulp
    for name in ("abs_sum", "sq_sum", "sum"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=0, atol=1e-6 * n * n, err_msg=name)
    np.testing.assert_allclose(field(left, "abs_max"), field(right, "abs_max"), rtol=0, atol=2e-6)
    assert_record(right, rotated)


@given(n=st.integers(2, 90), d=LENGTHS, cut=st.floats(0, 1), seed=SEEDS, dtype=TYPES, zeros=st.booleans())
def test_blocks_and_cross_are_the_whole(
    fold: Fold, n: int, d: int, cut: float, seed: int, dtype: torch.dtype, zeros: bool
) -> None:
    x = gaussian((2, n, d), seed, dtype)
    if zeros:
        x[:, [0, n // 2]] = 0
    k = round(cut * n)
    above, below = x[:, :k], x[:, k:]
    options = {"want": ALL, "bins": 4}
    parts = [fold(above, **options), fold(below, **options), fold(above, below, **options)]
    joined = merge(parts, [(0, 0), (k, k), (0, k)])
    whole = fold(x, **options)
    assert torch.equal(joined.pairs, whole.pairs)
    assert torch.equal(joined.zero, whole.zero)
    assert not joined.cross
    joined.norm_sq, joined.row_abs = whole.norm_sq, whole.row_abs  # per-vector fields are not carried over
    assert_record(joined, x)
    rows = torch.cat([field(parts[0]) + field(parts[2]), field(parts[1]) + field(parts[2], "row_abs_y")], 1)
    np.testing.assert_allclose(rows, field(whole), rtol=0, atol=1e-6 * n)
    assert joined.hist is not None
    assert torch.equal(joined.hist.sum(1), whole.pairs)


@given(n=SIDES, m=SIDES, d=LENGTHS, seed=SEEDS)
def test_cross_fold_is_symmetric(fold: Fold, n: int, m: int, d: int, seed: int) -> None:
    x, y = gaussian((1, n, d), seed), gaussian((1, m, d), seed + 1)
    left, right = fold(x, y, want=ALL), fold(y, x, want=ALL)
    np.testing.assert_allclose(field(left, "sum"), field(right, "sum"), rtol=0, atol=1e-6 * n * m)
    np.testing.assert_allclose(field(left), field(right, "row_abs_y"), rtol=0, atol=1e-6 * m)
    np.testing.assert_allclose(field(left, "row_abs_y"), field(right), rtol=0, atol=1e-6 * n)
    assert left.norm_sq is not None
    assert right.norm_sq_y is not None
    np.testing.assert_allclose(left.norm_sq, right.norm_sq_y, rtol=1e-6)


@pytest.mark.parametrize(
    "case", [Case(97, 130), Case(49, 66, torch.bfloat16), Case(50, 257, torch.float8_e4m3fn)], ids=str
)
@pytest.mark.parametrize("layout", ["cols", "strided", "offset"])
def test_layout_does_not_change_a_bit(fold: Fold, case: Case, layout: str) -> None:
    laid_out = Case(case.n, case.d, case.dtype, layout).x()
    copy = laid_out.clone(memory_format=torch.contiguous_format)
    assert laid_out.stride() != copy.stride()
    assert torch.equal(wide(laid_out), wide(copy))
    left, right = fold(laid_out, want=ALL), fold(copy, want=ALL)
    for name in ("pairs", "zero", "nonfinite"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert_record(left, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=SHORT.get)
def test_items_of_a_batch_do_not_touch_each_other(fold: Fold, dtype: torch.dtype) -> None:
    x = gaussian((5, 49, 65), 0, dtype)
    whole = fold(x, want=ALL, bins=8)
    for item in range(5):
        alone = fold(x[item], want=ALL, bins=8)
        for name in (*ALL, "argmax", "hist", "pairs", "norm_sq"):
            assert torch.equal(getattr(whole, name)[item], getattr(alone, name)[0]), name


def test_merge_leaves_out_what_not_all_parts_carry() -> None:
    one = GramStats(
        torch.tensor([3]), torch.tensor([1]), torch.tensor([0]), abs_sum=torch.tensor([1.5]), sum=torch.tensor([0.5])
    )
    two = GramStats(torch.tensor([4]), torch.tensor([0]), torch.tensor([0]), abs_sum=torch.tensor([0.25]))
    joined = merge([one, two])
    assert (joined.pairs.item(), joined.zero.item(), joined.sum) == (7, 1, None)
    assert joined.abs_sum is not None
    assert joined.abs_sum.item() == 1.75


def test_merge_of_maxima_shifts_the_pair_that_wins(fold: Fold) -> None:
    x = gaussian((2, 60, 40), 0)
    x[0, 57] = -x[0, 33]  # in the second block of item 0, across the blocks of item 1
    x[1, 57] = 3 * x[1, 2]
    parts = [
        fold(x[:, :20], want="abs_max"),
        fold(x[:, 20:], want="abs_max"),
        fold(x[:, :20], x[:, 20:], want="abs_max"),
    ]
    joined = merge(parts, [(0, 0), (20, 20), (0, 20)])
    assert joined.argmax is not None
    assert joined.argmax.tolist() == [[33, 57], [2, 57]]


def test_merge_keeps_nan_in_its_item(fold: Fold) -> None:
    x = gaussian((2, 20, 8), 0)
    x[1, 3, 3] = float("nan")
    parts = [fold(x[:, :9], want=ALL), fold(x[:, 9:], want=ALL), fold(x[:, :9], x[:, 9:], want=ALL)]
    joined = merge(parts, [(0, 0), (9, 9), (0, 9)])
    joined.norm_sq = fold(x, want=()).norm_sq
    assert_record(joined, x, truth=truth_of(x))


@pytest.mark.parametrize(
    ("records", "offsets", "message"),
    [
        ([], None, "at least one record"),
        ([1, 2], None, "same items"),
        ([1, 1], [(0, 0)], r"one offset per record \(2\), got 1"),
    ],
    ids=["nothing", "items-differ", "offsets-missing"],
)
def test_merge_refuses(records: list[int], offsets: list[tuple[int, int]] | None, message: str) -> None:
    counts = [torch.zeros(b, dtype=torch.int64) for b in records]
    made = [GramStats(count, count, count) for count in counts]
    with pytest.raises(InputError, match=message):
        merge(made, offsets)


def test_merging_one_record_changes_nothing(fold: Fold) -> None:
    record = fold(gaussian((2, 20, 8), 0), want=ALL, bins=5)
    joined = merge([record], [(0, 0)])
    joined.norm_sq, joined.row_abs = record.norm_sq, record.row_abs
    assert same_bits(joined, record)

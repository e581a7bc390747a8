"""What only the Triton backend has, run in the interpreter: tensor maps, slots in bands, decoded float8, kept tables.

Collected by ``test_interpreter.py`` in a process of its own; TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import (
    calls,
    dispatch,
    gram_stats,
    gram_stats_many,
    tiles,
    triton_gpu,
    triton_launch,
    triton_plan,
    triton_twins,
)
from orthofast.kernels.contract import make_request
from orthofast.kernels.tiles import Tile
from orthofast.kernels.triton_access import decoded
from tests.kernels.cases import ALL, SHORT, Case, assert_record, gaussian, same_bits

FLOAT8 = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2, torch.float8_e4m3fnuz: 3, torch.float8_e5m2fnuz: 4}
TINY = Tile(16, 16, 16, 4, 1)
WIDE = Tile(16, 32, 16, 4, 1)


@pytest.fixture(autouse=True)
def _fresh_memory_is_poisoned(poisoned_memory: None) -> Iterator[None]:
    """Plans are made anew around each test, for tests change the tables of tiles."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for cache in (triton_plan.plan, triton_plan.method_of, triton_twins.twins_of):
        cache.cache_clear()
    calls._known.clear()


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.TABLE, "interpreter", (TINY, TINY, WIDE))
    monkeypatch.setattr(tiles, "MEDIUM_SET", 16)
    monkeypatch.setattr(tiles, "SMALL_RATE", 10.0)


def folded(x: Tensor, y: Tensor | None = None, **options: object) -> object:
    return gram_stats(x, y, want=ALL, backend="triton_gpu", **options)  # type: ignore[arg-type]


@triton.jit
def _decode(stored, values, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 256)
    tl.store(values + places, decoded(tl.load(stored + places), FORMAT))


@pytest.mark.parametrize("dtype", FLOAT8, ids=SHORT.get)
def test_every_float8_is_decoded_as_torch_does(dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = torch.empty(256)
    _decode[(1,)](stored, values, FLOAT8[dtype])
    expected = stored.view(dtype).float()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


EDGES = [
    Case(n, d, torch.float16) for n, d in ((1, 1), (2, 15), (15, 16), (16, 17), (17, 1), (31, 17), (32, 16), (33, 15))
]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges_of_tiles(case: Case) -> None:
    x = case.x()
    assert_record(folded(x, bins=16), x, bins=16)  # type: ignore[arg-type]


MAPS = [
    Case(49, 40, torch.float16),
    Case(40, 24, torch.bfloat16, "cols"),
    Case(33, 16, torch.bfloat16, b=3),
    Case(40, 19, torch.float32, b=2),
    Case(40, 19, torch.float32, "cols"),
    Case(24, 16, torch.float16, b=2, m=40),
    Case(24, 17, torch.float8_e4m3fn, m=40),
]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("precision", ["auto", "high"])
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_tensor_maps_give_the_bits_of_pointers(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = case.x(), case.y()
    through_pointers = folded(x, y, precision=precision)
    made: list[object] = []
    maps = triton_launch.tensor_maps

    def noted(*args: object) -> tuple[object, ...]:
        made.append(maps(*args))  # type: ignore[arg-type]
        return made[-1]  # type: ignore[return-value]

    monkeypatch.setattr(triton_launch, "tensor_maps", noted)
    monkeypatch.setattr(tiles, "has_tensor_maps", lambda kind: True)
    monkeypatch.setattr(triton_plan, "ALONE_TILES", 1)
    triton_plan.plan.cache_clear()
    through_maps = folded(x, y, precision=precision)
    assert made[0][0] is not None  # type: ignore[index]
    assert same_bits(through_pointers, through_maps)  # type: ignore[arg-type]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("case", [Case(180, 8), Case(40, 16, b=4), Case(20, 8, m=290)], ids=str)
@pytest.mark.parametrize("precision", ["auto", "high"])
def test_slots_in_pieces_give_the_same_sums(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = case.x(), case.y()
    whole = folded(x, y, precision=precision)
    monkeypatch.setattr(tiles, "SLOT_BYTES", 1000)
    triton_plan.plan.cache_clear()
    shape = triton_plan.shape_of(make_request(x, y, want=ALL, precision=precision))
    (group,) = triton_plan.plan((shape,), x.device, "interpreter")
    assert len(group.pieces) > 1
    assert same_bits(whole, folded(x, y, precision=precision))  # type: ignore[arg-type]


def test_rounded_bfloat16_beyond_float32_is_folded_again() -> None:
    x = torch.ldexp(gaussian((1, 40, 64), 0), torch.tensor(110)).bfloat16()
    assert not bool((x.float() @ x.float().mT).isfinite().all())
    assert_record(folded(x), x, rival_x=torch.ldexp(x.float(), torch.tensor(-110)))  # type: ignore[arg-type]


def test_same_addresses_keep_their_tables_and_new_ones_are_seen() -> None:
    x = gaussian((1, 40, 16), 0, torch.float16)
    first = folded(x)
    shape = triton_plan.shape_of(make_request(x, want=ALL))
    (group,) = triton_plan.plan((shape,), x.device, "interpreter")
    kept = dict(group.placed)
    x.mul_(2)
    folded(x)
    assert {where: pair[0] is kept[where][0] for where, pair in group.placed.items()} == {(x.data_ptr(),): True}
    other = gaussian((1, 40, 16), 1, torch.float16)
    assert not same_bits(first, folded(other))  # type: ignore[arg-type]
    assert len(group.placed) == 2


def test_a_model_is_one_group_per_dtype_layout_and_tile() -> None:
    xs = [gaussian((n, 32), n, torch.float16) for n in (96, 200, 130, 96)]
    shapes = tuple(triton_plan.shape_of(make_request(x)) for x in xs)
    assert len(triton_plan.plan(shapes, xs[0].device, "interpreter")) == 1
    records = gram_stats_many([*xs, xs[0].T], want=ALL, backend="triton_gpu")
    for x, record in zip([*xs, xs[0].T], records, strict=True):
        assert_record(record, x.unsqueeze(0))


def test_the_interpreter_serves_cpu_tensors() -> None:
    assert dispatch.load("triton_gpu") is triton_gpu
    assert triton_gpu.supports(make_request(torch.ones(2, 2))) is None


@pytest.mark.usefixtures("tiny_tiles")
def test_nan_of_the_next_item_does_not_come_through_a_tensor_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "has_tensor_maps", lambda kind: True)
    monkeypatch.setattr(triton_plan, "ALONE_TILES", 1)
    x = gaussian((3, 19, 16), 0, torch.float16)
    x[1, 0] = float("nan")  # the ragged tile of item 0 ends on it
    assert_record(folded(x), x)  # type: ignore[arg-type]


@pytest.mark.usefixtures("tiny_tiles")
def test_the_first_of_equal_pairs_wins_across_bands_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "FINISH_BLOCK", 4)
    x = torch.ones(150, 4, dtype=torch.float16)
    record = gram_stats(x, want="abs_max", backend="triton_gpu")
    assert record.argmax is not None
    assert record.argmax.tolist() == [[0, 1]]


@pytest.mark.parametrize("direction", [1, -1], ids=["growing", "shrinking"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_lengths_whose_largest_entry_comes_late_or_early(dtype: torch.dtype, direction: int) -> None:
    x = gaussian((1, 10, 400), 0, dtype)
    powers = torch.arange(400) // 100 * 3 * direction  # less than a step of the row apart: all parts count
    x = torch.ldexp(x.double(), powers).to(dtype)
    assert_record(folded(x), x)  # type: ignore[arg-type]


def test_a_call_that_comes_again_is_neither_checked_nor_planned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(seed: int) -> list[Tensor]:
        shapes = (40, 32), (2, 24, 48), (24, 32), (0, 4)
        weights = [gaussian(shape, seed, torch.bfloat16) for shape in shapes]
        return [view for weight in weights for view in (weight, weight.mT)]

    later = model(2)
    expected = gram_stats_many(later, want=ALL, backend="triton_gpu")
    _forget()
    gram_stats_many(model(1), want=ALL, backend="triton_gpu")

    def refuse(*_: object) -> None:
        raise AssertionError("a call that comes again was planned again")

    for place, name in ((triton_gpu, "plan"), (triton_gpu, "shape_of"), (dispatch, "choose_each")):
        monkeypatch.setattr(place, name, refuse)
    assert len(calls._known) == 1
    for found, first in zip(gram_stats_many(later, want=ALL, backend="triton_gpu"), expected, strict=True):
        assert same_bits(found, first)


def test_a_call_that_differs_in_any_way_is_a_new_one() -> None:
    x = gaussian((24, 32), 1, torch.bfloat16)
    flat = torch.zeros(24 * 32 + 1, dtype=torch.bfloat16)
    shifted = flat[1:].view(24, 32).copy_(x)  # off the alignment
    again = [[x], [x.mT], [x.float()], [shifted], [x, x], [torch.nn.Parameter(x)], [x[None]]]
    for xs in again:
        for record, one in zip(gram_stats_many(xs, backend="triton_gpu"), xs, strict=True):
            assert same_bits(record, gram_stats(one, backend="triton_gpu"))
    known = len(calls._known)
    assert known == 6  # a parameter is described like its tensor
    with pytest.raises(InputError, match="meta"):
        gram_stats_many([x.to("meta")], backend="triton_gpu")
    gram_stats_many([x], backend="reference")
    gram_stats_many([x.double()], backend="triton_gpu")
    gram_stats_many([torch._neg_view(x)], backend="triton_gpu")
    assert len(calls._known) == known
    with pytest.raises(InputError, match="want"):
        gram_stats_many([x], want="abs_sun", backend="triton_gpu")


def test_the_oldest_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_CALLS", 2)
    for n in (4, 5, 6):
        gram_stats_many([gaussian((n, 8), n)], backend="triton_gpu")
    assert [shape for ((_, shape, *_),), _ in calls._known] == [(5, 8), (6, 8)]


def test_a_record_outlives_its_group_and_can_be_copied() -> None:
    x = gaussian((24, 32), 3)
    record, _ = gram_stats_many([x, x.mT], want=ALL, bins=8, backend="triton_gpu")
    whole = gram_stats(x, want=ALL, bins=8, backend="reference")
    for other in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record), copy.copy(record), replace(record)):
        assert same_bits(other, record)
        assert torch.equal(other.hist, whole.hist)
        assert other.norm_sq_y is None
        assert not other.cross
    assert "abs_sum" in repr(record)
    with pytest.raises(AttributeError, match="no field"):
        record.abs_total  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slice_of_a_device_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    xs = [gaussian((1, 100, 40), 1, dtype), gaussian((2, 30, 72), 2, dtype)]
    found = []
    for processors in (1, 3, 132):
        _forget()
        monkeypatch.setattr(triton_gpu, "_device", lambda _, processors=processors: ("interpreter", processors))
        found.append(gram_stats_many(xs, want=ALL, bins=8, backend="triton_gpu"))
    for other in found[1:]:
        assert all(same_bits(one, two) for one, two in zip(found[0], other, strict=True))


TWINS: dict[str, list[tuple[int, ...]]] = {
    "square": [(64, 64), (64, 64)],
    "ragged": [(37, 145), (145, 37), (2, 18, 72)],
    "aligned": [(40, 136), (3, 72, 24)],
    "tall": [(300, 2)],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_and_columns_are_measured_in_one_read(
    name: str, dtype: torch.dtype, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths to float32's last bits, from one read: no matrix is prepared a second time."""
    weights = [gaussian(shape, seed, dtype) for seed, shape in enumerate(TWINS[name])]
    weights[0].select(-2, 1).zero_()
    xs = weights + [weight.mT for weight in weights]
    apart = [gram_stats(x, normalize=normalize, want=ALL, backend="triton_gpu") for x in xs]
    monkeypatch.setattr(triton_launch._Run, "prepare", refused)
    for found, alone, x in zip(
        gram_stats_many(xs, normalize=normalize, want=ALL, backend="triton_gpu"), apart, xs, strict=True
    ):
        exact = x.double().square().sum(-1)
        assert torch.allclose(found.norm_sq, exact.view_as(found.norm_sq), rtol=2e-7, atol=0)
        assert torch.equal(found.zero, alone.zero)
        assert torch.equal(found.pairs, alone.pairs)
        assert torch.equal(found.argmax, alone.argmax)
        for field in ("abs_sum", "sq_sum", "row_abs", "abs_max"):
            assert torch.allclose(getattr(found, field), getattr(alone, field), rtol=1e-6, atol=1e-6)


def refused(*_: object, **__: object) -> None:
    raise AssertionError("read a second time")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
def test_wild_entries_are_measured_in_one_read_too(dtype: torch.dtype) -> None:
    """Entries at both ends of the type, NaN and Inf: as each side alone."""
    x = gaussian((48, 40), 1, dtype)
    x[3] *= torch.finfo(dtype).max / 16
    x[5] *= torch.finfo(dtype).tiny
    x[:, 7] *= torch.finfo(dtype).tiny
    broken = gaussian((33, 24), 2, dtype)
    broken[4, 5], broken[6, 7] = float("nan"), float("inf")
    xs = [x, x.mT, broken, broken.mT]
    for found, one in zip(gram_stats_many(xs, want=ALL, backend="triton_gpu"), xs, strict=True):
        alone = gram_stats(one, want=ALL, backend="triton_gpu")
        assert torch.equal(found.nonfinite, alone.nonfinite)
        exact = torch.where(one.isfinite(), one.double(), torch.nan).square().sum(-1)[None]
        for record in (found, alone):
            kept = torch.where(record.norm_sq.isfinite(), record.norm_sq, torch.nan)
            assert torch.allclose(kept, exact, rtol=4e-7, atol=0, equal_nan=True)
        assert torch.allclose(found.abs_sum, alone.abs_sum, rtol=1e-6, atol=0, equal_nan=True)


def test_matrices_that_only_look_alike_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian((24, 40), 1, torch.bfloat16), gaussian((24, 40), 2, torch.bfloat16)
    prepared = []
    plain = triton_launch._Run.prepare
    monkeypatch.setattr(triton_launch._Run, "prepare", lambda run, **o: (prepared.append(run), plain(run, **o)))
    for xs in ([a, b.mT], [a, b, a.mT], [a, a, b.mT, b.mT]):
        prepared.clear()
        for found, one in zip(gram_stats_many(xs, want=ALL, backend="triton_gpu"), xs, strict=True):
            assert same_bits(found, gram_stats(one, want=ALL, backend="triton_gpu"))
        assert prepared
    prepared.clear()
    for xs in ([a, a.mT, b, b.mT], [a, b, a.mT, b.mT], [a, b, b.mT, a.mT], [a.mT, a]):
        gram_stats_many(xs, backend="triton_gpu")
        assert not prepared

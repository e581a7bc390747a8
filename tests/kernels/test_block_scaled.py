"""Block-scaled float8 matrices fold like their float32 values: whole or by panels, rows or columns, all fields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import orthofast
from orthofast.errors import BackendError, InputError
from orthofast.kernels import Sample, block_scaled, gram_stats, gram_stats_many, mean_abs_cosine, mean_square_cosine
from orthofast.records import GramStats
from orthofast.views import BlockScaled
from tests.kernels.cases import ALL, assert_record, gaussian, same_bits

BLOCKS = [(128, 128), (32, 64), (5, 7)]
SHAPES = [(130, 140, BLOCKS[0]), (257, 130, BLOCKS[0]), (128, 256, BLOCKS[0])] + [
    (n, d, block) for n, d in ((1, 5), (2, 129), (70, 7), (97, 100), (0, 5), (5, 0)) for block in BLOCKS
]
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def weight(
    n: int,
    d: int,
    block: tuple[int, int] = (128, 128),
    b: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = FLOAT8[0],
) -> BlockScaled:
    """Gaussian values under factors spread over six decades, one of them negative."""
    front = () if b is None else (b,)
    data = gaussian((*front, n, d), seed, dtype)
    grid = (*front, -(-n // block[0]), -(-d // block[1]))
    scale = torch.exp(3 * gaussian(grid, seed + 1))
    if scale.numel():
        scale.view(-1)[0] *= -1
    return BlockScaled(data, scale, block)


def dense(x: BlockScaled) -> Tensor:
    """The values it stands for, by loops over the blocks."""
    values = x.data.to(torch.float32).clone()
    rows, columns = x.block
    for i in range(x.scale.shape[-2]):
        for j in range(x.scale.shape[-1]):
            part = values[..., i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            part.mul_(x.scale[..., i, j, None, None])
    return values if values.dim() == 3 else values.unsqueeze(0)


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scaled, "PANEL_BYTES", 4 * 140 * 50)


@pytest.mark.parametrize(("n", "d", "block"), SHAPES)
def test_all_fields_are_those_of_the_values(n: int, d: int, block: tuple[int, int], backend: str) -> None:
    x = weight(n, d, block)
    assert_record(gram_stats(x, want=ALL, bins=16, backend=backend), dense(x), bins=16)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_float8_is_folded(dtype: torch.dtype) -> None:
    x = weight(70, 150, dtype=dtype)
    assert_record(gram_stats(x, want=ALL), dense(x))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("n", "d", "b"), [(130, 140, None), (90, 70, 3)])
@pytest.mark.usefixtures("small_panels")
def test_panels_give_the_same_record(n: int, d: int, b: int | None, block: tuple[int, int], backend: str) -> None:
    x = weight(n, d, block, b)
    assert_record(gram_stats(x, want=ALL, bins=16, backend=backend), dense(x), bins=16)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("m", [1, 64, 201])
def test_panels_of_a_cross_fold_give_the_same_record(m: int) -> None:
    x, y = weight(130, 140), weight(m, 140, (32, 64), seed=5)
    x.data[3] = 0
    y.data[0] = 0
    assert_record(gram_stats(x, y, want=ALL, bins=16), dense(x), dense(y), bins=16)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("at", [0, 129])
def test_zero_and_nan_are_counted_once_over_panels(at: int) -> None:
    x = weight(130, 140, b=2)
    x.data[0, [at, 60]] = 0
    x.data[1, at, 1] = float("nan")
    got = gram_stats(x, want=ALL, bins=16)
    assert got.zero.tolist() == [2, 0]
    assert got.nonfinite.tolist() == [0, 1]
    assert_record(got, dense(x))
    assert got.hist is not None
    assert got.hist.sum(1).tolist() == [128 * 127 // 2, 0]


@pytest.mark.usefixtures("small_panels")
def test_raw_products_go_by_panels_too() -> None:
    x = weight(130, 140)
    assert_record(gram_stats(x, want=ALL, normalize=False), dense(x), normalize=False)


def test_zero_factors_make_zero_vectors() -> None:
    x = weight(256, 256)
    x.scale[1] = 0
    got = gram_stats(x, want=ALL)
    assert got.zero.tolist() == [128]
    assert_record(got, dense(x))


def test_measures_take_rows_columns_and_heads() -> None:
    x = weight(256, 200)
    values = dense(x)[0]
    for vectors, heads in (("rows", None), ("cols", None), ("filters", None), ("heads", 2)):
        got = orthofast.pii(x, vectors=vectors, heads=heads)
        torch.testing.assert_close(got, orthofast.pii(values, vectors=vectors, heads=heads), rtol=1e-6, atol=0)
    assert orthofast.max_coherence(x).pair.tolist() == orthofast.max_coherence(values).pair.tolist()
    torch.testing.assert_close(orthofast.orthogonality_gap(x), orthofast.orthogonality_gap(values), rtol=1e-6, atol=0)


def test_columns_of_blocks_that_are_not_square_keep_their_factors() -> None:
    x = weight(100, 90, (16, 40))
    torch.testing.assert_close(orthofast.pii(x, vectors="cols"), orthofast.pii(dense(x)[0], vectors="cols"))


def test_the_measures_that_need_a_tensor_dequantise_or_say_so() -> None:
    from orthofast.metrics import singular_value_gap

    x = weight(40, 50)
    torch.testing.assert_close(singular_value_gap(x), singular_value_gap(dense(x)[0]))
    with pytest.raises(AttributeError, match=r"no matmul; pass its \.dequantized\(\)"):
        _ = x.matmul


def test_a_sample_of_it_is_the_sample_of_its_values() -> None:
    x = weight(200, 60)
    got, same = (gram_stats(v, sample=Sample(5000, 3)) for v in (x, dense(x)))
    assert same_bits(got, same)


def test_many_at_once_mix_with_plain_tensors() -> None:
    x, plain = weight(20, 30), gaussian((12, 9), 4)
    records = gram_stats_many([x, plain])
    assert_record(records[0], dense(x))
    assert_record(records[1], plain.unsqueeze(0))


def test_means_have_no_gradient_and_the_same_value() -> None:
    x = weight(50, 60)
    for mean in (mean_abs_cosine, mean_square_cosine):
        torch.testing.assert_close(mean(x), mean(dense(x)), rtol=1e-6, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda x: gram_stats(x, dense(x)), "BlockScaled"),
        (lambda x: gram_stats(dense(x), x), "BlockScaled"),
        (lambda x: gram_stats(x, weight(9, 31)), "y needs shape"),
        (lambda x: gram_stats(x, want="mean"), "want"),
        (lambda x: gram_stats(x, bins=-1), "bins"),
        (lambda x: gram_stats(x, precision="low"), "precision"),
        (lambda x: gram_stats(x, want="row_abs", sample=9), "row_abs"),
    ],
    ids=["plain-y", "plain-x", "lengths", "want", "bins", "precision", "sample"],
)
def test_bad_arguments_get_a_sentence(call: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call(weight(10, 30))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="warp9"):
        gram_stats(weight(4, 5), backend="warp9")


def test_a_backend_with_a_kernel_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthofast.kernels import reference

    x = weight(10, 30)
    answer = gram_stats(x, backend="reference")
    seen: list[tuple[int, ...]] = []

    def own(left: BlockScaled, right: BlockScaled | None, request: Any) -> GramStats:
        seen.append(tuple(left.shape))
        return answer

    monkeypatch.setattr(reference, "block_scaled_problem", lambda *_: None, raising=False)
    monkeypatch.setattr(reference, "block_scaled_gram_stats", own, raising=False)
    assert gram_stats(x, backend="reference") is answer
    assert seen == [(1, 10, 30)]
    monkeypatch.setattr(reference, "block_scaled_problem", lambda *_: "not this one")
    assert gram_stats(x, backend="reference") is not answer

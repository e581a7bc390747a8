"""Second moments: sums of outer products in any order, dtype and layout, against float64; what they can resolve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics.spectra import condition_number
from orthofast.training.covariance import DiagonalMoment, SecondMoment, TriangularFactor, sum_dtype
from orthofast.training.factors import Factors, LayerFactors
from orthofast.training.patches import PatchMoment

KINDS = (SecondMoment, TriangularFactor)
# one unit of a float32 sum; bfloat16 rows are exact operands
FLOOR = {torch.float32: 3e-7, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def layouts(rows: Tensor) -> dict[str, Tensor]:
    wide = torch.zeros(len(rows), 2 * rows.shape[1], dtype=rows.dtype)
    wide[:, ::2] = rows
    return {"rows": rows, "columns": rows.T.contiguous().T, "strided": wide[:, ::2], "reversed": rows.flip(0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
def test_sums_are_those_of_float64_whatever_the_layout(kind: Any, dtype: torch.dtype, sums: torch.dtype) -> None:
    rows = torch.randn(37, 11).to(dtype)
    wide = rows.double()
    truth = wide.T @ wide / 37
    floor = max(FLOOR[sums], FLOOR[torch.float32] if kind is TriangularFactor and sums == torch.float32 else 0)
    for layout in layouts(rows).values():
        moment = kind(11, dtype=sums)
        moment.update(layout[:20])
        moment.update(layout[20:])
        assert (moment.n, moment.count) == (37, 37)
        found = moment.compute()
        assert torch.equal(found, found.T) or kind is TriangularFactor
        torch.testing.assert_close(found, truth, rtol=0, atol=20 * floor * float(truth.max()))
        true = torch.linalg.eigvalsh(truth).flip(0)
        torch.testing.assert_close(moment.spectrum(), true, rtol=0, atol=20 * floor * float(true[0]))


@given(d=some.integers(1, 9), n=some.lists(some.integers(0, 12), max_size=4), seed=some.integers(0, 99))
@settings(max_examples=25)
def test_any_cut_into_batches_merges_and_packs_to_the_same(d: int, n: list[int], seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, d, generator=made, dtype=torch.float64) for count in n]
    whole = SecondMoment(d)
    whole.update(torch.cat([*parts, torch.zeros(0, d, dtype=torch.float64)]))
    for kind in KINDS:
        joined, summed = kind(d), None
        for part in parts:
            other = kind(d)
            other.update(part)
            joined.merge(other)
            packed = other.packed()
            summed = packed if summed is None else summed + packed
        torch.testing.assert_close(joined.compute(), whole.compute(), rtol=1e-12, atol=1e-13, equal_nan=True)
        assert joined.n == whole.n == sum(n)
        if kind is SecondMoment and summed is not None:
            other = SecondMoment(d)
            other.unpack(summed)
            torch.testing.assert_close(other.compute(), whole.compute(), rtol=1e-12, atol=1e-13, equal_nan=True)
            assert other.n == whole.n


@pytest.mark.parametrize("kind", KINDS)
def test_decay_weighs_the_past_and_reset_forgets_it(kind: Any) -> None:
    old, new = torch.randn(6, 4).double(), torch.randn(5, 4).double()
    moment = kind(4)
    moment.update(old)
    moment.decay(0.25)
    moment.update(new, weight=2.0)
    truth = (0.25 * old.T @ old + 2 * new.T @ new) / (0.25 * 6 + 2 * 5)
    torch.testing.assert_close(moment.compute(), truth, rtol=1e-12, atol=1e-14)
    moment.reset()
    assert moment.n == 0
    assert bool(moment.compute().isnan().all())
    moment.update(new, count=1.0)
    torch.testing.assert_close(moment.compute(), new.T @ new, rtol=1e-12, atol=1e-14)


def test_centred_moments_are_covariances() -> None:
    rows = torch.randn(50, 5).double() + 100
    moment = SecondMoment(5, centered=True)
    for part in rows.split(17):
        moment.update(part)
    torch.testing.assert_close(moment.compute(), torch.cov(rows.T, correction=0), rtol=0, atol=1e-10)
    other = SecondMoment(5, centered=True)
    other.unpack(moment.packed())
    assert torch.equal(other.compute(), moment.compute())


def ill_conditioned(d: int, n: int) -> tuple[Tensor, Tensor]:
    """float32 rows whose covariance has eigenvalues from 1 to 1e-10, and those of the very rows."""
    made = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, -5, d, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=made, dtype=torch.float64)).Q
    rows = ((torch.randn(n, d, generator=made, dtype=torch.float64) * scales) @ turn).float()
    return rows, torch.linalg.svdvals(rows.double()).square() / n


def test_small_eigenvalues_survive_float64_sums_and_qr_and_are_called_unresolved_otherwise() -> None:
    rows, truth = ill_conditioned(24, 400)
    kappas = {}
    for name, moment in {
        "float64": SecondMoment(24),
        "qr": TriangularFactor(24, dtype=torch.float32),
        "float32": SecondMoment(24, dtype=torch.float32),
    }.items():
        for part in rows.split(100):
            moment.update(part)
        kappas[name] = condition_number(moment.spectrum(), 1.0, tol=moment.tol)
    true = float(truth[0] / truth[-1])
    assert float(kappas["float64"].value) == pytest.approx(true, rel=1e-3)
    assert float(kappas["qr"].value) == pytest.approx(true, rel=0.02)
    assert not bool(kappas["float64"].is_lower_bound | kappas["qr"].is_lower_bound)
    # no digit of the smallest is left in float32 sums: a bound, and one that holds
    assert bool(kappas["float32"].is_lower_bound)
    assert 1 <= float(kappas["float32"].value) <= true
    assert int(kappas["float32"].resolved_rank) < 24


def test_sums_are_wide_where_it_pays() -> None:
    host, device = torch.device("cpu"), torch.device("cuda")
    assert sum_dtype(2048, host) == torch.float64
    assert sum_dtype(2049, host) == torch.float32
    assert sum_dtype(10, device) == torch.float32
    assert sum_dtype(4096, device, "float64") == torch.float64
    assert sum_dtype(10, host, "float32") == torch.float32
    assert sum_dtype(10, host, "float32", centered=True) == torch.float64


def test_one_hot_rows_are_counted() -> None:
    moment = DiagonalMoment(5)
    moment.update(torch.tensor([0, 3, 3]))
    moment.update(torch.tensor([1]))
    assert moment.compute().tolist() == [0.25, 0.25, 0, 0.5, 0]
    assert moment.spectrum().tolist() == [0.5, 0.25, 0.25, 0, 0]
    again = DiagonalMoment(5)
    again.unpack(moment.packed() + moment.packed())
    assert (again.n, again.spectrum().tolist()) == (8, moment.spectrum().tolist())


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((8, 9), (3, 3)), ((7, 6), (2, 4)), ((7,), (3,)), ((6, 5), (1, 3)), ((6, 5), (3, 1)), ((5, 5), (5, 5))],
)
@pytest.mark.parametrize("images", [1, 5])
def test_patches_are_measured_without_unfolding_them(
    size: tuple[int, ...], kernel: tuple[int, ...], images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthofast.training.patches.BUFFER", 1000)  # some images at a time
    x = torch.randn(images, 4, *size, dtype=torch.float64)
    moment = PatchMoment(4, kernel)
    moment.add_images(x[:0])
    assert moment.compute().isnan().all()
    for part in x.split(3):
        moment.add_images(part)
    flat = x if len(kernel) == 2 else x[:, :, None]
    patches = nn.functional.unfold(flat, kernel if len(kernel) == 2 else (1, *kernel)).movedim(1, 0).flatten(1)
    truth = patches @ patches.T / patches.shape[1]
    assert moment.n == patches.shape[1]
    torch.testing.assert_close(moment.compute(), truth, rtol=0, atol=1e-13)
    packed = moment.packed()
    moment.add_images(x)
    moment.unpack(packed)
    torch.testing.assert_close(moment.compute(), truth, rtol=0, atol=1e-13)


CONVOLUTIONS = {
    "same": nn.Conv2d(8, 6, 3, padding="same"),
    "padded": nn.Conv2d(9, 6, (3, 2), padding=(2, 1)),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(8, 6, 3, dilation=2, padding="same"),
    "circular": nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
    "pointwise": nn.Conv2d(8, 6, 1),
    "grouped": nn.Conv2d(16, 6, 3, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6, padding=1),
    "line": nn.Conv1d(8, 6, 3, padding=1),
    "line strided": nn.Conv1d(4, 6, 3, stride=2),
    "volume": nn.Conv3d(2, 6, (2, 3, 2), padding=(1, 0, 1)),
}


@pytest.mark.parametrize("how", [Factors(), Factors(sharing="reduce"), Factors(method="qr"), Factors(centered=True)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_of_every_convolution_are_what_its_filters_see(name: str, how: Factors) -> None:
    """A patch is found as the gradient of an output with respect to the filter that made it."""
    module = CONVOLUTIONS[name].double()
    size = {1: (7,), 2: (5, 6), 3: (3, 4, 3)}[len(module.kernel_size)]
    x = torch.randn(2, module.in_channels, *size, dtype=torch.float64)
    layer = LayerFactors("", module, how, x.device)
    layer.add_inputs(x)
    out = module(x)
    groups, each = module.groups, module.out_channels // module.groups
    rows = [
        torch.autograd.grad(value, module.weight, retain_graph=True)[0][group * each].flatten()
        for image in out
        for group in range(groups)
        for value in image[group * each].flatten()
    ]
    patches = torch.stack(rows)  # (images groups positions, d_in)
    positions = out[0, 0].numel()
    if how.sharing == "reduce":
        patches = patches.view(2 * groups, positions, -1).mean(1)
    truth = torch.cov(patches.T, correction=0) if how.centered else patches.T @ patches / len(patches)
    torch.testing.assert_close(layer.x.compute(), truth, rtol=0, atol=1e-12)
    assert layer.x.n == len(patches)

    g = torch.randn_like(out)
    layer.add_gradient(g, scale=2.0)
    layer.add_terms(2)
    flat = g.flatten(2).view(2, groups, each, positions).transpose(2, 3)  # (images, groups, positions, each)
    flat = (flat.sum(2) if how.sharing == "reduce" else flat).reshape(-1, each)
    if not how.centered:
        torch.testing.assert_close(layer.g.compute(), 2 * flat.T @ flat / groups / 2, rtol=0, atol=1e-12)


def test_pixels_are_channels_of_positions() -> None:
    module = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    layer = LayerFactors("", module, Factors(conv="pixels"), x.device)
    layer.add_inputs(x)
    rows = x.double().movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(layer.x.compute(), rows.T @ rows / len(rows), rtol=0, atol=1e-6)
    assert layer.positions == 25


def test_convolutions_draw_rows_without_bias() -> None:
    module = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(8, 4, 12, 12)
    whole, some_rows = (LayerFactors("", module, Factors(rows_per_batch=rows), x.device) for rows in (None, 400))
    whole.add_inputs(x)
    whole.add_gradient(x)
    for _ in range(30):
        some_rows.add_inputs(x)
        some_rows.add_gradient(x, scale=1 / 30)
    assert 11000 < some_rows.x.n < 13000
    torch.testing.assert_close(some_rows.x.compute(), whole.x.compute(), rtol=0, atol=0.1)
    whole.add_terms(1)
    some_rows.add_terms(1)
    torch.testing.assert_close(some_rows.g.spectrum(), whole.g.spectrum(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: SecondMoment(0), "d needs a positive integer"),
        (lambda: SecondMoment(3, dtype=torch.float16), "dtype needs float32 or float64"),
        (lambda: SecondMoment(3).update(torch.ones(2, 4)), r"needs a floating-point tensor \(N, 3\)"),
        (lambda: SecondMoment(3).update(torch.ones(2, 3, dtype=torch.long)), "rows needs"),
        (lambda: SecondMoment(3).decay(2.0), "factor needs a number from 0 to 1"),
        (lambda: SecondMoment(3).merge(SecondMoment(4)), "merge needs a SecondMoment of rows of length 3"),
        (lambda: TriangularFactor(3).merge(SecondMoment(3)), "merge needs a TriangularFactor"),
        (lambda: TriangularFactor(3, centered=True), "keeps no mean"),
        (lambda: SecondMoment(3, device="meta").update(torch.ones(2, 3)), "where the sums are"),
    ],
)
def test_what_cannot_be_used_is_said(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


def test_nan_rows_give_nan_spectra() -> None:
    for kind in KINDS:
        moment = kind(3)
        moment.update(torch.full((4, 3), float("nan")))
        assert bool(moment.spectrum().isnan().all())

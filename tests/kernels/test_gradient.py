"""Gradients of means over pairs are right: each backend against float64 matrices, over shapes, dtypes, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orthofast.kernels import Sample, dispatch, gradients, mean_abs_cosine, mean_square_cosine
from orthofast.kernels.autograd import pair_mean
from orthofast.kernels.contract import make_request
from orthofast.kernels.gradients import ABS, Curve
from tests import tolerance
from tests.kernels.cases import SHORT, Case, gaussian, wide
from tests.kernels.gradient_truth import assert_gradient, gradient_truth, naive_gradients

Mean = Callable[..., Tensor]
CURVES = {
    "abs": ABS,
    "huber": Curve("huber", 0.1),
    "sqrt": Curve("sqrt", 0.05),
    "square": Curve("square"),
}
# edges of 8 rows, panels of 8 to 48 vectors, blocks of 288 and 512 vectors; an even and an odd number of blocks
SHAPES = [
    *(Case(n, 33) for n in (2, 3, 7, 8, 9, 47, 48, 49, 95, 97, 287, 288, 289, 300, 577)),
    *(Case(50, d) for d in (1, 2, 15, 16, 17, 47, 48, 49, 95, 97, 255, 257, 300, 513)),
    Case(865, 40),
    Case(1025, 50),
    Case(97, 130, b=3),
    Case(2, 96, b=5),
]
TYPES = [
    Case(n, d, dtype, layout, b)
    for dtype in (torch.float64, torch.float16, torch.bfloat16)
    for n, d, b in ((63, 100, 1), (50, 57, 2))
    for layout in ("rows", "cols", "strided", "offset")
] + [Case(290, 64, layout=layout) for layout in ("cols", "strided", "gapped", "offset")]
CROSSES = [
    *(Case(n, 33, m=m) for n, m in ((1, 1), (2, 385), (385, 2), (47, 49), (96, 289), (600, 290))),
    *(Case(40, d, m=30) for d in (1, 47, 48, 257)),
    *(Case(40, 65, dtype, "cols", 2, m=51) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
]


@pytest.fixture(scope="module")
def mean(backend: str) -> Mean:
    """``pair_mean`` on the backend under test."""

    def call(x: Tensor, y: Tensor | None = None, curve: Curve = ABS, **options: Any) -> Tensor:
        return pair_mean(x, y, curve, backend=backend, **options)

    return call


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def check(mean: Mean, x: Tensor, y: Tensor | None, curve: Curve) -> None:
    """Mean and gradients of (b, n, d) against the truth of every item."""
    x, y = leaf(x), None if y is None else leaf(y)
    found = mean(x, y, curve)
    assert found.dtype == torch.float64
    weights = torch.linspace(0.5, 2, len(x), dtype=torch.float64)  # a gradient of its own for every item
    (found * weights).sum().backward()
    compute = tolerance.compute_dtype(x)
    floor, stored = tolerance.FLOOR[compute], torch.finfo(x.dtype).eps
    for item, weight in enumerate(weights.tolist()):
        one = wide(x[item].detach()).numpy()
        other = None if y is None else wide(y[item].detach()).numpy()
        truth = gradient_truth(one, other, curve)
        assert abs(found[item].item() - truth.mean) <= 4 * floor
        rivals = naive_gradients(x[item].to(compute), None if y is None else y[item].to(compute), curve)
        partners = 1.0 if y is None else 2.0 / max(1, min(len(one), y.shape[1]))
        for name, side, values, true, jump, rival in (
            ("dx", x, one, truth.dx, truth.jump_x, rivals[0]),
            ("dy", y, other, truth.dy, truth.jump_y, rivals[1]),
        ):
            if side is None or values is None or true is None or jump is None or rival is None:
                continue
            assert side.grad is not None
            assert side.grad.dtype == side.dtype
            assert side.grad.shape == side.shape
            got = side.grad[item].double().numpy() / weight
            size = np.linalg.norm(true, axis=1) * np.linalg.norm(values, axis=1)
            # the gradient is stored in 16 bits; a half has steps of 6e-8 near 0
            smallest = 6e-8 * len(true[0]) ** 0.5 * np.linalg.norm(values, axis=1) * (side.dtype == torch.float16)
            rounding = stored * size + smallest
            assert_gradient(name, got, true, rival, values, jump + rounding, partners, floor)


@pytest.mark.parametrize("case", [*SHAPES, *TYPES, *CROSSES], ids=str)
def test_matches_the_truth(mean: Mean, case: Case) -> None:
    check(mean, case.x(), case.y(), ABS)


@pytest.mark.parametrize("kind", ["huber", "sqrt", "square"])
@pytest.mark.parametrize(
    "case", [Case(49, 97), Case(300, 64, b=2), Case(63, 100, torch.float64), Case(97, 20, m=310)], ids=str
)
def test_other_curves_match_the_truth(mean: Mean, case: Case, kind: str) -> None:
    check(mean, case.x(), case.y(), CURVES[kind])


@pytest.mark.parametrize(
    "case",
    [Case(2, 1), Case(97, 48), Case(300, 7), Case(1200, 530), Case(200, 31, torch.float64, b=2), Case(90, 7, m=50)],
    ids=str,
)
def test_squares_of_many_short_vectors_match_the_truth(mean: Mean, case: Case) -> None:
    check(mean, case.x(), case.y(), CURVES["square"])


def test_squares_of_a_tight_frame_do_not_cancel(mean: Mean) -> None:
    bases = torch.cat([torch.linalg.qr(gaussian((32, 32), seed, torch.float64)).Q for seed in range(8)]).float()
    x = leaf(bases.unsqueeze(0))
    found = mean(x, None, CURVES["square"])
    assert abs(found.item() - (8 - 1) / (8 * 32 - 1)) < 1e-9  # the Welch bound
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max().item() < 1e-9  # a minimum


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("case", [Case(9, 5, torch.float64, b=2), Case(6, 4, torch.float64, m=7)], ids=str)
def test_gradcheck_away_from_the_kink(mean: Mean, case: Case, curve: Curve) -> None:
    y = case.y()
    sides = [leaf(case.x())] if y is None else [leaf(case.x()), leaf(y)]
    assert torch.autograd.gradcheck(lambda *sides: mean(sides[0], *sides[1:], curve=curve), sides)


@pytest.mark.parametrize("cross", [False, True], ids=["within", "cross"])
def test_gradcheck_of_a_sample(mean: Mean, cross: bool) -> None:
    sides = [leaf(gaussian((2, n, 4), n, torch.float64)) for n in ((40, 24) if cross else (40,))]

    def sampled(*sides: Tensor) -> Tensor:
        return mean(sides[0], *sides[1:], sample=Sample(600, 3))

    # along random directions: one by one, hundreds of elements take a minute
    assert torch.autograd.gradcheck(sampled, sides, fast_mode=True)


def test_a_sample_of_all_pairs_is_the_whole(mean: Mean) -> None:
    x, whole = leaf(gaussian((1, 30, 9), 0)), leaf(gaussian((1, 30, 9), 0))
    mean(x, sample=435).sum().backward()
    mean(whole).sum().backward()
    assert x.grad is not None
    assert whole.grad is not None
    assert torch.equal(x.grad, whole.grad)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_zero_vectors_get_no_gradient_and_change_none(mean: Mean, curve: Curve) -> None:
    full = gaussian((1, 60, 20), 0)
    x, rest = full.clone(), torch.cat([full[:, 1:30], full[:, 31:]], 1)
    x[0, [0, 30]] = 0
    check(mean, x, None, curve)
    x, rest = leaf(x), leaf(rest)
    mean(x, None, curve).sum().backward()
    mean(rest, None, curve).sum().backward()
    assert x.grad is not None
    assert rest.grad is not None
    assert not x.grad[0, [0, 30]].any()
    kept = torch.cat([x.grad[:, 1:30], x.grad[:, 31:]], 1)
    np.testing.assert_allclose(kept, rest.grad, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample", [None, 100])
def test_nan_in_one_item_stays_there(mean: Mean, bad: float, sample: int | None) -> None:
    x = gaussian((3, 60, 20), 0)
    x[1, 7, 7] = bad
    x = leaf(x)
    found = mean(x, sample=sample)
    assert found.isnan().tolist() == [False, True, False]
    found[[0, 2]].sum().backward(retain_graph=True)
    assert x.grad is not None
    assert bool(x.grad[[0, 2]].isfinite().all())
    assert bool(x.grad[1].isnan().all())


@pytest.mark.parametrize("shape", [(1, 0, 3), (2, 1, 3), (1, 4, 0), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_without_pairs_the_mean_is_nan_and_the_gradient_zero(
    mean: Mean, curve: Curve, shape: tuple[int, int, int]
) -> None:
    x = leaf(torch.ones(shape))
    found = mean(x, None, curve)
    assert bool(found.isnan().all())
    assert found.shape == (shape[0],)
    found.nansum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_parallel_vectors_have_mean_one_and_no_gradient(mean: Mean) -> None:
    row = gaussian((1, 1, 50), 0)
    x = leaf(row * torch.linspace(-3, 3, 70).view(1, -1, 1))
    found = mean(x)
    found.sum().backward()
    assert abs(found.item() - 1) < 1e-6
    assert x.grad is not None
    assert x.grad.abs().max().item() < 1e-6


def test_the_subgradient_of_orthogonal_vectors_is_zero(mean: Mean) -> None:
    x = leaf(torch.eye(70, 90).unsqueeze(0))
    mean(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=SHORT.get)
def test_lengths_only_divide_the_gradient(mean: Mean, size: float, dtype: torch.dtype) -> None:
    power = 2.0 ** round(np.log2(size))
    x, scaled = leaf(gaussian((1, 50, 30), 0, dtype)), leaf(gaussian((1, 50, 30), 0, dtype) * power)
    one, other = mean(x), mean(scaled)
    assert abs(one.item() - other.item()) < 1e-9
    one.sum().backward()
    other.sum().backward()
    assert x.grad is not None
    assert scaled.grad is not None
    np.testing.assert_allclose(scaled.grad.double() * power, x.grad.double(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", [1e-160, 1e160])
def test_lengths_beyond_the_square_root_of_the_range(mean: Mean, size: float) -> None:
    x = leaf(gaussian((1, 50, 30), 0, torch.float64) * size)
    mean(x).sum().backward()
    reference = leaf(gaussian((1, 50, 30), 0, torch.float64))
    mean(reference).sum().backward()
    assert x.grad is not None
    assert reference.grad is not None
    np.testing.assert_allclose(x.grad * size, reference.grad, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize(
    "case",
    [Case(900, 70), Case(590, 60, b=2), Case(700, 50, m=600), Case(64, 576, b=7), Case(3000, 60)],
    ids=str,
)
def test_the_same_bits_for_any_number_of_threads_and_run_to_run(mean: Mean, case: Case, curve: Curve) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        y = case.y()
        x, y = leaf(case.x()), None if y is None else leaf(y)
        found = mean(x, y, curve)
        found.sum().backward()
        assert x.grad is not None
        other = b"" if y is None or y.grad is None else y.grad.numpy().tobytes()
        results.append((found.detach().numpy().tobytes(), x.grad.numpy().tobytes(), other))
    assert len(set(results)) == 1


def test_items_of_a_batch_do_not_touch_each_other(mean: Mean) -> None:
    x = leaf(gaussian((4, 300, 65), 0))
    mean(x).sum().backward()
    assert x.grad is not None
    for item in range(4):
        alone = leaf(x.detach()[item])
        mean(alone).sum().backward()
        assert alone.grad is not None
        assert torch.equal(alone.grad, x.grad[item])


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("case", [Case(300, 64, b=2), Case(300, 40, m=97)], ids=str)
def test_the_value_is_the_same_without_a_gradient(mean: Mean, case: Case, curve: Curve) -> None:
    y = case.y()
    with_gradient = mean(leaf(case.x()), y, curve).detach()
    np.testing.assert_allclose(mean(case.x(), y, curve), with_gradient, rtol=1e-6)


def test_float64_is_asked_for_by_precision(mean: Mean) -> None:
    x = leaf(gaussian((1, 90, 70), 0))
    mean(x, precision="float64").sum().backward()
    truth = gradient_truth(wide(x.detach()[0]).numpy(), None, ABS)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad[0], truth.dx, rtol=1e-6, atol=1e-10)  # but for its rounding to float32


def test_the_public_means_are_these_curves(backend: str) -> None:
    x = gaussian((1, 20, 9), 0)
    for found, curve in (
        (mean_abs_cosine(x, backend=backend), ABS),
        (mean_abs_cosine(x, smooth="huber", width=0.1, backend=backend), CURVES["huber"]),
        (mean_abs_cosine(x, smooth="sqrt", width=0.05, backend=backend), CURVES["sqrt"]),
        (mean_square_cosine(x, backend=backend), CURVES["square"]),
    ):
        assert abs(found.item() - gradient_truth(wide(x[0]).numpy(), None, curve).mean) < 1e-6


def test_the_backend_named_makes_the_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = dispatch.load(backend)
    maker = module if hasattr(module, "abs_gradient") else gradients  # plain torch for who has none of its own
    made = maker.abs_gradient
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return made(*args, **kwargs)

    monkeypatch.setattr(maker, "abs_gradient", counted)
    pair_mean(leaf(torch.ones(1, 3, 4)), None, ABS, backend=backend).sum().backward()
    assert calls == [1]
    assert module.supports(make_request(torch.ones(1, 3, 4))) is None

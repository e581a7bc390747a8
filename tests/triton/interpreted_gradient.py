"""The Triton gradient of sums over pairs in the interpreter, against float64: edges, panels, dtypes, strides, faults.

Not collected by itself: ``test_gradient_kernel.py`` runs it in a process that starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from orthofast.kernels import mean_abs_cosine, tiles, triton_gpu, triton_gradient
from orthofast.kernels.contract import make_request
from orthofast.kernels.gradients import ABS, Curve, PairGradient
from tests import oracle
from tests.kernels.gradient_truth import gradient_truth, naive_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 3), (31, 32), (33, 33), (70, 40), (64, 64), (65, 1)]
CROSSES = [(1, 1, 5), (33, 40, 20), (70, 31, 33)]
PANELS = {"whole": triton_gradient.SLOPE_BYTES, "panels": 1000}  # one row of tiles at a time
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2.0**-11, torch.float16: 2.0**-11}  # of an entry of a unit vector


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_poisoned(poisoned_memory: None) -> None:
    """A slope, a partial or a padded entry that is not written shows as NaN."""


@pytest.fixture(params=list(PANELS))
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Slopes of a whole item at a time, and in panels of rows."""
    monkeypatch.setattr(triton_gradient, "SLOPE_BYTES", PANELS[request.param])
    return str(request.param)


def made_of(x: Tensor, y: Tensor | None = None, curve: Curve = ABS) -> PairGradient:
    request = make_request(x, y)
    assert triton_gradient.problem(request, curve) is None
    return triton_gpu.abs_gradient(request, curve)


def assert_right(x: Tensor, y: Tensor | None = None, curve: Curve = ABS) -> None:
    """Per vector, error times length within twice float32 autograd's worst, plus what rounding unit vectors costs.

    Rounding leaves each of the partners' unit vectors wrong by 2**-11 / sqrt(3) of its length at most, signs random.
    """
    found = made_of(x, y, curve)
    for item in range(len(x)):
        one, other = x[item], None if y is None else y[item]
        sides = [one, one if other is None else other]
        true = gradient_truth(one.double().numpy(), None if other is None else other.double().numpy(), curve)
        rivals = naive_gradients(one.float(), None if other is None else other.float(), curve)
        pairs = int(found.pairs[item])
        assert found.total[item].item() / max(pairs, 1) == pytest.approx(true.mean, abs=4e-7, nan_ok=True)
        for side, got, by, rival, partners, jump in (
            (sides[0], found.dx, true.dx, rivals[0], len(sides[-1]), true.jump_x),
            (sides[-1], found.dy, true.dy, rivals[1], len(sides[0]), true.jump_y),
        ):
            if got is None or by is None or rival is None or jump is None:
                continue
            lengths = np.sqrt(oracle.squared_lengths(side.double().numpy()))
            error = np.linalg.norm(got[item].double().numpy() / max(pairs, 1) - by, axis=1) * lengths
            allowed = np.max(np.linalg.norm(rival - by, axis=1) * lengths, initial=0.0)
            rounding = ROUNDING[x.dtype] * (math.sqrt(partners) if x.dtype != torch.float32 else partners)
            assert np.all(error <= 2 * allowed + rounding / max(pairs, 1) + jump)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_one_set(shape: tuple[int, int], dtype: torch.dtype, panels: str) -> None:
    assert_right(torch.randn(1, *shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CROSSES, ids=str)
def test_between_two_sets(shape: tuple[int, int, int], dtype: torch.dtype, panels: str) -> None:
    n, m, d = shape
    assert_right(torch.randn(2, n, d).to(dtype), torch.randn(2, m, d).to(dtype))


@pytest.mark.parametrize("curve", [Curve("huber", 0.1), Curve("sqrt", 0.05)], ids=lambda curve: curve.kind)
def test_smooth_curves_of_16_bits(curve: Curve, panels: str) -> None:
    assert_right(torch.randn(1, 40, 30).half(), curve=curve)
    assert_right(torch.randn(1, 33, 30).bfloat16(), torch.randn(1, 40, 30).bfloat16(), curve)


def test_strides_and_lengths_of_any_size(panels: str) -> None:
    x = torch.randn(1, 40, 24)
    expected = made_of(x)
    for other, factor in (
        (x.mT.contiguous().mT, 1.0),
        (torch.stack((x, x), 3)[..., 1], 1.0),
        (x * 2.0**-100, 2.0**-100),
        (x * 2.0**100, 2.0**100),
    ):
        found = made_of(other)
        assert found.dx is not None
        assert expected.dx is not None
        assert torch.equal(found.dx * factor, expected.dx)
        assert torch.equal(found.total, expected.total)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, at inf - inf
def test_zero_vectors_get_zero_and_bad_items_nan(panels: str) -> None:
    x, y = torch.randn(3, 35, 9), torch.randn(3, 40, 9)
    x[0, 3] = 0
    y[0, 36] = 0
    x[1, 2, 4] = math.nan
    y[2, 30, 1] = -math.inf
    alone, both = made_of(x), made_of(x, y)
    assert alone.pairs.tolist()[0] == 34 * 33 // 2
    assert both.pairs.tolist()[0] == 34 * 39
    assert alone.dx is not None
    assert both.dx is not None
    assert both.dy is not None
    assert not alone.dx[0, 3].any()
    assert not both.dy[0, 36].any()
    assert alone.dx.isnan().all((1, 2)).tolist() == alone.total.isnan().tolist() == [False, True, False]
    assert both.dx.isnan().all((1, 2)).tolist() == both.dy.isnan().all((1, 2)).tolist() == [False, True, True]
    assert not alone.dx[::2].isnan().any()
    assert_right(x[:1])
    assert_right(x[:1], y[:1])


def test_slopes_are_signs_with_an_empty_diagonal(panels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagonal drops out of the gradient; left there, its rounding would not."""
    x, held = torch.randn(1, 65, 20), []
    product = triton_gradient._product

    def watched(slopes: Tensor, halves: list[Tensor]) -> Tensor:
        held.append(slopes.clone())
        return product(slopes, halves)

    monkeypatch.setattr(triton_gradient, "_product", watched)
    made_of(x)
    assert len(held) == (1 if panels == "whole" else 3)
    cosines = x[0].double() @ x[0].double().T
    assert torch.equal(torch.cat(held, 1)[0].double(), cosines.sign().fill_diagonal_(0))


def test_elementwise_work_in_steps_moves_no_bit(panels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 33, 20), torch.randn(2, 40, 20)
    expected = made_of(x, y)
    monkeypatch.setattr(triton_gradient, "STEP_ELEMENTS", 32 * 7)
    found = made_of(x, y)
    assert expected.dx is not None
    assert expected.dy is not None
    assert found.dx is not None
    assert found.dy is not None
    assert torch.equal(found.dx, expected.dx)
    assert torch.equal(found.dy, expected.dy)


def test_orthogonal_vectors_have_no_gradient() -> None:
    found = made_of(torch.eye(40).unsqueeze(0))
    assert found.dx is not None
    assert not found.dx.any()
    assert found.total.item() == 0


@pytest.mark.parametrize("shape", [(0, 4, 3), (1, 0, 3), (1, 3, 0), (2, 1, 3)], ids=str)
def test_nothing_to_sum(shape: tuple[int, int, int]) -> None:
    found = made_of(torch.ones(shape))
    assert found.dx is not None
    assert found.dx.shape == shape
    assert not found.dx.any()
    assert not found.pairs.any()


def test_the_bits_do_not_depend_on_how_many_programs_share_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 100, 20)
    first = made_of(x)
    monkeypatch.setattr(tiles, "programs", lambda tile, entries, processors: entries)
    again = made_of(x)
    assert torch.equal(first.total, again.total)
    assert first.dx is not None
    assert again.dx is not None
    assert torch.equal(first.dx, again.dx)


def test_the_public_mean_takes_it() -> None:
    x = torch.randn(1, 40, 16, dtype=torch.float16, requires_grad=True)
    mean_abs_cosine(x, backend="triton_gpu").sum().backward()
    true = gradient_truth(x.detach()[0].double().numpy(), None, ABS).dx
    assert x.grad is not None
    assert np.allclose(x.grad[0].double().numpy(), true, atol=2e-3 * np.abs(true).max())


@pytest.mark.parametrize("x", [torch.ones(1, 3, 2, dtype=torch.float64), torch.ones(1, 3, 2)], ids=["float64", "curve"])
def test_what_16_bits_cannot_hold_goes_to_plain_torch(x: Tensor) -> None:
    request = make_request(x)
    assert triton_gradient.problem(request, Curve("huber", 0.1)) is not None
    assert triton_gpu.abs_gradient(request, Curve("huber", 0.1)).total.item() == pytest.approx(3 * 0.95)

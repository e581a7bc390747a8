"""The differentiable operator behaves as torch's own: checked, compiled, transformed, under autocast, through views."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import orthofast
from orthofast.errors import InputError
from orthofast.kernels import mean_abs_cosine, mean_square_cosine
from orthofast.kernels.autograd import needs_operator, pair_mean
from orthofast.kernels.gradients import Curve
from orthofast.metrics import mean_squared_cosine, pii
from tests.kernels.cases import gaussian

# torch's own: forward mode and its compiler still script
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def naive_pii(x: Tensor) -> Tensor:
    """(n, d) -> () through the whole matrix."""
    unit = nn.functional.normalize(x, dim=1)
    n = len(x)
    return (unit @ unit.T).abs().triu(1).sum() / (n * (n - 1) / 2)


@pytest.mark.parametrize("gradient", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("cross", [False, True], ids=["within", "cross"])
@pytest.mark.parametrize("requires", [True, False], ids=["graph", "plain"])
def test_the_operator_passes_opcheck(gradient: bool, cross: bool, requires: bool) -> None:
    x = gaussian((2, 20, 7), 0).requires_grad_(requires)
    y = gaussian((2, 5, 7), 1).requires_grad_(requires) if cross else None
    opcheck(torch.ops.orthofast.pair_mean.default, (x, y, "abs", 0.0, "auto", "", 0, 0, gradient))


def test_its_backward_passes_opcheck() -> None:
    made = (gaussian((2,), 0), gaussian((2, 3, 4), 1), gaussian((2, 3, 4), 2, torch.float16))
    opcheck(torch.ops.orthofast.pair_mean_backward.default, made)


def test_a_call_that_was_not_known_to_need_a_gradient_makes_it_in_backward() -> None:
    x, y = leaf(gaussian((2, 20, 7), 0)), leaf(gaussian((2, 9, 7), 1))
    both = []
    for gradient in (True, False):
        found, _, _ = torch.ops.orthofast.pair_mean(x, y, "huber", 0.1, "auto", "", 0, 0, gradient)
        both.append(torch.autograd.grad(found.sum(), (x, y)))
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("loss", [pii, mean_squared_cosine], ids=["pii", "mean_squared_cosine"])
def test_compiles_as_one_graph(compiler: str, loss: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    w = leaf(gaussian((20, 7), 0))

    def penalty(w: Tensor) -> Tensor:
        return 3 * loss(w * 2)

    compiled = torch.compile(penalty, fullgraph=True, backend=compiler)
    found, expected = compiled(w), penalty(w)
    assert abs(found.item() - expected.item()) < 1e-7
    (got,), (right,) = torch.autograd.grad(found, w), torch.autograd.grad(expected, w)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert abs(compiled(w).item() - expected.item()) < 1e-7


def test_a_compiled_module_with_every_view_of_its_weights() -> None:
    torch._dynamo.reset()
    conv = nn.Conv2d(6, 10, 3)

    def penalty() -> Tensor:
        w = conv.weight
        heads = pii(w, vectors="heads", heads=2).sum()
        return pii(w) + pii(w, vectors="cols") + pii(w, vectors="center_tap") + heads

    expected = torch.autograd.grad(penalty(), conv.weight)[0]
    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(), conv.weight)[0], expected)


@pytest.mark.parametrize("vectors", ["rows", "cols", "filters", "center_tap", "heads"])
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3), (12, 8, 3, 2)], ids=str)
def test_gradients_flow_through_every_view(vectors: str, shape: tuple[int, ...]) -> None:
    if vectors == "center_tap" and len(shape) == 2:
        with pytest.raises(InputError, match="center_tap"):
            pii(leaf(torch.ones(shape)), vectors=vectors)
        return
    heads = 3 if vectors == "heads" else None
    w, naive = leaf(gaussian(shape, 0)), leaf(gaussian(shape, 0).double())
    (pii(w, vectors=vectors, heads=heads) * torch.ones(())).sum().backward()
    if vectors == "heads":
        expected = sum(naive_pii(block.flatten(1)) for block in naive.chunk(3))
        assert isinstance(expected, Tensor)
    elif vectors == "cols":
        expected = naive_pii(naive.transpose(0, 1).flatten(1))
    elif vectors == "center_tap":
        tap: Tensor = naive
        for size in reversed(shape[2:]):
            tap = tap.select(-1, size // 2)
        expected = naive_pii(tap.T)
    else:
        expected = naive_pii(naive.flatten(1))
    expected.backward()
    assert w.grad is not None
    assert naive.grad is not None
    assert w.grad.shape == w.shape
    torch.testing.assert_close(w.grad.double(), naive.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_has_the_dtype_of_its_weight(dtype: torch.dtype) -> None:
    w = leaf(gaussian((12, 8), 0, dtype))
    pii(w).backward()
    assert w.grad is not None
    assert w.grad.dtype == dtype


def test_autocast_changes_nothing() -> None:
    results = []
    for enabled in (False, True):
        w = leaf(gaussian((600, 64), 0))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for backend in ("reference", None):
                pii(w, backend=backend).backward()
        assert w.grad is not None
        results.append(w.grad)
    assert torch.equal(*results)


def test_the_graph_is_used_and_freed_as_usual() -> None:
    w = leaf(gaussian((12, 8), 0))
    first = pii(w)
    first.backward(retain_graph=True)
    first.backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 2 * torch.autograd.grad(pii(w), w)[0])
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()


def test_one_set_with_itself_on_both_sides_adds_both_gradients() -> None:
    w = leaf(gaussian((1, 12, 8), 0, torch.float64))
    mean_abs_cosine(w, w).sum().backward()
    within = leaf(w.detach())
    mean_abs_cosine(within).sum().backward()
    assert w.grad is not None
    assert within.grad is not None
    torch.testing.assert_close(w.grad, within.grad * 11 / 12)  # 132 of 144 ordered pairs are of two vectors


def test_only_the_side_that_asks_gets_a_gradient() -> None:
    x, y = leaf(gaussian((1, 5, 8), 0)), gaussian((1, 6, 8), 1)
    mean_abs_cosine(x, y).sum().backward()
    mean_abs_cosine(y, x).sum().backward()
    assert x.grad is not None
    assert y.grad is None


def test_values_without_a_graph_stay_detached_and_take_the_short_way() -> None:
    w = leaf(gaussian((12, 8), 0))
    with torch.no_grad():
        assert not needs_operator(w)
        assert not pii(w).requires_grad
    assert not needs_operator(w.detach())
    assert not pii(w.detach()).requires_grad
    assert pii(w).requires_grad
    with torch.no_grad():
        assert torch.equal(mean_abs_cosine(w), pii(w).unsqueeze(0))


def test_func_grad_and_its_relatives() -> None:
    w = gaussian((4, 12, 8), 0)
    expected = torch.stack([torch.autograd.grad(pii(one), one)[0] for one in map(leaf, w)])
    torch.testing.assert_close(torch.func.grad(pii)(w[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(pii))(w), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.vmap(pii))(w).sum(1), expected)
    torch.testing.assert_close(torch.func.grad(lambda w: torch.func.vmap(pii)(w).sum())(w), expected)
    along = gaussian((12, 8), 1)
    for one in (w[0], leaf(w[0])):
        value, slope = torch.func.jvp(pii, (one,), (along,))[:2]
        assert abs(value.item() - pii(w[0]).item()) < 1e-7
        assert abs(slope.item() - (expected[0] * along).sum().item()) < 1e-6
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w[0], along)
        slope = torch.autograd.forward_ad.unpack_dual(pii(dual)).tangent
        assert abs(slope.item() - (expected[0] * along).sum().item()) < 1e-6


@pytest.mark.parametrize("dims", [0, 1, 2], ids=["first", "middle", "last"])
def test_vmap_over_any_dimension_and_over_one_side(dims: int) -> None:
    w, y = gaussian((4, 12, 8), 0), gaussian((1, 5, 8), 1)
    expected = torch.stack([pii(one) for one in w])
    torch.testing.assert_close(torch.func.vmap(pii, dims)(w.movedim(0, dims).contiguous()), expected)
    crossed = torch.func.vmap(lambda one: mean_abs_cosine(one.unsqueeze(0), y))(w)
    torch.testing.assert_close(crossed, mean_abs_cosine(w, y.expand(4, 5, 8)).unsqueeze(1))
    graph = leaf(w)
    torch.func.vmap(pii)(graph).sum().backward()
    assert graph.grad is not None
    torch.testing.assert_close(graph.grad[2], torch.func.grad(pii)(w[2]))


@pytest.mark.parametrize("loss", [pii, lambda w: pii(w).square()], ids=["linear", "squared"])
@pytest.mark.parametrize("mode", ["autograd", "func", "hessian"])
def test_a_second_derivative_is_refused_in_one_sentence(loss: Callable[[Tensor], Tensor], mode: str) -> None:
    w = leaf(gaussian((6, 4), 0))

    def twice() -> None:
        if mode == "autograd":
            (slope,) = torch.autograd.grad(loss(w) + w.square().sum(), w, create_graph=True)
            slope.square().sum().backward()
        elif mode == "func":
            torch.func.grad(lambda w: torch.func.grad(loss)(w).square().sum())(w.detach())
        else:
            torch.func.hessian(loss)(w.detach())

    with pytest.raises(InputError, match="no second derivative"):
        twice()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mean_abs_cosine(x, smooth="soft"), 'smooth needs None, "huber" or "sqrt"'),
        (lambda x: mean_abs_cosine(x, smooth="huber", width=0.0), "width needs a positive number"),
        (lambda x: mean_abs_cosine(x, smooth="sqrt", width=float("nan")), "width needs a positive number"),
        (lambda x: mean_abs_cosine(x, sample=0), "sample needs a positive number"),
        (lambda x: mean_abs_cosine(x, precision="best"), "precision needs one of"),
        (lambda x: mean_abs_cosine(cast(Tensor, [1.0])), r"x needs a torch\.Tensor"),
        (lambda x: mean_abs_cosine(x, cast(Tensor, [1.0])), r"y needs a torch\.Tensor"),
        (lambda x: mean_abs_cosine(x, torch.ones(2, 5)), r"y needs shape"),
        (lambda x: mean_abs_cosine(x, torch.ones(2, 4).double()), "y needs the dtype and device of x"),
        (lambda x: mean_abs_cosine(x[0]), "x needs shape"),
        (lambda x: mean_abs_cosine(x.long()), "x needs a floating-point dtype"),
        (lambda x: pair_mean(x, None, Curve("cube")), "a curve needs a kind"),
    ],
)
def test_what_cannot_be_used_is_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(torch.ones(3, 4))


def test_a_refused_backend_says_why() -> None:
    with pytest.raises(orthofast.OrthofastError, match="needs one of"):
        mean_square_cosine(torch.ones(3, 4), backend="abacus")


def test_a_step_along_the_gradient_lowers_the_mean() -> None:
    w = leaf(gaussian((64, 128), 0))
    optimizer = torch.optim.SGD([w], lr=500.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = pii(w)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 3

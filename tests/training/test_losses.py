"""Penalties: values of formulas written out, gradients of autograd through them, and what add_penalty_grad_ leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orthofast.errors import InputError
from orthofast.training import losses
from orthofast.training.conv_orthogonality import Geometry
from orthofast.training.layers import find_layers
from orthofast.training.srip import SRIP

DOUBLE = torch.float64
SHAPES = {"wide": (5, 9), "tall": (40, 6), "square": (7, 7), "pair": (2, 3)}


# the formulas as they are written, with n x n and d x d matrices, in float64 for autograd to differentiate
def cosines(w: Tensor) -> Tensor:
    units = w / w.norm(dim=1, keepdim=True)
    index = torch.triu_indices(len(w), len(w), 1)
    return (units @ units.T)[index[0], index[1]]


def residual(w: Tensor) -> Tensor:
    return w @ w.T - torch.eye(len(w), dtype=w.dtype)


def spectral(w: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(residual(w if len(w) <= w.shape[1] else w.T), 2)


NAIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_abs_cosine": lambda w: cosines(w).abs().mean(),
    "frame_potential": lambda w: cosines(w).square().mean(),
    "soft_orthogonality": lambda w: residual(w).square().sum(),
    "double_soft_orthogonality": lambda w: residual(w).square().sum() + residual(w.T).square().sum(),
    "mutual_coherence": lambda w: residual(w).abs().max(),
    "max_abs_cosine": lambda w: cosines(w).abs().max(),
}
LOSS: dict[str, Callable[..., Tensor]] = {
    "mean_abs_cosine": losses.pii_loss,
    "frame_potential": losses.frame_potential_loss,
    "soft_orthogonality": losses.soft_orthogonality_loss,
    "double_soft_orthogonality": lambda w, **options: losses.soft_orthogonality_loss(w, double=True, **options),
    "mutual_coherence": losses.mutual_coherence_loss,
    "max_abs_cosine": lambda w, **options: losses.mutual_coherence_loss(w, normalize=True, **options),
}
BOUND: dict[str, Callable[..., losses.OrthogonalityPenalty]] = {
    "mean_abs_cosine": losses.MeanAbsCosine,
    "frame_potential": losses.FramePotential,
    "soft_orthogonality": losses.SoftOrthogonality,
    "double_soft_orthogonality": lambda model, **options: losses.SoftOrthogonality(model, double=True, **options),
    "mutual_coherence": losses.MutualCoherence,
    "max_abs_cosine": lambda model, **options: losses.MutualCoherence(model, normalize=True, **options),
}
each = pytest.mark.parametrize("name", NAIVE)


def truth(naive: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The formula and its gradient, in float64."""
    w = weight.detach().double().requires_grad_()
    value = naive(w)
    (gradient,) = torch.autograd.grad(value, w)
    return value.detach(), gradient


def made(loss: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    w = weight.detach().clone().requires_grad_()
    value = loss(w)
    value.backward()
    assert w.grad is not None
    return value.detach(), w.grad


def assert_close(got: Tensor, expected: Tensor, bound: float) -> None:
    """Norm of the difference, relative to the norm."""
    error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= bound, f"relative error {error:.3g} is over {bound:.3g}"


@each
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_values_and_gradients_are_those_of_the_formula(
    name: str, shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    value, gradient = made(LOSS[name], weight)
    true_value, true_gradient = truth(NAIVE[name], weight)
    assert value.dtype == gradient.dtype == dtype
    assert_close(value, true_value, bound)
    assert_close(gradient, true_gradient, 4 * bound)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_exact_operands_and_get_gradients_of_their_dtype(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype)
    value, gradient = made(LOSS[name], weight)
    true_value, true_gradient = truth(NAIVE[name], weight)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(value, true_value, 1e-6)
    assert_close(gradient, true_gradient, torch.finfo(dtype).eps)


@each
def test_autocast_rounds_nothing(name: str) -> None:
    weight = torch.randn(6, 8)
    plain = LOSS[name](weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSS[name](weight), plain)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(5, 9)
    )


def expected_gradients(naive: Callable[[Tensor], Tensor], net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over the layers, written out, and autograd's gradients of it."""
    net = copy.deepcopy(net).double()
    whole = sum((naive(layer.vectors()[0]) for layer in find_layers(net).found), torch.zeros((), dtype=DOUBLE))
    whole.backward()
    return whole.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@each
def test_a_model_is_the_weighted_sum_of_its_layers_three_ways(name: str) -> None:
    weight = 0.25
    true_value, true_gradients = expected_gradients(NAIVE[name], model())

    def by_function(net: nn.Module) -> Tensor:
        value = LOSS[name](net, weight=weight)
        value.backward()
        return value.detach()

    def by_module(net: nn.Module) -> Tensor:
        value = BOUND[name](net, weight=weight)()
        value.backward()
        return value.detach()

    ways = {
        "function": by_function,
        "module": by_module,
        "module_grad": lambda net: BOUND[name](net, weight=weight).add_grad_(),
        "add_penalty_grad_": lambda net: losses.add_penalty_grad_(net, name, weight=weight),
    }
    for way, run in ways.items():
        net = model()
        value = run(net)
        assert_close(value, weight * true_value, 1e-6)
        gradients = {path: p.grad for path, p in net.named_parameters() if p.grad is not None}
        assert gradients.keys() == true_gradients.keys(), way
        for path, gradient in gradients.items():
            assert_close(gradient, weight * true_gradients[path], 4e-6)


def test_gradients_are_added_to_those_already_there_and_leave_no_graph() -> None:
    net = model()
    net[3](torch.randn(2, 8)).sum().backward()
    before = net[3].weight.grad.clone()
    value = losses.add_penalty_grad_(net, "soft_orthogonality", weight=2)
    assert not value.requires_grad
    assert all(p.grad is None or p.grad.grad_fn is None for p in net.parameters())
    _, gradient = truth(NAIVE["soft_orthogonality"], net[3].weight)
    assert_close(net[3].weight.grad - before, 2 * gradient, 4e-6)


def test_equal_layers_are_handled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(6, 4) for _ in range(5)), nn.Linear(6, 3))
    seen: list[tuple[int, ...]] = []
    original = losses.PENALTIES["soft_orthogonality"]

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        return original.gradient(x)

    monkeypatch.setitem(losses.PENALTIES, "soft_orthogonality", original._replace(gradient=gradient))
    losses.add_penalty_grad_(net, "soft_orthogonality")
    assert seen == [(5, 4, 6), (1, 3, 6)]
    for layer in net:
        _, expected = truth(NAIVE["soft_orthogonality"], layer.weight)
        assert_close(layer.weight.grad, expected, 4e-6)


def test_parts_of_one_parameter_and_bfloat16_gradients_land_where_they_belong() -> None:
    attention = nn.MultiheadAttention(8, 2).bfloat16()
    losses.add_penalty_grad_(attention, "frame_potential", weight=3)
    for part in range(3):
        rows = slice(8 * part, 8 * part + 8)
        _, expected = truth(NAIVE["frame_potential"], attention.in_proj_weight[rows])
        assert attention.in_proj_weight.grad is not None
        assert_close(attention.in_proj_weight.grad[rows], 3 * expected, 2**-7)


def test_frozen_and_tied_parameters() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    net[4].weight = net[3].weight
    losses.add_penalty_grad_(net)
    assert net[0].weight.grad is None
    _, once = truth(NAIVE["mean_abs_cosine"], net[3].weight)
    assert_close(net[3].weight.grad, once, 4e-6)


def toeplitz(kernel: Tensor, geometry: Geometry, extent: int) -> tuple[Tensor, int]:
    """The convolution as a matrix on circular images of that extent, and at how many places it is evaluated."""
    dims = kernel.dim() - 2
    channels = kernel.shape[1] * geometry.groups
    images = torch.eye(channels * extent**dims, dtype=kernel.dtype).view(-1, channels, *[extent] * dims)
    around = [
        side
        for size, gap in zip(reversed(kernel.shape[2:]), reversed(geometry.dilation), strict=True)
        for side in (0, (size - 1) * gap)
    ]
    convolve = getattr(nn.functional, f"conv{dims}d")
    out = convolve(
        nn.functional.pad(images, around, mode="circular"),
        kernel,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    return out.flatten(1).T, math.prod(out.shape[2:])


CONVOLUTIONS = {
    "1d": ((4, 3, 3), Geometry((1,), (1,)), 8),
    "1d_more_filters": ((6, 3, 3), Geometry((1,), (1,)), 8),
    "1d_stride": ((4, 3, 3), Geometry((2,), (1,)), 8),
    "1d_stride_and_dilation": ((4, 3, 5), Geometry((2,), (2,)), 18),
    "1d_stride_across_dilation": ((4, 3, 3), Geometry((2,), (3,)), 14),
    "1d_groups": ((6, 2, 3), Geometry((1,), (1,), 3), 8),
    "2d": ((4, 2, 3, 3), Geometry((1, 1), (1, 1)), 6),
    "2d_depthwise": ((4, 1, 2, 2), Geometry((1, 1), (1, 1), 4), 6),
    "2d_oblong": ((2, 3, 3, 2), Geometry((2, 1), (1, 1)), 6),
    "3d": ((3, 2, 2, 2, 2), Geometry((1, 1, 1), (1, 1, 1)), 4),
}


@pytest.mark.parametrize(("shape", "geometry", "extent"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolution_orthogonality_is_that_of_its_matrix(
    shape: tuple[int, ...], geometry: Geometry, extent: int
) -> None:
    kernel = torch.randn(shape, dtype=DOUBLE)

    def naive(k: Tensor) -> Tensor:
        matrix, places = toeplitz(k, geometry, extent)
        return residual(matrix).square().sum() / places

    value, gradient = made(lambda k: losses.conv_orthogonality_loss(k, geometry=geometry), kernel)
    true_value, true_gradient = truth(naive, kernel)
    assert_close(value, true_value, 1e-12)
    assert_close(gradient, true_gradient, 1e-12)
    dims = len(shape) - 2
    module = getattr(nn, f"Conv{dims}d")(
        shape[1] * geometry.groups, shape[0], shape[2:], geometry.stride, 0, geometry.dilation, geometry.groups
    ).double()
    with torch.no_grad():
        module.weight.copy_(kernel)
    assert_close(losses.add_penalty_grad_(module, "conv_orthogonality", weight=0.5), 0.5 * true_value, 1e-12)
    assert_close(module.weight.grad, 0.5 * true_gradient, 1e-12)
    assert_close(losses.ConvOrthogonality(module)(), true_value, 1e-12)


def test_a_flattened_kernel_may_be_orthogonal_where_the_convolution_is_not() -> None:
    kernel = torch.zeros(2, 1, 2, dtype=DOUBLE)
    kernel[0, 0, 0] = kernel[1, 0, 1] = 1  # the same tap, shifted by one
    assert losses.conv_orthogonality_loss(kernel, flattened=True) == 0
    assert losses.conv_orthogonality_loss(kernel) == 2
    assert losses.conv_orthogonality_loss(kernel, geometry=Geometry((2,), (1,))) == 0


def test_flattened_kernels_of_a_model_are_its_soft_orthogonality() -> None:
    net = model()
    flat = losses.conv_orthogonality_loss(net, flattened=True)
    assert torch.equal(flat, losses.soft_orthogonality_loss(net, select=nn.Conv2d))
    assert torch.equal(losses.ConvOrthogonality(net, flattened=True)(), flat)


def test_gradient_descent_on_a_penalty_lowers_it() -> None:
    for name in ("mean_abs_cosine", "soft_orthogonality", "frame_potential"):
        net = nn.Linear(12, 8)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        values = []
        for _ in range(60):
            optimizer.zero_grad()
            values.append(losses.add_penalty_grad_(net, name).item())
            optimizer.step()
        assert values[-1] < 0.5 * values[0], name


@each
def test_zero_vectors_and_lone_vectors_cost_nothing_and_nan_is_seen(name: str) -> None:
    weight = torch.randn(6, 4)
    weight[2] = 0
    _, gradient = made(LOSS[name], weight)
    assert gradient.isfinite().all()
    if "orthogonality" not in name:
        assert not gradient[2].any()
    if name not in ("soft_orthogonality", "double_soft_orthogonality", "mutual_coherence"):
        kept = weight[weight.any(1)]
        assert_close(LOSS[name](weight), truth(NAIVE[name], kept)[0], 1e-6)
        for empty in (torch.randn(1, 4), torch.zeros(3, 4)):
            value, gradient = made(LOSS[name], empty)
            assert value == 0
            assert not gradient.any()
    weight[0, 0] = float("nan")
    assert LOSS[name](weight).isnan()


@each
def test_tiny_and_huge_weights_neither_under_nor_overflow(name: str) -> None:
    if name in ("soft_orthogonality", "double_soft_orthogonality", "mutual_coherence"):
        return  # raw products: their range is that of the formula
    weight = torch.randn(5, 8)
    plain = LOSS[name](weight)
    for scale in (2.0**-100, 2.0**100):
        assert_close(LOSS[name](weight * scale), plain.double(), 1e-6)


def test_smooth_forms_and_samples_reach_the_fold() -> None:
    weight = torch.randn(40, 8, dtype=DOUBLE)
    c = cosines(weight)
    assert_close(losses.pii_loss(weight, smooth="sqrt", width=0.1), ((c.square() + 0.01).sqrt() - 0.1).mean(), 1e-12)
    sampled = losses.pii_loss(weight, sample=100)
    assert sampled != losses.pii_loss(weight)
    assert sampled.item() == pytest.approx(c.abs().mean().item(), rel=0.3)
    net = nn.Linear(8, 40).double()
    assert losses.MeanAbsCosine(net, sample=100)() == losses.pii_loss(net, sample=100)
    assert_close(losses.pii_loss(weight, vectors="cols"), losses.pii_loss(weight.T.contiguous()), 1e-14)


def test_a_bound_penalty_follows_its_model_and_holds_none_of_it() -> None:
    net = model()
    penalty = losses.SoftOrthogonality(net, select=nn.Linear, weight=2.0)
    assert penalty.layers == ("3.weight", "4.weight", "5.weight")
    assert not penalty.state_dict()
    before = penalty()
    with torch.no_grad():
        net[3].weight.mul_(3)
    assert penalty() > before
    assert torch.equal(penalty(), losses.soft_orthogonality_loss(net, select=nn.Linear, weight=2.0))
    penalty.weight = 4.0
    assert torch.equal(penalty(), losses.soft_orthogonality_loss(net, select=nn.Linear, weight=4.0))


def test_a_parametrised_layer_is_penalised_through_the_graph_only() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    losses.pii_loss(net).backward()
    assert net[0].parametrizations.weight.original1.grad is not None
    with pytest.raises(InputError, match=r"0\.weight is computed from other tensors.*add the penalty to the loss"):
        losses.add_penalty_grad_(net)


SPARSE = nn.Embedding(5, 3, sparse=True)
FROZEN = nn.Linear(3, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.pii_loss(nn.ReLU()), "source needs layers with vectors to compare, got none"),
        (lambda: losses.pii_loss(nn.Linear(3, 1)), "got none; weight holds 1 vector"),
        (lambda: losses.pii_loss(torch.ones(3, 2), weight=float("nan")), "weight needs a finite number.*nan"),
        (lambda: losses.pii_loss(torch.ones(3, 2), select="a*"), "select= chooses among the layers of a model"),
        (lambda: losses.pii_loss(nn.Linear(3, 4), vectors="cols"), "vectors='cols' needs a single tensor"),
        (lambda: losses.pii_loss(nn.Linear(3, 4), smooth="soft"), "smooth needs"),
        (lambda: losses.pii_loss(3), "source needs a model"),
        (lambda: losses.add_penalty_grad_(nn.Linear(3, 4), "ortho"), "penalty needs one of mean_abs_cosine.*'ortho'"),
        (lambda: losses.add_penalty_grad_(FROZEN), "none of the 1 layers requires a gradient"),
        (lambda: losses.add_penalty_grad_(nn.Linear(3, 4), "conv_orthogonality"), "source needs Conv1d, Conv2d"),
        (lambda: losses.conv_orthogonality_loss(torch.ones(3, 2)), "kernel has 3 to 5 dimensions.*shape .3, 2."),
        (
            lambda: losses.conv_orthogonality_loss(nn.Conv1d(2, 3, 3), geometry=Geometry((1,), (1,))),
            "geometry= needs a single kernel",
        ),
        (
            lambda: losses.conv_orthogonality_loss(torch.ones(3, 2, 3), geometry=Geometry((1, 1), (1,))),
            "geometry.stride needs 1 positive integers",
        ),
        (
            lambda: losses.conv_orthogonality_loss(torch.ones(3, 2, 3), geometry=Geometry((1,), (1,), 2)),
            "geometry.groups needs a divisor of the 3 filters, got 2",
        ),
        (lambda: SRIP(nn.Linear(3, 4), steps=0), "steps needs a positive integer.*0"),
    ],
    ids=[
        "nothing", "lone", "nan_weight", "select_of_tensor", "vectors_of_model", "smooth", "type", "penalty", "frozen",
        "no_conv", "matrix_as_kernel", "geometry_of_model", "stride", "groups", "steps",
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_sparse_gradient_is_not_filled_in_silence() -> None:
    SPARSE(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        losses.add_penalty_grad_(SPARSE)

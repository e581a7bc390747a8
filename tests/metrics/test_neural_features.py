"""Average gradient outer products: closed forms, Theorem 1 of Lu et al. 2024, layers inside networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from orthofast import metrics
from orthofast.errors import InputError


def one_hidden_layer(W: Tensor, x: Tensor) -> Tensor:
    """E over the outgoing weights a of the network a^T sqrt(2 / k) relu(W x): its outputs are the hidden units."""
    return math.sqrt(2 / len(W)) * torch.relu(x @ W.T)


def test_gram_and_gradient_products_of_one_hidden_layer_are_equal_with_antithetic_inputs() -> None:
    W = torch.randn(40, 12, dtype=torch.float64)
    half = torch.randn(7, 12, dtype=torch.float64)
    found = metrics.agop(lambda x: one_hidden_layer(W, x), torch.cat([half, -half]))
    torch.testing.assert_close(found, W.T @ W / 40, rtol=1e-13, atol=1e-14)
    assert metrics.neural_feature_correlation(W, found).item() == pytest.approx(1, abs=1e-14)


def test_with_independent_inputs_they_approach_each_other_as_the_square_root_of_their_number() -> None:
    W = torch.randn(16, 6, dtype=torch.float64)
    gram = W.T @ W / 16

    def error(n: int) -> float:
        trials = [
            (metrics.agop(lambda x: one_hidden_layer(W, x), torch.randn(n, 6, dtype=torch.float64)) - gram).norm()
            for _ in range(8)
        ]
        return (torch.stack(trials).square().mean().sqrt() / gram.norm()).item()

    few, many = error(100), error(6400)
    assert many < 0.02
    assert 4 < few / many < 16  # 8 but for chance


def test_two_hidden_layers_agree_in_the_limit_of_width() -> None:
    W = torch.randn(20, 5, dtype=torch.float64)
    half = torch.randn(10, 5, dtype=torch.float64)
    inputs, gram = torch.cat([half, -half]), W.T @ W / 20

    def error(width: int) -> float:
        second = torch.randn(width, 20, dtype=torch.float64)

        def function(x: Tensor) -> Tensor:  # E over the last weights, as above
            return math.sqrt(2 / width) * torch.relu(math.sqrt(2 / 20) * torch.relu(x @ W.T) @ second.T)

        jacobians = [
            math.sqrt(2 / width * 2 / 20) * ((function(x) > 0)[:, None] * second @ ((W @ x > 0)[:, None] * W))
            for x in inputs
        ]
        found = metrics.agop(function, inputs)
        expected = sum(jacobian.T @ jacobian for jacobian in jacobians) / len(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        return ((found - gram).norm() / gram.norm()).item()

    narrow, wide = error(10), error(1000)
    assert wide < 0.5 * narrow
    assert wide < 0.2


@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 4)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("outputs", [1, 3, 40])
def test_it_is_the_mean_of_the_jacobians_products(shape: tuple[int, ...], outputs: int) -> None:
    inner, last = nn.Linear(4, 6).double(), nn.Linear(6 * math.prod(shape[1:-1]), outputs).double()
    x = torch.randn(*shape, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return last(torch.tanh(inner(x)).flatten(1))

    expected = torch.zeros(4, 4, dtype=torch.float64)
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda one: function(one[None])[0], sample).reshape(-1, 4)
        expected += jacobian.T @ jacobian / len(x)
    torch.testing.assert_close(metrics.agop(function, x), expected, rtol=1e-12, atol=1e-14)
    assert inner.weight.grad is None


def test_of_a_layer_inside_a_network_it_is_that_of_the_layers_behind() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 3)).double()
    x = torch.randn(11, 5, dtype=torch.float64)
    expected = metrics.agop(model[2:], model[:2](x))
    for layer in ("2", model[2]):
        with torch.no_grad():
            torch.testing.assert_close(metrics.layer_agop(model, layer, x), expected, rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[2]._forward_pre_hooks
    last = metrics.layer_agop(model, "4", x)
    assert metrics.neural_feature_correlation(model[4].weight, last).item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (1, 2), dilation=2, bias=False),
        nn.Conv1d(2, 3, 3, padding="same"),
    ],
    ids=["Conv2d", "dilated", "Conv1d"],
)
def test_of_a_convolution_it_is_by_its_patches(conv: nn.Module) -> None:
    conv = conv.double()
    size = (6, 7) if isinstance(conv, nn.Conv2d) else (8,)
    images = torch.randn(4, 2, *size, dtype=torch.float64)
    shape = conv(images).shape[2:]
    head = nn.Linear(conv.out_channels * math.prod(shape), 3).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), head)
    if isinstance(conv, nn.Conv2d):
        patches = nn.functional.unfold(images, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    else:
        patches = nn.functional.unfold(images[:, :, None], (1, 3), padding=(0, 1))

    def behind(rows: Tensor) -> Tensor:  # (N, positions, in * kernel)
        out = rows @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
        return head(torch.tanh(out.mT.unflatten(2, shape)).flatten(1))

    torch.testing.assert_close(behind(patches.mT), model(images), rtol=1e-10, atol=1e-12)
    found = metrics.layer_agop(model, conv, images)
    torch.testing.assert_close(found, metrics.agop(behind, patches.mT), rtol=1e-10, atol=1e-12)
    flat = metrics.neural_feature_correlation(conv.weight.flatten(1), found)
    assert torch.equal(metrics.neural_feature_correlation(conv.weight, found), flat)
    assert not conv._forward_hooks


def test_the_correlation_is_a_cosine_whatever_the_scale() -> None:
    W, other = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    products = other.T @ other
    gram = W.T @ W
    expected = (gram * products).sum() / gram.norm() / products.norm()
    for scale in (1, 1e90, 1e-90):
        found = metrics.neural_feature_correlation(W, products * scale)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert 0 < expected < 1
    apart = metrics.neural_feature_correlation(torch.eye(4)[:2], torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0])))
    assert apart.item() == 0
    assert math.isnan(metrics.neural_feature_correlation(torch.zeros(2, 2), torch.eye(2)).item())


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.agop(lambda x: x, torch.ones(3)), "inputs"),
        (lambda: metrics.agop(lambda x: x, torch.ones(0, 3)), "inputs"),
        (lambda: metrics.agop(lambda x: x.sum(0), torch.ones(2, 3)), "one row per sample"),
        (lambda: metrics.agop(lambda x: torch.ones(2, 1), torch.ones(2, 3)), "depend"),
        (lambda: metrics.layer_agop(nn.Sequential(nn.Linear(3, 2)), "first", torch.ones(2, 3)), "named_modules"),
        (lambda: metrics.layer_agop(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "0", torch.ones(2, 3)), "eval"),
        (lambda: metrics.layer_agop(Twice(), "layer", torch.ones(2, 3)), "2 times"),
        (lambda: metrics.layer_agop(nn.Conv2d(2, 2, 1, groups=2), "", torch.ones(1, 2, 2, 2)), "2 groups"),
        (lambda: metrics.neural_feature_correlation(torch.ones(3, 2), torch.ones(3, 3)), "weight and outer_products"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()

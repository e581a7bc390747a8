"""The papers' small networks: where normalisation stands, how weights start, what that does to activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import orthofast
from orthofast.errors import InputError
from orthofast.lab import ConvNet, NormalizedResidualMLP, constant_, initialize_, mlp


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model]


def test_a_perceptron_is_linear_normalised_activated() -> None:
    assert kinds(mlp([5, 4, 3])) == ["Linear", "ReLU", "Linear"]
    hidden = ["Linear", "BatchNorm1d", "Tanh", "Linear"]
    assert kinds(mlp([5, 4, 3], activation="tanh", normalization="hidden")) == hidden
    assert kinds(mlp([5, 4, 3], activation="tanh", normalization="every")) == [*hidden, "BatchNorm1d"]
    model = mlp([144, *[24] * 7, 10])  # Huang et al. 2020, Fig. 1: eight linear layers, no biases
    assert sum(parameter.numel() for parameter in model.parameters()) == 144 * 24 + 6 * 24**2 + 240
    assert mlp([2, 3], bias=True)[0].bias.tolist() == [0, 0, 0]
    assert mlp([2, 3, 1], normalization="hidden", eps=0.5)[1].eps == 0.5


@pytest.mark.parametrize(
    ("init", "variance"),
    [("uniform", 1 / 600), ("he", 0.01), ("lecun", 0.005), ("xavier", 2 / 500), ("orthogonal", 1 / 300)],
)
def test_weights_start_with_the_variance_of_their_law(init: str, variance: float) -> None:
    weight = initialize_(nn.Linear(200, 300), init).weight.detach()
    assert weight.var().item() == pytest.approx(variance, rel=0.03)
    assert abs(weight.mean().item()) < 4 * math.sqrt(variance / weight.numel())
    if init == "uniform":
        assert 0.999 / math.sqrt(200) < weight.abs().max().item() <= 1 / math.sqrt(200)
    if init == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(200), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("init", "factor", "within"), [("uniform", 1 / 6, 0.03), ("he", 1.0, 0.15)])
def test_mean_squares_shrink_to_a_sixth_per_layer_or_stay(init: str, factor: float, within: float) -> None:
    model = mlp([256] * 12, init=init)
    h, sizes = torch.randn(512, 256), []
    with torch.no_grad():
        for module in model:
            h = module(h)
            if isinstance(module, nn.ReLU):
                sizes.append(h.square().mean().item())
    per_layer = (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
    assert per_layer == pytest.approx(factor, abs=within)


@pytest.mark.parametrize("shared", [False, True])
def test_the_residual_network_is_its_equation(shared: bool) -> None:
    model = NormalizedResidualMLP(6, 5, 3, 2, activation="gelu", shared=shared).double()
    for normalization in model.normalizations:
        nn.init.uniform_(normalization.weight, 0.5, 1.5)
    assert len(model.normalizations) == (1 if shared else 3)
    x = torch.randn(20, 6, dtype=torch.float64)
    h = nn.functional.gelu(model.first(x))
    for number, layer in enumerate(model.hidden):
        h = h + nn.functional.gelu(layer(h))
        weight = model.normalizations[0 if shared else number].weight
        h = weight * (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(model(x), model.last(h), rtol=1e-10, atol=1e-12)
    bare = NormalizedResidualMLP(6, 5, 3, 2, normalize=False, residual=False)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in bare.modules())
    expected = bare.first(x.float()).relu()
    for layer in bare.hidden:
        expected = layer(expected).relu()
    torch.testing.assert_close(bare(x.float()), bare.last(expected))


def test_the_convolutional_network_has_the_papers_shapes_and_starting_values() -> None:
    model = ConvNet()
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (512, 4096), (10, 512)]
    assert [tuple(weight.shape) for weight in weights] == shapes
    # Lu et al. 2024, Table 2: 0.070 and 0.050 at the start
    for weight, published in ((weights[1], 0.070), (weights[2], 0.050)):
        assert round(orthofast.pii(weight.detach(), vectors="center_tap").item(), 3) == pytest.approx(
            published, abs=0.0011
        )
    normalized = ConvNet(1, (4, 6, 8), 16, 12, 3, normalize=True)
    assert kinds(normalized.features)[:4] == ["Conv2d", "ReLU", "BatchNorm2d", "MaxPool2d"]
    assert kinds(normalized.features).count("BatchNorm2d") == 2
    assert normalized(torch.randn(2, 1, 16, 16)).shape == (2, 3)


def test_a_constant_layer_starts_at_the_largest_index() -> None:
    layer = constant_(nn.Linear(30, 20))
    assert bool((layer.weight == 0.1).all() & (layer.bias == 0.1).all())
    for vectors in ("rows", "cols"):
        assert orthofast.pii(layer.weight.detach(), vectors=vectors).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: mlp([5]), "widths"),
        (lambda: mlp([5, 0, 3]), "widths"),
        (lambda: mlp([5, 3], normalization="layer"), "normalization"),
        (lambda: mlp([5, 4, 3], activation="swish"), "activation"),
        (lambda: mlp([5, 3], init="zeros"), "init"),
        (lambda: NormalizedResidualMLP(5, 4, 0, 3), "widths"),
        (lambda: ConvNet(size=30), "multiple of 8"),
        (lambda: ConvNet(widths=(8, 8)), "three widths"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()

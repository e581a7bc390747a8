"""Layers of today's networks, each against its formula, and what wide networks of them do to cosines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from orthofast import orthogonality_gap
from orthofast.errors import InputError
from orthofast.lab import deep_standardization
from orthofast.lab.deep_normalization import gap_of_cosines, mean_gaps, wide_gaps
from orthofast.lab.modern_blocks import wide_block_gaps
from orthofast.lab.modern_nets import (
    NORMALIZATIONS,
    RELU_GAIN,
    SILU_GAIN,
    Attention,
    FeedForward,
    ImageTransformer,
    ResidualBlock,
    StandardizedLinear,
    TransformerBlock,
    clip_gradients_,
    cosine_map,
    plain_perceptron,
    residual_perceptron,
    rotated,
)
from orthofast.metrics import cosine_matrix

Raw = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the runs of the lab have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


# layers


def test_standardised_rows_have_mean_zero_and_the_stated_variance() -> None:
    layer = StandardizedLinear(300, 5, scale=RELU_GAIN)
    with torch.no_grad():
        layer.weight.mul_(3).add_(torch.tensor([[0.0], [1.0], [2.0], [-3.0], [0.1]]))
        layer.gain[2] = 0.5
    used = layer.standardized().double()
    assert used.mean(1).abs().max() < 1e-6
    expected = torch.tensor([1, 1, 0.25, 1, 1], dtype=torch.float64) * RELU_GAIN**2 / 300
    torch.testing.assert_close(used.var(1, correction=0), expected, rtol=2e-4, atol=0)
    for row, given in zip(used, layer.weight.detach().double(), strict=True):  # a direction: that of the centred row
        assert functional.cosine_similarity(row, given - given.mean(), dim=0) > 1 - 1e-9
    x = torch.randn(4, 300)
    torch.testing.assert_close(layer(x), x @ layer.standardized().T)


def test_the_gain_makes_the_variance_behind_a_relu_one() -> None:
    """A sum of squares with these gains would drift by 1.47 or 0.68 a layer otherwise."""
    x = torch.randn(2000, 400)
    for _ in range(3):
        x = StandardizedLinear(400, 400, scale=RELU_GAIN)(torch.relu(x))
    assert x.var().item() == pytest.approx(1, abs=0.1)
    u = torch.randn(400_000, dtype=torch.float64)
    assert (RELU_GAIN * torch.relu(u)).var().item() == pytest.approx(1, abs=0.02)
    assert (SILU_GAIN * functional.silu(u) * torch.randn_like(u)).var().item() == pytest.approx(1, abs=0.03)


def test_clipping_limits_rows_to_a_share_of_their_length_and_vectors_as_a_whole() -> None:
    weight, gain, idle = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (6, 1), (2, 2)))
    weight.grad, gain.grad = torch.randn(6, 4) * 9, torch.randn(6, 1) * 9
    weight.grad[0] *= 1e-9
    gain.grad[1:] *= 1e-2
    before = weight.grad.clone(), gain.grad.clone()
    clip_gradients_([weight, gain, idle], limit=0.02)
    ratios = weight.grad.norm(dim=1) / weight.detach().norm(dim=1)
    torch.testing.assert_close(ratios[1:], torch.full((5,), 0.02))
    torch.testing.assert_close(weight.grad[0], before[0][0])
    torch.testing.assert_close(weight.grad[1] / weight.grad[1].norm(), before[0][1] / before[0][1].norm())
    assert (gain.grad.norm() / gain.detach().norm()).item() == pytest.approx(0.02)
    torch.testing.assert_close(gain.grad / gain.grad.norm(), before[1] / before[1].norm())
    assert idle.grad is None


def test_attention_is_softmax_over_all_positions() -> None:
    layer, x = Attention(8, 2), torch.randn(3, 5, 8)
    parts = []
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (x @ one.weight[rows].T for one in (layer.q_proj, layer.k_proj, layer.v_proj))
        parts.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), torch.cat(parts, -1) @ layer.o_proj.weight.T)
    turned = Attention(8, 2, rotary=True)
    turned.load_state_dict(layer.state_dict())
    assert not torch.allclose(turned(x), layer(x), atol=1e-4)
    with pytest.raises(InputError, match="heads needs a divisor"):
        Attention(8, 3)


def test_rotary_positions_keep_lengths_and_tell_distances_only() -> None:
    q, k = (torch.randn(8).repeat(6, 1) for _ in range(2))  # one vector at six positions
    products = rotated(q) @ rotated(k).T
    torch.testing.assert_close(rotated(q).norm(dim=1), q.norm(dim=1))
    for offset in range(-4, 5):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 1e-2
    first = rotated(torch.eye(8)[:1].repeat(6, 1))[3], rotated(torch.eye(8)[1:2].repeat(6, 1))[3]
    for place, angle in enumerate((3.0, 3 * 10_000 ** (-2 / 8))):
        assert first[place][place].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert first[place][place + 4].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_blocks_without_their_branches_keep_or_normalise_the_stream() -> None:
    x = 5 * torch.randn(2, 3, 12)
    for kind in ("LayerNorm", "RMSNorm"):
        for before in (True, False):
            block = TransformerBlock(12, 2, kind, before=before)
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
            expected = x if before else x / x.square().mean(-1, keepdim=True).sqrt()
            if not before and kind == "LayerNorm":
                expected = functional.layer_norm(x, (12,))
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    flat = torch.randn(6, 12)
    residual = ResidualBlock(12, "RMSNorm")
    branch = torch.relu(functional.rms_norm(flat, (12,)) @ residual.first.weight.T) @ residual.second.weight.T
    torch.testing.assert_close(residual(flat), flat + branch)
    with pytest.raises(InputError, match="normalization needs one of LayerNorm, RMSNorm"):
        TransformerBlock(12, 2, "batch norm", before=True)


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_feed_forward_layers_keep_mean_squares(gated: bool) -> None:
    layer, x = FeedForward(256, 700, gated=gated), torch.randn(50, 1, 256)
    assert layer(x).square().mean().item() == pytest.approx(1, abs=0.15)
    block, flat = ResidualBlock(256, "RMSNorm"), 3 * torch.randn(50, 256)
    assert (block(flat) - flat).square().mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "batch norm"])
def test_only_batch_norm_sees_other_samples(kind: str) -> None:
    x, other = torch.randn(6, 10), torch.randn(6, 10)
    other[0] = x[0]
    for build in (plain_perceptron, residual_perceptron):
        model = build(10, 16, 4, kind)
        same = torch.allclose(model(x)[0], model(other)[0], atol=1e-5)
        assert same is (kind != "batch norm")


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_rmsnorm_leaves_every_angle_as_it_is_without_and_layernorm_does_not(activation: str) -> None:
    x, found = torch.randn(8, 20), {}
    for kind in NORMALIZATIONS:
        torch.manual_seed(1)
        found[kind] = cosine_matrix(plain_perceptron(20, 24, 12, kind, activation)(x).detach().double())
    torch.testing.assert_close(found["RMSNorm"], found["none"], rtol=0, atol=1e-5)
    assert (found["LayerNorm"] - found["none"]).abs().max() > 1e-2
    assert (found["batch norm"] - found["none"]).abs().max() > 1e-2


def test_equal_seeds_give_equal_weights_whatever_the_normalisation() -> None:
    weights = []
    for kind in NORMALIZATIONS:
        torch.manual_seed(3)
        weights.append([one for one in plain_perceptron(5, 6, 3, kind).parameters() if one.dim() == 2])
    for other in weights[1:]:
        assert all(torch.equal(one, two) for one, two in zip(weights[0], other, strict=True))


# wide networks


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "linear", "swiglu"])
@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.6, 0.95])
def test_the_cosine_map_is_the_mean_over_gaussians(activation: str, cosine: float) -> None:
    u, noise = torch.randn(2, 400_000, dtype=torch.float64)
    v = cosine * u + math.sqrt(1 - cosine**2) * noise
    kinds = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "swiglu": functional.silu}
    f = kinds.get(activation, lambda x: x)
    expected = (f(u) * f(v)).mean() / (f(u).square().mean() * f(v).square().mean()).sqrt()
    found = cosine_map(activation, torch.tensor(cosine))
    assert found.item() == pytest.approx(expected.item() * (cosine if activation == "swiglu" else 1), abs=6e-3)
    assert cosine_map(activation, torch.ones(2, 3)).tolist() == [[pytest.approx(1)] * 3] * 2


def test_relu_draws_samples_together_and_gated_layers_apart() -> None:
    inside = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert (cosine_map("relu", inside) > inside).all()
    assert (cosine_map("swiglu", inside) < inside).all()
    with pytest.raises(InputError, match="activation needs one of"):
        cosine_map("step", inside)


def test_the_gap_of_cosines_is_that_of_samples_of_one_length() -> None:
    x = functional.normalize(torch.randn(8, 20, dtype=torch.float64), dim=1)
    assert gap_of_cosines(cosine_matrix(x)) == pytest.approx(float(orthogonality_gap(x)))


def test_wide_perceptrons_follow_their_limit() -> None:
    x = functional.normalize(torch.randn(8, 20) + 0.5, dim=1)
    paths = [str(layer) for layer in range(5)]
    plain_limit = wide_gaps([x], 5, lambda _, c: cosine_map("relu", c))
    found = mean_gaps((plain_perceptron(20, 500, 5, "RMSNorm") for _ in range(3)), [x], paths)
    assert found == pytest.approx(plain_limit, abs=0.04)
    residual_limit = wide_gaps([x], 5, lambda done, c: (done * c + cosine_map("relu", c)) / (done + 1))
    found = mean_gaps((residual_perceptron(20, 500, 4, "RMSNorm") for _ in range(3)), [x], paths)
    assert found == pytest.approx(residual_limit, abs=0.04)
    assert abs(plain_limit[-1] - residual_limit[-1]) > 0.08, "else the limits could be exchanged"


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("before", [True, False], ids=["pre", "post"])
def test_wide_transformers_with_uniform_attention_follow_their_limit(kind: str, before: bool) -> None:
    images = torch.randn(4, 1, 5, 6) + 0.4

    def build() -> nn.Module:
        net = ImageTransformer((1, 5, 6), 384, 3, 4, 10, kind, before=before)
        for block in list(net.blocks)[1:]:
            assert isinstance(block, TransformerBlock)
            nn.init.zeros_(block.self_attn.q_proj.weight)  # equal logits
        if net.positions is not None:
            nn.init.zeros_(net.positions)
        return net

    nets = [build() for _ in range(3)]
    activation = "relu" if kind == "LayerNorm" else "swiglu"
    of_images, of_tokens = wide_block_gaps(images, 3, activation, before=before)
    found = mean_gaps(nets, [images], [f"images.{block}" for block in range(4)])
    assert found == pytest.approx(of_images, abs=0.06)
    found = mean_gaps(nets, [images[1:2]], [f"blocks.{block}" for block in range(4)], positions=True)
    assert found == pytest.approx(of_tokens[1], abs=0.06)


def test_the_growth_of_gradients_is_the_square_of_the_weights_scale() -> None:
    layers: list[nn.Module] = []
    for scale in (1.0, 3.0, 3.0, 3.0, 1.0):
        linear = nn.Linear(4, 4, bias=False)
        linear.weight.data = scale * torch.linalg.qr(torch.randn(4, 4))[0]
        layers += [linear, nn.Identity()]
    inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    model = nn.Sequential(*layers[:-1])
    assert deep_standardization.gradient_growth(model, inputs, labels) == pytest.approx(9, rel=1e-4)
    assert math.isnan(deep_standardization.gradient_growth(nn.Sequential(*layers[:3]), inputs, labels))

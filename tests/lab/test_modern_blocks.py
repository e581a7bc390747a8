"""Gaps under today's normalisations: the layers, what wide networks do, verdicts that must fail, runs that repeat."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast import orthogonality_gap
from orthofast.errors import InputError
from orthofast.lab import deep_normalization, deep_standardization, deep_training, modern_blocks
from orthofast.lab.data import Images
from orthofast.lab.deep_normalization import DEPTH, UNIT, gap_of_cosines, mean_gaps, wide_gaps
from orthofast.lab.deep_standardization import ARMS, CLIPPED, ORTHOGONAL, STANDARDIZED
from orthofast.lab.drawing import pictures
from orthofast.lab.experiment import Experiment, Settings
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
from orthofast.lab.registry import REGISTRY
from orthofast.lab.runs import plain
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED
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


# verdicts


def normalizations() -> Raw:
    def rising(end: float, count: int = DEPTH) -> list[float]:
        return [0.45 + (end - 0.45) * layer / (count - 1) for layer in range(count)]

    per_sample = {"LayerNorm": 0.9, "RMSNorm": 0.9, "none": 0.91, UNIT: 0.9}
    linear = {kind: rising(0.8, 8) for kind in per_sample} | {"batch norm": [0.25] + [0.23] * 7}
    relu = {kind: rising(end) for kind, end in per_sample.items()} | {"batch norm": [0.25] + [0.2] * (DEPTH - 1)}
    ends = {"LayerNorm": 0.67, "RMSNorm": 0.67, "none": 0.86, UNIT: 0.85}
    residual = {kind: rising(end) for kind, end in ends.items()} | {"batch norm": [0.26] * DEPTH}
    layers = list(range(1, DEPTH + 1))
    return {
        "cap": 0.935,
        "stationary": 0.23,
        "input": 0.44,
        "linear": {"layer": [2**power for power in range(8)], **linear},
        "relu": {"layer": layers, "wide": rising(0.9), **relu},
        "residual": {"layer": layers, "wide": rising(0.66), **residual},
        "trained": {kind: {"start": [0.5, 0.9], "end": [0.5, 0.6], "loss": 0.3} for kind in NORMALIZATIONS},
    }


def blocks() -> Raw:
    images = {"ReLU, pre-norm": 0.8, "ReLU, post-norm": 0.87, "SwiGLU, pre-norm": 0.6, "SwiGLU, post-norm": 0.1}
    tokens = {"ReLU, pre-norm": 0.86, "ReLU, post-norm": 0.935, "SwiGLU, pre-norm": 0.68, "SwiGLU, post-norm": 0.9}
    measured = {
        "images": {name: [0.74, end] for name, end in images.items()},
        "tokens": {name: [0.57, end] for name, end in tokens.items()},
    }
    return {
        "block": [0, 1],
        "cap": {"images": 0.9354, "tokens": 0.9354},
        "independent": 0.07,
        **measured,
        "wide images": copy.deepcopy(measured["images"]),
        "wide tokens": copy.deepcopy(measured["tokens"]),
        "trained": {kind: {"start": [0.7], "end": [0.4], "loss": 0.3, "accuracy": 0.9} for kind in ("ReLU", "SwiGLU")},
    }


def starts() -> Raw:
    def rows(hidden: float, growth: float, losses: list[float | None]) -> list[Raw]:
        return [{"gap": 0.5, "hidden_gap": hidden, "growth": growth, "loss": loss} for loss in losses]

    return {
        "depth": [15, 30, 60],
        "guessing": math.log(10),
        "Xavier": rows(0.98, 1.0, [0.3, 1.0, 2.0]),
        ORTHOGONAL: rows(0.02, 0.9, [0.2, 0.2, 0.3]),
        STANDARDIZED: rows(0.4, 1.45, [0.05, None, None]),
        CLIPPED: rows(0.4, 1.45, [0.05, 1.9, 40.0]),
    }


FOUND: dict[str, Experiment] = {
    one.id: one for room in (deep_normalization, modern_blocks, deep_standardization) for one in room.EXPERIMENTS
}
GOOD = {"S1-X4": normalizations, "S1-X5": blocks, "S1-X1": starts}
WRONG: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("S1-X4", ("stationary",), 0.3),
    ("S1-X4", ("linear", "RMSNorm", 3), 0.5),
    ("S1-X4", ("linear", "LayerNorm", -1), 0.3),
    ("S1-X4", ("linear", "none", -1), None),
    ("S1-X4", ("linear", "batch norm", -1), None),
    ("S1-X4", ("relu", "batch norm", -1), 0.5),
    ("S1-X4", ("relu", "batch norm", -2), 0.3),
    ("S1-X4", ("relu", "RMSNorm", 7), 0.9),
    ("S1-X4", ("relu", "LayerNorm", -1), 0.1),
    ("S1-X4", ("relu", "wide", -1), 0.8),
    ("S1-X4", ("residual", "batch norm", -1), 0.6),
    ("S1-X4", ("residual", "wide", -1), 0.5),
    ("S1-X4", ("residual", "LayerNorm", -1), 0.95),
    ("S1-X4", ("residual", UNIT, -1), 0.6),
    ("S1-X4", ("trained", "RMSNorm", "end", -1), 0.95),
    ("S1-X4", ("trained", "none", "end", -1), None),
    ("S1-X5", ("images", "ReLU, pre-norm", 0), 0.85),
    ("S1-X5", ("images", "ReLU, post-norm", -1), 0.7),
    ("S1-X5", ("images", "SwiGLU, pre-norm", -1), 0.8),
    ("S1-X5", ("images", "SwiGLU, post-norm", -1), 0.8),
    ("S1-X5", ("wide images", "ReLU, pre-norm", -1), 0.7),
    ("S1-X5", ("wide tokens", "SwiGLU, post-norm", -1), None),
    ("S1-X5", ("tokens", "ReLU, post-norm", -1), 0.9),
    ("S1-X5", ("tokens", "SwiGLU, pre-norm", -1), 0.95),
    ("S1-X5", ("trained", "ReLU", "end", -1), 0.8),
    ("S1-X1", (ORTHOGONAL, -1, "loss"), 1.3),
    ("S1-X1", (ORTHOGONAL, -1, "loss"), None),
    ("S1-X1", ("Xavier", -1, "loss"), 0.9),
    ("S1-X1", (STANDARDIZED, -1, "hidden_gap"), 0.99),
    ("S1-X1", (STANDARDIZED, -1, "growth"), 0.99),
]


@pytest.mark.parametrize(("key", "place", "value"), WRONG, ids=str)
def test_verdicts_tell_numbers_that_hold_from_those_that_do_not(
    key: str, place: tuple[str | int, ...], value: Any
) -> None:
    verdict, right, wrong = FOUND[key].verdict, GOOD[key](), GOOD[key]()
    held = verdict([right, right])
    assert held.status == REPRODUCED, [check for check in held.checks if check.holds is False]
    inner: Any = wrong
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    assert verdict([wrong, wrong]).status == NOT_REPRODUCED
    assert verdict([right, wrong]).status == NOT_REPRODUCED, "one seed is enough"


def test_what_is_only_shown_decides_nothing() -> None:
    raw = starts()
    raw[CLIPPED][0]["loss"], raw[STANDARDIZED][0]["loss"] = None, 9.0
    assert FOUND["S1-X1"].verdict([raw]).status == REPRODUCED
    gated = blocks()
    gated["wide images"]["SwiGLU, post-norm"] = [0.74, 0.0]
    assert FOUND["S1-X5"].verdict([gated]).status == REPRODUCED


# runs


def images(settings: Settings) -> Images:
    """Three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels: Tensor = torch.arange(120) % 3
    shown = torch.rand(120, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return Images("three", shown[20:], labels[20:], shown[:20], labels[:20], 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, a few steps, no files."""
    for room in (deep_normalization, modern_blocks, deep_standardization):
        monkeypatch.setattr(room, "load", images)
    monkeypatch.setattr(deep_normalization, "LINEAR", {"small": (16, 1, 1)})
    monkeypatch.setattr(deep_normalization, "RECTIFIED", {"small": (12, 1, 1)})
    monkeypatch.setattr(deep_normalization, "TRAINED", {"small": (3, 12, 2, 10, 0.01)})
    monkeypatch.setattr(modern_blocks, "TRANSFORMERS", {"small": (2, 16, 2, 1, 1)})
    monkeypatch.setattr(modern_blocks, "FITTED", {"small": (2, 16, 2, 2, 10, 1e-3)})
    monkeypatch.setattr(deep_standardization, "SIZES", {"small": (12, 3, 10, 0.01)})
    monkeypatch.setattr(deep_standardization, "DEPTHS", {"small": (3, 5)})


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.usefixtures("quick")
def test_an_experiment_repeats_by_seed_is_judged_and_drawn(key: str) -> None:
    experiment = FOUND[key]
    raw, again, other = (json.loads(json.dumps(plain(experiment.run(Settings(seed=seed))))) for seed in (0, 0, 1))
    assert raw == again
    assert raw != other
    assert raw.keys() == GOOD[key]().keys(), "the numbers that verdicts are tested with have this shape"
    checks = experiment.verdict([raw, other]).checks
    assert all(check.measured is None or math.isfinite(check.measured) for check in checks)
    drawn = pictures(experiment.figure([raw, other]), experiment.title, 2)
    assert bytes(drawn["figure.png"][:4]) == b"\x89PNG"  # type: ignore[arg-type]
    assert REGISTRY[key] is experiment


def test_arms_differ_as_they_are_named() -> None:
    data = images(Settings()).flat()
    nets = {arm: deep_standardization.started(data, 4, 12, arm, 0) for arm in ARMS}
    assert [type(layer) for layer in nets[STANDARDIZED]] == [StandardizedLinear, nn.ReLU] * 3 + [nn.Linear]
    assert all(
        torch.equal(one, two)
        for one, two in zip(nets[STANDARDIZED].parameters(), nets[CLIPPED].parameters(), strict=True)
    )
    scales = [layer.scale for layer in nets[STANDARDIZED] if isinstance(layer, StandardizedLinear)]
    assert scales == [1.0, RELU_GAIN, RELU_GAIN]
    xavier = deep_training.perceptron(data, 4, 12)
    assert [type(layer) for layer in nets["Xavier"]] == [type(layer) for layer in xavier]
    with torch.no_grad():
        x = data.train[:40]
        hidden = {arm: float(orthogonality_gap(nets[arm][:-1](x))) for arm in ("Xavier", ORTHOGONAL)}
    assert hidden[ORTHOGONAL] < hidden["Xavier"]

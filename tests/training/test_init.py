"""Initialisers: Eq. 6 against a singular value decomposition, gaps, whole models, and isometric kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthofast
from orthofast.errors import InputError
from orthofast.training.init import delta_orthogonal_, haar, orthogonal_for_, orthogonalize_

DOUBLE = torch.float64


def gap(h: Tensor) -> float:
    """V(H) of Daneshmand et al. 2021, Eq. 2, written out; columns are samples."""
    gram = h.T @ h
    return float(torch.linalg.matrix_norm(gram / gram.trace() - torch.eye(len(gram), dtype=h.dtype) / len(gram)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relu_features(n: int, d: int = 64) -> Tensor:
    """(d, n)"""
    return torch.relu(torch.randn(d, n, dtype=DOUBLE, generator=seeded(0)))


def equation_6(h: Tensor, out: int, power: float, rotation: Tensor | None) -> Tensor:
    """W before normalisation, from a singular value decomposition; ``rotation`` None: the slice of V."""
    u, s, vh = torch.linalg.svd(h, full_matrices=False)
    k = min(out, len(h))
    turn = vh.T[:out, :k] if rotation is None else rotation
    return turn @ torch.diag(s[:k] ** -power) @ u[:, :k].T


def up_to_signs(made: Tensor, expected: Tensor, h: Tensor) -> None:
    """Singular vectors are known up to sign: with V' fixed to the identity, so are the rows of W."""
    signs = torch.sign((made * expected).sum(1, keepdim=True))
    torch.testing.assert_close(made, signs * expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("out", [64, 40, 90])
def test_the_paper_s_formula_is_that_of_the_singular_value_decomposition(out: int, power: float) -> None:
    h = relu_features(256)
    expected = equation_6(h, out, power, None)  # signs of singular vectors cancel in V' and U
    _, s, _ = torch.linalg.svd(h, full_matrices=False)
    scales = {
        "none": 1.0,
        "sigma": s[: min(out, 64)].pow(1 - power).norm(),
        "output": (expected @ h).norm(),
    }
    for normalize, scale in scales.items():
        made = orthogonal_for_(torch.empty(out, 64, dtype=DOUBLE), h.T, power=power, normalize=normalize)
        torch.testing.assert_close(made, expected / scale, rtol=1e-6, atol=1e-9)


def test_without_rotation_rows_follow_the_singular_directions() -> None:
    h = relu_features(128)
    made = orthogonal_for_(torch.empty(64, 64, dtype=DOUBLE), h.T, rotation="none", normalize="none")
    up_to_signs(made, equation_6(h, 64, 0.5, torch.eye(64, dtype=DOUBLE)), h)


@pytest.mark.parametrize("rotation", ["none", "haar"])
@pytest.mark.parametrize("n", [64, 256, 1024])
def test_an_orthogonal_rotation_gives_the_gap_of_the_square_roots(rotation: str, n: int) -> None:
    h = relu_features(n)
    weight = orthogonal_for_(torch.empty(64, 64, dtype=DOUBLE), h.T, rotation=rotation, generator=seeded(1))
    out = weight @ h
    s = torch.linalg.svdvals(h)
    assert gap(out) == pytest.approx(math.sqrt(float(s.square().sum() / s.sum().square()) - 1 / n), rel=1e-9)
    assert gap(out) < gap(h)
    assert float(out.norm()) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(torch.linalg.svdvals(out), s.sqrt() / s.sqrt().norm(), rtol=1e-9, atol=0)
    flat = orthogonal_for_(torch.empty(64, 64, dtype=DOUBLE), h.T, rotation=rotation, power=1.0, generator=seeded(1))
    least = math.sqrt(max(0.0, 1 / 64 - 1 / n))  # no 64-dimensional representation of n samples goes below
    assert gap(flat @ h) == pytest.approx(least, abs=1e-9)


# gap before, and after with the slice of V and without rotation: means over 20 draws of rectified Gaussian features in
# 64 dimensions, by a singular value decomposition; the widest standard deviations of one draw: 0.0062 and 0.0021
FIGURES = {64: (0.3346, 0.1090, 0.1090), 256: (0.3396, 0.1713, 0.1320), 1024: (0.3387, 0.1854, 0.1389)}


@pytest.mark.parametrize("n", FIGURES)
def test_the_slice_of_v_costs_part_of_the_gain_once_there_are_more_samples_than_features(n: int) -> None:
    h = relu_features(n)
    before, sliced, none = FIGURES[n]
    found = {
        rotation: gap(
            orthogonal_for_(torch.empty(64, 64, dtype=DOUBLE), h.T, rotation=rotation, generator=seeded(2)) @ h
        )
        for rotation in ("paper", "none", "haar")
    }
    assert gap(h) == pytest.approx(before, abs=0.025)
    assert found["paper"] == pytest.approx(sliced, abs=0.009)
    assert found["none"] == pytest.approx(none, abs=0.009)
    assert found["haar"] == pytest.approx(found["none"], rel=1e-9)
    if n > 64:
        assert found["paper"] > found["none"] + 0.02
    else:
        assert found["paper"] == pytest.approx(found["none"], rel=1e-6)  # all of V: orthogonal


def mlp(depth: int = 5, width: int = 24) -> nn.Sequential:
    torch.manual_seed(4)
    layers = [nn.Linear(10, width)] + [nn.Linear(width, width) for _ in range(depth - 2)] + [nn.Linear(width, 1)]
    parts: list[nn.Module] = []
    for layer in layers:
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).double()


def test_a_model_is_written_layer_after_layer_from_what_the_new_weights_make() -> None:
    net, batch = mlp(), torch.randn(80, 10, dtype=DOUBLE)
    first, last = net[0].weight.clone(), net[8].weight.clone()
    bias = net[0].bias.clone()
    assert orthogonalize_(net, batch) == ("2.weight", "4.weight", "6.weight")
    assert torch.equal(net[0].weight, first)
    assert torch.equal(net[0].bias, bias)
    assert torch.equal(net[8].weight, last)
    h = batch
    with torch.no_grad():
        for index, part in enumerate(net):
            if index in (2, 4, 6):
                expected = torch.empty_like(part.weight)
                torch.testing.assert_close(part.weight, orthogonal_for_(expected, h), rtol=1e-9, atol=1e-12)
                assert not part.bias.any()
            h = part(h)


def test_gaps_stay_small_through_depth_where_they_would_grow() -> None:
    batch = torch.randn(96, 10, dtype=DOUBLE)

    def last_gap(net: nn.Sequential) -> float:
        with torch.no_grad():
            return gap(net[:-1](batch).T)

    plain, made = mlp(depth=20), mlp(depth=20)
    orthogonalize_(made, batch)
    assert last_gap(plain) > 0.95
    assert last_gap(made) < 0.6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 1},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "same", "dilation": 2},
    ],
    ids=str,
)
def test_a_convolution_is_the_matrix_of_its_patches(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 8, 3, **options).double()
    net = nn.Sequential(conv)
    images = torch.randn(6, 3, 9, 9, dtype=DOUBLE)
    assert orthogonalize_(net, images, select="0.weight", rotation="none", power=1.0) == ("0.weight",)
    with torch.no_grad():
        outputs = net(images).transpose(0, 1).flatten(1)  # (8, images * places)
    gram = outputs @ outputs.T
    torch.testing.assert_close(gram, torch.eye(8, dtype=DOUBLE) / 8, rtol=0, atol=1e-10)


def test_a_convolution_seen_as_a_matrix_equals_a_linear_layer() -> None:
    conv = nn.Conv2d(6, 5, 1, bias=False).double()
    images = torch.randn(4, 6, 3, 3, dtype=DOUBLE)
    orthogonalize_(conv, images, select="weight", rotation="paper")
    linear = orthogonal_for_(torch.empty(5, 6, dtype=DOUBLE), images.permute(0, 2, 3, 1).reshape(-1, 6))
    torch.testing.assert_close(conv.weight[:, :, 0, 0], linear)


def test_16_bit_weights_hold_the_float64_result_rounded() -> None:
    samples = torch.randn(50, 12)
    exact = orthogonal_for_(torch.empty(12, 12, dtype=DOUBLE), samples)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(orthogonal_for_(torch.empty(12, 12, dtype=dtype), samples), exact.to(dtype))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.unused = nn.Linear(6, 6)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.norm.eval()

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        h = self.drop(self.norm(torch.relu(self.b(input=torch.relu(self.a(x + shift))))))
        return self.d(torch.relu(self.c(torch.relu(self.b(h)))))


def test_modes_hooks_buffers_and_random_state_are_left_as_they_were() -> None:
    net = Stateful()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    modes = {name: module.training for name, module in net.named_modules()}
    random = torch.get_rng_state()
    names = orthogonalize_(net, {"x": torch.randn(20, 6, generator=seeded(0)), "shift": torch.ones(6)})
    assert names == ("b.weight", "c.weight")
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_generator_makes_haar_repeatable() -> None:
    nets = [mlp(), mlp(), mlp()]
    batch = torch.randn(60, 10, dtype=DOUBLE)
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        orthogonalize_(net, batch, rotation="haar", generator=seeded(seed))
    assert torch.equal(nets[0][4].weight, nets[1][4].weight)
    assert not torch.allclose(nets[0][4].weight, nets[2][4].weight)


def test_directions_without_signal_get_no_weight() -> None:
    samples = torch.randn(40, 10, dtype=DOUBLE)
    samples[:, 7:] = 0
    for rotation in ("paper", "none", "haar"):
        weight = orthogonal_for_(torch.empty(10, 10, dtype=DOUBLE), samples, rotation=rotation, power=1.0)
        assert weight[:, 7:].abs().max() < 1e-12
        assert weight.isfinite().all()


BATCH = torch.randn(60, 10, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: orthogonalize_(net, BATCH, power=2), "power needs a number from 0 to 1.*2"),
        (lambda net: orthogonalize_(net, BATCH, rotation="qr"), "rotation needs one of paper, none, haar, got 'qr'"),
        (lambda net: orthogonalize_(net, BATCH, normalize="l2"), "normalize needs one of"),
        (lambda net: orthogonalize_(net, BATCH[:20]), "2.weight: samples needs at least 24 rows.*got 20"),
        (lambda net: orthogonalize_(net[:3], BATCH), "between the first and the last that run, got 2"),
        (lambda net: orthogonalize_(net, BATCH * 0, select="0.weight"), "0.weight: samples are all zero"),
        (lambda net: orthogonalize_(net, BATCH, select="8.weight"), "8.weight holds 1 vector"),
        (lambda net: orthogonalize_(nn.Conv1d(2, 3, 1), BATCH, select="weight"), "of a Conv1d, but only"),
        (
            lambda net: orthogonalize_(nn.Conv2d(2, 4, 1, groups=2), BATCH, select="weight"),
            "only a Linear or a Conv2d of one group",
        ),
        (
            lambda net: orthogonalize_(Stateful().double(), (BATCH[:, :6],), select="*"),
            "missing 1 required keyword-only argument",
        ),
        (lambda net: orthogonal_for_(torch.empty(3, 4), torch.ones(9, 5)), r"samples needs shape \(n, 4\)"),
        (
            lambda net: orthogonal_for_(torch.empty(6, 4), torch.randn(9, 4), rotation="none"),
            "rotation='none' needs out <= in",
        ),
        (lambda net: delta_orthogonal_(torch.empty(3, 4)), "1 to 3 kernel dimensions"),
        (lambda net: delta_orthogonal_(torch.empty(4, 2, 3), groups=3), "groups needs a divisor of the 4 filters"),
    ],
    ids=[
        "power", "rotation", "normalize", "few", "shallow", "zeros", "lone", "conv1d", "groups", "arguments", "samples",
        "none_wide", "matrix", "delta_groups",
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_the_weights(call: Callable[[nn.Module], Any], message: str) -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((InputError, TypeError), match=message):
        call(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_selected_layer_that_does_not_run_is_named() -> None:
    net = Stateful()
    with pytest.raises(InputError, match=r"unused\.weight did not run on this batch"):
        orthogonalize_(net, {"x": torch.randn(20, 6), "shift": torch.ones(6)}, select=["b", "unused"])


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((6, 6, 3, 3), 1), ((8, 5, 3, 3), 1), ((5, 8, 3, 3), 1), ((4, 3, 5), 1), ((4, 4, 2, 2), 1), ((6, 2, 3, 3), 3)],
    ids=str,
)
def test_a_delta_kernel_is_an_isometry_under_circular_padding(shape: tuple[int, ...], groups: int) -> None:
    kernel = delta_orthogonal_(torch.empty(shape, dtype=DOUBLE), gain=1.5, groups=groups, generator=seeded(3))
    extent = 8
    axes = tuple(range(2, len(shape)))
    for block in kernel.split(shape[0] // groups):
        # one (out, in) matrix per frequency: its singular values are those of the convolution
        spectrum = torch.fft.fftn(block, s=[extent] * len(axes), dim=axes).flatten(2).permute(2, 0, 1)
        values = torch.linalg.svdvals(spectrum)
        assert values.numel() == extent ** len(axes) * min(shape[0] // groups, shape[1])
        torch.testing.assert_close(values, torch.full_like(values, 1.5), rtol=1e-12, atol=0)
    flat = torch.nn.init.orthogonal_(torch.empty(shape, dtype=DOUBLE))
    if groups == 1:
        spectrum = torch.fft.fftn(flat, s=[extent] * len(axes), dim=axes).flatten(2).permute(2, 0, 1)
        assert torch.linalg.svdvals(spectrum).std() > 0.05


def test_delta_kernels_are_repeatable_and_rounded_to_the_weight() -> None:
    exact = delta_orthogonal_(torch.empty(4, 4, 3, dtype=DOUBLE), generator=seeded(0))
    assert torch.equal(delta_orthogonal_(torch.empty(4, 4, 3), generator=seeded(0)), exact.float())
    assert torch.equal(
        delta_orthogonal_(torch.empty(4, 4, 3, dtype=torch.bfloat16), generator=seeded(0)), exact.bfloat16()
    )


def test_random_matrices_are_orthonormal_on_the_smaller_side_and_unbiased() -> None:
    tall, wide = haar(7, 4), haar(4, 7)
    torch.testing.assert_close(tall.T @ tall, torch.eye(4, dtype=DOUBLE))
    torch.testing.assert_close(wide @ wide.T, torch.eye(4, dtype=DOUBLE))
    generator = seeded(0)
    traces = torch.stack([torch.trace(haar(3, 3, generator=generator)) for _ in range(4000)])
    # uniform over O(3): E tr = 0, E tr^2 = 1; without the signs of R the mean is off by far more
    assert abs(traces.mean().item()) < 4 / math.sqrt(4000)
    assert traces.square().mean().item() == pytest.approx(1, abs=0.1)


def test_it_stands_in_the_facade() -> None:
    assert orthofast.orthogonalize_ is orthogonalize_

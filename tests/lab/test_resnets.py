"""The CIFAR ResNets: published sizes, the forward pass written out, what each variant changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast import metrics
from orthofast.errors import InputError
from orthofast.lab import cifar_resnet
from orthofast.lab.resnets import VARIANTS


def count(model: nn.Module, kind: type[nn.Module] = nn.Module) -> int:
    own = (p for module in model.modules() if isinstance(module, kind) for p in module.parameters(recurse=False))
    return sum(parameter.numel() for parameter in own)


# millions in He et al. 2016, Table 6; 1202 in its text
@pytest.mark.parametrize(
    ("depth", "published"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_parameters_are_as_many_as_published(depth: int, published: float) -> None:
    with torch.device("meta"):
        model = cifar_resnet(depth)
    digits = 1 if published > 1 else 2
    assert round(count(model) / 1e6, digits) == published


@pytest.mark.parametrize("depth", [8, 56])
def test_parameters_are_as_many_as_the_layers_say(depth: int) -> None:
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    post = 2 * (16 + 2 * n * (16 + 32 + 64))
    # pre-activation: each block's first normalisation has the width that enters
    pre = 2 * (16 * (n + 1) + 32 * (n - 1 + 1) + 64 * (n - 1)) + 2 * n * (16 + 32 + 64)
    normalizations = {
        "post": post,
        "last_bn": post + 128,
        "bn_before_pool": post + 128,
        "scaled": post,
        "only_bn_before_pool": 128,
        "preact": pre + 128,
        "preact_v1": pre,
    }
    for variant, expected in normalizations.items():
        with torch.device("meta"):
            model = cifar_resnet(depth, variant, classes=100)
        assert count(model, nn.Conv2d) == convolutions
        assert count(model, nn.modules.batchnorm._BatchNorm) == expected
        assert count(model) == convolutions + expected + 6500


def written_out(model: nn.Module, x: Tensor, variant: str) -> Tensor:
    """The forward pass of training mode from the convolutions and scales in their order, as the paper's code has it."""
    kernels = iter([m.weight for m in model.modules() if isinstance(m, nn.Conv2d)])
    scales = iter([m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)])
    preact = variant.startswith("preact")

    def bn(h: Tensor) -> Tensor:
        if variant == "only_bn_before_pool" and h.shape[-1] != x.shape[-1] // 4:
            return h
        m = next(scales)
        return functional.batch_norm(h, None, None, m.weight, m.bias, training=True)

    def conv(h: Tensor, stride: int = 1) -> Tensor:
        return functional.conv2d(h, next(kernels), stride=stride, padding=1)

    def identity(h: Tensor, out: int, stride: int) -> Tensor:
        h = functional.avg_pool2d(h, 1, stride)
        return h if h.shape[1] == out else torch.cat([h, 0 * h], 1)

    skip = variant == "only_bn_before_pool"
    plain = (lambda h: h) if skip else bn
    h = conv(x)
    if not preact:
        h = torch.relu(plain(h))
    blocks = len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) // 6
    for stage, out in enumerate((16, 32, 64)):
        for number in range(blocks):
            stride = 2 if stage and not number else 1
            if preact:
                active = torch.relu(bn(h))
                along = identity(active if number == 0 else h, out, stride)
                h = conv(torch.relu(bn(conv(active, stride)))) + along
            else:
                branch = conv(torch.relu(plain(conv(h, stride))))
                h = torch.relu(plain(branch) + identity(h, out, stride))
    if variant in ("preact", "bn_before_pool", "only_bn_before_pool"):
        h = bn(h)
    if preact:
        h = torch.relu(h)
    h = functional.avg_pool2d(h, h.shape[-1]).flatten(1)
    if variant == "last_bn":
        h = bn(h)
    if variant == "scaled":
        h = h / math.sqrt(3 * blocks)
    assert next(kernels, None) is None
    assert next(scales, None) is None
    return functional.linear(h, model.classifier.weight, model.classifier.bias)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_pass_is_the_one_written_out(variant: str) -> None:
    model = cifar_resnet(14, variant).double()
    for module in model.modules():  # scales that a wrong place would show
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), written_out(model, x, variant), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant: str) -> None:
    model = cifar_resnet(8, variant)
    loss = functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_weights_start_as_the_papers_code_draws_them() -> None:
    model = cifar_resnet(20, "last_bn", last_gamma="uniform")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * module.out_channels)), rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all() & (module.bias == 0).all())
    assert 0.1 < model.classifier.weight.abs().max() <= 0.125
    assert not model.classifier.bias.any()
    gamma = model.last_normalization.weight
    assert bool((gamma >= 0).all() & (gamma < 1).all())
    assert gamma.std() > 0.2
    assert bool((cifar_resnet(8, "last_bn").last_normalization.weight == 1).all())


def test_features_grow_with_depth_and_a_last_batch_normalisation_ends_that() -> None:
    images = torch.randn(64, 3, 16, 16)
    largest = {}
    for variant in ("post", "last_bn", "scaled"):
        for depth in (8, 50):
            with torch.no_grad():
                h = cifar_resnet(depth, variant).features(images)
            largest[variant, depth] = metrics.lambda_max(h.T @ h / 64).item()
    assert largest["post", 50] > 3 * largest["post", 8]
    assert largest["scaled", 50] < 2 * largest["scaled", 8]
    assert max(largest["last_bn", depth] for depth in (8, 50)) < 64  # the trace


def test_scale_and_widths_are_as_asked() -> None:
    torch.manual_seed(3)
    one = cifar_resnet(8, "scaled", scale=1.0).eval()
    torch.manual_seed(3)
    four = cifar_resnet(8, "scaled", scale=4.0).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one.features(x), 4 * four.features(x))
    assert cifar_resnet(8, widen=2, classes=7).classifier.weight.shape == (7, 128)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"depth": 21}, "depth"),
        ({"depth": 2}, "depth"),
        ({"depth": 8.0}, "depth"),
        ({"depth": 8, "variant": "wide"}, "variant"),
        ({"depth": 8, "classes": 0}, "classes"),
        ({"depth": 8, "widen": 0}, "widen"),
        ({"depth": 8, "scale": 2.0}, "scale"),
        ({"depth": 8, "variant": "scaled", "scale": 0.0}, "scale"),
        ({"depth": 8, "last_gamma": "uniform"}, "last_gamma"),
    ],
)
def test_bad_arguments_are_named(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named} needs"):
        cifar_resnet(**options)

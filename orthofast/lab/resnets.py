"""The CIFAR ResNets of Huang et al. 2020: any depth 6 n + 2, with and without batch normalisation at the end.

A 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels, the mean over positions, a linear layer.
Shortcuts have no parameters (type A): every second position, zeros for the new channels. Weights of convolutions are
N(0, 2 / (9 out)), of the linear layer U(+-1 / sqrt(64)), biases 0, scales of batch normalisation 1, as in the paper's
code. Without the paper's variants these are the networks of He et al. 2016, Section 4.2, and Section 4.1 of their
second paper (pre-activation).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError

WIDTHS = (16, 32, 64)
# variant: blocks with activations before convolutions, where else batch normalisation stands
VARIANTS = {
    "post": "post-activation blocks, ResNet",
    "last_bn": "post, one more batch normalisation between pooling and the linear layer: ResNet_LastBN",
    "preact": "pre-activation blocks, batch normalisation and ReLU before pooling: PreResNet",
    "preact_v1": "preact without that batch normalisation, ReLU kept: PreResNet_v1",
    "bn_before_pool": "post, one more batch normalisation before pooling",
    "only_bn_before_pool": "post without any batch normalisation but one before pooling",
    "scaled": "post, features divided by a constant before the linear layer",
}


def cifar_resnet(
    depth: int,
    variant: str = "post",
    *,
    classes: int = 10,
    widen: int = 1,
    scale: float | None = None,
    last_gamma: str = "ones",
) -> CifarResNet:
    """A residual network for 32 x 32 colour images, (N, 3, 32, 32) to (N, classes).

    Huang et al. 2020, Section 5 and Table 1: depths 56, 110, 230, 1202 and 2402 of the first four variants.

    ===================  =========================================================================================
    variant              differs from "post" by
    ===================  =========================================================================================
    post                 convolution, BN, ReLU, convolution, BN, plus shortcut, ReLU
    last_bn              a BN of 64 features between pooling and the linear layer
    preact               BN, ReLU, convolution, BN, ReLU, convolution, plus shortcut; BN and ReLU before pooling
    preact_v1            as preact, without the BN before pooling
    bn_before_pool       a BN before pooling
    only_bn_before_pool  that BN and no other; does not train at depth 1202
    scaled               features divided by ``scale`` before the linear layer
    ===================  =========================================================================================

    Args:
        depth: 6 n + 2, at least 8: convolutions and the linear layer.
        variant: see above.
        classes: outputs.
        widen: multiplies all widths.
        scale: of "scaled", whose constants the paper does not give; by default ``sqrt(3 n)``, by which features grow
            with the number of blocks.
        last_gamma: of "last_bn": "ones", or "uniform" for U(0, 1) as the layer of the paper's framework started.

    Raises:
        InputError: if an argument cannot be used.

    >>> model = cifar_resnet(20)
    >>> sum(parameter.numel() for parameter in model.parameters())
    269722
    """
    if type(depth) is not int or depth < 8 or (depth - 2) % 6:
        raise InputError(f"depth needs 6 n + 2 with n at least 1, such as 20, 56 or 110, got {depth!r}")
    if variant not in VARIANTS:
        raise InputError(f"variant needs one of {', '.join(VARIANTS)}, got {variant!r}")
    for name, number in (("classes", classes), ("widen", widen)):
        if type(number) is not int or number < 1:
            raise InputError(f"{name} needs a positive integer, got {number!r}")
    if last_gamma not in ("ones", "uniform") or (last_gamma == "uniform" and variant != "last_bn"):
        raise InputError(f'last_gamma needs "ones", or "uniform" with variant="last_bn", got {last_gamma!r}')
    if scale is not None and (variant != "scaled" or not scale > 0):
        raise InputError(f'scale needs a positive number with variant="scaled", got {scale!r} with {variant!r}')
    blocks = (depth - 2) // 6
    if variant == "scaled" and scale is None:
        scale = math.sqrt(3 * blocks)
    return CifarResNet(blocks, variant, classes, widen, scale, last_gamma)


class CifarResNet(nn.Module):
    """What :func:`cifar_resnet` makes; ``features`` gives what enters ``classifier``, the layer the paper watches.

    Args:
        blocks: n per stage.
        variant: key of ``VARIANTS``.
        classes: outputs.
        widen: multiplies all widths.
        scale: divides the features.
        last_gamma: start of the last batch normalisation's scale.
    """

    def __init__(
        self, blocks: int, variant: str, classes: int, widen: int, scale: float | None, last_gamma: str
    ) -> None:
        super().__init__()
        widths = [width * widen for width in WIDTHS]
        preact, normalized = variant.startswith("preact"), variant != "only_bn_before_pool"
        self.scale = scale
        self.stem = nn.Sequential(_convolution(3, widths[0]))
        if not preact:
            self.stem.extend([_normalization(widths[0], normalized), nn.ReLU()])
        stages, width = [], widths[0]
        for stage, out in enumerate(widths):
            row: list[nn.Module] = []
            for number in range(blocks):
                first = number == 0
                stride = 2 if first and stage else 1
                row.append(
                    PreActivationBlock(width, out, stride, shared=first)
                    if preact
                    else PostActivationBlock(width, out, stride, normalized)
                )
                width = out
            stages.append(nn.Sequential(*row))
        self.stages = nn.Sequential(*stages)
        before_pool = variant in ("preact", "bn_before_pool", "only_bn_before_pool")
        self.before_pool = nn.Sequential(_normalization(width, before_pool), nn.ReLU() if preact else nn.Identity())
        self.last_normalization = nn.BatchNorm1d(width) if variant == "last_bn" else nn.Identity()
        self.classifier = nn.Linear(width, classes)
        self._initialize(last_gamma)

    def _initialize(self, last_gamma: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
        bound = 1 / math.sqrt(self.classifier.in_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)
        if last_gamma == "uniform" and isinstance(self.last_normalization, nn.BatchNorm1d):
            nn.init.uniform_(self.last_normalization.weight)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 64 widen): what enters the linear layer."""
        maps = self.before_pool(self.stages(self.stem(images)))
        found: Tensor = self.last_normalization(maps.mean((2, 3)))
        return found if self.scale is None else found / self.scale

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        found: Tensor = self.classifier(self.features(images))
        return found


class PostActivationBlock(nn.Module):
    """``relu(shortcut(x) + BN(conv(relu(BN(conv(x))))))``.

    Args:
        width: channels that enter.
        out: channels that leave.
        stride: of the first convolution.
        normalized: False leaves both batch normalisations out.
    """

    def __init__(self, width: int, out: int, stride: int, normalized: bool = True) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(width, out, stride),
            _normalization(out, normalized),
            nn.ReLU(),
            _convolution(out, out),
            _normalization(out, normalized),
        )
        self.out, self.stride = out, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, out, H / stride, W / stride)."""
        return torch.relu(self.branch(x) + shortcut(x, self.out, self.stride))


class PreActivationBlock(nn.Module):
    """``shortcut(x) + conv(relu(BN(conv(relu(BN(x))))))``.

    Args:
        width: channels that enter.
        out: channels that leave.
        stride: of the first convolution.
        shared: the first BN and ReLU stand before the shortcut too, as in the first block of a stage.
    """

    def __init__(self, width: int, out: int, stride: int, shared: bool) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.branch = nn.Sequential(
            _convolution(width, out, stride), nn.BatchNorm2d(out), nn.ReLU(), _convolution(out, out)
        )
        self.out, self.stride, self.shared = out, stride, shared

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, out, H / stride, W / stride)."""
        active = self.activation(x)
        branch: Tensor = self.branch(active)
        return branch + shortcut(active if self.shared else x, self.out, self.stride)


def shortcut(x: Tensor, out: int, stride: int) -> Tensor:
    """Type A of He et al. 2016: every ``stride``-th position, zeros appended for new channels."""
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    missing = out - x.shape[1]
    return functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _convolution(width: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride, padding=1, bias=False)


def _normalization(width: int, there: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if there else nn.Identity()

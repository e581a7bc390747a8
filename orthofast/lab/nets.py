"""The small networks of the papers: perceptrons with and without batch normalisation or shortcuts, a convolutional one.

Lu et al. 2024 (Tables 1 to 3), Daneshmand et al. 2021 (Section 5), Huang et al. 2020 (Sections 3 and 4) and Annamalai
et al. 2022 (784-300-10) all train perceptrons; they differ in where the batch normalisation stands and how weights
start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from orthofast.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}
INITS = ("uniform", "he", "orthogonal", "xavier", "lecun")


def initialize_(module: nn.Module, init: str = "uniform") -> nn.Module:
    """Draw the weights of all linear layers of a module anew, in place; biases become 0.

    ============  ======================================================================================
    uniform       U(+-1 / sqrt(in)), variance 1 / (3 in): "random" in Huang et al. 2020, "U-init" in Lu et al. 2024
    he            N(0, 2 / in)
    orthogonal    orthonormal rows or columns, whichever are fewer
    xavier        U(+-sqrt(6 / (in + out)))
    lecun         N(0, 1 / in)
    ============  ======================================================================================

    Behind a ReLU, mean squares shrink to 1 / 6 per layer under "uniform" and stay under "he".

    Args:
        module: whose ``nn.Linear`` parts are drawn, with torch's global random numbers.
        init: see above.

    Returns:
        The module.

    Raises:
        InputError: if the initialisation is not known.

    >>> initialize_(torch.nn.Linear(4, 2), "orthogonal").bias.tolist()
    [0.0, 0.0]
    """
    if init not in INITS:
        raise InputError(f"init needs one of {', '.join(INITS)}, got {init!r}")
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        inputs = layer.in_features
        if init == "uniform":
            nn.init.uniform_(layer.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        elif init == "orthogonal":
            nn.init.orthogonal_(layer.weight)
        elif init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=math.sqrt((2 if init == "he" else 1) / inputs))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return module


def mlp(
    widths: Sequence[int],
    *,
    activation: str = "relu",
    normalization: str = "none",
    init: str = "uniform",
    bias: bool = False,
    eps: float = 1e-5,
) -> nn.Sequential:
    """A perceptron, (N, widths[0]) to (N, widths[-1]): linear, batch normalisation, activation, and so on.

    Huang et al. 2020, Eq. 3, without biases: ``[144, *[24] * 7, 10]`` in Fig. 1, ``[784, *[256] * 19, 10]`` in Fig. 3.
    Daneshmand et al. 2021: widths of 100, "hidden". Annamalai et al. 2022: ``[784, 300, 10]``, "every".

    Args:
        widths: inputs, hidden layers, outputs.
        activation: "relu", "gelu", "tanh", "sigmoid" or "linear", behind every layer but the last.
        normalization: "none", "hidden" (batch normalisation behind every linear layer but the last) or "every".
        init: of the weights, as in :func:`initialize_`.
        bias: of the linear layers; starts at 0.
        eps: of the batch normalisation.

    Raises:
        InputError: if an argument cannot be used.

    >>> [type(module).__name__ for module in mlp([784, 300, 10], normalization="hidden")]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    _check_widths(widths)
    if normalization not in ("none", "hidden", "every"):
        raise InputError(f'normalization needs "none", "hidden" or "every", got {normalization!r}')
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=2):
        last = number == len(widths)
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if normalization == "every" or (normalization == "hidden" and not last):
            layers.append(nn.BatchNorm1d(outputs, eps=eps))
        if not last:
            layers.append(_activation(activation))
    model = nn.Sequential(*layers)
    initialize_(model, init)
    return model


class NormalizedResidualMLP(nn.Module):
    """The normalised residual network of Lu et al. 2024, Eq. 2 and 3: ``x_l = BN(x_{l-1} + f(W_l x_{l-1} + b_l))``.

    An input layer with activation, hidden layers of equal width as above, an output layer. Their code uses one batch
    normalisation for all hidden layers: then ``eval()`` gives each layer the statistics of all, and accuracy is lost.

    Args:
        inputs: width of the inputs.
        width: of the hidden layers; 500 in the paper's Table 3.
        hidden: how many; 5 there.
        outputs: width of the outputs.
        activation: as in :func:`mlp`.
        normalize: False leaves the batch normalisation out.
        residual: False leaves the shortcut out; without both it is the "Original" of Table 3.
        shared: one batch normalisation for all hidden layers, as in the paper's code.
        init: as in :func:`initialize_`.

    Raises:
        InputError: if an argument cannot be used.

    >>> NormalizedResidualMLP(64, 32, 3, 10)(torch.randn(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        hidden: int,
        outputs: int,
        *,
        activation: str = "relu",
        normalize: bool = True,
        residual: bool = True,
        shared: bool = False,
        init: str = "uniform",
    ) -> None:
        super().__init__()
        _check_widths([inputs, width, hidden, outputs])
        self.residual = residual
        self.activation = _activation(activation)
        self.first = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(hidden))
        different = 1 if shared else hidden
        self.normalizations = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(different if normalize else 0))
        self.last = nn.Linear(width, outputs)
        initialize_(self, init)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        x = self.activation(self.first(x))
        for number, layer in enumerate(self.hidden):
            branch = self.activation(layer(x))
            x = x + branch if self.residual else branch
            if len(self.normalizations):
                x = self.normalizations[min(number, len(self.normalizations) - 1)](x)
        found: Tensor = self.last(x)
        return found


class ConvNet(nn.Module):
    """The convolutional network of Lu et al. 2024, Table 2: three of 3 x 3, each halved by pooling, two linear layers.

    Args:
        channels: of the images.
        widths: of the convolutions; (64, 128, 256) in the paper.
        size: side of the images, a multiple of 8; 32 there.
        hidden: width of the first linear layer; 512 there.
        classes: outputs.
        normalize: batch normalisation behind the first two activations, as the published script has it; the text has
            none.

    Raises:
        InputError: if an argument cannot be used.

    >>> ConvNet(1, (4, 8, 16), 8, 32)(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256),
        size: int = 32,
        hidden: int = 512,
        classes: int = 10,
        *,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        _check_widths([channels, *widths, size, hidden, classes])
        if len(widths) != 3 or size % 8:
            raise InputError(f"widths and size need three widths and a multiple of 8, got {list(widths)} and {size}")
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise((channels, *widths))):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            if normalize and number < 2:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(widths[2] * (size // 8) ** 2, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, size, size) to (N, classes)."""
        found: Tensor = self.classifier(self.features(images))
        return found


def constant_(layer: nn.Module, value: float = 0.1) -> nn.Module:
    """All weights and biases of a layer set to one number: the "Layer_1" of Lu et al. 2024, whose PII starts at 1.

    Args:
        layer: any module with parameters.
        value: 0.1 in the paper's code.

    >>> from orthofast import pii
    >>> round(pii(constant_(torch.nn.Linear(5, 4)).weight.detach()).item(), 6)
    1.0
    """
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise InputError(f"activation needs one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2 or not all(type(width) is int and width > 0 for width in widths):
        raise InputError(f"widths need positive integers, inputs and outputs at least, got {list(widths)!r}")

"""Random networks of today's parts: plain and residual perceptrons, transformer blocks, weights that are standardised.

What they do to the cosine of two samples is known where they are wide: :func:`cosine_map`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from orthofast.errors import InputError


class Unit(nn.Module):
    """Passes its input on; what its part ``rows`` is given is the same with every vector of length 1, to be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged."""
        self.rows(functional.normalize(x, dim=-1))
        return x


RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))  # 1 / standard deviation of a ReLU of N(0, 1)
NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm1d,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "none": lambda width: Unit(),
}
PER_SAMPLE = ("LayerNorm", "RMSNorm")  # what transformers use
NODES, TERMS = 80, 32  # of the quadrature, of the power series
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "linear": lambda x: x,
}


def _normal_points() -> tuple[Tensor, Tensor]:
    """Points and weights of the mean over ``N(0, 1)``, each (NODES,) float64."""
    points, weights = (torch.from_numpy(one) for one in numpy.polynomial.hermite_e.hermegauss(NODES))
    return points, weights / weights.sum()


@cache
def _hermite_shares(activation: str) -> list[float]:
    """Squares of an activation's coefficients in normalised Hermite polynomials, by degree, scaled to sum 1."""
    points, weights = _normal_points()
    values = MAPS[activation](points) * weights
    lower, polynomial = torch.zeros_like(points), torch.ones_like(points)
    shares = []
    for degree in range(TERMS):
        shares.append(float((values * polynomial).sum()) ** 2)
        rising = points * polynomial - math.sqrt(degree) * lower
        lower, polynomial = polynomial, rising / math.sqrt(degree + 1)
    return [share / sum(shares) for share in shares]


def _silu_gain() -> float:
    """1 over the root mean square of ``silu(u) v``, u and v independent ``N(0, 1)``."""
    points, weights = _normal_points()
    return float((functional.silu(points) ** 2 * weights).sum().rsqrt())


SILU_GAIN = _silu_gain()


def cosine_map(activation: str, cosines: Tensor) -> Tensor:
    """Cosine of two samples behind a wide random layer with an activation, from their cosine before it.

    For weights drawn from ``N(0, 1 / in)`` and samples of length ``sqrt(width)``, u and v are Gaussian with correlation
    c, and the cosine is ``E[f(u) f(v)] / E[f(u)^2]``. ReLU in closed form (Cho and Saul 2009); of smooth f the power
    series in c whose coefficients are the squared Hermite coefficients of f. "swiglu" is ``silu(W x) * (V x)`` with
    independent W and V: c times the map of silu.

    Args:
        activation: "relu", "gelu", "silu", "linear" or "swiglu".
        cosines: of any shape.

    Returns:
        Of the same shape, float64.

    Raises:
        InputError: if the activation is not known.

    >>> cosine_map("relu", torch.tensor([0.0, 1.0])).tolist() == [1 / math.pi, 1.0]
    True
    >>> [round(value, 3) for value in cosine_map("swiglu", torch.tensor([0.0, 0.5, 1.0])).tolist()]
    [0.0, 0.257, 1.0]
    """
    if activation != "swiglu" and activation not in MAPS:
        raise InputError(f"activation needs one of {', '.join((*MAPS, 'swiglu'))}, got {activation!r}")
    c = cosines.to(torch.float64).clamp(-1, 1)
    if activation == "relu":
        return ((1 - c * c).sqrt() + (math.pi - c.acos()) * c) / math.pi
    if activation == "swiglu":
        return c * cosine_map("silu", c)
    found = torch.zeros_like(c)
    for share in reversed(_hermite_shares(activation)):  # Horner's rule
        found = found * c + share
    return found


def random_linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer without bias, entries from ``N(0, gain^2 / inputs)``."""
    layer: nn.Linear = skip_init(nn.Linear, inputs, outputs, bias=False)  # type: ignore[arg-type, unused-ignore]
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


def plain_perceptron(
    inputs: int, width: int, depth: int, normalization: str, activation: str = "relu"
) -> nn.Sequential:
    """So many blocks of activation (not in the first), linear layer, normalisation, or "unit" in place of "none".

    The order of Daneshmand et al. 2021, Appendix Figure 6, but for the activation of the input. Equal random numbers
    give equal weights, whatever the normalisation.

    Args:
        inputs: width of the input.
        width: of all layers.
        depth: linear layers.
        normalization: "batch norm", "LayerNorm", "RMSNorm" or "none".
        activation: "relu" (weights with gain sqrt(2)) or "linear".

    >>> [name for name, _ in plain_perceptron(5, 4, 2, "RMSNorm").named_children()]
    ['0', '1']
    """
    blocks = []
    for number in range(depth):
        rectified = number > 0 and activation == "relu"
        linear = random_linear(inputs if number == 0 else width, width, math.sqrt(2) if rectified else 1.0)
        block = nn.Sequential(nn.ReLU()) if rectified else nn.Sequential()
        block.append(linear)
        block.add_module("unit" if normalization == "none" else "norm", NORMALIZATIONS[normalization](width))
        blocks.append(block)
    return nn.Sequential(*blocks)


class ResidualBlock(nn.Module):
    """``x + W_2 relu(W_1 norm(x))``, (N, width) to the same; the branch has unit mean square where its input has."""

    def __init__(self, width: int, normalization: str) -> None:
        super().__init__()
        self.norm = nn.Identity() if normalization == "none" else NORMALIZATIONS[normalization](width)
        self.first = random_linear(width, width)
        self.second = random_linear(width, width, math.sqrt(2))
        self.unit = Unit() if normalization == "none" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to the same."""
        found: Tensor = self.unit(x + self.second(torch.relu(self.first(self.norm(x)))))
        return found


def residual_perceptron(inputs: int, width: int, depth: int, normalization: str) -> nn.Sequential:
    """A linear layer with normalisation, then so many pre-norm residual blocks."""
    stem = plain_perceptron(inputs, width, 1, normalization)
    return nn.Sequential(*stem, *(ResidualBlock(width, normalization) for _ in range(depth)))


class Attention(nn.Module):
    """Self-attention between all positions, four projections without bias, rotary positions on request.

    For vectors of unit mean square, logits start with a standard deviation of 0.3, as GPT-2's do (entries of 0.02,
    width 768): attention is nearly uniform.

    Args:
        width: of the vectors.
        heads: a divisor of ``width`` that leaves an even number for each.
        rotary: turn queries and keys by angles that grow with the position (Su et al. 2021), as LLaMA does.
    """

    def __init__(self, width: int, heads: int, *, rotary: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise InputError(f"heads needs a divisor of width / 2 = {width / 2:g}, got {heads}")
        self.heads, self.rotary = heads, rotary
        self.q_proj, self.k_proj = (random_linear(width, width, math.sqrt(0.3)) for _ in range(2))
        self.v_proj, self.o_proj = (random_linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, positions, width) to the same."""
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary:
            q, k = rotated(q), rotated(k)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return found


def rotated(x: Tensor) -> Tensor:
    """Pairs (i, i + size / 2) of (..., positions, size) turned by ``position * 10000^(-2 i / size)``; lengths stay."""
    positions, size = x.shape[-2:]
    speeds = 10_000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)  # (size / 2,)
    angles = torch.arange(positions, device=x.device)[:, None] * speeds
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    """``W_2 f(x)``: f a ReLU of W_1 x, or gated, ``silu(W x) * (V x)``; unit mean square in, unit mean square out."""

    def __init__(self, width: int, inner: int, *, gated: bool) -> None:
        super().__init__()
        self.gate_proj = random_linear(width, inner) if gated else None
        self.up_proj = random_linear(width, inner)
        self.down_proj = random_linear(inner, width, SILU_GAIN if gated else math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, positions, width) to the same."""
        up = self.up_proj(x)
        found: Tensor = self.down_proj(
            torch.relu(up) if self.gate_proj is None else functional.silu(self.gate_proj(x)) * up
        )
        return found


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each with normalisation and shortcut.

    Args:
        width: of the residual stream.
        heads: of the attention.
        normalization: "LayerNorm" (feed-forward layer with ReLU, 4 times as wide) or "RMSNorm" (rotary positions and a
            gated feed-forward layer, 8/3 times as wide: LLaMA's block without its causal mask).
        before: normalise what enters a branch (pre-norm), or the sum of branch and shortcut (post-norm).
    """

    def __init__(self, width: int, heads: int, normalization: str, *, before: bool) -> None:
        super().__init__()
        if normalization not in PER_SAMPLE:
            raise InputError(f"normalization needs one of {', '.join(PER_SAMPLE)}, got {normalization!r}")
        gated = normalization == "RMSNorm"
        self.before = before
        self.self_attn = Attention(width, heads, rotary=gated)
        self.mlp = FeedForward(width, 8 * width // 3 if gated else 4 * width, gated=gated)
        self.norm1, self.norm2 = (NORMALIZATIONS[normalization](width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, positions, width) to the same."""
        for norm, branch in ((self.norm1, self.self_attn), (self.norm2, self.mlp)):
            x = x + branch(norm(x)) if self.before else norm(x + branch(x))
        return x


class ImageTransformer(nn.Module):
    """Classifies images; a token is a row of pixels, and the mean token goes into the last layer.

    Rows are embedded, positions learned from ``N(0, 0.02^2)`` are added unless they are rotary, the sum is normalised.
    ``images.0`` is given the mean tokens behind the embedding, ``images.5`` those behind the fifth block; ``blocks.0``
    is the embedding.

    Args:
        shape: (channels, height, width) of the images.
        width: of the residual stream.
        depth: transformer blocks.
        heads: of the attention.
        classes: outputs.
        normalization: as in :class:`TransformerBlock`, like ``before``.
        before: see there.

    >>> ImageTransformer((1, 8, 8), 16, 2, 2, 10, "RMSNorm", before=True)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        classes: int,
        normalization: str,
        *,
        before: bool,
    ) -> None:
        super().__init__()
        channels, height, across = shape
        self.embedding = random_linear(channels * across, width)
        absolute = normalization == "LayerNorm"
        self.positions = nn.Parameter(0.02 * torch.randn(height, width)) if absolute else None
        blocks = [TransformerBlock(width, heads, normalization, before=before) for _ in range(depth)]
        self.blocks = nn.ModuleList([NORMALIZATIONS[normalization](width), *blocks])
        self.images = nn.ModuleList(nn.Identity() for _ in range(depth + 1))
        self.norm = NORMALIZATIONS[normalization](width) if before else nn.Identity()
        self.last = random_linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) to (N, classes)."""
        x = self.embedding(images.transpose(1, 2).flatten(2))  # (N, height, width of the stream)
        x = x if self.positions is None else x + self.positions
        for block, watched in zip(self.blocks, self.images, strict=True):
            x = block(x)
            watched(x.mean(1))
        found: Tensor = self.last(self.norm(x).mean(1))
        return found


class StandardizedLinear(nn.Linear):
    """A linear layer with scaled weight standardisation (Brock et al. 2021), in place of batch normalisation.

    Row i of the weight in use is ``gain_i * scale * (w_i - mean(w_i)) / (sqrt(in) * std(w_i))``, std of a population:
    mean 0 and variance ``(gain_i scale)^2 / in`` whatever w_i is. ``gain_i`` is learned from 1.

    Args:
        inputs: width of the input.
        outputs: rows of the weight.
        scale: 1 over the standard deviation of the inputs: :data:`RELU_GAIN` behind a ReLU of N(0, 1).
        eps: added to the variance of ``sqrt(in) w_i``.

    >>> layer = StandardizedLinear(50, 3, scale=2.0)
    >>> [round(value, 2) for value in (layer.standardized() ** 2).sum(1).tolist()]
    [4.0, 4.0, 4.0]
    """

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0, eps: float = 1e-4) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=1 / math.sqrt(inputs))
        self.gain = nn.Parameter(torch.ones(outputs, 1))
        self.scale, self.eps = scale, eps

    def standardized(self) -> Tensor:
        """(outputs, inputs): the weight in use."""
        # layer_norm's population statistics, eps relative to the variance of sqrt(in) w
        rows = functional.layer_norm(self.weight, (self.in_features,), eps=self.eps / self.in_features)
        return rows * (self.gain * (self.scale / math.sqrt(self.in_features)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        return functional.linear(x, self.standardized())


def clip_gradients_(parameters: Iterable[nn.Parameter], limit: float = 0.01, floor: float = 1e-3) -> None:
    """Adaptive gradient clipping (Brock et al. 2021), in place: each row at a share of its own length.

    A parameter that is a vector, but for sizes of 1, counts as one row.

    Args:
        parameters: with gradients; those without are left out.
        limit: largest ratio of the gradient's length to the row's.
        floor: lengths of rows count as this at least.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    >>> weight.grad = torch.tensor([[1.0, 0.0], [0.01, 0.0]])
    >>> clip_gradients_([weight])
    >>> [round(value, 4) for value in weight.grad[:, 0].tolist()]
    [0.05, 0.01]
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        axes = None if parameter.squeeze().dim() < 2 else tuple(range(1, parameter.dim()))
        lengths = torch.linalg.vector_norm(parameter.detach(), dim=axes, keepdim=True)
        steps = torch.linalg.vector_norm(parameter.grad, dim=axes, keepdim=True)
        parameter.grad.mul_((limit * lengths.clamp_min(floor) / steps.clamp_min(1e-6)).clamp_max(1.0))

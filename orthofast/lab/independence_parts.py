"""What only the experiments of Lu et al. 2024 need: residual convolutions, a transformer, Markov text, digit pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError
from orthofast.lab.data import Images


class ResidualConvNet(nn.Module):
    """The residual network of Lu et al. 2024, Table 4, with and without what it is about.

    A 3 x 3 convolution, stages of ``blocks`` blocks the first of which halves the image from the second stage on, the
    mean over positions, a linear layer. A block: convolution, BN, activation, convolution, BN, plus shortcut,
    activation; shortcuts between unlike widths are 1 x 1 convolutions. "Original" has neither BN nor shortcuts.

    Args:
        channels: of the images.
        widths: of the stages; (64, 128, 256, 512) in the paper.
        blocks: per stage; 2 there.
        classes: outputs.
        norm_res: with batch normalisation and shortcuts.
        activation: "gelu" or "relu".

    >>> ResidualConvNet(1, (4, 8), 1, 10)(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 1,
        classes: int = 10,
        *,
        norm_res: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "relu"):
            raise InputError(f'activation needs "gelu" or "relu", got {activation!r}')
        acts = nn.GELU if activation == "gelu" else nn.ReLU
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1), _normalization(widths[0], norm_res), acts()
        )
        stages, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            row: list[nn.Module] = []
            for number in range(blocks):
                row.append(ConvBlock(inputs, width, 2 if stage and not number else 1, norm_res, acts))
                inputs = width
            stages.append(nn.Sequential(*row))
        self.stages = nn.Sequential(*stages)
        self.last = nn.Linear(inputs, classes)

    def watched(self) -> list[nn.Conv2d]:
        """The first convolution of each stage, of which the paper prints the PII."""
        found = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            block = stage[0]
            assert isinstance(block, ConvBlock)
            found.append(block.conv1)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, classes)."""
        found: Tensor = self.last(self.stages(self.stem(images)).mean((2, 3)))
        return found


class ConvBlock(nn.Module):
    """One block of :class:`ResidualConvNet`.

    Args:
        inputs: channels that enter.
        width: channels that leave.
        stride: of the first convolution.
        norm_res: with batch normalisation and shortcut.
        acts: class of the activation.
    """

    def __init__(self, inputs: int, width: int, stride: int, norm_res: bool, acts: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1)
        self.norm1 = _normalization(width, norm_res)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = _normalization(width, norm_res)
        self.activation = acts()
        self.shortcut: nn.Module | None = None
        if norm_res:
            alike = stride == 1 and inputs == width
            self.shortcut = nn.Identity() if alike else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        branch = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        found: Tensor = self.activation(branch if self.shortcut is None else branch + self.shortcut(x))
        return found


class TinyTransformer(nn.Module):
    """A causal transformer whose last feed-forward layer can be left without shortcut and normalisation.

    Post-normalised blocks, as the paper describes its own (Lu et al. 2024, Section 4.4): attention, plus shortcut,
    layer normalisation, feed-forward with ReLU, the same again. Names are those of LLaMA's checkpoints, so that a scan
    knows the roles.

    Args:
        tokens: size of the vocabulary.
        width: of the residual stream.
        inner: width of the feed-forward layers.
        blocks: how many.
        heads: of the attention; divides ``width``.
        length: of the longest text.
        wrapped_last: False leaves shortcut and normalisation around the last feed-forward layer out.

    >>> TinyTransformer(11, 8, 16, 2, 2, 5)(torch.zeros(3, 5, dtype=torch.int64)).shape
    torch.Size([3, 5, 11])
    """

    def __init__(
        self, tokens: int, width: int, inner: int, blocks: int, heads: int, length: int, *, wrapped_last: bool = True
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"heads needs a divisor of width, got {heads} and {width}")
        self.embed_tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            Block(width, inner, heads, wrapped_last or number + 1 < blocks) for number in range(blocks)
        )
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """(N, length) int64 to logits of the next token (N, length, tokens)."""
        x = self.embed_tokens(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.lm_head(x)
        return found


class Attention(nn.Module):
    """Causal self-attention with four projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return found


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between: Linear_1 and Linear_2 of the paper's Table 5."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        found: Tensor = self.down_proj(torch.relu(self.up_proj(x)))
        return found


class Block(nn.Module):
    """Attention and feed-forward layer, each with shortcut and normalisation; the second's can be left out."""

    def __init__(self, width: int, inner: int, heads: int, wrapped: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = FeedForward(width, inner)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width) if wrapped else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        x = self.norm1(x + self.self_attn(x))
        found: Tensor = self.mlp(x) if self.norm2 is None else self.norm2(x + self.mlp(x))
        return found


def markov_text(tokens: int, length: int, *, seed: int, choices: int = 4, changed_frac: float = 0.0) -> Tensor:
    """Text of a random Markov chain of second order: each pair of tokens is followed by one of a few, unequally often.

    Args:
        tokens: size of the vocabulary.
        length: of the text.
        seed: of the chain and the text.
        choices: followers of a pair, with chances proportional to 1, 1/2, 1/3, and so on.
        changed_frac: of the pairs, how many have other followers than in the chain of this seed without it.

    Returns:
        (length,) int64.

    >>> markov_text(5, 4, seed=0).shape
    torch.Size([4])
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(tokens, (tokens, tokens, choices), generator=generator) for _ in range(2))
    changed = torch.rand(tokens, tokens, 1, generator=generator) < changed_frac
    followers = torch.where(changed, second, first).tolist()
    chances = 1 / torch.arange(1, choices + 1, dtype=torch.float64)
    picks = torch.multinomial(chances, length, replacement=True, generator=generator).tolist()
    text = [0, 1 % tokens]
    for pick in picks:
        text.append(followers[text[-2]][text[-1]][pick])
    return torch.tensor(text[2:])


def fit_text(
    model: nn.Module, text: Tensor, optimizer: torch.optim.Optimizer, *, steps: int, batch: int, length: int, seed: int
) -> list[float]:
    """Train a model to tell the next token.

    Args:
        model: (N, length) tokens to (N, length, tokens) logits; trained in place.
        text: (T,) int64 to draw from.
        optimizer: of the model's parameters.
        steps: updates.
        batch: texts of one.
        length: tokens of a text.
        seed: of where they start.

    Returns:
        The cross-entropy before each update, in nats.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed)
    offsets, losses = torch.arange(length + 1), []
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        chunk = text[starts + offsets].to(next(model.parameters()).device)
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def digit_pairs(data: Images, train: int, test: int) -> Images:
    """Two grey images as the two channels of one, 100 classes: a small stand-in for a data set of a hundred classes.

    Args:
        data: (N, 1, size, size) images of ten classes.
        train: pairs to draw from its training images.
        test: pairs to draw from its test images.
    """
    generator = torch.Generator().manual_seed(0)
    parts: list[Tensor] = []
    for images, labels, count in ((data.train, data.train_labels, train), (data.test, data.test_labels, test)):
        rows = torch.randint(len(images), (2, count), generator=generator).to(images.device)
        parts += [torch.cat([images[rows[0]], images[rows[1]]], 1), 10 * labels[rows[0]] + labels[rows[1]]]
    return Images(f"pairs of {data.name}", parts[0], parts[1], parts[2], parts[3], 100)


def _normalization(width: int, there: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if there else nn.Identity()

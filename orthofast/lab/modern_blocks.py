"""Beyond Daneshmand et al. 2021: the orthogonality gap by depth in transformer blocks, before and after training.

The paper has no such experiment. What must hold is derived here, before any run, by the letters and the shortcuts of
:mod:`orthofast.lab.deep_normalization`. Two kinds of blocks, pre-norm and post-norm: LayerNorm with ReLU, and RMSNorm
with gated layers (SwiGLU) and rotary positions, as LLaMA has them, without its causal mask.

- Wide networks with uniform attention have a Gram matrix K of all tokens of all images that is known block by block:
  attention adds the mean of K over the tokens of each image, the feed-forward layer :func:`cosine_map` of K, both of K
  scaled to unit diagonal; post-norm scales the sum. Networks here are near it (:func:`wide_block_gaps`).
- Images: a sample is the mean over an image's tokens, n images a batch. Attention mixes tokens of one image only, so
  what moves c between images is the feed-forward layer. With ReLU, V rises, slower with pre-norm than with post-norm.
- A gated layer maps c to ``c k(c)``, k the map of silu: nearer to 0 for every c between 0 and 1. So V falls in LLaMA's
  blocks, without batch norm: the activation does it, not the normalisation, which still sees one sample at a time. A
  product of two random layers differs more from network to network, and post-norm ends near independent directions, of
  which the wide limit knows nothing: there its V is shown and decides nothing.
- Tokens: a sample is a token, all those of one image. Attention adds nearly the same vector to each. Post-norm then
  halves 1 - c in each block, pre-norm takes about 1 / (2 l) of it in block l: V is larger with post-norm, and with ReLU
  at its cap.
- Training has to tell classes apart, so V of images falls where it starts high.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.lab.data import Images, load
from orthofast.lab.deep_normalization import CLOSE, NO_SUCH, N, gap_of_cosines, largest_distance, loader_of, mean_gaps
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.missing import minus
from orthofast.lab.modern_nets import PER_SAMPLE, ImageTransformer, cosine_map
from orthofast.lab.verdict import Check, Number, Verdict, below, judge, less, shown
from orthofast.metrics import gap_bounds

# blocks, width, heads, networks, batches
TRANSFORMERS = {"small": (12, 192, 6, 5, 2), "paper": (32, 768, 12, 5, 10)}
ALONE = 4  # images whose tokens are compared
# blocks, width, heads, steps, batch, learning rate of Adam
FITTED = {"small": (4, 64, 4, 100, 32, 1e-3), "paper": (12, 384, 6, 3000, 256, 3e-4)}
# normalisation -> feed-forward layer, as the figure names the blocks
KINDS = {"LayerNorm": "ReLU", "RMSNorm": "SwiGLU"}
NEAR = 0.01  # of V: where a dozen halvings of 1 - c lead
ORDERS = {"pre-norm": True, "post-norm": False}


def transformers(settings: Settings) -> Raw:
    """Gaps between images and between an image's tokens, block by block; those of images also after training."""
    depth, width, heads, networks, count = TRANSFORMERS[settings.scale]
    data = load(settings).standardized()
    loader = loader_of(data, count, settings.seed)
    device = data.train.device
    alone = [image[None] for image in loader[0][:ALONE]]
    found: Raw = {
        "block": list(range(depth + 1)),
        "cap": {"images": gap_bounds(N, width).high, "tokens": gap_bounds(data.train.shape[2], width).high},
        "independent": math.sqrt((N - 1) / (N * width)),
        **{place: {} for place in ("images", "tokens", "wide images", "wide tokens", "trained")},
    }
    for norm in PER_SAMPLE:
        for order, before in ORDERS.items():
            name = f"{KINDS[norm]}, {order}"

            torch.manual_seed(settings.seed)
            nets = [
                ImageTransformer(_shape(data), width, depth, heads, data.classes, norm, before=before).to(device)
                for _ in range(networks)
            ]
            places = [str(block) for block in found["block"]]
            found["images"][name] = mean_gaps(nets, loader, [f"images.{place}" for place in places])
            found["tokens"][name] = mean_gaps(nets, alone, [f"blocks.{place}" for place in places], positions=True)
            kind, shown_alone = KINDS[norm].lower(), torch.cat(alone)
            rows = [wide_block_gaps(batch, depth, kind, before=before)[0] for batch in loader]
            found["wide images"][name] = _mean_row(rows)
            found["wide tokens"][name] = _mean_row(wide_block_gaps(shown_alone, depth, kind, before=before)[1])
        found["trained"][KINDS[norm]] = _trained_transformer(settings, data, norm)
    return found


def wide_block_gaps(
    images: Tensor, depth: int, activation: str, *, before: bool
) -> tuple[list[float], list[list[float]]]:
    """V behind the embedding and behind each block of infinitely wide networks with uniform attention.

    Args:
        images: (n, channels, height, width); a token is a row of pixels.
        depth: blocks.
        activation: of the feed-forward layers, as in :func:`cosine_map`.
        before: pre-norm; otherwise post-norm.

    Returns:
        V of the images' mean tokens, (depth + 1,), and of each image's tokens, (n, depth + 1).
    """
    tokens = images.transpose(1, 2).flatten(2).double()
    count, length = tokens.shape[:2]
    gram = _unit_diagonal(tokens.flatten(0, 1) @ tokens.flatten(0, 1).T)  # (count length, count length)
    of_images, of_tokens = [], []
    for block in range(depth + 1):
        for attends in (True, False) if block else ():
            entering = _unit_diagonal(gram) if before else gram
            gram = gram + (_token_means(entering, count, length, True) if attends else cosine_map(activation, entering))
            gram = gram if before else _unit_diagonal(gram)
        means = _token_means(gram, count, length)
        of_images.append(gap_of_cosines(means * (count / means.trace())))
        places = [slice(length * image, length * (image + 1)) for image in range(count)]
        of_tokens.append([gap_of_cosines(_unit_diagonal(gram)[place, place]) for place in places])
    return of_images, [list(row) for row in zip(*of_tokens, strict=True)]


def _token_means(gram: Tensor, count: int, length: int, spread: bool = False) -> Tensor:
    """Inner products of the images' mean tokens, (count, count), or the same for each pair of tokens."""
    means: Tensor = gram.unflatten(0, (count, length)).unflatten(2, (count, length)).mean((1, 3))
    return means.repeat_interleave(length, 0).repeat_interleave(length, 1) if spread else means


def _unit_diagonal(gram: Tensor) -> Tensor:
    scale = gram.diagonal().rsqrt()
    found: Tensor = gram * scale[:, None] * scale
    return found


def _trained_transformer(settings: Settings, data: Images, norm: str) -> dict[str, list[float] | float]:
    """Gaps between images behind each pre-norm block before and after Adam, the loss, the accuracy on test images."""
    depth, width, heads, steps, batch, rate = FITTED[settings.scale]
    torch.manual_seed(settings.seed)
    model = ImageTransformer(_shape(data), width, depth, heads, data.classes, norm, before=True).to(data.train.device)
    loader = loader_of(data, 10, settings.seed)
    paths = [f"images.{block}" for block in range(depth + 1)]
    start = mean_gaps([model], loader, paths)
    losses = fit(model, data, optimizer_for(model, "adam", rate), steps=steps, batch=batch, seed=settings.seed)
    return {
        "start": start,
        "end": mean_gaps([model], loader, paths),
        "loss": statistics.fmean(losses[-20:]),
        "accuracy": accuracy(model, data),
    }


def verdict_transformers(raws: Sequence[Raw]) -> Verdict:
    """The conditions of the module's list."""

    def at(place: str, name: str, index: int) -> list[Number]:
        return [raw[place][name][index] for raw in raws]

    relu, gated = KINDS.values()
    checks: list[Check] = []
    for order in ORDERS:
        one = f"{relu}, {order}"
        checks.append(
            less(f"images, {one}: V at the start minus end", at("images", one, 0), at("images", one, -1), NO_SUCH)
        )
        one = f"{gated}, {order}"
        checks.append(
            less(f"images, {one}: V at the end minus start", at("images", one, -1), at("images", one, 0), NO_SUCH)
        )
    pre, post = (f"{relu}, {order}" for order in ORDERS)
    checks.append(
        less(
            f"images, {relu}: V at the end, pre-norm minus post-norm",
            at("images", pre, -1),
            at("images", post, -1),
            NO_SUCH,
        )
    )
    for kind in KINDS.values():
        pre, post = (f"{kind}, {order}" for order in ORDERS)
        what = f"tokens, {kind}: V at the end, pre-norm minus post-norm"
        checks.append(less(what, at("tokens", pre, -1), at("tokens", post, -1), NO_SUCH))
    capped, reached = [minus(raw["cap"]["tokens"], NEAR) for raw in raws], at("tokens", f"{relu}, post-norm", -1)
    checks.append(less(f"tokens, {relu}, post-norm: its cap less {NEAR} minus V at the end", capped, reached, NO_SUCH))
    for place in ("images", "tokens"):
        for name in raws[0][place]:
            off = [largest_distance(raw[place][name][-1:], raw[f"wide {place}"][name][-1:]) for raw in raws]
            what = f"{place}, {name}: distance to a wide network's V at the end"
            guided = place == "tokens" or name.startswith(relu)
            checks.append(below(what, off, CLOSE, NO_SUCH) if guided else shown(what, off))
            checks.append(shown(f"{place}, {name}: V behind the embedding", at(place, name, 0)))
            checks.append(shown(f"{place}, {name}: V behind the last block", at(place, name, -1)))
    before, after = ([raw["trained"][relu][when][-1] for raw in raws] for when in ("start", "end"))
    checks.append(less(f"trained, {relu}, pre-norm: V of images at the end, end minus start", after, before, "falls"))
    for kind in KINDS.values():
        for when in ("start", "end"):
            values = [raw["trained"][kind][when][-1] for raw in raws]
            checks.append(shown(f"trained, {kind}, pre-norm: V of images behind the last block, {when}", values))
        checks.append(shown(f"trained, {kind}, pre-norm: accuracy", [raw["trained"][kind]["accuracy"] for raw in raws]))
    checks.append(shown("V of independent random directions", [raw["independent"] for raw in raws]))
    return judge(
        checks,
        "The conditions are derived; the paper has no such experiment. A sample is the mean token of an image, "
        f"{N} images a batch, or a token of one image; a token is a row of pixels, and every token sees all others.",
    )


def drawn_transformers(raws: Sequence[Raw]) -> Figure:
    """Images and tokens at random weights, images after training."""
    first = raws[0]
    panels = []
    for wide in ("", "wide "):
        for place, y in (("images", f"gap V of {N} images"), ("tokens", "gap V of an image's tokens")):
            runs = f"{wide}{place}"
            series = [Series(name, first["block"], [raw[runs][name] for raw in raws]) for name in first[runs]]
            levels = [("rank one", first["cap"][place])]
            if runs == "images":
                levels.append(("independent", first["independent"]))
            title = f"{place}, infinitely wide" if wide else place
            panels.append(Panel("block (0: the embedding)", y, series, title, points=False, levels=levels))
    blocks = list(range(len(first["trained"][KINDS["RMSNorm"]]["end"])))
    series = [
        Series(f"{kind}, pre-norm", blocks, [raw["trained"][kind]["end"] for raw in raws]) for kind in KINDS.values()
    ]
    y, cap = f"gap V of {N} images", ("rank one", first["cap"]["images"])
    panels.append(Panel("block (0: the embedding)", y, series, "images, trained", points=False, levels=[cap]))
    return Figure(
        panels,
        "Transformer blocks at random weights, their wide limit, and fewer of them trained; LayerNorm with ReLU, "
        "RMSNorm with SwiGLU. An image is its mean token.",
    )


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def _shape(data: Images) -> tuple[int, int, int]:
    channels, height, width = data.train.shape[1:]
    return channels, height, width


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-X5",
        "Beyond the paper: gap by depth in transformer blocks",
        "With ReLU the gap rises, faster post-norm than pre-norm; gated layers lower it without batch norm.",
        transformers,
        verdict_transformers,
        drawn_transformers,
        needs=DATA,
        size="12 blocks of width 192, rows of pixels as tokens; 4 blocks of width 64 trained for 100 steps.",
    ),
)

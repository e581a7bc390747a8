"""Daneshmand et al. 2021, Figure 7 of Appendix I: many convolutions from random and from orthogonal starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from orthofast import orthogonalize_
from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches, fit, optimizer_for
from orthofast.lab.verdict import Number, Verdict, judge, less, shown

LAST = 20  # steps whose mean loss is a final loss
STARTS = ("Xavier", "orthogonal")
EXTRA = {"small": (5, 30), "paper": (15, 75)}  # 3 x 3 convolutions added to the network
# steps, batch, optimiser, learning rate, images that orthogonal weights are made from
SIZES = {"small": (200, 30, "momentum", 0.003, 60), "paper": (33_320, 30, "sgd", 0.001, 256)}
NARROW = 12  # channels of the small network
# of the paper's network: the first convolutions, the others, outputs of hidden linear layers
CHANNELS, HIDDEN = (64, 192, 256), 4096


def narrow(data: Images, extra: int) -> nn.Sequential:
    """For two cores: a convolution of 12 channels, pooling to 4 x 4, ``extra`` more, a linear layer."""
    layers: list[nn.Module] = [
        nn.Conv2d(data.train.shape[1], NARROW, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(data.train.shape[-1] // 4),
    ]
    for _ in range(extra):
        layers += [nn.Conv2d(NARROW, NARROW, 3, padding=1), nn.ReLU()]
    return _started(nn.Sequential(*layers, nn.Flatten(), nn.Linear(NARROW * 16, data.classes)), data)


def like_alexnet(data: Images, extra: int) -> nn.Sequential:
    """The network of the public code: six convolutions, ``extra`` more of 256 channels at 4 x 4, three linear layers.

    The last pooling is to 2 x 2 from any size, which on images of 32 x 32 is the code's pooling by 2.
    """
    first, second, third = CHANNELS
    layers: list[nn.Module] = [
        nn.Conv2d(data.train.shape[1], first, 3, 2, 1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(second, second, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(second, third, 3, padding=1),
        nn.Conv2d(third, third, 3, padding=1),
        nn.ReLU(),
    ]
    for _ in range(extra):
        layers += [nn.Conv2d(third, third, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveMaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    layers += [nn.Linear(4 * third, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return _started(nn.Sequential(*layers, nn.Linear(HIDDEN, data.classes)), data)


def _started(model: nn.Sequential, data: Images) -> nn.Sequential:
    """Xavier's uniform weights with gain sqrt(2), biases 0."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return model.to(data.train.device)


def same_channels(model: nn.Module) -> list[str]:
    """The convolutions that the paper's code writes: those with as many outputs as inputs."""
    return [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels
    ]


def figure7(settings: Settings) -> Raw:
    """Losses with few and with many extra convolutions, from Xavier's and from orthogonal starts."""
    steps, batch, optimizer, rate, seen = SIZES[settings.scale]
    data = load(settings)
    wide = settings.scale == "paper" and data.train.shape[-1] >= 28
    data = data if wide else data.standardized()  # the code trains on pixels of [0, 1]
    found: Raw = {"extra": list(EXTRA[settings.scale]), "step": list(range(1, steps + 1)), "losses": {}}
    for extra in EXTRA[settings.scale]:
        for start in STARTS:
            torch.manual_seed(settings.seed)
            model = like_alexnet(data, extra) if wide else narrow(data, extra)
            if start == "orthogonal":
                inputs = next(batches(data, seen, 1, settings.seed))[0]
                orthogonalize_(model, inputs, select=same_channels(model), normalize="output")
            losses = fit(
                model, data, optimizer_for(model, optimizer, rate), steps=steps, batch=batch, seed=settings.seed
            )
            found["losses"][f"{extra}, {start}"] = losses
    return found


def _verdict7(raws: Sequence[Raw]) -> Verdict:
    def final(key: str) -> list[Number]:
        return [_tail_mean(raw["losses"][key]) for raw in raws]

    few, many = raws[0]["extra"]
    return judge(
        [
            less(
                f"final loss with {many} extra convolutions, orthogonal minus Xavier",
                final(f"{many}, orthogonal"),
                final(f"{many}, Xavier"),
                "about 1.30 minus 1.91 with 75 (image)",
            ),
            less(
                f"final loss with {few} extra convolutions, Xavier minus orthogonal",
                final(f"{few}, Xavier"),
                final(f"{few}, orthogonal"),
                "about 0.92 minus 1.17 with 15 (image)",
            ),
            *(
                shown(f"final loss, {extra} extra, {start}", final(f"{extra}, {start}"))
                for extra in raws[0]["extra"]
                for start in STARTS
            ),
        ],
        "The published curves themselves show Xavier ahead with 15 extra convolutions.",
    )


def _tail_mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses[-LAST:] if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses[-LAST:]) else None


def _drawn7(raws: Sequence[Raw]) -> Figure:
    steps = raws[0]["step"]
    every = LAST * max(1, len(steps) // (LAST * 200))  # at most 400 points a curve
    panels = []
    for extra in raws[0]["extra"]:
        series = []
        for start in STARTS:
            runs = [_smoothed(raw["losses"][f"{extra}, {start}"], every) for raw in raws]
            series.append(Series(start, steps[every - 1 :: every], runs))
        panels.append(Panel("step", f"loss (nats), mean of {LAST} steps", series, title=f"{extra} extra convolutions"))
    return Figure(panels, "Convolutional networks without BN, SGD.")


def _smoothed(losses: Sequence[float | None], every: int) -> list[float | None]:
    return [_tail_mean(losses[:end]) for end in range(every, len(losses) + 1, every)]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-F7",
        "Appendix I, Figure 7: convolutional networks from orthogonal starts",
        "Orthogonal starts help where the network is very deep, not where it is less so.",
        figure7,
        _verdict7,
        _drawn7,
        needs=DATA,
        size="12 channels and 5 or 30 extra convolutions, 200 steps with momentum, instead of a relative of AlexNet "
        "with 15 or 75 of 256 channels and 20 epochs of CIFAR-10.",
    ),
)

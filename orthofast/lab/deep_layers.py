"""Daneshmand et al. 2021, Appendix Figure 6: the gap of a batch layer by layer in real networks before training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches
from orthofast.lab.missing import largest, least, minus, over
from orthofast.lab.verdict import Number, Verdict, between, judge, less, shown
from orthofast.training import representation_gaps

GAP_LAYERS = 30
# width, channels, batches of 8
SIZES_6 = {"small": (100, 100, 10), "paper": (100, 100, 50)}


def blocks(data: Images, kind: str, normalized: bool, width: int) -> nn.Sequential:
    """30 times activation, linear or convolution, batch norm or none; Xavier's normal weights with gain sqrt(2)."""
    channels, size = data.train.shape[1], data.train.shape[-1]
    inputs = channels * size * size if kind == "perceptron" else channels
    layers: list[nn.Module] = [nn.Flatten()] if kind == "perceptron" else []
    for number in range(GAP_LAYERS):
        before = inputs if number == 0 else width
        layers.append(nn.ReLU())
        if kind == "perceptron":
            layers.append(nn.Linear(before, width, bias=False))
        else:
            layers.append(nn.Conv2d(before, width, 3, padding=1, padding_mode="reflect", bias=False))
        nn.init.xavier_normal_(layers[-1].weight, gain=math.sqrt(2))  # type: ignore[arg-type]
        if normalized:
            layers.append(nn.BatchNorm1d(width) if kind == "perceptron" else nn.BatchNorm2d(width))
    return nn.Sequential(*layers).to(data.train.device)


def figure6(settings: Settings) -> Raw:
    """Gap behind each block at the start, with and without batch normalisation, for both kinds of network."""
    width, channels, count = SIZES_6[settings.scale]
    data = load(settings)
    torch.manual_seed(settings.seed)
    loader = [inputs for inputs, _ in batches(data, 8, count, settings.seed)]
    found: Raw = {"layer": list(range(GAP_LAYERS + 1)), "high": math.sqrt(1 - 1 / 8)}
    for kind in ("perceptron", "convolutional"):
        for normalized in (True, False):
            model = blocks(data, kind, normalized, width if kind == "perceptron" else channels)
            kinds = (nn.BatchNorm1d, nn.BatchNorm2d) if normalized else (nn.Linear, nn.Conv2d)
            report = representation_gaps(model, loader, select=["(input)", *kinds], training=True)
            found[f"{kind}, {'BN' if normalized else 'vanilla'}"] = [layer.mean for layer in report.layers.values()]
    return found


def _verdict6(raws: Sequence[Raw]) -> Verdict:
    checks = []
    for kind, said in (("perceptron", ("about .70 to .19", "about .70 to .93")), ("convolutional", ("falls", "rises"))):
        bn, vanilla = ([raw[f"{kind}, {name}"] for raw in raws] for name in ("BN", "vanilla"))
        moves = [over(minus(largest(trace[10:]), least(trace[10:])), minus(trace[0], trace[10])) for trace in bn]
        checks += [
            less(f"{kind}: gap with BN, layer 5 minus input", _at(bn, 5), _at(bn, 0), f"{said[0]} (image)"),
            between(f"{kind}: range over layers 10 to 30 as share of the fall before", moves, 0, 0.25, "stays (image)"),
            less(
                f"{kind}: gap without BN, input minus layer 30", _at(vanilla, 0), _at(vanilla, -1), f"{said[1]} (image)"
            ),
            less(f"{kind}: gap at layer 30, with BN minus without", _at(bn, -1), _at(vanilla, -1), "BN lower (image)"),
            shown(f"{kind}: gap of the input", _at(bn, 0), "about .70 (image)"),
            shown(f"{kind}: gap with BN, layer 30", _at(bn, -1)),
            shown(f"{kind}: gap without BN, layer 30", _at(vanilla, -1)),
        ]
    return judge(checks, "The public notebook of this figure bears the number 5.")


def _at(traces: Sequence[Sequence[Number]], index: int) -> list[Number]:
    return [trace[index] for trace in traces]


def _drawn6(raws: Sequence[Raw]) -> Figure:
    panels = []
    for kind in ("perceptron", "convolutional"):
        series = [
            Series(name, raws[0]["layer"], [raw[f"{kind}, {name}"] for raw in raws]) for name in ("BN", "vanilla")
        ]
        levels = [("rank one", raws[0]["high"])]
        panels.append(
            Panel("layer (0: the input)", "gap V of a batch of 8", series, title=kind, points=False, levels=levels)
        )
    return Figure(
        panels, "Activation, then linear layer, then BN or none; random weights, BN with the batch's statistics."
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-F6",
        "Appendix Figure 6: gap by layer at the start",
        "With batch normalisation the gap falls and settles, without it rises.",
        figure6,
        _verdict6,
        _drawn6,
        needs=DATA,
        size="10 batches of 8 images instead of 50.",
    ),
)

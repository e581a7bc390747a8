"""Lu et al. 2024 on optimisers of convolutional networks: Table 2, and the appendix's Table 2.

PII of the central taps' columns, before and after training; the first convolution starts with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.independence_optimizers import (
    ADAPTIVE,
    LABELS,
    MATCHED,
    Published,
    all_numbers,
    bars_of,
    change_of,
    closest,
    like_accuracy,
    matched,
)
from orthofast.lab.independence_parts import digit_pairs
from orthofast.lab.missing import least, times
from orthofast.lab.nets import ConvNet, constant_
from orthofast.lab.verdict import Check, Verdict, judge, less, shown
from orthofast.metrics import pii

CNN_RATES = {"sgd": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4), "adam": (1e-3,), "adamw": (1e-3,), "rmsprop": (1e-3,)}
NETS = {"text": False, "script": True}  # batch normalisation behind the first two activations
PUBLISHED2 = {
    "sgd": (0.795, 0.195, 0.149, 84.04),
    "adam": (0.328, 0.217, 0.242, 85.94),
    "adamw": (0.337, 0.208, 0.237, 85.96),
    "rmsprop": (0.37, 0.230, 0.207, 84.80),
}
PUBLISHED_A2 = {
    "sgd": (0.858, 0.121, 0.062, None),
    "adam": (0.333, 0.324, 0.152, None),
    "adamw": (0.352, 0.311, 0.166, None),
    "rmsprop": (0.384, 0.309, 0.154, None),
}


def train_convnet(
    data: Images,
    name: str,
    rate: float,
    *,
    widths: Sequence[int],
    hidden: int,
    steps: int,
    batch: int,
    seed: int,
    normalize: bool = False,
) -> dict[str, object]:
    """The convolutional network of Table 2 trained, its first layer of equal weights; PII of the three convolutions.

    Columns of the central taps, as the paper's code takes them; of the first convolution the whole filters where images
    have fewer than three channels, whose central tap would be a vector or two.

    Args:
        data: square images.
        name: of the optimiser.
        rate: its learning rate.
        widths: of the convolutions.
        hidden: of the linear layer.
        steps: updates.
        batch: images of one.
        seed: of weights and batches.
        normalize: batch normalisation behind the first two activations, as in the published script.
    """
    torch.manual_seed(seed)
    channels, size = data.train.shape[1], data.train.shape[2]
    model = ConvNet(channels, widths, size, hidden, data.classes, normalize=normalize)
    layers = [layer for layer in model.features if isinstance(layer, nn.Conv2d)]
    constant_(layers[0])
    model.to(data.train.device)
    sides = ("center_tap" if channels >= 3 else "filters", "center_tap", "center_tap")

    def measured() -> list[float]:
        return [pii(layer.weight.detach(), vectors=side).item() for layer, side in zip(layers, sides, strict=True)]

    initial = measured()
    fit(model, data, optimizer_for(model, name, rate), steps=steps, batch=batch, seed=seed)
    return {"initial": initial, "final": measured(), "accuracy": accuracy(model, data)}


def table2(settings: Settings) -> Raw:
    """All optimisers on the convolutional network, as the text has it and as the published script has it."""
    data = load(settings).standardized()
    return {net: _convnets(settings, data, 275, normalize) for net, normalize in NETS.items()}


def appendix2(settings: Settings) -> Raw:
    """The same with a hundred classes, as the text has it."""
    data = load(settings)
    data = (data if data.classes == 100 else digit_pairs(data, 4096, 1024)).standardized()
    return {"text": _convnets(settings, data, 800, NETS["text"])}


def _convnets(settings: Settings, data: Images, few: int, normalize: bool) -> Raw:
    """Every optimiser at its rates: 20 epochs, or so few steps of small networks."""
    small = settings.scale == "small"
    batch = 128

    def run(name: str, rate: float) -> Raw:
        found = train_convnet(
            data,
            name,
            rate,
            widths=(16, 32, 64) if small else (64, 128, 256),
            hidden=64 if small else 512,
            steps=few if small else 20 * (len(data.train) // batch),
            batch=batch,
            seed=settings.seed,
            normalize=normalize,
        )
        return found | {"rate": rate}

    return {name: [run(name, rate) for rate in rates] for name, rates in CNN_RATES.items()}


def verdict2(raws: Sequence[Raw], published: Published = PUBLISHED2) -> Verdict:
    """SGD ends closest to the start in every layer, at like accuracy; Adam and AdamW are closest to each other."""
    start = (1.0, 0.070, 0.050)
    scripts = [matched(raw["script"]) for raw in raws if "script" in raw]
    raws = [matched(raw["text"]) for raw in raws]
    checks: list[Check] = []
    for layer in range(3):
        theirs = {name: abs(float(published[name][layer] or math.nan) - start[layer]) for name in CNN_RATES}
        ours = {name: [change_of(raw[name], layer) for raw in raws] for name in CNN_RATES}
        checks.append(
            less(
                f"conv{layer + 1}: |change| under SGD minus the least of the others",
                ours["sgd"],
                [least([ours[name][seed] for name in ADAPTIVE]) for seed in range(len(raws))],
                round(theirs["sgd"] - min(theirs[name] for name in ADAPTIVE), 3),
            )
        )
    checks += [closest(raws, published), *like_accuracy(raws, published)]
    checks += all_numbers(raws, CNN_RATES, published, "conv")
    for name in CNN_RATES if scripts else ():
        for layer in range(3):
            changes = [change_of(raw[name], layer) for raw in scripts]
            checks.append(shown(f"{LABELS[name]}, conv{layer + 1}: |change| with the script's BN", changes))
        percent = [times(100, raw[name]["accuracy"]) for raw in scripts]
        checks.append(shown(f"{LABELS[name]}: test accuracy with the script's BN (%)", percent))
    return judge(
        checks,
        f"{MATCHED} Judged without batch normalisation, as the text has it; the published script has it behind the "
        "first two activations. Images are not cropped or flipped at random, as they are there.",
    )


def verdict_appendix2(raws: Sequence[Raw]) -> Verdict:
    """As Table 2."""
    return verdict2(raws, PUBLISHED_A2)


def _drawn2(raws: Sequence[Raw]) -> Figure:
    raws = [matched(raw["text"]) for raw in raws]
    caption = "PII of the central taps' columns, of conv1's filters where images are grey; conv1 starts at 1."
    return bars_of(raws, CNN_RATES, PUBLISHED2, "conv", caption)


def _drawn_appendix2(raws: Sequence[Raw]) -> Figure:
    raws = [matched(raw["text"]) for raw in raws]
    return bars_of(raws, CNN_RATES, PUBLISHED_A2, "conv", "As Table 2, with a hundred classes.")


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T2",
        "Table 2: optimisers on a convolutional network",
        "At like accuracy SGD ends closest to the start in every layer; Adam and AdamW are closest.",
        table2,
        verdict2,
        _drawn2,
        needs=("digits", "cifar10"),
        size="digits, widths 16, 32, 64 instead of 64, 128, 256, 275 steps, six rates of SGD; conv1 by filters.",
    ),
    Experiment(
        "S0-A2",
        "Appendix, Table 2: optimisers with a hundred classes",
        "At like accuracy SGD ends closest to the start in every layer; Adam and AdamW are closest.",
        appendix2,
        verdict_appendix2,
        _drawn_appendix2,
        needs=("digits", "cifar100"),
        size="pairs of digits as two channels, a hundred classes, 800 steps; otherwise as Table 2.",
    ),
)

"""Lu et al. 2024 on optimisers: Table 1, once more over learning rates, Table 2, and the appendix's Table 2.

PII of columns, before and after training; one layer starts with equal weights, whose PII is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.independence_parts import digit_pairs
from orthofast.lab.nets import ConvNet, NormalizedResidualMLP, constant_
from orthofast.lab.verdict import Check, Verdict, above, below, between, judge, less, shown
from orthofast.metrics import pii

ADAPTIVE = ("adam", "adamw", "rmsprop")
LABELS = {
    "sgd": "SGD",
    "momentum": "SGD, momentum",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "muon": "Muon",
}
RATES = {"sgd": 0.1, "momentum": 0.02, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
CNN_RATES = {"sgd": (0.05, 0.1, 0.2), "adam": (1e-3,), "adamw": (1e-3,), "rmsprop": (1e-3,)}
DECAY = {"adamw": 0.01}  # torch's own; without it AdamW is Adam
GRID = {"sgd": (0.05, 0.1, 0.2), "adam": (3e-4, 1e-3), "rmsprop": (3e-4, 1e-3)}
TRAINED = 0.9  # accuracy from which a rate counts
PUBLISHED1 = {
    "sgd": (0.996, 0.049, 0.048, 93.59),
    "adam": (0.432, 0.153, 0.109, 98.22),
    "adamw": (0.411, 0.153, 0.114, 97.92),
    "rmsprop": (0.766, 0.234, 0.149, 97.94),
}
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
Published = Mapping[str, tuple[float | None, ...]]


def train_perceptron(
    data: Images, name: str, rate: float, *, width: int, steps: int, batch: int, seed: int
) -> dict[str, object]:
    """A perceptron with three hidden layers, the first of equal weights, trained; column PII of the three.

    Args:
        data: flat images.
        name: of the optimiser.
        rate: its learning rate.
        width: of the hidden layers.
        steps: updates.
        batch: images of one.
        seed: of weights and batches.

    Returns:
        "initial" and "final" PII by layer, "accuracy" (fraction).
    """
    torch.manual_seed(seed)
    model = NormalizedResidualMLP(data.train.shape[1], width, 3, data.classes, normalize=False, residual=False)
    constant_(model.hidden[0])
    model.to(data.train.device)
    initial = [_columns(layer) for layer in model.hidden]
    fit(
        model,
        data,
        optimizer_for(model, name, rate, weight_decay=DECAY.get(name, 0.0)),
        steps=steps,
        batch=batch,
        seed=seed,
    )
    final = [_columns(layer) for layer in model.hidden]
    return {"initial": initial, "final": final, "accuracy": accuracy(model, data)}


def train_convnet(
    data: Images, name: str, rate: float, *, widths: Sequence[int], hidden: int, steps: int, batch: int, seed: int
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
    """
    torch.manual_seed(seed)
    channels, size = data.train.shape[1], data.train.shape[2]
    model = ConvNet(channels, widths, size, hidden, data.classes)
    layers = [layer for layer in model.features if isinstance(layer, nn.Conv2d)]
    constant_(layers[0])
    model.to(data.train.device)
    sides = ("center_tap" if channels >= 3 else "filters", "center_tap", "center_tap")

    def measured() -> list[float]:
        return [pii(layer.weight.detach(), vectors=side).item() for layer, side in zip(layers, sides, strict=True)]

    initial = measured()
    fit(
        model,
        data,
        optimizer_for(model, name, rate, weight_decay=DECAY.get(name, 0.0)),
        steps=steps,
        batch=batch,
        seed=seed,
    )
    return {"initial": initial, "final": measured(), "accuracy": accuracy(model, data)}


def table1(settings: Settings) -> Raw:
    """All optimisers at one learning rate each."""
    sizes = _perceptron_sizes(settings)
    data = load(settings).flat()
    return {name: train_perceptron(data, name, rate, **sizes) | {"rate": rate} for name, rate in RATES.items()}


def learning_rates(settings: Settings) -> Raw:
    """Optimisers at several learning rates each."""
    sizes = _perceptron_sizes(settings)
    data = load(settings).flat()
    return {
        name: [train_perceptron(data, name, rate, **sizes) | {"rate": rate} for rate in rates]
        for name, rates in GRID.items()
    }


def table2(settings: Settings) -> Raw:
    """All optimisers on the convolutional network."""
    return _convnets(settings, load(settings).standardized())


def appendix2(settings: Settings) -> Raw:
    """The same with a hundred classes."""
    data = load(settings)
    return _convnets(settings, (data if data.classes == 100 else digit_pairs(data, 4096, 1024)).standardized())


def _convnets(settings: Settings, data: Images) -> Raw:
    small = settings.scale == "small"
    batch = 128
    return {
        name: [
            train_convnet(
                data,
                name,
                rate,
                widths=(16, 32, 64) if small else (64, 128, 256),
                hidden=64 if small else 512,
                steps=275 if small else 20 * (len(data.train) // batch),
                batch=batch,
                seed=settings.seed,
            )
            | {"rate": rate}
            for rate in rates
        ]
        for name, rates in CNN_RATES.items()
    }


def matched(raw: Raw) -> Raw:
    """Of each optimiser the run with the accuracy closest to Adam's: the paper, too, adjusts rates to like accuracy."""
    target = raw["adam"][0]["accuracy"]
    return {name: min(runs, key=lambda run: abs(run["accuracy"] - target)) for name, runs in raw.items()}


def verdict1(raws: Sequence[Raw]) -> Verdict:
    """Layer_1 under SGD stays near 1 and falls under adaptive methods; Adam and AdamW alike."""
    final = {name: _of(raws, name, "final") for name in RATES}
    checks = [above("Layer_1 under SGD", [one[0] for one in final["sgd"]], 0.9, PUBLISHED1["sgd"][0])]
    sgd = [one[0] for one in final["sgd"]]
    for name in ADAPTIVE:
        theirs = round(PUBLISHED1[name][0] - PUBLISHED1["sgd"][0], 3)
        fallen = [one[0] for one in final[name]]
        checks += [less(f"Layer_1 under {LABELS[name]} minus under SGD", fallen, sgd, theirs, margin=0.1)]
    for layer in range(3):
        apart = [adam[layer] - adamw[layer] for adam, adamw in zip(final["adam"], final["adamw"], strict=True)]
        theirs = round(PUBLISHED1["adam"][layer] - PUBLISHED1["adamw"][layer], 3)
        checks.append(between(f"Layer_{layer + 1}: Adam minus AdamW", apart, -0.05, 0.05, theirs))
    checks += _all_numbers(raws, RATES, PUBLISHED1, "Layer_")
    return judge(checks, "That SGD also moves layers 2 and 3 least is judged by itself, over learning rates.")


def verdict_rates(raws: Sequence[Raw]) -> Verdict:
    """SGD's change is the least in every layer, at the most accurate learning rate of each optimiser."""
    best: dict[str, list[Raw]] = {
        name: [max(raw[name], key=lambda one: one["accuracy"]) for raw in raws] for name in GRID
    }
    checks: list[Check] = []
    others = [name for name in GRID if name != "sgd"]
    for layer in range(3):
        theirs = {name: abs(PUBLISHED1[name][layer] - (1.0, 0.035, 0.035)[layer]) for name in GRID}
        checks.append(
            less(
                f"Layer_{layer + 1}: |change| under SGD minus the least of the others",
                [_change(one, layer) for one in best["sgd"]],
                [min(_change(best[name][seed], layer) for name in others) for seed in range(len(raws))],
                round(theirs["sgd"] - min(theirs[name] for name in others), 3),
            )
        )
    checks += [above(f"accuracy of {LABELS[name]}", [one["accuracy"] for one in best[name]], TRAINED) for name in GRID]
    for name in GRID:
        checks.append(shown(f"learning rate of {LABELS[name]}", [one["rate"] for one in best[name]]))
    return judge(
        checks, "The paper gives no learning rate of SGD; here each optimiser has the most accurate of its own."
    )


def verdict2(raws: Sequence[Raw], published: Published = PUBLISHED2) -> Verdict:
    """SGD ends closest to the start in every layer, at like accuracy; Adam and AdamW alike."""
    start = (1.0, 0.070, 0.050)
    raws = [matched(raw) for raw in raws]
    checks: list[Check] = []
    for layer in range(3):
        theirs = {name: abs(float(published[name][layer] or math.nan) - start[layer]) for name in CNN_RATES}
        ours = {name: [_change(raw[name], layer) for raw in raws] for name in CNN_RATES}
        checks.append(
            less(
                f"conv{layer + 1}: |change| under SGD minus the least of the others",
                ours["sgd"],
                [min(ours[name][seed] for name in ADAPTIVE) for seed in range(len(raws))],
                round(theirs["sgd"] - min(theirs[name] for name in ADAPTIVE), 3),
            )
        )
        apart = [raw["adam"]["final"][layer] - raw["adamw"]["final"][layer] for raw in raws]
        both = float(published["adam"][layer] or math.nan) - float(published["adamw"][layer] or math.nan)
        checks.append(between(f"conv{layer + 1}: Adam minus AdamW", apart, -0.05, 0.05, round(both, 3)))
    apart = [abs(raw["sgd"]["accuracy"] - raw["adam"]["accuracy"]) for raw in raws]
    checks.append(below("accuracy of SGD against Adam, |difference|", apart, 0.1, "similar"))
    checks.append(shown("learning rate of SGD", [raw["sgd"]["rate"] for raw in raws]))
    checks += _all_numbers(raws, CNN_RATES, published, "conv")
    return judge(
        checks,
        "SGD has that learning rate, of three, whose accuracy is closest to Adam's; a lower one moves and learns less.",
    )


def verdict_appendix2(raws: Sequence[Raw]) -> Verdict:
    """As Table 2."""
    return verdict2(raws, PUBLISHED_A2)


def _drawn(raws: Sequence[Raw], rates: Mapping[str, object], published: Published, what: str, caption: str) -> Figure:
    names = [LABELS[name] for name in rates]
    panels = []
    for layer in range(3):
        series = [
            Series(when, names, [[raw[name][when][layer] for name in rates] for raw in raws])
            for when in ("initial", "final")
        ]
        printed = [published[name][layer] if name in published else None for name in rates]
        series.append(Series("final, published", names, [printed], published=True))
        panels.append(Panel("optimiser", "PII", series, f"{what}{layer + 1}", "bars"))
    return Figure(panels, caption)


def _drawn1(raws: Sequence[Raw]) -> Figure:
    return _drawn(raws, RATES, PUBLISHED1, "Layer_", "PII of columns before and after training; Layer_1 starts at 1.")


def _drawn2(raws: Sequence[Raw]) -> Figure:
    raws = [matched(raw) for raw in raws]
    caption = "PII of the central taps' columns, of conv1's filters where images are grey; conv1 starts at 1."
    return _drawn(raws, CNN_RATES, PUBLISHED2, "conv", caption)


def _drawn_appendix2(raws: Sequence[Raw]) -> Figure:
    raws = [matched(raw) for raw in raws]
    return _drawn(raws, CNN_RATES, PUBLISHED_A2, "conv", "As Table 2, with a hundred classes.")


def _drawn_rates(raws: Sequence[Raw]) -> Figure:
    picks: list[tuple[str, Callable[[Raw], float]]] = [
        (f"|change of PII|, Layer_{layer + 1}", lambda one, layer=layer: _change(one, layer))  # type: ignore[misc]
        for layer in range(3)
    ]
    picks.append(("accuracy (fraction)", lambda one: float(one["accuracy"])))
    panels = []
    for title, pick in picks:
        series = [
            Series(LABELS[name], list(rates), [[pick(one) for one in raw[name]] for raw in raws])
            for name, rates in GRID.items()
        ]
        panels.append(Panel("learning rate", title, series, x_log=True))
    return Figure(panels, "Three hidden layers, the first of equal weights; change from before to after training.")


def _perceptron_sizes(settings: Settings) -> dict[str, int]:
    if settings.scale == "small":
        return {"width": 200, "steps": 1200, "batch": 143, "seed": settings.seed}  # ten batches of digits an epoch
    return {"width": 500, "steps": 20 * 117, "batch": 512, "seed": settings.seed}


def _all_numbers(raws: Sequence[Raw], names: Mapping[str, object], published: Published, what: str) -> list[Check]:
    checks = []
    for name in names:
        printed = published.get(name, (None,) * 4)
        for layer in range(3):
            values = [raw[name]["final"][layer] for raw in raws]
            checks.append(shown(f"{LABELS[name]}, {what}{layer + 1}: PII after training", values, printed[layer]))
        percent = [100 * raw[name]["accuracy"] for raw in raws]
        checks.append(shown(f"{LABELS[name]}: test accuracy (%)", percent, printed[3]))
    return checks


def _of(raws: Sequence[Raw], name: str, field: str) -> list[list[float]]:
    return [raw[name][field] for raw in raws]


def _change(one: Raw, layer: int) -> float:
    return abs(float(one["final"][layer]) - float(one["initial"][layer]))


def _columns(layer: nn.Module) -> float:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return float(pii(weight.detach(), vectors="cols").item())


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T1",
        "Table 1: optimisers and a layer that starts with equal weights",
        "Under SGD the PII of Layer_1 stays near 1; under adaptive methods it falls; Adam and AdamW agree.",
        table1,
        verdict1,
        _drawn1,
        needs=("digits", "mnist"),
        size="digits, three hidden layers of 200 instead of 500, 1200 steps.",
    ),
    Experiment(
        "S0-T1b",
        "Table 1 over learning rates: which optimiser changes PII least",
        "SGD changes the PII of every layer least.",
        learning_rates,
        verdict_rates,
        _drawn_rates,
        needs=("digits", "mnist"),
        size="as Table 1, three learning rates of SGD, two of Adam and RMSprop.",
    ),
    Experiment(
        "S0-T2",
        "Table 2: optimisers on a convolutional network",
        "At like accuracy SGD ends closest to the start in every layer; Adam and AdamW agree.",
        table2,
        verdict2,
        _drawn2,
        needs=("digits", "cifar10"),
        size="digits, widths 16, 32, 64 instead of 64, 128, 256, 275 steps, three rates of SGD; conv1 by filters.",
    ),
    Experiment(
        "S0-A2",
        "Appendix, Table 2: optimisers with a hundred classes",
        "At like accuracy SGD ends closest to the start in every layer; Adam and AdamW agree.",
        appendix2,
        verdict_appendix2,
        _drawn_appendix2,
        needs=("digits", "cifar100"),
        size="pairs of digits as two channels, a hundred classes; otherwise as Table 2.",
    ),
)

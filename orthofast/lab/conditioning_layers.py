"""Huang et al. 2020 layer by layer: Figures 3 to 5 on deep perceptrons, with and without batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import orthofast
from orthofast.lab.conditioning_fisher import images
from orthofast.lab.data import Images
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.missing import over
from orthofast.lab.nets import mlp
from orthofast.lab.verdict import Check, Number, Verdict, above, below, judge, less, near, shown

DEPTH, WIDTH = 20, 256
KINDS = {
    "Plain, random": ("none", "uniform"),
    "BN, random": ("hidden", "uniform"),
    "Plain, He": ("none", "he"),
    "BN, He": ("hidden", "he"),
}
RATES = (0.05, 0.1, 0.5, 1.0)
# steps of gradient descent, images of each, images that are measured
TRAINING = {"small": (12, 360, 1437), "paper": (100, 60_000, 60_000)}


def deep_perceptron(data: Images, kind: str, seed: int) -> nn.Sequential:
    """20 linear layers of width 256, random or by He, with or without batch normalisation."""
    torch.manual_seed(seed)
    normalization, init = KINDS[kind]
    widths = [data.train.shape[1], *[WIDTH] * (DEPTH - 1), data.classes]
    return mlp(widths, normalization=normalization, init=init).to(data.train.device)


def descended(model: nn.Module, inputs: Tensor, labels: Tensor, rate: float, steps: int) -> list[float]:
    """Full gradient descent, in place; the loss before each step and after the last."""
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-rate)
    with torch.no_grad():
        return [*losses, functional.cross_entropy(model(inputs), labels).item()]


def by_layer(model: nn.Module, data: Images, rows: int) -> dict[str, Any]:
    """Spectra and neurons of each layer: true labels, float64, batch norm as in training.

    Largest eigenvalues of both covariances, the trace of the output gradients', kappa of inputs at 80 % and of output
    gradients at 50 %, dying and full neurons; the last three without those of the last layer, which has no activation.
    """
    loader = [(data.train[:rows].double(), data.train_labels[:rows])]
    report = orthofast.conditioning(
        model.double(), loader, loss=nn.CrossEntropyLoss(), labels="empirical", p=(0.5, 0.8)
    )
    layers = list(report.layers.values())
    return {
        "lambda_x": [layer.lambda_max_x for layer in layers],
        "lambda_g": [layer.lambda_max_g for layer in layers],
        "trace_g": [_trace(layer.spectrum_g) for layer in layers],
        "kappa_x": [layer.kappa_x.get(0.8, math.nan) for layer in layers],
        "kappa_g": [layer.kappa_g.get(0.5, math.nan) for layer in layers[:-1]],
        "dead": [math.nan if layer.dead is None else layer.dead for layer in layers[:-1]],
        "full": [math.nan if layer.full is None else layer.full for layer in layers[:-1]],
    }


def _trace(spectrum: Tensor | None) -> float:
    """NaN of a layer that could not be measured, such as one whose weights are not finite."""
    return math.nan if spectrum is None else spectrum.sum().item()


# Figure 3


def figure3(settings: Settings) -> Raw:
    """Largest eigenvalues at the start, and after gradient descent at the best of four rates."""
    steps, batch, rows = TRAINING[settings.scale]
    data = images(settings)
    found: Raw = {"layer": list(range(1, DEPTH + 1))}
    for kind in KINDS:
        start = by_layer(deep_perceptron(data, kind, settings.seed), data, rows)
        losses, models = {}, {}
        for rate in RATES:
            models[rate] = deep_perceptron(data, kind, settings.seed)
            losses[rate] = descended(models[rate], data.train[:batch], data.train_labels[:batch], rate, steps)[-1]
        best = models[min(RATES, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)]
        end = by_layer(best, data, rows)
        found[kind] = {"start": _magnitudes(start), "end": _magnitudes(end), "loss": losses}
    return found


def _magnitudes(layers: dict[str, Any]) -> dict[str, Any]:
    return {key: layers[key] for key in ("lambda_x", "lambda_g", "trace_g")}


def _fall(values: Sequence[Number]) -> float | None:
    """Largest over smallest of layers 2 to 19: those whose inputs and outputs are hidden; None if one has no number."""
    inner = [value for value in values[1:-1] if value is not None and math.isfinite(value)]
    if len(inner) < len(values) - 2:
        return None
    return max(inner) / min(inner) if min(inner) > 0 else math.inf


def _verdict3(raws: Sequence[Raw]) -> Verdict:
    checks: list[Check] = []
    for kind in KINDS:
        for side, said in (("lambda_x", "inputs"), ("lambda_g", "output gradients")):
            falls = [_fall(raw[kind]["start"][side]) for raw in raws]
            what = f"{kind}: largest over smallest lambda_max of {said}, layers 2 to 19"
            if kind == "Plain, random":
                checks.append(above(what, falls, 1e6, "decays exponentially (image)"))
            else:
                checks.append(below(what, falls, 100, "stable (image)"))
            later = [_fall(raw[kind]["end"][side]) for raw in raws]
            checks.append(shown(f"{what}, after training", later))
    rates = [_layer_rate(raw["Plain, random"]["start"]["lambda_x"]) for raw in raws]
    checks.append(near("Plain, random: factor of lambda_max of inputs per layer", rates, 1 / 6, 0.05, "no number"))
    for kind in ("BN, random", "BN, He"):
        grown = [_layer_rate(raw[kind]["start"]["lambda_g"]) for raw in raws]
        checks.append(shown(f"{kind}: factor of lambda_max of output gradients per layer at the start", grown))
        starts = [raw[kind]["start"] for raw in raws]
        checks.append(
            shown(
                f"{kind}: factor of the output gradients' squared norm per layer towards the inputs, layers 19 to 2",
                [_growth(start["trace_g"]) for start in starts],
                "pi / (pi - 1) = 1.467 (Yang et al. 2019)",
            )
        )
        for layer in (19, 10):
            shares = [over(start["lambda_g"][layer - 1], start["trace_g"][layer - 1]) for start in starts]
            checks.append(shown(f"{kind}: lambda_max of output gradients over their trace, layer {layer}", shares))
    return judge(
        checks,
        "Stable is taken as within a factor of 100 from layer 2 to 19; the paper gives no number. The 1/6 per "
        "layer is what weights of variance 1 / (3 in) and a ReLU make of the mean square. At its start a network with "
        "batch normalisation has output gradients that grow towards the inputs: by Yang et al. 2019 their squared norm "
        "by pi / (pi - 1) per layer with ReLU, a factor of 675 over the 17 steps from layer 19 to 2. On digits the "
        "trace of Sigma_g grows so; lambda_max grows less, since its share of the trace falls on the way, and still by "
        "more than the bound.",
    )


def _growth(values: Sequence[Number]) -> float | None:
    return _power(over(values[1], values[18]), 1 / 17)


def _layer_rate(values: Sequence[Number]) -> float | None:
    return _power(over(values[18], values[3]), 1 / 15)


def _power(value: float | None, exponent: float) -> float | None:
    return None if value is None else float(value**exponent)


def _drawn3(raws: Sequence[Raw]) -> Figure:
    panels = []
    for init in ("random", "He"):
        for side, title in (
            ("lambda_x", "largest eigenvalue of Σ_x"),
            ("lambda_g", "largest eigenvalue of Σ_g"),
        ):
            series = [
                Series(f"{net}, {when}", raws[0]["layer"], [raw[f"{net}, {init}"][key][side] for raw in raws])
                for net in ("Plain", "BN")
                for when, key in (("start", "start"), ("trained", "end"))
            ]
            panels.append(Panel("layer", title, series, title=f"{init} weights", y_log=True, points=False))
    return Figure(panels, "20 linear layers of width 256, ReLU; full gradient descent at the best of four rates.")


# Figure 5


def figure5(settings: Settings) -> Raw:
    """Condition numbers and neurons at the start."""
    rows = TRAINING[settings.scale][2]
    data = images(settings)
    found: Raw = {"layer": list(range(1, DEPTH + 1))}
    for kind in KINDS:
        layers = by_layer(deep_perceptron(data, kind, settings.seed), data, rows)
        found[kind] = {key: layers[key] for key in ("kappa_x", "kappa_g", "dead", "full")}
    return found


DEEP = slice(1, 19)  # layers 2 to 19: the inputs of the first are the images


def _verdict5(raws: Sequence[Raw]) -> Verdict:
    checks: list[Check] = []
    for init in ("random", "He"):
        plain, bn = ([raw[f"{net}, {init}"] for raw in raws] for net in ("Plain", "BN"))
        for key, name in (("kappa_x", "inputs, kappa at 80%"), ("kappa_g", "output gradients, kappa at 50%")):
            shares = [
                sum(_lower(b, p) for b, p in zip(normed[key][DEEP], bare[key][DEEP], strict=True))
                / len(bare[key][DEEP])
                for normed, bare in zip(bn, plain, strict=True)
            ]
            checks.append(
                above(f"{init}: share of layers 2 to 19 where BN is better, {name}", shares, 0.9, "BN better")
            )
            for net, cells in (("Plain", plain), ("BN", bn)):
                checks.append(shown(f"{net}, {init}: layer 10, {name}", [cell[key][9] for cell in cells]))
        for key, name in (("dead", "dying"), ("full", "full")):
            checks += [
                below(f"BN, {init}: {name} neurons in all layers", [_total(cell[key]) for cell in bn], 0.5, "none"),
                less(
                    f"Plain, {init}: {name} neurons, layer 1 minus layer 19",
                    [cell[key][0] for cell in plain],
                    [cell[key][18] for cell in plain],
                    "rise with the layer",
                ),
                shown(f"Plain, {init}: {name} neurons of layer 19", [cell[key][18] for cell in plain]),
            ]
    return judge(checks, "Where an eigenvalue lies below what float64 resolves, kappa is a lower bound.")


def _total(counts: Sequence[Number]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _lower(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other


def _drawn5(raws: Sequence[Raw]) -> Figure:
    panels = []
    for key, title in (
        ("kappa_x", "κ at 80 % of Σ_x"),
        ("kappa_g", "κ at 50 % of Σ_g"),
        ("dead", "dying neurons of 256"),
        ("full", "full neurons of 256"),
    ):
        count = len(raws[0]["BN, He"][key])
        series = [Series(kind, raws[0]["layer"][:count], [raw[kind][key] for raw in raws]) for kind in KINDS]
        panels.append(Panel("layer", title, series, y_log=key.startswith("kappa"), points=False))
    return Figure(panels, "20 linear layers of width 256 at their start, ReLU. The largest κ are lower bounds.")


# Figure 4

# 0: the layer's weights stay as they are; the first digit is the first layer
MASKS = ("11111", "01111", "00111", "00011", "00001", "11101", "11110")
# width, steps, images, learning rate
FREEZING = {"small": (64, 200, 720, 0.5), "paper": (256, 200, 60_000, 0.5)}


def figure4(settings: Settings) -> Raw:
    """Training loss of 5 linear layers with BN, some of them frozen."""
    width, steps, count, rate = FREEZING[settings.scale]
    data = images(settings)
    found: Raw = {"step": list(range(steps + 1)), "loss": {}}
    for mask in MASKS:
        torch.manual_seed(settings.seed)
        model = mlp([data.train.shape[1], *[width] * 4, data.classes], normalization="hidden").to(settings.device)
        linear = [layer for layer in model if isinstance(layer, nn.Linear)]
        for layer, digit in zip(linear, mask, strict=True):
            layer.weight.requires_grad_(digit == "1")
        found["loss"][mask] = descended(model, data.train[:count], data.train_labels[:count], rate, steps)
    return found


def _verdict4(raws: Sequence[Raw]) -> Verdict:
    whole = [raw["loss"]["11111"] for raw in raws]
    checks = [shown("final loss, no layer frozen", [losses[-1] for losses in whole])]
    for mask in MASKS[1:]:
        losses = [raw["loss"][mask] for raw in raws]
        checks += [
            below(
                f"{mask}: final loss over the first",
                [over(one[-1], one[0]) for one in losses],
                0.5,
                "still falls (image)",
            ),
            above(
                f"{mask}: final loss over that of no frozen layer",
                [over(one[-1], other[-1]) for one, other in zip(losses, whole, strict=True)],
                1,
                "ends worse (image)",
            ),
        ]
    return judge(checks)


def _drawn4(raws: Sequence[Raw]) -> Figure:
    every = slice(None, None, 4)
    series = [Series(mask, raws[0]["step"][every], [raw["loss"][mask][every] for raw in raws]) for mask in MASKS]
    panel = Panel("step", "training loss (nats)", series, y_log=True, points=False)
    return Figure(
        [panel], "5 linear layers with BN, full gradient descent at 0.5; 0 marks frozen layers, first to last."
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S2-F3",
        "Figure 3: largest eigenvalues by layer, 20 layers of width 256",
        "Plain networks with random weights lose the scale of inputs and gradients exponentially; He's weights and "
        "batch normalisation keep it.",
        figure3,
        _verdict3,
        _drawn3,
        needs=DATA,
        size="digits; 12 steps on 360 images at each rate.",
    ),
    Experiment(
        "S2-F4",
        "Figure 4: frozen layers, 5 linear layers with BN",
        "With the weights of some layers blocked the loss still falls, and ends higher.",
        figure4,
        _verdict4,
        _drawn4,
        needs=DATA,
        size="digits, width 64 instead of 256.",
    ),
    Experiment(
        "S2-F5",
        "Figure 5: condition numbers by layer, and neurons that always or never fire",
        "Batch normalisation improves the conditioning of inputs and of output gradients; it leaves no dying or full "
        "neurons, whose number rises with the layer without it.",
        figure5,
        _verdict5,
        _drawn5,
        needs=DATA,
        size="digits, at the start.",
    ),
)

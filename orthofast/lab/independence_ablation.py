"""Lu et al. 2024 on normalisation and shortcuts in perceptrons: Table 3, and the appendix's Table 4.

"Original" has neither, "Norm_Res" both; PII of columns after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.nets import NormalizedResidualMLP
from orthofast.lab.verdict import Check, Verdict, above, judge, less, ordered, shown
from orthofast.metrics import pii

ARMS = {  # of the ablation: batch normalisation, shortcuts
    "Original": (False, False),
    "Residual": (False, True),
    "Normalization": (True, False),
    "Norm_Res": (True, True),
}
BOTH = ("Original", "Norm_Res")
Printed = dict[str, tuple[float, float]]  # of each arm: PII and accuracy (%)


class Sizes(TypedDict):
    """What :func:`train_arm` takes besides what is compared."""

    width: int
    hidden: int
    steps: int
    batch: int
    seed: int


class Row3(NamedTuple):
    """A row of Table 3: what is trained, steps of the small version, what the paper prints."""

    activation: str
    optimizer: str
    rate: float
    steps: int
    printed: Printed


ROWS3 = {
    "Sigmoid, Adam": Row3("sigmoid", "adam", 1e-3, 1200, {"Original": (0.278, 97.88), "Norm_Res": (0.139, 98.13)}),
    "Tanh, Adam": Row3("tanh", "adam", 1e-3, 300, {"Original": (0.136, 98.01), "Norm_Res": (0.118, 98.14)}),
    "ReLU, Adam": Row3("relu", "adam", 1e-3, 300, {"Original": (0.138, 98.23), "Norm_Res": (0.09, 98.45)}),
    "GELU, Adam": Row3("gelu", "adam", 1e-3, 1200, {"Original": (0.141, 98.16), "Norm_Res": (0.081, 98.24)}),
    "GELU, SGD": Row3("gelu", "momentum", 0.1, 1200, {"Original": (0.053, 97.54), "Norm_Res": (0.036, 98.13)}),
}
ABLATION = {  # appendix, Table 4: hidden layers 1 to 3
    "Original": (0.131, 0.148, 0.153),
    "Residual": (0.111, 0.137, 0.147),
    "Normalization": (0.100, 0.107, 0.128),
    "Norm_Res": (0.079, 0.090, 0.107),
}
ALLOWED = 1.0  # % of the test images: by how much accuracy may differ before it counts as lower


def train_arm(
    data: Images,
    arm: str,
    activation: str,
    optimizer: str,
    rate: float,
    *,
    width: int,
    hidden: int,
    steps: int,
    batch: int,
    seed: int,
    shared: bool = False,
) -> tuple[NormalizedResidualMLP, dict[str, object]]:
    """A perceptron of equal hidden layers, with or without normalisation and shortcuts, trained.

    Args:
        data: flat images.
        arm: key of ``ARMS``.
        activation: of all layers.
        optimizer: by name.
        rate: its learning rate.
        width: of the hidden layers.
        hidden: how many.
        steps: updates.
        batch: images of one.
        seed: of weights and batches; the arms of one seed start with the same weights.
        shared: one batch normalisation for all hidden layers and accuracy by the batch's own statistics, as in the
            paper's code.

    Returns:
        The network, and its "layers" (column PII of each hidden layer), "initial" (their mean before training), "pii"
        (after it) and "accuracy" (fraction).
    """
    normalize, residual = ARMS[arm]
    torch.manual_seed(seed)
    model = NormalizedResidualMLP(
        data.train.shape[1],
        width,
        hidden,
        data.classes,
        activation=activation,
        normalize=normalize,
        residual=residual,
        shared=shared,
    ).to(data.train.device)
    initial = _layers(model)
    fit(model, data, optimizer_for(model, optimizer, rate), steps=steps, batch=batch, seed=seed)
    layers = _layers(model)
    right = accuracy(model, data, batch_statistics=shared)
    found = {"layers": layers, "initial": _mean(initial), "pii": _mean(layers), "accuracy": right}
    return model, found


def table3(settings: Settings) -> Raw:
    """Original against Norm_Res, by activation and optimiser."""
    data = load(settings).flat()
    found: Raw = {}
    for name, (activation, optimizer, rate, steps, _) in ROWS3.items():
        sizes = perceptron_sizes(settings, steps)
        found[name] = {arm: train_arm(data, arm, activation, optimizer, rate, **sizes)[1] for arm in BOTH}
    return found


def appendix4(settings: Settings) -> Raw:
    """Normalisation and shortcuts, each alone and both; GELU and Adam."""
    data, sizes = load(settings).flat(), perceptron_sizes(settings)
    return {arm: train_arm(data, arm, "gelu", "adam", 1e-3, **sizes, shared=True)[1] for arm in ARMS}


def verdict3(raws: Sequence[Raw]) -> Verdict:
    """Norm_Res has the lower PII in each row, and no lower accuracy; the SGD row is below the same net's with Adam."""
    checks: list[Check] = []
    for name, row in ROWS3.items():
        original, norm_res = (values_of(raws, name, arm, "pii") for arm in BOTH)
        theirs = gained(row.printed, 0)
        checks.append(less(f"{name}: PII of Norm_Res minus Original", norm_res, original, theirs))
        original, norm_res = (values_of(raws, name, arm, "accuracy") for arm in BOTH)
        more = [100 * (both - without) for both, without in zip(norm_res, original, strict=True)]
        what = f"{name}: test accuracy of Norm_Res minus Original (%)"
        checks.append(above(what, more, -ALLOWED, gained(row.printed, 1)))
    for arm in BOTH:
        sgd, adam = (values_of(raws, name, arm, "pii") for name in ("GELU, SGD", "GELU, Adam"))
        theirs = round(ROWS3["GELU, SGD"].printed[arm][0] - ROWS3["GELU, Adam"].printed[arm][0], 3)
        checks.append(less(f"GELU, {arm}: PII with SGD minus with Adam", sgd, adam, theirs))
    for name, row in ROWS3.items():
        checks += printed_numbers(raws, name, row.printed, "pii")
    checks.append(shown("PII before training", [raw["GELU, Adam"]["Original"]["initial"] for raw in raws]))
    return judge(
        checks,
        f"Accuracy may be {ALLOWED} % lower, four test images. Batch normalisation is each layer's own; the paper's "
        "code shares one among all and never calls eval().",
    )


def verdict_appendix4(raws: Sequence[Raw]) -> Verdict:
    """Norm_Res < Normalization < Residual < Original."""
    order = list(reversed(ARMS))
    values = {arm: [raw[arm]["pii"] for raw in raws] for arm in ARMS}
    steps = [_mean(ABLATION[arm]) for arm in order]
    theirs = round(min(later - earlier for earlier, later in pairwise(steps)), 3)
    checks = [ordered(f"mean PII, {' < '.join(order)}", [values[arm] for arm in order], theirs)]
    checks += [
        shown(f"{arm}: mean PII of the hidden layers", values[arm], round(_mean(ABLATION[arm]), 3)) for arm in ARMS
    ]
    for arm in ARMS:
        for layer in range(len(ABLATION[arm])):
            measured = [raw[arm]["layers"][layer] for raw in raws]
            checks.append(shown(f"{arm}, hidden layer {layer + 1}: PII", measured, ABLATION[arm][layer]))
    checks += [shown(f"{arm}: test accuracy (%)", [100 * raw[arm]["accuracy"] for raw in raws]) for arm in ARMS]
    return judge(
        checks,
        "Judged on the mean of the hidden layers. One batch normalisation for all, as in the paper's code. "
        "Normalization and Norm_Res are close here, closer before about 1000 steps.",
    )


def _drawn3(raws: Sequence[Raw]) -> Figure:
    panels, names = [], list(ROWS3)
    for field, title, factor, place in (("pii", "PII", 1, 0), ("accuracy", "test accuracy (%)", 100, 1)):
        series = []
        for arm in BOTH:
            series.append(Series(arm, names, [[factor * raw[name][arm][field] for name in names] for raw in raws]))
            printed = [row.printed[arm][place] for row in ROWS3.values()]
            series.append(Series(f"{arm}, published", names, [printed], published=True))
        panels.append(Panel("activation, optimiser", title, series, kind="bars"))
    return Figure(panels, "Mean PII of the hidden layers' columns after training, with and without BN and shortcuts.")


def _drawn_appendix4(raws: Sequence[Raw]) -> Figure:
    depth = list(range(1, len(raws[0]["Original"]["layers"]) + 1))
    series = [Series(arm, depth, [raw[arm]["layers"] for raw in raws]) for arm in ARMS]
    printed = [Series(arm, [1, 2, 3], [ABLATION[arm]], published=True) for arm in ARMS]
    axes = ("hidden layer", "PII")
    return Figure(
        [Panel(*axes, series, "measured"), Panel(*axes, printed, "published")],
        "PII of columns after training; batch normalisation and shortcuts alone and together.",
    )


def perceptron_sizes(settings: Settings, steps: int = 1200) -> Sizes:
    """Sizes for :func:`train_arm`: the paper's, or so many steps of small ones, ten batches of digits an epoch."""
    if settings.scale == "small":
        return Sizes(width=200, hidden=5, steps=steps, batch=143, seed=settings.seed)
    return Sizes(width=500, hidden=5, steps=20 * 117, batch=512, seed=settings.seed)


def _layers(model: NormalizedResidualMLP) -> list[float]:
    return [float(pii(layer.get_parameter("weight").detach(), vectors="cols").item()) for layer in model.hidden]


def values_of(raws: Sequence[Raw], row: str, arm: str, field: str) -> list[float]:
    """One number a seed."""
    return [float(raw[row][arm][field]) for raw in raws]


def gained(printed: Printed, place: int) -> float:
    """What the paper prints of Norm_Res minus Original: 0 PII, 1 accuracy (%)."""
    return round(printed["Norm_Res"][place] - printed["Original"][place], 3)


def printed_numbers(raws: Sequence[Raw], row: str, printed: Printed, field: str) -> list[Check]:
    """PII (of the first layer, where ``field`` holds several) and accuracy of both arms, for information."""
    checks = []
    for arm in BOTH:
        values = [raw[row][arm][field] for raw in raws]
        values = [value[0] if isinstance(value, list) else value for value in values]
        checks.append(shown(f"{row}, {arm}: PII{'' if field == 'pii' else ' of stage 1'}", values, printed[arm][0]))
        percent = [100 * value for value in values_of(raws, row, arm, "accuracy")]
        checks.append(shown(f"{row}, {arm}: test accuracy (%)", percent, printed[arm][1]))
    return checks


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T3",
        "Table 3: perceptrons with and without batch normalisation and shortcuts",
        "Norm_Res lowers PII and does not lower accuracy, for each activation; PII is lower with SGD than with Adam.",
        table3,
        verdict3,
        _drawn3,
        needs=("digits", "mnist"),
        size="digits, five hidden layers of 200 instead of 500, 300 steps, 1200 with sigmoid and GELU.",
    ),
    Experiment(
        "S0-A4",
        "Appendix, Table 4: batch normalisation and shortcuts, each alone and both",
        "PII of Norm_Res < Normalization < Residual < Original.",
        appendix4,
        verdict_appendix4,
        _drawn_appendix4,
        needs=("digits", "mnist"),
        size="digits, five hidden layers of 200 instead of 500, GELU, Adam, 1200 steps.",
    ),
)

"""Lu et al. 2024 on optimisers: Table 1, and once more over learning rates; what Table 2 is judged by too.

PII of columns, before and after training; one layer starts with equal weights, whose PII is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.missing import distance, least, mean, minus, times
from orthofast.lab.nets import NormalizedResidualMLP, constant_
from orthofast.lab.verdict import Check, Number, Verdict, above, below, judge, less, shown
from orthofast.metrics import pii

ADAPTIVE = ("adam", "adamw", "rmsprop")
FOUR = ("sgd", *ADAPTIVE)  # of the paper
LABELS = {
    "sgd": "SGD",
    "momentum": "SGD, momentum",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "muon": "Muon",
}
RATES = {"sgd": (0.1, 0.2, 0.4), "momentum": (0.02,), "adam": (1e-3,), "adamw": (1e-3,), "rmsprop": (1e-3,)}
GRID = {"sgd": (0.05, 0.1, 0.2, 0.4), "adam": (1e-4, 3e-4, 1e-3, 3e-3), "rmsprop": (1e-4, 3e-4, 1e-3, 3e-3)}
TRAINED = 0.9  # accuracy from which a rate counts
SIMILAR = 0.05  # of accuracies; Table 1, which calls its own similar, has 0.046 between SGD and Adam
MATCHED = "SGD has that of its learning rates whose accuracy is closest to Adam's; a lower one moves and learns less."
PUBLISHED1 = {
    "sgd": (0.996, 0.049, 0.048, 93.59),
    "adam": (0.432, 0.153, 0.109, 98.22),
    "adamw": (0.411, 0.153, 0.114, 97.92),
    "rmsprop": (0.766, 0.234, 0.149, 97.94),
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
    fit(model, data, optimizer_for(model, name, rate), steps=steps, batch=batch, seed=seed)
    final = [_columns(layer) for layer in model.hidden]
    return {"initial": initial, "final": final, "accuracy": accuracy(model, data)}


def table1(settings: Settings) -> Raw:
    """All optimisers, SGD at several learning rates."""
    return _perceptrons(settings, RATES)


def learning_rates(settings: Settings) -> Raw:
    """Optimisers at several learning rates each."""
    return _perceptrons(settings, GRID)


def _perceptrons(settings: Settings, grid: Mapping[str, Sequence[float]]) -> Raw:
    sizes = _perceptron_sizes(settings)
    data = load(settings).flat()
    return {
        name: [train_perceptron(data, name, rate, **sizes) | {"rate": rate} for rate in rates]
        for name, rates in grid.items()
    }


def matched(raw: Raw) -> Raw:
    """Of each optimiser the run with the accuracy closest to Adam's: the paper, too, adjusts rates to like accuracy."""
    target = raw["adam"][0]["accuracy"]

    def apart(run: Raw) -> float:
        known = distance(run["accuracy"], target)
        return math.inf if known is None else known

    return {name: min(runs, key=apart) for name, runs in raw.items()}


def verdict1(raws: Sequence[Raw]) -> Verdict:
    """At like accuracy Layer_1 under SGD stays near 1 and falls under adaptive methods; Adam and AdamW are closest."""
    raws = [matched(raw) for raw in raws]
    final = {name: _of(raws, name, "final") for name in RATES}
    checks = [above("Layer_1 under SGD", [one[0] for one in final["sgd"]], 0.9, PUBLISHED1["sgd"][0])]
    sgd = [one[0] for one in final["sgd"]]
    for name in ADAPTIVE:
        theirs = round(PUBLISHED1[name][0] - PUBLISHED1["sgd"][0], 3)
        fallen = [one[0] for one in final[name]]
        checks += [less(f"Layer_1 under {LABELS[name]} minus under SGD", fallen, sgd, theirs, margin=0.1)]
    checks += [closest(raws, PUBLISHED1), *like_accuracy(raws, PUBLISHED1)]
    checks += all_numbers(raws, RATES, PUBLISHED1, "Layer_")
    return judge(checks, f"{MATCHED} That it also moves layers 2 and 3 least is judged by itself, over learning rates.")


def verdict_rates(raws: Sequence[Raw]) -> Verdict:
    """SGD's change is the least in every layer, at the most accurate learning rate of each optimiser."""
    best: dict[str, list[Raw]] = {name: [max(raw[name], key=_accuracy) for raw in raws] for name in GRID}
    checks: list[Check] = []
    others = [name for name in GRID if name != "sgd"]
    for layer in range(3):
        theirs = {name: abs(PUBLISHED1[name][layer] - (1.0, 0.035, 0.035)[layer]) for name in GRID}
        checks.append(
            less(
                f"Layer_{layer + 1}: |change| under SGD minus the least of the others",
                [change_of(one, layer) for one in best["sgd"]],
                [least([change_of(best[name][seed], layer) for name in others]) for seed in range(len(raws))],
                round(theirs["sgd"] - min(theirs[name] for name in others), 3),
            )
        )
    checks += [above(f"accuracy of {LABELS[name]}", [one["accuracy"] for one in best[name]], TRAINED) for name in GRID]
    for name in GRID:
        checks.append(shown(f"learning rate of {LABELS[name]}", [one["rate"] for one in best[name]]))
    for layer in range(3):
        what = f"Layer_{layer + 1}: pairs of accurate rates in which SGD changes less (fraction)"
        checks.append(shown(what, [_wins(raw, layer) for raw in raws]))
    return judge(
        checks,
        "The paper gives no learning rate of SGD; here each optimiser has the most accurate of its own. A rate is "
        f"accurate from {TRAINED} on.",
    )


def bars_of(raws: Sequence[Raw], rates: Mapping[str, object], published: Published, what: str, caption: str) -> Figure:
    """PII before and after training beside the published one, a panel a layer."""
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
    raws = [matched(raw) for raw in raws]
    return bars_of(raws, RATES, PUBLISHED1, "Layer_", "PII of columns before and after training; Layer_1 starts at 1.")


def _drawn_rates(raws: Sequence[Raw]) -> Figure:
    picks: list[tuple[str, Callable[[Raw], Number]]] = [
        (f"|change of PII|, Layer_{layer + 1}", lambda one, layer=layer: change_of(one, layer))  # type: ignore[misc]
        for layer in range(3)
    ]
    picks.append(("accuracy (fraction)", lambda one: one["accuracy"]))
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


def all_numbers(raws: Sequence[Raw], names: Mapping[str, object], published: Published, what: str) -> list[Check]:
    """PII of each layer after training, and accuracy, for information."""
    checks = []
    for name in names:
        printed = published.get(name, (None,) * 4)
        for layer in range(3):
            values = [raw[name]["final"][layer] for raw in raws]
            checks.append(shown(f"{LABELS[name]}, {what}{layer + 1}: PII after training", values, printed[layer]))
        percent = [times(100, raw[name]["accuracy"]) for raw in raws]
        checks.append(shown(f"{LABELS[name]}: test accuracy (%)", percent, printed[3]))
    return checks


def closest(raws: Sequence[Raw], published: Published) -> Check:
    """Of all pairs of the paper's optimisers Adam and AdamW are closest in PII after training."""
    ours, others = zip(*(_distances({name: raw[name]["final"] for name in FOUR}) for raw in raws), strict=True)
    printed = minus(*_distances({name: published[name][:3] for name in FOUR}))
    what = "mean |difference| of PII over the layers: Adam from AdamW minus the closest other pair"
    return less(what, ours, others, None if printed is None else round(printed, 3))


def _distances(final: Mapping[str, Sequence[Number]]) -> tuple[Number, Number]:
    """Mean |difference| over the layers: of Adam and AdamW, and of the closest other pair."""
    apart = {
        pair: mean([distance(one, other) for one, other in zip(final[pair[0]], final[pair[1]], strict=True)])
        for pair in combinations(FOUR, 2)
    }
    own = apart.pop(("adam", "adamw"))
    return own, least(list(apart.values()))


def like_accuracy(raws: Sequence[Raw], published: Published) -> list[Check]:
    """Accuracy of SGD is like Adam's, without which its PII says little."""
    apart = [distance(raw["sgd"]["accuracy"], raw["adam"]["accuracy"]) for raw in raws]
    sgd, adam = (published[name][3] for name in ("sgd", "adam"))
    theirs = "no number" if sgd is None or adam is None else round(abs(sgd - adam) / 100, 4)
    return [
        below("accuracy of SGD against Adam, |difference|", apart, SIMILAR, theirs),
        shown("learning rate of SGD", [raw["sgd"]["rate"] for raw in raws]),
    ]


def _wins(raw: Raw, layer: int) -> float | None:
    """Of all pairs of a rate of SGD and one of another, both accurate, those in which SGD changes PII less."""
    runs = {name: [change_of(one, layer) for one in raw[name] if _accuracy(one) >= TRAINED] for name in GRID}
    more = [minus(theirs, ours) for ours in runs["sgd"] for name in GRID if name != "sgd" for theirs in runs[name]]
    return mean([None if one is None else float(one > 0) for one in more])


def _accuracy(one: Raw) -> float:
    """That of a run; below all others where it has none."""
    return -math.inf if one["accuracy"] is None else float(one["accuracy"])


def _of(raws: Sequence[Raw], name: str, field: str) -> list[list[Number]]:
    return [raw[name][field] for raw in raws]


def change_of(one: Raw, layer: int) -> float | None:
    """|PII after training minus before| of a layer."""
    return distance(one["final"][layer], one["initial"][layer])


def _columns(layer: nn.Module) -> float:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return float(pii(weight.detach(), vectors="cols").item())


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T1",
        "Table 1: optimisers and a layer that starts with equal weights",
        "At like accuracy the PII of Layer_1 stays near 1 under SGD and falls under adaptive methods; Adam and AdamW "
        "are closest.",
        table1,
        verdict1,
        _drawn1,
        needs=("digits", "mnist"),
        size="digits, three hidden layers of 200 instead of 500, 1200 steps, three learning rates of SGD.",
    ),
    Experiment(
        "S0-T1b",
        "Table 1 over learning rates: which optimiser changes PII least",
        "SGD changes the PII of every layer least.",
        learning_rates,
        verdict_rates,
        _drawn_rates,
        needs=("digits", "mnist"),
        size="as Table 1, four learning rates of each optimiser.",
    ),
)

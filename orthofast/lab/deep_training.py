"""Daneshmand et al. 2021 on training: depth slows learning, and weights made orthogonal from data undo it.

Figures 4 and 5, of perceptrons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthofast import orthogonality_gap, orthogonalize_
from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches, fit, optimizer_for
from orthofast.lab.nets import mlp
from orthofast.lab.verdict import Number, Verdict, above, below, judge, less, ordered, shown
from orthofast.metrics import singular_value_gap

LAST = 20  # steps whose mean loss is a final loss
DEPTH_4B = 20
NETWORKS = 20  # random ones that one seed averages, for what needs no training
# width, steps, batch, learning rate
SIZES = {"small": (100, 400, 100, 0.01), "paper": (800, 3000, 500, 0.01)}
SIZES_4B = {"small": (100, 400, 100, 0.01), "paper": (1000, 5000, 500, 0.01)}
DEPTHS = {"small": (15, 30, 60), "paper": (15, 30, 45, 60, 75)}
# name -> exponent, V', norm of iterative orthogonalisation; None for Xavier's random weights
STARTS: dict[str, tuple[float, str, str] | None] = {
    "Xavier": None,
    "orthogonal, paper": (0.5, "paper", "sigma"),
    "orthogonal, notebook": (1.0, "paper", "output"),
}


def perceptron(data: Images, depth: int, width: int) -> nn.Sequential:
    """So many linear layers without bias, ReLU behind all but the last, Xavier's uniform weights with gain sqrt(2)."""
    model = mlp([data.train.shape[1], *[width] * (depth - 1), data.classes], init="xavier")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(math.sqrt(2))
    return model.to(data.train.device)  # type: ignore[no-any-return, unused-ignore]


def trained(settings: Settings, depth: int, start: str) -> dict[str, Any]:
    """Gap of the logits before training, mean over batches, and the loss after it."""
    width, steps, batch, rate = SIZES[settings.scale]
    data = load(settings).standardized().flat()
    torch.manual_seed(settings.seed)
    model = perceptron(data, depth, width)
    chosen = STARTS[start]
    if chosen is not None:
        power, rotation, normalize = chosen
        inputs = next(batches(data, min(3 * width, len(data.train)), 1, settings.seed))[0]
        orthogonalize_(model, inputs, power=power, rotation=rotation, normalize=normalize)
    gap = logit_gap(model, data, batch, settings.seed)
    losses = fit(model, data, optimizer_for(model, "sgd", rate), steps=steps, batch=batch, seed=settings.seed)
    return {"gap": gap, "loss": statistics.fmean(losses[-LAST:])}


@torch.no_grad()
def logit_gap(model: nn.Module, data: Images, batch: int, seed: int) -> float:
    """Singular-value gap of the outputs, mean over an epoch's batches: what the public code records."""
    steps = len(data.train) // batch
    values = [singular_value_gap(model(inputs)) for inputs, _ in batches(data, batch, steps, seed)]
    return float(torch.stack(values).mean().item())


# Figure 4a and Figure 5


def figure4a(settings: Settings) -> Raw:
    """Xavier starts by depth; the initial gap is a mean over networks, since that of one is noisy."""
    width, _, batch, _ = SIZES[settings.scale]
    data = load(settings).standardized().flat()
    rows = []
    for depth in DEPTHS[settings.scale]:
        row = trained(settings, depth, "Xavier")
        nets = [perceptron(data, depth, width) for _ in range(NETWORKS)]
        rows.append(row | {"gap": statistics.fmean(logit_gap(net, data, batch, settings.seed) for net in nets)})
    return {"depth": list(DEPTHS[settings.scale]), "Xavier": rows}


def _verdict4a(raws: Sequence[Raw]) -> Verdict:
    gaps, losses = (_by_depth(raws, "Xavier", key) for key in ("gap", "loss"))
    depths = raws[0]["depth"]
    return judge(
        [
            ordered("initial gap of the logits over depth", gaps, "rises with depth (image)"),
            ordered("final loss over depth", losses, "rises with depth (image)"),
            *(shown(f"initial gap, depth {depth}", gap) for depth, gap in zip(depths, gaps, strict=True)),
            *(shown(f"final loss, depth {depth}", loss) for depth, loss in zip(depths, losses, strict=True)),
        ],
        "The text calls the depths widths. The gap is that of the public code: of the logits' singular values, "
        f"mean of {NETWORKS} random networks a seed.",
    )


def _drawn4a(raws: Sequence[Raw]) -> Figure:
    return _by_depth_figure(raws, ["Xavier"])


def figure5(settings: Settings) -> Raw:
    """The same from Xavier's and from orthogonal starts."""
    depths = DEPTHS[settings.scale]
    found = {start: [trained(settings, depth, start) for depth in depths] for start in STARTS}
    return {"depth": list(depths), **found}


def _verdict5(raws: Sequence[Raw]) -> Verdict:
    xavier = _by_depth(raws, "Xavier", "loss")
    checks = [shown(f"final loss at depth {raws[0]['depth'][-1]}, Xavier", xavier[-1])]
    for start in list(STARTS)[1:]:
        losses = _by_depth(raws, start, "loss")
        checks += [
            less(f"final loss at the largest depth, {start} minus Xavier", losses[-1], xavier[-1], "lower (image)"),
            below(f"final loss at the largest depth over that at the least, {start}", _ratios(losses), 1.5, "no rise"),
        ]
    return judge(
        checks,
        "V' is the slice of the paper, whose rows are not quite orthogonal. With an exactly orthogonal V', measured "
        "apart, networks of depth 30 and 60 diverged or did not learn at this rate.",
    )


def _drawn5(raws: Sequence[Raw]) -> Figure:
    return _by_depth_figure(raws, list(STARTS))


def _by_depth(raws: Sequence[Raw], start: str, key: str) -> list[list[Number]]:
    """One list a depth, with one number a seed."""
    return [[raw[start][index][key] for raw in raws] for index in range(len(raws[0]["depth"]))]


def _ratios(losses: Sequence[Sequence[Number]]) -> list[Number]:
    return [
        None if deep is None or shallow is None else deep / shallow
        for deep, shallow in zip(losses[-1], losses[0], strict=True)
    ]


def _by_depth_figure(raws: Sequence[Raw], starts: Sequence[str]) -> Figure:
    def panel(key: str, title: str, log: bool) -> Panel:
        series = [
            Series(start, raws[0]["depth"], [[one[key] for one in raw[start]] for raw in raws]) for start in starts
        ]
        return Panel("depth, linear layers", title, series, y_log=log)

    return Figure(
        [
            panel("gap", "gap of the logits before training", False),
            panel("loss", f"loss (nats), last {LAST} steps", True),
        ],
        "Perceptrons with ReLU trained by SGD.",
    )


# Figure 4b


def figure4b(settings: Settings) -> Raw:
    """Gaps and loss along training of 20 layers: before it, and after each tenth; NaN ends what diverges."""
    width, steps, batch, rate = SIZES_4B[settings.scale]
    data = load(settings).standardized().flat()
    torch.manual_seed(settings.seed)
    model = perceptron(data, DEPTH_4B, width)
    below_last = nn.Sequential(*list(model)[:-1])
    every = max(1, steps // 10)
    found: Raw = {"step": [], "gap": [], "hidden_gap": [], "loss": []}

    @torch.no_grad()
    def note(step: int) -> None:
        found["step"].append(step)
        found["gap"].append(logit_gap(model, data, batch, settings.seed))
        found["hidden_gap"].append(orthogonality_gap(below_last(data.train[:batch])))

    def after(step: int, loss: float, _: Tensor) -> None:
        if step == 1 or step % every == 0:
            found["loss"].append(loss)
        if step > 1 and step % every == 0:
            note(step)

    note(0)
    optimizer = optimizer_for(model, "sgd", rate)
    losses = fit(model, data, optimizer, steps=steps, batch=batch, seed=settings.seed, after=after)
    if not math.isfinite(losses[-1]):
        for key, last in (("step", steps), ("gap", math.nan), ("hidden_gap", math.nan), ("loss", math.nan)):
            found[key].append(last)
    return found


def _verdict4b(raws: Sequence[Raw]) -> Verdict:
    def ends(key: str) -> tuple[list[Number], list[Number]]:
        return [raw[key][-1] for raw in raws], [raw[key][0] for raw in raws]

    tied = [_correlation(raw["gap"], raw["loss"]) for raw in raws]
    hidden_end, hidden_start = ends("hidden_gap")
    return judge(
        [
            less("gap of the logits, end minus start", *ends("gap"), "falls (image)"),
            less("loss, end minus start", *ends("loss"), "falls (image)"),
            above("correlation of gap and loss along training", tied, 0.5, "fall together (image)"),
            shown("gap of the last hidden layer, start", hidden_start),
            shown("gap of the last hidden layer, end", hidden_end),
        ],
        "The paper's text says 20 layers. The gap of hidden layers, Eq. 2, falls early and then stays.",
    )


def _correlation(one: Sequence[Number], other: Sequence[Number]) -> float | None:
    known = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if len(known) < len(one) or len({a for a, _ in known}) < 2 or len({b for _, b in known}) < 2:
        return None
    return statistics.correlation([a for a, _ in known], [b for _, b in known])


def _drawn4b(raws: Sequence[Raw]) -> Figure:
    steps = raws[0]["step"]
    gaps = [
        Series(name, steps, [raw[key] for raw in raws])
        for name, key in (("logits, singular values", "gap"), ("last hidden layer, Eq. 2", "hidden_gap"))
    ]
    losses = [Series("training loss", steps, [raw["loss"] for raw in raws])]
    return Figure(
        [Panel("step", "orthogonality gap", gaps), Panel("step", "loss of the batch (nats)", losses, y_log=True)],
        "20 linear layers with ReLU, SGD.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-F4a",
        "Figure 4a: gap and loss by depth",
        "The orthogonality gap at the start and the loss after training both rise with depth.",
        figure4a,
        _verdict4a,
        _drawn4a,
        needs=DATA,
        size="width 100, 400 steps of 100 images instead of width 800 and 30 epochs of CIFAR-10.",
    ),
    Experiment(
        "S1-F4b",
        "Figure 4b: gap and loss along training",
        "They fall together.",
        figure4b,
        _verdict4b,
        _drawn4b,
        needs=DATA,
        size="width 100, 400 steps of 100 images instead of width 1000 and 50 epochs of CIFAR-10.",
    ),
    Experiment(
        "S1-F5",
        "Figure 5: orthogonal starts against Xavier's",
        "Weights made orthogonal from data remove the slowdown that depth brings.",
        figure5,
        _verdict5,
        _drawn5,
        needs=DATA,
        size="width 100, 400 steps of 100 images instead of width 800 and 30 epochs of CIFAR-10.",
    ),
)

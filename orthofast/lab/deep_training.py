"""Daneshmand et al. 2021 on training: depth slows learning, and weights made orthogonal from data undo it.

Figures 4 and 5 of perceptrons, and Figure 7 of Appendix I of convolutional networks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthofast import orthogonality_gap, orthogonalize_
from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches, fit, optimizer_for
from orthofast.lab.nets import initialize_, mlp
from orthofast.lab.verdict import Number, Verdict, above, below, judge, less, ordered, shown
from orthofast.metrics import singular_value_gap

LAST = 20  # steps whose mean loss is a final loss
NETWORKS = 20  # random ones that one seed averages, for what needs no training
# width, steps, batch, learning rate
SIZES = {"small": (100, 400, 100, 0.01), "paper": (800, 3000, 500, 0.01)}
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
        "apart, networks of depth 30 and 60 diverged at this rate.",
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
        [panel("gap", "gap of the logits before training", False), panel("loss", f"loss, last {LAST} steps", True)],
        "Perceptrons with ReLU trained by SGD.",
    )


# Figure 4b


def figure4b(settings: Settings) -> Raw:
    """Gaps and loss along training of 20 layers."""
    width, steps, batch, rate = SIZES[settings.scale]
    data = load(settings).standardized().flat()
    model = perceptron(data, 20, width)
    last_hidden = list(model)[:-1]
    every = max(1, steps // 10)
    found: Raw = {"step": [], "gap": [], "hidden_gap": [], "loss": []}

    @torch.no_grad()
    def note(step: int, loss: float, logits: Tensor | None = None) -> None:
        if step % every and step != 1:
            return
        inputs = data.train[:batch]
        found["step"].append(0 if step == 1 else step)
        found["gap"].append(logit_gap(model, data, batch, settings.seed))
        found["hidden_gap"].append(orthogonality_gap(nn.Sequential(*last_hidden)(inputs)))
        found["loss"].append(loss)

    fit(model, data, optimizer_for(model, "sgd", rate), steps=steps, batch=batch, seed=settings.seed, after=note)
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
        [Panel("step", "orthogonality gap", gaps), Panel("step", "loss of the batch", losses, y_log=True)],
        "20 linear layers with ReLU, SGD.",
    )


# Figure 7 of Appendix I

EXTRA = {"small": (5, 30), "paper": (15, 75)}  # 3 x 3 convolutions added to the network
# channels, steps, batch, learning rate
SIZES_7 = {"small": (12, 200, 30, 0.003), "paper": (256, 33_000, 30, 0.001)}


def convolutions(data: Images, extra: int, channels: int) -> nn.Sequential:
    """A narrow relative of the paper's network: a convolution, pooling to 4 x 4, ``extra`` more, a linear layer."""
    side = data.train.shape[-1]
    layers: list[nn.Module] = [
        nn.Conv2d(data.train.shape[1], channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(side // 4),
    ]
    for _ in range(extra):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, data.classes))
    initialize_(model)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return model.to(data.train.device)


def figure7(settings: Settings) -> Raw:
    """Final loss of few and of many extra convolutions, from Xavier's and from orthogonal starts."""
    channels, steps, batch, rate = SIZES_7[settings.scale]
    data = load(settings).standardized()
    found: Raw = {"extra": list(EXTRA[settings.scale]), "step": list(range(1, steps + 1)), "losses": {}}
    for extra in EXTRA[settings.scale]:
        for start in ("Xavier", "orthogonal"):
            torch.manual_seed(settings.seed)
            model = convolutions(data, extra, channels)
            if start == "orthogonal":
                inputs = next(batches(data, 2 * batch, 1, settings.seed))[0]
                orthogonalize_(model, inputs, select=_same_channels(model), normalize="output")
            optimizer = optimizer_for(model, "momentum", rate)
            losses = fit(model, data, optimizer, steps=steps, batch=batch, seed=settings.seed)
            found["losses"][f"{extra}, {start}"] = losses
    return found


def _same_channels(model: nn.Module) -> list[str]:
    """The convolutions that the paper's code writes: those with as many outputs as inputs."""
    return [
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels
    ]


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
            *(shown(f"final loss, {extra} extra, {start}", final(f"{extra}, {start}")) for extra, start in _arms(raws)),
        ],
        "The published curves themselves show Xavier ahead with 15 extra convolutions.",
    )


def _arms(raws: Sequence[Raw]) -> list[tuple[int, str]]:
    return [(extra, start) for extra in raws[0]["extra"] for start in ("Xavier", "orthogonal")]


def _tail_mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses[-LAST:] if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses[-LAST:]) else None


def _drawn7(raws: Sequence[Raw]) -> Figure:
    panels = []
    for extra in raws[0]["extra"]:
        series = []
        for start in ("Xavier", "orthogonal"):
            runs = [_smoothed(raw["losses"][f"{extra}, {start}"]) for raw in raws]
            series.append(Series(start, raws[0]["step"][LAST - 1 :: LAST], runs))
        panels.append(Panel("step", f"loss, mean of {LAST} steps", series, title=f"{extra} extra convolutions"))
    return Figure(panels, "Convolutional networks without BN, SGD with momentum.")


def _smoothed(losses: Sequence[float | None]) -> list[float | None]:
    return [_tail_mean(losses[:end]) for end in range(LAST, len(losses) + 1, LAST)]


def _experiment(
    key: str,
    title: str,
    claim: str,
    run: Callable[[Settings], Raw],
    verdict: Callable[[Sequence[Raw]], Verdict],
    figure: Callable[[Sequence[Raw]], Figure],
    size: str,
) -> Experiment:
    return Experiment(f"S1-{key}", title, claim, run, verdict, figure, needs=DATA, size=size)


EXPERIMENTS: tuple[Experiment, ...] = (
    _experiment(
        "F4a",
        "Figure 4a: gap and loss by depth",
        "The orthogonality gap at the start and the loss after training both rise with depth.",
        figure4a,
        _verdict4a,
        _drawn4a,
        "width 100, 400 steps of 100 images instead of width 800 and 30 epochs of CIFAR-10.",
    ),
    _experiment(
        "F4b",
        "Figure 4b: gap and loss along training",
        "They fall together.",
        figure4b,
        _verdict4b,
        _drawn4b,
        "width 100, 400 steps of 100 images instead of width 1000 and 50 epochs of CIFAR-10.",
    ),
    _experiment(
        "F5",
        "Figure 5: orthogonal starts against Xavier's",
        "Weights made orthogonal from data remove the slowdown that depth brings.",
        figure5,
        _verdict5,
        _drawn5,
        "width 100, 400 steps of 100 images instead of width 800 and 30 epochs of CIFAR-10.",
    ),
    _experiment(
        "F7",
        "Appendix I, Figure 7: convolutional networks from orthogonal starts",
        "Orthogonal starts help where the network is very deep, not where it is less so.",
        figure7,
        _verdict7,
        _drawn7,
        "12 channels and 5 or 30 extra convolutions, 200 steps, instead of 256, 15 or 75, and 20 epochs of CIFAR-10.",
    ),
)

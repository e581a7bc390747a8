"""Huang et al. 2020 on very deep residual networks, Figures 6 and 7: their last linear layer while they train.

On two cores the blocks have linear layers where the paper's are convolutions: linear, BN, ReLU, linear, BN, plus
shortcut, ReLU; 9, 18, 38 and 200 of them. With the paper's sizes and CIFAR they are the paper's networks of depth 56,
110, 230 and 1202. "LastBN" has one more batch normalisation before the last linear layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, batches
from orthofast.lab.missing import minus, over
from orthofast.lab.nets import initialize_
from orthofast.lab.resnets import cifar_resnet
from orthofast.lab.verdict import Check, Number, Verdict, above, below, judge, less, log_slope, near, ordered, shown
from orthofast.metrics import covariance_spectrum, weight_domination

WIDTH = 64
BLOCKS = (9, 18, 38, 200)  # residual blocks; of the paper's networks per stage, depth 6 n + 2
NETS = {"ResNet": "post", "LastBN": "last_bn"}
RATE, MOMENTUM, DECAY, BATCH = 0.1, 0.9, 1e-4, 128
STEPS = {"small": 60, "paper": 64_000}  # of Figures 6 and 7
CUTS = (0.5, 0.75)  # of all epochs: where the rate is divided by 10
DOMINATED = 1e-2  # gradient over weight, largest singular values; the paper names no threshold


class Block(nn.Module):
    """``ReLU(x + BN(W2 ReLU(BN(W1 x))))``, He's weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
        )
        initialize_(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to the same."""
        return functional.relu(x + self.branch(x))


def network(data: Images, blocks: int, net: str, seed: int, scale: str) -> tuple[nn.Module, nn.Linear]:
    """A residual network and its last linear layer."""
    torch.manual_seed(seed)
    channels, side = data.train.shape[1], data.train.shape[-1]
    if scale == "paper" and channels == 3:
        model: nn.Module = cifar_resnet(6 * blocks + 2, NETS[net], classes=data.classes)
        last = model.classifier
    else:
        first = nn.Linear(channels * side * side, WIDTH, bias=False)
        last = nn.Linear(WIDTH, data.classes)
        between = [nn.BatchNorm1d(WIDTH)] if net == "LastBN" else []
        parts = [Block(WIDTH) for _ in range(blocks)]
        model = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(WIDTH), nn.ReLU(), *parts, *between, last)
    assert isinstance(last, nn.Linear)
    return model.to(data.train.device), last


def augmented(images: Tensor, noise: torch.Generator) -> Tensor:
    """CIFAR as in the paper's code: reflected by 4 and cropped, each image by itself; exactly half of them flipped."""
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    n, _, height, width = images.shape
    row = torch.randint(9, (n, 1), generator=noise) + torch.arange(height)
    column = torch.randint(9, (n, 1), generator=noise) + torch.arange(width)
    flipped = torch.randperm(n, generator=noise)[: n // 2]
    column[flipped] = column[flipped].flip(1)
    rows, columns = row.to(images.device), column.to(images.device)
    every = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def watched(
    settings: Settings, data: Images, blocks: int, net: str, steps: int, *, marks: Sequence[int], cuts: bool = False
) -> dict[str, Any]:
    """Train by SGD with Nesterov momentum; the loss of every step, and the last layer's numbers before some."""
    model, last = network(data, blocks, net, settings.seed, settings.scale)
    rate = RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    seen: dict[str, Tensor] = {}
    hook = last.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    noise = torch.Generator().manual_seed(settings.seed)
    found: dict[str, Any] = {"loss": [], "lambda_x": [], "lambda_w": [], "norm": [], "domination": []}
    for step, (inputs, labels) in enumerate(batches(data, BATCH, steps, settings.seed)):
        if cuts and step in [int(steps * cut) for cut in CUTS]:
            rate /= 10
            optimizer.param_groups[0]["lr"] = rate
        outputs = model(augmented(inputs, noise) if inputs.shape[1] == 3 else inputs)
        loss = functional.cross_entropy(outputs, labels)
        found["loss"].append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(found["loss"][-1]):
            break
        loss.backward()
        if step in marks:
            _note(found, seen["x"], outputs.detach(), labels, last)
        optimizer.step()
    hook.remove()
    missing = steps - len(found["loss"])
    found["loss"] += [math.nan] * missing
    for key in ("lambda_x", "lambda_w", "norm", "domination"):
        found[key] += [math.nan] * (len(marks) - len(found[key]))
    found["error"] = 100 * (1 - accuracy(model, data))
    return found


@torch.no_grad()
def _note(found: dict[str, Any], x: Tensor, outputs: Tensor, labels: Tensor, last: nn.Linear) -> None:
    """The second moment of the weight's gradient by Proposition 1: the product of both sides' largest eigenvalues."""
    g = outputs.softmax(1) - functional.one_hot(labels, outputs.shape[1])
    of_x, of_g = covariance_spectrum(x)[0], covariance_spectrum(g)[0]
    gradient = last.weight.grad
    assert gradient is not None
    found["lambda_x"].append(of_x.item())
    found["lambda_w"].append((of_x * of_g).item())
    found["norm"].append(last.weight.norm().item())
    found["domination"].append(weight_domination(last.weight, gradient).item())


def _marks(steps: int) -> list[int]:
    """Steps about evenly spaced in their logarithm, from 0."""
    spaced = torch.logspace(0, math.log10(steps), 24).round().long() - 1
    return sorted({0, 1, 2, *spaced.tolist()})


# Figure 6


def figure6(settings: Settings) -> Raw:
    """ResNets of four depths."""
    steps = STEPS[settings.scale]
    marks, data = _marks(steps), load(settings).standardized()
    runs = [watched(settings, data, blocks, "ResNet", steps, marks=marks) for blocks in BLOCKS]
    return {
        "blocks": list(BLOCKS),
        "classes": data.classes,
        "mark": [mark + 1 for mark in marks],
        "runs": [_short(run, marks) for run in runs],
    }


def _short(run: dict[str, Any], marks: Sequence[int]) -> dict[str, Any]:
    """With the loss at the marks in place of all, and what the verdict needs of it."""
    losses = run["loss"]
    return run | {
        "loss": [losses[mark] for mark in marks],
        "highest": max(losses[: len(losses) // 2], key=lambda loss: loss if math.isfinite(loss) else -math.inf),
        "late": statistics.fmean(losses[-10:]),
    }


def _column(raws: Sequence[Raw], pick: Callable[[dict[str, Any]], Number]) -> list[list[Number]]:
    """One list a depth, with one number a seed."""
    return [[pick(raw["runs"][place]) for raw in raws] for place in range(len(raws[0]["blocks"]))]


def _collapse(run: dict[str, Any]) -> float | None:
    """Least lambda_max after the largest, over the largest."""
    values = run["lambda_x"]
    if any(value is None for value in values):
        return None
    top = max(range(len(values)), key=values.__getitem__)
    return over(min(values[top:]), values[top])


def _verdict6(raws: Sequence[Raw]) -> Verdict:
    blocks = raws[0]["blocks"]
    starts = _column(raws, lambda run: run["lambda_x"][0])
    falls = _column(raws, _collapse)
    late = _column(raws, lambda run: run["late"])
    norms = _column(raws, lambda run: over(run["norm"][-1], run["norm"][0]))
    highest = _column(raws, lambda run: run["highest"])
    exponents = [log_slope(blocks, [starts[place][seed] for place in range(len(blocks))]) for seed in range(len(raws))]
    checks: list[Check] = [
        ordered("highest loss of the first half, by depth", highest, "rises with depth (image)"),
        ordered("lambda_max of Sigma_x at the start, by depth", starts, "rises with depth (image)"),
        near("exponent of lambda_max at the start over the number of blocks", exponents, 1, 0.15, "no number"),
        ordered("last weight's norm, end over start, by depth", norms, "grows with depth (image)"),
    ]
    excess = [minus(loss, math.log(raw["classes"])) for loss, raw in zip(late[-1], raws, strict=True)]
    gains = _column(raws, lambda run: run["domination"][-1])
    deepest = f"{blocks[-1]} blocks"
    checks += [
        below(f"{deepest}: least lambda_max of Sigma_x after its peak, over the peak", falls[-1], 0.5, "collapses"),
        near(f"{deepest}: mean loss of the last 10 steps minus guessing's", excess, 0, 0.4, "0: stays at ln 10"),
        below(f"{deepest}: gradient over weight at the end", gains[-1], DOMINATED, "weight domination"),
    ]
    for place, number in enumerate(blocks):
        checks += [
            shown(f"{number} blocks: lambda_max of Sigma_x at the start", starts[place]),
            shown(f"{number} blocks: highest loss of the first half", highest[place]),
            shown(f"{number} blocks: least lambda_max after its peak, over the peak", falls[place]),
            shown(f"{number} blocks: mean loss of the last 10 steps", late[place]),
        ]
    return judge(
        checks,
        "lambda_max at the start is about (2 / pi) width x blocks, the squared mean of a reflected random walk. How "
        "far it falls again, and how long the loss stays at guessing, is judged on the deepest network alone. Whether "
        "it falls at all within 60 steps differs between seeds.",
    )


def _drawn_last(raws: Sequence[Raw], names: Sequence[str], caption: str) -> Figure:
    panels = []
    for key, title in (
        ("loss", "training loss (nats)"),
        ("lambda_x", "largest eigenvalue of Σ_x"),
        ("lambda_w", "largest eigenvalue, gradient of W"),
        ("norm", "Frobenius norm of the weight"),
    ):
        series = [
            Series(name, raws[0]["mark"], [raw["runs"][place][key] for raw in raws]) for place, name in enumerate(names)
        ]
        levels = [(f"ln {raws[0]['classes']}", math.log(raws[0]["classes"]))] if key == "loss" else ()
        panels.append(Panel("step", title, series, x_log=True, y_log=True, points=False, levels=levels))
    return Figure(panels, caption)


def _drawn6(raws: Sequence[Raw]) -> Figure:
    return _drawn_last(raws, [f"{blocks} blocks" for blocks in raws[0]["blocks"]], "Last linear layer of ResNets.")


# Figure 7


def figure7(settings: Settings) -> Raw:
    """Both networks at the largest depth."""
    steps = STEPS[settings.scale]
    marks, data = _marks(steps), load(settings).standardized()
    runs = [watched(settings, data, BLOCKS[-1], net, steps, marks=marks) for net in NETS]
    return {
        "classes": data.classes,
        "mark": [mark + 1 for mark in marks],
        "runs": [_short(run, marks) for run in runs],
    }


def _verdict7(raws: Sequence[Raw]) -> Verdict:
    bare, normed = ([raw["runs"][place] for raw in raws] for place in range(2))
    peaks = [[max(run["lambda_x"]) if None not in run["lambda_x"] else None for run in runs] for runs in (bare, normed)]
    return judge(
        [
            below(
                "LastBN: highest loss over the first",
                [over(run["highest"], run["loss"][0]) for run in normed],
                1.5,
                "stable (image)",
            ),
            above(
                "ResNet: highest loss over the first",
                [over(run["highest"], run["loss"][0]) for run in bare],
                1.5,
                "rises (image)",
            ),
            below(
                "largest lambda_max of Sigma_x, LastBN over ResNet",
                [over(one, other) for one, other in zip(peaks[1], peaks[0], strict=True)],
                0.1,
                "no large magnitude (image)",
            ),
            less(
                "loss at the end, LastBN minus ResNet",
                [run["late"] for run in normed],
                [run["late"] for run in bare],
                "lower (image)",
            ),
            below(
                "ResNet: gradient over weight at the end",
                [run["domination"][-1] for run in bare],
                DOMINATED,
                "weight domination",
            ),
            above(
                "LastBN: gradient over weight at the end",
                [run["domination"][-1] for run in normed],
                DOMINATED,
                "no weight domination",
            ),
            shown("largest lambda_max of Sigma_x, ResNet", peaks[0]),
            shown("largest lambda_max of Sigma_x, LastBN", peaks[1]),
            shown("loss at the end, ResNet", [run["late"] for run in bare]),
            shown("loss at the end, LastBN", [run["late"] for run in normed]),
        ]
    )


def _drawn7(raws: Sequence[Raw]) -> Figure:
    return _drawn_last(raws, list(NETS), f"Last linear layer with {BLOCKS[-1]} residual blocks.")


SIZE = "residual blocks of two linear layers of width 64 on digits instead of CIFAR ResNets of depth 56 to 1202"
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S2-F6",
        "Figure 6: the last linear layer of ResNets over training",
        "The loss first rises, the more the deeper the network, from large inputs of the last layer; the weight grows, "
        "the inputs collapse, and the loss stays at random guessing.",
        figure6,
        _verdict6,
        _drawn6,
        needs=DATA,
        size=f"{SIZE}; 60 steps.",
    ),
    Experiment(
        "S2-F7",
        "Figure 7: ResNet and LastBN at the largest depth",
        "With a batch normalisation before the last layer training is stable and no weight dominates.",
        figure7,
        _verdict7,
        _drawn7,
        needs=DATA,
        size=f"{SIZE}; 60 steps.",
    ),
)

"""Huang et al. 2020, Tables 1 and 2: test error of residual networks over depth, with and without LastBN.

Four networks: post-activation ResNet, the same with one more batch normalisation before the last linear layer
(ResNet_LastBN), pre-activation PreResNet, and PreResNet without its batch normalisation before pooling (PreResNet_v1).
At the paper's scale they are the CIFAR networks of depth 6 n + 2; at the small one, blocks have two linear layers
where the paper's have convolutions.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.lab.conditioning_residual import BATCH, BLOCKS, CUTS, DECAY, MOMENTUM, RATE, WIDTH, augmented
from orthofast.lab.conditioning_residual import network as post_activation
from orthofast.lab.data import DIGITS_TRAIN, Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches
from orthofast.lab.independence_parts import digit_pairs
from orthofast.lab.missing import over
from orthofast.lab.nets import initialize_
from orthofast.lab.resnets import cifar_resnet
from orthofast.lab.verdict import Check, Number, Verdict, above, below, judge, less, ordered, shown

LAST_BN = "ResNet_LastBN"
NETS = {"ResNet": "post", "PreResNet": "preact", "PreResNet_v1": "preact_v1", LAST_BN: "last_bn"}
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of 255, by channel, of the paper's code
TRAINED = 0.5  # of the error of guessing: below it a network counts as trained
PAIRS = (4096, 1024)
TESTED = 500  # images at a time
MEMORY = ("out of memory", "allocate memory", "not enough memory")  # what torch says, on GPUs and on CPUs


@dataclass(frozen=True)
class Table:
    """What a table trains and what the paper prints.

    Attributes:
        nets: of ``NETS``.
        blocks: by scale: residual blocks; of the paper's networks per stage.
        epochs: by scale.
        decay: of the weights.
        hundred: classes; otherwise ten.
        printed: by network and blocks per stage: mean and spread of the test error in %, five seeds.
    """

    nets: tuple[str, ...]
    blocks: Mapping[str, tuple[int, ...]]
    epochs: Mapping[str, int]
    decay: float
    hundred: bool
    printed: Mapping[str, Mapping[int, tuple[float, float]]]


def _printed(*cells: tuple[float, float]) -> dict[int, tuple[float, float]]:
    return dict(zip(BLOCKS, cells, strict=True))


TABLE1 = Table(
    nets=tuple(NETS),
    blocks={"small": BLOCKS[:3], "paper": BLOCKS},
    epochs={"small": 12, "paper": 160},
    decay=DECAY,
    hundred=False,
    printed={
        "ResNet": _printed((7.52, 0.30), (6.89, 0.52), (7.35, 0.64), (9.42, 3.10)),
        "PreResNet": _printed((6.89, 0.09), (6.25, 0.08), (6.12, 0.21), (6.07, 0.10)),
        "PreResNet_v1": _printed((6.75, 0.26), (6.37, 0.24), (6.32, 0.21), (7.89, 0.58)),
        LAST_BN: _printed((6.50, 0.22), (6.10, 0.09), (5.94, 0.18), (5.68, 0.14)),
    },
)
TABLE1B = Table(
    nets=("ResNet", LAST_BN),
    blocks={"small": (38, 76), "paper": (200, 400)},
    epochs={scale: 2 * epochs for scale, epochs in TABLE1.epochs.items()},
    decay=2 * DECAY,
    hundred=False,
    printed={LAST_BN: {200: (4.79, 0.12), 400: (5.04, 0.30)}},
)
TABLE2 = replace(
    TABLE1,
    hundred=True,
    printed={
        "ResNet": _printed((29.60, 0.41), (28.3, 1.09), (29.25, 0.44), (30.49, 4.44)),
        "PreResNet": _printed((29.29, 0.44), (27.58, 0.12), (26.72, 0.33), (26.23, 0.26)),
        "PreResNet_v1": _printed((29.60, 0.21), (28.54, 0.26), (27.92, 0.34), (30.07, 2.04)),
        LAST_BN: _printed((28.82, 0.38), (27.05, 0.23), (25.80, 0.10), (25.51, 0.27)),
    },
)


class PreActivationBlock(nn.Module):
    """``x + W2 ReLU(BN(W1 ReLU(BN(x))))``, He's weights.

    Args:
        width: of it.
        shared: the first BN and ReLU stand before the shortcut too, as in the paper's first blocks.
    """

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
        )
        self.shared = shared
        initialize_(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to the same."""
        active = self.activation(x)
        branch: Tensor = self.branch(active)
        return branch + (active if self.shared else x)


def network(data: Images, blocks: int, net: str, seed: int, scale: str) -> nn.Module:
    """One of ``NETS``, on the images' device.

    Args:
        data: whose images it takes; networks with convolutions need three channels.
        blocks: residual blocks; of networks with convolutions per stage.
        net: key of ``NETS``.
        seed: of the weights.
        scale: "paper" for convolutions where images have three channels.
    """
    torch.manual_seed(seed)
    if convolutional(data, scale):
        return cifar_resnet(6 * blocks + 2, NETS[net], classes=data.classes).to(data.train.device)
    if not NETS[net].startswith("preact"):
        return post_activation(data, blocks, "LastBN" if net == LAST_BN else net, seed, "small")[0]
    last = [nn.BatchNorm1d(WIDTH)] if net == "PreResNet" else []
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.train[0].numel(), WIDTH, bias=False),
        *(PreActivationBlock(WIDTH, shared=number == 0) for number in range(blocks)),
        *last,
        nn.ReLU(),
        nn.Linear(WIDTH, data.classes),
    ).to(data.train.device)


def convolutional(data: Images, scale: str) -> bool:
    """Whether the paper's own networks run."""
    return scale == "paper" and data.train.shape[1] == 3


def images(settings: Settings, hundred: bool) -> Images:
    """The settings' data; colours normalised by the paper's constants, ten classes of digits paired to a hundred."""
    data = load(settings)
    if hundred and data.classes == 10:
        data = digit_pairs(data, *PAIRS)
    if data.train.shape[1] != 3:
        return data.standardized()
    mean, std = (torch.tensor(one, device=data.train.device)[:, None, None] / 255 for one in (MEAN, STD))
    return replace(data, train=(data.train - mean) / std, test=(data.test - mean) / std)


def rate_at(step: int, steps: int) -> float:
    """The learning rate: 0.1, divided by 10 at half and at three quarters, the paper's epochs 80 and 120 of 160."""
    passed = [cut for cut in CUTS if step >= int(steps * cut)]
    return float(RATE / 10 ** len(passed))


def trained(settings: Settings, data: Images, table: Table, net: str, blocks: int) -> dict[str, Any]:
    """Train one network by the paper's recipe: SGD with Nesterov momentum, batches of 128, weight decay on everything.

    Returns:
        "error", of the test images in %, and "loss", the mean training loss of the last epoch: NaN if a loss was not
        finite, when training stops.
    """
    model = network(data, blocks, net, settings.seed, settings.scale).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=table.decay, fused=True
    )
    noise = torch.Generator().manual_seed(settings.seed)
    # small epochs take as many images as digits have
    count = len(data.train) if settings.scale == "paper" else min(len(data.train), DIGITS_TRAIN)
    a_epoch = max(1, count // BATCH)
    steps, losses = a_epoch * table.epochs[settings.scale], []
    for step, (inputs, labels) in enumerate(batches(data, BATCH, steps, settings.seed)):
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        optimizer.zero_grad(set_to_none=True)
        outputs = model(augmented(inputs, noise) if inputs.shape[1] == 3 else inputs)
        loss = functional.cross_entropy(outputs, labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    return {"error": error_of(model, data), "loss": statistics.fmean(losses[-a_epoch:])}


@torch.no_grad()
def error_of(model: nn.Module, data: Images) -> float:
    """Test images whose class is not found, in %; outputs that are not finite find none."""
    model.eval()
    right = 0
    for inputs, labels in zip(data.test.split(TESTED), data.test_labels.split(TESTED), strict=True):
        outputs = model(inputs)
        right += int(((outputs.argmax(1) == labels) & outputs.isfinite().all(1)).sum())
    return 100 * (len(data.test) - right) / len(data.test)


def trained_or_missing(settings: Settings, data: Images, table: Table, net: str, blocks: int) -> dict[str, Any]:
    """As :func:`trained`; None for both numbers, and "missing" says why, where memory does not suffice."""
    try:
        return trained(settings, data, table, net, blocks)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in MEMORY):
            raise
    # only here the error's traceback has let go of the network
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": None, "loss": None, "missing": f"out of memory on {settings.device}"}


def tabled(settings: Settings, table: Table) -> Raw:
    """All networks at all depths."""
    data = images(settings, table.hundred)
    blocks = table.blocks[settings.scale]
    found: Raw = {
        "blocks": list(blocks),
        "convolutional": convolutional(data, settings.scale),
        "guessing": 100 * (1 - 1 / data.classes),
    }
    for net in table.nets:
        found[net] = [trained_or_missing(settings, data, table, net, number) for number in blocks]
    return found


def table1(settings: Settings) -> Raw:
    """Table 1: ten classes."""
    return tabled(settings, TABLE1)


def table1b(settings: Settings) -> Raw:
    """Beside Table 1: deeper, with twice the weight decay and twice the iterations."""
    return tabled(settings, TABLE1B)


def table2(settings: Settings) -> Raw:
    """Table 2: a hundred classes."""
    return tabled(settings, TABLE2)


def _label(raw: Raw, place: int) -> str:
    blocks = raw["blocks"][place]
    return f"depth {6 * blocks + 2}" if raw["convolutional"] else f"{blocks} blocks"


def _errors(raws: Sequence[Raw], net: str, place: int) -> list[Number]:
    return [raw[net][place]["error"] for raw in raws]


def _cells(raws: Sequence[Raw], table: Table) -> list[Check]:
    """Every number of the table, the paper's of the same column beside it."""
    found = []
    for place in range(len(raws[0]["blocks"])):
        theirs = table.blocks["paper"][place]
        for net in table.nets:
            cell = table.printed.get(net, {}).get(theirs)
            said = None if cell is None else f"{cell[0]:.2f} ± {cell[1]:.2f} at depth {6 * theirs + 2}"
            what = f"{_label(raws[0], place)}, {net}"
            found += [
                shown(f"{what}: test error in %", _errors(raws, net, place), said),
                shown(f"{what}: training loss of the last epoch", [raw[net][place]["loss"] for raw in raws]),
            ]
    return found


def _missing(raws: Sequence[Raw], table: Table) -> str:
    """A sentence on the networks that have no numbers; empty if there are none."""
    found = {
        f"{net} at {_label(raw, place)}: {cell['missing']}"
        for raw in raws
        for net in table.nets
        for place, cell in enumerate(raw[net])
        if "missing" in cell
    }
    return f" Missing: {'; '.join(sorted(found))}." if found else ""


NOTE = (
    "Conditions ask of every seed what the paper says of means over five, some of whose spreads overlap. On other data "
    "than CIFAR, blocks have linear layers and there are no crops and flips."
)


def _verdict(raws: Sequence[Raw], table: Table) -> Verdict:
    """Tables 1 and 2: LastBN has the least error at each depth, and less the deeper it is."""
    checks: list[Check] = []
    places = range(len(raws[0]["blocks"]))
    for place in places:
        others = [_errors(raws, net, place) for net in table.nets if net != LAST_BN]
        best = [None if None in seed else min(seed) for seed in zip(*others, strict=True)]
        theirs = table.blocks["paper"][place]
        printed = {net: table.printed[net][theirs][0] for net in table.nets}
        gap = round(printed.pop(LAST_BN) - min(printed.values()), 2)
        what = f"{_label(raws[0], place)}: test error in %, LastBN minus the best other network"
        checks.append(less(what, _errors(raws, LAST_BN, place), best, f"{gap} at depth {6 * theirs + 2}"))
    accuracies = [[None if one is None else 100 - one for one in _errors(raws, LAST_BN, place)] for place in places]
    falls = [one for one, _ in table.printed[LAST_BN].values()]
    said = f"error falls from {falls[0]:.2f} to {falls[-1]:.2f}"
    checks.append(ordered("LastBN: accuracy on test images in %, by depth", accuracies, said))
    for place in places:
        theirs = table.blocks["paper"][place]
        pairs = zip(_errors(raws, "ResNet", place), _errors(raws, LAST_BN, place), strict=True)
        gains = [None if one is None or other is None else one - other for one, other in pairs]
        gain = round(table.printed["ResNet"][theirs][0] - table.printed[LAST_BN][theirs][0], 2)
        what = f"{_label(raws[0], place)}: test error in %, ResNet minus LastBN"
        checks.append(shown(what, gains, f"{gain} at depth {6 * theirs + 2}"))
    return judge([*checks, *_cells(raws, table)], NOTE + _missing(raws, table))


def _verdict1b(raws: Sequence[Raw]) -> Verdict:
    """The deepest LastBN trains, the deepest ResNet does not."""
    deepest = len(raws[0]["blocks"]) - 1

    def of_guessing(net: str) -> list[Number]:
        return [over(raw[net][-1]["error"], raw["guessing"]) for raw in raws]

    what = f"{_label(raws[0], deepest)}: test error over that of guessing"
    checks = [
        below(f"{what}, LastBN", of_guessing(LAST_BN), TRAINED, "5.04 % ± 0.30 at depth 2402"),
        above(f"{what}, ResNet", of_guessing("ResNet"), TRAINED, "does not converge at depth 2402"),
    ]
    note = f" A network counts as trained whose error is below {TRAINED} of that of guessing."
    return judge([*checks, *_cells(raws, TABLE1B)], NOTE + note + _missing(raws, TABLE1B))


def _drawn(raws: Sequence[Raw], table: Table) -> Figure:
    blocks = raws[0]["blocks"]
    ours = [Series(net, blocks, [[one["error"] for one in raw[net]] for raw in raws]) for net in table.nets]
    theirs = [
        Series(net, list(cells), [[mean for mean, _ in cells.values()]], published=True)
        for net, cells in table.printed.items()
    ]
    caption = "Hollow: the paper's means, CIFAR networks of depth 6 n + 2 with n blocks per stage."
    if "ResNet" not in table.printed:
        caption += " Its ResNet of depth 2402 does not converge and has no point."
    x, y = "residual blocks", "test error in %"
    if raws[0]["convolutional"]:
        return Figure([Panel(f"{x} per stage", y, [*ours, *theirs], x_log=True, y_log=True)], caption)
    # other networks on other images: their levels do not compare
    measured = Panel(x, y, ours, "measured", x_log=True, y_log=True)
    return Figure([measured, Panel(f"{x} per stage", y, theirs, "published", x_log=True)], caption)


SIZE = "residual blocks of two linear layers of width 64 on digits instead of CIFAR ResNets"
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S2-T1",
        "Table 1: test error of four residual networks by depth, ten classes",
        "LastBN has the least test error at each depth, and less the deeper it is.",
        table1,
        partial(_verdict, table=TABLE1),
        partial(_drawn, table=TABLE1),
        needs=("digits", "mnist", "cifar10"),
        size=f"{SIZE} of depth 56 to 1202; 9, 18 and 38 blocks, 12 epochs, 360 test images.",
    ),
    Experiment(
        "S2-T1b",
        "Beside Table 1: deeper networks, twice the weight decay and iterations",
        "At the largest depth LastBN trains and ResNet does not.",
        table1b,
        _verdict1b,
        partial(_drawn, table=TABLE1B),
        needs=("digits", "mnist", "cifar10"),
        size=f"{SIZE} of depth 1202 and 2402; 38 and 76 blocks, 24 epochs, 360 test images.",
    ),
    Experiment(
        "S2-T2",
        "Table 2: test error of four residual networks by depth, a hundred classes",
        "LastBN has the least test error at each depth, and less the deeper it is.",
        table2,
        partial(_verdict, table=TABLE2),
        partial(_drawn, table=TABLE2),
        needs=("digits", "mnist", "cifar100"),
        size=f"{SIZE} of depth 56 to 1202, pairs of digits in a hundred classes; 9, 18 and 38 blocks, 12 epochs.",
    ),
)

"""Huang et al. 2020, Figure 8: training loss of residual networks by epoch, with and without LastBN."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from orthofast.lab.conditioning_residual import BATCH, BLOCKS, NETS, SIZE, watched
from orthofast.lab.data import DIGITS_TRAIN, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.missing import over
from orthofast.lab.verdict import Check, Number, Verdict, below, judge, less, ordered, shown

EPOCHS = {"small": 32, "paper": 160}
TRAINED = {"small": BLOCKS[:3], "paper": BLOCKS}


def figure8(settings: Settings) -> Raw:
    """Training loss of each epoch, both networks."""
    data = load(settings).standardized()
    # of larger data, small epochs take as many images as digits have
    images = len(data.train) if settings.scale == "paper" else min(len(data.train), DIGITS_TRAIN)
    a_epoch, epochs = images // BATCH, EPOCHS[settings.scale]
    found: Raw = {"blocks": list(TRAINED[settings.scale]), "epoch": list(range(1, epochs + 1))}
    for net in NETS:
        found[net] = []
        for blocks in TRAINED[settings.scale]:
            run = watched(settings, data, blocks, net, epochs * a_epoch, marks=(), cuts=True)
            losses = [
                statistics.fmean(run["loss"][first : first + a_epoch]) for first in range(0, epochs * a_epoch, a_epoch)
            ]
            found[net].append({"loss": losses, "error": run["error"]})
    return found


def _before_cut(losses: Sequence[Number]) -> float | None:
    """Mean of the second quarter of epochs: the start is over, the rate still the first."""
    part = [loss for loss in losses[len(losses) // 4 : len(losses) // 2] if loss is not None]
    return statistics.fmean(part) if len(part) == len(losses) // 2 - len(losses) // 4 else None


def _verdict8(raws: Sequence[Raw]) -> Verdict:
    blocks = raws[0]["blocks"]
    early = {
        net: [[_before_cut(raw[net][place]["loss"]) for raw in raws] for place in range(len(blocks))] for net in NETS
    }
    checks: list[Check] = [
        ordered("ResNet: loss before the rate is cut, by depth", early["ResNet"], "worse with depth (image)"),
        below(
            "spread over depths of the loss before the cut, LastBN over ResNet",
            [over(_spread(early["LastBN"], seed), _spread(early["ResNet"], seed)) for seed in range(len(raws))],
            0.2,
            "nearly the same for LastBN (image)",
        ),
    ]
    for place, number in enumerate(blocks):
        last = {net: [raw[net][place]["loss"][-1] for raw in raws] for net in NETS}
        said = "0.043 minus 0.081 at depth 56" if number == BLOCKS[0] else "lower (image)"
        checks += [
            less(f"{number} blocks: final loss, LastBN minus ResNet", last["LastBN"], last["ResNet"], said),
            *(shown(f"{number} blocks: final loss, {net}", last[net]) for net in NETS),
            *(
                shown(f"{number} blocks: test error in %, {net}", [raw[net][place]["error"] for raw in raws])
                for net in NETS
            ),
        ]
    return judge(checks, "Final losses of digits are near 0 where a network has learnt them by heart.")


def _spread(values: Sequence[Sequence[Number]], seed: int) -> float | None:
    known = [one[seed] for one in values]
    return None if None in known else max(known) - min(known)  # type: ignore[type-var, operator]


def _drawn8(raws: Sequence[Raw]) -> Figure:
    panels = []
    for net in NETS:
        series = [
            Series(f"{blocks} blocks", raws[0]["epoch"], [raw[net][place]["loss"] for raw in raws])
            for place, blocks in enumerate(raws[0]["blocks"])
        ]
        panels.append(Panel("epoch", "training loss (nats)", series, title=net, y_log=True, points=False))
    return Figure(
        panels, "The learning rate is divided by 10 at half and at three quarters of the epochs. The axes differ."
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S2-F8",
        "Figure 8: training loss by epoch",
        "LastBN's loss hardly depends on depth before the rate is cut, and ends lower than ResNet's at each depth.",
        figure8,
        _verdict8,
        _drawn8,
        needs=DATA,
        size=f"{SIZE}; up to 38 blocks, 32 epochs.",
    ),
)

"""Lu et al. 2024 on normalisation and shortcuts in convolutional networks: Table 4, and the appendix's Table 3.

"Original" has neither, "Norm_Res" both; PII of the central taps' columns after training, as the paper's code takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import accuracy, fit, optimizer_for
from orthofast.lab.independence_ablation import BOTH, Printed, gained, printed_numbers, values_of
from orthofast.lab.independence_parts import ResidualConvNet, digit_pairs
from orthofast.lab.verdict import Check, Verdict, above, judge, less
from orthofast.metrics import pii


class Row4(NamedTuple):
    """A row of Table 4, or of the appendix's Table 3."""

    optimizer: str
    rate: float
    printed: Printed


ROWS4 = {
    "GELU, Adam": Row4("adam", 1e-3, {"Original": (0.196, 95.34), "Norm_Res": (0.176, 98.66)}),
    "GELU, SGD": Row4("momentum", 0.05, {"Original": (0.206, 85.48), "Norm_Res": (0.155, 90.22)}),
}
ROWS_A3 = {
    "GELU, Adam": Row4("adam", 1e-3, {"Original": (0.212, 39.38), "Norm_Res": (0.154, 49.43)}),
    "GELU, SGD": Row4("momentum", 0.05, {"Original": (0.194, 51.59), "Norm_Res": (0.166, 53.34)}),
}


def train_residual(
    data: Images,
    norm_res: bool,
    optimizer: str,
    rate: float,
    *,
    widths: tuple[int, ...],
    blocks: int,
    steps: int,
    batch: int,
    seed: int,
) -> dict[str, object]:
    """The convolutional network of Table 4, trained; PII of central taps' columns, first convolution of each stage.

    Args:
        data: square images.
        norm_res: with normalisation and shortcuts.
        optimizer: by name.
        rate: its learning rate.
        widths: of the stages.
        blocks: per stage.
        steps: updates.
        batch: images of one.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    model = ResidualConvNet(data.train.shape[1], widths, blocks, data.classes, norm_res=norm_res).to(data.train.device)
    initial = _taps(model)
    fit(model, data, optimizer_for(model, optimizer, rate), steps=steps, batch=batch, seed=seed)
    return {"initial": initial, "layers": _taps(model), "accuracy": accuracy(model, data)}


def table4(settings: Settings) -> Raw:
    """Residual networks, Original against Norm_Res."""
    return _residuals(settings, load(settings).standardized(), ROWS4, batch=128, epochs=20)


def appendix3(settings: Settings) -> Raw:
    """The same with a hundred classes."""
    data = load(settings)
    data = (data if data.classes == 100 else digit_pairs(data, 4096, 1024)).standardized()
    return _residuals(settings, data, ROWS_A3, batch=256, epochs=50)


def _residuals(settings: Settings, data: Images, rows: Mapping[str, Row4], *, batch: int, epochs: int) -> Raw:
    """Batch and epochs are the paper's; small runs have 440 steps of 128 images."""
    small = settings.scale == "small"
    batch = 128 if small else batch
    found: Raw = {}
    for name, (optimizer, rate, _) in rows.items():
        found[name] = {
            arm: train_residual(
                data,
                arm == "Norm_Res",
                optimizer,
                rate,
                widths=(16, 32, 64) if small else (64, 128, 256, 512),
                blocks=1 if small else 2,
                steps=440 if small else epochs * (len(data.train) // batch),
                batch=batch,
                seed=settings.seed,
            )
            for arm in BOTH
        }
    return found


def verdict4(raws: Sequence[Raw], rows: Mapping[str, Row4] = ROWS4, chance: float = 0.1) -> Verdict:
    """Norm_Res has the lower PII and the higher accuracy; SGD's row counts only where its Original has trained."""
    checks: list[Check] = []
    notes: list[str] = []
    for name, row in rows.items():
        original, norm_res = (values_of(raws, name, arm, "accuracy") for arm in BOTH)
        trained = all(value is not None and value > 2 * chance for value in original)
        if trained or row.optimizer == "adam":
            for layer in range(len(raws[0][name]["Original"]["layers"])):
                without, both = ([raw[name][arm]["layers"][layer] for raw in raws] for arm in BOTH)
                what = f"{name}, stage {layer + 1}: PII of Norm_Res minus Original"
                checks.append(less(what, both, without, None if layer else gained(row.printed, 0)))
            theirs = round(-gained(row.printed, 1) / 100, 4)
            checks.append(less(f"{name}: accuracy of Original minus Norm_Res", original, norm_res, theirs))
            asked = BOTH if row.optimizer == "adam" else BOTH[1:]  # of SGD's Original it is what lets the row count
            for arm in asked:
                values = original if arm == "Original" else norm_res
                checks.append(above(f"{name}, {arm}: accuracy, trained at all", values, 2 * chance))
        else:
            notes.append(f"{name}: Original did not train, so its PII compares with nothing.")
        checks += printed_numbers(raws, name, row.printed, "layers")
    notes.append("Images are not cropped or flipped at random.")
    return judge(checks, " ".join(notes))


def verdict_appendix3(raws: Sequence[Raw]) -> Verdict:
    """As Table 4."""
    return verdict4(raws, ROWS_A3, 0.01)


def _drawn4(raws: Sequence[Raw], rows: Mapping[str, Row4] = ROWS4) -> Figure:
    panels = []
    for name in rows:
        stages = list(range(1, len(raws[0][name]["Original"]["layers"]) + 1))
        series = [Series(arm, stages, [raw[name][arm]["layers"] for raw in raws]) for arm in BOTH]
        series.append(Series("initial", stages, [raw[name]["Original"]["initial"] for raw in raws]))
        panels.append(Panel("stage", "PII", series, name))
    return Figure(panels, "PII of the central taps' columns, first convolution of each stage, after training.")


def _drawn_appendix3(raws: Sequence[Raw]) -> Figure:
    return _drawn4(raws, ROWS_A3)


def _taps(model: ResidualConvNet) -> list[float]:
    return [float(pii(layer.weight.detach(), vectors="center_tap").item()) for layer in model.watched()]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-T4",
        "Table 4: residual networks with and without batch normalisation and shortcuts",
        "Norm_Res lowers PII and raises accuracy.",
        table4,
        verdict4,
        _drawn4,
        needs=("digits", "cifar10"),
        size="digits, three blocks of 16, 32, 64 channels instead of eight of 64 to 512, 440 steps.",
    ),
    Experiment(
        "S0-A3",
        "Appendix, Table 3: residual networks with a hundred classes",
        "Norm_Res lowers PII and raises accuracy.",
        appendix3,
        verdict_appendix3,
        _drawn_appendix3,
        needs=("digits", "cifar100"),
        size="pairs of digits as two channels, a hundred classes; otherwise as Table 4.",
    ),
)

"""Lu et al. 2024, Figures 1 and 2: cosine and Gram matrices of a layer at its start, and after training.

The first vectors of a layer are drawn; what is judged is of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.lab.data import load
from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.independence_ablation import perceptron_sizes, train_arm
from orthofast.lab.missing import distance, largest, over, times
from orthofast.lab.nets import initialize_
from orthofast.lab.verdict import Number, Verdict, below, judge, less, near, shown
from orthofast.metrics import (
    cosine_histogram,
    cosine_matrix,
    diagonal_dominance,
    gram_matrix,
    isotropic_baseline,
    pii,
)

SHOWN = 20  # vectors drawn
WIDTH = 512  # 0.035 in the paper is the baseline of this length; of 500, the code's, it would be 0.036
LAYER = 2  # of five hidden ones, from 0: drawn in Figure 2
BINS = 400
ARMS = ("Original", "Norm_Res")
SIDES = ("rows", "cols")


def figure1(settings: Settings) -> Raw:
    """One square layer at the uniform start."""
    torch.manual_seed(settings.seed)
    layer = initialize_(torch.nn.Linear(WIDTH, WIDTH), "uniform")
    weight = layer.get_parameter("weight").detach()
    dominance = diagonal_dominance(weight)
    counts, edges = cosine_histogram(weight, bins=BINS)
    share = counts / counts.sum()
    near_zero = share.nonzero().flatten()
    used = slice(int(near_zero[0]), int(near_zero[-1]) + 1)
    return {
        "pii": {side: pii(weight, vectors=side).item() for side in SIDES},
        "cosine": _corner(cosine_matrix(weight).abs()),
        "gram": _corner(_relative(gram_matrix(weight))),
        "dominance_mean": dominance.mean.item(),
        "dominance_least": dominance.min.item(),
        "dominance_largest": dominance.max.item(),
        "dominant_frac": dominance.dominant_frac.item(),
        "cosines": ((edges[:-1] + edges[1:]) / 2)[used].tolist(),
        "share": share[used].tolist(),
    }


def figure2(settings: Settings) -> Raw:
    """A layer after training with and without normalisation and shortcuts."""
    data, sizes = load(settings).flat(), perceptron_sizes(settings)
    found: Raw = {}
    for arm in ARMS:
        model, _ = train_arm(data, arm, "gelu", "adam", 1e-3, **sizes)
        weight = model.hidden[min(LAYER, len(model.hidden) - 1)].get_parameter("weight").detach()
        found[arm] = {
            side: {
                "pii": pii(weight, vectors=side).item(),
                "cosine": _corner(cosine_matrix(weight, vectors=side).abs()),
                "gram": _corner(gram_matrix(weight, vectors=side)),
                "diagonal": gram_matrix(weight, vectors=side).diagonal().mean().item(),
                "off_diagonal": _off_diagonal(gram_matrix(weight, vectors=side)),
            }
            for side in SIDES
        }
    return found


def verdict1(raws: Sequence[Raw]) -> Verdict:
    """PII is the isotropic baseline, and small."""
    baseline = isotropic_baseline(WIDTH)
    checks = [near(f"PII of {side}", [raw["pii"][side] for raw in raws], baseline, 3e-4, 0.035) for side in SIDES]
    checks.append(
        below("largest of both", [largest(list(raw["pii"].values())) for raw in raws], 0.05, "off-diagonal near 0")
    )
    return judge(checks, f"{WIDTH} x {WIDTH}, uniform start; 3e-4 is four standard deviations between draws or more.")


def verdict_dominance(raws: Sequence[Raw]) -> Verdict:
    """Every row of the Gram matrix has a diagonal entry above the sum of the others."""
    limit = math.floor(1 + 1 / isotropic_baseline(WIDTH))
    fractions = [raw["dominant_frac"] for raw in raws]
    return judge(
        [
            near("fraction of rows that are dominated by their diagonal", fractions, 1, 0, "all"),
            shown("sum off the diagonal over the diagonal, mean over rows", [raw["dominance_mean"] for raw in raws]),
            shown("the same, least row", [raw["dominance_least"] for raw in raws]),
            shown("(n - 1) PII, which it is about", [times(WIDTH - 1, raw["pii"]["rows"]) for raw in raws]),
        ],
        f"Off-diagonal entries are small but many: independent vectors of this length dominate up to n = {limit}.",
    )


def verdict2(raws: Sequence[Raw]) -> Verdict:
    """With Norm_Res cosines are smaller and the diagonal of the Gram matrix is larger, for rows and columns."""
    checks = []
    for side in SIDES:
        original, norm_res = ([raw[arm][side]["pii"] for raw in raws] for arm in ARMS)
        checks.append(less(f"PII of {side}: Norm_Res minus Original", norm_res, original, "shrinks (image)"))
    for side in SIDES:
        original, norm_res = ([raw[arm][side]["diagonal"] for raw in raws] for arm in ARMS)
        checks.append(less(f"mean Gram diagonal, {side}: Original minus Norm_Res", original, norm_res, "grows (image)"))
    for side in SIDES:
        for arm in ARMS:
            checks.append(shown(f"{arm}, {side}: PII", [raw[arm][side]["pii"] for raw in raws]))
            checks.append(shown(f"{arm}, {side}: mean Gram diagonal", [raw[arm][side]["diagonal"] for raw in raws]))
            entries = [raw[arm][side]["off_diagonal"] for raw in raws]
            checks.append(shown(f"{arm}, {side}: mean |Gram| off the diagonal", entries))
            beside = [over(raw[arm][side]["off_diagonal"], raw[arm][side]["diagonal"]) for raw in raws]
            checks.append(shown(f"{arm}, {side}: the same over the mean diagonal", beside))
    return judge(
        checks,
        f"Hidden layer {LAYER + 1} of five, GELU, Adam. The diagonal holds squared lengths, which cosines do not see: "
        "PII can fall while the diagonal falls too. The paper's numbers are in its image only.",
    )


def _drawn1(raws: Sequence[Raw]) -> Figure:
    raw = raws[0]
    shares = [Series("uniform start", raw["cosines"], [raw["share"]])]
    return Figure(
        [
            _cells(raw["cosine"], "|cos|", "(a) cosines"),
            _cells(raw["gram"], "|G| / mean G_ii", "(b) Gram matrix"),
            Panel("cosine", "share of the pairs", shares, f"all {WIDTH} rows", points=False),
        ],
        f"{WIDTH} x {WIDTH}, uniform start; first {SHOWN} rows, first seed. Gram entries over their mean diagonal.",
    )


def _drawn_dominance(raws: Sequence[Raw]) -> Figure:
    names = ["least", "mean", "largest"]
    runs = [[raw[f"dominance_{name}"] for name in names] for raw in raws]
    series = [Series("uniform start", names, runs)]
    levels = [("dominated below 1", 1.0)]
    panel = Panel("rows of the Gram matrix", "sum off the diagonal / diagonal", series, kind="bars", levels=levels)
    return Figure([panel], f"Gram matrix of the rows, {WIDTH} x {WIDTH}.")


def _drawn2(raws: Sequence[Raw]) -> Figure:
    raw = raws[0]
    panels = [_cells(raw[arm][side]["cosine"], "|cos|", f"{arm}, {side}") for side in SIDES for arm in ARMS]
    for side in SIDES:
        larger = largest([raw[arm][side]["diagonal"] for arm in ARMS])
        for arm in ARMS:
            cells = [[_shade(entry, larger) for entry in row] for row in raw[arm][side]["gram"]]
            panels.append(_cells(cells, "|G| / larger mean", f"{arm}, Gram, {side}"))
    return Figure(
        panels,
        f"Hidden layer {LAYER + 1} after training, first {SHOWN} vectors, first seed. Gram entries are divided by the "
        "larger of both networks' mean diagonals.",
    )


def _shade(entry: Number, mean: Number) -> float | None:
    """Absolute entry over the larger mean, at most 1."""
    ratio = over(distance(entry, 0), mean)
    return None if ratio is None else min(1.0, ratio)


def _cells(matrix: Sequence[Sequence[Number]], y: str, title: str) -> Panel:
    names = [str(index + 1) for index in range(len(matrix))]
    rows = [Series(name, names, [row]) for name, row in zip(names, matrix, strict=True)]
    return Panel("vector", y, rows, title, "cells")


def _corner(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in matrix[:SHOWN, :SHOWN].tolist()]


def _relative(gram: Tensor) -> Tensor:
    """Absolute entries over the mean diagonal, at most 1."""
    return (gram.abs() / gram.diagonal().mean()).clamp_max(1)


def _off_diagonal(gram: Tensor) -> float:
    n = len(gram)
    return float((gram.abs().sum() - gram.diagonal().abs().sum()).item()) / (n * (n - 1))


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S0-F1",
        "Figure 1: cosines and Gram matrix of a layer at its start",
        "PII is 0.035; entries off the diagonal are near 0.",
        figure1,
        verdict1,
        _drawn1,
        size="as in the paper, the first 20 vectors drawn.",
    ),
    Experiment(
        "S0-F1b",
        "Figure 1, text: the Gram matrix is strictly diagonally dominant",
        "Every diagonal entry exceeds the sum of the absolute values beside it.",
        figure1,
        verdict_dominance,
        _drawn_dominance,
        size="as in the paper.",
    ),
    Experiment(
        "S0-F2",
        "Figure 2: cosines and Gram matrices with and without batch normalisation and shortcuts",
        "With them cosines off the diagonal shrink and the diagonal of the Gram matrix grows.",
        figure2,
        verdict2,
        _drawn2,
        needs=("digits", "mnist"),
        size="digits, five hidden layers of 200 instead of 500, 1200 steps.",
    ),
)

"""Daneshmand et al. 2021 on random chains: how batch normalisation makes representations orthogonal, layer by layer.

Figures 1, 2 and 3, Table 1, and the figure of Appendix G on other activations. Training is in another file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.verdict import Verdict, above, between, judge, less
from orthofast.metrics import (
    bn_chain,
    chain_trace,
    isotropic_baseline,
    nearly_parallel_start,
    vanilla_chain,
)

RUNS = 20  # independent chains that one seed averages, as in the paper
IMAGE = "image only"


def _noise(settings: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _starts(start: Tensor, runs: int = RUNS) -> Tensor:
    return start.expand(runs, *start.shape)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# Figure 1


def figure1(settings: Settings) -> Raw:
    """|cos| of two samples before layers 1, 2, ...: with BN from nearly parallel ones, without from orthogonal ones."""
    n, d, layers = 2, 32, 50
    noise = _noise(settings)
    parallel, apart = nearly_parallel_start(n, d), torch.eye(n, d, dtype=torch.float64)
    bn = bn_chain(_starts(parallel), layers - 1, generator=noise)
    vanilla = vanilla_chain(_starts(apart), layers - 1, generator=noise)
    return {
        "layer": list(range(1, layers + 1)),
        "bn": chain_trace(itertools.chain([_starts(parallel)], bn)).pii.mean(0),
        "vanilla": chain_trace(itertools.chain([_starts(apart)], vanilla)).pii.mean(0),
    }


def _verdict1(raws: Sequence[Raw]) -> Verdict:
    bn_end = [_mean(raw["bn"][19:]) for raw in raws]
    vanilla_end = [_mean(raw["vanilla"][-5:]) for raw in raws]
    return judge(
        [
            above("|cos| with BN at layer 1", [raw["bn"][0] for raw in raws], 0.99, 1.0),
            between("|cos| with BN, mean of layers 20 to 50", bn_end, 0.05, 0.2, "about 0.11 (image)"),
            above("|cos| without BN, mean of the last 5 layers", vanilla_end, 0.5, "about 0.75 (image)"),
            less("with BN minus without, at the end", bn_end, vanilla_end, "BN falls, vanilla rises"),
        ],
        "Below the 0.142 of independent vectors of length 32: normalised features are not independent of each other.",
    )


def _drawn1(raws: Sequence[Raw]) -> Figure:
    layers = raws[0]["layer"]
    series = [Series(name, layers, [raw[key] for raw in raws]) for name, key in (("BN", "bn"), ("vanilla", "vanilla"))]
    level = ("independent vectors", isotropic_baseline(32))
    return Figure(
        [Panel("layer", "mean |cos| of the two samples", series, points=False, levels=[level])],
        f"d = 32, two samples, linear chains, mean of {RUNS} runs a seed. BN starts at cosine 1, vanilla at 0.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-F1",
        "Figure 1: cosine of two samples along a random network",
        "With batch normalisation two nearly parallel samples become orthogonal; without it two orthogonal ones align.",
        figure1,
        _verdict1,
        _drawn1,
        size="as in the paper.",
    ),
)

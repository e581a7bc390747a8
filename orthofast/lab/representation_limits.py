"""Daneshmand et al. 2021 on random chains: how far from Gaussian they are, and other activations.

Table 1 and the figure of Appendix G.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.missing import over, root, times
from orthofast.lab.representations import RUNS, noise_of, starts
from orthofast.lab.verdict import Number, Verdict, below, between, judge, less, log_slope, near, shown
from orthofast.metrics import bn_chain, chain_trace, gaussian_w2_squared, gram_fluctuation, vanilla_chain

# Table 1

WIDTHS_T1 = (32, 64, 128, 256, 512)
DEPTHS_T1 = (10, 50, 200)


def table1(settings: Settings) -> Raw:
    """Mean W2^2 of the next layer's pre-activations to a Gaussian, for each chain, width and depth."""
    noise = noise_of(settings)
    found: Raw = {"width": list(WIDTHS_T1), "depth": list(DEPTHS_T1), "bn": {}, "vanilla": {}, "bn_gap": {}}
    for d in WIDTHS_T1:
        start = starts(torch.eye(4, d, dtype=torch.float64))
        for name, chain in (
            ("bn", bn_chain(start, DEPTHS_T1[-1], generator=noise)),
            ("vanilla", vanilla_chain(start, DEPTHS_T1[-1], generator=noise)),
        ):
            states = [state for layer, state in enumerate(chain, 1) if layer in DEPTHS_T1]
            found[name][str(d)] = [torch.stack([gaussian_w2_squared(h) for h in state]).mean() for state in states]
            if name == "bn":
                found["bn_gap"][str(d)] = chain_trace(states).gap.mean(0)
    return found


def _verdict_t1(raws: Sequence[Raw]) -> Verdict:
    at = DEPTHS_T1.index(50)

    def w2(name: str, d: int, depth: int) -> list[Number]:
        return [root(raw[name][str(d)][depth]) for raw in raws]

    def exponents(name: str) -> list[float | None]:
        return [log_slope(WIDTHS_T1, [root(raw[name][str(d)][at]) for d in WIDTHS_T1]) for raw in raws]

    deep = [over(later, earlier) for later, earlier in zip(w2("bn", 64, 2), w2("bn", 64, 1), strict=True)]
    squares = [raw["bn"]["64"][at] for raw in raws]
    lemma = [times(2 * 4, raw["bn_gap"]["64"][at]) for raw in raws]
    return judge(
        [
            below("exponent of W2 over width with BN, layer 50", exponents("bn"), -0.25, "at most -1/4"),
            between("W2 with BN at layer 200 over that at layer 50, d = 64", deep, 0.75, 1.33, "any depth"),
            below("exponent of W2 over width without BN, layer 50", exponents("vanilla"), -0.25, "Gaussian as d grows"),
            less(
                "W2 without BN, layer 50 minus layer 200, d = 64",
                w2("vanilla", 64, 1),
                w2("vanilla", 64, 2),
                "finite depth",
            ),
            less("W2² with BN minus its bound 2 n V of Lemma 2", squares, lemma, "W2² ≤ 2 n V"),
        ],
        "W2 between the pre-activations of the next layer, given the representations, and a Gaussian matrix.",
    )


def _drawn_t1(raws: Sequence[Raw]) -> Figure:
    def series(name: str, label: str) -> list[Series]:
        return [
            Series(
                f"layer {depth}",
                WIDTHS_T1,
                [[root(raw[name][str(d)][index]) for d in WIDTHS_T1] for raw in raws],
            )
            for index, depth in enumerate(DEPTHS_T1)
        ]

    return Figure(
        [
            Panel("width d", "W2 to a Gaussian", series(name, label), title=label, x_log=True, y_log=True)
            for name, label in (("bn", "with BN"), ("vanilla", "without"))
        ],
        f"4 samples that start orthogonal, mean of {RUNS} runs a seed.",
    )


# Appendix G

WIDTHS_G = (16, 32, 64, 128, 256)
LAYERS_G = {"small": (100, 500), "paper": (1000, 5000)}  # left out, averaged
RUNS_G = 4


def _tanh_plus_one(h: Tensor) -> Tensor:
    return h.tanh() + 1


ACTIVATIONS_G: dict[str, Callable[[Tensor], Tensor] | None] = {
    "tanh + 1": _tanh_plus_one,
    "ReLU": torch.relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "linear": None,
}


def figure_g(settings: Settings) -> Raw:
    """How far the Gram matrix of 4 samples is from its mean over layers, and how far that mean is from orthogonal."""
    noise = noise_of(settings)
    skipped, kept = LAYERS_G[settings.scale]
    found: Raw = {"width": list(WIDTHS_G), "distance": {}, "mean_cosine": {}}
    for name, activation in ACTIVATIONS_G.items():
        distances = []
        for d in WIDTHS_G:
            start = torch.randn(RUNS_G, 4, d, dtype=torch.float64, generator=noise)
            chain = bn_chain(start, skipped + kept, activation=activation, generator=noise)
            mean, distance = gram_fluctuation(itertools.islice(chain, skipped, None))
            distances.append(distance.mean())
        mean = mean.mean(0)
        found["distance"][name] = distances
        found["mean_cosine"][name] = (mean / mean.diagonal().mean())[~torch.eye(4, dtype=torch.bool)].mean()
    return found


def _verdict_g(raws: Sequence[Raw]) -> Verdict:
    checks = []
    for name in ACTIVATIONS_G:
        exponents = [log_slope(WIDTHS_G, raw["distance"][name]) for raw in raws]
        checks.append(near(f"exponent of the distance over width, {name}", exponents, -0.5, 0.12, "-1/2"))
    for name in ACTIVATIONS_G:
        cosines = [raw["mean_cosine"][name] for raw in raws]
        checks.append(shown(f"mean cosine of samples around which the chain settles, {name}", cosines))
    return judge(
        checks,
        "The published picture shows one curve four times (its notebook plots the last activation under every label). "
        "Under ReLU and tanh + 1 samples settle at an angle that is no right one: the distance is from that mean.",
    )


def _drawn_g(raws: Sequence[Raw]) -> Figure:
    series = [Series(name, WIDTHS_G, [raw["distance"][name] for raw in raws]) for name in ACTIVATIONS_G]
    return Figure(
        [Panel("width d", "mean distance of HᵀH from its mean", series, x_log=True, y_log=True)],
        f"4 samples, BN chains with an activation, mean of {RUNS_G} runs a seed.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-T1",
        "Table 1: how far representations are from Gaussian",
        "Without BN they become Gaussian with width at any one depth; with BN they are within a ball of radius of "
        "order width^(-1/4), whatever the depth.",
        table1,
        _verdict_t1,
        _drawn_t1,
        size="the table is qualitative; distances are measured on linear chains.",
    ),
    Experiment(
        "S1-F6b",
        "Appendix G: orthogonality with other activations",
        "Around its mean the Gram matrix of the samples fluctuates by the order of one over the square root of width.",
        figure_g,
        _verdict_g,
        _drawn_g,
        size="4 runs of 500 layers instead of one of 5000.",
    ),
)

"""Daneshmand et al. 2021 on random chains: how batch normalisation makes representations orthogonal, layer by layer.

Figures 1, 2 and 3, Table 1, and the figure of Appendix G on other activations. Training is in another file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.verdict import Verdict, above, below, between, judge, less, log_slope, near, shown, slope
from orthofast.metrics import (
    bn_chain,
    chain_trace,
    diagonal_start,
    gaussian_w2_squared,
    gram_fluctuation,
    isotropic_baseline,
    nearly_parallel_start,
    stationary_gap,
    vanilla_chain,
)

RUNS = 20  # independent chains that one seed averages, as in the paper


# Figure 1


def figure1(settings: Settings) -> Raw:
    """|cos| of two samples before layers 1, 2, ...: with BN from nearly parallel ones, without from orthogonal ones."""
    n, d, layers = 2, 32, 50
    noise = _noise(settings)
    parallel, apart = _starts(nearly_parallel_start(n, d)), _starts(torch.eye(n, d, dtype=torch.float64))
    bn = bn_chain(parallel, layers - 1, generator=noise)
    vanilla = vanilla_chain(apart, layers - 1, generator=noise)
    return {
        "layer": list(range(1, layers + 1)),
        "bn": chain_trace(itertools.chain([parallel], bn)).pii.mean(0),
        "vanilla": chain_trace(itertools.chain([apart], vanilla)).pii.mean(0),
    }


def _verdict1(raws: Sequence[Raw]) -> Verdict:
    bn_end = [_mean(raw["bn"][19:]) for raw in raws]
    vanilla_end = [_mean(raw["vanilla"][-5:]) for raw in raws]
    return judge(
        [
            above("|cos| with BN at layer 1", [raw["bn"][0] for raw in raws], 0.99, 1.0),
            between("|cos| with BN, mean of layers 20 to 50", bn_end, 0.05, 0.2, "about 0.11 (image)"),
            above("|cos| without BN, mean of the last 5 layers", vanilla_end, 0.5, "about 0.75 (image)"),
            less("|cos| at the end, with BN minus without", bn_end, vanilla_end, "BN falls, vanilla rises"),
        ],
        "The level with BN is below 0.142, that of independent isotropic vectors of length 32.",
    )


def _drawn1(raws: Sequence[Raw]) -> Figure:
    layers = raws[0]["layer"]
    series = [Series(name, layers, [raw[key] for raw in raws]) for name, key in (("BN", "bn"), ("vanilla", "vanilla"))]
    level = ("independent", isotropic_baseline(32))
    return Figure(
        [Panel("layer", "mean |cos| of the two samples", series, points=False, levels=[level])],
        f"d = 32, linear chains, mean of {RUNS} runs a seed. BN starts at cosine 1, vanilla at 0.",
    )


# Figure 2a

WIDTHS_2A = (32, 512)
PLATEAUS_2A = {32: -1.6, 512: -3.0}


def figure2a(settings: Settings) -> Raw:
    """Mean ln V after each layer, from a start of gap near its maximum."""
    noise = _noise(settings)
    found = {}
    for d in WIDTHS_2A:
        gap = chain_trace(bn_chain(_starts(diagonal_start(4, d)), 50, generator=noise)).gap
        found[str(d)] = gap.log().mean(0)
    return {"layer": list(range(1, 51)), "ln_gap": found}


def _verdict2a(raws: Sequence[Raw]) -> Verdict:
    checks = []
    for d in WIDTHS_2A:
        traces = [raw["ln_gap"][str(d)] for raw in raws]
        early = [slope(range(5, 13), trace[4:12]) for trace in traces]
        late = [slope(range(30, 51), trace[29:]) for trace in traces]
        level = [_mean(trace[29:]) for trace in traces]
        theory = math.log(stationary_gap(4, d))
        checks += [
            near(
                f"ln V after layer 1, d = {d}", [trace[0] for trace in traces], math.log(math.sqrt(0.75)), 0.01, -0.14
            ),
            below(f"slope of ln V over layers 5 to 12, d = {d}", early, -0.05, "falls linearly (image)"),
            between(f"slope of ln V over layers 30 to 50, d = {d}", late, -0.02, 0.02, "flat (image)"),
            near(f"ln V at layers 30 to 50, d = {d}", level, PLATEAUS_2A[d], 0.15, f"about {PLATEAUS_2A[d]} (image)"),
            shown(f"ln of the stationary gap in theory, d = {d}", [theory]),
        ]
    return judge(checks)


def _drawn2a(raws: Sequence[Raw]) -> Figure:
    series = [Series(f"d = {d}", raws[0]["layer"], [raw["ln_gap"][str(d)] for raw in raws]) for d in WIDTHS_2A]
    levels = [(f"theory, d = {d}", math.log(stationary_gap(4, d))) for d in WIDTHS_2A]
    return Figure(
        [Panel("layer", "ln V, orthogonality gap", series, points=False, levels=levels)],
        f"4 samples, linear BN chains from diag(1, 1e-6, 1e-6, 1e-6), mean of {RUNS} runs a seed.",
    )


# Figure 2b

WIDTHS_2B = (16, 32, 64, 128, 256, 512)


def figure2b(settings: Settings) -> Raw:
    """Gap averaged over layers 100 to 600, as in the text; the notebook averages 1 to 500 and divides by 20 again."""
    noise = _noise(settings)
    gaps = []
    for d in WIDTHS_2B:
        chain = bn_chain(_starts(diagonal_start(4, d)), 600, generator=noise)
        gaps.append(chain_trace(itertools.islice(chain, 99, None)).gap.mean())
    return {"width": list(WIDTHS_2B), "gap": gaps}


def _verdict2b(raws: Sequence[Raw]) -> Verdict:
    slopes = [log_slope(raw["width"], raw["gap"]) for raw in raws]
    ratios = [raw["gap"][-1] / stationary_gap(4, WIDTHS_2B[-1]) for raw in raws]
    return judge(
        [
            near("exponent of the gap over width", slopes, -0.5, 0.06, "-1/2"),
            near("gap at d = 512 over the theory's", ratios, 1.0, 0.1, "no number"),
        ]
    )


def _drawn2b(raws: Sequence[Raw]) -> Figure:
    theory = [stationary_gap(4, d) for d in WIDTHS_2B]
    series = [
        Series("measured", WIDTHS_2B, [raw["gap"] for raw in raws]),
        Series("stationary gap in theory", WIDTHS_2B, [theory]),
    ]
    return Figure(
        [Panel("width d", "mean gap V over layers 100 to 600", series, x_log=True, y_log=True)],
        f"4 samples, linear BN chains, mean of {RUNS} runs a seed. A slope of -1/2 is the claim.",
    )


# Figure 3

SAMPLES_3 = (4, 8, 16, 24, 32)
SHARES_3 = tuple(2 ** (step / 4) for step in range(-8, 2))  # of d in n^2
RUNS_3 = {"small": 3, "paper": 10}
LAYERS_3 = {"small": 300, "paper": 1000}


def figure3(settings: Settings) -> Raw:
    """Fraction of runs whose singular values stay above a tenth of the start's least one, for each n and d."""
    noise = _noise(settings)
    runs, layers = RUNS_3[settings.scale], LAYERS_3[settings.scale]
    grid = {}
    for n in SAMPLES_3:
        widths = sorted({max(n, round(n * n * share)) for share in SHARES_3})
        held = [_held(n, d, runs, layers, noise) for d in widths]
        first = next((d for d, rest in zip(widths, _tails(held), strict=True) if min(rest) == 1), None)
        grid[str(n)] = {"width": widths, "held_frac": held, "first_width": first}
    return {"grid": grid}


def _held(n: int, d: int, runs: int, layers: int, noise: torch.Generator) -> float:
    start = torch.randn(runs, n, d, dtype=torch.float64, generator=noise)
    limit = 0.1 * _least(start / torch.linalg.matrix_norm(start, keepdim=True))
    alive = torch.ones(runs, dtype=torch.bool)
    for state in bn_chain(start, layers, generator=noise):
        alive &= _least(state) >= limit
        if not alive.any():
            break
    return alive.double().mean().item()


def _least(h: Tensor) -> Tensor:
    """Least singular value of (runs, n, d) from the n x n side: far above what squaring loses."""
    found: Tensor = torch.linalg.eigvalsh(h @ h.mT)[:, 0].clamp(min=0).sqrt()
    return found


def _tails(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[index:] for index in range(len(values))]


def _verdict3(raws: Sequence[Raw]) -> Verdict:
    exponents = [log_slope(SAMPLES_3, [raw["grid"][str(n)]["first_width"] for n in SAMPLES_3]) for raw in raws]
    checks = [between("exponent of the least width over n", exponents, 1.5, 2.2, "quadratic; drawn d = (n - 28)^1.8")]
    checks += [
        shown(f"least width that holds, n = {n}", [raw["grid"][str(n)]["first_width"] for raw in raws])
        for n in SAMPLES_3
    ]
    return judge(
        checks,
        "The start is scaled to Frobenius norm 1: otherwise a tenth of its least singular value exceeds 1 / sqrt(n), "
        "the most any later one can be, for wide layers. The curve drawn in the paper has no value below n = 28.",
    )


def _drawn3(raws: Sequence[Raw]) -> Figure:
    rows = []
    for n in reversed(SAMPLES_3):
        shares = [f"{share:.2f}" for share in SHARES_3]
        runs = []
        for raw in raws:
            row = raw["grid"][str(n)]
            known = dict(zip(row["width"], row["held_frac"], strict=True))
            runs.append([known[max(n, round(n * n * share))] for share in SHARES_3])
        rows.append(Series(f"n = {n}", shares, runs))
    first = Series("least d", SAMPLES_3, [[raw["grid"][str(n)]["first_width"] for n in SAMPLES_3] for raw in raws])
    return Figure(
        [
            Panel("d / n²", "runs that hold", rows, kind="cells", title="samples"),
            Panel("samples n", "least width d that holds", [first], x_log=True, y_log=True),
        ],
        "Assumption A1(0.1 α₀): no singular value falls below a tenth of the start's least.",
    )


# Table 1

WIDTHS_T1 = (32, 64, 128, 256, 512)
DEPTHS_T1 = (10, 50, 200)


def table1(settings: Settings) -> Raw:
    """Mean W2^2 of the next layer's pre-activations to a Gaussian, for each chain, width and depth."""
    noise = _noise(settings)
    found: Raw = {"width": list(WIDTHS_T1), "depth": list(DEPTHS_T1), "bn": {}, "vanilla": {}, "bn_gap": {}}
    for d in WIDTHS_T1:
        start = _starts(torch.eye(4, d, dtype=torch.float64))
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

    def w2(name: str, d: int, depth: int) -> list[float]:
        return [math.sqrt(raw[name][str(d)][depth]) for raw in raws]

    def exponents(name: str) -> list[float | None]:
        return [log_slope(WIDTHS_T1, [math.sqrt(raw[name][str(d)][at]) for d in WIDTHS_T1]) for raw in raws]

    deep = [later / earlier for later, earlier in zip(w2("bn", 64, 2), w2("bn", 64, 1), strict=True)]
    squares = [raw["bn"]["64"][at] for raw in raws]
    lemma = [2 * 4 * raw["bn_gap"]["64"][at] for raw in raws]
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
                [[math.sqrt(raw[name][str(d)][index]) for d in WIDTHS_T1] for raw in raws],
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
    noise = _noise(settings)
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


def _noise(settings: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _starts(start: Tensor) -> Tensor:
    return start.expand(RUNS, *start.shape)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


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
    Experiment(
        "S1-F2a",
        "Figure 2a: orthogonality gap by layer",
        "ln V falls linearly with depth, then stays where width puts it.",
        figure2a,
        _verdict2a,
        _drawn2a,
        size="as in the paper.",
    ),
    Experiment(
        "S1-F2b",
        "Figure 2b: stationary gap by width",
        "The gap of deep layers falls as one over the square root of width.",
        figure2b,
        _verdict2b,
        _drawn2b,
        size="as in the paper.",
    ),
    Experiment(
        "S1-F3",
        "Figure 3: where assumption A1 holds",
        "The width from which it holds grows quadratically with the number of samples.",
        figure3,
        _verdict3,
        _drawn3,
        size="3 runs of 300 layers instead of 10 of 1000, up to 32 samples.",
    ),
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

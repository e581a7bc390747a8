"""Daneshmand et al. 2021 on random chains: how batch normalisation makes representations orthogonal, layer by layer.

Figures 1, 2 and 3. Table 1 and training are in other files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.missing import mean, over
from orthofast.lab.verdict import Verdict, above, below, between, judge, less, log_slope, near, shown, slope
from orthofast.metrics import (
    bn_chain,
    chain_trace,
    diagonal_start,
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
    noise = noise_of(settings)
    parallel, apart = starts(nearly_parallel_start(n, d)), starts(torch.eye(n, d, dtype=torch.float64))
    bn = bn_chain(parallel, layers - 1, generator=noise)
    vanilla = vanilla_chain(apart, layers - 1, generator=noise)
    return {
        "layer": list(range(1, layers + 1)),
        "bn": chain_trace(itertools.chain([parallel], bn)).pii.mean(0),
        "vanilla": chain_trace(itertools.chain([apart], vanilla)).pii.mean(0),
    }


def _verdict1(raws: Sequence[Raw]) -> Verdict:
    bn_end = [mean(raw["bn"][19:]) for raw in raws]
    vanilla_end = [mean(raw["vanilla"][-5:]) for raw in raws]
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
    noise = noise_of(settings)
    found = {}
    for d in WIDTHS_2A:
        gap = chain_trace(bn_chain(starts(diagonal_start(4, d)), 50, generator=noise)).gap
        found[str(d)] = gap.log().mean(0)
    return {"layer": list(range(1, 51)), "ln_gap": found}


def _verdict2a(raws: Sequence[Raw]) -> Verdict:
    checks = []
    for d in WIDTHS_2A:
        traces = [raw["ln_gap"][str(d)] for raw in raws]
        early = [slope(range(5, 13), trace[4:12]) for trace in traces]
        late = [slope(range(30, 51), trace[29:]) for trace in traces]
        level = [mean(trace[29:]) for trace in traces]
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
    noise = noise_of(settings)
    gaps = []
    for d in WIDTHS_2B:
        chain = bn_chain(starts(diagonal_start(4, d)), 600, generator=noise)
        gaps.append(chain_trace(itertools.islice(chain, 99, None)).gap.mean())
    return {"width": list(WIDTHS_2B), "gap": gaps}


def _verdict2b(raws: Sequence[Raw]) -> Verdict:
    slopes = [log_slope(raw["width"], raw["gap"]) for raw in raws]
    ratios = [over(raw["gap"][-1], stationary_gap(4, WIDTHS_2B[-1])) for raw in raws]
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
    noise = noise_of(settings)
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
            Panel("d / n²", "runs that hold", rows, kind="cells", rows="samples n"),
            Panel("samples n", "least width d that holds", [first], x_log=True, y_log=True),
        ],
        "Assumption A1(0.1 α₀): no singular value falls below a tenth of the start's least.",
    )


def noise_of(settings: Settings) -> torch.Generator:
    """Random numbers of one seed."""
    return torch.Generator().manual_seed(settings.seed)


def starts(start: Tensor) -> Tensor:
    """The same start for every run, (n, d) to (runs, n, d)."""
    return start.expand(RUNS, *start.shape)


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
)

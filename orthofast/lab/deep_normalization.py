"""Beyond Daneshmand et al. 2021: the orthogonality gap by depth under LayerNorm and RMSNorm, plain and residual.

The paper proves that batch normalisation orthogonalises, and says of LayerNorm that it "does not necessarily" (Section
6, citing Lubana et al. 2021); it measures neither LayerNorm nor shortcuts. What must hold is derived here, before any
run. Letters: n samples, width d, c the cosine of two samples, V the gap of Eq. 2; for samples of one length
``V^2 = (n - 1) / n * mean c^2``.

- Batch norm, linear: V settles at :func:`orthofast.metrics.stationary_gap` from any start (Theorem 1, geometric drift).
  With ReLU it falls and stays too (Appendix Figure 6).
- RMSNorm multiplies each sample by a positive number. Linear layers and ReLU carry such numbers through, so every angle
  is that of the same network without normalisation: equal up to rounding.
- LayerNorm also removes the mean over features, one direction of d: like RMSNorm, but for 1 / d.
- Linear, none or per sample: ``atanh(c)`` makes steps of variance 1 / d a layer. ``mean c^2`` rises where it is below
  1 / 2, and samples become parallel within some multiples of d layers: V rises, ``sqrt(1 - 1 / n)`` at most. Inputs are
  standardised, which puts their ``mean c^2`` below 1 / 2.
- ReLU, none or per sample: c goes to :func:`~orthofast.lab.modern_nets.cosine_map` of c, above c for every c < 1. V
  rises to the cap of rank one within tens of layers, along the map's curve where networks are wide.
- A shortcut makes c the mean of shortcut and branch, weighted by their squared lengths. Without normalisation both grow
  alike: half the speed of a plain network. With pre-norm the branch keeps its length while the stream grows, so block l
  makes 1 / (l + 1) of a plain layer's step: L blocks do what about ln L layers do.
- Training has to tell classes apart, so the gap of the last hidden layer falls (as in Figure 4b) where it starts high.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from orthofast.lab.data import Images, load
from orthofast.lab.experiment import DATA, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.fitting import batches, fit, optimizer_for
from orthofast.lab.missing import mean, over
from orthofast.lab.modern_nets import NORMALIZATIONS, PER_SAMPLE, cosine_map, plain_perceptron, residual_perceptron
from orthofast.lab.verdict import Check, Number, Verdict, below, between, judge, less, shown
from orthofast.metrics import cosine_matrix, gap_bounds, stationary_gap
from orthofast.training import representation_gaps

N = 8  # samples of a batch, as in Appendix Figure 6
CLOSE = 0.05  # of V: what a network of finite width may be off a wide one's
EXACT = 1e-3  # of V: rounding of float32 over all layers
# width, networks that one seed averages, batches
LINEAR = {"small": (64, 5, 2), "paper": (512, 10, 4)}
RECTIFIED = {"small": (100, 8, 4), "paper": (800, 5, 50)}
DEPTH = 30  # layers or blocks, as in Appendix Figure 6
# depth, width, steps, batch, learning rate
TRAINED = {"small": (15, 100, 150, 100, 0.01), "paper": (30, 800, 3000, 500, 0.01)}
NO_SUCH = "no such experiment"
UNIT = "none, length 1"  # without normalisation, each sample scaled to length 1 where it is watched


def gap_of_cosines(cosines: Tensor) -> float:
    """V of samples of one length with these cosines, (n, n): ``sqrt((|C|^2 - n) / n^2)``."""
    n = len(cosines)
    return math.sqrt(max(0.0, float(cosines.square().sum()) - n) / (n * n))


def wide_gaps(inputs: Iterable[Tensor], depth: int, step: Callable[[int, Tensor], Tensor]) -> list[float]:
    """V behind layers 1 to depth of infinitely wide networks, mean over batches.

    Args:
        inputs: batches of samples, (n, d) each; a first linear layer keeps their cosines.
        depth: layers, or residual blocks behind that layer.
        step: cosines behind layer l + 1 from l and those behind layer l.
    """
    found = []
    for batch in inputs:
        cosines = cosine_matrix(batch.double())
        row = [gap_of_cosines(cosines)]
        for layer in range(1, depth):
            cosines = step(layer, cosines)
            row.append(gap_of_cosines(cosines))
        found.append(row)
    return [statistics.fmean(values) for values in zip(*found, strict=True)]


def mean_gaps(
    networks: Iterable[nn.Module], loader: Sequence[Tensor], paths: Sequence[str], *, positions: bool = False
) -> list[float]:
    """V at these modules, mean over random networks and the loader's batches, with the batch's statistics.

    Args:
        networks: alike but for their weights; each is dropped before the next is taken.
        loader: batches of inputs.
        paths: of the modules.
        positions: samples are positions, as in :func:`orthofast.training.representation_gaps`.
    """
    wanted = frozenset(paths)
    rows = []
    for network in networks:
        # one look-up a module, where a list of names is searched for each
        report = representation_gaps(
            network,
            loader,
            select=lambda name, _: name.removesuffix(".weight") in wanted,
            positions=positions,
            training=True,
        )
        rows.append([report.layers[path].mean for path in paths])
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def plain_and_residual(settings: Settings) -> Raw:
    """Gaps by depth for each normalisation, those of wide networks, and those before and after training."""
    data = load(settings).standardized().flat()
    width, networks, count = LINEAR[settings.scale]
    depths = [2**power for power in range(int(math.log2(2 * width)) + 1)]
    loader = loader_of(data, count, settings.seed)
    found: Raw = {
        "cap": gap_bounds(N, width).high,
        "stationary": stationary_gap(N, width, center=True),
        "input": statistics.fmean(gap_of_cosines(cosine_matrix(batch.double())) for batch in loader),
        "linear": {"layer": depths}
        | _plain(
            settings,
            loader,
            lambda kind: plain_perceptron(_size(data), width, depths[-1], kind, "linear"),
            networks,
            depths,
        ),
    }
    width, networks, count = RECTIFIED[settings.scale]
    loader = loader_of(data, count, settings.seed)
    layers = list(range(1, DEPTH + 1))
    found["relu"] = {"layer": layers} | _plain(
        settings, loader, lambda kind: plain_perceptron(_size(data), width, DEPTH, kind), networks, layers
    )
    found["residual"] = {"layer": layers} | _plain(
        settings, loader, lambda kind: residual_perceptron(_size(data), width, DEPTH - 1, kind), networks, layers
    )
    found["relu"]["wide"] = wide_gaps(loader, DEPTH, lambda _, c: cosine_map("relu", c))
    found["residual"]["wide"] = wide_gaps(
        loader, DEPTH, lambda done, c: (done * c + cosine_map("relu", c)) / (done + 1)
    )
    return found | {"trained": {kind: _trained_plain(settings, data, kind) for kind in NORMALIZATIONS}}


def _plain(
    settings: Settings,
    loader: Sequence[Tensor],
    build: Callable[[str], nn.Module],
    networks: int,
    layers: Sequence[int],
) -> dict[str, list[float]]:
    """Gaps behind these layers, from 1 on, for every normalisation on the same random weights."""
    found = {}
    for kind in NORMALIZATIONS:
        torch.manual_seed(settings.seed)
        paths = [str(layer - 1) for layer in layers]
        if kind == "none":
            paths += [f"{path}.unit.rows" for path in paths]
        gaps = mean_gaps((build(kind).to(loader[0].device) for _ in range(networks)), loader, paths)
        found[kind] = gaps[: len(layers)]
        if kind == "none":
            found[UNIT] = gaps[len(layers) :]
    return found


def _trained_plain(settings: Settings, data: Images, kind: str) -> dict[str, list[float] | float]:
    """Gaps behind each hidden layer with ReLU before and after SGD, and the mean loss (nats) of its last 20 steps."""
    depth, width, steps, batch, rate = TRAINED[settings.scale]
    torch.manual_seed(settings.seed)
    hidden = plain_perceptron(_size(data), width, depth, kind)
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(width, data.classes)).to(data.train.device)
    loader = loader_of(data, 10, settings.seed)
    paths = [f"0.{layer}" for layer in range(depth)]
    start = mean_gaps([model], loader, paths)
    losses = fit(model, data, optimizer_for(model, "sgd", rate), steps=steps, batch=batch, seed=settings.seed)
    return {
        "start": start,
        "end": mean_gaps([model], loader, paths),
        "loss": statistics.fmean(losses[-20:]),
    }


def verdict_plain(raws: Sequence[Raw]) -> Verdict:
    """The conditions of the module's list."""
    ends = {
        place: {kind: [raw[place][kind][-1] for raw in raws] for kind in raws[0][place] if kind != "layer"}
        for place in ("linear", "relu", "residual")
    }
    inputs = [raw["input"] for raw in raws]
    checks: list[Check] = [shown("V of the input", inputs), shown("cap of rank one", [raw["cap"] for raw in raws])]
    deep = [_half(raw["linear"]["batch norm"]) for raw in raws]
    ratio = [over(mean(one), raw["stationary"]) for one, raw in zip(deep, raws, strict=True)]
    settled = [max(one) - min(one) if one else None for one in (_half(raw["relu"]["batch norm"]) for raw in raws)]
    checks += [
        shown("linear, batch norm: stationary level by theory", [raw["stationary"] for raw in raws]),
        between(
            "linear, batch norm: V of deep layers over the stationary level", ratio, 0.85, 1.15, "constant in depth"
        ),
        less("ReLU, batch norm: V at the last layer minus input", ends["relu"]["batch norm"], inputs, "falls"),
        below("ReLU, batch norm: range of V over the second half", settled, CLOSE, "stays"),
        less("residual, batch norm: V at the last block minus input", ends["residual"]["batch norm"], inputs, NO_SUCH),
    ]
    for place, name in (("linear", "linear"), ("relu", "ReLU")):
        apart = [largest_distance(raw[place]["RMSNorm"], raw[place][UNIT]) for raw in raws]
        checks.append(below(f"{name}: largest distance of RMSNorm to none, by angles", apart, EXACT, NO_SUCH))
        for kind in (*PER_SAMPLE, "none"):
            said = "rises" if kind == "none" else "not necessarily lower"
            checks.append(less(f"{name}, {kind}: V of the input minus last layer", inputs, ends[place][kind], said))
    for place in ("relu", "residual"):
        for kind in PER_SAMPLE:
            off = [largest_distance(raw[place][kind][-1:], raw[place]["wide"][-1:]) for raw in raws]
            checks.append(below(f"{place}, {kind}: distance to a wide network's V at the end", off, CLOSE, NO_SUCH))
    for kind in (*PER_SAMPLE, UNIT):
        pair = ends["residual"][kind], ends["relu"][kind]
        checks.append(less(f"{kind}: V at the end, residual minus plain", *pair, NO_SUCH))
    for kind in PER_SAMPLE:
        pair = ends["residual"][kind], ends["residual"][UNIT]
        checks.append(less(f"residual: V at the end, {kind} minus none", *pair, NO_SUCH))
        pair = ends["relu"]["batch norm"], ends["relu"][kind]
        checks.append(less(f"ReLU: V at the end, batch norm minus {kind}", *pair, NO_SUCH))
    for kind in NORMALIZATIONS:
        before, after = ([raw["trained"][kind][when][-1] for raw in raws] for when in ("start", "end"))
        if kind == "batch norm":
            checks.append(shown("trained, batch norm: V of the last hidden layer, start", before))
            checks.append(shown("trained, batch norm: V of the last hidden layer, end", after))
        else:
            checks.append(less(f"trained, {kind}: V of the last hidden layer, end minus start", after, before, "falls"))
        checks.append(shown(f"trained, {kind}: loss (nats)", [raw["trained"][kind]["loss"] for raw in raws]))
    return judge(
        checks,
        "Published words are of Section 6 and Appendix Figure 6; the other conditions are derived, the paper has no "
        f"such experiment. Batches of {N} images; batch norm with the batch's statistics.",
    )


def _half(values: Sequence[Number]) -> list[float]:
    """The second half; nothing where one is missing."""
    known = [value for value in values[len(values) // 2 :] if value is not None]
    return known if len(known) == len(values) - len(values) // 2 else []


def largest_distance(one: Sequence[Number], other: Sequence[Number]) -> float | None:
    """Between numbers at one place; None where one is missing."""
    known = [abs(a - b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return max(known) if len(known) == len(one) else None


def drawn_plain(raws: Sequence[Raw]) -> Figure:
    """Linear, with ReLU, residual; then before and after training."""
    first = raws[0]
    cap = ("rank one", first["cap"])
    panels = []
    for place, title in (
        ("linear", "plain, linear"),
        ("relu", "plain, ReLU"),
        ("residual", "pre-norm residual blocks, ReLU"),
    ):
        series = [Series(kind, first[place]["layer"], [raw[place][kind] for raw in raws]) for kind in NORMALIZATIONS]
        if "wide" in first[place]:
            series.append(Series("per sample, wide", first[place]["layer"], [raw[place]["wide"] for raw in raws]))
        levels = [cap] if place != "linear" else [cap, ("BN, theory", first["stationary"])]
        panels.append(
            Panel(
                "layer" if place != "residual" else "layer (1: the embedding)",
                f"gap V of a batch of {N}",
                series,
                title,
                x_log=place == "linear",
                points=False,
                levels=levels,
            )
        )
    layers = list(range(1, len(first["trained"]["none"]["end"]) + 1))
    series = [Series(kind, layers, [raw["trained"][kind]["end"] for raw in raws]) for kind in NORMALIZATIONS]
    panels.append(
        Panel("layer", f"gap V of a batch of {N}", series, "plain, ReLU, trained", points=False, levels=[cap])
    )
    return Figure(
        panels,
        "Random weights, but for the last panel; V behind normalisation, or behind each block. Wide: LayerNorm and "
        "RMSNorm in infinitely wide networks. Without normalisation samples also differ in length, which counts in V.",
    )


def loader_of(data: Images, count: int, seed: int) -> list[Tensor]:
    """So many batches of N training images."""
    return [inputs for inputs, _ in batches(data, N, count, seed)]


def _size(data: Images) -> int:
    return data.train.shape[1]


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S1-X4",
        "Beyond the paper: gap by depth under LayerNorm and RMSNorm, plain and residual",
        "Batch norm orthogonalises; LayerNorm and RMSNorm do not, and shortcuts slow the collapse.",
        plain_and_residual,
        verdict_plain,
        drawn_plain,
        needs=DATA,
        size="width 64 and 128 layers if linear, width 100 and 30 layers with ReLU; 15 layers trained for 150 steps.",
    ),
)

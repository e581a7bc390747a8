"""`python -m benchmarks.spectra`: kappa_p of Kronecker products without the products, Fisher spectra without gradients.

Kronecker: lambda_p at four shares p from two factors' eigenvalues, against the array of all products (partitioned at
the four places, or sorted). Fisher: exact spectra from what enters and leaves each layer, against the matrix of
per-sample gradients, decomposed or multiplied with itself. Fresh random numbers each round, contestants in turns, one
thread, process CPU time besides wall time; nothing is timed before the values agree (the gate). Peak memory above the
input is read in a process of its own for each contestant. Ratios are medians over medians of one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measured import dump
from benchmarks.memory import ROOT, TIMEOUT_S, peak_of
from benchmarks.timing import calls_for, sample, spread, turns
from orthofast import metrics
from orthofast.lab import mlp

SHARES = (0.5, 0.8, 0.9, 1.0)
OURS = "ours"

Layer = tuple[Tensor, Tensor]
Spectra = list[Tensor]


@dataclass(frozen=True)
class Race:
    """One comparison.

    Attributes:
        name: as in the tables.
        draw: fresh input from a seed.
        contestants: name to the call on that input; values as a list of tensors, comparable among contestants.
        rival: the contestant our ratios are formed with; the others are told beside it.
        time_target: of the rival's time, at most.
        memory_target: of the rival's extra memory, at most; None where none was promised.
        agree: largest relative difference the gate lets pass, of each tensor's largest entry.
    """

    name: str
    draw: Callable[[int], Any]
    contestants: dict[str, Callable[[Any], Spectra]]
    rival: str
    time_target: float
    memory_target: float | None
    agree: float


def factors(m: int, n: int) -> Callable[[int], Layer]:
    """Eigenvalues that fall steeply, as those of covariances do: uniform numbers to the eighth and sixth power."""

    def draw(seed: int) -> Layer:
        numbers = np.random.default_rng(seed)
        return torch.from_numpy(numbers.random(m) ** 8), torch.from_numpy(numbers.random(n) ** 6)

    return draw


def quantiles(pair: Layer) -> Spectra:
    """Ours."""
    return [metrics.kronecker_quantile(*pair, p) for p in SHARES]


def _places(size: int) -> list[int]:
    return [size - math.ceil(Fraction(str(p)) * size) for p in SHARES]


def partitioned(pair: Layer) -> Spectra:
    """All products, and a selection of the four: the fastest way with the array."""
    products = np.multiply.outer(pair[0].numpy(), pair[1].numpy()).ravel()
    places = _places(len(products))
    products.partition(places)
    return [torch.tensor(products[place]) for place in places]


def in_order(pair: Layer) -> Spectra:
    """All products, sorted: every share at once, and what is written first."""
    products = np.multiply.outer(pair[0].numpy(), pair[1].numpy()).ravel()
    products.sort()
    return [torch.tensor(products[place]) for place in _places(len(products))]


def network(widths: Sequence[int], n: int) -> Callable[[int], list[Layer]]:
    """(x, g) of every linear layer of a perceptron in float32: n samples, labels at random, per-sample losses."""

    def draw(seed: int) -> list[Layer]:
        torch.manual_seed(seed)
        model, h = mlp(widths, init="he"), torch.randn(n, widths[0])
        entered, left = [], []
        for module in model:
            if isinstance(module, torch.nn.Linear):
                entered.append(h.detach())
            h = module(h)
            if isinstance(module, torch.nn.Linear):
                left.append(h)
        loss = torch.nn.functional.cross_entropy(h, torch.randint(widths[-1], (n,)), reduction="sum")
        return list(zip(entered, torch.autograd.grad(loss, left), strict=True))

    return draw


def dual(layers: list[Layer]) -> Spectra:
    """Ours: every layer's block, and all layers together where there are several."""
    whole = [metrics.fisher_spectrum(layers)] if len(layers) > 1 else []
    return [metrics.sub_fisher_spectrum(x, g) for x, g in layers] + whole


def _jacobians(layers: list[Layer]) -> list[Tensor]:
    """Per-sample gradients in float64, layer by layer and joined, (N, P) each."""
    each = [torch.einsum("no,ni->noi", g.double(), x.double()).flatten(1) for x, g in layers]
    return [*each, torch.cat(each, 1)] if len(each) > 1 else each


def decomposed(layers: list[Layer]) -> Spectra:
    """Singular values of the per-sample gradients."""
    return [torch.linalg.svdvals(matrix).square() / len(matrix) for matrix in _jacobians(layers)]


def multiplied(layers: list[Layer]) -> Spectra:
    """Eigenvalues of the gradients' inner products: knows the dual, not how to form it."""
    found = []
    for matrix in _jacobians(layers):
        small = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
        found.append(torch.linalg.eigvalsh(small).flip(0) / len(matrix))
    return found


KRONECKER = {OURS: quantiles, "partition": partitioned, "sort": in_order}
FISHER = {OURS: dual, "svd": decomposed, "gram": multiplied}
RACES = (
    Race("kronecker 4097 x 4096", factors(4097, 4096), KRONECKER, "partition", 0.3, 0.05, 0.0),
    Race("kronecker 785 x 256", factors(785, 256), KRONECKER, "partition", math.inf, None, 0.0),
    Race("fisher 144-24x7-10, N = 512", network([144, *[24] * 7, 10], 512), FISHER, "svd", 0.2, None, 1e-9),
    Race("fisher 256-256, N = 512", network([256, 256], 512), FISHER, "gram", 0.2, None, 1e-9),
)


def gate(race: Race, data: Any) -> dict[str, float]:
    """Largest relative difference of each contestant from the rival.

    Raises:
        ValueError: where one is too large to time anything.
    """
    expected = race.contestants[race.rival](data)
    errors = {}
    for name, call in race.contestants.items():
        worst = 0.0
        for found, truth in zip(call(data), expected, strict=True):
            if found.shape != truth.shape:
                raise ValueError(f"{race.name}: {name} gives {tuple(found.shape)}, {race.rival} {tuple(truth.shape)}")
            worst = max(worst, float((found - truth).abs().max() / truth.abs().max()))
        errors[name] = worst
    if not max(errors.values()) <= race.agree:
        raise ValueError(f"{race.name}: contestants disagree: {errors}")
    return errors


def run(race: Race, rounds: int) -> list[dict[str, Any]]:
    """Gate, warm up, then rounds in turns."""
    errors = gate(race, race.draw(0))
    walls: dict[str, list[float]] = {name: [] for name in race.contestants}
    cpus: dict[str, list[float]] = {name: [] for name in race.contestants}
    data, repeats = race.draw(1), {}
    for name, call in race.contestants.items():
        repeats[name] = calls_for(sample(partial(call, data), 1)[0])
    for number in range(rounds):
        data = race.draw(2 + number)
        for name in turns(list(race.contestants), number):
            wall, cpu, _ = sample(partial(race.contestants[name], data), repeats[name])
            walls[name].append(wall)
            cpus[name].append(cpu)
    return [
        {
            "race": race.name,
            "contestant": name,
            "rival": race.rival,
            "error": errors[name],
            "wall_s": walls[name],
            "cpu_s": cpus[name],
        }
        for name in race.contestants
    ]


def measure_memory(race: Race, name: str) -> dict[str, Any]:
    """Peak above the input of one call, in this process; one on a small input goes before."""
    data = race.draw(0)
    small = network([4, 3], 5)(0) if isinstance(data, list) else factors(4, 3)(0)
    race.contestants[name](small)
    gc.collect()
    extra, method = peak_of(partial(race.contestants[name], data))
    return {"extra_mib": extra / 2**20, "method": method}


def extra_memory(race: Race, name: str) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.spectra", "--race", race.name, "--memory", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return {"race": race.name, "contestant": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def verdicts(race: Race, times: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> list[str]:
    """What was promised, and whether it holds, one line each."""
    lines = []
    taken = {row["contestant"]: spread(row["wall_s"]).median for row in times if row["race"] == race.name}
    held = {row["contestant"]: row["extra_mib"] for row in memory if row["race"] == race.name}
    if taken and math.isfinite(race.time_target):
        ratio = taken[OURS] / taken[race.rival]
        lines.append(_verdict(f"{race.name}, time of {race.rival}", ratio, race.time_target))
    if held and race.memory_target is not None:
        ratio = held[OURS] / held[race.rival]
        lines.append(_verdict(f"{race.name}, extra memory of {race.rival}", ratio, race.memory_target))
    return lines


def _verdict(what: str, value: float, target: float) -> str:
    return f"{what}: {value:.3f}, promised at most {target}: {'met' if value <= target else 'not met'}"


def table(rows: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> str:
    """Medians in milliseconds, extra memory, our share of each contestant's."""
    held = {(row["race"], row["contestant"]): row["extra_mib"] for row in memory}
    ours = next(row for row in rows if row["contestant"] == OURS)
    lines = [f"{rows[0]['race']:<30} {'wall ms':>9} {'cpu ms':>9} {'MiB':>7}  ours of it: wall, cpu"]
    for row in rows:
        wall, cpu = spread(row["wall_s"]).median, spread(row["cpu_s"]).median
        shares = spread(ours["wall_s"]).median / wall, spread(ours["cpu_s"]).median / cpu
        extra = held.get((row["race"], row["contestant"]), math.nan)
        lines.append(
            f"  {row['contestant']:<28} {wall * 1e3:>9.2f} {cpu * 1e3:>9.2f} {extra:>7.1f}  "
            f"{shares[0]:.3f}, {shares[1]:.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, measure memory, judge; write the numbers where asked. 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectra", description=__doc__)
    parser.add_argument("--race", help="one race instead of all, by its name")
    parser.add_argument("--rounds", type=int, default=7, help="samples per contestant (default 7)")
    parser.add_argument("--memory", metavar="CONTESTANT", help="measure this one's memory here, and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results file, JSON; default: none is written")
    options = parser.parse_args(arguments)
    races = [race for race in RACES if options.race in (None, race.name)]
    if not races or options.rounds < 1:
        parser.error(f"--race needs one of {'; '.join(race.name for race in RACES)}, and --rounds at least 1")
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(measure_memory(races[0], options.memory)))
        return 0
    load = os.getloadavg()[0]
    times: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    judged: list[str] = []
    for race in races:
        memory += (used := [extra_memory(race, name) for name in race.contestants])
        times += (rows := run(race, options.rounds))
        judged += verdicts(race, rows, used)
        print(table(rows, used), flush=True)
    print(*judged, sep="\n")
    if options.out is not None:
        data = {
            **machine.commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.processor(),
            "versions": machine.versions(),
            "environment": machine.environment_facts(os.environ),
            "load_before": load,
            "measurements": times,
            "memory": memory,
            "verdicts": judged,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(dump(data))
    return int(any(line.endswith("not met") for line in judged))


if __name__ == "__main__":
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if any(os.environ.get(name) != value for name, value in one.items()):  # read when libraries are loaded
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.spectra", *sys.argv[1:]], {**os.environ, **one})
    sys.exit(main())

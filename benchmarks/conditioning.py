"""What Kronecker factors cost, in units of a plain forward and backward pass: ours beside four other packages.

``python -m benchmarks.conditioning`` measures three things. Factors of a whole data set in passes of their own (a
perceptron 784-256x4-10, three convolutions), with labels as in the data, drawn, or expected; factors that ride on
training steps, in units of such a step; and how much memory convolutions take. Every contestant's factors are held
against float64. Contestants take turns; a sample is one pass over all batches, its process CPU time over that of the
plain passes of the same round. Other packages sum in the dtype of the model, float32: ours is measured so, and with the
float64 sums it takes by default.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import machine
from benchmarks.conditioning_peers import CLASSES, Contestant, Data, contestants, ours, spectra_of
from benchmarks.timing import spread, turns

ROUNDS = 9
STEPS = 8  # batches of a pass
PLAIN = "forward and backward"
TARGETS = {  # at most, in units of the plain pass; None: no target
    ("perceptron", "empirical"): 1.3,
    ("perceptron", "mc"): 1.3,
    ("perceptron", "exact"): 4.5,
    ("convolutions", "empirical"): 1.6,
}
RIDE_TARGET = 0.4  # more than the step itself
MEMORY_TARGET_MIB = 16.0
CLOSE = {"ours": 1e-6, "theirs": 1e-3}  # of factors with float64 ones, relative in the Frobenius norm


def perceptron() -> nn.Sequential:
    """784-256x4-10 without biases, as the paper's."""
    torch.manual_seed(1)
    sizes = [784, 256, 256, 256, 256, CLASSES]
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    """Three convolutions of 32 channels on images of 24 x 24."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.AvgPool2d(24), nn.Flatten(), nn.Linear(32, CLASSES, bias=False)),
    )


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "perceptron": (perceptron, (256, 784)),
    "convolutions": (convolutions, (32, 32, 24, 24)),
}


def batches(net: str, steps: int = STEPS) -> Data:
    """Noise with random labels."""
    made = torch.Generator().manual_seed(0)
    shape = NETS[net][1]
    return [
        (torch.randn(shape, generator=made), torch.randint(CLASSES, shape[:1], generator=made)) for _ in range(steps)
    ]


def plain(model: nn.Module, data: Data) -> None:
    """What everything is measured in."""
    for x, y in data:
        functional.cross_entropy(model(x), y).backward()
        model.zero_grad()


def gate(net: str, labels: str, chosen: list[Contestant]) -> dict[str, Any]:
    """Largest relative distance of each contestant's spectra from ours in float64; drawn labels are not compared."""
    if labels == "mc":
        return {}
    model, data = NETS[net][0](), batches(net, 2)
    n = sum(len(x) for x, _ in data)
    wide = spectra_of(
        "orthofast", ours("float64")(model.double(), [(x.double(), y) for x, y in data], labels), model, labels, n
    )
    model.float()
    off: dict[str, Any] = {}
    for one in chosen:
        if labels in one.labels:
            found = spectra_of(one.name, one.run(model, data, labels), model, labels, n)
            pairs = [pair for key in wide for pair in zip(found[key], wide[key], strict=True)] if found else []
            off[one.name] = max((float((a - b).norm() / b.norm()) for a, b in pairs), default=None)
    return off


def race(net: str, labels: str, rounds: int, chosen: list[Contestant]) -> dict[str, Any]:
    """Ratios of process CPU time to the plain passes of the same round."""
    model, data = NETS[net][0](), batches(net)
    calls: dict[str, Callable[[], object]] = {PLAIN: lambda: plain(model, data)}
    for one in chosen:
        if labels in one.labels:
            calls[one.name] = lambda one=one: one.run(model, data, labels)  # type: ignore[misc]
    cpu_s = _timed(calls, rounds)
    base = cpu_s[PLAIN]
    return {
        "net": net,
        "labels": labels,
        "off": gate(net, labels, chosen),
        "plain_cpu_ms": 1000 * statistics.median(base),
        "ratios": {
            name: [a / b for a, b in zip(own, base, strict=True)] for name, own in cpu_s.items() if name != PLAIN
        },
    }


def _timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Process CPU seconds of each, in turns, after one call that is not counted."""
    cpu_s: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in turns(list(calls), number):
            started = time.process_time()
            calls[name]()
            cpu_s[name].append(time.process_time() - started)
    return cpu_s


def ride(net: str, rounds: int) -> dict[str, Any]:
    """What an armed step costs more than the same step of a copy that is not tracked."""
    from orthofast.training.factors import Factors
    from orthofast.training.tracker import CovarianceTracker

    data = batches(net)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, y in data:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    calls: dict[str, Callable[[], object]] = {}
    half = NETS[net][1][0] // 2
    for name in ("step", "float32", "float32, half of the rows", "float64", "not armed"):
        model = NETS[net][0]()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if name == "step":
            calls[name] = lambda m=model, o=optimizer: step(m, o)  # type: ignore[misc]
            continue
        precision, rows = name if name == "float64" else "float32", half if "half" in name else None
        tracker = CovarianceTracker(model, factors=Factors(precision=precision, rows_per_batch=rows))

        def tracked(m: Any = model, o: Any = optimizer, t: Any = tracker, armed: bool = name != "not armed") -> None:
            if armed:
                with t:
                    step(m, o)
            else:
                step(m, o)

        calls[name] = tracked
    cpu_s = _timed(calls, rounds)
    base = cpu_s["step"]
    more = {name: [a / b - 1 for a, b in zip(own, base, strict=True)] for name, own in cpu_s.items() if name != "step"}
    return {"net": net, "step_cpu_ms": 1000 * statistics.median(base) / STEPS, "more_frac": more}


def memory(name: str) -> float:
    """MiB a pass over the convolutions takes at its peak beyond a plain one: in a process of its own."""
    model, data = convolutions(), batches("convolutions", 2)
    chosen = {one.name: one for one in contestants(None)}[name]
    peaks = []  # the first of each loads packages and their libraries
    for call in (plain, lambda m, d: chosen.run(m, d, chosen.labels[0])) * 2:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        call(model, data)
        peaks.append(_resident_mib("VmHWM"))
    return peaks[3] - peaks[2]


def _resident_mib(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def memories(chosen: list[Contestant]) -> dict[str, float]:
    """The same of all, each in a fresh process."""
    found = {}
    # what is freed goes back to the system at once, so that the plain pass's memory hides nobody's
    strict = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for one in chosen:
        command = [sys.executable, "-m", "benchmarks.conditioning", "--memory-of", one.name]
        environment = {**os.environ, **strict}
        done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT, check=True, env=environment)
        found[one.name] = float(done.stdout.split()[-1])
    return found


def report(data: dict[str, Any]) -> tuple[str, bool]:
    """A table for the terminal, and whether the targets are met."""
    lines, met = [], True
    for raced in data["passes"]:
        target = TARGETS.get((raced["net"], raced["labels"]))
        lines.append(
            f"\n{raced['net']}, labels {raced['labels']}: factors over {PLAIN} ({raced['plain_cpu_ms']:.1f} ms)"
            + (f", target {target}" if target else "")
        )
        for name, ratios in raced["ratios"].items():
            over = spread(ratios)
            off = raced["off"].get(name)
            lines.append(
                f"  {name:<22}{over.median:>7.2f}  [{over.p20:.2f}, {over.p80:.2f}]"
                + (f"   off by {off:.1e}" if off is not None else "")
            )
            if off is not None:
                met &= off < CLOSE["ours" if name.startswith("orthofast") else "theirs"]
            if target and name == "orthofast float32":
                met &= over.median <= target
    for ridden in data["rides"]:
        lines.append(
            f"\n{ridden['net']}, riding on steps of {ridden['step_cpu_ms']:.1f} ms: over a step, target {RIDE_TARGET}"
        )
        for name, more in ridden["more_frac"].items():
            over = spread(more)
            lines.append(f"  {name:<27}{over.median:>+7.2f}  [{over.p20:+.2f}, {over.p80:+.2f}]")
            if name == "float32" and ridden["net"] == "perceptron":
                met &= over.median <= RIDE_TARGET
    lines.append(f"\nconvolutions, peak memory beyond plain passes, target {MEMORY_TARGET_MIB:.0f} MiB")
    for name, mib in data["memory_mib"].items():
        lines.append(f"  {name:<22}{mib:>7.1f} MiB")
        if name.startswith("orthofast"):
            met &= mib <= MEMORY_TARGET_MIB
    return "\n".join(lines), met


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a target is missed or a factor is wrong."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.conditioning", description=__doc__)
    made.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default {ROUNDS})")
    made.add_argument("--net", action="append", choices=list(NETS), help="this one alone; may be repeated")
    made.add_argument("--labels", action="append", choices=("empirical", "mc", "exact"), help="may be repeated")
    made.add_argument("--only", action="append", metavar="CONTESTANT", help="may be repeated")
    made.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    made.add_argument("--memory-of", metavar="CONTESTANT", help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    warnings.simplefilter("ignore")  # of other packages
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # read when the library is loaded
        one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, "-m", "benchmarks.conditioning", *(arguments or sys.argv[1:])]
        return subprocess.run(command, env={**os.environ, **one}, cwd=machine.ROOT, check=False).returncode
    torch.set_num_threads(1)
    if options.memory_of:
        print(memory(options.memory_of))
        return 0
    chosen = contestants(options.only)
    nets, labels = options.net or list(NETS), options.labels or ["empirical", "mc", "exact"]
    data: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **machine.commit(),
        "machine": machine.processor(),
        "versions": machine.versions(),
        "threads": 1,
        "passes": [race(net, mode, options.rounds, chosen) for net in nets for mode in labels],
        "rides": [ride(net, options.rounds) for net in nets],
        "memory_mib": memories(chosen) if "convolutions" in nets else {},
    }
    text, met = report(data)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"\ntargets: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

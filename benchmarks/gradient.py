"""`python -m benchmarks.gradient`: mean |cos| with its gradient, ours against autograd through naive torch, on the CPU.

Fresh random vectors each round, contestants in turns, wall and process CPU time; nothing is timed before value and
gradient agree with float64 (the gate). Peak memory above the input is read in a process of its own for each contestant.
Ratios are medians over medians of one run, with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import orthofast
from benchmarks import machine
from benchmarks.cases import Case, draw
from benchmarks.measured import dump
from benchmarks.memory import ROOT, TIMEOUT_S, TINY, peak_of
from benchmarks.peers import naive
from benchmarks.timing import calls_for, sample, spread, turns

CASES = tuple(Case(n, d, "float32") for n, d in ((64, 576), (768, 768), (4096, 512), (3072, 768), (4096, 4096)))
PROMISED = "4096x512"
RIVAL = "autograd"
TIME_TARGET, MEMORY_TARGET = 0.37, 0.16  # of the rival's
KINK = 1e-6  # of a cosine
VALUE_WITHIN, GRADIENT_WITHIN = 1e-6, 2e-6  # relative, Frobenius norm for the gradient

Loss = Callable[[Tensor], Tensor]


def field() -> dict[str, Loss]:
    """Contestants: name to the mean, (n, d) -> (), that is differentiated."""
    ours: dict[str, Loss] = {
        name: lambda vectors, name=name: orthofast.pii(vectors, backend=name)  # type: ignore[misc]
        for name in ("native_cpu", "reference")
    }
    return {RIVAL: naive, **ours}


def step(loss: Loss, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One training step's worth: the value and its gradient."""
    leaf = vectors.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def gate(case: Case, loss: Loss) -> dict[str, float]:
    """Relative errors of value and gradient against float64.

    The gradient is compared for vectors without a cosine within KINK of 0: there float32, autograd's too, may take
    either sign, and each such pair turns 2 / pairs of the gradient around.

    Raises:
        ValueError: where either is too large to time anything.
    """
    vectors = draw(case, 1)
    value, gradient = step(loss, vectors)
    wide = vectors.double()
    expected, right = step(naive_wide, wide)
    unit = wide / wide.norm(dim=1, keepdim=True)
    clear = ((unit @ unit.T).abs() >= KINK).all(1)
    errors = {
        "value_error": abs(float(value / expected) - 1),
        "gradient_error": float((gradient.double() - right)[clear].norm() / right[clear].norm()),
        "vectors_compared_frac": float(clear.double().mean()),
    }
    if not (errors["value_error"] <= VALUE_WITHIN and errors["gradient_error"] <= GRADIENT_WITHIN):
        raise ValueError(f"{case.shape}: a contestant is wrong: {errors}")
    return errors


def naive_wide(vectors: Tensor) -> Tensor:
    """Mean |cos| in the dtype of its input, summed there too."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    n = len(vectors)
    return (unit @ unit.T).abs().triu(1).sum() / (n * (n - 1) / 2)


def race(case: Case, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time value + gradient, and our value alone, in turns."""
    torch.set_num_threads(threads)
    contestants = field()
    facts = {"shape": case.shape, "n": case.n, "d": case.d, "dtype": case.dtype, "threads": threads}
    errors = {name: gate(case, loss) for name, loss in contestants.items()}

    def forward(vectors: Tensor) -> Tensor:
        with torch.no_grad():
            return orthofast.pii(vectors)

    calls: dict[str, Callable[[Tensor], Any]] = {
        name: lambda vectors, loss=loss: step(loss, vectors)  # type: ignore[misc]
        for name, loss in contestants.items()
    }
    calls["value alone"] = forward
    walls: dict[str, list[float]] = {name: [] for name in calls}
    cpus: dict[str, list[float]] = {name: [] for name in calls}
    first = draw(case, 0)
    repeats = {}
    for name, call in calls.items():
        sample(lambda call=call: call(first), 1)  # type: ignore[misc]
        repeats[name] = calls_for(sample(lambda call=call: call(first), 1)[0])  # type: ignore[misc]
    for number in range(rounds):
        vectors = draw(case, 2 + number)
        for name in turns(list(calls), number):
            call = calls[name]
            wall, cpu, _ = sample(lambda call=call, vectors=vectors: call(vectors), repeats[name])  # type: ignore[misc]
            walls[name].append(wall)
            cpus[name].append(cpu)
    return [
        {**facts, "contestant": name, "wall_s": walls[name], "cpu_s": cpus[name], **errors.get(name, {})}
        for name in calls
    ]


def extra_memory(case: Case, name: str, threads: int) -> dict[str, Any]:
    """Peak above the input of one step, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.gradient", "--memory", name, "--shape", case.shape]
    done = subprocess.run(
        [*command, "--threads", str(threads)], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    facts = {"shape": case.shape, "threads": threads, "contestant": name}
    return {**facts, **json.loads(done.stdout.strip().splitlines()[-1])}


def measure_memory(case: Case, name: str) -> dict[str, Any]:
    """The same in this process."""
    loss, vectors = field()[name], draw(case, 0)
    step(loss, draw(TINY, 0))
    gc.collect()
    extra, method = peak_of(lambda: step(loss, vectors))
    return {"extra_mib": extra / 2**20, "method": method}


def verdicts(times: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> list[str]:
    """What was promised, and whether it holds, one line each."""
    lines = []

    def ratio(rows: Sequence[dict[str, Any]], threads: int, read: Callable[[dict[str, Any]], float]) -> float | None:
        found = {row["contestant"]: read(row) for row in rows if (row["shape"], row["threads"]) == (PROMISED, threads)}
        return found["native_cpu"] / found[RIVAL] if RIVAL in found else None

    for threads in sorted({row["threads"] for row in times}):
        taken = ratio(times, threads, lambda row: spread(row["wall_s"]).median)
        if taken is not None:
            lines.append(_verdict(f"{PROMISED}, {threads} thread(s), time of autograd's", taken, TIME_TARGET))
    for threads in sorted({row["threads"] for row in memory}):
        held = ratio(memory, threads, lambda row: row["extra_mib"])
        if held is not None:
            lines.append(_verdict(f"{PROMISED}, {threads} thread(s), extra memory of autograd's", held, MEMORY_TARGET))
    return lines


def _verdict(what: str, value: float, target: float) -> str:
    return f"{what}: {value:.3f}, promised at most {target}: {'met' if value <= target else 'not met'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians in milliseconds, and the rival's share."""
    lines = [f"{'shape':>10} threads  {'contestant':<12} {'wall ms':>9} {'cpu ms':>9}  of autograd's"]
    walls = {(row["shape"], row["threads"]): spread(row["wall_s"]).median for row in rows if row["contestant"] == RIVAL}
    for row in rows:
        wall, cpu = spread(row["wall_s"]).median, spread(row["cpu_s"]).median
        share = wall / walls[row["shape"], row["threads"]]
        lines.append(
            f"{row['shape']:>10} {row['threads']:>7}  {row['contestant']:<12} {wall * 1e3:>9.3f} {cpu * 1e3:>9.3f}  "
            f"{share:.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, measure memory, judge; write the numbers where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient", description=__doc__)
    parser.add_argument("--shape", help="one case instead of all, as 4096x512")
    parser.add_argument("--threads", type=int, help="one number of threads instead of 1 and 2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", metavar="CONTESTANT", help="measure this one's memory here, and nothing else")
    parser.add_argument("--out", type=Path, help="results file; without --shape results/<machine>/gradient.json")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.shape in (None, case.shape)]
    if not cases:
        parser.error(f"--shape needs one of {', '.join(case.shape for case in CASES)}, got {options.shape}")
    threads = (options.threads,) if options.threads else (1, 2)
    if options.memory:
        torch.set_num_threads(threads[0])
        print(json.dumps(measure_memory(cases[0], options.memory)))
        return 0
    times: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    for case in cases:
        for count in threads:
            for name in field():
                memory.append(row := extra_memory(case, name, count))
                print(f"{case.shape:>10} {count:>7}  {name:<12} {row['extra_mib']:>9.1f} MiB extra", flush=True)
            times += (rows := race(case, count, options.rounds))
            print(table(rows), flush=True)
    judged = verdicts(times, memory)
    print(*judged, sep="\n")
    facts: Any = machine.processor()
    whole = options.shape is None and options.threads is None
    out = options.out or (machine.RESULTS / machine.slug(facts) / "gradient.json" if whole else None)
    if out is not None:
        data = {
            **machine.commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": facts,
            "versions": machine.versions(),
            "environment": machine.environment_facts(os.environ),
            "measurements": times,
            "memory": memory,
            "verdicts": judged,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(dump(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())

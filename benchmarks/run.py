"""`python -m benchmarks.run cpu`: gate, race, measure memory, print side by side, record every sample."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import calls, keops, machine, memory, report
from benchmarks.cases import FULL_ONLY_THREADS, Case, all_cases, named, quick_cases
from benchmarks.measured import SCHEMA_VERSION, Results, dump
from benchmarks.peers import field
from benchmarks.race import LEFT_OUT, Expected, Measurement, failures, race
from benchmarks.targets import judge_all
from benchmarks.timing import Budget

PARTS = ("import", "small", "many", "memory", "speed")
KEOPS_CAP_S = {False: 60.0, True: 30.0}
MANY_ROUNDS = {False: 3, True: 1}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    made.add_argument("what", choices=["cpu"], help="what to measure")
    made.add_argument("--quick", action="store_true", help="shapes up to 4096x4096 and few rounds: about 4 minutes")
    made.add_argument(
        "--only", action="append", metavar="SHAPE", help="this shape alone, e.g. 4096x4096; may be repeated"
    )
    made.add_argument("--threads", default="1,2", help="thread counts, comma-separated (default 1,2)")
    made.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    made.add_argument("--out", type=Path, metavar="FILE", help="results file (default: this machine's, full runs only)")
    made.add_argument(
        "--budget-minutes", type=float, metavar="M", help="time to share out (default 25; 4 with --quick)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 0 if all of ours passed the gate, 1 if one did not, 2 for arguments that cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        threads = _threads(options.threads)
        parts = _parts(options.parts)
        cases = quick_cases() if options.quick else all_cases()
        cases = named(options.only, cases) if options.only else cases
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    clean = machine.without_pins(os.environ)
    if clean is not None:  # a library reads these once, when it is loaded: start afresh without them
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *given], clean)

    budget = Budget(60 * (options.budget_minutes or (4.0 if options.quick else 25.0)))
    whole = not options.quick and not options.only and threads == (1, 2) and parts == PARTS
    facts: Any = machine.processor()
    out = options.out or (machine.RESULTS / machine.slug(facts) / "cpu.json" if whole else None)
    partial = None if out is None else out.with_suffix(".partial.json")
    if partial is not None:
        partial.parent.mkdir(parents=True, exist_ok=True)
    data = _run(cases, threads, parts, budget, quick=options.quick, partial=partial)
    if out is not None and partial is not None:
        out.write_text(dump(data))
        partial.unlink(missing_ok=True)
        print(f"\nwritten: {out}")
    else:
        print("\nnot written: part of a run; name a file with --out to keep it")
    if not data["passed"]:
        print("FAILED: a backend of ours did not pass the gate", file=sys.stderr)
    return 0 if data["passed"] else 1


def _run(
    cases: Sequence[Case],
    threads: Sequence[int],
    parts: Sequence[str],
    budget: Budget,
    *,
    quick: bool,
    partial: Path | None = None,
) -> dict[str, Any]:
    """All parts in turn; ``partial`` receives what is measured so far after every block, lest a stop lose it."""
    facts = machine.processor()
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "passed": True,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **machine.commit(),
        "command": {"quick": quick, "shapes": sorted({c.shape for c in cases}), "threads": threads, "parts": parts},
        "machine": facts,
        "versions": machine.versions(),
        "environment": machine.environment_facts(os.environ),
        "load_before": os.getloadavg()[0],
        "ceilings": {"fma_peak_gflops": fma_peak()},
    }
    print(report.heading(data))
    failed: list[str] = []
    if "import" in parts:
        data["import"] = calls.import_time(3 if quick else calls.IMPORT_PAIRS)
        print(report.import_line(Results(data)))
    if "small" in parts:
        data["small_calls"] = [
            row for dtype in _dtypes(cases) for count in threads for row in calls.small_call(count, dtype)
        ]
        failed += calls.ours_failed(data["small_calls"])
        print(report.small_calls(data["small_calls"]))
    if "many" in parts:
        layers = 2 if quick else None
        data["many"] = [
            row for dtype in _dtypes(cases) for count in threads
            for row in calls.many_matrices(count, dtype, MANY_ROUNDS[quick], layers)
        ]  # fmt: skip
        failed += calls.ours_failed(data["many"])
        print(report.many(data["many"]))
    if "memory" in parts:
        data["memory"] = _memory([c for c in cases if not quick or c.n >= 3072], max(threads))
    if "speed" in parts:

        def keep(so_far: Sequence[Measurement]) -> None:
            if partial is not None:
                partial.write_text(dump({**data, "measurements": [m.as_dict() for m in so_far]}))

        measured = _speed(cases, threads, budget, quick=quick, keep=keep)
        failed += [m.contestant for m in failures(measured)]
        data["measurements"] = [m.as_dict() for m in measured]
    data["load_after"] = os.getloadavg()[0]
    data["passed"] = not failed
    if data["passed"]:
        print(report.targets(judge_all(Results(data))))
    return data


def _speed(
    cases: Sequence[Case],
    threads: Sequence[int],
    budget: Budget,
    *,
    quick: bool,
    keep: Callable[[Sequence[Measurement]], None],
) -> list[Measurement]:
    contestants = field()
    expected = Expected()
    blocks = [(case, count) for case in cases for count in threads if count in case.threads or count not in (1, 2)]
    coming = sum(case.cost_s(count) for case, count in blocks)
    measured: list[Measurement] = []
    for case, count in blocks:
        cost = case.cost_s(count)
        found = race(case, count, contestants, budget.allowance_s(cost, coming), expected)
        coming -= cost
        found.append(_keops(case, count, KEOPS_CAP_S[quick]))
        measured += found
        print(report.block(found), flush=True)
        keep(measured)
    for case in cases:
        measured += [
            Measurement(
                case.shape, case.n, case.d, case.dtype, count, c.name, c.group, LEFT_OUT, FULL_ONLY_THREADS[case.shape]
            )
            for count in threads
            if case.shape in FULL_ONLY_THREADS and (case, count) not in blocks
            for c in contestants
        ]
    return measured


def _keops(case: Case, threads: int, cap_s: float) -> Measurement:
    found = keops.measure(case, threads, cap_s)
    measured = Measurement(
        case.shape, case.n, case.d, case.dtype, threads, "keops", "rival", found["status"], found["reason"]
    )
    if found["status"] == "timed":
        measured.wall_s, measured.cpu_s, measured.calls = found["wall_s"], found["cpu_s"], found["calls"]
        measured.rounds = list(range(len(measured.wall_s)))
        measured.first_call_s, measured.value, measured.expected = (
            found["first_call_s"],
            found["value"],
            found["expected"],
        )
        measured.error = abs(found["value"] / found["expected"] - 1)
    return measured


def _memory(cases: Sequence[Case], threads: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case, name in memory.wanted(cases):
        rows.append(memory.measure(case, name, threads))
        print(report.memory_line(rows[-1]), flush=True)
    return rows


def fma_peak() -> dict[str, float]:
    """GFLOP/s of one core in a register-only loop of multiply-adds, where the native module offers it."""
    try:
        native = importlib.import_module("orthofast._cpu")
    except ImportError:
        return {}
    measure = getattr(native, "fma_peak", None)
    return {} if measure is None else {str(kind): float(rate) for kind, rate in measure().items()}


def _dtypes(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.dtype for case in cases))


def _threads(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError(f"--threads needs positive numbers, comma-separated, got {text!r}")
    return counts


def _parts(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        raise ValueError(f"--parts needs some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return tuple(part for part in PARTS if part in asked)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())

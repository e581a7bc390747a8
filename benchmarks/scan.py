"""`python -m benchmarks.scan`: a scan over its folds alone, its memory, opening, other tools on the same files.

Parts: ``ratio`` (scans and bare folds over loaded tensors, in turns, same values first), ``memory`` (peak of a fresh
process above its imports, the same shapes in more and more layers; pairs are sampled there, which reads and decodes
everything and folds little), ``open`` (headers of Llama-3-70B, DeepSeek-V3 and a GGUF file with 128256 tokens),
``peers`` (whole processes, import included; on a small model, because some need minutes), ``gpu``. Checkpoints are
made by ``benchmarks.make_checkpoint`` in a folder that is removed afterwards, and lie in the page cache. All cores are
used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, scan_gpu, scan_parts, scan_peers
from benchmarks.checkpoint_shapes import MODELS
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.measured import dump
from benchmarks.timing import spread

PARTS = ("ratio", "memory", "open", "peers", "gpu")
SIZES = (0.5, 2.0)
PEERS_MODEL = "llama-30m"
RATIO, FLAT = 1.1, 1.1
COMMAND_S, GGUF_S = 1.0, 0.5
GPU_RATIO, GPU_HOST_MIB = 1.15, 4096.0
PER_LINE = ("ratio", "memory", "open", "peers", "verdicts")


def verdict(what: str, value: float, bound: float, unit: str = "") -> dict[str, Any]:
    """One promise beside what was measured."""
    word = "met" if value <= bound else "not met"
    return {"what": what, "value": value, "bound": bound, "unit": unit, "verdict": word}


def verdicts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """All promises that this run can judge."""
    found = []
    for row in data.get("ratio", ()):
        value = spread(row["wall_s"]["scan"]).median / spread(row["wall_s"]["folds"]).median
        found.append(verdict(f"scan of {row['checkpoint']} over its folds alone", value, RATIO))
    flat = [row for row in data.get("memory", ()) if row["pairs"]]
    if len(flat) > 1:
        peaks = [row["extra_mib"] for row in flat]
        sizes = f"{flat[0]['gb']:.1f} and {flat[-1]['gb']:.1f} GB"
        found.append(verdict(f"peak memory, largest over smallest between {sizes}", max(peaks) / min(peaks), FLAT))
    for row in data.get("open", ()):
        if row["what"] == "llama-3-70b":
            value = spread(row["command_s"]).median
            found.append(verdict("`inspect` of a 70B-shaped index, whole command", value, COMMAND_S, "s"))
            value = spread(row["inspect_s"]).median
            found.append(verdict("the same from Python, after the import", value, COMMAND_S, "s"))
        elif "rival" in row or row["what"].startswith("GGUF"):
            found.append(verdict("opening a 128k-vocabulary GGUF", spread(row["open_s"]).median, GGUF_S, "s"))
    gpu = data.get("gpu") or {}
    if gpu.get("status") == "measured":
        ratios = gpu["ratio"].items()
        found += [verdict(f"GPU scan from {kind} over its largest part", value, GPU_RATIO) for kind, value in ratios]
        found.append(verdict("GPU scan, host memory", gpu["host_mib"], GPU_HOST_MIB, "MiB"))
    return found


def report(data: dict[str, Any]) -> str:
    """Tables for the terminal."""
    lines = []
    for row in data.get("ratio", ()):
        wall = {name: spread(values).median for name, values in row["wall_s"].items()}
        cpu = {name: spread(values).median for name, values in row["cpu_s"].items()}
        lines.append(
            f"{row['checkpoint']}: scan {wall['scan']:.2f} s, folds {wall['folds']:.2f} s, ratio"
            f" {wall['scan'] / wall['folds']:.3f} (CPU time {cpu['scan'] / cpu['folds']:.3f})"
        )
    for row in data.get("memory", ()):
        how = f"{row['pairs']} pairs of each matrix" if row["pairs"] else "all pairs"
        lines.append(f"{row['gb']:.2f} GB, {how}: {row['extra_mib']:.0f} MiB above the imports, {row['wall_s']:.1f} s")
    for row in data.get("open", ()):
        inside = " ".join(
            f"{key[:-2]} {spread(row[key]).median:.3f} s" for key in ("open_s", "inspect_s", "with_forecast_s")
        )
        lines.append(
            f"{row['what']}, {row['tensors']} tensors: {inside}; command {spread(row['command_s']).median:.2f} s"
            f" (`import torch` alone {spread(row['import_torch_s']).median:.2f} s)"
            + (f"; {row['rival']} {row['rival_s'][0]:.1f} s" if "rival" in row else "")
        )
    if data.get("peers"):
        lines.append(scan_peers.table(data["peers"]))
    if data.get("gpu"):
        gpu = data["gpu"]
        lines.append(
            f"GPU: {gpu['status']}" + (f" ({gpu['reason']})" if "reason" in gpu else f", ratios {gpu['ratio']}")
        )
    lines += [
        f"{one['what']}: {one['value']:.3f} {one['unit']}, promised at most {one['bound']:g}: {one['verdict']}"
        for one in data["verdicts"]
    ]
    return "\n".join(lines)


def measure(work: Path, parts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for, one after the other, in the order of the list."""
    found: dict[str, Any] = {}

    def say(text: str) -> None:
        print(text, flush=True)

    if "ratio" in parts:
        found["ratio"] = []
        minilm = scan_parts.minilm()
        if minilm is None:
            say("MiniLM: not measured, its package is not installed")
        else:
            found["ratio"].append(scan_parts.race(minilm, "all-MiniLM-L6-v2 (float32)", options.rounds))
            say("MiniLM: done")
        folder = work / "ratio"
        write_checkpoint(folder, MODELS[options.model], shard_gb=0.15)
        found["ratio"].append(scan_parts.race(folder, f"{options.model} (bfloat16)", options.rounds))
        say(f"{options.model}: done")
    if "memory" in parts:
        found["memory"] = []
        sizes = sorted(options.sizes)
        for gb, pairs in [(sizes[0], None), *((gb, scan_parts.SAMPLE_PAIRS) for gb in sizes)]:
            found["memory"].append(scan_parts.measure_peak(work, gb, pairs))
            say(f"memory at {gb:g} GB: {found['memory'][-1]['extra_mib']:.0f} MiB")
            if pairs:
                for file in (work / f"series-{gb:g}").iterdir():
                    file.unlink()
    if "open" in parts:
        found["open"] = scan_parts.openings(work, options.rounds, slow=not options.quick)
        say("headers: done")
    if "peers" in parts:
        for name, seed in (("before", 0), ("after", 1)):
            write_checkpoint(work / name, MODELS[options.peers_model], seed=seed)
        field = scan_peers.field(work / "before", work / "after", options.peer_python)
        found["peers"] = scan_peers.race(field, min(options.rounds, 3), say)
        found["peers_model"] = options.peers_model
    if "gpu" in parts:
        found["gpu"] = scan_gpu.measure(options.gpu_folder or work, options.gpu_layers)
        say(f"GPU: {found['gpu']['status']}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge, write where asked; 1 if a promise is not kept, 2 if a gate failed."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__)
    made.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    made.add_argument("--rounds", type=int, default=3, help="samples of each (default 3)")
    made.add_argument("--sizes", type=lambda text: [float(x) for x in text.split(",")], default=list(SIZES), help="GB")
    made.add_argument("--model", choices=list(MODELS), default="llama-500m", help="of the ratio, beside MiniLM")
    made.add_argument("--peers-model", choices=list(MODELS), default=PEERS_MODEL)
    made.add_argument(
        "--peer-python", type=Path, help="interpreter of an environment with weightwatcher and the others"
    )
    made.add_argument("--quick", action="store_true", help="without the rival that takes half a minute to open a file")
    made.add_argument("--work", type=Path, help="where checkpoints are made (default: a temporary folder)")
    made.add_argument("--gpu-folder", type=Path, help="where the GPU's checkpoint is made and kept")
    made.add_argument("--gpu-layers", type=int, default=scan_gpu.LAYERS, help=f"(default {scan_gpu.LAYERS}, 34 GB)")
    made.add_argument("--out", type=Path, metavar="FILE", help="results file, JSON; default: none is written")
    made.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    made.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.peak:
        print(json.dumps(scan_parts.scan_peak(options.peak, options.pairs)))
        return 0
    if options.open:
        print(json.dumps(scan_parts.open_times(options.open, options.rounds)))
        return 0
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS) or options.rounds < 1:
        made.error(f"--parts needs some of {','.join(PARTS)}, and --rounds at least 1")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        try:
            found = measure(Path(work), parts, options)
        except ValueError as error:
            print(f"gate: {error}", file=sys.stderr)
            return 2
    data = {
        **machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.processor(),
        "versions": machine.versions() | scan_peers.versions(options.peer_python),
        "environment": machine.environment_facts(os.environ),
        "load_before": load,
        **found,
    }
    data["verdicts"] = verdicts(data)
    print(report(data))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(dump(data, PER_LINE))
    return int(any(one["verdict"] == "not met" for one in data["verdicts"]))


if __name__ == "__main__":
    cleaned = machine.without_pins(os.environ)
    if cleaned is not None:  # read when libraries are loaded
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.scan", *sys.argv[1:]], cleaned)
    sys.exit(main())

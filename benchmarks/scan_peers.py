"""Other tools on the same files, each run whole in a fresh process: seconds, CPU seconds, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.timing import spread, turns

LIMIT_S = 150.0
ONCE_S = 8.0  # what takes longer runs once
AGREE = 1e-4  # naive float32 against ours
PACKAGES = ("weightwatcher", "weightlens", "modeldelta")


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes:
        name: as in the table.
        task: "scan" or "diff": rows of one task are compared.
        command: interpreter or program and arguments; None with a reason where it cannot run.
        reason: why there is no command.
        computes: what it finds out.
    """

    name: str
    task: str
    command: Sequence[str] | None
    computes: str
    reason: str = ""


def field(before: Path, after: Path, peer_python: Path | None) -> list[Peer]:
    """Ours, plain torch, and the packages of another environment."""
    file = str(before / "model.safetensors")
    own = [sys.executable, "-m"]
    tools = None if peer_python is None else peer_python.parent

    def tool(name: str, *arguments: str) -> Sequence[str] | None:
        if tools is None:
            return None
        found = tools / name
        return [str(found), *arguments] if found.exists() else None

    why = "no --peer-python was given" if tools is None else "not installed beside that interpreter"
    watcher = None if peer_python is None else [str(peer_python), "-m", "benchmarks.scan_peers", "weightwatcher"]
    return [
        Peer("orthofast scan", "scan", [*own, "orthofast", "scan", str(before), "--json"], "PII of rows and columns"),
        Peer("naive torch", "scan", [*own, "benchmarks.scan_peers", "naive", str(before)], "the same"),
        Peer("weightlens", "scan", tool("lens", "analyze", file), "means, spreads, spikes", why),
        Peer("weightwatcher", "scan", watcher and [*watcher, str(before)], "spectra, power laws", why),
        Peer(
            "orthofast diff", "diff", [*own, "orthofast", "diff", str(before), str(after), "--json"],
            "PII of both, drift of all angles, relative change",
        ),
        Peer(
            "modeldelta", "diff", tool("modeldelta", str(before), str(after), "-q"), "norm, cosine, SVD of the change",
            why,
        ),
    ]  # fmt: skip


def run_once(command: Sequence[str]) -> dict[str, Any]:
    """One process: wall and CPU seconds, peak MiB, what it printed; or why it failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as home:
        started, peak = time.perf_counter(), 0.0
        process = subprocess.Popen(command, cwd=home, stdout=out, stderr=errors, env=environment)
        while True:  # wait4 alone tells the CPU time of this one child
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - started > LIMIT_S:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                return {"status": "left out", "reason": f"did not finish within {LIMIT_S:.0f} s"}
            peak = max(peak, high_water_mib(process.pid))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        text, said = out.read().decode(errors="replace"), errors.read().decode(errors="replace").strip()
    if process.returncode:
        lines = said.splitlines() or text.strip().splitlines() or ["no message"]
        return {"status": "failed", "reason": f"exit code {process.returncode}: {lines[-1][:200]}"}
    return {"status": "timed", "wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": peak, "output": text}


def high_water_mib(pid: int) -> float:
    """Largest resident memory of a live process so far; its ``ru_maxrss`` would start with its parent's."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def race(peers: Sequence[Peer], rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """All tools in turns; the slow ones once. Ours and plain torch must agree.

    Raises:
        ValueError: if they do not.
    """
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, str] = {}
    for peer in peers:
        rows[peer.name] = {
            "tool": peer.name, "task": peer.task, "computes": peer.computes, "status": "left out",
            "reason": peer.reason, "wall_s": [], "cpu_s": [], "peak_mib": [],
        }  # fmt: skip
    live = {peer.name: peer for peer in peers if peer.command is not None}
    for number in range(rounds):
        for name in turns(list(live), number):
            peer, row = live[name], rows[name]
            if row["status"] == "failed" or (row["wall_s"] and row["wall_s"][0] > ONCE_S):
                continue
            assert peer.command is not None
            found = run_once(peer.command)
            row["status"], row["reason"] = found["status"], found.get("reason", "")
            if found["status"] != "timed":
                say(f"  {name}: {found['status']}: {found['reason']}")
                continue
            for key in ("wall_s", "cpu_s", "peak_mib"):
                row[key].append(found[key])
            outputs[name] = found["output"]
            say(f"  {name}: {found['wall_s']:.1f} s")
    if {"orthofast scan", "naive torch"} <= outputs.keys():
        compare(outputs["orthofast scan"], outputs["naive torch"])
    return list(rows.values())


def compare(ours: str, theirs: str) -> None:
    """The two sets of PII agree.

    Raises:
        ValueError: if a value or a name differs.
    """
    found = {f"{row['name']} {row['vectors']}": row["pii"] for row in json.loads(ours)["rows"]}
    truth: dict[str, float] = json.loads(theirs)
    if set(found) != set(truth):
        raise ValueError(f"the scan has {len(found)} rows, plain torch {len(truth)}")
    for name, value in truth.items():
        if not abs(found[name] - value) <= AGREE * abs(value) + 1e-6:
            raise ValueError(f"{name}: {found[name]} by the scan, {value} by plain torch")


def naive(folder: Path) -> dict[str, float]:
    """PII of all matrices of plain safetensors files the way it is written first."""
    import torch
    from safetensors import safe_open

    def pii(vectors: torch.Tensor) -> float:
        vectors = vectors[vectors.norm(dim=1) > 0]
        units = torch.nn.functional.normalize(vectors, dim=1)
        cosines = (units @ units.T).abs()
        n = len(cosines)
        return float(cosines.fill_diagonal_(0).sum(dtype=torch.float64) / (n * (n - 1)))

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                weight = tensors.get_tensor(name)
                if weight.dim() == 2:
                    found[f"{name} rows"] = pii(weight.float())
                    found[f"{name} cols"] = pii(weight.float().T)
    return found


def versions(peer_python: Path | None) -> dict[str, str | None]:
    """Of the packages in the other environment."""
    if peer_python is None:
        return dict.fromkeys(PACKAGES)
    code = "import sys; from importlib.metadata import version\nfor name in sys.argv[1:]: print(version(name))"
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        done = subprocess.run([str(peer_python), "-c", code, name], capture_output=True, text=True, check=False)
        found[name] = done.stdout.strip() or None
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, and how many times our time each takes."""
    lines = [f"{'':<16}{'wall s':>9}{'cpu s':>9}{'peak MiB':>10}{'over ours':>11}  computes"]
    ours = {
        row["task"]: spread(row["wall_s"]).median
        for row in rows
        if row["tool"].startswith("orthofast") and row["wall_s"]
    }
    for row in rows:
        if not row["wall_s"]:
            lines.append(f"{row['tool']:<16}{row['status']}: {row['reason']}")
            continue
        wall, cpu, peak = (spread(row[key]).median for key in ("wall_s", "cpu_s", "peak_mib"))
        over = f"{wall / ours[row['task']]:.1f}x" if row["task"] in ours else ""
        lines.append(f"{row['tool']:<16}{wall:>9.2f}{cpu:>9.2f}{peak:>10.0f}{over:>11}  {row['computes']}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """One contestant that is no command of its own, in this process."""
    name, folder = arguments[0], Path(arguments[1])
    if name == "naive":
        print(json.dumps(naive(folder)))
        return 0
    import weightwatcher  # type: ignore[import-not-found]

    details = weightwatcher.WeightWatcher().analyze(model=str(folder))
    if not len(details):
        raise SystemExit("weightwatcher found no layer")
    print(f"{len(details)} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The blocks of a GPU run: ceilings, tests, single matrices, the embedding; each within its share of the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import GpuCase, embedding_case, gaussian, speed_cases
from benchmarks.gpu_device import Device
from benchmarks.gpu_journal import OUT_OF_TIME, Journal
from benchmarks.gpu_peers import backends, block_rows, default_backend, field
from benchmarks.gpu_race import MatrixContest, race
from benchmarks.machine import ROOT
from benchmarks.race import LEFT_OUT

COPY_BYTES = 2 << 30
REHEARSAL = "ORTHOFAST_GPU_REHEARSAL"  # tests/gpu then run on the CPU, as far as they can
DRY_TESTS = "b2-n33"  # a few tests of every backend
COLD_REPEATS = 3
COLD_SIZE = 4096


@dataclass(slots=True)
class Context:
    """What a block is given: the device, where to write, when to stop."""

    device: Device
    journal: Journal
    allowance_s: float
    started_s: float

    @property
    def left_s(self) -> float:
        """Seconds of this block's share that remain."""
        return max(0.0, self.allowance_s - (time.perf_counter() - self.started_s))

    @property
    def dry(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device.dry


def ceilings(context: Context) -> None:
    """Bytes a second of a device-to-device copy, read plus written, before anything else has warmed the card."""
    size = 1 << 16 if context.dry else COPY_BYTES
    source = gaussian((size // 2,), "bfloat16", 0, context.device.torch_device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [context.device.device_ms(lambda _n: target.copy_(source), 5, 1e-5) for _ in range(9)]
    rates = [2 * size / (ms * 1e-3) / 1e9 for ms in taken]
    context.journal.row("ceilings", {"what": "copy", "bytes": size, "gb_per_s": rates})


def check(context: Context) -> None:
    """The tests that need a device, in a process of their own; every outcome is a row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes.jsonl"
        command = [
            *(sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "benchmarks.gpu_outcomes"),
            # warnings of another version of torch are no failures of ours
            *("-W", "default", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"),
        ]
        # they are no part of a run that xdist may have split
        outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
        environment = {"ORTHOFAST_SANITIZER_S": "60", **outside, "ORTHOFAST_GPU_OUTCOMES": str(report)}
        if context.dry:
            environment[REHEARSAL] = "1"
            command += ["-k", DRY_TESTS]
        elif (os.cpu_count() or 1) >= 8 and _has("xdist"):
            command += ["-n", "6"]  # most of the time is spent compiling
        started = time.perf_counter()
        code, output = run_whole(command, environment, context.allowance_s)
        lines = report.read_text().splitlines() if report.exists() else []
    for line in lines:
        context.journal.row("checks", json.loads(line))
    context.journal.row(
        "check_runs",
        {"exit_code": code, "wall_s": time.perf_counter() - started, "tail": output[-4000:] if code else ""},
    )


def run_whole(command: list[str], environment: dict[str, str], allowance_s: float) -> tuple[int, str]:
    """Exit code or OUT_OF_TIME, and output. It ends with all it started: none may disturb later blocks."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output = process.communicate(timeout=allowance_s)[0]
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return OUT_OF_TIME, f"{process.communicate()[0]}\nstopped after {allowance_s:.0f} s"


def speed(context: Context) -> None:
    """Every promised matrix, all contestants in turns."""
    _race_all(context, speed_cases(dry=context.dry))


def embedding(context: Context) -> None:
    """The vocabulary: time and extra memory."""
    _race_all(context, (embedding_case(dry=context.dry),))


def _race_all(context: Context, cases: tuple[GpuCase, ...]) -> None:
    contestants = field(context.device.torch_device)
    coming = [case for case in cases if _label(case) not in context.journal.done]
    for place, case in enumerate(coming):
        # a share by work, with a floor for what every case costs alike
        weights = [_weight(each) for each in coming[place:]]
        allowance = context.left_s * weights[0] / sum(weights)
        if context.left_s <= 0:
            context.journal.row("left_out", {"place": case.place, "reason": "left out to keep the run within its time"})
            continue
        contest = MatrixContest(case, context.device, block_rows)
        for measured in race(contest, contestants, context.device, allowance, context.journal):
            context.journal.row("measurements", measured.as_dict())
        context.journal.row(
            "defaults", {"place": case.place, "backend": default_backend(case, context.device.torch_device)}
        )
        context.journal.case_done(_label(case))


def _label(case: GpuCase) -> str:
    return " ".join(case.place)


def _weight(case: GpuCase) -> float:
    return (3.0 if case.whole_field else 1.0) * (2.0 + case.flops / 1.5e12)


def cold(context: Context) -> None:
    """First calls in fresh processes whose compilers find nothing cached, backend by backend and as a user calls."""
    device = context.device.torch_device
    calls = (("rows", "bfloat16"), ("cols", "bfloat16"), ("rows", "float32"))
    for side, dtype in calls[: 1 if context.dry else None]:
        for backend in ("", *(name for name in backends() if name != "reference")):
            taken: list[float] = []
            reason = context.journal.refusal(backend) or ""
            size = 32 if context.dry else COLD_SIZE
            for _ in range(1 if context.dry else COLD_REPEATS):
                if reason or context.left_s <= 0:
                    break
                found = _cold_once(backend, side, dtype, str(device), size)
                reason = found.get("reason", "")
                taken += [found["first_call_s"]] if "first_call_s" in found else []
            context.journal.row(
                "cold",
                {
                    "shape": f"{size}x{size}", "dtype": dtype, "side": side, "backend": backend or "default",
                    "first_call_s": taken,
                    "status": "timed" if taken else LEFT_OUT, "reason": "" if taken else reason or "no time was left",
                },
            )  # fmt: skip


_COLD = """
import json, sys, time
import torch
backend, side, dtype, device, size = sys.argv[1:]
w = torch.randn(int(size), int(size), device=device).to(getattr(torch, dtype))
w = w.T if side == "cols" else w
float(w[0, 0])
start = time.perf_counter()
import orthofast
from orthofast.errors import OrthofastError
try:
    value = float(orthofast.pii(w, backend=backend or None))
except OrthofastError as error:
    print(json.dumps({"reason": str(error)}))
else:
    print(json.dumps({"first_call_s": time.perf_counter() - start, "value": value}))
"""


def _cold_once(backend: str, side: str, dtype: str, device: str, size: int) -> dict[str, Any]:
    """Seconds of ``import orthofast`` and the first value, on a device that is already awake."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "NUMBA_CACHE_DIR": cache, "CUDA_CACHE_DISABLE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _COLD, backend, side, dtype, device, str(size)],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=True,
            )  # fmt: skip
            found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.CalledProcessError as error:
            return {"reason": (error.stderr.strip().splitlines() or ["no message"])[-1][:240]}
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            return {"reason": f"{type(error).__name__}: no figure came back"}
    return found


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def all_blocks() -> Mapping[str, tuple[float, Callable[[Context], None]]]:
    """Name -> weight of its share of the time, and what it does; in the order they are run."""
    from benchmarks import gpu_models

    return {
        "ceilings": (6, ceilings),
        "check": (130, check),
        "speed": (170, speed),
        "model": (30, gpu_models.model),
        "filters": (20, gpu_models.filters),
        "embedding": (30, embedding),
        "gradient": (35, gpu_models.gradient),
        "cold": (60, cold),
        "drift": (15, gpu_models.drift),
    }

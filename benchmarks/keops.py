"""KeOps as a rival, in a process of its own: its compiler may not come back in time, and cannot be interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

SHAPES = frozenset(("64x576", "512x512"))
ROOT = Path(__file__).resolve().parent.parent


def refuses(case: Case) -> str | None:
    """Why KeOps is not run on this case, or None."""
    if not find_spec("pykeops"):
        return "pykeops is not installed"
    if case.dtype != "float32":
        return "KeOps has no bfloat16 on CPUs"
    if case.shape not in SHAPES:
        return "timed at 64x576 and 512x512 only: far slower than naive torch there, and compiling takes longer with d"
    return None


def measure(case: Case, threads: int, cap_s: float, samples: int = 5) -> dict[str, Any]:
    """Compile and time KeOps on one case within ``cap_s`` seconds, in a fresh process with so many threads.

    Returns:
        ``status`` ("timed", "left out" or "failed"), ``reason``, and when timed ``wall_s``, ``cpu_s``,
        ``first_call_s``, ``value`` and ``expected``.
    """
    reason = refuses(case)
    if reason is not None:
        return {"status": "left out", "reason": reason}
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    command = [sys.executable, "-m", "benchmarks.keops", str(case.n), str(case.d), str(threads), str(samples)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=cap_s, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"status": "left out", "reason": f"did not finish within {cap_s:.0f} s (compiling included)"}
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return {"status": "failed", "reason": detail.strip().splitlines()[-1][:200]}
    return {"status": "timed", "reason": "in a process of its own", **found}


def main(arguments: Sequence[str]) -> int:
    """Time one case in this process and print it as one line of JSON."""
    import torch
    from pykeops.torch import LazyTensor  # type: ignore[import-untyped]

    from benchmarks.cases import draw
    from benchmarks.gate import expected_pii
    from benchmarks.timing import calls_for, sample

    n, d, threads, samples = (int(argument) for argument in arguments)
    torch.set_num_threads(threads)
    case = Case(n, d, "float32")

    def value(vectors: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(vectors, dim=1)
        rows = (LazyTensor(unit[:, None, :]) | LazyTensor(unit[None, :, :])).abs().sum(1)
        mean: torch.Tensor = (rows.sum() - n) / (n * (n - 1))  # the diagonal is n ones
        return mean

    first = draw(case, 0)
    first_call_s, _, result = sample(lambda: value(first), 1)
    call_s, _, _ = sample(lambda: value(first), 1)
    calls = calls_for(call_s)
    wall, cpu = [], []
    for seed in range(samples):
        vectors = draw(case, seed)
        wall_s, cpu_s, _ = sample(lambda vectors=vectors: value(vectors), calls)  # type: ignore[misc]
        wall.append(wall_s)
        cpu.append(cpu_s / threads)
    found = {
        "wall_s": wall,
        "cpu_s": cpu,
        "calls": calls,
        "first_call_s": first_call_s,
        "value": float(result),  # type: ignore[arg-type]
        "expected": expected_pii(first),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

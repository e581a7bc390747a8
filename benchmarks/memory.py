"""Peak memory above the input, one fresh process for each measurement.

The process loads the library, draws the input, runs the contestant once on a tiny matrix (thread pools, lazy imports),
resets the kernel's high-water mark of resident memory (``/proc/self/clear_refs``), makes one call, and reads the mark
again: extra memory is the mark after the call less resident memory before it. Where the mark cannot be reset,
``ru_maxrss`` after less before is reported: it misses what hides below an earlier peak. (``ru_maxrss`` is not the first
choice because a child inherits its parent's.)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
TINY = Case(64, 64, "float32")
TIMEOUT_S = 400.0


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def high_water_bytes() -> int:
    """Largest resident memory since the mark was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def reset_high_water() -> bool:
    """Set the mark to the resident memory of now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return high_water_bytes() - resident_bytes() < 8 << 20
    except (OSError, ValueError, IndexError):
        return False


def peak_of(call: Any) -> tuple[int, str]:
    """Extra bytes one call needed at its peak, and by which method they were read."""
    if reset_high_water():
        before = resident_bytes()
        call()
        return max(0, high_water_bytes() - before), "VmHWM"
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before, "ru_maxrss"


def measure(case: Case, contestant: str, threads: int, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run one contestant on one case in a fresh process; ``extra_mib`` is its peak above the input."""
    facts: dict[str, Any] = {
        "shape": case.shape, "n": case.n, "d": case.d, "dtype": case.dtype, "threads": threads,
        "contestant": contestant,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        contestant,
        str(case.n),
        str(case.d),
        case.dtype,
        str(threads),
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=True)
        return {**facts, **json.loads(done.stdout.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        return {**facts, "status": "left out", "reason": f"did not finish within {timeout_s:.0f} s"}
    except subprocess.CalledProcessError as error:
        detail = (error.stderr or "").strip().splitlines()
        ended = f"killed by signal {-error.returncode}" if error.returncode < 0 else f"exit code {error.returncode}"
        return {**facts, "status": "failed", "reason": detail[-1][:200] if detail else f"{ended}, no message"}
    except (ValueError, IndexError):
        return {**facts, "status": "failed", "reason": "no measurement in its output"}


def wanted(cases: Sequence[Case]) -> list[tuple[Case, str]]:
    """Which contestants are measured where: naive and ours everywhere, the others where memory is a question."""
    pairs: list[tuple[Case, str]] = []
    for case in cases:
        largest = case.shape == "32000x4096"
        if case.dtype == "float32":
            names = ["naive", "native_cpu", "native_cpu@high"]
            if not largest:
                names += ["numba_cpu", "reference"]
            if case.shape in ("4096x4096", "30522x384"):
                names += ["naive_inplace", "torchmetrics", "sklearn"]
        else:
            names = ["native_cpu"] if largest else ["naive", "native_cpu"]
            if case.n >= 4096 and not largest:
                names += ["numba_cpu", "reference"]
        pairs += [(case, name) for name in names]
    return pairs


def main(arguments: Sequence[str]) -> int:
    """Measure in this process and print one line of JSON."""
    import torch

    from benchmarks.cases import draw
    from benchmarks.peers import field

    name, n, d, dtype, threads = arguments[0], int(arguments[1]), int(arguments[2]), arguments[3], int(arguments[4])
    torch.set_num_threads(threads)
    case = Case(n, d, dtype)
    contestant = next((c for c in field() if c.name == name), None)
    if contestant is None:
        raise SystemExit(f"no contestant {name!r}; there are {', '.join(c.name for c in field())}")
    reason = contestant.refuses(case)
    if reason is not None:
        print(json.dumps({"status": "left out", "reason": reason}))
        return 0
    vectors = draw(case, 0)
    with contestant.around(threads):
        contestant.bind(draw(Case(TINY.n, TINY.d, dtype), 0))()
        call = contestant.bind(vectors)
        extra, method = peak_of(call)
    input_mib = vectors.numel() * vectors.element_size() / 2**20
    print(json.dumps({"status": "measured", "method": method, "extra_mib": extra / 2**20, "input_mib": input_mib}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

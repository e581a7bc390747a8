"""The machine and the software a result belongs to: processor, caches, versions, commit, environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLAGS = (
    *(
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "avx512_vnni",
        "avx512_fp16",
        "amx_bf16",
        "amx_tile",
    ),
    *("asimd", "bf16", "sve", "i8mm"),
)
PACKAGES = ("torch", "numpy", "numba", "scikit-learn", "torchmetrics", "pykeops", "threadpoolctl")
# variables that hold a library back, or choose for us: removed before any of them is loaded
PINS = (
    *("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE"),
    *("MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("ATEN_CPU_CAPABILITY", "ORTHOFAST_BACKEND"),
)
KEPT = re.compile(r"^(OPENBLAS|MKL|OMP|GOMP|KMP|NUMBA|ONEDNN|DNNL|ATEN|ORTHOFAST)_")
UNSET = "ORTHOFAST_BENCH_UNSET"  # what a cleaned process was started without, "NAME=value" a line


def without_pins(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment without the variables that pin a library, or None if none is set."""
    pins = {name: environment[name] for name in PINS if name in environment}
    if not pins:
        return None
    kept = {name: value for name, value in environment.items() if name not in pins}
    kept[UNSET] = "\n".join(f"{name}={value}" for name, value in pins.items())
    return kept


def environment_facts(environment: Mapping[str, str]) -> dict[str, object]:
    """Which variables were taken away before the run, and which of their kind are still set."""
    unset = dict(line.split("=", 1) for line in environment.get(UNSET, "").splitlines() if "=" in line)
    kept = {name: value for name, value in sorted(environment.items()) if KEPT.match(name) and name != UNSET}
    # values could be paths of one machine; their names are enough
    return {"unset": unset, "set": {name: value if "/" not in value else "(a path)" for name, value in kept.items()}}


def processor() -> dict[str, object]:
    """Model, family, cores, flags that matter and caches, from /proc and /sys where they exist."""
    text = _text(Path("/proc/cpuinfo"))
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip()
    }
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _text(index / "type"), _text(index / "level")
        if kind in ("Data", "Unified"):
            caches[f"L{level}"] = _text(index / "size")
    family, model = fields.get("cpu family"), fields.get("model")
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "family": int(family) if family and family.isdigit() else None,
        "model_number": int(model) if model and model.isdigit() else None,
        "name": microarchitecture(fields.get("vendor_id", ""), family, model),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "flags": [flag for flag in FLAGS if flag in present],
        "caches": caches,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in present,
    }


def microarchitecture(vendor: str, family: str | None, model: str | None) -> str | None:
    """The name of the AMD core behind a family and model number; None where it is not known for certain."""
    if vendor != "AuthenticAMD" or not family or not model:
        return None
    number = int(model)
    if family == "26":
        return "Zen 5"
    if family == "25":
        return "Zen 4" if 0x10 <= number <= 0x1F or 0x60 <= number <= 0x7F or 0xA0 <= number <= 0xAF else "Zen 3"
    return None


def slug(facts: Mapping[str, object]) -> str:
    """A folder name from the processor and its cores: no host name."""
    model = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", " ", str(facts["model"]).lower())
    words = [word for word in re.split(r"[^a-z0-9]+", model) if word]
    if facts.get("family") is not None and facts.get("model_number") is not None:
        words.append(f"f{facts['family']}m{facts['model_number']}")
    return "-".join([*words, f"{facts['cores']}c"])


def versions() -> dict[str, str | None]:
    """Versions of everything that takes part; None for what is not installed."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def version(package: str) -> str | None:
    """Version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, object]:
    """The commit the code is at, and whether files differ from it (results themselves do not count)."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

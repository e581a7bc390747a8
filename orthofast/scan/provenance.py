"""Run a plan into a result and record where its numbers come from: versions, machine, files, settings, seconds."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from datetime import UTC, datetime

import numpy
import torch

from orthofast.scan.pipeline import Progress, run
from orthofast.scan.plan import Plan, layer_order, natural
from orthofast.scan.result import Row, ScanResult, Skipped
from orthofast.scan.roles import ROLES


def measure(
    plan: Plan, *, precision: str = "auto", backend: str | None = None, progress: Progress | None = None
) -> ScanResult:
    """Run a plan, order its rows and add the provenance; arguments and errors as in ``pipeline.run``."""
    started = time.perf_counter()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    outcome = run(plan, precision=precision, backend=backend, progress=progress)
    catalog = plan.catalog
    provenance: dict[str, object] = {
        "checkpoint": catalog.root.absolute().name or str(catalog.root),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": {
            "machine": platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "backends": sorted(outcome.backends),
        "files": [{"name": file.name, "nbytes": size} for file, size in catalog.files.items()],
        "config": {"model_type": catalog.config.get("model_type"), "sha256": catalog.config_digest},
        "precision": precision,
        "vectors": list(plan.sides),
        "notes": list(catalog.notes),
        "timings": {"read_s": outcome.read_s, "fold_s": outcome.fold_s, "total_s": time.perf_counter() - started},
        "date": date,
    }
    rows = sorted(outcome.rows, key=_order)
    return ScanResult(rows, [Skipped(name, reason) for name, reason in plan.skipped], provenance)


def versions() -> dict[str, str]:
    """Versions of orthofast, torch, numpy and Python."""
    return {
        "orthofast": own_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def own_version() -> str:
    """The installed version, or "0+source" when run from a folder that was never installed."""
    try:
        return importlib.metadata.version("orthofast")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


def _order(row: Row) -> tuple[object, ...]:
    """Layers first, top to bottom, then what lies outside; the same every time."""
    role = ROLES.index(row.role) if row.role in ROLES else len(ROLES)
    return row.layer is None, layer_order(row.layer or ""), role, natural(row.name), row.vectors != "rows"

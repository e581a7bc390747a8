"""A pytest plugin: one JSON line for each test, in the file that ORTHOFAST_GPU_OUTCOMES names."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "ORTHOFAST_GPU_OUTCOMES"


def _write(report: Any, outcome: str, reason: str) -> None:
    line = {"test": report.nodeid, "outcome": outcome, "reason": reason[:400], "wall_s": round(report.duration, 3)}
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    """A line when a test is decided: failed in any phase, skipped, or passed."""
    # workers of xdist load plugins too; their reports reach the one that started them
    if VARIABLE not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.failed:
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or str(report.longrepr)
        _write(report, "failed", crash.splitlines()[0] if crash else report.when)
    elif report.skipped and report.when in ("setup", "call"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _write(report, "skipped", why)
    elif report.when == "call":
        _write(report, "passed", "")

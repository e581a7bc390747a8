"""The kernels compiled for every target by two processes side by side, once for all tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.aot.compiling import TARGETS, WHOLE

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 600
Figures = dict[str, dict[str, dict[str, Any]]]
SHARES = ((WHOLE,), tuple(target for target in TARGETS if target != WHOLE))  # each about half of the work


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Target -> variant -> figures."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("aot")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder / "cache")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.aot.compiling", *share],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for share in SHARES
    ]  # fmt: skip
    found: Figures = {}
    try:
        for process in running:
            output, errors = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, errors[-3000:]
            found.update(json.loads(output))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return found

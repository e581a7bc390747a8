"""compute-sanitizer finds nothing in small runs of each kernel, and does find a planted bad write."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = [name for name in dispatch.ORDER.get("cuda", dispatch.ANY_DEVICE) if name != "reference"]
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMEOUT_S = int(os.environ.get("ORTHOFAST_SANITIZER_S", "240"))  # of one tool on one backend

# ragged on purpose: beyond the edge of a tile lies memory of somebody else
RUN = """
import sys
import torch
from orthofast.kernels import gram_stats, gram_stats_many
from orthofast.kernels.contract import make_request
from orthofast.kernels import dispatch
backend = sys.argv[1]
generator = torch.Generator("cuda").manual_seed(0)
def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)
calls = 0
every = ("abs_sum", "sq_sum", "sum", "abs_max", "row_abs")
inputs = [draw(130, 72), draw(72, 130).T, draw(3, 70, 40), draw(131, 73)[1:, 1:], draw(70, 40, dtype=torch.float32)]
for x in inputs:
    for want in (("abs_sum",), every):
        if dispatch.load(backend).supports(make_request(x, want=want)) is None:
            gram_stats(x, want=want, backend=backend)
            calls += 1
gram_stats_many([draw(130, 72), draw(64, 72), draw(1, 72)], backend=backend)
gram_stats(draw(130, 72), draw(70, 72), want=every, backend=backend)
torch.cuda.synchronize()
print("calls", calls)
"""
PLANTED = """
import torch, triton, triton.language as tl
@triton.jit
def gram_out_of_bounds(p):
    tl.store(p + 1024 + tl.arange(0, 1024), 1.0)
x = torch.empty(1024, device="cuda")
gram_out_of_bounds[(1,)](x)
torch.cuda.synchronize()
"""


def sanitizer() -> str:
    for place in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if place and Path(place).exists():
            return place
    pytest.skip("compute-sanitizer is not installed")


def sanitized(tool: str, script: Path, *arguments: str) -> tuple[int, str]:
    """Exit code, 9 where something was found, and the report; skips where the tool cannot reach the device."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else a tensor's end is not the end of its memory
    }
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    try:
        done = subprocess.run(
            [*command, sys.executable, str(script), *arguments],
            env=environment, cwd=script.parent, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} did not finish within {TIMEOUT_S} s")
    text = done.stdout + done.stderr
    if re.search(r"Device not supported|not supported on this (system|device)|Unable to find", text):
        pytest.skip(f"{tool} cannot be used on this system: {text.strip().splitlines()[0][:160]}")
    return done.returncode, text


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_run_is_clean(cuda: torch.device, backend: str, tool: str, tmp_path: Path) -> None:
    reason = dispatch.load(backend).supports(make_request(torch.ones(8, 8, dtype=torch.bfloat16, device=cuda)))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    code, text = sanitized(tool, script, backend)
    assert code == 0, text[-3000:]
    assert re.search(r"calls [1-9]", text), text[-3000:]


def test_a_planted_write_beyond_the_end_is_found(cuda: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    code, text = sanitized("memcheck", script)
    assert code != 0, text[-2000:]
    assert "Invalid __global__ write" in text

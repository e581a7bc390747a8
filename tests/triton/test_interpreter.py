"""The Triton backend in the interpreter, in a process of its own: the oracle suite and what is particular to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request

ROOT = Path(__file__).parents[2]
# each claim once or twice: a tile step takes milliseconds in the interpreter
ORACLE = (
    "triton_gpu and ("
    "b1-n2-d7-f32 or b1-n49-d33 or b5-n2-d96 or b3-n48 or b1-n50-d64 or b1-n50-d97-f32 or b1-n97-d0 "
    "or b1-n63-d100-bf16 or b1-n63-d100-f16 or b2-n50-d257-f32-cols or b1-n63-d100-e4m3fn-rows "
    "or b1-n63-d100-e5m2-cols or b2-n40-m51-d65-bf16 or b1-n96-m97 or b1-n5-m0 "
    "or nothing_wanted or zero_vectors_of or high_precision_recomputes or high_precision_decides)"
)
SPECIAL = (
    "triton_gpu and (simplex or (left_out and 4-f32) or (both_sides) or (bad_values and f32) or poison_a_cross "
    "or lone or (extreme and 2-) or huge_and_tiny or smallest or (first_of_equal and 97) or all_cosines or empty)"
)


@pytest.mark.parametrize(
    ("files", "selection"),
    [
        (["tests/triton/interpreted_folds.py"], ""),
        (["tests/kernels/test_oracle.py"], ORACLE),
        (["tests/kernels/test_special_values.py"], SPECIAL),
    ],
    ids=["own", "oracle", "special-values"],
)
def test_in_the_interpreter(files: list[str], selection: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed; the test extra brings it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ORTHOFAST_REQUIRE": "triton_gpu", "OMP_NUM_THREADS": "1"}
    environment.pop(dispatch.ENVIRONMENT, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter serves CPU tensors")
def test_a_cpu_tensor_is_refused_in_one_sentence() -> None:
    reason = dispatch.load("triton_gpu").supports(make_request(torch.ones(3, 3)))
    assert reason is not None
    assert "CUDA" in reason
    assert "\n" not in reason

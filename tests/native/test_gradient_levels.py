"""Gradients are right on every instruction set of the native module, with the same bits for any number of threads."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request
from tests.conftest import skip_or_fail

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")

# runs in a process of its own: the level is fixed when the module is loaded
GRADIENTS = """
import torch
from orthofast import _cpu
from orthofast.kernels.autograd import pair_mean
from orthofast.kernels.gradients import Curve
from tests.kernels.cases import Case
from tests.kernels.test_gradient import check

cases = [
    *(Case(n, 33) for n in (2, 9, 24, 25, 47, 49, 97, 289, 600)),
    *(Case(50, d) for d in (1, 15, 17, 257)),
    Case(97, 130, torch.float64, b=2), Case(300, 40, m=97), Case(40, 25, torch.float64, m=51),
]
for case in cases:
    for curve in (Curve(), Curve("huber", 0.1)):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(lambda x, y, curve: pair_mean(x, y, curve, backend="native_cpu"), case.x(), case.y(), curve)
            x = case.x().requires_grad_()
            pair_mean(x, case.y(), curve, backend="native_cpu").sum().backward()
            found.append(x.grad.numpy().tobytes())
        assert found[0] == found[1], str(case)
print(_cpu.isa(), len(cases))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_every_level(level: str) -> None:
    reason = dispatch.load("native_cpu").supports(make_request(torch.ones(2, 2)))
    if reason is not None:
        skip_or_fail("native_cpu", reason)
    native = importlib.import_module("orthofast._cpu")
    if level not in native.isa_levels():
        pytest.skip(f"this processor or build has no {level}; it has {', '.join(native.isa_levels())}")
    done = subprocess.run(
        [sys.executable, "-c", GRADIENTS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ORTHOFAST_ISA": level},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level, "16"]

"""Every instruction set of the native module gives right numbers, and can be chosen by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request
from tests.conftest import skip_or_fail

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")

# runs in a process of its own: the level is fixed when the module is loaded
FOLD = """
import sys
import torch
from orthofast import _cpu
from orthofast.kernels import gram_stats
from tests.kernels.cases import ALL, Case, assert_record, same_bits

cases = [
    *(Case(n, 33) for n in (1, 2, 12, 24, 25, 47, 49, 97, 385)),
    *(Case(50, d) for d in (1, 15, 17, 255, 257, 513)),
    *(Case(60, 100, dtype, layout) for layout in ("rows", "cols", "strided") for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)),
    Case(40, 65, m=51), Case(40, 65, torch.bfloat16, "cols", 2, m=51),
]
for case in cases:
    x, y = case.x(), case.y()
    records = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        records.append(gram_stats(x, y, want=ALL, bins=16, backend="native_cpu"))
        assert_record(records[-1], x, y, bins=16)
    assert same_bits(*records), str(case)
    wide = gram_stats(x, y, want=ALL, precision="float64", backend="native_cpu")
    assert_record(wide, x, y, precision="float64")
x = Case(97, 600).x()
exact, high = (gram_stats(x, precision=p, backend="native_cpu") for p in ("highest", "high"))
assert abs(high.abs_sum / exact.abs_sum - 1) < 1e-4
print(_cpu.isa(), len(cases))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def native() -> ModuleType:
    reason = dispatch.load("native_cpu").supports(make_request(torch.ones(2, 2)))
    if reason is not None:
        skip_or_fail("native_cpu", reason)
    return importlib.import_module("orthofast._cpu")


@pytest.mark.parametrize("level", LEVELS)
def test_level_gives_right_numbers(native: ModuleType, level: str) -> None:
    available = native.isa_levels()
    if level not in available:
        pytest.skip(f"this machine offers {', '.join(available)}")
    done = run(FOLD, ORTHOFAST_ISA=level)
    assert done.returncode == 0, done.stderr
    name, cases = done.stdout.split()
    assert name == level
    assert int(cases) > 40


def test_levels_are_known_and_the_portable_one_is_always_there(native: ModuleType) -> None:
    available = native.isa_levels()
    assert "portable" in available
    assert set(available) <= set(LEVELS) | {"neon"}
    assert len(set(available)) == len(available)


def test_the_best_level_is_in_force_unless_one_is_named(native: ModuleType) -> None:
    done = run("import orthofast.kernels.native_cpu; from orthofast import _cpu; print(_cpu.isa())", ORTHOFAST_ISA="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == max(native.isa_levels(), key=[*LEVELS, "neon"].index)


def test_unknown_level_is_refused_by_a_clear_sentence(native: ModuleType) -> None:
    code = "import torch; from orthofast.kernels import gram_stats; gram_stats(torch.ones(2, 2), backend='native_cpu')"
    done = run(code, ORTHOFAST_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "BackendError" in last
    assert "ORTHOFAST_ISA" in last
    assert "'sse9'" in last
    for level in native.isa_levels():
        assert level in last

"""What a host can run of the Hopper fold holds: work list, fragments, operand layout, barriers, tables, refusals."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthofast.kernels import native_cuda
from orthofast.kernels.contract import make_request
from orthofast.kernels.schedule import Problem, work_list

ROOT = Path(__file__).resolve().parents[2]
BUILT = importlib.util.find_spec("orthofast._cuda") is not None
needs_module = pytest.mark.skipif(
    not BUILT, reason="orthofast._cuda is not built: no nvcc where orthofast was installed"
)


def compiler() -> str:
    named = os.environ.get("CXX", "").split()[:1]
    found = next(filter(None, map(shutil.which, [*named, "c++", "g++", "clang++"])), None)
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def test_geometry_schedule_and_barriers_on_the_host(tmp_path: Path) -> None:
    check = tmp_path / "check"
    sources = [str(ROOT / name) for name in ("tests/native/check_cuda.cpp", "csrc/cuda/plan.cpp")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler(), *flags, *sources, "-o", str(check)], check=True, timeout=300)
    done = subprocess.run([str(check)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("ok\n")


def pack(n: int, d: int, m: int | None, items: int, dtype: int = 3) -> bytes:
    """A bfloat16 request of aligned rows, as integers; the addresses are never read."""

    def side(vectors: int) -> tuple[int, ...]:
        pitch = -(-d // 8) * 8
        return (1 << 20, vectors, vectors * pitch, pitch, 1, 0, 0)

    other = (0,) * 7 if m is None else side(m)
    return struct.pack("25q", *side(n), *other, m is not None, 1, dtype, 0, 1, 0, items, d, 0, 0, 0)


@needs_module
@pytest.mark.parametrize(
    "problems",
    [
        [Problem(5000, 64)],
        [Problem(257, 64), Problem(256, 128), Problem(129, 64), Problem(2304, 32)],
        [Problem(300, 100, m=2900), Problem(520, 200, items=3)],
    ],
    ids=["one", "many", "cross and items"],
)
def test_the_device_writes_the_list_that_the_schedule_says(problems: list[Problem]) -> None:
    from orthofast import _cuda

    packed = b"".join(pack(p.n, p.d, p.m, p.items) for p in problems)
    (launch, *more) = _cuda.launches(packed, 132)
    first, last, edge, bf16, columns = launch
    written = _cuda.work_list(packed, 132)
    assert not more
    assert (first, last) == (0, len(written))
    assert bf16
    assert not columns
    # the module numbers problems in the order it works them off: long vectors first
    order = sorted(range(len(problems)), key=lambda i: -problems[i].d)
    planned = work_list(tuple(problems[i] for i in order), edge, edge)
    assert written == [tuple(entry) for entry in planned.entries.tolist()]


@needs_module
def test_kernels_are_shared_by_type_and_orientation() -> None:
    from orthofast import _cuda

    packed = b"".join(
        pack(n, d, None, 1, dtype) for n, d, dtype in ((900, 64, 3), (900, 64, 2), (700, 128, 3), (64, 576, 3))
    )
    made = _cuda.launches(packed, 132)
    assert [(bf16, columns) for _, _, _, bf16, columns in made] == [(False, False), (True, False), (True, False)]
    assert made[-1][2] == 128  # a small set in small tiles, apart from the rest


@needs_module
def test_what_no_device_can_fold_is_refused_in_a_sentence() -> None:
    x = torch.randn(1, 64, 64, dtype=torch.bfloat16)
    assert native_cuda._refusal(make_request(x)) is None
    assert native_cuda._refusal(make_request(x.mT)) is None
    assert "16 bytes" in str(native_cuda._refusal(make_request(x[:, :, 1:])))
    assert "16 bytes" in str(native_cuda._refusal(make_request(x[:, :, ::2])))
    assert "histogram" in str(native_cuda._refusal(make_request(x, bins=8)))
    assert "float64" in str(native_cuda._refusal(make_request(x.double())))
    assert "at least one" in str(native_cuda._refusal(make_request(x[:, :0])))
    assert native_cuda._refusal(make_request(x.float()[:, :, 1:])) is None
    assert native_cuda._refusal(make_request(x, x[:, :8])) is None
    assert "16 bytes" in str(native_cuda._refusal(make_request(x, torch.randn(1, 64, 64, dtype=x.dtype).mT)))


def test_a_tensor_elsewhere_is_refused() -> None:
    reason = native_cuda.supports(make_request(torch.ones(4, 3)))
    assert reason is not None
    assert "CUDA tensor" in reason or "nvcc" in reason


@needs_module
def test_the_module_loads_and_answers_without_a_driver() -> None:
    code = "from orthofast import _cuda; print(_cuda.lack(0))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CUDA" in done.stdout
    assert done.stdout.count("\n") == 1


@needs_module
def test_a_failed_launch_is_one_sentence() -> None:
    from orthofast import _cuda

    packed = pack(300, 64, None, 1)
    with pytest.raises(ValueError, match="workspace needs an address"):
        _cuda.gram_stats(packed, 1, 1 << 40, 132, 0, 0)
    with pytest.raises(ValueError, match=r"workspace needs .* bytes, got 16"):
        _cuda.gram_stats(packed, 256, 16, 132, 0, 0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="current CUDA device failed: "):
            _cuda.gram_stats(packed, 256, _cuda.workspace_bytes(packed, 132), 132, 0, 0)

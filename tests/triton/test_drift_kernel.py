"""The Triton drift kernel: right in the interpreter, and compiled ahead of time for Hopper and Ampere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {90: 227 << 10, 80: 163 << 10, 89: 99 << 10}


def test_it_is_right_in_the_interpreter() -> None:
    """All cases of interpreted_drift.py, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_drift.py")],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 28
    assert "skipped" not in done.stdout


def compiled(architecture: int, parts: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from orthofast.kernels import triton_drift as kernels

    tile = (kernels.WIDE if architecture == 90 else kernels.NARROW)[parts]
    types = dict.fromkeys(("high_x", "low_x", "high_y", "low_y"), "*fp16")
    types |= dict.fromkeys(("factors_x", "factors_y", "partials"), "*fp32") | {"work": "*i32"}
    types |= dict.fromkeys(("total", "n", "width"), "i32")
    constants = {
        "PARTS_X": parts,
        "PARTS_Y": parts,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    names = kernels.compare.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*types,) if name not in ("total", "n")}
    source = ASTSource(
        kernels.compare,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("architecture", SHARED)
def test_it_compiles_within_shared_memory_and_without_spills(architecture: int, parts: int, tmp_path: Path) -> None:
    made = compiled(architecture, parts)
    assert made.metadata.shared <= SHARED[architecture]
    assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in made.asm["ptx"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(made.asm["ptx"], encoding="utf-8")
    name = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    log = subprocess.run(
        [str(TOOLS / "ptxas"), "-v", f"--gpu-name={name}", str(ptx), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.stdout + log.stderr)
    assert spills
    assert all(int(count) == 0 for count in spills)
    assert "atom." not in made.asm["ptx"]

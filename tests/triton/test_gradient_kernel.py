"""The Triton gradient of sums over pairs: right in the interpreter, and compiled ahead of time without spills."""

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
    """All cases of interpreted_gradient.py, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_gradient.py")],
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
    assert int(passed.group(1)) >= 40
    assert "skipped" not in done.stdout


def compiled(architecture: int, parts: int, kind: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from orthofast.kernels import triton_gradient as kernels

    tile = (kernels.WIDE if architecture == 90 else kernels.NARROW)[parts]
    types = dict.fromkeys(("high_x", "low_x", "high_y", "low_y", "slopes"), "*fp16")
    types |= dict.fromkeys(("factors_x", "factors_y", "partials"), "*fp32") | {"work": "*i32", "bend": "fp32"}
    types |= dict.fromkeys(("first_item", "first_row", "total", "n", "m", "rows_held", "stride", "width"), "i32")
    constants = {
        "PARTS": parts,
        "CROSS": False,
        "MIRROR": True,
        "SLOPES": True,
        "KIND": kernels.KINDS[kind],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    names = kernels.derive.arg_names
    aligned = [name for name in types if types[name].startswith("*") or name in ("stride", "width")]
    source = ASTSource(
        kernels.derive,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize(("parts", "kind"), [(1, "abs"), (1, "sqrt"), (2, "abs")])
@pytest.mark.parametrize("architecture", SHARED)
def test_it_compiles_within_shared_memory_and_without_spills(
    architecture: int, parts: int, kind: str, tmp_path: Path
) -> None:
    made = compiled(architecture, parts, kind)
    assert made.metadata.shared <= SHARED[architecture]
    assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
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

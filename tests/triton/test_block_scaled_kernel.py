"""The block-scaled Triton kernel: right in the interpreter, and what the compiler makes of it for each device."""

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
ALIGNED = ("x", "y", "scale_x", "scale_y", "inverse_x", "inverse_y", "work", "partials", "n", "m", "d")


def test_it_is_right_in_the_interpreter() -> None:
    """All cases of interpreted_block_scaled.py, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_block_scaled.py")],
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
    assert int(passed.group(1)) >= 55
    assert "skipped" not in done.stdout


def compiled(architecture: int, rows: bool, native: bool) -> Any:
    """The fold of one set, stored along rows or columns, for an architecture such as 90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from orthofast.kernels import triton_block_scaled as kernels

    step, stages = kernels.WARPGROUP_STEP if architecture in (90, 100) else kernels.WARP_STEP
    fixed = {"ROWS_X": rows, "ROWS_Y": rows, "CROSS": False, "WANT": 1, "NATIVE": native, "STEP": step}
    fixed |= dict.fromkeys(("HEIGHT_X", "WIDTH_X", "HEIGHT_Y", "WIDTH_Y"), kernels.SIDE)
    fixed |= dict.fromkeys(("stride_dx", "stride_dy") if rows else ("stride_nx", "stride_ny"), 1)
    types = dict.fromkeys(("x", "y"), "*fp8e4nv") | dict.fromkeys(ALIGNED[2:6], "*fp32")
    types |= {"work": "*i32", "partials": "*fp32"}
    names = kernels.fold.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constants = {(i,): fixed[name] for i, name in enumerate(names) if name in fixed}
    sixteen = [name for name in names if (name in ALIGNED or name.startswith("stride")) and name not in fixed]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in sixteen}
    return triton.compile(
        ASTSource(kernels.fold, signature, constants, hints),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": kernels.WARPS, "num_stages": stages},
    )


@pytest.mark.parametrize(
    ("rows", "native"), [(True, False), (False, False), (True, True)], ids=["rows", "cols", "native-rows"]
)
@pytest.mark.parametrize(("architecture", "product"), [(89, "MMA"), (90, "GMMA"), (100, "UTC.MMA")])
def test_it_compiles_to_tensor_cores_within_its_registers(
    architecture: int, product: str, rows: bool, native: bool, tmp_path: Path
) -> None:
    made = compiled(architecture, rows, native)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])

    def told(option: str) -> str:
        done = subprocess.run([TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True)
        return done.stdout

    code = told("-sass")
    letter = "Q" if native else "H"
    wanted = product.replace("UTC.", f"UTC{letter}") if "UTC" in product else letter + product
    assert re.search(rf"\b{wanted}", code), f"no {wanted}"
    spilled = re.search(r"Function fold:\s+REG:\d+ STACK:(\d+)", told("-res-usage"))
    assert spilled is not None
    # columns feed the older tensor cores through registers, which costs a few
    assert int(spilled.group(1)) <= (96 if architecture == 89 and not rows else 0)
    assert made.metadata.shared <= (99 if architecture == 89 else 227) * 1024

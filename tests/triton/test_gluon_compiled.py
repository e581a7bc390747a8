"""The Gluon kernel compiled ahead of time for Hopper: what its code must hold, and what the launcher refuses."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthofast.kernels import gluon_folds

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VARIANTS = [(dtype, rows) for dtype in (torch.bfloat16, torch.float16) for rows in (True, False)]
IDS = [f"{str(dtype)[6:]}-{'rows' if rows else 'cols'}" for dtype, rows in VARIANTS]
SHARED_LIMIT = 227 * 1024
ENTRY_REGISTERS = 168  # 65536 / (12 warps of 32), in steps of 8


@cache
def code(dtype: torch.dtype, rows: bool, tmp: Path) -> tuple[Any, list[tuple[int, str]], str]:
    """The compiled kernel, its instructions with their addresses, and what the assembler says."""
    made = gluon_folds.compiled(dtype, rows)
    cubin, ptx = tmp / "kernel.cubin", tmp / "kernel.ptx"
    cubin.write_bytes(made.asm["cubin"])
    ptx.write_text(made.asm["ptx"], encoding="utf-8")
    listing = said(TOOLS / "cuobjdump", "-sass", cubin)
    instructions = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)
    log = said(TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", tmp / "again.cubin")
    return made, [(int(at, 16), text.strip()) for at, text in instructions], log


def said(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gluon")


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops, found by their backward branches."""
    bodies = []
    for index, (at, text) in enumerate(instructions):
        jump = re.search(r"\bBRA (?:P\d, )?0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < at:
            first = next(i for i, (place, _) in enumerate(instructions) if place >= int(jump.group(1), 16))
            bodies.append((first, index))
    inner = [(a, z) for a, z in bodies if not any(a <= c and y <= z and (a, z) != (c, y) for c, y in bodies)]
    return [[text for _, text in instructions[a : z + 1]] for a, z in inner]


@pytest.mark.parametrize(("dtype", "rows"), VARIANTS, ids=IDS)
def test_the_loop_multiplies_by_warpgroup_and_touches_memory_by_tma_only(
    dtype: torch.dtype, rows: bool, folder: Path
) -> None:
    _, instructions, _ = code(dtype, rows, folder)
    bodies = loops(instructions)
    products = [body for body in bodies if any("HGMMA" in text for text in body)]
    copies = [body for body in bodies if any("UTMALDG" in text for text in body)]
    assert len(products) == gluon_folds.PARTIALS
    assert len(copies) == 1
    for body in products:
        words = "\n".join(body)
        assert words.count("HGMMA.64x256x16.F32") == 4
        assert words.count("BAR.SYNC") <= 2
        assert not re.search(r"MEMBAR|\b(LDL|STL|LDG|STG|LDS|STS)\b", words)
        assert not re.search(r"WARPGROUP.DEPBAR.LE gsb0, 0x0", words), "the loop drains the tensor cores"
    assert "\n".join(copies[0]).count("UTMALDG.2D") == (3 if rows else 6)
    assert not re.search(r"MEMBAR|\b(LDL|STL|LDG|STG|LDS|STS)\b|BAR.SYNC", "\n".join(copies[0]))


@pytest.mark.parametrize(("dtype", "rows"), VARIANTS, ids=IDS)
def test_nothing_spills_and_nothing_is_serialised(dtype: torch.dtype, rows: bool, folder: Path) -> None:
    made, instructions, log = code(dtype, rows, folder)
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert not re.search(r"C75\d\d", log), log
    assert re.search(rf"Used {ENTRY_REGISTERS} registers", log), log
    assert made.metadata.shared <= SHARED_LIMIT
    assert made.metadata.num_warps == 12
    words = "\n".join(text for _, text in instructions)
    assert not re.search(r"\b(LDL|STL|HMMA)\b", words)
    # 240 registers a thread for the products, 24 for the copies
    assert re.search(r"USETMAXREG.TRY_ALLOC.CTAPOOL UP\d, 0xf0", words)
    assert re.search(r"USETMAXREG.DEALLOC.CTAPOOL 0x18", words)


def test_one_multiplication_and_one_addition_per_pair(folder: Path) -> None:
    _, instructions, _ = code(torch.bfloat16, True, folder)
    each = 64 * 256 // 128 * gluon_folds.PARTIALS  # pairs a thread holds, in both halves' code
    counts = {op: sum(op in text for _, text in instructions) for op in ("FMUL", "FADD")}
    assert each <= counts["FMUL"] <= each + 8
    assert each <= counts["FADD"] <= each + 24


def test_tile_sizes_of_launcher_and_kernel_agree() -> None:
    kernels = pytest.importorskip("orthofast.kernels.gluon_kernels", exc_type=ImportError)
    assert (kernels.TILE_ROWS, kernels.TILE_COLUMNS) == gluon_folds.TILE
    assert (kernels.HALVES, kernels.STEP) == (gluon_folds.PARTIALS, gluon_folds.STEP)


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "x",
    [
        bf16(1, 5, 8),
        bf16(3, 5, 64),
        bf16(1, 300, 72),
        bf16(1, 7, 24).transpose(1, 2),
        bf16(3, 64, 24).transpose(1, 2),
        bf16(1, 5, 80)[:, :, :64],
        bf16(5, 3, 64)[:1],
    ],
    ids=["rows", "items", "long", "cols", "items-of-cols", "window", "first-item"],
)
def test_layouts_tma_can_read_are_taken(x: Tensor) -> None:
    assert gluon_folds.layout_problem(x) is None


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(1, 5, 8), "float32"),
        (bf16(1, 1, 8), "pair"),
        (bf16(1, 5, 0), "pair"),
        (bf16(1, 5, 12), "16 bytes"),
        (bf16(1, 5, 17)[:, :, 1:], "16 bytes"),
        (bf16(1, 5, 32)[:, :, 4:12], "16 bytes"),
        (bf16(1, 5, 32)[:, :, ::2], "neighbours"),
        (bf16(4, 5, 64)[::2], "one after another"),
        (bf16(3, 40, 24).transpose(1, 2), "divisible by 64"),
        (bf16(1, 1, 64).expand(1, 5, 64), "16 bytes"),
    ],
    ids=["float32", "single", "empty", "stride", "odd", "offset", "gaps", "gapped-items", "cols-tail", "expanded"],
)
def test_other_layouts_get_a_sentence(x: Tensor, word: str) -> None:
    reason = gluon_folds.layout_problem(x)
    assert reason is not None
    assert word in reason


def test_a_tensor_on_the_cpu_gets_a_sentence() -> None:
    assert gluon_folds.problem(bf16(1, 5, 8)) == "the Gluon kernel needs an NVIDIA GPU, got cpu"


def test_a_triton_that_does_not_take_the_kernel_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: torch.dtype, rows: bool) -> None:
        raise AttributeError("module has no attribute 'warp_specialize'")

    monkeypatch.setattr(gluon_folds, "compiled", refuse)
    gluon_folds.compile_problem.cache_clear()
    reason = gluon_folds.compile_problem(torch.bfloat16, True)
    gluon_folds.compile_problem.cache_clear()
    assert reason is not None
    assert reason.startswith(f"the Gluon kernel does not compile with triton {triton.__version__}: ")
    assert "warp_specialize" in reason
    assert "\n" not in reason


def test_sums_of_entries_are_joined_per_item(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbered(x: Tensor, inverse: Tensor, entries: Tensor, programs: int) -> Tensor:
        assert inverse.dtype == torch.float32
        assert inverse.tolist() == [[0.5] * 299 + [0.0]] * 3
        return (10.0 ** entries[:, 0]).to(torch.float32)

    monkeypatch.setattr(gluon_folds, "abs_sum_partials", numbered)
    monkeypatch.setattr(gluon_folds, "_processors", lambda device: 4)
    norm_sq = torch.full((3, 300), 4.0, dtype=torch.float64)
    norm_sq[:, 299] = 0
    entries = 2 + 2 + 1  # rows 0, 128 and 256 in steps of 128 against columns in steps of 256
    assert gluon_folds.abs_sum(bf16(3, 300, 64), norm_sq).tolist() == [entries, 10 * entries, 100 * entries]

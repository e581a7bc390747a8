"""The compiled Hopper fold is what was designed: tensor cores, copy engine, no spills, no fence in the main loop."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDS = 12  # tile size x orientation x fields
KERNEL_REGISTERS = 168  # at entry, 384 threads


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("no nvcc on this machine")
    return found


def disassembler() -> str:
    spec = importlib.util.find_spec("triton")
    bundled = [
        str(Path(place) / "backends/nvidia/bin/nvdisasm") for place in (spec and spec.submodule_search_locations) or []
    ]
    found = next(filter(None, map(shutil.which, ["nvdisasm", *bundled])), None)
    if found is None:
        pytest.skip("no nvdisasm: neither CUDA's nor the one in Triton's package")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Machine code of the bfloat16 folds, and what the assembler reports."""
    out = tmp_path_factory.mktemp("cubin") / "fold.cubin"
    done = subprocess.run(
        [
            nvcc(),
            "-std=c++17",
            "-O3",
            "-gencode",
            "arch=compute_90a,code=sm_90a",
            "-Xptxas",
            "-v",
            "-cubin",
            f"-I{ROOT / 'csrc'}",
            str(ROOT / "csrc/cuda/fold_bf16.cu"),
            "-o",
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope="module")
def kernels(compiled: tuple[Path, str]) -> dict[str, list[str]]:
    """Instructions of each kernel, by its mangled name."""
    listing = subprocess.run([disassembler(), "-c", str(compiled[0])], capture_output=True, text=True, timeout=300)
    found: dict[str, list[str]] = {}
    name = ""
    for line in listing.stdout.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\S+?)[,\s]", line):
            name = match[1]
            found[name] = []
        elif name and ("/*" in line or line.lstrip().startswith(".L")):
            found[name].append(line)
    return {name: lines for name, lines in found.items() if "fold" in name and lines}


def main_loop(lines: list[str]) -> list[str]:
    """The innermost loop around the tensor-core instructions: from the label its last branch returns to."""
    text = "\n".join(lines)
    products = [i for i, line in enumerate(lines) if "HGMMA" in line]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L\w+):", line))}
    loops = []
    for i, line in enumerate(lines):
        for target in re.findall(r"BRA[^;]*?\(?(\.L\w+)", line):
            start = labels.get(target, i)
            if start <= products[0] and i >= products[-1]:
                loops.append((i - start, start, i))
    assert loops, text[:2000]
    _, start, stop = min(loops)
    return lines[start : stop + 1]


def test_the_assembler_has_nothing_to_warn_of(compiled: tuple[Path, str]) -> None:
    report = compiled[1]
    assert "warning" not in report.lower()
    assert not re.search(r"C75\d\d", report)  # serialised products, ignored register counts
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == FOLDS
    assert set(spills) == {("0", "0", "0")}
    assert set(re.findall(r"Used (\d+) registers", report)) == {str(KERNEL_REGISTERS)}


def test_each_kernel_multiplies_on_tensor_cores_and_copies_by_the_engine(kernels: dict[str, list[str]]) -> None:
    assert len(kernels) == FOLDS
    for name, lines in kernels.items():
        seen = Counter(re.findall(r"\b(HGMMA\.\d+x\d+x\d+|HMMA|UTMALDG\S*|LDL|STL|USETMAXREG\.\w+)", "\n".join(lines)))
        large, columns = "TileShapeILi2E" in name, "Lb1ELb1E" in name
        assert seen["HGMMA.64x256x16" if large else "HGMMA.64x128x16"] == 4, (name, seen)
        assert seen["HMMA"] + seen["LDL"] + seen["STL"] == 0, (name, seen)
        copies = {key: count for key, count in seen.items() if key.startswith("UTMALDG")}
        boxes = 2 if columns else 1  # 64 vectors a box where they are interleaved
        multicast = sum(count for key, count in copies.items() if "MULTICAST" in key)
        assert multicast == (boxes if large else 0), (name, copies)
        assert sum(copies.values()) == 2 * boxes, (name, copies)
        assert (seen["USETMAXREG.DEALLOC"], seen["USETMAXREG.TRY_ALLOC"]) == (1, 1), (name, seen)


def test_no_fence_and_no_block_barrier_in_the_main_loop(kernels: dict[str, list[str]]) -> None:
    for name, lines in kernels.items():
        loop = "\n".join(main_loop(lines))
        assert loop.count("HGMMA") == 4, name
        assert not re.search(r"\b(MEMBAR|BAR\.SYNC|CCTL|ERRBAR|UCGABAR)", loop), name
        assert "SYNCS" in loop, name  # the stage's barrier

"""Gates on compiled code, no GPU needed: it compiles everywhere, and on Hopper it is the code that was meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.aot.compiling import GOLDEN, MUTANT, TARGETS, WHOLE, dumped, innermost, updated
from tests.aot.conftest import ROOT, Figures

SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
SHARED_BYTES["gfx942"] = 64 << 10
SPLIT_STACK = 16  # bytes outside the loop, where operands are kept in two parts
REGISTERS_MORE = 8  # one step of allocation
SAME = ("products", "warpgroup_products", "tensor_products", "tma_loads", "async_copies", "loop_products")
NO_MORE = {
    "shared_bytes": 1024, "registers": REGISTERS_MORE, "stack_bytes": 0, "spilled_registers": 0, "local_accesses": 0,
    "loop_memory_barriers": 0, "loop_barriers": 0, "loop_plain_loads": 0, "loop_local_accesses": 0,
}  # fmt: skip


def broken_rules(name: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a hot variant on Hopper, each as a clause."""
    found = []
    maps = "tma_loads" if name.startswith("gluon") or "maps" in name else "async_copies"
    if not row["loop_products"] or row["products"] != row["warpgroup_products"]:
        found.append(f"{row['products']} products, {row['warpgroup_products']} of them by warpgroup")
    if not row[maps]:
        found.append(f"no {maps}: loads do not run ahead")
    if maps == "tma_loads" and row["async_copies"]:
        found.append(f"{row['async_copies']} copies by threads beside TMA")
    if row["loop_local_accesses"] or row["loop_plain_loads"] or row["loop_memory_barriers"]:
        found.append(
            f"in the main loop: {row['loop_local_accesses']} accesses to spilled registers, {row['loop_plain_loads']}"
            f" plain loads, {row['loop_memory_barriers']} memory barriers"
        )
    if row["stack_bytes"] > (SPLIT_STACK if "split" in name else 0):
        found.append(f"{row['stack_bytes']} bytes spilled")
    return found


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Variants that are new, gone, or whose figures moved beyond the tolerance; a line each."""
    lines = [f"{name}: is in the golden file, not compiled any more" for name in sorted(golden.keys() - found.keys())]
    lines += [f"{name}: is not in the golden file" for name in sorted(found.keys() - golden.keys())]
    for name in sorted(golden.keys() & found.keys()):
        for figure, was in golden[name].items():
            now = found[name].get(figure)
            more = NO_MORE.get(figure)
            if now is None or (figure in SAME and now != was) or (more is not None and now > was + more):
                allowed = "the same" if figure in SAME else f"at most {was + (more or 0)}"
                lines.append(f"{name}: {figure} was {was}, is {now}, allowed {allowed}")
    return lines


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_with_matrix_instructions_and_fits(compiled: Figures, target: str) -> None:
    errors = {name: row["error"] for name, row in compiled[target].items() if "error" in row}
    assert errors == {}
    for name, row in compiled[target].items():
        if name.startswith(("fold", "gluon")):
            assert row["products"], f"{target} {name} multiplies without the matrix units"
        assert row["shared_bytes"] <= SHARED_BYTES[target], f"{target} {name}"


def test_hot_variants_on_hopper_are_the_code_that_was_meant(compiled: Figures) -> None:
    hot = {name: row for name, row in compiled[WHOLE].items() if row["hot"]}
    assert len(hot) >= 10
    wrong = {name: found for name, row in hot.items() if (found := broken_rules(name, row))}
    assert wrong == {}


def test_tma_feeds_the_largest_tiles(compiled: Figures) -> None:
    for name in ("fold-bf16-rows-large-maps", "fold-bf16-columns-large-maps"):
        assert compiled[WHOLE][name]["tma_loads"] >= 2
        assert compiled[WHOLE][name]["loop_products"] == 4  # of 64 x 256 x 16, for steps of 64
    assert compiled["sm_100"]["fold-bf16-rows-large-maps"]["tensor_products"]


def test_a_tile_on_too_few_warps_is_seen(compiled: Figures) -> None:
    found = " ".join(broken_rules(MUTANT, compiled[WHOLE][MUTANT]))
    assert "bytes spilled" in found


def test_figures_are_those_of_the_golden_file(compiled: Figures) -> None:
    triton = pytest.importorskip("triton")
    golden = json.loads(GOLDEN.read_text()).get(triton.__version__)
    if golden is None:
        pytest.skip(f"no golden figures for triton {triton.__version__}; the rules above hold")
    lines = []
    for target, rows in compiled.items():
        promised = {name: row for name, row in rows.items() if name != MUTANT}
        lines += [f"{target} {line}" for line in differences(golden[target], promised)]
    assert not lines, (
        "compiled code differs from tests/aot/golden.json; if it is meant, `python -m tests.aot.compiling --update`\n"
        + "\n".join(lines)
    )


def test_the_pinned_triton_has_golden_figures_for_every_target() -> None:
    pins = (ROOT / "requirements" / "constraints.txt").read_text()
    pinned = re.search(r"^triton==(\S+)", pins, re.MULTILINE)
    assert pinned is not None
    assert set(json.loads(GOLDEN.read_text())[pinned[1]]) == set(TARGETS)


def test_a_change_of_figures_is_a_line_that_says_what_was_allowed() -> None:
    was = {"fold": {"registers": 240, "stack_bytes": 0, "tma_loads": 8}, "gone": {"registers": 1}}
    same = {"fold": {"registers": 248, "stack_bytes": 0, "tma_loads": 8}, "gone": {"registers": 1}}
    assert differences(was, same) == []
    now = {"fold": {"registers": 255, "stack_bytes": 8, "tma_loads": 6}, "new": {"registers": 1}}
    assert differences(was, now) == [
        "gone: is in the golden file, not compiled any more",
        "new: is not in the golden file",
        "fold: registers was 240, is 255, allowed at most 248",
        "fold: stack_bytes was 0, is 8, allowed at most 0",
        "fold: tma_loads was 8, is 6, allowed the same",
    ]


GOOD = {
    "products": 4, "warpgroup_products": 4, "loop_products": 4, "tma_loads": 8, "async_copies": 0, "stack_bytes": 0,
    "loop_local_accesses": 0, "loop_plain_loads": 0, "loop_memory_barriers": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"loop_products": 0}, {"warpgroup_products": 0}, {"tma_loads": 0}, {"async_copies": 4}, {"stack_bytes": 8},
        {"loop_local_accesses": 1}, {"loop_plain_loads": 1}, {"loop_memory_barriers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_every_rule_can_be_broken(change: dict[str, int]) -> None:
    assert broken_rules("fold-maps", GOOD) == []
    assert broken_rules("fold-maps", {**GOOD, **change})


def test_innermost_loops_are_found_by_their_backward_branches() -> None:
    code = [(0, "MOV R1, R2"), (16, "HGMMA.64x256x16.F32 R24"), (32, "@P0 BRA 0x10"), (48, "FADD R1"), (64, "BRA 0x0")]
    assert innermost(code) == [["HGMMA.64x256x16.F32 R24", "@P0 BRA 0x10"]]


def test_golden_figures_are_written_one_variant_a_line(tmp_path: Path) -> None:
    made = updated({"1": {"sm_80": {}}}, "2", {"sm_90a": {MUTANT: {"registers": 255}, "fold": {"registers": 1}}})
    assert json.loads(dumped(made)) == {"1": {"sm_80": {}}, "2": {"sm_90a": {"fold": {"registers": 1}}}}
    assert sum("registers" in line for line in dumped(made).splitlines()) == 1

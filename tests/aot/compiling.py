"""`python -m tests.aot.compiling TARGET...`: compile the Triton kernels for devices not at hand, count what comes out.

Prints JSON: target -> variant -> figures. ``--update`` writes them into ``golden.json`` under this Triton's version.
A process of its own, because Triton's interpreter, once chosen, holds for a whole process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden.json"
# name -> row of the table of tiles, and what Triton calls the device
TARGETS: dict[str, tuple[str, tuple[str, int | str, int]]] = {
    "sm_80": ("ampere", ("cuda", 80, 32)),
    "sm_89": ("ada", ("cuda", 89, 32)),
    "sm_90a": ("hopper", ("cuda", 90, 32)),
    "sm_100": ("blackwell", ("cuda", 100, 32)),
    "sm_120": ("ada", ("cuda", 120, 32)),
    "gfx942": ("cdna", ("hip", "gfx942", 64)),
}
WHOLE = "sm_90a"  # every variant; elsewhere the largest tiles, and one of each other kernel
LARGE = re.compile(r"fold-(bf16|split|vectors)-\w+-large")
MUTANT = "fold-bf16-rows-large@4warps"  # known to spill: the gates must see it
COUNTED = {
    "products": r"\b(HGMMA|QGMMA|HMMA|UTCHMMA|UTCQMMA|OMMA|QMMA)\b",
    "warpgroup_products": r"\b(HGMMA|QGMMA)\b",
    "tensor_products": r"\b(UTCHMMA|UTCQMMA)\b",
    "tma_loads": r"\bUTMALDG\b",
    "async_copies": r"\bLDGSTS\b",
    "local_accesses": r"\b(LDL|STL)\b",
}
IN_LOOP = {
    "loop_products": COUNTED["products"],
    # the one of CTA scope orders cp.async before warpgroup products, and is needed there
    "loop_memory_barriers": r"\bMEMBAR(?!\.ALL\.CTA)\b",
    "loop_local_accesses": COUNTED["local_accesses"],
    "loop_barriers": r"\bBAR\.(SYNC|RED)",
    "loop_plain_loads": r"\bLDG\b",
}


def selected(target: str) -> Iterator[Any]:
    """The variants compiled for a target."""
    from orthofast.kernels.triton_variants import variants

    seen: set[str] = set()
    for variant in variants(TARGETS[target][0]):
        kernel = variant.kernel.fn.__name__
        if target == WHOLE or LARGE.match(variant.name) or kernel not in seen:
            seen.add(kernel)
            yield variant
    if target == WHOLE:
        large = next(v for v in variants("hopper") if v.name == MUTANT.split("@", maxsplit=1)[0])
        yield replace(large, name=MUTANT, options={**large.options, "num_warps": 4}, hot=False)


def figures(target: str) -> dict[str, dict[str, Any]]:
    """Variant -> figures of its code; an error where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = GPUTarget(*TARGETS[target][1])
    found: dict[str, dict[str, Any]] = {}
    for v in selected(target):
        try:
            made = triton.compile(
                ASTSource(v.kernel, v.signature, v.constants, v.attributes), target=device, options=v.options
            )
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
            found[v.name] = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]}
            continue
        found[v.name] = {"hot": v.hot, **measured(made)}
    if target == WHOLE:
        found.update(gluon())
    return found


def gluon() -> dict[str, dict[str, Any]]:
    """The warp-specialised fold, where this Triton compiles it."""
    import torch

    from orthofast.kernels import gluon_folds

    found: dict[str, dict[str, Any]] = {}
    for rows, word in ((True, "rows"), (False, "columns")):
        try:
            found[f"gluon-bf16-{word}"] = {"hot": True, **measured(gluon_folds.compiled(torch.bfloat16, rows))}
        except Exception as error:  # noqa: BLE001 - an experimental compiler
            found[f"gluon-bf16-{word}"] = {"error": (str(error).strip().splitlines() or ["?"])[-1][:300]}
    return found


def measured(made: Any) -> dict[str, Any]:
    """Registers, memory and instruction counts of compiled code."""
    if "cubin" in made.asm:
        return {"shared_bytes": int(made.metadata.shared), **of_cubin(made.asm["cubin"])}
    return {"shared_bytes": int(made.metadata.shared), **of_amdgcn(made.asm["amdgcn"])}


def of_cubin(cubin: bytes) -> dict[str, Any]:
    """What the disassembler says of NVIDIA code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(tool), "-sass", "-res-usage", str(path)], capture_output=True, text=True, timeout=120, check=True
        )
    text = done.stdout + done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, f"no resource usage in {text[:300]}"
    instructions = [(int(at, 16), code.strip()) for at, code in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)]
    whole = "\n".join(code for _, code in instructions)
    bodies = ["\n".join(body) for body in innermost(instructions)]
    loop = "\n".join(body for body in bodies if re.search(COUNTED["products"], body))
    return {
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        **{name: len(re.findall(pattern, whole)) for name, pattern in COUNTED.items()},
        **{name: len(re.findall(pattern, loop)) for name, pattern in IN_LOOP.items()},
    }


def of_amdgcn(text: str) -> dict[str, Any]:
    """What the assembler text says of AMD code."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found, f"no {name} in the assembler text"
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spilled_registers": field("vgpr_spill_count"),
        "products": len(re.findall(r"\bv_mfma_", text)),
    }


def innermost(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the loops that hold no other loop, found by their backward branches."""
    spans: list[tuple[int, int]] = []
    for index, (at, code) in enumerate(instructions):
        jump = re.search(r"\bBRA(?:\.U)? (?:[!U]*P\d, )?(?:`\(\S+\) )?0x([0-9a-f]+)", code)
        if jump and int(jump[1], 16) < at:
            spans.append((next(i for i, (place, _) in enumerate(instructions) if place >= int(jump[1], 16)), index))
    inner = [(a, z) for a, z in spans if not any((a, z) != (c, y) and a <= c and y <= z for c, y in spans)]
    return [[code for _, code in instructions[a : z + 1]] for a, z in inner]


def updated(golden: dict[str, Any], version: str, found: dict[str, Any]) -> dict[str, Any]:
    """The golden figures with those of one Triton replaced; the mutant is no promise."""
    kept = {t: {n: f for n, f in sorted(v.items()) if n != MUTANT} for t, v in found.items()}
    return dict(sorted({**golden, version: {**golden.get(version, {}), **kept}}.items()))


def dumped(golden: dict[str, Any]) -> str:
    """One variant a line, so that a change of figures reads well."""
    lines = []
    for version, targets in golden.items():
        inner = []
        for target, variants in targets.items():
            each = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in variants.items())
            inner.append(f"  {json.dumps(target)}: {{\n{each}\n  }}")
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Iterable[str] | None = None) -> int:
    """Compile the targets named, or all."""
    made = argparse.ArgumentParser(prog="python -m tests.aot.compiling", description=__doc__)
    made.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    made.add_argument("--update", action="store_true", help="write golden.json for this version of Triton")
    options = made.parse_args(None if arguments is None else list(arguments))
    found = {target: figures(target) for target in options.targets or TARGETS}
    if options.update:
        import triton

        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(dumped(updated(golden, triton.__version__, found)))
    else:
        sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

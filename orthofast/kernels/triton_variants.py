"""The compiled forms of the Triton kernels, listed for compilers that have no device: a pure function of the target.

``triton.compile(ASTSource(v.kernel, v.signature, v.constants, v.attributes), target=..., options=v.options)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from orthofast.kernels import tiles
from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM
from orthofast.kernels.tiles import Tile
from orthofast.kernels.triton_folds import fold
from orthofast.kernels.triton_lengths import JOIN_BLOCK, join_strips, measure_tiles
from orthofast.kernels.triton_plan import ANY, COLUMNS, FINISH_BLOCK, ROWS
from orthofast.kernels.triton_prepare import finish, join_rows, poison_vectors, prepare

POINTERS = {
    "entries": "*i32",
    "units": "*i32",
    "sides": "*i64",
    "problems": "*i64",
    "high": "*fp16",
    "low": "*fp16",
    "norm_sq": "*fp64",
    "factors": "*fp32",
    "partials": "*fp32",
    "arguments": "*i64",
    "row_slots": "*fp32",
    "column_slots": "*fp32",
    "row_abs": "*fp64",
    "hist": "*i64",
    "todo": "*i32",
    "matrices": "*i64",
    "ends": "*i64",
    "strips": "*fp32",
    "sums": "*fp64",
    "counts": "*i64",
}
MAPS = ("x_map", "y_map", "x_low_map", "y_low_map")
ALL = ABS_SUM | SQ_SUM | SUM | ABS_MAX | ROW_ABS


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form: a readable name, the kernel, what triton.compiler.ASTSource takes, and the options.

    ``hot`` are those a large call spends its time in: no spills there, and loads that run ahead.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    options: dict[str, int]
    hot: bool


def variants(kind: str) -> list[Variant]:
    """All forms worth compiling for a row of the table of tiles, such as "hopper"."""
    small, medium, large = tiles.TABLE[kind]
    careful = tiles.CAREFUL[kind]
    made: list[Variant] = []
    shapes = {"small": small, "medium": medium, "large": large}
    for size, tile in shapes.items():
        for layout, word in ((ROWS, "rows"), (COLUMNS, "columns")):
            made.append(_fold(f"fold-bf16-{word}-{size}", tile, tl.bfloat16, layout))
    if tiles.has_tensor_maps(kind):
        for size, tile in (("medium", medium), ("large", large)):
            for layout, word in ((ROWS, "rows"), (COLUMNS, "columns")):
                made.append(_fold(f"fold-bf16-{word}-{size}-maps", tile, tl.bfloat16, layout, maps=True))
        made.append(_fold("fold-split-rows-large-maps", _two(kind, large), tl.float16, ROWS, maps=True, parts=3))
        made.append(_fold("fold-all-rows-medium-maps", medium, tl.bfloat16, ROWS, maps=True, want=ALL, hot=False))
    made += [
        _fold("fold-fp16-rows-medium", medium, tl.float16, ROWS),
        _fold("fold-own-rows-large", large, tl.float16, ROWS, own=True),
        _fold("fold-own-columns-large", large, tl.float16, COLUMNS, own=True),
        _fold("fold-split-rows-large", _two(kind, large), tl.float16, ROWS, own=True, parts=3, condition=1),
        _fold("fold-split-columns-medium", _two(kind, medium), tl.float16, COLUMNS, own=True, parts=3),
        _fold("fold-vectors-rows-large", large, tl.bfloat16, ROWS, want=ABS_SUM | ROW_ABS),
        _fold("fold-all-rows-medium", medium, tl.bfloat16, ROWS, want=ALL, hot=False),
        _fold("fold-all-cross-rows-medium", medium, tl.bfloat16, ROWS, want=ALL, cross=True, hot=False),
        _fold("fold-raw-rows-medium", medium, tl.bfloat16, ROWS, want=ALL, normalize=False, hot=False),
        _fold("fold-hist-rows-medium", medium, tl.bfloat16, ROWS, want=HIST, bins=64, hot=False),
        _fold("fold-hist-many-bins", medium, tl.bfloat16, ROWS, want=HIST, bins=0, hot=False),
        _fold("fold-any", careful, tl.bfloat16, ANY, hot=False),
        _fold("fold-any-rescue", large, tl.bfloat16, ANY, condition=1, hot=False),
        _prepare("prepare-bf16-rows", kind, tl.bfloat16, ROWS, watched=True),
        _prepare("prepare-bf16-columns", kind, tl.bfloat16, COLUMNS, watched=True),
        _prepare("prepare-fp16-any", kind, tl.float16, ANY),
        _prepare("prepare-fp32-rows-rounded", kind, tl.float32, ROWS, parts=1),
        _prepare("prepare-fp32-columns-split", kind, tl.float32, COLUMNS, parts=2, condition=1),
        _prepare("prepare-fp32-any-split", kind, tl.float32, ANY, parts=2),
        *(_prepare(f"prepare-fp8-{form}", kind, tl.uint8, ROWS, parts=1, form=form) for form in (1, 2, 3, 4)),
    ]
    for cross in (False, True):
        word = "cross" if cross else "within"
        made.append(_of(f"finish-{word}", finish, {
            "WANT": ALL & ~ROW_ABS, "CROSS": cross, "NORMALIZE": True, "DECIDES": not cross, "CONDITION": 0,
            "BLOCK": FINISH_BLOCK,
        }, {"num_warps": 4}, False))  # fmt: skip
        made.append(_of(f"join-rows-{word}", join_rows, {
            "CROSS": cross, "FIRST": not cross, "CONDITION": int(cross), "BLOCK_M": large.block_m,
            "BLOCK_N": large.block_n, "BLOCK_V": tiles.prepare_block(kind, False)[0],
        }, {"num_warps": 1}, False))  # fmt: skip
    rows, step, strip = tiles.lengths_block(kind)
    made.append(_of("measure-tiles-bf16", measure_tiles, {
        "DTYPE": tl.bfloat16, "ALIGNED": True, "BLOCK_N": rows, "BLOCK_D": step, "STRIP": strip,
    }, {"num_warps": 8}, False))  # fmt: skip
    made.append(_of("join-strips", join_strips, {
        "WATCHED": True, "NORMALIZE": True, "BLOCK_V": JOIN_BLOCK,
    }, {"num_warps": 4}, False))  # fmt: skip
    made.append(_of("poison-vectors", poison_vectors, {"BLOCK_V": 16}, {"num_warps": 1}, False))
    return made


def _two(kind: str, tile: Tile) -> Tile:
    return tiles.with_two_parts(kind, tile)


def _fold(
    name: str, tile: Tile, dtype: Any, layout: int, *, maps: bool = False, own: bool = False, parts: int = 1,
    want: int = ABS_SUM, cross: bool = False, normalize: bool = True, condition: int = 0, bins: int = 0,
    hot: bool = True,
) -> Variant:  # fmt: skip
    own = own or parts == 3
    constants: dict[str, Any] = {
        "DTYPE": dtype, "LAYOUT": layout, "MAPS": maps, "OWN": own, "PARTS": parts, "WANT": want, "CROSS": cross,
        "NORMALIZE": normalize, "CONDITION": condition, "FACTOR": int(layout == ANY and dtype == tl.bfloat16),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STEP": tile.block_k, "BINS": 2 * bins,
    }  # fmt: skip
    letters = "bf16" if dtype == tl.bfloat16 else "fp16"
    described: dict[str, str] = {}
    for map_name in MAPS:
        if not maps or (map_name.endswith("low_map") and parts != 3):
            constants[map_name] = None
            continue
        block = tile.block_m if map_name.startswith("x") else tile.block_n
        box = f"{block},{tile.block_k}" if layout == ROWS else f"{tile.block_k},{block}"
        described[map_name] = f"tensordesc<{letters}[{box}]>"
    absent = {
        "high": own, "low": parts == 3, "arguments": want & ABS_MAX, "row_slots": want & ROW_ABS,
        "column_slots": want & ROW_ABS, "hist": want & HIST, "todo": condition,
    }  # fmt: skip
    constants.update({pointer: None for pointer, used in absent.items() if not used})
    return _of(name, fold, constants, {"num_warps": tile.warps, "num_stages": tile.stages}, hot, described)


def _prepare(
    name: str, kind: str, dtype: Any, layout: int, *, parts: int = 0, watched: bool = False, condition: int = 0,
    form: int = 0,
) -> Variant:  # fmt: skip
    vectors, elements = tiles.prepare_block(kind, layout == COLUMNS)
    constants: dict[str, Any] = {
        "DTYPE": dtype, "FORMAT": form, "LAYOUT": layout, "PARTS": parts, "SCALED": dtype == tl.float32,
        "WATCHED": watched, "NORMALIZE": True, "ALIGNED": layout != ANY, "CONDITION": condition,
        "BLOCK_V": vectors, "BLOCK_D": elements,
    }  # fmt: skip
    absent = {"high": parts > 0, "low": parts == 2, "todo": watched or condition}
    constants.update({pointer: None for pointer, used in absent.items() if not used})
    return _of(name, prepare, constants, {"num_warps": 4}, False)


def _of(
    name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int], hot: bool,
    described: dict[str, str] | None = None,
) -> Variant:  # fmt: skip
    """Pointers aligned to 16 bytes as torch allocates them, sizes as 32-bit integers."""
    names = list(kernel.arg_names)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for place, argument in enumerate(names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif described and argument in described:
            signature[argument] = described[argument]
        elif argument in POINTERS:
            signature[argument] = POINTERS[argument]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    values: dict[tuple[int, ...], Any] = {(names.index(argument),): value for argument, value in constants.items()}
    return Variant(name, kernel, signature, values, attributes, options, hot)

"""Tile and launch numbers of the GPU fold from shapes and device: pure functions, tables as data, nothing is timed.

A tile of ``block_m`` x ``block_n`` pairs walks its vectors in steps of ``block_k`` elements. Larger tiles read less per
product, smaller ones leave fewer processors idle in the last wave. The numbers come from rooflines and from what the
compiler makes of each shape (registers, shared memory, no spills), not from measured times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orthofast.kernels.schedule import Problem, tile_count

SMALL_RATE = 0.8  # of a 128 x 128 tile's products per second to a 128 x 256 tile's
PROCESSORS = 132  # of the device the choice of tiles is made for; others get the same bits
MEDIUM_SET = 512  # up to here tiles of 128 x 256 would be mostly mask
SLOT_BYTES = 32 << 20  # of per-vector partial sums held at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """One compiled shape of the fold: pairs, elements per step, warps, pipeline stages, programs per processor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_processor: int = 1


# small, medium, large; 16-bit operands, 128-byte rows of a step where shared memory allows
TABLE: dict[str, tuple[Tile, Tile, Tile]] = {
    # 227 KiB of shared memory: 4 stages of 48 KiB; 8 warps, for 4 would spill at 256 columns
    "hopper": (Tile(64, 64, 64, 4, 4, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
    "blackwell": (Tile(64, 64, 64, 4, 4, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
    # 163 KiB; the accumulator of 128 x 256 leaves registers for steps of 32
    "ampere": (Tile(64, 64, 64, 4, 3, 3), Tile(128, 128, 32, 4, 4, 2), Tile(128, 256, 32, 8, 3)),
    # 99 KiB
    "ada": (Tile(64, 64, 32, 4, 3, 3), Tile(128, 128, 32, 4, 3, 2), Tile(128, 128, 32, 4, 3, 2)),
    # 64 KiB of local memory, 64 lanes in a warp
    "cdna": (Tile(64, 64, 64, 4, 2, 2), Tile(128, 128, 32, 4, 2, 1), Tile(128, 128, 64, 8, 2, 1)),
    # each step costs milliseconds there: few steps, but more than one tile
    "interpreter": (Tile(32, 32, 32, 4, 1), Tile(64, 64, 64, 4, 1), Tile(64, 128, 64, 4, 1)),
}
# loads that shuffle or convert in registers hold more of them: smaller tiles, no spills
CAREFUL: dict[str, Tile] = {
    **dict.fromkeys(("hopper", "blackwell", "ampere", "cdna"), Tile(64, 64, 32, 4, 2, 2)),
    "ada": Tile(64, 64, 32, 4, 2, 2),
    "interpreter": Tile(64, 64, 64, 4, 1),
}


SHARED_BYTES = {
    "hopper": 224 << 10,
    "blackwell": 224 << 10,
    "ampere": 160 << 10,
    "ada": 96 << 10,
    "cdna": 64 << 10,
    "interpreter": 64 << 10,
}


def kind_of(capability: tuple[int, int], amd: bool = False) -> str:
    """Row of the table for a device of this compute capability, at least (8, 0)."""
    if amd:
        return "cdna"
    major, minor = capability
    if major in (9, 10):
        return "hopper" if major == 9 else "blackwell"
    return "ampere" if (major, minor) == (8, 0) else "ada"  # 8.6, 8.9 and 12.x hold 99 KiB


def has_tensor_maps(kind: str) -> bool:
    """Whether the copy engine of descriptors (TMA) is there and pays."""
    return kind in ("hopper", "blackwell")


def fold_tile(kind: str, problem: Problem, *, parts: int = 1, careful: bool = False, heavy: bool = False) -> Tile:
    """The tile for one request, from its own shape alone: neither its company nor the device's size moves a bit.

    Args:
        kind: row of the table.
        problem: shape and number of items.
        parts: 3 where operands are kept in two 16-bit parts, which fill shared memory twice as fast.
        careful: operands are read element by element.
        heavy: the epilogue names the largest pair or counts, and needs registers.

    >>> fold_tile("hopper", Problem(8192, 8192)).block_n, fold_tile("hopper", Problem(4096, 4096)).block_n
    (256, 128)
    """
    small, medium, large = TABLE[kind]
    widest = max(problem.n, problem.m or 0)
    if careful:
        return CAREFUL[kind]
    if widest <= small.block_m:
        tile = small
    elif heavy or widest <= MEDIUM_SET or _time(problem, large) > _time(problem, medium) / SMALL_RATE:
        tile = medium
    else:
        tile = large
    return tile if parts == 1 else with_two_parts(kind, tile)


def with_two_parts(kind: str, tile: Tile) -> Tile:
    """The tile with as many stages as hold two parts of each operand."""
    stage = 2 * 2 * (tile.block_m + tile.block_n) * tile.block_k  # bytes
    return replace(tile, stages=max(1, min(tile.stages, SHARED_BYTES[kind] // stage)), per_processor=1)


def prepare_block(kind: str, columns: bool) -> tuple[int, int]:
    """Vectors and elements of one step over the input: wide along what is contiguous."""
    if kind == "interpreter":
        return 32, 128
    return (64, 64) if columns else (16, 256)


def lengths_block(kind: str) -> tuple[int, int, int]:
    """Rows, entries of one step and entries of one unit where lengths of rows and columns come from one read."""
    return (16, 32, 64) if kind == "interpreter" else (128, 64, 512)


def programs(tile: Tile, entries: int, processors: int) -> int:
    """Programs of a persistent launch."""
    return max(1, min(entries, processors * tile.per_processor))


def _time(problem: Problem, tile: Tile) -> float:
    """Whole waves of tiles times the work of one."""
    waves = -(-tile_count([problem], tile.block_m, tile.block_n) // PROCESSORS)
    return waves * tile.block_m * tile.block_n

"""Tile and launch numbers of the GPU fold from shapes and device: pure functions, tables as data, nothing is timed.

A tile of ``block_m`` x ``block_n`` pairs walks its vectors in steps of ``block_k`` elements. Larger tiles read less per
product, smaller ones leave fewer processors idle in the last wave. The numbers come from rooflines and from what the
compiler makes of each shape (registers, shared memory, no spills), not from measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orthofast.kernels.schedule import Problem, tile_count

SMALL_RATE = 0.8  # of a 128 x 128 tile's products per second to a 128 x 256 tile's
SMALL_SET = 64  # vectors: up to here one small tile holds all pairs
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


def fold_tile(kind: str, problems: Sequence[Problem], processors: int) -> Tile:
    """The tile for a launch over these problems: the smallest that fits small sets, else the one that ends first.

    >>> fold_tile("hopper", [Problem(8192, 8192)], 132).block_n, fold_tile("hopper", [Problem(4096, 4096)], 132).block_n
    (256, 128)
    """
    small, medium, large = TABLE[kind]
    widest = max((max(p.n, p.m or 0) for p in problems), default=0)
    if widest <= small.block_m:
        return small
    if widest <= MEDIUM_SET or medium == large:
        return medium
    return large if _time(problems, large, processors) <= _time(problems, medium, processors) / SMALL_RATE else medium


def size_class(n: int, m: int | None = None) -> int:
    """0 for sets that one small tile holds, 1 for the rest: the two never share a launch."""
    return 0 if max(n, m or 0) <= SMALL_SET else 1


def programs(tile: Tile, entries: int, processors: int) -> int:
    """Programs of a persistent launch."""
    return max(1, min(entries, processors * tile.per_processor))


def _time(problems: Sequence[Problem], tile: Tile, processors: int) -> float:
    """Whole waves of tiles times the work of one."""
    waves = -(-tile_count(problems, tile.block_m, tile.block_n) // processors)
    return waves * tile.block_m * tile.block_n

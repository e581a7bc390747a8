# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Two versions of the same vectors compared on a GPU: tiles of both cosines side by side, in one launch.

Folded  | |c| - |c'| | and |c - c'| over the pairs i < j of each item, from the fixed work list: one float32 partial of
each per tile, joined in float64 in the order of the list. No atomics, no synchronisation.
Traffic  one read of the input and one write of 16-bit operands, 2 bytes an element (4 for float32), then the tiles.
Memory  these operands, 16 bytes a vector, 8 a tile. Under graph capture call once on these shapes before capturing.
Accuracy  vectors are scaled by a power of two; 16- and 8-bit values are then exact in float16 but for entries below
2**-22 of the vector's largest, float32 is kept in two parts, 22 bits; products and tiles in float32.
Refuses  float64, and what the fold's Triton backend refuses.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from orthofast.kernels import tiles, triton_gpu
from orthofast.kernels.contract import Request
from orthofast.kernels.schedule import Problem, work_list
from orthofast.kernels.tiles import Tile
from orthofast.kernels.triton_lists import DeviceLists
from orthofast.kernels.triton_parts import NONFINITE, ZERO, added, cosines_of, prepared
from orthofast.records import DriftStats

# two accumulators and twice the operands of a fold: 192 KiB of shared memory where there are 227, little elsewhere
WIDE = {1: Tile(128, 128, 64, 8, 3), 2: Tile(128, 128, 32, 8, 3)}
NARROW = {1: Tile(64, 64, 32, 4, 3, 2), 2: Tile(64, 64, 16, 8, 2, 1)}
INTERPRETED = Tile(32, 32, 32, 4, 1)
_LISTS = DeviceLists()


@triton.jit
def compare(
    high_x,
    low_x,
    factors_x,
    high_y,
    low_y,
    factors_y,
    work,
    partials,
    total,
    n,
    width,
    PARTS_X: tl.constexpr,
    PARTS_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles of the work list, by turns: ``partials`` (2, total), of | |c| - |c'| | and |c - c'|."""
    for entry in range(tl.program_id(0), total, tl.num_programs(0)):
        item = tl.load(work + 2 * entry).to(tl.int64)
        packed = tl.load(work + 2 * entry + 1)
        rows = (packed & 0xFFFF) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (packed >> 16) * BLOCK_N + tl.arange(0, BLOCK_N)
        start = item * n * width
        old = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        new = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            entries = k + tl.arange(0, BLOCK_K)
            x, x_low, y, y_low = high_x + start, low_x + start, high_y + start, low_y + start
            old = added(x, x_low, x, x_low, rows, columns, entries, n, n, width, old, PARTS_X)
            new = added(y, y_low, y, y_low, rows, columns, entries, n, n, width, new, PARTS_Y)
        x_factors, y_factors = factors_x + item * n, factors_y + item * n
        old = cosines_of(old, x_factors, x_factors, rows, columns, n, n)
        new = cosines_of(new, y_factors, y_factors, rows, columns, n, n)
        pair = rows[:, None] < columns[None, :]
        unsigned = tl.where(pair, tl.abs(tl.abs(old) - tl.abs(new)), 0.0)
        signed = tl.where(pair, tl.abs(old - new), 0.0)
        tl.store(partials + entry, tl.sum(tl.sum(unsigned, 1), 0))
        tl.store(partials + total + entry, tl.sum(tl.sum(signed, 1), 0))


def supports(before: Request, after: Request) -> str | None:
    """None for float32 and narrower where the fold's Triton backend serves both."""
    if before.precision == "float64":
        return "float64 has no tensor-core product; the reference compares it"
    return triton_gpu.supports(before) or triton_gpu.supports(after)


def drift_stats(before: Request, after: Request) -> DriftStats:
    """Compare two requests of equal shape on one device."""
    x, y = before.x, after.x
    b, n, d = x.shape
    device = x.device
    guard: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        parts = (_parts(x), _parts(y))
        tile, processors = _tile(device, max(parts))
        width = -(-d // tile.block_k) * tile.block_k
        sides = [prepared(v, count, width) for v, count in zip((x, y), parts, strict=True)]
        marks = sides[0][3] | sides[1][3]  # (b, n)
        bad = (marks & NONFINITE != 0).sum(1)
        left_out = marks & ZERO != 0
        zero = left_out.sum(1)
        kept = n - zero
        for _, _, factors, _ in sides:
            factors.masked_fill_(left_out, 0.0)  # a vector left out has cosine 0 in both versions
        sums = torch.zeros(2, b, dtype=torch.float64, device=device)
        entries = _work(n, d, b, tile, device) if b and n > 1 and d else None
        if entries is not None:
            total = len(entries)
            partials = torch.empty(2, total, dtype=torch.float32, device=device)
            compare[(tiles.programs(tile, total, processors),)](
                *sides[0][:3],
                *sides[1][:3],
                entries,
                partials,
                total,
                n,
                width,
                PARTS_X=parts[0],
                PARTS_Y=parts[1],
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            # equal items, one after another: a segment of equal length each
            sums = partials.view(2, b, -1).to(torch.float64).sum(2)
    sums.masked_fill_(bad > 0, float("nan"))
    return DriftStats(pairs=kept * (kept - 1) // 2, zero=zero, nonfinite=bad, abs_change=sums[0], change=sums[1])


def _parts(x: Tensor) -> int:
    return 2 if x.dtype == torch.float32 else 1


def _tile(device: torch.device, parts: int) -> tuple[Tile, int]:
    """The tile for operands in so many parts, and the device's processors."""
    if device.type == "cpu":
        return INTERPRETED, 2
    properties = torch.cuda.get_device_properties(device)
    kind = tiles.kind_of(torch.cuda.get_device_capability(device), torch.version.hip is not None)
    table = WIDE if kind in ("hopper", "blackwell") else NARROW
    return table[parts], properties.multi_processor_count


def _work(n: int, d: int, b: int, tile: Tile, device: torch.device) -> Tensor:
    """The work list on the device, (entries, 2) int32; kept for shapes that come again."""

    def make() -> NDArray[np.int32]:
        return work_list((Problem(n, d, items=b),), tile.block_m, tile.block_n).entries

    return _LISTS.get(device, (n, d, b, tile), make)

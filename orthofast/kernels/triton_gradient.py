# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Sums over pairs of a curve of the cosine with their gradients on a GPU: products on the tensor cores, twice.

First   tiles of cosines from the fixed work list: the curve summed, one float32 partial a tile, joined in float64 in
        the order of the list; its derivative f'(c) written as float16, with its mirror, into the slopes S (n, n).
Second  G = S U by the library, float32 sums, for unit vectors u_i; then (G_i - (G_i . u_i) u_i) / |w_i|.

Work  1.5 b*n*n*d multiply-adds, 2 b*n*n*d where S comes in panels of rows; 3 b*n*m*d between two sets.
Memory  S or a panel of it, up to SLOPE_BYTES; operands of 2 bytes an element (4 for float32), as much again for the
unit vectors at hand, the gradients and one panel of them. No atomics, no synchronisation; under graph capture call once
on these shapes before capturing.
Accuracy  operands of the first products are those of triton_parts: exact from 16 and 8 bits, 22 bits of float32. The
slopes of |c| are exact. Unit vectors of the second are rounded to float16, 11 bits, which 16-bit weights cannot tell;
those of float32 are kept in two parts, 22 bits, at three and two products for one.
Refuses  float64, AMD, curves whose slopes float16 would round for float32 vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from orthofast.kernels import tiles
from orthofast.kernels.contract import FLOAT8, Request
from orthofast.kernels.gradients import ABS, Curve, PairGradient
from orthofast.kernels.schedule import tiles_of
from orthofast.kernels.tiles import Tile
from orthofast.kernels.triton_lists import DeviceLists
from orthofast.kernels.triton_parts import NONFINITE, ZERO, added, cosines_of, prepared

SLOPE_BYTES = 256 << 20  # of slopes held at a time: all pairs of 11585 vectors
STEP_ELEMENTS = 16 << 20  # of elementwise work at a time: 64 MiB of float32
UNIT_SCALE = 256.0  # keeps small entries of unit vectors in the normal range of float16
# square tiles: a mirror is a tile of the same grid. 227 KiB of shared memory, and 99 or more
WIDE = {1: Tile(128, 128, 64, 8, 4), 2: Tile(128, 128, 64, 8, 3)}
NARROW = {1: Tile(128, 128, 32, 8, 3), 2: Tile(64, 64, 32, 8, 2, 2)}
INTERPRETED = Tile(32, 32, 32, 4, 1)
KINDS = {"abs": 0, "huber": 1, "sqrt": 2}
_LISTS = DeviceLists()
SMOOTH_SMALL, SMOOTH_ROOT = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def bent(c, bend, KIND: tl.constexpr):
    """The curve of each cosine and its derivative, both 0 at 0."""
    size = tl.abs(c)
    if KIND == SMOOTH_SMALL:
        inside = tl.minimum(size, bend)
        value = size - inside + inside * inside * (0.5 / bend)
        slope = tl.minimum(tl.maximum(c / bend, -1.0), 1.0)
    elif KIND == SMOOTH_ROOT:
        length = tl.sqrt(c * c + bend * bend)
        value = c * c / (length + bend)  # not length - bend, which cancels
        slope = c / length
    else:
        value = size
        slope = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
    return value, slope


@triton.jit(do_not_specialize=["first_item", "first_row", "total"])
def derive(
    high_x,
    low_x,
    factors_x,
    high_y,
    low_y,
    factors_y,
    work,
    slopes,
    partials,
    first_item,
    first_row,
    total,
    n,
    m,
    rows_held,
    stride,
    width,
    bend,
    PARTS: tl.constexpr,
    CROSS: tl.constexpr,
    MIRROR: tl.constexpr,  # the list holds the tiles on and right of the diagonal only
    SLOPES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles of the work list, by turns: a partial sum of the curve each, and slopes (items, rows_held, stride)."""
    for entry in range(tl.program_id(0), total, tl.num_programs(0)):
        held = tl.load(work + 2 * entry).to(tl.int64)
        packed = tl.load(work + 2 * entry + 1)
        row, column = packed & 0xFFFF, packed >> 16
        at = row * BLOCK_M + tl.arange(0, BLOCK_M)  # within the panel
        i = first_row + at
        j = column * BLOCK_N + tl.arange(0, BLOCK_N)
        item = first_item + held
        left_high, right_high = high_x + item * n * width, high_y + item * m * width
        left_low, right_low = low_x + item * n * width, low_y + item * m * width
        c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            entries = k + tl.arange(0, BLOCK_K)
            c = added(left_high, left_low, right_high, right_low, i, j, entries, n, m, width, c, PARTS)
        c = cosines_of(c, factors_x + item * n, factors_y + item * m, i, j, n, m)
        there = (i < n)[:, None] & (j < m)[None, :]
        if not CROSS:
            # the diagonal's part is along u_i and drops out, but its rounding would stay
            there = there & (i[:, None] != j[None, :])
        c = tl.where(there, c, 0.0)  # a select, for what lies outside may be NaN
        value, slope = bent(c, bend, KIND)
        if not CROSS:
            value = tl.where(i[:, None] < j[None, :], value, 0.0)
        tl.store(partials + entry, tl.sum(tl.sum(value, 1), 0))
        if SLOPES:
            out = slopes + held * rows_held * stride
            slope = slope.to(tl.float16)
            target = out + at.to(tl.int64)[:, None] * stride + j[None, :]
            tl.store(target, slope, mask=(at < rows_held)[:, None] & (j < m)[None, :])
            if MIRROR:  # noqa: SIM102  known when compiled
                if row != column:
                    target = out + j.to(tl.int64)[:, None] * stride + at[None, :]
                    tl.store(target, tl.trans(slope), mask=(j < m)[:, None] & (at < rows_held)[None, :])


def problem(request: Request, curve: Curve) -> str | None:
    """None where the tensor cores serve this curve on the devices of the fold's Triton backend."""
    if request.precision == "float64":
        return "float64 has no tensor-core product"
    if not request.normalize:
        return "only cosines have this gradient"
    if torch.version.hip is not None:
        return "the library has no product of float16 with float32 result on AMD"
    if curve.kind not in KINDS:
        return f"the kernel has no curve {curve.kind!r}"
    if curve.kind != "abs" and parts_of(request) == 2:
        return f"slopes of {curve.kind!r} would be rounded to float16"
    return None


@dataclass(slots=True, eq=False)
class _Side:
    """One set of vectors as the kernels read it."""

    high: Tensor  # (b, n, width) float16
    low: Tensor
    factors: Tensor  # (b, n) float32, 1 / length of the scaled vectors
    scale: Tensor  # (b, n) float32, the powers of two
    marks: Tensor  # (b, n) int32
    parts: int

    def units(self, rows: slice) -> Tensor:
        """Unit vectors (rows, width) float32, of all items one after another."""
        made = self.high.flatten(0, 1)[rows].float()
        if self.parts == 2:
            made += self.low.flatten(0, 1)[rows]
        return made.mul_(self.factors.view(-1, 1)[rows])

    def halves(self, items: slice, d: int) -> list[Tensor]:
        """Unit vectors times UNIT_SCALE in float16 parts, (items, n, d) each."""
        _, n, width = self.high.shape
        shape = (items.stop - items.start, n, width)
        made = [torch.empty(shape, dtype=torch.float16, device=self.high.device) for _ in range(self.parts)]
        for rows in _steps(shape[0] * n, width):
            scaled = self.units(slice(items.start * n + rows.start, items.start * n + rows.stop)).mul_(UNIT_SCALE)
            high = made[0].flatten(0, 1)[rows]
            high.copy_(scaled)
            if self.parts == 2:
                made[1].flatten(0, 1)[rows] = scaled.sub_(high)
        return [half[..., :d] for half in made]

    def finish(self, items: slice, sums: Tensor) -> None:
        """From gradients by the unit vectors, times UNIT_SCALE, to gradients by the vectors; (b, n, d), in place."""
        _, n, d = sums.shape
        for rows in _steps((items.stop - items.start) * n, d):
            here = slice(items.start * n + rows.start, items.start * n + rows.stop)
            units, out = self.units(here)[:, :d], sums.flatten(0, 1)[here]
            out.mul_(1 / UNIT_SCALE)
            radial = (out * units).sum(1, keepdim=True)
            out.addcmul_(units, radial, value=-1)
            for part in (self.factors, self.scale):  # their product, 1 / length, may overflow where its use does not
                out.mul_(part.view(-1, 1)[here])


def _steps(rows: int, width: int) -> list[slice]:
    step = max(1, STEP_ELEMENTS // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def abs_gradient(
    request: Request, tile: Tile, processors: int, curve: Curve = ABS, *, gradient: bool = True
) -> PairGradient:
    """Sum a curve of the cosines of a request without a ``problem``, with its gradient or without.

    Args:
        request: checked, on the current device.
        tile: from ``tile_for``.
        processors: of the device.
        curve: what is summed of each cosine.
        gradient: whether gradients are made too.
    """
    x, y = request.x, request.y
    b, n, d = x.shape
    device = x.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        parts = parts_of(request)
        left = _side(x, parts, tile)
        right = left if y is None else _side(y, parts, tile)
        total = torch.zeros(b, dtype=torch.float64, device=device)
        dx = torch.zeros(x.shape, dtype=torch.float32, device=device) if gradient else None
        dy = None if y is None or not gradient else torch.zeros(y.shape, dtype=torch.float32, device=device)
        m = right.high.shape[1]
        if b and n and m and d:
            for items in _chunks(b, n, m):
                total[items] = _chunk(items, left, right, tile, processors, curve, dx, dy)
        kept = (left.marks & ZERO == 0).sum(1)
        bad = (left.marks & NONFINITE).sum(1) > 0
        if y is None:
            pairs = kept * (kept - 1) // 2
        else:
            pairs = kept * (right.marks & ZERO == 0).sum(1)
            bad |= (right.marks & NONFINITE).sum(1) > 0
        for made in (dx, dy):
            if made is not None:
                made.masked_fill_(bad.view(b, 1, 1), float("nan"))
        return PairGradient(pairs, total.masked_fill_(bad, float("nan")), dx, dy)


def parts_of(request: Request) -> int:
    """In how many float16 parts vectors are kept."""
    return 2 if torch.float32 in (request.x.dtype, request.x.dtype if request.y is None else request.y.dtype) else 1


def tile_for(kind: str, parts: int) -> Tile:
    """The tile on a device of this kind."""
    if kind == "interpreter":
        return INTERPRETED
    return (WIDE if kind in ("hopper", "blackwell") else NARROW)[parts]


def _side(x: Tensor, parts: int, tile: Tile) -> _Side:
    x = x.to(torch.float16) if x.dtype in FLOAT8 else x  # exact
    high, low, factors, marks = prepared(x, parts, -(-x.shape[2] // tile.block_k) * tile.block_k)
    if x.shape[2]:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=2, dtype=torch.float32)
    else:
        largest = torch.zeros(x.shape[:2], device=x.device)
    power = (9 - torch.frexp(largest).exponent).clamp_(-126, 126)  # as scale_power of the kernels
    scale = ((power + 127) << 23).view(torch.float32)  # by its bits: a library's power may round
    return _Side(high, low, factors, scale, marks, parts)


def _stride(m: int) -> int:
    return -(-m // 16) * 16


def _chunks(b: int, n: int, m: int) -> list[slice]:
    """Items whose slopes fit together; single ones where one item's do not."""
    together = max(1, SLOPE_BYTES // (2 * n * _stride(m)))
    return [slice(start, min(start + together, b)) for start in range(0, b, together)]


def _chunk(
    items: slice,
    left: _Side,
    right: _Side,
    tile: Tile,
    processors: int,
    curve: Curve,
    dx: Tensor | None,
    dy: Tensor | None,
) -> Tensor:
    """Sums of some items, (items,) float64, and their gradients written where they belong."""
    cross = left is not right
    count, (n, m), device = items.stop - items.start, (left.high.shape[1], right.high.shape[1]), left.high.device
    stride = _stride(m)
    height = n
    if 2 * count * n * stride > SLOPE_BYTES and dx is not None:
        height = min(n, max(1, SLOPE_BYTES // (2 * stride * tile.block_m)) * tile.block_m)
    mirror = not cross and height == n
    slopes = torch.empty(count if dx is not None else 0, height, stride, dtype=torch.float16, device=device)
    own = [] if dx is None or (cross and dy is None) else left.halves(items, dx.shape[2])
    others = own if dx is None or not cross else right.halves(items, dx.shape[2])
    total = torch.zeros(count, dtype=torch.float64, device=device)
    for start in range(0, n, height):
        rows = min(height, n - start)
        work = _work(rows, m, count, mirror, tile, device)
        partials = torch.empty(len(work), dtype=torch.float32, device=device)
        derive[(tiles.programs(tile, len(work), processors),)](
            left.high, left.low, left.factors, right.high, right.low, right.factors,
            work, slopes, partials, items.start, start, len(work), n, m, rows, stride, left.high.shape[2], curve.width,
            PARTS=left.parts,
            CROSS=cross,
            MIRROR=mirror,
            SLOPES=dx is not None,
            KIND=KINDS[curve.kind],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        # equal items, one after another: a segment of equal length each
        total += partials.view(count, -1).to(torch.float64).sum(1)
        if dx is None:
            continue
        panel = slopes.view(-1)[: count * rows * stride].view(count, rows, stride)[..., :m]
        dx[items, start : start + rows] = _product(panel, others)
        if dy is not None:
            dy[items].add_(_product(panel.mT, [half[:, start : start + rows] for half in own]))
    for side, made in ((left, dx), (right, dy)):
        if made is not None:
            side.finish(items, made)
    return total


def _product(slopes: Tensor, halves: list[Tensor]) -> Tensor:
    """Slopes times the sum of the parts, float16 products summed in float32."""
    made: list[Tensor] = []
    for half in reversed(halves):
        if slopes.device.type == "cuda":
            made.append(torch.bmm(slopes, half, out_dtype=torch.float32))
        else:
            made.append(torch.bmm(slopes.float(), half.float()))
    return made[0] if len(made) == 1 else made[0].add_(made[1])


def _work(rows: int, m: int, items: int, triangle: bool, tile: Tile, device: torch.device) -> Tensor:
    """Tiles of each item on the device, (entries, 2) int32; kept for shapes that come again."""
    key = rows, m, items, triangle, tile
    return _LISTS.get(device, key, lambda: _entries(*key))


def _entries(rows: int, m: int, items: int, triangle: bool, tile: Tile) -> NDArray[np.int32]:
    packed = tiles_of(rows, m, tile.block_m, tile.block_n)
    if triangle:  # with the diagonal's last tile, which holds no pair but must be written
        packed = packed[packed >> 16 >= packed & 0xFFFF]
    entries = np.empty((items, len(packed), 2), np.int32)
    entries[:, :, 0], entries[:, :, 1] = np.arange(items)[:, None], packed
    return entries.reshape(-1, 2)

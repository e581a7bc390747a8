# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Triton fold of block-scaled float8: tiles of 128 x 128 pairs straight from the stored bytes, no dequantised copy.

A tile's rows and columns lie in one block row each, so every step of 128 elements has a single factor, the product of
two: the step's products are summed by the tensor cores and promoted to the float32 total with that factor.

Work  b*n*(n+1)/2*d multiply-adds, dense.  Traffic  the stored bytes, once for the lengths, then the tiles.
Memory  20 bytes a vector, 12 a tile.
Accuracy  8-bit values become float16 as they are loaded, all of them exactly, and their products are exact in float32.
With precision "high" 8-bit rows are multiplied natively: Hopper keeps about 13 bits of such sums, so that each
step is cut by up to 2**-13 of itself, and ``floor`` says so. Vectors whose only entries lie in blocks scaled 2**-60
below the largest factor of their block row lose them.
Refuses  blocks whose sides are no multiples of 128, raw products, fields that need more than sums, and devices that
do not convert 8-bit floats by themselves (before compute capability 8.9, AMD).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from orthofast.kernels.contract import ABS_SUM, SQ_SUM, SUM, Request, poison
from orthofast.kernels.schedule import Problem, work_list
from orthofast.kernels.triton_lists import DeviceLists
from orthofast.records import GramStats
from orthofast.views import BlockScaled

SIDE = 128  # vectors of a tile, and elements of a step: a block of the format
WARPS = 8
# elements converted at a time, and stages of the pipeline: more of either spills registers
WARPGROUP_STEP, WARP_STEP = (64, 3), (32, 2)  # tensor cores fed from shared memory (9.x, 10.x), or from registers
VECTORS = 64  # of one program that measures lengths
NATIVE_FLOOR = 2.0**-13  # of one step's sum where 8-bit products are added natively
MOST_POWER = 126  # a power of two and its inverse are normal float32 numbers
SUMS = ABS_SUM | SQ_SUM | SUM
CONVERTED = (torch.float8_e4m3fn, torch.float8_e5m2)  # to float16 by devices from compute capability 8.9 on
_LISTS = DeviceLists()

_ABS_SUM, _SQ_SUM, _SUM = tl.constexpr(ABS_SUM), tl.constexpr(SQ_SUM), tl.constexpr(SUM)
BLOCK = tl.constexpr(SIDE)


@triton.jit
def tile_of(x, first, row, k, n, d, stride_n, stride_d, ROWS: tl.constexpr, ELEMENTS: tl.constexpr):
    """(ROWS, ELEMENTS) stored elements from vector ``row`` and element ``k`` on, zero bytes outside."""
    rows = row + tl.arange(0, ROWS)
    elements = k + tl.arange(0, ELEMENTS)
    at = first + rows.to(tl.int64)[:, None] * stride_n + elements.to(tl.int64)[None, :] * stride_d
    return tl.load(x + at, mask=(rows < n)[:, None] & (elements < d)[None, :], other=0.0)


@triton.jit
def lengths(
    x, scale, norm_sq, n, d, stride_b, stride_n, stride_d, scale_b, scale_n, scale_d,
    ALONG_ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Squared lengths of the scaled vectors, (b, n) float64: in float32 within a step, in float64 between steps."""
    item = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS
    total = tl.zeros([ROWS], tl.float64)
    unit_n = stride_n if ALONG_ROWS else 1
    unit_d = 1 if ALONG_ROWS else stride_d
    for k in range(0, d, BLOCK):
        stored = tile_of(x, item * stride_b, row, k, n, d, unit_n, unit_d, ROWS, BLOCK)
        value = stored.to(tl.float16).to(tl.float32)
        factor = tl.load(scale + item * scale_b + (row // HEIGHT) * scale_n + (k // WIDTH) * scale_d).to(tl.float64)
        total += tl.sum(value * value, 1).to(tl.float64) * factor * factor
    rows = row + tl.arange(0, ROWS)
    tl.store(norm_sq + item * n + rows, total, mask=rows < n)


@triton.jit
def fold(
    x, y, scale_x, scale_y, inverse_x, inverse_y, work, partials, entries, n, m, d,
    stride_bx, stride_nx, stride_dx, stride_by, stride_ny, stride_dy,
    scale_bx, scale_nx, scale_dx, scale_by, scale_ny, scale_dy,
    ROWS_X: tl.constexpr, ROWS_Y: tl.constexpr, CROSS: tl.constexpr, WANT: tl.constexpr,
    HEIGHT_X: tl.constexpr, WIDTH_X: tl.constexpr, HEIGHT_Y: tl.constexpr, WIDTH_Y: tl.constexpr,
    NATIVE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Partial sums (3, entries) float32 of |cos|, cos^2 and cos over the pairs of each entry of the work list."""
    unit_nx = stride_nx if ROWS_X else 1
    unit_dx = 1 if ROWS_X else stride_dx
    unit_ny = stride_ny if ROWS_Y else 1
    unit_dy = 1 if ROWS_Y else stride_dy
    for entry in range(tl.program_id(0), entries, tl.num_programs(0)):
        item = tl.load(work + 2 * entry).to(tl.int64)
        word = tl.load(work + 2 * entry + 1)
        row = (word & 0xFFFF) * BLOCK
        column = (word >> 16) * BLOCK
        factors_x = scale_x + item * scale_bx + (row // HEIGHT_X) * scale_nx
        factors_y = scale_y + item * scale_by + (column // HEIGHT_Y) * scale_ny
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(0, d, BLOCK):
            factor = tl.load(factors_x + (k // WIDTH_X) * scale_dx) * tl.load(factors_y + (k // WIDTH_Y) * scale_dy)
            step = tl.zeros([BLOCK, BLOCK], tl.float32)
            for part in tl.static_range(BLOCK // STEP):
                left = tile_of(x, item * stride_bx, row, k + part * STEP, n, d, unit_nx, unit_dx, BLOCK, STEP)
                right = tile_of(y, item * stride_by, column, k + part * STEP, m, d, unit_ny, unit_dy, BLOCK, STEP)
                if NATIVE:
                    step = tl.dot(left, tl.trans(right), step)
                else:
                    step = tl.dot(left.to(tl.float16), tl.trans(right.to(tl.float16)), step)
            total += step * factor
        rows = row + tl.arange(0, BLOCK)
        columns = column + tl.arange(0, BLOCK)
        by_row = tl.load(inverse_x + item * n + rows, mask=rows < n, other=0.0)
        by_column = tl.load(inverse_y + item * m + columns, mask=columns < m, other=0.0)
        cosines = total * by_column[None, :] * by_row[:, None]
        if not CROSS:
            cosines = tl.where(columns[None, :] > rows[:, None], cosines, 0.0)
        if _ABS_SUM & WANT:
            tl.store(partials + entry, tl.sum(tl.sum(tl.abs(cosines), 1), 0))
        if _SQ_SUM & WANT:
            tl.store(partials + entries + entry, tl.sum(tl.sum(cosines * cosines, 1), 0))
        if _SUM & WANT:
            tl.store(partials + 2 * entries + entry, tl.sum(tl.sum(cosines, 1), 0))


def problem(x: BlockScaled, y: BlockScaled | None, request: Request) -> str | None:
    """None if this kernel folds what ``request`` asks of these (b, n, d) matrices, else the sentence why not."""
    sides = [x] if y is None else [x, y]
    if not request.normalize or request.precision == "float64" or request.want & ~SUMS:
        return "the block-scaled kernel sums cosines, their squares and absolute values, in float32"
    for side in sides:
        if any(length % SIDE for length in side.block):
            return f"the block-scaled kernel needs blocks of multiples of {SIDE}, got {side.block}"
        if side.data.dtype != x.data.dtype:
            return f"the block-scaled kernel needs one dtype on both sides, got {x.data.dtype} and {side.data.dtype}"
        if 1 not in side.data.stride()[1:]:
            return f"the block-scaled kernel needs rows or columns in one piece, got strides {side.data.stride()}"
    if x.data.dtype not in CONVERTED:
        return f"the block-scaled kernel reads float8_e4m3fn and float8_e5m2, got {x.data.dtype}"
    if not min(x.shape[0], x.shape[2]):
        return "the block-scaled kernel needs at least one item and one element"
    if x.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 9)):
        return "the block-scaled kernel needs compute capability 8.9 or newer, which converts 8-bit floats by itself"
    return None


def step_of(device: torch.device) -> tuple[int, int]:
    """Elements converted at a time, and pipeline stages."""
    if device.type == "cpu":
        return SIDE, 1
    return WARPGROUP_STEP if torch.cuda.get_device_capability(device)[0] in (9, 10) else WARP_STEP


def gram_stats(x: BlockScaled, y: BlockScaled | None, request: Request, processors: int) -> GramStats:
    """Fold matrices that :func:`problem` has nothing against, on the current stream of the current device.

    Args:
        x: (b, n, d).
        y: (b, m, d), or None.
        request: what is asked; its tensors are not read.
        processors: multiprocessors of the device.
    """
    b, n, d = x.shape
    other = x if y is None else y
    m = other.shape[1]
    # tensor cores take 8-bit operands along rows only
    native = request.precision == "high" and x.data.stride(2) == other.data.stride(2) == 1
    norm_x, inverse_x, factors_x = _measured(x)
    norm_y, inverse_y, factors_y = (norm_x, inverse_x, factors_x) if y is None else _measured(y)
    made = work_list((Problem(n, d, None if y is None else m, items=b),), SIDE, SIDE)
    entries = _on_device(x.device, b, n, d, None if y is None else m)
    partials = torch.empty((3, len(made)), dtype=torch.float32, device=x.device)
    step, stages = step_of(x.device)
    if len(made):
        rows_x, rows_y = (side.data.stride(2) == 1 for side in (x, other))
        fold[(min(len(made), processors),)](
            x.data, other.data, factors_x, factors_y, inverse_x, inverse_y, entries, partials,
            len(made), n, m, d, *x.data.stride(), *other.data.stride(), *factors_x.stride(), *factors_y.stride(),
            ROWS_X=rows_x,
            ROWS_Y=rows_y,
            CROSS=y is not None,
            WANT=request.want,
            HEIGHT_X=x.block[0],
            WIDTH_X=x.block[1],
            HEIGHT_Y=other.block[0],
            WIDTH_Y=other.block[1],
            NATIVE=native,
            STEP=step,
            num_warps=WARPS,
            num_stages=stages,
        )  # fmt: skip
    sums = partials.view(3, b, -1).sum(2, dtype=torch.float64)
    norms = [norm_x] if y is None else [norm_x, norm_y]
    zeros = torch.stack([(side == 0).sum(1) for side in norms])
    left = n - zeros[0]
    record = GramStats(
        pairs=left * (left - 1) // 2 if y is None else left * (m - zeros[1]),
        zero=zeros.sum(0),
        nonfinite=torch.stack([(~side.isfinite()).sum(1) for side in norms]).sum(0),
        norm_sq=norm_x,
        norm_sq_y=None if y is None else norm_y,
        floor=torch.full((b,), NATIVE_FLOOR if native else 0.0, dtype=torch.float64, device=x.device),
        cross=y is not None,
    )
    for row, (bit, name) in enumerate(((ABS_SUM, "abs_sum"), (SQ_SUM, "sq_sum"), (SUM, "sum"))):
        if request.want & bit:
            setattr(record, name, sums[row])
    return poison(record)


def _measured(x: BlockScaled) -> tuple[Tensor, Tensor, Tensor]:
    """Squared lengths (b, n) float64, reciprocal lengths float32 of vectors under relative factors, these factors.

    A block row's factors are divided by a power of two, which no cosine sees, so that the largest is near 1.
    """
    b, n, d = x.shape
    factors = x.scale.to(torch.float32)
    largest = factors.abs().amax(2, keepdim=True)
    power = torch.frexp(torch.where(largest.isfinite(), largest, 0.0))[1].clamp(-MOST_POWER, MOST_POWER)
    factors = torch.ldexp(factors, -power).contiguous()
    relative = torch.empty((b, n), dtype=torch.float64, device=x.device)
    if n:
        lengths[(triton.cdiv(n, VECTORS), b)](
            x.data, factors, relative, n, d, *x.data.stride(), *factors.stride(),
            ALONG_ROWS=x.data.stride(2) == 1,
            HEIGHT=x.block[0],
            WIDTH=x.block[1],
            ROWS=VECTORS,
            num_warps=4,
        )  # fmt: skip
    inverse = torch.where(relative == 0, 0.0, relative.rsqrt()).to(torch.float32)
    powers = power.squeeze(2).repeat_interleave(x.block[0], dim=1)[:, :n].to(torch.float64)
    return torch.ldexp(relative, 2 * powers), inverse, factors


def _on_device(device: torch.device, b: int, n: int, d: int, m: int | None) -> Tensor:
    """The work list, copied once per shape and device."""

    def make() -> NDArray[np.int32]:
        return work_list((Problem(n, d, m, items=b),), SIDE, SIDE).entries

    return _LISTS.get(device, (b, n, d, m), make)

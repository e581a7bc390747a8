# mypy: disable-error-code="misc, no-untyped-call, no-untyped-def, untyped-decorator, unused-ignore"
"""Vectors as float16 operands in one part or two, scaled by powers of two, and a step of their products.

16- and 8-bit values are exact in one part but for entries below 2**-22 of the vector's largest; float32 values keep 22
bits in two. One read of the input, one write of 2 bytes an element and part; 8 bytes a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthofast.kernels.contract import FLOAT8
from orthofast.kernels.triton_access import power_of_two, scale_power

STEP = 1024  # elements of a vector read at a time
ZERO, NONFINITE = 1, 2  # marks of a vector
NEVER_FINITE = tl.constexpr(0x7F800000)  # bits of the smallest float32 that is Inf or NaN
MARK_ZERO, MARK_NONFINITE = tl.constexpr(ZERO), tl.constexpr(NONFINITE)


@triton.jit
def prepare(
    x,
    high,
    low,
    factors,
    marks,
    n,
    d,
    width,
    stride_b,
    stride_n,
    stride_d,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One vector: its mark, 1 / length after scaling, and its entries in float16 parts, zeros up to ``width``."""
    vector = tl.program_id(0)
    item, row = (vector // n).to(tl.int64), (vector % n).to(tl.int64)
    source = x + item * stride_b + row * stride_n
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for start in range(0, d, BLOCK):
        inside = start + at < d
        value = tl.load(source + (start + at).to(tl.int64) * stride_d, mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # NaN ranks above all
    largest = tl.max(most, 0)
    scale = power_of_two(scale_power(largest.to(tl.float32, bitcast=True)))
    squares = tl.zeros([BLOCK], tl.float64)
    target = vector.to(tl.int64) * width
    for start in range(0, width, BLOCK):
        entries = start + at
        value = tl.load(source + entries.to(tl.int64) * stride_d, mask=entries < d, other=0.0).to(tl.float32) * scale
        squares += value.to(tl.float64) * value.to(tl.float64)
        part = value.to(tl.float16)
        tl.store(high + target + entries, part, mask=entries < width)
        if PARTS == 2:
            tl.store(low + target + entries, (value - part.to(tl.float32)).to(tl.float16), mask=entries < width)
    square = tl.sum(squares, 0)
    inverse = tl.where(largest == 0, 0.0, 1.0 / tl.sqrt(tl.where(largest == 0, 1.0, square)))
    tl.store(factors + vector, inverse.to(tl.float32))
    mark = tl.where(largest == 0, MARK_ZERO, tl.where(largest >= NEVER_FINITE, MARK_NONFINITE, 0))
    tl.store(marks + vector, mark)


@triton.jit
def added(high, low, high_y, low_y, rows, columns, entries, n, m, width, total, PARTS: tl.constexpr):
    """total + the products of a step of two blocks of vectors, low parts times low parts left out."""
    at_rows = rows.to(tl.int64)[:, None] * width + entries[None, :]
    at_columns = columns.to(tl.int64)[None, :] * width + entries[:, None]
    row_there, column_there = (rows < n)[:, None], (columns < m)[None, :]
    left = tl.load(high + at_rows, mask=row_there, other=0.0)
    right = tl.load(high_y + at_columns, mask=column_there, other=0.0)
    total = tl.dot(left, right, total)
    if PARTS == 2:
        total = tl.dot(left, tl.load(low_y + at_columns, mask=column_there, other=0.0), total)
        total = tl.dot(tl.load(low + at_rows, mask=row_there, other=0.0), right, total)
    return total


@triton.jit
def cosines_of(products, factors, factors_y, rows, columns, n, m):
    """Products of scaled vectors times 1 / length of both."""
    left = tl.load(factors + rows, mask=rows < n, other=0.0)
    right = tl.load(factors_y + columns, mask=columns < m, other=0.0)
    return products * left[:, None] * right[None, :]


def prepared(x: Tensor, parts: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """High and low parts (b, n, width), 1 / length (b, n) and marks (b, n) of one version."""
    b, n, d = x.shape
    x = x.to(torch.float16) if x.dtype in FLOAT8 else x  # exact
    high = torch.empty(b, n, width, dtype=torch.float16, device=x.device)
    low = torch.empty_like(high) if parts == 2 else high
    factors = torch.empty(b, n, dtype=torch.float32, device=x.device)
    marks = torch.empty(b, n, dtype=torch.int32, device=x.device)
    if b * n:
        prepare[(b * n,)](x, high, low, factors, marks, n, d, width, *x.stride(), PARTS=parts, BLOCK=STEP, num_warps=4)
    return high, low, factors, marks

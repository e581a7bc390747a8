"""4-bit floats looked up in a table of 16 values: bitsandbytes nf4 and fp4, MXFP4 of gpt-oss and others, NVFP4.

A byte holds two values: bitsandbytes puts the first into the high half, the other formats into the low half. A table
of 256 pairs therefore decodes a byte at a time.

MXFP4 (OCP MX v1.0): e2m1 values times 2^(s - 127) per 32: two significant bits, exact in bfloat16, as which they come.
NVFP4: e2m1 times float8 per 16, times one float32 for all: float32. nf4: table value times absolute maximum: float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from orthofast.scan.decoders.contract import Rows, Weight, factors, powers_of_two
from orthofast.scan.decoders.grouping import scale_

BNB, MXFP4, NVFP4 = "bnb_4bit", "mxfp4", "nvfp4"
MX_GROUP, NV_GROUP = 32, 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pairs(table: Tensor, *, high_first: bool) -> Tensor:
    """(256, 2): the two values of every byte."""
    octets = torch.arange(256, device=table.device)
    low, high = table[octets & 15], table[octets >> 4]
    return torch.stack((high, low) if high_first else (low, high), dim=-1)


def look_up(octets: Tensor, pair: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2 n) values."""
    whole = pair.view(torch.int64 if pair.element_size() == 4 else torch.int32).view(-1)  # a pair as one number
    found = whole.index_select(0, octets.reshape(-1).to(torch.int32))
    return found.view(pair.dtype).view(*octets.shape[:-1], 2 * octets.shape[-1])


def mxfp4_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight (..., out, in / 2) or (..., out, in / 32, 16) bytes, scale (..., out, in / 32) exponents."""
    device = parts["weight"].device
    pair = pairs(torch.tensor(E2M1, dtype=torch.bfloat16).to(device), high_first=False)
    powers = powers_of_two(device).to(torch.bfloat16)
    octets = parts["weight"].flatten(-2) if weight.settings.get("blocks") is True else parts["weight"]

    def values(first: int, last: int) -> Tensor:
        scales = powers[parts["scale"][first:last].to(torch.int32)]
        return scale_(look_up(octets[first:last], pair), scales, MX_GROUP)

    return values


def nvfp4_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight (out, in / 2) bytes, scale (out, in / 16) float8, whole (1) float32: a factor, or its inverse."""
    device = parts["weight"].device
    pair = pairs(torch.tensor(E2M1).to(device), high_first=False)
    scales = factors(parts["scale"], weight.parts["scale"])
    whole = parts["whole"].to(torch.float32).reshape(())
    scales = scales / whole if weight.settings["inverse"] is True else scales * whole

    def values(first: int, last: int) -> Tensor:
        return scale_(look_up(parts["weight"][first:last], pair), scales[first:last], NV_GROUP)

    return values


def bnb_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight, the bytes of all values in a row; absmax per block of them; map (16).

    Nested maxima are 8-bit themselves: nested_map[absmax] * nested_absmax[block of these] + offset.
    """
    octets = parts["weight"].reshape(-1).view(torch.uint8)
    pair = pairs(parts["map"].to(torch.float32), high_first=True)
    block = weight.number("blocksize")
    maxima = parts["absmax"].reshape(-1)
    if "nested_absmax" in parts:
        offset = weight.settings["offset"]
        assert isinstance(offset, float)
        looked_up = parts["nested_map"].to(torch.float32)[maxima.to(torch.int64)]
        maxima = scale_(looked_up, parts["nested_absmax"].to(torch.float32), weight.number("nested_blocksize"))
        maxima = maxima + offset
    maxima = maxima.to(torch.float32)
    each = math.prod(weight.shape[1:])

    def values(first: int, last: int) -> Tensor:
        start, stop = first * each, last * each
        block_start = start // block
        lead = block_start * block  # blocks hold an even count: they start with a byte
        wide = look_up(octets[lead // 2 : -(-stop // 2)], pair)
        scale_(wide, maxima[block_start : -(-stop // block)], block)
        return wide[start - lead : stop - lead].reshape(last - first, *weight.shape[1:])

    return values

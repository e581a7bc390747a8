"""Integers of 1 to 8 bits in 32-bit words: GPTQ, AWQ and compressed-tensors' pack-quantized.

    value = (q - z) * s, with z and s per row and group of columns

GPTQ and AWQ store matrices as (in, out) and are decoded so, seen as (out, in). GPTQ packs along ``in``, AWQ along
``out`` in an order of its own, compressed-tensors along ``in`` with the sign as an offset of 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orthofast.scan.decoders.contract import Rows, Weight
from orthofast.scan.decoders.grouping import dequantize_, group_index
from orthofast.scan.decoders.words import unpack, unpack_awq, unpack_down

GPTQ, AWQ, PACKED = "gptq", "awq", "packed"


def gptq_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight (in * bits / 32, out), zero (groups, out * bits / 32), scale (groups, out), index (in).

    Format "gptq_v2" stores z, "gptq" z - 1: taken off whole words, with a borrow where z is 0, and for 3 bits off
    each value (GPTQModel, convert_gptq_v2_to_v1_format_module); it is added back the same way.
    """
    bits, plus = weight.number("bits"), weight.number("plus")
    out, inward = weight.shape
    scales = parts["scale"].to(torch.float32)  # (groups, out)
    words = parts["zero"]
    if 32 % bits == 0:
        words = words + plus * (0xFFFFFFFF // ((1 << bits) - 1))  # a one in every value; wraps around
        plus = 0
    zeros = unpack(words, bits, out).to(torch.int32)  # (groups, out)
    zeros = ((zeros + plus) & ((1 << bits) - 1)).to(torch.float32)
    index = column_groups(weight, parts, scales)

    def values(first: int, last: int) -> Tensor:
        wide = unpack_down(parts["weight"][:, first:last], bits, inward)  # (in, rows)
        wide.sub_(zeros[:, first:last].index_select(0, index)).mul_(scales[:, first:last].index_select(0, index))
        return wide.T

    return values


def awq_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight (in, out / 8), zero (groups, out / 8), scale (groups, out)."""
    scales = parts["scale"].to(torch.float32)  # (groups, out)
    zeros = unpack_awq(parts["zero"]).to(torch.float32) if "zero" in parts else torch.full_like(scales, 8)
    index = column_groups(weight, parts, scales)

    def values(first: int, last: int) -> Tensor:
        start = first // 8
        words = parts["weight"][:, start : -(-last // 8)]
        wide = unpack_awq(words)[:, first - 8 * start : last - 8 * start].to(torch.float32)  # (in, rows)
        wide.sub_(zeros[:, first:last].index_select(0, index)).mul_(scales[:, first:last].index_select(0, index))
        return wide.T

    return values


def column_groups(weight: Weight, parts: Mapping[str, Tensor], scales: Tensor) -> Tensor:
    """(in,) the group of each column of a matrix with scales (groups, out)."""
    width, inward = weight.number("group"), weight.shape[1]
    index = group_index(parts.get("index"), scales.shape[0], width)
    return torch.arange(inward, device=scales.device) // width if index is None else index


def packed_rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Parts: weight (..., out, words), scale (..., out, groups), zero (..., out * bits / 32, groups), index (in)."""
    bits, width, dense = weight.number("bits"), weight.number("group"), weight.settings["dense"] is True
    inward, grid = weight.shape[-1], weight.numbers("grid")
    scales = parts["scale"].to(torch.float32).reshape(grid).expand(*weight.shape[:-1], grid[-1])
    zeros = torch.full_like(scales, 1 << bits - 1)
    if "zero" in parts and parts["zero"].dtype == torch.int32:  # packed along the rows
        packed = unpack(parts["zero"].transpose(-1, -2), bits, weight.shape[-2], dense=dense)
        zeros = packed.transpose(-1, -2).to(torch.float32)
    elif "zero" in parts:
        zeros = zeros + parts["zero"].to(torch.float32).reshape(grid)
    index = group_index(parts.get("index"), grid[-1], width)

    def values(first: int, last: int) -> Tensor:
        wide = unpack(parts["weight"][first:last], bits, inward, dense=dense).to(torch.float32)
        return dequantize_(wide, scales[first:last], zeros[first:last], width, index)

    return values

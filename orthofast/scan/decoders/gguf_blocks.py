"""GGUF's quantised blocks as torch arithmetic that runs where the bytes are: the common types.

Layouts: ggml, ggml-common.h. Blocks of 32 values carry a half-precision scale d, and Q4_1 and Q5_1 a minimum m:
d q + m. Blocks of 256 hold 8 or 16 groups with scales of 4, 6 or 8 bits of their own: (d s) q - (dmin m). All products
are exact in float32 (11 + 8 + 6 bits at most), a minimum is added with one rounding; the order of the operations is
gguf's, so that values agree with it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orthofast.scan.decoders.contract import Rows, Weight
from orthofast.scan.decoders.fourbit import E2M1, look_up, pairs

CODING = "gguf"
LARGE = 256  # values of a K block
LOW_HALVES = 0x0F0F0F0F0F0F0F0F

Decode = Callable[[Tensor], Tensor]  # (blocks, bytes) uint8 -> (blocks, values) float32


def rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Values of a range of the first axis; parts: weight, the bytes of all blocks."""
    size, nbytes, decode = BLOCKS[str(weight.settings["type"])]
    octets = parts["weight"].reshape(-1)
    each = math.prod(weight.shape[1:]) // size * nbytes  # bytes of an index of the first axis

    def values(first: int, last: int) -> Tensor:
        if len(weight.shape) == 1:
            return decode(octets.view(-1, nbytes)).flatten()[first:last]
        blocks = octets[first * each : last * each].view(-1, nbytes)
        return decode(blocks).view(last - first, *weight.shape[1:])

    return values


def _half(blocks: Tensor, at: int) -> Tensor:
    """(blocks, 1) float32 of the half at a byte."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _shifted(octets: Tensor, steps: tuple[int, ...]) -> Tensor:
    """(blocks, parts, width) -> (blocks, parts, steps, width), each part shifted right by each step."""
    return torch.stack([octets >> step for step in steps], dim=-2)  # by one number each: vectorised, unlike a table


def _nibbles(octets: Tensor) -> Tensor:
    """(blocks, 16) -> (blocks, 32): all low halves, then all high ones; eight bytes at a time."""
    words = octets.contiguous().view(torch.int64)
    return torch.cat((words & LOW_HALVES, (words >> 4) & LOW_HALVES), dim=-1).view(torch.uint8)


def _fifth_bits(octets: Tensor) -> Tensor:
    """(blocks, 4) -> (blocks, 32): 16 where the bit is set, the lowest of the first byte first."""
    table = ((torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1).to(torch.uint8) << 4  # (256, 8)
    words = table.to(octets.device).view(torch.int64).view(-1)  # the eight bytes of a byte's bits as one number
    found = words.index_select(0, octets.reshape(-1).to(torch.int32))
    return found.view(torch.uint8).view(-1, 32)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32).mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).to(torch.float32).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).to(torch.float32).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _five(octets: Tensor) -> Tensor:
    """(blocks, 4 + 16): the fifth bits, then the nibbles."""
    return (_nibbles(octets[:, 4:]) | _fifth_bits(octets[:, :4])).to(torch.float32)


def _q5_0(blocks: Tensor) -> Tensor:
    return _five(blocks[:, 2:]).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return _five(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _mxfp4(blocks: Tensor) -> Tensor:
    """Doubled e2m1 values times half a power of two: exponent 255 is 2^128 here, not NaN (ggml-impl.h)."""
    exponents = blocks[:, :1].to(torch.int32)
    tiny = 0x00200000 * (exponents + 1)  # 2^-128 and 2^-127 are subnormal
    half_power = torch.where(exponents < 2, tiny, (exponents - 1) << 23).view(torch.float32)
    table = 2 * torch.tensor(E2M1).to(blocks.device)
    pair = pairs(table, high_first=False)
    values = look_up(blocks[:, 1:], pair).unflatten(-1, (16, 2)).transpose(-1, -2)  # low halves, then high
    decoded: Tensor = values.flatten(-2) * half_power
    return decoded


def _mins(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of Q4_K and Q5_K, (blocks, 8, 1) each: 6-bit numbers in 12 bytes, times d and dmin."""
    low, high, rest = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    scale = torch.cat((low & 63, (rest & 15) | ((low >> 2) & 48)), dim=-1)
    minimum = torch.cat((high & 63, (rest >> 4) | ((high >> 2) & 48)), dim=-1)
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    return (d * scale).unsqueeze(-1), (dmin * minimum).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _mins(blocks, blocks[:, 4:16])
    values = _shifted(blocks[:, 16:].unflatten(-1, (4, 32)), (0, 4)) & 15
    return values.view(-1, 8, 32).to(torch.float32).mul_(scale).sub_(minimum).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _mins(blocks, blocks[:, 4:16])
    low = (_shifted(blocks[:, 48:].unflatten(-1, (4, 32)), (0, 4)) & 15).view(-1, 8, 32)
    high = (_shifted(blocks[:, 16:48].unflatten(-1, (1, 32)), tuple(range(8))) & 1).view(-1, 8, 32)
    return (low | (high << 4)).to(torch.float32).mul_(scale).sub_(minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = (_shifted(blocks[:, :128].unflatten(-1, (2, 64)), (0, 4)) & 15).view(-1, 8, 32)
    high = (_shifted(blocks[:, 128:192].unflatten(-1, (2, 32)), (0, 2, 4, 6)) & 3).view(-1, 8, 32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    values = (low | (high << 4)).to(torch.float32).sub_(32)
    return values.view(-1, 16, 16).mul_(scale.unsqueeze(-1)).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 80) * (blocks[:, :16] & 15)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4)
    values = _shifted(blocks[:, 16:80].unflatten(-1, (2, 32)), (0, 2, 4, 6)) & 3
    wide = values.view(-1, 16, 16).to(torch.float32)
    return wide.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = _shifted(packed[:, :8].unsqueeze(1), (0, 4)).view(-1, 16) & 15
    high = _shifted(packed[:, 8:].unsqueeze(1), (0, 2, 4, 6)).view(-1, 16) & 3
    scale = _half(blocks, 108) * (low | (high << 4)).to(torch.float32).sub_(32)
    values = _shifted(blocks[:, 32:96].unflatten(-1, (2, 32)), (0, 2, 4, 6)) & 3
    third = _shifted(blocks[:, :32].unflatten(-1, (1, 32)), tuple(range(8))) & 1  # set: nothing is taken away
    wide = (values.view(-1, 16, 16) | (third.view(-1, 16, 16) << 2)).to(torch.float32).sub_(4)
    return wide.mul_(scale.unsqueeze(-1)).flatten(1)


# type -> (values of a block, bytes of a block, decoder)
BLOCKS: dict[str, tuple[int, int, Decode]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "MXFP4": (32, 17, _mxfp4),
    "Q2_K": (LARGE, 84, _q2_k),
    "Q3_K": (LARGE, 110, _q3_k),
    "Q4_K": (LARGE, 144, _q4_k),
    "Q5_K": (LARGE, 176, _q5_k),
    "Q6_K": (LARGE, 210, _q6_k),
}

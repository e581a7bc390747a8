"""Small integers packed into 32-bit words, lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column k of eight


def unpack(words: Tensor, bits: int, count: int, *, dense: bool = True) -> Tensor:
    """Values in the words of the last axis.

    Args:
        words: (..., w) int32.
        bits: of one value, 1 to 8.
        count: values to return.
        dense: values follow each other across words; else each word holds 32 // bits and the rest of it is empty.

    Returns:
        (..., count) uint8.

    >>> unpack(torch.tensor([0x76543210]), 4, 8).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    words = words.to(torch.int32).contiguous()
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        # little-endian: the lowest bits come first; one axis, as strides of axes of size 1 may be anything
        octets = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])
        if bits == 8:
            return octets[..., :count]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        return ((octets.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    if not dense:
        shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & mask).to(torch.uint8).flatten(-2)[..., :count]
    short = -words.shape[-1] % bits
    if short:
        words = torch.nn.functional.pad(words, (0, short))
    groups = words.unflatten(-1, (-1, bits))  # (..., g, bits): 32 values each
    values = torch.empty((*groups.shape[:-1], 32), dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, start = divmod(i * bits, 32)
        inside = min(bits, 32 - start)
        value = (groups[..., word] >> start) & ((1 << inside) - 1)
        if inside < bits:
            value = value | ((groups[..., word + 1] & ((1 << bits - inside) - 1)) << inside)
        values[..., i] = value
    return values.flatten(-2)[..., :count]


def unpack_awq(words: Tensor) -> Tensor:
    """(..., w) words of eight 4-bit values in the order of AWQ's gemm kernel -> (..., 8 w) uint8."""
    values = unpack(words, 4, 8 * words.shape[-1]).unflatten(-1, (-1, 8))
    return torch.stack([values[..., nibble] for nibble in AWQ_ORDER], dim=-1).flatten(-2)


def words_needed(bits: int, count: int, *, dense: bool = True) -> int:
    """32-bit words that hold so many values."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))

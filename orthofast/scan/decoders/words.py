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
        each = [(octets >> start) & mask for start in range(0, 8, bits)]
        return torch.stack(each, dim=-1).flatten(-2)[..., :count]
    if not dense:
        each = [((words >> bits * i) & mask).to(torch.uint8) for i in range(32 // bits)]
        return torch.stack(each, dim=-1).flatten(-2)[..., :count]
    short = -words.shape[-1] % bits
    if short:
        words = torch.nn.functional.pad(words, (0, short))
    groups = words.unflatten(-1, (-1, bits)).movedim(-1, 0)  # (bits, ..., g): 32 values each
    values = torch.empty((*groups.shape[1:], 32), dtype=torch.uint8, device=words.device)
    for i in range(32):
        values[..., i] = _straddling(groups, bits, i)
    return values.flatten(-2)[..., :count]


def unpack_down(words: Tensor, bits: int, count: int) -> Tensor:
    """Values packed down the first axis, across words: (w, n) int32 -> (count, n) float32."""
    each, held = (32, bits) if 32 % bits else (32 // bits, 1)  # values in so many words
    short = -words.shape[0] % held
    if short:
        words = torch.nn.functional.pad(words, (0, 0, 0, short))
    groups = words.unflatten(0, (-1, held)).movedim(1, 0)  # (held, g, n)
    values = torch.empty((groups.shape[1], each, words.shape[1]), dtype=torch.float32, device=words.device)
    for i in range(each):
        values[:, i] = _straddling(groups, bits, i)
    return values.flatten(0, 1)[:count]


def _straddling(groups: Tensor, bits: int, i: int) -> Tensor:
    """Value ``i`` of a run whose words are the first axis; it may begin in one word and end in the next."""
    word, start = divmod(i * bits, 32)
    inside = min(bits, 32 - start)
    value = (groups[word] >> start) & ((1 << inside) - 1)
    if inside < bits:
        value |= (groups[word + 1] & ((1 << bits - inside) - 1)) << inside
    return value


def unpack_awq(words: Tensor) -> Tensor:
    """(..., w) words of eight 4-bit values in the order of AWQ's gemm kernel -> (..., 8 w) uint8."""
    return torch.stack([((words >> 4 * nibble) & 15).to(torch.uint8) for nibble in AWQ_ORDER], dim=-1).flatten(-2)


def words_needed(bits: int, count: int, *, dense: bool = True) -> int:
    """32-bit words that hold so many values."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))

"""Scales and zero points brought to the values they belong to: by block, by group, by an index of the columns."""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.errors import CheckpointError


def scale_(values: Tensor, scales: Tensor, width: int) -> Tensor:
    """Multiply (..., r, d) in place by (..., r, ceil(d / width)), each factor for ``width`` columns."""
    whole = values.shape[-1] // width
    if whole:
        columns = values[..., : whole * width].unflatten(-1, (whole, width))
        columns.mul_(scales[..., :whole].unsqueeze(-1))
    if whole * width < values.shape[-1]:
        values[..., whole * width :].mul_(scales[..., whole:])
    return values


def shift_(values: Tensor, zeros: Tensor, width: int) -> Tensor:
    """Subtract in place from (..., r, d) a zero point (..., r, ceil(d / width)) for every ``width`` columns."""
    whole = values.shape[-1] // width
    if whole:
        columns = values[..., : whole * width].unflatten(-1, (whole, width))
        columns.sub_(zeros[..., :whole].unsqueeze(-1))
    if whole * width < values.shape[-1]:
        values[..., whole * width :].sub_(zeros[..., whole:])
    return values


def group_index(index: Tensor | None, groups: int, width: int) -> Tensor | None:
    """The group of each column where groups are not runs of ``width`` columns; None where they are.

    Raises:
        CheckpointError: if it names a group that does not exist.
    """
    if index is None:
        return None
    found = index.to(device="cpu", dtype=torch.int64)
    if bool((found < 0).any()):  # written by libraries that did not reorder the columns
        return None
    if found.numel() and int(found.max()) >= groups:
        raise CheckpointError(f"the index of groups names group {int(found.max())} of {groups}")
    if torch.equal(found, torch.arange(found.numel()) // width):
        return None
    return found.to(index.device)


def dequantize_(values: Tensor, scales: Tensor, zeros: Tensor | None, width: int, index: Tensor | None) -> Tensor:
    """(values - zeros) * scales, in place: float32 (..., r, d) with float32 (..., r, groups).

    The difference of two integers below 2^9 times a 16-bit float has at most 9 + 11 bits: exact in float32, in no
    16-bit type. A float32 scale is rounded once.
    """
    if index is not None:
        if zeros is not None:
            values.sub_(zeros[..., index])
        return values.mul_(scales[..., index])
    if zeros is not None:
        shift_(values, zeros, width)
    return scale_(values, scales, width)

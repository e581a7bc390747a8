"""8-bit values with scales: per block (DeepSeek-V3), per tensor, per channel, per group; float8 and int8.

    value[i, j] = (data[i, j] - zero[i // h, j // w]) * scale[i // h, j // w]

Blocks of h x w values; the last ones may hang over the edges (DeepSeek-V3, README_WEIGHTS.md). Per tensor a block is
the whole matrix, per channel a row. Bitsandbytes' int8 has absolute maxima of the rows (SCB) for 127.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent
from orthofast.scan.decoders.contract import (
    FLOAT8,
    FLOATS,
    Rows,
    Stored,
    Weight,
    expect,
    factors,
    is_excluded,
)
from orthofast.scan.decoders.grouping import scale_, shift_
from orthofast.views import BlockScaled

CODING = "scaled"
DEFAULT_BLOCK = (128, 128)
SCALES = FLOATS | {"F8_E8M0", "U8"}
SCALE_NAMES = ("_scale_inv", "_scale")
WHOLE_NAMES = (".scale_weight", ".qscale_weight")  # beside "X.weight": diffusion models, Mistral's own files
EIGHT_BITS = FLOAT8 | {"I8"}
MANY = 1 << 20  # values from which a table of 65536 is worth its making


def rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Values of a range of the first axis, in float32."""
    data, scales, (height, width) = parts["weight"], _scales(weight, parts), weight.numbers("block")
    zeros = parts["zero"].to(torch.float32).reshape(scales.shape) if "zero" in parts else None
    stacked = data.dim() == 3
    read = _reader(data)

    def of_rows(table: Tensor, first: int, last: int) -> Tensor:
        if stacked:
            index = torch.arange(data.shape[1], device=data.device) // height
            return table[first:last, index]
        return table[torch.arange(first, last, device=data.device) // height]

    def values(first: int, last: int) -> Tensor:
        wide = read(data[first:last])
        if zeros is not None:
            shift_(wide, of_rows(zeros, first, last), width)
        return scale_(wide, of_rows(scales, first, last), width)

    return values


def block_scaled(weight: Weight, parts: Mapping[str, Tensor]) -> BlockScaled:
    """The stored float8 bytes and their scales, as folds take them: no value is decoded."""
    height, width = weight.numbers("block")
    return BlockScaled(parts["weight"], _scales(weight, parts), (height, width))


def is_block_scaled(weight: Weight) -> bool:
    """Whether :func:`block_scaled` serves it: float8 without zero points."""
    return weight.coding == CODING and weight.parts["weight"].dtype in FLOAT8 and "zero" not in weight.parts


def _reader(data: Tensor) -> Callable[[Tensor], Tensor]:
    """Conversion to float32: a processor looks float8 up, two values at a time, as torch converts it slowly there."""
    if data.dtype == torch.int8 or data.device.type != "cpu" or data.shape[-1] % 2 or data.numel() < MANY:
        return lambda part: part.to(torch.float32)
    table = _pairs(data.dtype)

    def looked_up(part: Tensor) -> Tensor:
        pair = part.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        return table.index_select(0, pair.view(-1)).view(torch.float32).view(part.shape)

    return looked_up


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """(65536,) int64: the two float32 of every two bytes, as one number."""
    octets = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    return octets.view(dtype).to(torch.float32).view(torch.int64)


def _scales(weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
    scales = factors(parts["scale"], weight.parts["scale"])
    unit = weight.settings.get("unit")
    if isinstance(unit, int):
        scales = scales / unit
    return scales.reshape(weight.numbers("grid"))


def join_float8(stored: Stored, quantization: Mapping[str, object]) -> None:
    """Join float8 weights with their scales, as the configurations "fp8", "fbgemm_fp8" and "modelopt" say."""
    asked = quantization.get("weight_block_size")
    block = (asked[0], asked[1]) if isinstance(asked, list) and len(asked) == 2 and all(map(_is_size, asked)) else None
    for name, extent in stored.ending(""):
        if extent.dtype not in FLOAT8 or len(extent.shape) < 2 or name.endswith(SCALE_NAMES):
            continue
        excluded = is_excluded(name.removesuffix(".weight"), quantization)
        if excluded and stored.first(*(name + suffix for suffix in SCALE_NAMES)) is None:
            continue  # plain float8
        join_one(stored, name, extent, block)


def join_unmistakable(stored: Stored) -> None:
    """Join float8 weights whose companion can only be their scales, where no configuration says so.

    One factor, or one per block of 128 x 128, beside a float8 matrix of the same name.
    """
    taken = 0
    for suffix in (*SCALE_NAMES, *WHOLE_NAMES):
        for start, scale in stored.ending(suffix):
            name = f"{start}.weight" if suffix in WHOLE_NAMES else start
            extent = stored.left.get(name)
            if extent is None or extent.dtype not in FLOAT8 or len(extent.shape) < 2:
                continue
            grid = (*extent.shape[:-2], *_grid(extent.shape, DEFAULT_BLOCK))
            if scale.dtype not in SCALES or (math.prod(scale.shape) != 1 and scale.shape != grid):
                reason = f"quantised: {extent.dtype} with scales in {scale.name} of shape {list(scale.shape)}"
                stored.skip([name], f"{reason}, and no configuration tells what they scale")
                continue
            join_one(stored, name, extent, None)
            taken += 1
    if taken:
        stored.catalog.notes.append(
            f"{taken} float8 weights were scaled by the tensors beside them, though no configuration says so"
        )


def join_one(
    stored: Stored, name: str, extent: Extent, block: tuple[int, int] | None, *, zero: str | None = None
) -> None:
    """Join one 8-bit tensor with the scales beside it.

    Args:
        stored: the tensors left.
        name: of the tensor and of the weight.
        extent: its values.
        block: what one factor scales, where the configuration says so.
        zero: name of its zero points, None for none.
    """
    names = [name + suffix for suffix in SCALE_NAMES]
    whole = [name.removesuffix(".weight") + suffix for suffix in WHOLE_NAMES]
    activations = [name.removesuffix("weight") + "input_scale", name + "_shape"]

    def make() -> Weight:
        scale = stored.first(*names, *whole) or stored.need(*names)
        grid, sides = _layout(scale, extent.shape, block)
        if scale.dtype not in SCALES:
            expect(scale, scale.shape, SCALES)
        parts = {"weight": extent, "scale": scale}
        if zero is not None and zero in stored.left:
            zeros = stored.left[zero]
            if math.prod(zeros.shape) != math.prod(grid):
                expect(zeros, scale.shape, EIGHT_BITS)
            parts["zero"] = zeros
        return Weight(name, extent.shape, CODING, parts, {"block": sides, "grid": grid})

    own = [name, *names, *whole, *activations, *([zero] if zero else [])]
    stored.join(name, extent.shape, own, make)


def join_int8(stored: Stored) -> None:
    """Join bitsandbytes' int8 matrices: "X.weight" with the absolute maxima of its rows in "X.SCB"."""
    for module, maxima in stored.ending(".SCB"):
        name = f"{module}.weight"
        shape = stored.left[name].shape if name in stored.left else None

        def make(name: str = name, maxima: Extent = maxima) -> Weight:
            values = stored.need(name)
            if len(values.shape) != 2 or values.dtype != "I8":
                raise CheckpointError(f"{name} needs an I8 matrix, it is {values.dtype} {list(values.shape)}")
            expect(maxima, values.shape[:1], FLOATS)
            settings = {"block": (1, values.shape[1]), "grid": (values.shape[0], 1), "unit": 127}
            return Weight(name, values.shape, CODING, {"weight": values, "scale": maxima}, settings)

        stored.join(name, shape, [name, maxima.name, f"{module}.weight_format"], make)


def _layout(
    scale: Extent, shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shape of the scales as a grid over the matrix, and how much of it one factor scales."""
    stack, (out, inward) = shape[:-2], shape[-2:]
    if len(stack) > 1:
        raise CheckpointError(f"a tensor of {len(shape)} axes is no matrix and no stack of them")
    count = math.prod(scale.shape)
    if block is not None and scale.shape == (*stack, *_grid(shape, block)):
        return scale.shape, block
    if count == 1 and math.prod(stack) == 1:
        return (*stack, 1, 1), (max(out, 1), max(inward, 1))
    if stack and count == stack[0] and scale.shape[0] == count:
        return (*stack, 1, 1), (out, inward)
    if scale.shape in ((*stack, out), (*stack, out, 1)):
        return (*stack, out, 1), (1, inward)
    if scale.shape == (*stack, 1, inward):  # outputs are the columns of stacks stored as (experts, in, out)
        return scale.shape, (out, 1)
    if block is None and scale.shape == (*stack, *_grid(shape, DEFAULT_BLOCK)):
        return scale.shape, DEFAULT_BLOCK
    block = block or DEFAULT_BLOCK
    needed = f"{[*stack, *_grid(shape, block)]} for blocks of {block[0]} x {block[1]}"
    raise CheckpointError(
        f"{scale.name} has shape {list(scale.shape)}, a matrix of shape {list(shape)} needs {needed}, "
        f"one factor per row or column, or one for all"
    )


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0

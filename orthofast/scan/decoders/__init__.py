"""Stored parts to values: the table of codings, and what a decoded weight needs of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.decoders import fourbit, gguf_blocks, gguf_package, packed, scaled
from orthofast.scan.decoders.contract import PART_DTYPES, PLAIN, Rows, Weight, as_stored
from orthofast.views import BlockScaled

# coding -> (dtype of the values, how rows are made): the narrowest dtype in which the products are exact, or
# float32, where a float32 scale is rounded once
CODINGS: dict[str, tuple[torch.dtype, Callable[[Weight, Mapping[str, Tensor]], Rows]]] = {
    scaled.CODING: (torch.float32, scaled.rows),
    packed.GPTQ: (torch.float32, packed.gptq_rows),
    packed.AWQ: (torch.float32, packed.awq_rows),
    packed.PACKED: (torch.float32, packed.packed_rows),
    fourbit.BNB: (torch.float32, fourbit.bnb_rows),
    fourbit.MXFP4: (torch.bfloat16, fourbit.mxfp4_rows),
    fourbit.NVFP4: (torch.float32, fourbit.nvfp4_rows),
    gguf_blocks.CODING: (torch.float32, gguf_blocks.rows),
    gguf_package.CODING: (torch.float32, gguf_package.rows),
}
# stored as (in, out): the values stay so in memory and are seen through strides, which folds take as they are
COLUMN_MAJOR = (packed.GPTQ, packed.AWQ)
CPU_VALUES = 1 << 20  # decoded at a time: their temporaries stay in a processor's cache
GPU_VALUES = 1 << 25  # launches cost more than memory traffic


def decode(
    weight: Weight, parts: Mapping[str, Tensor], span: slice = slice(None), *, into: Tensor | None = None
) -> Tensor:
    """Values of a weight, on the device of its parts.

    Memory: the values, the parts, and temporaries for ``CPU_VALUES`` or ``GPU_VALUES`` values at a time.

    Args:
        weight: from ``join_weights``.
        parts: role -> stored tensor, of the extent's dtype and shape or as its bytes (uint8).
        span: range of the first axis to decode, the whole by default; of step 1.
        into: memory to use again for the values, flat, of ``decoded_dtype(weight)`` and on the parts' device: fresh
            memory costs a CPU as much as decoding. Not used for a plain weight.

    Returns:
        Values of ``weight.shape``, or of the range, in a floating-point type that ``gram_stats`` takes.

    Raises:
        CheckpointError: if the parts contradict each other; the message names the weight.
    """
    ready = _ready(weight, parts)
    if weight.coding == PLAIN:
        return ready["weight"][span] if weight.shape else ready["weight"]
    if weight.coding not in CODINGS:
        raise CheckpointError(f"{weight.name}: the coding {weight.coding!r} is not known")
    dtype, make = CODINGS[weight.coding]
    first, last, _ = span.indices(weight.shape[0])
    last = max(first, last)
    transposed = weight.settings.get("transposed") is True  # the model has the last two axes the other way round
    sizes = (*weight.shape[1:-2], weight.shape[-1], weight.shape[-2]) if transposed else weight.shape[1:]
    device = ready["weight"].device
    count = (last - first) * math.prod(sizes)
    flat = torch.empty(count, dtype=dtype, device=device) if into is None else into[:count]
    if weight.coding in COLUMN_MAJOR:
        values = flat.view(*sizes, last - first).T
    else:
        values = flat.view(last - first, *sizes)
    step = max(1, (CPU_VALUES if device.type == "cpu" else GPU_VALUES) // max(1, math.prod(sizes)))
    try:
        rows = make(weight, ready)
    except CheckpointError as error:
        raise CheckpointError(f"{weight.name} cannot be decoded: {error}") from None
    for start in range(first, last, step):
        stop = min(start + step, last)
        values[start - first : stop - first] = rows(start, stop)
    return values.transpose(-1, -2) if transposed else values


def block_scaled(weight: Weight, parts: Mapping[str, Tensor]) -> BlockScaled | None:
    """A float8 weight as folds take it, without decoding; None for other weights.

    Args:
        weight: from ``join_weights``.
        parts: as for :func:`decode`; the result shares their memory.
    """
    return scaled.block_scaled(weight, _ready(weight, parts)) if scaled.is_block_scaled(weight) else None


def decoded_dtype(weight: Weight) -> torch.dtype:
    """The type of the values that :func:`decode` returns."""
    return PART_DTYPES[weight.parts["weight"].dtype] if weight.coding == PLAIN else CODINGS[weight.coding][0]


def decoded_bytes(weight: Weight) -> int:
    """Bytes of the values that :func:`decode` returns; the parts, ``weight.nbytes``, are held beside them.

    A plain weight is not copied: its values are its part.
    """
    return 0 if weight.coding == PLAIN else math.prod(weight.shape) * decoded_dtype(weight).itemsize


def _ready(weight: Weight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    missing = weight.parts.keys() - parts.keys()
    if missing:
        raise CheckpointError(f"{weight.name}: the parts {', '.join(sorted(missing))} were not read")
    return {role: as_stored(parts[role], extent) for role, extent in weight.parts.items()}

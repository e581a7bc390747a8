"""4-bit float weights among stored tensors: bitsandbytes, MXFP4 of gpt-oss, NVFP4 and float8 of ModelOpt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent
from orthofast.scan.decoders.contract import FLOAT8, FLOATS, Stored, Weight, expect
from orthofast.scan.decoders.fourbit import BNB, MX_GROUP, MXFP4, NV_GROUP, NVFP4
from orthofast.scan.decoders.scaled import join_float8

MODELOPT = ("FP8", "NVFP4", "MIXED_PRECISION")
STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
BNB_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES)


def join_bitsandbytes(stored: Stored) -> None:
    """Join weights that carry bitsandbytes' description of themselves, "X.quant_state.bitsandbytes__nf4" or fp4."""
    for name, state in stored.ending(*STATES):

        def make(name: str = name, state: Extent = state) -> Weight:
            told = _description(stored, state)
            shape = told.get("shape")
            if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
                raise CheckpointError(f"{state.name} tells no usable shape")
            block = _even(told, "blocksize", state)
            count = math.prod(shape)
            packed, maxima = stored.need(name), stored.need(f"{name}.absmax")
            table = stored.need(f"{name}.quant_map")
            if packed.nbytes != -(-count // 2):
                raise CheckpointError(f"{name} holds {packed.nbytes} bytes, two values each of {shape} are needed")
            blocks = -(-count // block)
            expect(table, (16,), FLOATS)
            parts = {"weight": packed, "absmax": maxima, "map": table}
            settings: dict[str, object] = {"blocksize": block}
            if "nested_blocksize" in told:
                each, offset = _even(told, "nested_blocksize", state), told.get("nested_offset")
                if not isinstance(offset, int | float):
                    raise CheckpointError(f"{state.name} tells no nested_offset")
                nested, nested_table = stored.need(f"{name}.nested_absmax"), stored.need(f"{name}.nested_quant_map")
                expect(maxima, (blocks,), ("U8",))
                expect(nested, (-(-blocks // each),), FLOATS)
                expect(nested_table, (256,), FLOATS)
                parts |= {"nested_absmax": nested, "nested_map": nested_table}
                settings |= {"nested_blocksize": each, "offset": float(offset)}
            else:
                expect(maxima, (blocks,), FLOATS)
            return Weight(name, tuple(shape), BNB, parts, settings)

        stored.join(name, None, [name + part for part in BNB_PARTS], make)


def join_mxfp4(stored: Stored, *, certain: bool = True) -> None:
    """Join "X_blocks" (..., out, in / 32, 16) with "X_scales" (..., out, in / 32), as gpt-oss is stored.

    Stored as (experts, out, in), where the unquantised model has (experts, in, out): the weight comes in that
    orientation, as a view.

    Args:
        stored: the tensors left.
        certain: the configuration says so; else only pairs are joined that can be nothing else.
    """
    for name, blocks in stored.ending("_blocks"):
        if blocks.dtype != "U8" or len(blocks.shape) < 3 or blocks.shape[-1] != MX_GROUP // 2:
            continue
        if not certain:
            beside = stored.left.get(f"{name}_scales")
            if beside is None or beside.shape != blocks.shape[:-1] or beside.dtype not in ("U8", "F8_E8M0"):
                continue
            stored.catalog.notes.append(f"{name} was decoded as MXFP4, though no configuration says so")

        def make(name: str = name, blocks: Extent = blocks) -> Weight:
            scales = stored.need(f"{name}_scales")
            *stack, out, groups, _ = blocks.shape
            expect(scales, blocks.shape[:-1], ("U8", "F8_E8M0"))
            inward = groups * MX_GROUP
            shape = (*stack, inward, out) if stack else (out, inward)
            settings = {"blocks": True, "transposed": bool(stack)}
            return Weight(name, shape, MXFP4, {"weight": blocks, "scale": scales}, settings)

        stored.join(name, None, [f"{name}_blocks", f"{name}_scales"], make)


def join_modelopt(stored: Stored, quantization: Mapping[str, object]) -> None:
    """Join NVFP4 (bytes, float8 scales per 16, one factor in "weight_scale_2") and float8 weights of ModelOpt."""
    told = quantization.get("quantization")  # as hf_quant_config.json has it
    quantization = told if isinstance(told, dict) else quantization
    kind = quantization.get("quant_algo")
    if isinstance(kind, str) and kind.upper() not in MODELOPT:
        for module, packed in stored.ending(".weight"):
            if packed.dtype in ("U8", "I8") or packed.dtype in FLOAT8:
                stored.skip_module(module, f"unsupported quantisation modelopt {kind}")
        return
    for name, packed in stored.ending(".weight"):
        if packed.dtype == "U8" and f"{name}.weight_scale_2" in stored.left:
            join_nvfp4(stored, f"{name}.weight", packed, f"{name}.weight_scale", f"{name}.weight_scale_2", False)
    join_float8(stored, quantization)


def join_nvfp4(stored: Stored, name: str, packed: Extent, scale_name: str, whole_name: str, inverse: bool) -> None:
    """Join one NVFP4 weight; ``inverse``: the factor for all values divides them."""
    shape = (*packed.shape[:-1], packed.shape[-1] * 2) if packed.shape else ()

    def make() -> Weight:
        if len(shape) != 2:
            raise CheckpointError(f"{packed.name} has shape {list(packed.shape)}, two axes are needed")
        scales, whole = stored.need(scale_name), stored.need(whole_name)
        expect(scales, (shape[0], -(-shape[1] // NV_GROUP)), FLOAT8)
        if math.prod(whole.shape) != 1:
            expect(whole, (1,), FLOATS)
        expect(whole, whole.shape, FLOATS)
        parts = {"weight": packed, "scale": scales, "whole": whole}
        return Weight(name, shape, NVFP4, parts, {"inverse": inverse})

    stored.join(name, shape, [packed.name, scale_name, whole_name], make)


def _description(stored: Stored, state: Extent) -> dict[str, object]:
    try:
        told = json.loads(stored.content(state).decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{state.name} is not the JSON that bitsandbytes writes") from None
    if not isinstance(told, dict):
        raise CheckpointError(f"{state.name} is not a JSON object")
    return told


def _even(told: Mapping[str, object], key: str, state: Extent) -> int:
    value = told.get(key)
    if type(value) is not int or value < 2 or value % 2:
        raise CheckpointError(f"{state.name} tells the {key} {value!r}, an even number is needed")
    return value

"""GPTQ and AWQ layers among stored tensors: qweight, qzeros, scales and g_idx become one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent
from orthofast.scan.decoders.contract import FLOATS, Stored, Weight, expect
from orthofast.scan.decoders.packed import AWQ, GPTQ
from orthofast.scan.decoders.words import words_needed

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
GPTQ_BITS = (2, 3, 4, 8)
PLUS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


def join_gptq(stored: Stored, quantization: Mapping[str, object]) -> None:
    """Join layers as AutoGPTQ and GPTQModel store them; bits and groups are read off the shapes.

    "gptq" holds zero points less one, "gptq_v2" as they are (GPTQModel, utils/model.py).
    """
    form = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    if form not in PLUS or quantization.get("bits", 4) not in GPTQ_BITS:
        for module, _ in stored.ending(".qweight"):
            reason = f"unsupported quantisation gptq in the format {form} of {quantization.get('bits')} bits"
            stored.skip_module(module, reason)
        return
    for module, packed in stored.ending(".qweight"):

        def make(module: str = module, packed: Extent = packed) -> Weight:
            scales, zeros = stored.need(f"{module}.scales"), stored.need(f"{module}.qzeros")
            index = stored.first(f"{module}.g_idx")
            _two_axes(packed, scales, zeros)
            out = packed.shape[1]
            bits = _bits(packed, index, quantization)
            inward = index.shape[0] if index is not None else packed.shape[0] * 32 // bits
            expect(packed, (words_needed(bits, inward), out), ("I32",))
            groups = scales.shape[0]
            expect(scales, (groups, out), FLOATS)
            expect(zeros, (groups, words_needed(bits, out)), ("I32",))
            parts = {"weight": packed, "zero": zeros, "scale": scales}
            if index is not None:
                expect(index, (inward,), ("I32", "I64"))
                parts["index"] = index
            settings = {"bits": bits, "group": _group(inward, groups, quantization), "plus": PLUS[form]}
            return Weight(f"{module}.weight", (out, inward), GPTQ, parts, settings)

        stored.join(f"{module}.weight", None, [module + part for part in PARTS], make)


def join_awq(stored: Stored, quantization: Mapping[str, object]) -> None:
    """Join layers as AutoAWQ stores them for its gemm kernel, 4 bits."""
    version = str(quantization.get("version") or quantization.get("checkpoint_format") or "gemm").lower()
    bits = quantization.get("bits", quantization.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        for module, _ in stored.ending(".qweight"):
            stored.skip_module(module, f"unsupported quantisation awq, version {version} of {bits} bits")
        return
    for module, packed in stored.ending(".qweight"):

        def make(module: str = module, packed: Extent = packed) -> Weight:
            scales = stored.need(f"{module}.scales")
            symmetric = quantization.get("zero_point") is False
            zeros = stored.first(f"{module}.qzeros") if symmetric else stored.need(f"{module}.qzeros")
            _two_axes(packed, scales)
            inward, out, groups = packed.shape[0], packed.shape[1] * 8, scales.shape[0]
            expect(packed, packed.shape, ("I32",))
            expect(scales, (groups, out), FLOATS)
            parts = {"weight": packed, "scale": scales}
            if zeros is not None:
                expect(zeros, (groups, out // 8), ("I32",))
                parts["zero"] = zeros
            settings = {"group": _group(inward, groups, quantization)}
            return Weight(f"{module}.weight", (out, inward), AWQ, parts, settings)

        stored.join(f"{module}.weight", None, [module + part for part in PARTS], make)


def _two_axes(*extents: Extent) -> None:
    for extent in extents:
        if len(extent.shape) != 2 or not math.prod(extent.shape):
            raise CheckpointError(f"{extent.name} has shape {list(extent.shape)}, two axes are needed")


def _bits(packed: Extent, index: Extent | None, quantization: Mapping[str, object]) -> int:
    """From the shapes, so that layers may differ; from the configuration where there is no index of groups."""
    asked = quantization.get("bits")
    if index is None:
        if asked not in GPTQ_BITS or not isinstance(asked, int):
            raise CheckpointError(f"bits {asked!r} of the configuration are none of {GPTQ_BITS}")
        return asked
    for bits in GPTQ_BITS:
        if index.shape and packed.shape[0] == words_needed(bits, index.shape[0]):
            return bits
    raise CheckpointError(
        f"{packed.name} of shape {list(packed.shape)} holds no {list(index.shape)} columns of 2, 3, 4 or 8 bits"
    )


def _group(inward: int, groups: int, quantization: Mapping[str, object]) -> int:
    """Columns per group: the configuration's, or the only even cut into so many groups."""
    asked = quantization.get("group_size", quantization.get("q_group_size"))
    if isinstance(asked, int) and asked > 0 and -(-inward // asked) == groups:
        return asked
    if inward % groups:
        raise CheckpointError(f"{inward} columns are not cut evenly into {groups} groups of scales")
    return inward // groups

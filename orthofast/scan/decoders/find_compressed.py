"""Weights of the package compressed-tensors among stored tensors, each layer by the group that targets it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent
from orthofast.scan.decoders.contract import FLOATS, Stored, Weight, expect, is_excluded, matches
from orthofast.scan.decoders.find_fourbit import join_nvfp4
from orthofast.scan.decoders.fourbit import MX_GROUP, MXFP4
from orthofast.scan.decoders.packed import PACKED
from orthofast.scan.decoders.scaled import EIGHT_BITS, SCALE_NAMES, join_one
from orthofast.scan.decoders.words import words_needed

METHOD = "compressed-tensors"
EIGHT_BIT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "mxfp8-quantized")
FORMATS = (*EIGHT_BIT_FORMATS, "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
# names that only a compressed layer has, and the format of those that are not decoded
SIGNS = {"weight_packed": "", "compressed": "sparse-bitmask", "bitmask": "sparse-bitmask", "meta": "marlin-24"}


def join_compressed(stored: Stored, quantization: Mapping[str, object]) -> None:
    """Join what compressed-tensors stores; layers in a format that is not decoded are skipped by its name."""
    for name, extent in stored.ending(""):
        module, _, leaf = name.rpartition(".")
        if name not in stored.left or not (leaf in SIGNS or _is_eight_bit(stored, name, extent)):
            continue
        if leaf not in SIGNS and is_excluded(module, quantization) and not _has_scale(stored, name):
            continue  # plain float8
        group = _group_of(module, quantization)
        form = str(group.get("format") or quantization.get("format") or "")
        if form not in FORMATS or SIGNS.get(leaf):
            form = SIGNS.get(leaf) or form
            stored.skip_module(module, f"unsupported quantisation {METHOD}, format {form or 'not named'}")
            continue
        told = group.get("weights")
        weights = told if isinstance(told, Mapping) else {}
        if leaf != "weight_packed":
            join_one(stored, name, extent, _block_of(weights, extent), zero=f"{name}_zero_point")
        elif form == "nvfp4-pack-quantized":
            scale, whole = f"{module}.weight_scale", f"{module}.weight_global_scale"
            join_nvfp4(stored, f"{module}.weight", extent, scale, whole, True)
        elif form == "mxfp4-pack-quantized":
            _join_mxfp4(stored, module, extent)
        else:
            _join_packed(stored, module, extent, weights)
        stored.skip((n for n in stored.inside(module) if n.endswith(("_global_scale", "input_scale"))), "activations")


def _join_packed(stored: Stored, module: str, packed: Extent, weights: Mapping[str, object]) -> None:
    """Words (..., out, words); scales (..., out, groups); zero points packed along ``out``, or one byte each."""
    names = [f"{module}.weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx", "shape")]

    def make() -> Weight:
        bits = weights.get("num_bits")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise CheckpointError(f"num_bits {bits!r} of the configuration is none of 1 to 8")
        if len(packed.shape) not in (2, 3):
            raise CheckpointError(f"{packed.name} has shape {list(packed.shape)}, two or three axes are needed")
        scale, told = stored.need(f"{module}.weight_scale"), stored.need(f"{module}.weight_shape")
        expect(told, (len(packed.shape),), ("I64", "I32"))
        width = told.nbytes // len(packed.shape)
        content = stored.content(told)
        shape = tuple(int.from_bytes(content[i : i + width], "little") for i in range(0, told.nbytes, width))
        if shape[:-1] != packed.shape[:-1]:
            raise CheckpointError(f"{told.name} says {list(shape)}, {packed.name} has {list(packed.shape)}")
        dense = _is_dense(bits, shape[-1], packed)
        grid = (1,) * len(shape) if math.prod(scale.shape) == 1 else scale.shape
        if len(grid) != len(shape) or any(n not in (1, m) for n, m in zip(grid[:-1], shape[:-1], strict=True)):
            raise CheckpointError(
                f"{scale.name} has shape {list(scale.shape)}, one row per row of {list(shape)} is needed"
            )
        expect(scale, scale.shape, FLOATS)
        parts = {"weight": packed, "scale": scale}
        zero, index = stored.first(names[2]), stored.first(names[3])
        if zero is not None and weights.get("symmetric") is not True:
            along = words_needed(bits, shape[-2], dense=dense)
            expect(zero, (*shape[:-2], along, grid[-1]) if zero.dtype == "I32" else scale.shape, ("I32", "I8"))
            parts["zero"] = zero
        elif weights.get("symmetric") is False:
            stored.need(names[2])
        if index is not None:
            expect(index, (shape[-1],), ("I32", "I64"))
            parts["index"] = index
        settings = {"bits": bits, "group": _width(shape[-1], grid[-1], weights), "dense": dense, "grid": grid}
        return Weight(f"{module}.weight", shape, PACKED, parts, settings)

    stored.join(f"{module}.weight", None, names, make)


def _join_mxfp4(stored: Stored, module: str, packed: Extent) -> None:
    shape = (*packed.shape[:-1], packed.shape[-1] * 2) if packed.shape else ()

    def make() -> Weight:
        scale = stored.need(f"{module}.weight_scale")
        expect(scale, (*shape[:-1], -(-shape[-1] // MX_GROUP)), ("U8", "F8_E8M0"))
        return Weight(f"{module}.weight", shape, MXFP4, {"weight": packed, "scale": scale})

    stored.join(f"{module}.weight", shape, [packed.name, f"{module}.weight_scale"], make)


def _is_eight_bit(stored: Stored, name: str, extent: Extent) -> bool:
    if extent.dtype not in EIGHT_BITS or len(extent.shape) < 2 or name.endswith((*SCALE_NAMES, "_zero_point")):
        return False
    return name.endswith("weight") or _has_scale(stored, name)


def _has_scale(stored: Stored, name: str) -> bool:
    return stored.first(*(name + suffix for suffix in SCALE_NAMES)) is not None


def _group_of(module: str, quantization: Mapping[str, object]) -> Mapping[str, object]:
    """The group whose targets name the module, else one that targets a class of modules."""
    groups = quantization.get("config_groups")
    found: Mapping[str, object] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, dict):
            continue
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if not isinstance(target, str):
                continue
            if target == module or (target.startswith("re:") and matches(module, target)):
                return group
            if not found and "." not in target and target[:1].isupper():
                found = group
    return found


def _block_of(weights: Mapping[str, object], extent: Extent) -> tuple[int, int] | None:
    block, group = weights.get("block_structure"), weights.get("group_size")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    if type(group) is int and group > 0:
        return 1, group
    return None


def _is_dense(bits: int, inward: int, packed: Extent) -> bool:
    """Whether values run across words, as newer versions write them; for 1, 2, 4 and 8 bits it is the same."""
    width = packed.shape[-1]
    fits = [dense for dense in (True, False) if words_needed(bits, inward, dense=dense) == width]
    if not fits or packed.dtype != "I32":
        raise CheckpointError(
            f"{packed.name} of {packed.dtype} {list(packed.shape)} holds no {inward} columns of {bits} bits"
        )
    if len(fits) == 2 and 32 % bits and inward > 32 // bits:
        raise CheckpointError(f"{packed.name} is too narrow to tell whether {bits}-bit values run across words")
    return fits[0]


def _width(inward: int, groups: int, weights: Mapping[str, object]) -> int:
    asked = weights.get("group_size")
    if type(asked) is int and asked > 0 and -(-inward // asked) == groups:
        return asked
    if not groups or inward % groups:
        raise CheckpointError(f"{inward} columns are not cut evenly into {groups} groups of scales")
    return inward // groups

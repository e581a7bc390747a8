"""Stored tensors joined into weights: a quantised one has several extents: values, scales, zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing

from orthofast.scan.catalog import INTEGERS, TORCH_DTYPES, Catalog, Extent
from orthofast.scan.decoders.contract import PLAIN, Stored, Weight, Weights
from orthofast.scan.decoders.find_compressed import join_compressed
from orthofast.scan.decoders.find_fourbit import join_bitsandbytes, join_modelopt, join_mxfp4
from orthofast.scan.decoders.find_packed import join_awq, join_gptq
from orthofast.scan.decoders.gguf_package import join_gguf
from orthofast.scan.decoders.scaled import join_float8, join_int8, join_unmistakable

__all__ = ["PLAIN", "Weight", "Weights", "join_weights"]

Quantization = Mapping[str, object]


def _bitsandbytes(stored: Stored, quantization: Quantization) -> None:
    join_bitsandbytes(stored)
    join_int8(stored)


def _mxfp4(stored: Stored, quantization: Quantization) -> None:
    join_mxfp4(stored)


# quant_method of the configuration -> what joins its tensors
METHODS: dict[str, Callable[[Stored, Quantization], None]] = {
    "fp8": join_float8,
    "fbgemm_fp8": join_float8,
    "compressed-tensors": join_compressed,
    "gptq": join_gptq,
    "awq": join_awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "modelopt": join_modelopt,
}


def join_weights(catalog: Catalog) -> Weights:
    """Join the extents of a catalog into weights.

    How weights are quantised is what the configuration says, or what a tensor says of itself: bitsandbytes'
    descriptions, GGUF's types, MXFP4 blocks beside their exponents, a float8 matrix beside one factor per block. The
    rest is never guessed: it is listed as skipped, by the name of its method. A weight whose companions are missing or
    do not fit is a fault.

    Args:
        catalog: from ``open_checkpoint``; companions may lie in any of its files.
    """
    with closing(Stored(catalog)) as stored:
        _join(stored, method_of(catalog.quantization), catalog.quantization)
    for name, extent in list(stored.left.items()):
        reason = _undecodable(extent)
        if reason:
            stored.skip([name], reason)
        else:
            stored.weights.found.append(Weight(name, extent.shape, PLAIN, {"weight": extent}))
    return stored.weights


def _join(stored: Stored, method: str | None, quantization: Quantization) -> None:
    join_gguf(stored)
    if method in METHODS:
        METHODS[method](stored, quantization)
    elif method:
        _skip_unsupported(stored, method)
    else:
        _bitsandbytes(stored, {})
        join_mxfp4(stored, certain=False)
        join_unmistakable(stored)


def method_of(quantization: Quantization) -> str | None:
    """The name of the quantisation method; files older than the entry "quant_method" have entries of their own."""
    named = quantization.get("quant_method") or quantization.get("quant_type")
    if isinstance(named, str) and named:
        return named.lower()
    for method, entries in {
        "compressed-tensors": ("config_groups",),
        "modelopt": ("quant_algo",),
        "awq": ("w_bit", "q_group_size"),
        "gptq": ("bits", "group_size", "desc_act"),
    }.items():
        if all(entry in quantization for entry in entries):
            return method
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    return "of an unnamed method" if quantization else None


def _skip_unsupported(stored: Stored, method: str) -> None:
    """Modules that hold anything but a plain weight and bias are taken as quantised; the others stay."""
    for name, extent in list(stored.left.items()):
        module, _, leaf = name.rpartition(".")
        ordinary = leaf in ("weight", "bias") and extent.dtype in TORCH_DTYPES and not extent.dtype.startswith("F8")
        if name in stored.left and not ordinary and _is_packed(extent):
            stored.skip_module(module, f"unsupported quantisation {method}")


def _is_packed(extent: Extent) -> bool:
    """Bytes and words of several axes, and float8: what no unquantised module stores."""
    return (extent.dtype in INTEGERS and len(extent.shape) > 1) or extent.dtype.startswith(("F8", "F4", "F6"))


def _undecodable(extent: Extent) -> str | None:
    if extent.dtype in INTEGERS:
        return f"{extent.dtype} values are no vectors; how they are packed or quantised is not said"
    if extent.dtype not in TORCH_DTYPES:
        return f"the storage format {extent.dtype} is not decoded"
    return None

"""GGUF's rarer types through the package gguf, rows in threads; and GGUF tensors joined into weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent
from orthofast.scan.decoders import gguf_blocks
from orthofast.scan.decoders.contract import Rows, Stored, Weight

CODING = "gguf_package"
PREFIX = "GGUF_"
# type -> (values of a block, bytes of a block), as ggml-common.h has them
BLOCKS: dict[str, tuple[int, int]] = {
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "NVFP4": (64, 36),
}


def rows(weight: Weight, parts: Mapping[str, Tensor]) -> Rows:
    """Values of a range of the first axis, decoded on the CPU; parts: weight, the bytes of all blocks.

    Raises:
        CheckpointError: if the package refuses them.
    """
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    kind = GGMLQuantizationType[str(weight.settings["type"])]
    device, each = parts["weight"].device, parts["weight"].numel() // max(1, weight.shape[0])
    octets = parts["weight"].reshape(-1).cpu().numpy()

    def piece(first: int, last: int) -> Tensor:
        found = quants.dequantize(octets[first * each : last * each].reshape(last - first, each), kind)
        return torch.from_numpy(found).view(last - first, *weight.shape[1:])

    def values(first: int, last: int) -> Tensor:
        threads = max(1, min(torch.get_num_threads(), last - first))
        cuts = [first + (last - first) * i // threads for i in range(threads + 1)]
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="orthofast-gguf") as pool:
                pieces = list(pool.map(piece, cuts, cuts[1:]))
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{weight.name}: the package gguf cannot decode {kind.name}: {error}") from None
        return torch.cat(pieces).to(device)

    return values


def join_gguf(stored: Stored) -> None:
    """Join GGUF's quantised tensors; a type that is not decoded here or by the package is skipped by its name."""
    for name, extent in stored.ending(""):
        if not extent.dtype.startswith(PREFIX):
            continue
        kind = extent.dtype[len(PREFIX) :]
        if kind in gguf_blocks.BLOCKS:
            size, nbytes, _ = gguf_blocks.BLOCKS[kind]
            _join(stored, name, extent, kind, gguf_blocks.CODING, (size, nbytes))
        elif kind in BLOCKS and importlib.util.find_spec("gguf") is not None:
            _join(stored, name, extent, kind, CODING, BLOCKS[kind])
        elif kind in BLOCKS:
            stored.skip([name], f"GGUF type {kind} is decoded by the package gguf; run: pip install 'orthofast[gguf]'")
        else:
            stored.skip([name], f"unsupported quantisation GGUF type {kind}")


def _join(stored: Stored, name: str, extent: Extent, kind: str, coding: str, block: tuple[int, int]) -> None:
    def make() -> Weight:
        size, nbytes = block
        count = math.prod(extent.shape)
        if not extent.shape or extent.shape[-1] % size:
            raise CheckpointError(f"rows of {list(extent.shape)} are no whole blocks of {size} values of {kind}")
        if extent.nbytes != count // size * nbytes:
            raise CheckpointError(
                f"{extent.nbytes} bytes are stored, {list(extent.shape)} needs {count // size * nbytes} in {kind}"
            )
        return Weight(name, extent.shape, coding, {"weight": extent}, {"type": kind})

    stored.join(name, extent.shape, [name], make)

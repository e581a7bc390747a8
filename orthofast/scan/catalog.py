"""What a checkpoint holds, reduced to byte extents: every format ends up as these few records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# stored name -> (torch dtype that views the bytes, bits of one value)
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
INTEGERS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One block of a tensor that a format keeps in several places.

    Attributes:
        file: the file that holds it.
        offset: first byte, from the start of the file.
        nbytes: length in bytes.
        origin: index of its first element in the whole tensor, one number per axis.
        shape: sizes of the block.
    """

    file: Path
    offset: int
    nbytes: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor's bytes lie.

    Attributes:
        name: the tensor's name in the checkpoint.
        file: the file that holds it; the checkpoint's root for a tensor in memory.
        offset: first byte, from the start of the file.
        nbytes: bytes to read; for a dense tensor the product of ``shape`` times the size of ``dtype``.
        dtype: the stored type, in the names of safetensors ("F32", "BF16", ...), or "GGUF_Q4_K" and the like.
        shape: sizes of the tensor's axes, outermost first.
        strides: steps in elements between neighbours on each axis; None for row-major order without gaps.
        pieces: where the blocks lie, for a tensor kept in several places; empty for one place.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that cannot be read: a tensor, or a whole file when the name is the file's.

    Attributes:
        name: of the tensor, or of the file.
        error: one sentence that names the file.
        shape: sizes the header claims, where it has any.
        whole_file: whether ``name`` is a file and not a tensor.
    """

    name: str
    error: str
    shape: tuple[int, ...] | None = None
    whole_file: bool = False


@dataclass(slots=True)
class Catalog:
    """The index of a checkpoint; no tensor has been read yet.

    Attributes:
        root: the path that was asked for.
        extents: readable tensors.
        faults: what cannot be read.
        files: weight files and their sizes in bytes.
        format: "safetensors", "torch", "dcp", "gguf" or "memory".
        memory: values that are in memory already, by name; their extents have offset 0.
        tied: other names of a tensor that is stored once -> the name of its extent.
        revision: the hub commit the files come from, None elsewhere.
        quantization: how weights are quantised, as the configuration says; empty where nothing is.
        config: the model's configuration beside the weights; empty without one.
        config_digest: SHA-256 of that file, None without one.
        notes: remarks that change no result.
    """

    root: Path
    extents: list[Extent] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    files: dict[Path, int] = field(default_factory=dict)
    format: str = "safetensors"
    memory: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    quantization: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    config_digest: str | None = None
    notes: list[str] = field(default_factory=list)


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes a tensor of this type and shape occupies; None if they do not fill whole bytes."""
    bits = BITS[dtype] * math.prod(shape)
    return None if bits % 8 else bits // 8

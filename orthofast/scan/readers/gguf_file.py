"""The header of a GGUF file (versions 2 and 3) as byte extents, walked without making objects of its long arrays.

Layout (ggml-org/ggml, docs/gguf.md): magic, version, tensor count, entry count; key-value entries; per tensor a name,
its sizes innermost first, a type and an offset; then, aligned, the data.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import BinaryIO

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Extent, Fault
from orthofast.scan.readers.files import MAX_HEADER_BYTES, encodable, file_size, shown
from orthofast.scan.readers.safetensors_file import overlapping

MAGIC = b"GGUF"
SUFFIX = ".gguf"
SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
CHUNK = 4 << 20  # bytes of header read at once
KEPT = 4096  # longest array that becomes values: per-layer settings, not vocabularies
MAX_SIZES = 8  # axes of a tensor; ggml has at most 4
MAX_FOUND = 1 << 20  # tensors of one file
TYPES: dict[int, tuple[str, int, int]] = {  # ggml's number -> name, values of a block, its bytes
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("GGUF_Q4_0", 32, 18),
    3: ("GGUF_Q4_1", 32, 20),
    6: ("GGUF_Q5_0", 32, 22),
    7: ("GGUF_Q5_1", 32, 24),
    8: ("GGUF_Q8_0", 32, 34),
    9: ("GGUF_Q8_1", 32, 40),
    10: ("GGUF_Q2_K", 256, 84),
    11: ("GGUF_Q3_K", 256, 110),
    12: ("GGUF_Q4_K", 256, 144),
    13: ("GGUF_Q5_K", 256, 176),
    14: ("GGUF_Q6_K", 256, 210),
    15: ("GGUF_Q8_K", 256, 292),
    16: ("GGUF_IQ2_XXS", 256, 66),
    17: ("GGUF_IQ2_XS", 256, 74),
    18: ("GGUF_IQ3_XXS", 256, 98),
    19: ("GGUF_IQ1_S", 256, 50),
    20: ("GGUF_IQ4_NL", 32, 18),
    21: ("GGUF_IQ3_S", 256, 110),
    22: ("GGUF_IQ2_S", 256, 82),
    23: ("GGUF_IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("GGUF_IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("GGUF_TQ1_0", 256, 54),
    35: ("GGUF_TQ2_0", 256, 66),
    39: ("GGUF_MXFP4", 32, 17),
    40: ("GGUF_NVFP4", 64, 36),
    41: ("GGUF_Q1_0", 128, 18),
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# key behind the architecture -> name in configurations of transformers
SETTINGS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "vocab_size": "vocab_size",
}


def read_gguf(file: Path) -> tuple[list[Extent], list[Fault], dict[str, object]]:
    """Extents of all sound tensors in ``file``, the faults of the others, and the settings of its metadata.

    Raises:
        CheckpointError: if nothing in the file can be trusted; the message names the file.
    """
    size = file_size(file)
    try:
        with file.open("rb", buffering=0) as handle:
            return _read(_Header(handle, file, size))
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None


def config_of(settings: dict[str, object]) -> dict[str, object]:
    """GGUF metadata in the words of a configuration: model_type and sizes, and all short values under "gguf"."""
    architecture = str(settings.get("general.architecture", ""))
    config: dict[str, object] = {"model_type": architecture} if architecture else {}
    for key, name in SETTINGS.items():
        value = settings.get(f"{architecture}.{key}")
        if isinstance(value, list):  # one number per layer: a number where they agree
            value = value[0] if len(set(value)) == 1 else value
        if value is not None:
            config[name] = value
    config["gguf"] = settings
    return config


def split_names(name: str) -> list[str]:
    """All files of a split model, given one; the file alone where it is no split."""
    found = SPLIT.match(name)
    if not found or not 1 <= int(found[2]) <= int(found[3]):
        return [name]
    return [f"{found[1]}-{i:05d}-of-{found[3]}.gguf" for i in range(1, int(found[3]) + 1)]


class _Header:
    """Reads on demand from the start of a file; a count is believed only as far as the file could hold it."""

    def __init__(self, handle: BinaryIO, file: Path, size: int) -> None:
        self.handle, self.file, self.size = handle, file, size
        self.content = b""
        self.at = 0

    def need(self, count: int) -> None:
        """Make sure that ``count`` more bytes are in memory."""
        end = self.at + count
        if end <= len(self.content):
            return
        if end > self.size:
            raise CheckpointError(f"{self.file.name} is truncated: its header ends behind byte {self.size}")
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.file.name}: its header is longer than the limit of {MAX_HEADER_BYTES} bytes")
        parts = [self.content]
        have = len(self.content)
        while have < end:
            more = self.handle.read(max(CHUNK, end - have))
            if not more:
                raise CheckpointError(f"{self.file.name} shrank while its header was read")
            parts.append(more)
            have += len(more)
        self.content = b"".join(parts)

    def number(self, form: str) -> int:
        """One little-endian number."""
        width = struct.calcsize(form)
        self.need(width)
        value = struct.unpack_from("<" + form, self.content, self.at)[0]
        self.at += width
        return value  # type: ignore[no-any-return]

    def text(self) -> str:
        """A string with its length before it."""
        length = self.number("Q")
        self.need(length)
        raw = self.content[self.at : self.at + length]
        self.at += length
        return encodable(raw.decode("utf-8", "backslashreplace"))

    def count(self, least: int, what: str) -> int:
        """A count of things of at least so many bytes each."""
        value = self.number("Q")
        if value * least > self.size - self.at:
            raise CheckpointError(f"{self.file.name} is truncated or corrupt: {value} {what} do not fit in the file")
        return value

    def skip_strings(self, count: int) -> None:
        """Step over strings without making any."""
        unpack = struct.Struct("<Q").unpack_from
        content, at, end = self.content, self.at, len(self.content)
        for _ in range(count):
            if at + 8 > end:
                self.at = at
                self.need(8)
                content, end = self.content, len(self.content)
            at += 8 + unpack(content, at)[0]
            if at > end:  # also a length that no file has
                self.at = at
                self.need(0)
                content, end = self.content, len(self.content)
        self.at = at

    def value(self, kind: int) -> object:
        """One value, None for an array that is too long to keep."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise CheckpointError(f"{self.file.name} is corrupt: its metadata has a value of unknown type {kind}")
        inner = self.number("I")
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            count = self.count(width, "array values")
            self.need(count * width)
            start, self.at = self.at, self.at + count * width
            return None if count > KEPT else list(struct.unpack_from(f"<{count}{SCALARS[inner]}", self.content, start))
        if inner != STRING:
            raise CheckpointError(f"{self.file.name}: its metadata has an array of type {inner}, which is not read")
        self.skip_strings(self.count(8, "strings"))
        return None


def _read(header: _Header) -> tuple[list[Extent], list[Fault], dict[str, object]]:
    file = header.file
    header.need(4)
    if header.content[:4] != MAGIC:
        raise CheckpointError(f"{file.name} is no GGUF file: it does not start with GGUF")
    header.at = 4
    version = header.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        kind = "a big-endian file" if swapped else f"version {version}"
        raise CheckpointError(f"{file.name} is {kind} of GGUF; versions 2 and 3 are read, little-endian")
    tensors = header.count(24, "tensors")
    if tensors > MAX_FOUND:
        raise CheckpointError(f"{file.name} names {tensors} tensors, the limit is {MAX_FOUND}")
    settings: dict[str, object] = {}
    for _ in range(header.count(13, "metadata entries")):
        key = header.text()
        value = header.value(header.number("I"))
        if value is not None:
            settings[key] = value
    infos = [_info(header) for _ in range(tensors)]
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{file.name} is corrupt: an alignment of {shown(alignment)} bytes")
    start = -(-header.at // alignment) * alignment
    extents: list[Extent] = []
    faults: list[Fault] = []
    names: set[str] = set()
    spans: dict[tuple[int, int], Extent] = {}  # tensors of the very same bytes are tied, not corrupt
    for name, shape, ggml_type, offset in infos:
        placed = _placed(file, header.size, start, name, shape, ggml_type, offset)
        if name in names:
            placed = Fault(name, f"{file.name} names {shown(name)} twice; the first counts", shape)
        names.add(name)
        if isinstance(placed, Fault):
            faults.append(placed)
        else:
            extents.append(placed)
            spans.setdefault((placed.offset, placed.nbytes), placed)
    shared = overlapping(list(spans.values()))
    corrupt = {extent.name for extent in extents if spans[extent.offset, extent.nbytes].name in shared}
    for extent in extents if corrupt else ():
        if extent.name in corrupt:
            error = f"{file.name} is corrupt: the bytes of {shown(extent.name)} overlap those of another tensor"
            faults.append(Fault(extent.name, error, extent.shape))
    return [extent for extent in extents if extent.name not in corrupt], faults, settings


def _info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name = header.text()
    axes = header.number("I")
    if axes > MAX_SIZES:
        raise CheckpointError(f"{header.file.name} is corrupt: {shown(name)} has {axes} axes")
    sizes = tuple(header.number("Q") for _ in range(axes))
    return name, sizes[::-1], header.number("I"), header.number("Q")


def _placed(
    file: Path, size: int, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Extent | Fault:
    def fault(why: str) -> Fault:
        return Fault(name, f"{file.name}: {shown(name)} {why}", shape if math.prod(shape) < 1 << 63 else None)

    if kind not in TYPES:
        return fault(f"is of ggml's type {kind}, which is not known")
    dtype, block, width = TYPES[kind]
    inward = shape[-1] if shape else 1
    if inward % block:
        return fault(f"has rows of {inward} values, which {dtype.removeprefix('GGUF_')} stores by {block}")
    nbytes = math.prod(shape) // block * width
    if start + offset + nbytes > size:
        missing = start + offset + nbytes - size
        return fault(f"ends {missing} bytes behind the end: the file is truncated; fetch it again")
    return Extent(name, file, start + offset, nbytes, dtype, shape)

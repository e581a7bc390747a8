"""Broken and hostile files as data, each with what the user sees: safetensors, pickles of torch, GGUF headers."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("a.weight", "b.weight", "c.weight")
SHAPE = (6, 5)
NBYTES = 6 * 5 * 4

Header = dict[str, Any]


def values() -> dict[str, np.ndarray]:
    """The tensors of the sound file."""
    generator = np.random.default_rng(7)
    return {name: generator.normal(size=SHAPE).astype("<f4") for name in NAMES}


def header() -> Header:
    """Its header: the three tensors one behind the other."""
    return {
        name: {"dtype": "F32", "shape": list(SHAPE), "data_offsets": [i * NBYTES, (i + 1) * NBYTES]}
        for i, name in enumerate(NAMES)
    }


def data() -> bytes:
    """Its data."""
    return b"".join(array.tobytes() for array in values().values())


def pack(head: Header | bytes, body: bytes | None = None, length: int | None = None) -> bytes:
    """A file from its parts; ``length`` overrules the true length of the header."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + (data() if body is None else body)


@dataclass(frozen=True)
class Attack:
    """A spoilt file: which tensors it costs, and a word its sentence must hold."""

    content: bytes
    lost: tuple[str, ...]
    word: str

    @property
    def hopeless(self) -> bool:
        """Whether nothing in the file can be measured."""
        return set(self.lost) >= set(NAMES)


def edited(change: Callable[[Header], object], body: bytes | None = None) -> bytes:
    """The sound file with its header changed."""
    head = header()
    change(head)
    return pack(head, body)


def with_field(name: str, field: str, value: object) -> bytes:
    return edited(lambda head: head[name].__setitem__(field, value))


ALL = NAMES
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
ATTACKS: dict[str, Attack] = {
    "empty file": Attack(b"", ALL, "truncated"),
    "seven bytes": Attack(b"\0" * 7, ALL, "truncated"),
    "header cut": Attack(pack(header())[:40], ALL, "truncated"),
    "header length 2^63": Attack(pack(header(), length=1 << 63), ALL, "limit"),
    "header length 2^64 - 1": Attack(pack(header(), length=(1 << 64) - 1), ALL, "limit"),
    "header over the cap": Attack(pack(header(), length=100_000_001), ALL, "limit"),
    "header longer than the file": Attack(pack(header(), length=99_999_999), ALL, "truncated"),
    "header length 0": Attack(pack(header(), length=0), ALL, "does not start"),
    "header is a list": Attack(pack(b"[1, 2]"), ALL, "does not start"),
    "header is no JSON": Attack(pack(b"{" + b"x" * 50), ALL, "JSON"),
    "header is no UTF-8": Attack(pack(b'{"\xff\xfe": 1}'), ALL, "JSON"),
    "header nested 100,000 deep": Attack(pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ALL, "JSON"),
    "integer of 10,000 digits": Attack(pack(b'{"a": ' + b"9" * 10_000 + b"}"), ALL, "JSON"),
    "duplicate name": Attack(pack(b'{"a.weight": 1, "a.weight": 2}'), ALL, "twice"),
    "git-lfs pointer": Attack(LFS, ALL, "git lfs pull"),
    "pickle": Attack(b"PK\x03\x04" + b"\0" * 200, ALL, ""),
    "no tensors": Attack(pack(b"{}", b""), ALL, "no tensors"),
    "data cut in the last tensor": Attack(pack(header(), data()[:-1]), ("c.weight",), "truncated"),
    "data cut in the second tensor": Attack(
        pack(header(), data()[: NBYTES + 9]), ("b.weight", "c.weight"), "truncated"
    ),
    "no data": Attack(pack(header(), b""), ALL, "truncated"),
    "trailing bytes": Attack(pack(header(), data() + b"junk"), (), "belong to no tensor"),
    "hole": Attack(edited(lambda head: head.pop("b.weight")), (), "belong to no tensor"),
    "overlap": Attack(
        edited(lambda head: head["b.weight"].__setitem__("data_offsets", [8, NBYTES + 8])),
        ("a.weight", "b.weight"),
        "overlap",
    ),
    "same bytes twice": Attack(
        edited(lambda head: head["b.weight"].__setitem__("data_offsets", [0, NBYTES])),
        ("a.weight", "b.weight"),
        "overlap",
    ),
    "offsets backwards": Attack(
        with_field("b.weight", "data_offsets", [2 * NBYTES, NBYTES]), ("b.weight",), "data_offsets"
    ),
    "offsets negative": Attack(with_field("b.weight", "data_offsets", [-NBYTES, 0]), ("b.weight",), "data_offsets"),
    "offsets beyond 2^63": Attack(
        with_field("b.weight", "data_offsets", [1 << 63, (1 << 63) + 4]), ("b.weight",), "data_offsets"
    ),
    "offsets true": Attack(with_field("b.weight", "data_offsets", [False, True]), ("b.weight",), "data_offsets"),
    "offsets of three": Attack(with_field("b.weight", "data_offsets", [0, 1, 2]), ("b.weight",), "data_offsets"),
    "dtype unknown": Attack(with_field("b.weight", "dtype", "F33"), ("b.weight",), "F33"),
    "dtype a list": Attack(with_field("b.weight", "dtype", ["F32"]), ("b.weight",), "dtype"),
    "dtype too wide": Attack(with_field("b.weight", "dtype", "F64"), ("b.weight",), "F64"),
    "dtype too narrow": Attack(with_field("b.weight", "dtype", "BF16"), ("b.weight",), "BF16"),
    "shape too large": Attack(with_field("b.weight", "shape", [6, 6]), ("b.weight",), "[6, 6]"),
    "shape overflows": Attack(with_field("b.weight", "shape", [1 << 40, 1 << 40]), ("b.weight",), "not the"),
    "shape negative": Attack(with_field("b.weight", "shape", [-6, -5]), ("b.weight",), "shape"),
    "shape a float": Attack(with_field("b.weight", "shape", [6.0, 5]), ("b.weight",), "shape"),
    "shape of 1,000 axes": Attack(with_field("b.weight", "shape", [1] * 1000), ("b.weight",), "shape"),
    "entry is a number": Attack(edited(lambda head: head.__setitem__("b.weight", 3)), ("b.weight",), "JSON object"),
    "entry without offsets": Attack(
        edited(lambda head: head["b.weight"].pop("data_offsets")), ("b.weight",), "data_offsets"
    ),
}


def with_pickle(path: Path, data: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A zip file of torch with this pickle and these storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (members or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


# the pickle inside a zip file of torch -> what the one sentence says; none of it is ever run
PICKLES = {
    "memo index of 2^32 - 1": (b"\x80\x02}r\xff\xff\xff\xff.", "no tensors"),
    "bytes of 2^62": (b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".", "ends early"),
    "call of a string": (b"\x80\x02U\x01a)R.", "no sound pickle"),
    "extension registry": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "text protocol": (b"(lp0\n.", "opcode 0x70"),
    "instance of os.system": (b"(S'echo'\nios\nsystem\n.", "opcode"),
    "os.system": (b"\x80\x02cos\nsystem\nU\x04echo\x85R.", "asks for os.system"),
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0a_C.execute\x93.", "asks for torch._C.execute"),
    "hidden behind a fine module": (b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93.", "asks for"),
    "unhashable key": (b"\x80\x02}]K\x01s.", "no sound pickle"),
    "empty": (b"", "no sound pickle"),
    "no end": (b"\x80\x02}", "no sound pickle"),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "no tensors"),
    "storage without a type": (b"\x80\x02(U\x07storageNU\x010U\x03cpuK\x01tQ.", "no sound pickle"),
    "state of a module's class": (b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", "whole pickled module"),
}


def gguf_head(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def gguf_text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def gguf_array(kind: int, count: int, body: bytes = b"") -> bytes:
    return gguf_text("key") + struct.pack("<IIQ", 9, kind, count) + body


def gguf_tensor(shape: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0, name: str = "w") -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


# a whole GGUF file -> what the one sentence says
GGUF_HEADERS = {
    "empty": (b"", "starts neither|is truncated"),
    "magic alone": (b"GGUF", "truncated"),
    "version 1": (gguf_head(1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^40 tensors": (gguf_head(tensors=1 << 40), "1099511627776 tensors do not fit"),
    "2^40 entries": (gguf_head(entries=1 << 40), "1099511627776 metadata entries do not fit"),
    "2^64 - 1 entries": (gguf_head(entries=(1 << 64) - 1), "metadata entries do not fit"),
    "array of 2^40 strings": (gguf_head(entries=1) + gguf_array(8, 1 << 40), "strings do not fit"),
    "array of 2^61 doubles": (gguf_head(entries=1) + gguf_array(12, 1 << 61), "array values do not fit"),
    "array of arrays": (gguf_head(entries=1) + gguf_array(9, 1, bytes(12)), "array of type 9"),
    "string of 2^63": (gguf_head(entries=1) + gguf_array(8, 1, struct.pack("<Q", 1 << 63) + bytes(8)), "truncated"),
    "key of 2^60": (gguf_head(entries=1) + struct.pack("<Q", 1 << 60) + bytes(16), "truncated"),
    "value of type 77": (gguf_head(entries=1) + gguf_text("key") + struct.pack("<IQ", 77, 0), "unknown type 77"),
    "alignment 3": (gguf_head(entries=1) + gguf_text("general.alignment") + struct.pack("<II", 4, 3), "alignment of 3"),
    "alignment 0": (gguf_head(entries=1) + gguf_text("general.alignment") + struct.pack("<II", 4, 0), "alignment of 0"),
    "100 axes": (gguf_head(tensors=1) + gguf_tensor((1,) * 100), "100 axes"),
    "shape of 2^64": (gguf_head(tensors=1) + gguf_tensor((1 << 32, 1 << 32)) + bytes(64), "behind the end"),
    "offset 2^63": (gguf_head(tensors=1) + gguf_tensor(offset=1 << 63) + bytes(64), "behind the end"),
    "type 99": (gguf_head(tensors=1) + gguf_tensor(kind=99) + bytes(64), "type 99"),
    "type removed from ggml": (gguf_head(tensors=1) + gguf_tensor(kind=4) + bytes(64), "type 4"),
    "row that is no whole block": (gguf_head(tensors=1) + gguf_tensor((33, 2), kind=2) + bytes(99), "stores by 32"),
    "data cut": (gguf_head(tensors=1) + gguf_tensor() + bytes(32), "the file is truncated"),
    "no tensors": (gguf_head(), "holds no tensors"),
}


@dataclass(frozen=True)
class SpoiltValues:
    """A sound file whose values are not: what is written beside ``sound.weight``, and what its row must say."""

    tensors: dict[str, np.ndarray]
    expected: dict[str, Callable[[Any], bool]]

    def write(self, folder: Any) -> None:
        """The tensors as model.safetensors."""
        tensors = {"sound.weight": np.eye(4, dtype="<f4") + 1, **self.tensors}
        head, at = {}, 0
        for name, array in tensors.items():
            kind = {"f": "F", "i": "I"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
            head[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
            at += array.nbytes
        body = b"".join(array.tobytes() for array in tensors.values())
        (folder / "model.safetensors").write_bytes(pack(head, body))


def _with(value: float, *places: tuple[int, int]) -> np.ndarray:
    array = np.random.default_rng(3).normal(size=(7, 5)).astype("<f4")
    for place in places:
        array[place] = value
    return array


SPOILT_VALUES: dict[str, SpoiltValues] = {
    "NaN in two rows": SpoiltValues(
        {"w.weight": _with(np.nan, (1, 2), (4, 0))},
        {"w.weight": lambda row: row.error == "2 of 7 vectors hold NaN or Inf" and row.pii is None},
    ),
    "infinity": SpoiltValues(
        {"w.weight": _with(-np.inf, (6, 4))},
        {"w.weight": lambda row: row.nonfinite == 1 and row.pii is None},
    ),
    "all NaN": SpoiltValues(
        {"w.weight": np.full((7, 5), np.nan, "<f4")}, {"w.weight": lambda row: row.nonfinite == 7 and row.pii is None}
    ),
    "all zero": SpoiltValues(
        {"w.weight": np.zeros((7, 5), "<f4")},
        {"w.weight": lambda row: (row.zero, row.pii, row.error) == (7, None, None)},
    ),
    "all equal": SpoiltValues(
        {"w.weight": np.ones((7, 5), "<f4")}, {"w.weight": lambda row: row.error is None and row.pii == 1.0}
    ),
    "tiny and huge": SpoiltValues(
        {"w.weight": _with(1e38, (0, 0)) * np.float32(1.0), "v.weight": _with(1.0) * np.float32(1e-38)},
        {name: lambda row: row.error is None and 0 < row.pii < 1 for name in ("w.weight", "v.weight")},
    ),
}

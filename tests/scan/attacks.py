"""Broken and hostile safetensors files as data: a sound file of three tensors, and ways to spoil it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
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

"""Weights that are stored twice, byte for byte: found by a few bytes first, then by all of them, and folded once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from orthofast.errors import CheckpointError
from orthofast.scan.plan import Item
from orthofast.scan.reading import READ_BYTES, Files, Segment, lay_out

PROBE_BYTES = 4096  # read where a copy could begin
READERS = 4
COMPARED = 4  # weights that agree in their first bytes and are compared whole


def find_copies(items: Sequence[Item], memory: Collection[str] = ()) -> dict[int, int]:
    """For each weight whose bytes an earlier one has too: index of that one.

    Weights are compared when their stored form and the cut into matrices are the same; most differ in the first bytes.

    Args:
        items: in reading order.
        memory: names of tensors that are in memory, which are left alone.
    """
    alike: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        form = None if any(e.name in memory for e in item.weight.parts.values()) else _form(item)
        if form is not None:
            alike.setdefault(form, []).append(index)
    candidates = [index for members in alike.values() if len(members) > 1 for index in members]
    copies: dict[int, int] = {}
    with closing(Files()) as files, ThreadPoolExecutor(READERS, thread_name_prefix="orthofast-probe") as readers:
        probes = dict(zip(candidates, readers.map(lambda i: _probe(items[i], files), candidates), strict=True))
        for members in alike.values():
            firsts: dict[bytes, list[int]] = {}  # probe -> weights that differ from each other
            for index in members if len(members) > 1 else ():
                probe = probes[index]
                if probe is None:
                    continue
                known = firsts.setdefault(probe, [])
                same = next((first for first in known[:COMPARED] if _equal(items[first], items[index], files)), None)
                if same is None:
                    known.append(index)
                else:
                    copies[index] = same
    return copies


def _form(item: Item) -> object:
    """What two weights must have in common to be copies."""
    weight = item.weight
    parts = tuple(
        (role, e.dtype, e.shape, e.nbytes, e.strides, tuple((p.origin, p.shape) for p in e.pieces))
        for role, e in weight.parts.items()
    )
    cuts = tuple(replace(matrix, name="", layer=None, role="") for matrix in item.matrices)
    return weight.coding, weight.shape, repr(weight.settings), parts, cuts


def _probe(item: Item, files: Files) -> bytes | None:
    """The first bytes of the largest part; None where they cannot be read, which the scan will say."""
    largest = max(_segments(item), key=lambda segment: segment.nbytes, default=None)
    if largest is None:
        return None
    try:
        return _read(replace(largest, nbytes=min(largest.nbytes, PROBE_BYTES)), files)
    except CheckpointError:
        return None


def _equal(one: Item, other: Item, files: Files) -> bool:
    """Whether two weights of the same form hold the same bytes."""
    try:
        return all(
            _read(a, files) == _read(b, files)
            for a, b in zip(_pieces(_segments(one)), _pieces(_segments(other)), strict=True)
        )
    except CheckpointError:
        return False


def _segments(item: Item) -> tuple[Segment, ...]:
    return lay_out([item.weight]).segments


def _pieces(segments: Sequence[Segment]) -> Iterator[Segment]:
    for segment in segments:
        for done in range(0, segment.nbytes, READ_BYTES):
            count = min(READ_BYTES, segment.nbytes - done)
            yield replace(segment, offset=segment.offset + done, nbytes=count)


def _read(segment: Segment, files: Files) -> bytes:
    content = bytearray(segment.nbytes)
    files.read(segment, memoryview(content))
    return bytes(content)

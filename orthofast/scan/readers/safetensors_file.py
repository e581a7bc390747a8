"""The header of one safetensors file as byte extents, checked against the file before any byte of data is trusted.

Layout: 8 bytes little-endian header length, a JSON object, then the data; offsets count from the end of the header
(repository huggingface/safetensors, README "Format"). A fault of one tensor leaves the others readable.
"""

from __future__ import annotations

from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import BITS, Extent, Fault, stored_bytes
from orthofast.scan.readers.files import (
    MAX_AXES,
    MAX_HEADER_BYTES,
    file_size,
    json_object,
    naturals,
    read_exactly,
    refuse_pointer,
    shown,
)

WEIGHT_SUFFIX = ".safetensors"


def read_index(file: Path) -> tuple[list[Extent], list[Fault]]:
    """Extents of all sound tensors in ``file``, and the faults of the others.

    Raises:
        CheckpointError: if nothing in the file can be trusted; the message names the file.
    """
    size = file_size(file)
    header, data_start = _header(file, size)
    entries: list[Extent] = []
    faults: list[Fault] = []
    claimed: list[Extent] = []  # all byte ranges that lie in the file, sound or not
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found = _entry(file, name, entry, data_start)
        if isinstance(found, Fault):
            faults.append(found)
            continue
        if found.offset + found.nbytes > size:
            missing = found.offset + found.nbytes - size
            error = f"{file.name} is truncated: {shown(name)} ends {missing} bytes behind its end; fetch the file again"
            faults.append(Fault(name, error, found.shape))
            continue
        claimed.append(found)
        entries.append(found)
    shared = overlapping(claimed)
    for extent in claimed:
        other = shared.get(extent.name)
        if other is not None:
            error = f"{file.name} is corrupt: the bytes of {shown(extent.name)} overlap those of {shown(other)}"
            faults.append(Fault(extent.name, error, extent.shape))
    gap = _gap(claimed, data_start, size)
    if gap and not faults:
        error = f"{file.name} is corrupt: {gap[1] - gap[0]} bytes from byte {gap[0]} on belong to no tensor"
        faults.append(Fault(file.name, error, whole_file=True))
    return [extent for extent in entries if extent.name not in shared], faults


def read_metadata(file: Path) -> dict[str, object]:
    """The free entries of a header, under "__metadata__"; empty without any.

    Raises:
        CheckpointError: as in :func:`read_index`.
    """
    found = _header(file, file_size(file))[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def _header(file: Path, size: int) -> tuple[dict[str, object], int]:
    try:
        with file.open("rb", buffering=0) as handle:
            start = handle.read(64)
            refuse_pointer(file, start)
            if len(start) < 8:
                raise CheckpointError(f"{file.name} is truncated: {size} bytes cannot hold a safetensors header")
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file.name} is no safetensors file: header of {length} bytes, the limit is {MAX_HEADER_BYTES}"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{file.name} is truncated: its header needs {length} bytes, {size - 8} are there"
                )
            handle.seek(8)
            content = read_exactly(handle, length, file)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
    if content[:1] != b"{":
        raise CheckpointError(f"{file.name} is no safetensors file: its header does not start with '{{'")
    return json_object(content, f"the header of {file.name}"), 8 + length


def _entry(file: Path, name: str, entry: object, data_start: int) -> Extent | Fault:
    def fault(why: str, shape: tuple[int, ...] | None = None) -> Fault:
        return Fault(name, f"{file.name}: the header entry of {shown(name)} {why}", shape)

    if not isinstance(entry, dict):
        return fault("is not a JSON object")
    dtype, sizes, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    shape = naturals(sizes)
    if shape is None or len(shape) > MAX_AXES:
        return fault(f"has no usable shape: {shown(sizes)}")
    span = naturals(offsets)
    if span is None or len(span) != 2 or span[0] > span[1]:
        return fault(f"has no usable data_offsets: {shown(offsets)}", shape)
    if not isinstance(dtype, str) or dtype not in BITS:
        return fault(f"has the unknown dtype {shown(dtype)}", shape)
    needed = stored_bytes(dtype, shape)
    if needed != span[1] - span[0]:
        return fault(f"says {dtype} {list(shape)}, which is not the {span[1] - span[0]} bytes it points at", shape)
    return Extent(name, file, data_start + span[0], needed, dtype, shape)


def overlapping(extents: list[Extent]) -> dict[str, str]:
    """For each tensor that shares bytes with another: that other's name."""
    found: dict[str, str] = {}
    reach: Extent | None = None  # the extent that ends furthest so far
    for extent in sorted((e for e in extents if e.nbytes), key=lambda e: (e.offset, e.nbytes)):
        if reach is not None and extent.offset < reach.offset + reach.nbytes:
            found.setdefault(extent.name, reach.name)
            found.setdefault(reach.name, extent.name)
        if reach is None or extent.offset + extent.nbytes > reach.offset + reach.nbytes:
            reach = extent
    return found


def _gap(extents: list[Extent], data_start: int, size: int) -> tuple[int, int] | None:
    end = data_start
    for extent in sorted(extents, key=lambda e: (e.offset, e.nbytes)):
        if extent.offset > end:
            return end, extent.offset
        end = max(end, extent.offset + extent.nbytes)
    return (end, size) if end < size else None

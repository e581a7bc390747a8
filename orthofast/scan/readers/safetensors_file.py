"""The header of one safetensors file as byte extents, checked against the file before any byte of data is trusted.

Layout: 8 bytes little-endian header length, a JSON object, then the data; offsets count from the end of the header
(repository huggingface/safetensors, README "Format"). A fault of one tensor leaves the others readable.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import BITS, Extent, Fault, stored_bytes

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_AXES = 64
MAX_SHOWN = 80  # characters of a foreign value inside a sentence
LFS_POINTER = b"version https://git-lfs"
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
            error = (
                f"{file.name} is truncated: {_shown(name)} ends {missing} bytes behind its end; fetch the file again"
            )
            faults.append(Fault(name, error, found.shape))
            continue
        claimed.append(found)
        entries.append(found)
    overlapping = _overlapping(claimed)
    for extent in claimed:
        other = overlapping.get(extent.name)
        if other is not None:
            error = f"{file.name} is corrupt: the bytes of {_shown(extent.name)} overlap those of {_shown(other)}"
            faults.append(Fault(extent.name, error, extent.shape))
    gap = _gap(claimed, data_start, size)
    if gap and not faults:
        error = f"{file.name} is corrupt: {gap[1] - gap[0]} bytes from byte {gap[0]} on belong to no tensor"
        faults.append(Fault(file.name, error, whole_file=True))
    return [extent for extent in entries if extent.name not in overlapping], faults


def file_size(file: Path) -> int:
    """Size in bytes of a regular, readable file.

    Raises:
        CheckpointError: if it is missing, or is no regular file (a pipe would never end).
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{file.name} cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file.name} is not a regular file")
    return status.st_size


def read_json(file: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, object]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        CheckpointError: if it cannot be read or is no JSON object.
    """
    size = file_size(file)
    if size > limit:
        raise CheckpointError(f"{file.name} holds {size} bytes, more than the {limit} a JSON file may have here")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
    _refuse_pointer(file, content)
    return _json_object(content, file.name)


def _header(file: Path, size: int) -> tuple[dict[str, object], int]:
    try:
        with file.open("rb", buffering=0) as handle:
            start = handle.read(64)
            _refuse_pointer(file, start)
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
            content = b""
            while len(content) < length:
                more = handle.read(length - len(content))
                if not more:
                    raise CheckpointError(f"{file.name} shrank while its header was read")
                content += more
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
    if content[:1] != b"{":
        raise CheckpointError(f"{file.name} is no safetensors file: its header does not start with '{{'")
    return _json_object(content, f"the header of {file.name}"), 8 + length


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file.name} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder"
        )


def _json_object(content: bytes, what: str) -> dict[str, object]:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = {_encodable(key): _encodable(value) if isinstance(value, str) else value for key, value in pairs}
        if len(found) != len(pairs):
            twice = Counter(_encodable(key) for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{what} names {_shown(twice)} twice")
        return found

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:MAX_SHOWN]
        raise CheckpointError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def _entry(file: Path, name: str, entry: object, data_start: int) -> Extent | Fault:
    def fault(why: str, shape: tuple[int, ...] | None = None) -> Fault:
        return Fault(name, f"{file.name}: the header entry of {_shown(name)} {why}", shape)

    if not isinstance(entry, dict):
        return fault("is not a JSON object")
    dtype, sizes, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    shape = _naturals(sizes)
    if shape is None or len(shape) > MAX_AXES:
        return fault(f"has no usable shape: {_shown(sizes)}")
    span = _naturals(offsets)
    if span is None or len(span) != 2 or span[0] > span[1]:
        return fault(f"has no usable data_offsets: {_shown(offsets)}", shape)
    if not isinstance(dtype, str) or dtype not in BITS:
        return fault(f"has the unknown dtype {_shown(dtype)}", shape)
    needed = stored_bytes(dtype, shape)
    if needed != span[1] - span[0]:
        return fault(f"says {dtype} {list(shape)}, which is not the {span[1] - span[0]} bytes it points at", shape)
    return Extent(name, file, data_start + span[0], needed, dtype, shape)


def _naturals(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list):
        return None
    if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 1 << 63 for v in values):
        return None
    return tuple(values)


def _overlapping(extents: list[Extent]) -> dict[str, str]:
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


def _encodable(text: str) -> str:
    """JSON may escape half a surrogate pair, which no output could be written with."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: object) -> str:
    """A foreign value as one short line of printable ASCII."""
    text = value if isinstance(value, str) else repr(value)
    text = ascii(text[: MAX_SHOWN + 1])[1:-1]
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."

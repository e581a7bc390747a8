"""What is asked of any file before its content is trusted: kind, size, position, JSON; foreign words as short ASCII."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from orthofast.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors, held for every format
MAX_AXES = 64
MAX_SHOWN = 80  # characters of a foreign value inside a sentence
MAX_NAMED = 8  # file names spelled out in one sentence
LFS_POINTER = b"version https://git-lfs"


def file_size(file: Path) -> int:
    """Size in bytes of a regular, readable file.

    Raises:
        CheckpointError: if it is missing, or is no regular file (a pipe would never end).
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file.name} is not a regular file")
    return status.st_size


def first_bytes(file: Path, count: int = 64) -> bytes:
    """The first bytes of a regular file, fewer if it is shorter.

    Raises:
        CheckpointError: if it cannot be read, or is a git-lfs pointer instead of the file.
    """
    file_size(file)
    try:
        with file.open("rb", buffering=0) as handle:
            start = handle.read(count)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {_reason(error)}") from None
    refuse_pointer(file, start)
    return start


def read_exactly(handle: BinaryIO, count: int, file: Path) -> bytes:
    """Bytes from the present position on.

    Raises:
        CheckpointError: if the file ends before.
    """
    content = b""
    while len(content) < count:
        more = handle.read(count - len(content))
        if not more:
            raise CheckpointError(f"{file.name} shrank while its header was read")
        content += more
    return content


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
        raise CheckpointError(f"{file.name} cannot be read: {_reason(error)}") from None
    refuse_pointer(file, content)
    return json_object(content, file.name)


def refuse_pointer(file: Path, start: bytes) -> None:
    """Tell a git-lfs pointer by its first words.

    Raises:
        CheckpointError: if it is one.
    """
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file.name} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder"
        )


def json_object(content: bytes, what: str) -> dict[str, object]:
    """A JSON object in which no name comes twice.

    Raises:
        CheckpointError: if it is none; the sentence starts with ``what``.
    """

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = {encodable(key): encodable(value) if isinstance(value, str) else value for key, value in pairs}
        if len(found) != len(pairs):
            twice = Counter(encodable(key) for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{what} names {shown(twice)} twice")
        return found

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:MAX_SHOWN]
        raise CheckpointError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def naturals(values: object) -> tuple[int, ...] | None:
    """A list or tuple of whole numbers from 0 to 2^63 - 1; None for anything else."""
    if not isinstance(values, list | tuple):
        return None
    if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 1 << 63 for v in values):
        return None
    return tuple(values)


def inside(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file name from an index stays in its folder and ends as a file of weights does.

    Judged by the words alone: snapshots of the hub are symbolic links, so resolving would mislead.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    unsafe = posix.is_absolute() or bool(windows.drive) or bool(windows.root) or "\0" in name
    return bool(name) and not unsafe and ".." not in (*posix.parts, *windows.parts) and name.endswith(suffixes)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def encodable(text: str) -> str:
    """The text with escapes for halves of surrogate pairs, which no output could be written with."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: object) -> str:
    """A foreign value as one short line of printable ASCII."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # integers of many digits, containers that hold themselves
        text = f"a {type(value).__name__}"
    text = ascii(text[: MAX_SHOWN + 1])[1:-1]
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; a name the system cannot hold is none."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False

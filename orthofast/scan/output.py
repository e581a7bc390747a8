"""Files written whole: under another name first, renamed when complete."""

from __future__ import annotations

import os
from pathlib import Path

from orthofast.errors import InputError


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of it.

    Raises:
        InputError: if the file cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as handle:
            handle.write(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error.strerror}") from None

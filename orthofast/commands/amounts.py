"""What is written on the command line and is no plain word: sizes of memory, lists of roles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orthofast.errors import InputError
from orthofast.scan.roles import ROLES

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_bytes(text: str, option: str) -> int:
    """Bytes of "4GiB", "512 MiB", "1.5G" or "1073741824".

    Raises:
        InputError: if it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise InputError(f"{option} needs a size such as 4GiB, 512MiB or a number of bytes, got {text!r}")
    unit = found[2].lower()
    return int(float(found[1]) * (BINARY[unit] if found[3] else UNITS[unit]))


def role_names(given: Sequence[str] | None) -> frozenset[str] | None:
    """The roles that words such as "query,keys" or "Linear_1" name; None for none given.

    Raises:
        InputError: if a word names no role.
    """
    words = [word.strip() for entry in given or () for word in entry.split(",") if word.strip()]
    if not words:
        return None
    known = {role.lower(): role for role in ROLES}
    known |= {role.lower().removesuffix(".weight"): role for role in ROLES}
    unknown = [word for word in words if word.lower() not in known]
    if unknown:
        raise InputError(f"roles needs some of {', '.join(ROLES)}, got {', '.join(map(repr, unknown))}")
    return frozenset(known[word.lower()] for word in words)

"""The JSON document of a scan, read back: every field checked before a row is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from orthofast.errors import InputError

SCHEMA_VERSION = 1
# fields of the first scan; the others came later and may be absent
REQUIRED = ("name", "layer", "role", "vectors", "n", "d", "pii", "baseline", "ratio", "zero", "nonfinite", "error")


def parse(text: str, source: str) -> dict[str, Any]:
    """A document's rows, skipped tensors and provenance as Python objects, each field of the type it must have.

    Args:
        text: the JSON.
        source: how messages name it.

    Raises:
        InputError: if it is no document of a scan, or one of a later version.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is no JSON: {error}; a result is what 'orthofast scan -o FILE.json' wrote"
        ) from None
    if not isinstance(found, dict) or "schema_version" not in found or not isinstance(found.get("rows"), list):
        raise InputError(f"{source} is no result of a scan: it has no schema_version and rows")
    if found["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{source} has schema_version {found['schema_version']!r}, this orthofast reads {SCHEMA_VERSION}: upgrade"
        )
    provenance = found.get("provenance", {})
    skipped = found.get("skipped", [])
    if not isinstance(provenance, dict) or not isinstance(skipped, list):
        raise InputError(f"{source} is no result of a scan: skipped needs a list and provenance an object")
    return {
        "rows": [_row(entry, f"row {place} of {source}") for place, entry in enumerate(found["rows"])],
        "skipped": [_skipped(entry, f"skipped tensor {place} of {source}") for place, entry in enumerate(skipped)],
        "provenance": provenance,
    }


def finite(value: Any) -> Any:
    """The same value without NaN and infinities, which JSON has not: None instead; tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


KINDS: dict[str, tuple[str, Callable[[object], bool], bool]] = {  # field -> what it must be, its test, whether null may
    "name": ("a string", _is_text, False),
    "layer": ("a string or null", _is_text, True),
    "role": ("a string or null", _is_text, True),
    "vectors": ("'rows' or 'cols'", lambda value: value in ("rows", "cols"), False),
    "error": ("a string or null", _is_text, True),
    "adapter": ("a string or null", _is_text, True),
    **dict.fromkeys(("n", "d", "zero", "nonfinite", "head", "expert"), ("an integer or null", _is_whole, True)),
    **dict.fromkeys(
        ("pii", "baseline", "ratio", "standard_error", "max_abs", "drift", "relative_change"),
        ("a number or null", _is_number, True),
    ),
    "max_pair": ("two integers or null", _is_pair, True),
    "histogram": ("a list of integers or null", _is_counts, True),
    "tied": ("a list of strings", _is_names, False),
}


def _row(entry: object, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{place} needs an object, got {type(entry).__name__}")
    missing = [field for field in REQUIRED if field not in entry]
    if missing:
        raise InputError(f"{place} has no {', '.join(missing)}")
    row = {}
    for field, (needed, fits, may_be_null) in KINDS.items():
        if field not in entry:
            continue
        value = entry[field]
        if not (fits(value) or (value is None and may_be_null)):
            raise InputError(f"{field} in {place} needs {needed}, got {value!r:.60}")
        row[field] = tuple(value) if isinstance(value, list) else value
    return row


def _skipped(entry: object, place: str) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(_is_text(entry.get(field)) for field in ("name", "reason")):
        raise InputError(f"{place} needs a name and a reason")
    return {field: entry[field] for field in ("name", "reason")}

"""Two steps all metrics share: the field a formula reads, and a value per item as the caller gets it."""

from __future__ import annotations

from torch import Tensor

from orthofast.errors import InputError


def needed(field: Tensor | None, metric: str, want: str) -> Tensor:
    """The field of a record that a formula reads.

    Raises:
        InputError: if the record was folded without it.
    """
    if field is None:
        raise InputError(f"{metric} needs a record folded with want={want!r}, got one without; add it to want")
    return field


def answer(value: Tensor, vectors: str) -> Tensor:
    """(b, ...) as the caller gets it: one value per head, or that of the only item."""
    return value if vectors == "heads" else value[0]

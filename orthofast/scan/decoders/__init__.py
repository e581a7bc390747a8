"""Stored parts of a weight to its values: one file per family of codings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.weights import PLAIN, Weight

CODINGS = (PLAIN,)


def decode(weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
    """Values of a weight, on the device of its parts.

    Args:
        weight: from ``join_weights``.
        parts: role -> stored tensor, of the extent's dtype and shape.

    Returns:
        Values of ``weight.shape`` in a floating-point type that ``gram_stats`` takes.

    Raises:
        CheckpointError: if the parts contradict each other; the message names the weight.
    """
    if weight.coding == PLAIN:
        return parts["weight"]
    raise CheckpointError(f"{weight.name}: the coding {weight.coding!r} is not known")

"""Stored tensors joined into weights: a quantised one has several extents: values, scales, zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orthofast.scan.catalog import INTEGERS, TORCH_DTYPES, Catalog, Extent, Fault

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as the model has it, and the extents it is decoded from.

    Attributes:
        name: as the unquantised model would name it, such as "layers.0.q_proj.weight".
        shape: sizes of the decoded weight, in the orientation of the unquantised model.
        coding: how it is stored: "plain", or one of the names in ``decoders.CODINGS``.
        parts: role of the part in the coding -> its extent; a plain weight has the part "weight".
        settings: what the coding needs to know beside the parts, such as the bits of a value.
    """

    name: str
    shape: tuple[int, ...]
    coding: str
    parts: Mapping[str, Extent]
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(extent.nbytes for extent in self.parts.values())

    @property
    def first(self) -> Extent:
        """The largest part: where the weight lies in the reading order."""
        return max(self.parts.values(), key=lambda extent: extent.nbytes)


@dataclass(slots=True)
class Weights:
    """All weights of a checkpoint, and the stored tensors that are none.

    Attributes:
        found: weights that can be decoded.
        skipped: (name, reason) of stored tensors that are no weights or are stored in an unsupported way.
        faults: weights whose parts contradict each other or are missing.
    """

    found: list[Weight] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def join_weights(catalog: Catalog) -> Weights:
    """Join the extents of a catalog into weights."""
    weights = Weights()
    shapes = {extent.name: extent.shape for extent in catalog.extents}
    for extent in catalog.extents:
        reason = _undecodable(extent, shapes)
        if reason:
            weights.skipped.append((extent.name, reason))
        else:
            weights.found.append(Weight(extent.name, extent.shape, PLAIN, {"weight": extent}))
    return weights


def _undecodable(extent: Extent, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if extent.dtype in INTEGERS:
        return f"{extent.dtype} values are no vectors; packed or quantised storage is not decoded"
    if extent.dtype not in TORCH_DTYPES:
        return f"the storage format {extent.dtype} is not decoded"
    if extent.dtype.startswith("F8"):
        for suffix in ("_scale_inv", "_scale"):
            scales = shapes.get(extent.name + suffix)
            if scales is not None and any(size > 1 for size in scales):
                return f"quantised: {extent.dtype} with scales in {extent.name + suffix}; not decoded"
    return None

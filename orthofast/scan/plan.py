"""What a scan will do, decided from the headers alone: which matrices, in which order, and what is left out and why."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from orthofast.errors import InputError
from orthofast.scan.catalog import INTEGERS, TORCH_DTYPES, Catalog, Extent, Fault
from orthofast.scan.roles import Reading, Roles

SIDES = ("rows", "cols")
BATCH_BYTES = 64 << 20  # matrices handed to the fold together; a larger tensor goes alone
SCALES = ("_scale_inv", "_scale")  # companions of fp8 weights


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix inside a tensor, as (out, in).

    Attributes:
        name: the tensor's name, with "[query]" and the like for a block of a fused one.
        layer: row of the table, None outside the layers.
        role: one of ``roles.ROLES``.
        transposed: stored as (in, out).
        start: first row of the (out, in) matrix.
        stop: one past the last row.
        inward: length of a row.
    """

    name: str
    layer: str | None
    role: str
    transposed: bool
    start: int
    stop: int
    inward: int

    def view(self, tensor: Tensor) -> Tensor:
        """(out, in) view of the stored tensor; convolution kernels are flattened per filter."""
        if tensor.dim() != 2:
            tensor = tensor.reshape(-1, self.inward)
        return (tensor.T if self.transposed else tensor)[self.start : self.stop]

    def sizes(self, side: str) -> tuple[int, int]:
        """Number of vectors ``n`` and their length ``d`` on one side."""
        out = self.stop - self.start
        return (out, self.inward) if side == "rows" else (self.inward, out)


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to read and the matrices in it."""

    extent: Extent
    matrices: tuple[Matrix, ...]


@dataclass(slots=True)
class Plan:
    """Everything decided before the first byte of data is read.

    Attributes:
        catalog: the checkpoint's index.
        sides: "rows", "cols" or both.
        items: tensors to measure, in the order they lie in the files.
        skipped: (name, reason) of everything else.
        faults: what cannot be read, with layer and role where the name tells them.
    """

    catalog: Catalog
    sides: tuple[str, ...]
    items: list[Item] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[Fault, Reading]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        return sum(item.extent.nbytes for item in self.items)

    def batches(self) -> Iterator[list[Item]]:
        """Tensors in reading order, about :data:`BATCH_BYTES` at a time."""
        batch: list[Item] = []
        size = 0
        for item in self.items:
            if batch and size + item.extent.nbytes > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += item.extent.nbytes
        if batch:
            yield batch


def make_plan(
    catalog: Catalog,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    vectors: str = "both",
    layers: Collection[str] | None = None,
) -> Plan:
    """Decide for every tensor of a catalog whether and how it is measured.

    Args:
        catalog: from ``open_checkpoint``.
        include: measure only tensors whose name matches one of these globs.
        exclude: leave out tensors whose name matches one of these globs.
        vectors: "rows", "cols" or "both".
        layers: measure only these rows of the table, such as {"0", "decoder.3"}.

    Raises:
        InputError: if an argument cannot be used, or nothing is selected.
    """
    if vectors not in (*SIDES, "both"):
        raise InputError(f"vectors needs 'rows', 'cols' or 'both', got {vectors!r}")
    wanted, unwanted = _globs(include, "include"), _globs(exclude, "exclude")
    plan = Plan(catalog, SIDES if vectors == "both" else (vectors,))
    shapes = {extent.name: extent.shape for extent in catalog.extents}
    named = {fault.name: fault.shape or () for fault in catalog.faults if not fault.whole_file}
    roles = Roles(named | shapes, catalog.config)

    def outside(name: str, reading: Reading) -> str | None:
        if wanted is not None and not any(fnmatchcase(name, glob) for glob in wanted):
            return "not selected by include"
        if unwanted and any(fnmatchcase(name, glob) for glob in unwanted):
            return "left out by exclude"
        if layers is not None and (reading.layer is None or reading.layer.removesuffix(".cross") not in layers):
            return "not in the selected layers"
        return None

    selected = 0
    for extent in sorted(catalog.extents, key=lambda e: (str(e.file), e.offset, e.name)):
        reading = roles.read(extent.name, extent.shape)
        reason = outside(extent.name, reading)
        selected += reason is None
        reason = reason or reading.skip or _unmeasurable(extent, reading, shapes)
        if reason:
            plan.skipped.append((extent.name, reason))
        else:
            plan.items.append(Item(extent, tuple(_matrices(extent, reading))))
    for fault in catalog.faults:
        reading = Reading("") if fault.whole_file else roles.read(fault.name, fault.shape or ())
        if fault.whole_file or outside(fault.name, reading) is None:
            plan.faults.append((fault, reading))
    if not selected and not plan.faults:
        raise InputError(
            "include, exclude and layers leave no tensor to measure; list the names with --long or widen the globs"
        )
    plan.skipped.sort(key=lambda pair: natural(pair[0]))
    return plan


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which layer 2 comes before layer 10; digits of any length, foreign names hold what they like."""
    words = [word for word in re.split(r"(\d+)", text) if word]
    return tuple((0, len(word.lstrip("0")), word.lstrip("0")) if word.isdecimal() else (1, 0, word) for word in words)


def layer_order(label: str) -> tuple[object, ...]:
    """Sort key of the table's rows: the encoder comes before the decoder, layer 2 before layer 10."""
    return not label.startswith("encoder."), natural(label)


def _globs(given: str | Iterable[str] | None, name: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    globs = (given,) if isinstance(given, str) else tuple(given)
    if any(not isinstance(glob, str) for glob in globs):
        raise InputError(f"{name} needs glob patterns as strings, got {globs!r}")
    return globs or None


def _unmeasurable(extent: Extent, reading: Reading, shapes: dict[str, tuple[int, ...]]) -> str | None:
    shape = extent.shape
    if extent.dtype in INTEGERS:
        return f"{extent.dtype} values are no vectors; packed or quantised storage is not decoded"
    if extent.dtype not in TORCH_DTYPES:
        return f"the storage format {extent.dtype} is not decoded"
    if len(shape) < 2:
        kind = "bias" if extent.name.endswith(("bias", "beta")) else "norm scale" if _is_norm(extent.name) else "vector"
        return f"{kind} of shape {list(shape)}: one vector has no pairs" if shape else "a single number"
    if math.prod(shape) == 0:
        return f"empty: shape {list(shape)}"
    if len(shape) > 2 and reading.role != "Conv":
        if math.prod(shape[:-1]) == 1:
            return f"vector of shape {list(shape)}: one vector has no pairs"
        if not _is_table(shape, reading):
            return f"{len(shape)}-D of shape {list(shape)}: the name does not tell how it splits into matrices"
    if extent.dtype.startswith("F8"):
        for suffix in SCALES:
            scales = shapes.get(extent.name + suffix)
            if scales is not None and math.prod(scales) > 1:
                return f"quantised: {extent.dtype} with scales in {extent.name + suffix}; not decoded"
    return None


def _is_table(shape: tuple[int, ...], reading: Reading) -> bool:
    """Position tables of vision models carry a batch axis: (1, n, d)."""
    return len(shape) == 3 and shape[0] == 1 and reading.role == "Embedding"


def _is_norm(name: str) -> bool:
    return re.search(r"norm|\bln|(^|\.)bn|gamma", name, re.IGNORECASE) is not None


def _matrices(extent: Extent, reading: Reading) -> Iterator[Matrix]:
    shape = extent.shape
    out, inward = shape[::-1] if reading.transposed else (shape[0], math.prod(shape[1:]))
    if _is_table(shape, reading):
        out, inward = shape[1:]
    if not reading.parts:
        yield Matrix(extent.name, reading.layer, reading.role, reading.transposed, 0, out, inward)
    for part in reading.parts:
        name = f"{extent.name}[{part.label}]"
        yield Matrix(name, reading.layer, part.role, reading.transposed, part.start, part.stop, inward)


def layer_numbers(text: str) -> Sequence[str]:
    """Expand "0-3,7,decoder.2" into the layers it names.

    Raises:
        InputError: if a range cannot be read.
    """
    found: list[str] = []
    for word in text.replace(" ", "").split(","):
        span = re.fullmatch(r"(.*?)(\d+)-(\d+)", word)
        if span and int(span[2]) <= int(span[3]) < int(span[2]) + 100_000:
            found += [f"{span[1]}{number}" for number in range(int(span[2]), int(span[3]) + 1)]
        elif word and not span:
            found.append(word)
        else:
            raise InputError(f"layers needs numbers and ranges such as 0-3,7 or decoder.0-5, got {text!r}")
    return found

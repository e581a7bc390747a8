"""What a scan will do, decided from the headers alone: which matrices, in which order, and what is left out and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from orthofast.errors import InputError
from orthofast.scan.catalog import Catalog, Fault
from orthofast.scan.matrices import Matrix, holds_matrices, matrices_of
from orthofast.scan.roles import Reading, Roles
from orthofast.scan.weights import Weight, join_weights

SIDES = ("rows", "cols")


@dataclass(frozen=True, slots=True)
class Item:
    """One weight to read and the matrices in it."""

    weight: Weight
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
        adapter: facts of the adapter that is scanned with its base, None without one.
        unmerged: parts of it that cannot be used, likewise.
        outside: tells why a name is not selected, None for one that is.
    """

    catalog: Catalog
    sides: tuple[str, ...]
    items: list[Item] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    faults: list[tuple[Fault, Reading]] = field(default_factory=list)
    adapter: Mapping[str, object] | None = None
    unmerged: list[tuple[Fault, Reading]] = field(default_factory=list)
    outside: Callable[[str, Reading], str | None] = field(default=lambda name, reading: None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        return sum(item.weight.nbytes for item in self.items)


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
    weights = join_weights(catalog)
    shapes = {weight.name: weight.shape for weight in weights.found}
    stored = {extent.name: extent.shape for extent in catalog.extents}
    named = {fault.name: fault.shape or () for fault in catalog.faults if not fault.whole_file}
    roles = Roles(named | stored | shapes, catalog.config)

    def outside(name: str, reading: Reading) -> str | None:
        if wanted is not None and not any(fnmatchcase(name, glob) for glob in wanted):
            return "not selected by include"
        if unwanted and any(fnmatchcase(name, glob) for glob in unwanted):
            return "left out by exclude"
        if layers is not None and (reading.layer is None or reading.layer.removesuffix(".cross") not in layers):
            return "not in the selected layers"
        return None

    plan.outside = outside
    selected = 0
    for weight in sorted(weights.found, key=lambda w: (str(w.first.file), w.first.offset, w.name)):
        reading = roles.read(weight.name, weight.shape)
        reason = outside(weight.name, reading)
        selected += reason is None
        reason = reason or reading.skip or unmeasurable(weight, reading)
        if reason:
            plan.skipped.append((weight.name, reason))
        else:
            plan.items.append(Item(weight, tuple(matrices_of(weight.name, weight.shape, reading))))
    for name, why in weights.skipped:
        reading = roles.read(name, stored.get(name, ()))
        reason = outside(name, reading)
        selected += reason is None
        plan.skipped.append((name, reason or reading.skip or why))
    for fault in (*catalog.faults, *weights.faults):
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


def unmeasurable(weight: Weight, reading: Reading) -> str | None:
    """Why a weight has no matrices to measure; None where it has."""
    shape = weight.shape
    if len(shape) < 2:
        kind = "bias" if weight.name.endswith(("bias", "beta")) else "norm scale" if _is_norm(weight.name) else "vector"
        return f"{kind} of shape {list(shape)}: one vector has no pairs" if shape else "a single number"
    if math.prod(shape) == 0:
        return f"empty: shape {list(shape)}"
    if len(shape) > 2 and not reading.role.startswith("Conv"):
        if math.prod(shape[:-1]) == 1:
            return f"vector of shape {list(shape)}: one vector has no pairs"
        if not holds_matrices(shape, reading):
            return f"{len(shape)}-D of shape {list(shape)}: the name does not tell how it splits into matrices"
    return None


def _is_norm(name: str) -> bool:
    return re.search(r"norm|\bln|(^|\.)bn|gamma", name, re.IGNORECASE) is not None


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

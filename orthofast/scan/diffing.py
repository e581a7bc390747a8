"""Two checkpoints compared weight by weight: equal or not, drift of the angles, size of the change, PII of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from orthofast.errors import CheckpointError, InputError
from orthofast.metrics.drift import conformal_drift
from orthofast.scan.comparison import Comparison, compare_rows
from orthofast.scan.decoders import decode
from orthofast.scan.engines import Group, HostStaging, PositionalEngine
from orthofast.scan.matrices import Matrix
from orthofast.scan.plan import Item, Plan
from orthofast.scan.renaming import renamer
from orthofast.scan.result import Row, ScanResult

PAIR_BYTES = 64 << 20  # weights of either checkpoint read together
HOLD_BYTES = 512 << 20  # of each checkpoint, unless one weight alone is larger
BLOCK_VALUES = 1 << 20  # compared at a time in float64

Measure = Callable[[Plan], ScanResult]
Progress = Callable[[int, int, str], None]
Moved = dict[tuple[str, int | None, str], tuple[float | None, float]]  # matrix, expert, side -> drift, relative change


def compare_checkpoints(
    before: Plan,
    after: Plan,
    measure: Measure,
    *,
    drift: bool = True,
    precision: str = "auto",
    backend: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare all matrices of two checkpoints; those whose values are the same are measured once.

    Memory: some hundred MiB of each checkpoint, or two weights where these are larger.

    Args:
        before: the first checkpoint's plan.
        after: the second's, with the same sides.
        measure: makes a plan a result, such as ``provenance.measure``.
        drift: also how far the angles between the vectors moved: about twice the work of the two PII.
        precision: of the drift, as in :func:`orthofast.conformal_drift`.
        backend: of the drift, likewise.
        device: where the drift is computed; None for the processor.
        progress: called with (bytes done, bytes in all, name of the latest weight).

    Raises:
        InputError: if the plans have different sides.
        CheckpointError: if nothing in common can be read.
        BackendError: if the named backend cannot serve.
    """
    if before.sides != after.sides:
        raise InputError(f"both plans need the same sides, got {before.sides} and {after.sides}")
    rename = renamer(_names(before), _names(after))
    partners = {rename(item.weight.name): item for item in before.items}
    pairs = [(partners[item.weight.name], item) for item in after.items if item.weight.name in partners]
    pairs = [(old, new) for old, new in pairs if _fit(old, new)]
    total = sum(old.weight.nbytes + new.weight.nbytes for old, new in pairs)
    equal, moved, done = set[str](), Moved(), 0
    for old, new, values in _read_pairs(pairs, before, after):
        if values is not None and _same(*values):
            equal.add(new.weight.name)
        elif values is not None:
            moved |= _moved(new, *values, after.sides, (precision, backend) if drift else None, device)
        done += old.weight.nbytes + new.weight.nbytes
        if progress is not None:
            progress(done, total, new.weight.name)
    first = measure(before)
    first.rows = [replace(row, name=rename(row.name)) for row in first.rows]
    changed = replace(after, items=[item for item in after.items if item.weight.name not in equal])
    second = measure(changed) if changed.items or changed.faults else ScanResult([], [], dict(first.provenance))
    rows = second.rows + _shared(first.rows, after, equal)
    for row in rows:
        found = moved.get((row.name, row.expert, row.vectors)) if row.head is None else None
        if found is not None and row.error is None:
            row.drift, row.relative_change = found
    after_facts = second.provenance | {"checkpoint": after.catalog.root.absolute().name or str(after.catalog.root)}
    return Comparison(compare_rows(first.rows, rows), dict(first.provenance), after_facts)


def relative_change(before: Tensor, after: Tensor) -> float:
    """Frobenius norm of the change of a matrix over that of the matrix before, in float64; NaN of zero over zero.

    >>> relative_change(torch.eye(2), 1.5 * torch.eye(2))
    0.5
    """
    step = max(1, BLOCK_VALUES // max(1, before.shape[1]))
    change = size = 0.0
    for start in range(0, before.shape[0], step):
        old, new = before[start : start + step].double(), after[start : start + step].double()
        change += float((new - old).square().sum())
        size += float(old.square().sum())
    return (change / size) ** 0.5 if size else (float("inf") if change else 0.0)


def _names(plan: Plan) -> set[str]:
    """Of weights and of the matrices in them."""
    return {name for item in plan.items for name in (item.weight.name, *(matrix.name for matrix in item.matrices))}


def _fit(old: Item, new: Item) -> bool:
    """Whether the same matrices lie in both, so that their vectors can be compared one by one."""
    return len(old.matrices) == len(new.matrices) and all(
        (a.name.removeprefix(old.weight.name), a.out, a.inward)
        == (b.name.removeprefix(new.weight.name), b.out, b.inward)
        for a, b in zip(old.matrices, new.matrices, strict=True)
    )


def _read_pairs(
    pairs: Sequence[tuple[Item, Item]], before: Plan, after: Plan
) -> Iterator[tuple[Item, Item, tuple[Tensor, Tensor] | None]]:
    """Both versions of each weight, decoded, read ahead; None where one cannot be had: measuring says why."""
    batches = list(_batches(pairs))
    engines = [
        PositionalEngine(HostStaging(HOLD_BYTES, PAIR_BYTES), memory=plan.catalog.memory) for plan in (before, after)
    ]
    try:
        sources = [
            engine.groups([[pair[side] for pair in batch] for batch in batches]) for side, engine in enumerate(engines)
        ]
        for batch in batches:
            groups = [next(group for group in source if group is not None) for source in sources]
            for index, (old, new) in enumerate(batch):
                yield old, new, _decoded(groups, index)
            for engine, group in zip(engines, groups, strict=True):
                engine.release(group)
    finally:
        for engine in engines:
            engine.close()


def _batches(pairs: Sequence[tuple[Item, Item]]) -> Iterator[list[tuple[Item, Item]]]:
    batch: list[tuple[Item, Item]] = []
    size = 0
    for pair in pairs:
        nbytes = max(item.weight.nbytes for item in pair)
        if batch and size + nbytes > PAIR_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(pair)
        size += nbytes
    if batch:
        yield batch


def _decoded(groups: Sequence[Group], index: int) -> tuple[Tensor, Tensor] | None:
    values = []
    for group in groups:
        parts = group.parts[index]
        if isinstance(parts, CheckpointError):
            return None
        try:
            values.append(decode(group.items[index].weight, parts))
        except CheckpointError:
            return None
    return values[0], values[1]


def _same(old: Tensor, new: Tensor) -> bool:
    """Whether all values are the same, of whatever type they are stored."""
    if old.shape != new.shape:
        return False
    if old.dtype == new.dtype:
        return torch.equal(old, new)
    return all(torch.equal(a.double(), b.double()) for a, b in zip(old, new, strict=True))


def _moved(
    item: Item,
    old: Tensor,
    new: Tensor,
    sides: Sequence[str],
    drift: tuple[str, str | None] | None,
    device: str | torch.device | None,
) -> Moved:
    found: Moved = {}
    for matrix in item.matrices:
        versions = _on(matrix, old, device), _on(matrix, new, device)
        change = relative_change(*versions)
        for side in sides:
            turned = None
            if drift is not None:
                precision, backend = drift
                value = conformal_drift(*versions, vectors=side, precision=precision, backend=backend).absolute.item()
                turned = value if value == value else None
            found[matrix.name, matrix.expert, side] = turned, change
    return found


def _on(matrix: Matrix, tensor: Tensor, device: str | torch.device | None) -> Tensor:
    """(out, in) on the device."""
    view = matrix.view(tensor)
    return view if device is None else view.to(device)


def _shared(rows: Sequence[Row], after: Plan, equal: set[str]) -> list[Row]:
    """Rows of weights that are the same in both, for the second result."""
    names = {matrix.name for item in after.items if item.weight.name in equal for matrix in item.matrices}
    return [replace(row, drift=0.0, relative_change=0.0) for row in rows if row.name in names]

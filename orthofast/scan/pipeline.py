"""Run a plan: read tensors ahead of the fold, fold batches of matrices, keep memory bounded.

Memory: the batch being folded and the batch being read, each ``plan.BATCH_BYTES`` or one larger tensor.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.kernels import dispatch, gram_stats_many
from orthofast.kernels.contract import make_request
from orthofast.metrics.coherence import isotropic_baseline, pii_from
from orthofast.records import GramStats
from orthofast.scan.catalog import TORCH_DTYPES, Extent, Fault
from orthofast.scan.decoders import decode
from orthofast.scan.matrices import Matrix
from orthofast.scan.plan import Item, Plan
from orthofast.scan.result import Row
from orthofast.scan.roles import Reading
from orthofast.scan.weights import Weight

READ_BYTES = 16 << 20  # one positional read

Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class Outcome:
    """What running a plan gives: rows, the backends that served, and seconds spent."""

    rows: list[Row] = field(default_factory=list)
    backends: set[str] = field(default_factory=set)
    read_s: float = 0.0
    fold_s: float = 0.0


@dataclass(slots=True)
class _Batch:
    items: list[Item]
    tensors: list[Tensor | CheckpointError]
    seconds: float


def run(
    plan: Plan, *, precision: str = "auto", backend: str | None = None, progress: Progress | None = None
) -> Outcome:
    """Measure every matrix of a plan.

    Args:
        plan: from ``make_plan``.
        precision: as in ``gram_stats``.
        backend: as in ``gram_stats``.
        progress: called with (bytes done, bytes in all, name of the latest tensor).

    Raises:
        InputError: if precision is none of the known ones.
        BackendError: if the named backend cannot serve.
    """
    outcome = Outcome(rows=[row for fault, reading in plan.faults for row in _fault_rows(fault, reading, plan.sides)])
    done = 0
    for batch in _read_ahead(plan):
        started = time.perf_counter()
        good = [(item, t) for item, t in zip(batch.items, batch.tensors, strict=True) if isinstance(t, Tensor)]
        for item, tensor in zip(batch.items, batch.tensors, strict=True):
            if not isinstance(tensor, Tensor):
                for matrix in item.matrices:
                    fault = Fault(matrix.name, str(tensor), matrix.sizes("rows"))
                    outcome.rows += _fault_rows(fault, Reading(matrix.role, matrix.layer), plan.sides)
        _fold(good, plan.sides, precision, backend, outcome)
        outcome.fold_s += time.perf_counter() - started
        outcome.read_s += batch.seconds
        done += sum(item.weight.nbytes for item in batch.items)
        if progress is not None:
            progress(done, plan.nbytes, batch.items[-1].weight.name)
    return outcome


def read_extent(descriptor: int, extent: Extent) -> Tensor:
    """One tensor's values, read by position into memory of its own.

    Raises:
        CheckpointError: if the file ends early or cannot be read, or memory is short.
    """
    try:
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
    except (MemoryError, RuntimeError):
        raise CheckpointError(
            f"{extent.file.name}: no memory for the {extent.nbytes} bytes of {extent.name!a}"
        ) from None
    view = buffer.numpy().data  # a memoryview of the same bytes
    at = 0
    while at < extent.nbytes:
        try:
            count = os.preadv(descriptor, [view[at : at + READ_BYTES]], extent.offset + at)
        except OSError as error:
            raise CheckpointError(f"{extent.file.name} cannot be read at {extent.name!a}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{extent.file.name} became shorter while it was read: {extent.name!a} is incomplete")
        at += count
    return buffer.view(TORCH_DTYPES[extent.dtype]).view(extent.shape)


def _read_ahead(plan: Plan) -> Iterator[_Batch]:
    """Batches in order; one thread reads the next while the last is folded."""
    with ExitStack() as opened, ThreadPoolExecutor(1, thread_name_prefix="orthofast-read") as reader:
        descriptors: dict[str, int | CheckpointError] = {}

        def read(items: list[Item]) -> _Batch:
            started = time.perf_counter()
            tensors = [_read(item.weight, descriptors, opened) for item in items]
            return _Batch(items, tensors, time.perf_counter() - started)

        pending: Future[_Batch] | None = None
        for items in plan.batches():
            following = reader.submit(read, items)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _read(weight: Weight, descriptors: dict[str, int | CheckpointError], opened: ExitStack) -> Tensor | CheckpointError:
    try:
        parts = {role: read_extent(_open(extent, descriptors, opened), extent) for role, extent in weight.parts.items()}
        return decode(weight, parts)
    except CheckpointError as error:
        return error


def _open(extent: Extent, descriptors: dict[str, int | CheckpointError], opened: ExitStack) -> int:
    key = str(extent.file)
    if key not in descriptors:
        try:
            descriptor = os.open(extent.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            opened.callback(os.close, descriptor)
            descriptors[key] = descriptor
        except OSError as error:
            descriptors[key] = CheckpointError(f"{extent.file.name} cannot be read: {error.strerror}")
    found = descriptors[key]
    if isinstance(found, CheckpointError):
        raise found
    return found


def _fold(
    read: list[tuple[Item, Tensor]], sides: tuple[str, ...], precision: str, backend: str | None, outcome: Outcome
) -> None:
    jobs: list[tuple[Matrix, str, Tensor]] = []
    for item, tensor in read:
        for matrix in item.matrices:
            view = matrix.view(tensor)  # (out, in)
            jobs += [(matrix, side, view if side == "rows" else view.T) for side in sides]
    vectors = [x for _, _, x in jobs]
    outcome.backends |= {dispatch.choose(make_request(x, precision=precision), backend).NAME for x in vectors}
    records = gram_stats_many(vectors, precision=precision, backend=backend)
    outcome.rows += [_row(matrix, side, record) for (matrix, side, _), record in zip(jobs, records, strict=True)]


def _row(matrix: Matrix, side: str, record: GramStats) -> Row:
    n, d = matrix.sizes(side)
    zero, nonfinite = int(record.zero.item()), int(record.nonfinite.item())
    baseline = isotropic_baseline(d)
    row = Row(matrix.name, matrix.layer, matrix.role, side, n, d, None, baseline, None, zero, nonfinite, None)
    if nonfinite:
        row.error = f"{nonfinite} of {n} vectors hold NaN or Inf"
        return row
    pii = float(pii_from(record).item())
    if math.isfinite(pii):  # NaN: fewer than two vectors that are not zero
        row.pii, row.ratio = pii, pii / baseline
    return row


def _fault_rows(fault: Fault, reading: Reading, sides: tuple[str, ...]) -> list[Row]:
    role = reading.role or None
    rows = []
    for side in sides:
        n, d = (None, None) if fault.shape is None or len(fault.shape) != 2 else fault.shape
        if side == "cols" or reading.transposed:
            n, d = (n, d) if side == "cols" and reading.transposed else (d, n)
        rows.append(Row(fault.name, reading.layer, role, side, n, d, None, None, None, None, None, fault.error))
    return rows

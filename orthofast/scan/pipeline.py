"""Run a plan: read tensors ahead of the fold, fold batches of matrices, keep memory bounded.

Memory: the batch being folded and the batch being read, each ``plan.BATCH_BYTES`` or one larger tensor.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
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
from orthofast.scan.plan import Item, Matrix, Plan
from orthofast.scan.result import Row
from orthofast.scan.roles import Reading

READ_BYTES = 16 << 20  # one positional read
AHEAD = 1  # batches read while one is folded

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


def run(plan: Plan, *, precision: str = "auto", backend: str | None = None, progress: Progress | None = None) -> Outcome:
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
                readings = [(m, Reading(m.role, m.layer)) for m in item.matrices]
                for matrix, reading in readings:
                    fault = Fault(matrix.name, str(tensor), (matrix.stop - matrix.start, matrix.inward))
                    outcome.rows += _fault_rows(fault, reading, plan.sides)
        _fold(good, plan.sides, precision, backend, outcome)
        outcome.fold_s += time.perf_counter() - started
        outcome.read_s += batch.seconds
        done += sum(item.extent.nbytes for item in batch.items)
        if progress is not None:
            progress(done, plan.nbytes, batch.items[-1].extent.name)
    return outcome


def read_extent(descriptor: int, extent: Extent) -> Tensor:
    """One tensor's values, read by position into memory of its own.

    Raises:
        CheckpointError: if the file ends early or cannot be read, or memory is short.
    """
    try:
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
    except (MemoryError, RuntimeError):
        raise CheckpointError(f"{extent.file.name}: no memory for the {extent.nbytes} bytes of {ascii(extent.name)}") from None
    view = memoryview(buffer.numpy())
    at = 0
    while at < extent.nbytes:
        try:
            count = os.preadv(descriptor, [view[at : at + READ_BYTES]], extent.offset + at)
        except OSError as error:
            raise CheckpointError(f"{extent.file.name} cannot be read at {ascii(extent.name)}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{extent.file.name} became shorter while it was read: {ascii(extent.name)} is incomplete")
        at += count
    return buffer.view(TORCH_DTYPES[extent.dtype]).view(extent.shape)


def _read_ahead(plan: Plan) -> Iterator[_Batch]:
    """Batches in order, read by one thread that waits when :data:`AHEAD` of them are ready."""
    ready: queue.Queue[_Batch | BaseException | None] = queue.Queue(maxsize=AHEAD)
    stop = threading.Event()

    def put(value: _Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(value, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            with ExitStack() as opened:
                descriptors: dict[str, int | CheckpointError] = {}
                for items in plan.batches():
                    if stop.is_set():
                        return
                    started = time.perf_counter()
                    tensors = [_read(item.extent, descriptors, opened) for item in items]
                    put(_Batch(items, tensors, time.perf_counter() - started))
                    del tensors
            put(None)
        except BaseException as error:  # handed to the folding thread, which raises it
            put(error)

    reader = threading.Thread(target=read, name="orthofast-read", daemon=True)
    reader.start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
        reader.join()


def _read(extent: Extent, descriptors: dict[str, int | CheckpointError], opened: ExitStack) -> Tensor | CheckpointError:
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
        return found
    try:
        return read_extent(found, extent)
    except CheckpointError as error:
        return error


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

"""Decoded weights to rows: views of the matrices, folds of many at a time, values fetched in one copy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from orthofast.kernels import Sample, dispatch, gram_stats, gram_stats_many
from orthofast.kernels.contract import make_request
from orthofast.metrics.coherence import isotropic_baseline, pii_from
from orthofast.records import GramStats
from orthofast.scan.adapters_update import version_of
from orthofast.scan.catalog import Fault
from orthofast.scan.devices import Device
from orthofast.scan.matrices import Matrix
from orthofast.scan.plan import Item
from orthofast.scan.result import Row
from orthofast.scan.roles import Reading
from orthofast.scan.slabs import Event
from orthofast.scan.weights import PLAIN

BINS = 64  # of the histogram of cosines
CALL_FLOPS = 2e10  # folded in one call on a processor: tenths of a second
DEVICE_CALL_FLOPS = 1e14  # on a device, where a call costs a launch and its work waits in a queue
SCALARS = ("pairs", "zero", "nonfinite", "abs_sum", "standard_error", "abs_max")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is folded, and how.

    Attributes:
        sides: "rows", "cols" or both.
        heads: also each attention head by itself.
        sample: pairs to draw of each set of vectors, None for all pairs.
        detail: also the largest cosine with its pair, and the histogram.
        precision: as in ``gram_stats``.
        backend: as in ``gram_stats``.
    """

    sides: tuple[str, ...]
    heads: bool = False
    sample: Sample | None = None
    detail: bool = False
    precision: str = "auto"
    backend: str | None = None

    @property
    def want(self) -> tuple[str, ...]:
        """Fields of the record; the largest of some pairs is not the largest of all."""
        if not self.detail:
            return ("abs_sum",)
        return ("abs_sum", "hist") if self.sample else ("abs_sum", "abs_max", "hist")

    @property
    def bins(self) -> int:
        """Bins of the histogram, 0 without one."""
        return BINS if self.detail else 0


@dataclass(frozen=True, slots=True)
class Job:
    """Sets of vectors folded together: one side of a matrix, or its heads.

    Attributes:
        item: index of the weight in its group.
        matrix: the matrix.
        side: "rows" or "cols".
        n: number of vectors in a set.
        d: their length.
        alone: the expert that is decoded without its stack; None where the weight is decoded whole.
        heads: sets, one per head; 0 for the whole matrix.
        version: "base", "merged" or "delta" of a weight with an adapter.
        given: the vectors themselves are handed in, not a weight that holds them.
    """

    item: int
    matrix: Matrix
    side: str
    n: int
    d: int
    alone: int | None = None
    heads: int = 0
    version: str | None = None
    given: bool = False

    @property
    def source(self) -> tuple[int, int | None]:
        """What is decoded for it: index of the weight, and the expert where one is decoded alone."""
        return self.item, self.alone

    @property
    def flops(self) -> float:
        """Multiplications and additions of all pairs."""
        return max(self.heads, 1) * self.n * (self.n - 1.0) * self.d

    def view(self, weight: Tensor) -> Tensor:
        """(n, d) of the whole matrix or (heads, n, d), from what was decoded."""
        if self.given:
            return weight
        matrix = self.matrix if self.alone is None else replace(self.matrix, stack=1, expert=0)
        if self.heads:
            return matrix.head_views(weight)
        rows = matrix.view(weight)  # (out, in)
        return rows if self.side == "rows" else rows.T


@dataclass(slots=True)
class Fetch:
    """Records of some jobs on their way to the host.

    Attributes:
        jobs: what was folded.
        values: the fields of their records in one tensor, or why there are none.
        ready: when it may be read; None at once.
        shapes: (field, elements) in the order of ``values``.
        changes: (sets, 2) drift and relative change from the base, of merged weights.
        changes_ready: when they may be read, likewise.
    """

    jobs: list[Job]
    values: Tensor | str
    ready: Event | None = None
    shapes: list[tuple[str, int]] = field(default_factory=list)
    changes: Tensor | None = None
    changes_ready: Event | None = None


def jobs_of(item: Item, settings: Settings, index: int = 0) -> Iterator[Job]:
    """Everything to fold in one weight."""
    stacked = item.weight.coding != PLAIN and len(item.weight.shape) == 3
    version = version_of(item.weight)
    for matrix in item.matrices:
        alone = matrix.expert if stacked and matrix.stack else None
        for side in settings.sides:
            n, d = matrix.sizes(side)
            yield Job(index, matrix, side, n, d, alone, version=version)
            if settings.heads and matrix.heads > 1 and matrix.head_axis == side:
                yield Job(index, matrix, side, *matrix.head_sizes(), alone, matrix.heads, version)


def calls(jobs: Sequence[Job], device: Device | None) -> Iterator[list[Job]]:
    """Whole weights or experts, about so many operations at a time: few calls, and progress that moves."""
    limit = CALL_FLOPS if device is None else DEVICE_CALL_FLOPS
    call: list[Job] = []
    flops = 0.0
    for job in jobs:
        if flops >= limit and job.source != call[-1].source:
            yield call
            call, flops = [], 0.0
        call.append(job)
        flops += job.flops
    if call:
        yield call


class Folder:
    """Folds jobs and turns records into rows.

    Args:
        settings: what is folded, and how.
        device: where; None for the processor.
    """

    def __init__(self, settings: Settings, device: Device | None = None) -> None:
        self.settings = settings
        self.backends: set[str] = set()
        self.fold_s = 0.0  # on a device: of launching, and of waiting for values
        self._device = device
        self._known: dict[tuple[object, ...], str] = {}

    def start(self, jobs: list[Job], weights: Mapping[tuple[int, int | None], Tensor]) -> list[Fetch]:
        """Fold jobs of decoded weights; where memory is short, fewer at a time, and one that never fits is named."""
        began = time.perf_counter()
        try:
            records = self._fold([job.view(weights[job.source]) for job in jobs])
            return [self._fetched(jobs, records)]
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
        finally:
            self.fold_s += time.perf_counter() - began
        if self._device is not None:
            self._device.relieve()
        if len(jobs) == 1:
            where = "the processor's memory" if self._device is None else f"the memory of {self._device.device}"
            job = jobs[0]
            return [Fetch(jobs, f"{where} does not suffice to fold {job.n} vectors of length {job.d}")]
        half = len(jobs) // 2
        return self.start(jobs[:half], weights) + self.start(jobs[half:], weights)

    def rows(self, fetch: Fetch) -> list[tuple[Job, list[Row]]]:
        """The rows of each job, one per set of vectors; waits for the values."""
        if isinstance(fetch.values, str):
            return [(job, _failed(job, fetch.values)) for job in fetch.jobs]
        for ready in (fetch.ready, fetch.changes_ready):
            if ready is not None:
                began = time.perf_counter()
                ready.synchronize()
                self.fold_s += time.perf_counter() - began
        record = _unpacked(fetch)
        pii = pii_from(record).tolist()
        fields = {name: value.tolist() for name in SCALARS if (value := getattr(record, name)) is not None}
        pairs = None if record.argmax is None else record.argmax.tolist()
        hists = None if record.hist is None else record.hist.tolist()
        changes = None if fetch.changes is None else fetch.changes.tolist()
        found: list[tuple[Job, list[Row]]] = []
        at = 0
        for job in fetch.jobs:
            rows = []
            for head in range(max(job.heads, 1)):
                row = self._row(job, {name: values[at] for name, values in fields.items()}, pii[at])
                row.head = head if job.heads else None
                row.adapter = job.version
                if changes is not None and row.error is None:
                    row.drift, row.relative_change = (v if math.isfinite(v) else None for v in changes[at])
                if row.error is None and row.pii is not None:
                    if pairs is not None:
                        row.max_pair = (int(pairs[at][0]), int(pairs[at][1]))
                    if hists is not None:
                        row.histogram = tuple(int(count) for count in hists[at])
                rows.append(row)
                at += 1
            found.append((job, rows))
        return found

    def attach(self, fetch: Fetch, changes: Tensor) -> None:
        """Let a fetch carry (sets, 2) drift and relative change of its jobs."""
        if self._device is None:
            fetch.changes = changes
        else:
            fetch.changes, fetch.changes_ready = self._device.fetch(changes)

    def relieve(self) -> None:
        """Give back what an allocator keeps."""
        if self._device is not None:
            self._device.relieve()

    def _fold(self, vectors: list[Tensor]) -> list[GramStats]:
        settings = self.settings
        for x in vectors:
            key = (x.shape, x.stride(), x.dtype, x.device)
            if key not in self._known:
                request = make_request(x, want=settings.want, bins=settings.bins, precision=settings.precision)
                self._known[key] = dispatch.choose(request, settings.backend).NAME
            self.backends.add(self._known[key])
        if settings.sample is None:
            return gram_stats_many(
                vectors,
                want=settings.want,
                bins=settings.bins,
                precision=settings.precision,
                backend=settings.backend,
            )
        return [
            gram_stats(
                x,
                want=settings.want,
                bins=settings.bins,
                sample=settings.sample,
                precision=settings.precision,
                backend=settings.backend,
            )
            for x in vectors
        ]

    def _fetched(self, jobs: list[Job], records: list[GramStats]) -> Fetch:
        """All fields of all records as one float64 tensor: counts are exact up to 2^53."""
        names = [name for name in (*SCALARS, "argmax", "hist") if getattr(records[0], name) is not None]
        columns = [
            torch.cat([getattr(record, name).reshape(len(record.pairs), -1) for record in records]).double()
            for name in names
        ]
        shapes = [(name, column.shape[1]) for name, column in zip(names, columns, strict=True)]
        values = torch.cat(columns, 1)  # (sets, fields)
        if self._device is None:
            return Fetch(jobs, values, None, shapes)
        host, ready = self._device.fetch(values)
        return Fetch(jobs, host, ready, shapes)

    def _row(self, job: Job, values: dict[str, float], pii: float) -> Row:
        matrix, zero, nonfinite = job.matrix, int(values["zero"]), int(values["nonfinite"])
        baseline = isotropic_baseline(job.d)
        row = Row(
            matrix.name, matrix.layer, matrix.role, job.side, job.n, job.d, None, baseline, None, zero, nonfinite, None
        )
        row.expert = matrix.expert
        if nonfinite:
            row.error = f"{nonfinite} of {job.n} vectors hold NaN or Inf"
        elif math.isfinite(pii):  # NaN: fewer than two vectors that are not zero
            row.pii, row.ratio = pii, pii / baseline
            spread = values.get("standard_error")
            if spread and math.isfinite(spread):  # 0: all pairs were folded
                row.standard_error = spread
            if "abs_max" in values:
                row.max_abs = min(values["abs_max"], 1.0)
        return row


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory was short."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def _failed(job: Job, error: str) -> list[Row]:
    row = replace(error_row(job.matrix, job.side, error), adapter=job.version)
    return [replace(row, n=job.n, d=job.d, head=head) for head in range(job.heads)] if job.heads else [row]


def error_row(matrix: Matrix, side: str, error: str) -> Row:
    """The row of a matrix that could not be measured from one side."""
    n, d = matrix.sizes(side)
    row = Row(matrix.name, matrix.layer, matrix.role, side, n, d, None, None, None, None, None, error)
    row.expert = matrix.expert
    return row


def fault_rows(fault: Fault, reading: Reading, sides: tuple[str, ...]) -> list[Row]:
    """The rows of what the catalog could not place."""
    rows = []
    for side in sides:
        n, d = (None, None) if fault.shape is None or len(fault.shape) != 2 else fault.shape
        if reading.transposed != (side == "cols"):
            n, d = d, n
        rows.append(
            Row(fault.name, reading.layer, reading.role or None, side, n, d, None, None, None, None, None, fault.error)
        )
    return rows


def _unpacked(fetch: Fetch) -> GramStats:
    """The fields as one record of all sets, on the host."""
    assert isinstance(fetch.values, Tensor)
    fields: dict[str, Tensor] = {}
    columns = fetch.values.split([width for _, width in fetch.shapes], 1)
    for (name, width), column in zip(fetch.shapes, columns, strict=True):
        value = column if width > 1 or name == "hist" else column.squeeze(1)
        fields[name] = value.long() if name in ("pairs", "zero", "nonfinite", "argmax", "hist") else value
    record = GramStats(fields.pop("pairs"), fields.pop("zero"), fields.pop("nonfinite"))
    for name, value in fields.items():
        setattr(record, name, value)
    return record

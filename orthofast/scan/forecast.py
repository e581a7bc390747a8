"""What a scan would cost, from a plan and a fraction of a second of trial: reads, decodes and folds of a few shapes.

Folds are timed on the shapes that cost most, cut to a size that takes milliseconds, from the side they are folded
from; reads on a few places of the files, which may lie in the page cache already and then come faster than from disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from orthofast.errors import CheckpointError, InputError
from orthofast.kernels import Sample
from orthofast.kernels.sampling import checked_sample
from orthofast.scan.adapters_update import BASE
from orthofast.scan.budgets import budget_for, working_bytes
from orthofast.scan.decoders import decode, decoded_dtype
from orthofast.scan.devices import Device, open_device
from orthofast.scan.folding import Folder, Job, Settings, jobs_of
from orthofast.scan.matrices import Matrix
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import Item, Plan
from orthofast.scan.reading import Files, lay_out, stored_tensor
from orthofast.scan.weights import PLAIN

OFFER_S = 120.0  # an exact scan that takes longer is worth a sample
OFFER_PAIRS = 1_000_000  # of each set: a relative standard error of about a thousandth
SHAPES = 3  # that are timed, the dearest
TRIAL_VECTORS, TRIAL_LENGTH = 512, 4096  # they are cut to these on a processor
DEVICE_SCALE = 16  # and to so many times as many vectors on a device
PLACES, PLACE_BYTES = 4, 8 << 20  # of the files that are read
DECODE_BYTES = 64 << 20  # of a weight that is decoded for trial


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a scan would cost.

    Attributes:
        seconds: in all; reading goes on while others are folded.
        read_s: of reading alone.
        decode_s: of decoding quantised weights.
        fold_s: of folding.
        nbytes: to be read.
        flops: multiplications and additions.
        host_bytes: of the processor's memory for weights, at most.
        device_bytes: of a device's memory for weights; 0 on the processor.
        sampled_s: in all, with ``OFFER_PAIRS`` pairs of each set of vectors.
    """

    seconds: float
    read_s: float
    decode_s: float
    fold_s: float
    nbytes: int
    flops: float
    host_bytes: int
    device_bytes: int
    sampled_s: float

    @property
    def worth_sampling(self) -> bool:
        """Whether an exact scan takes long and a sample much less."""
        return self.seconds > OFFER_S and self.sampled_s < self.seconds / 3

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return {**asdict(self), "worth_sampling": self.worth_sampling}


def forecast(
    plan: Plan,
    *,
    precision: str = "auto",
    backend: str | None = None,
    heads: bool = False,
    sample: int | Sample | None = None,
    device: str | torch.device | None = None,
    options: ScanOptions | None = None,
) -> Forecast:
    """Estimate what ``measure`` with the same arguments would cost; what cannot be read counts as read at once.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve.
    """
    options, place = options or ScanOptions(), open_device(device)
    drawn = None if sample is None else checked_sample(sample)
    settings = Settings(
        plan.sides, heads=heads, sample=drawn, detail=options.detail, precision=precision, backend=backend
    )
    folder = Folder(settings, place)
    jobs = [(job, item) for item in plan.items for job in jobs_of(item, settings)]
    flops = sum(_flops(job, drawn) for job, _ in jobs)
    read_rate = _read_rate(plan)
    read_s = plan.nbytes / read_rate if read_rate else 0.0
    decode_s = _decode_s(plan, place)
    rates = _fold_rates(jobs, folder, place) if jobs else {}
    fold_s = sum(_flops(job, drawn) / _rate(job, rates) for job, _ in jobs)
    offered = Sample(OFFER_PAIRS) if drawn is None else drawn
    sampled_s = sum(_flops(job, offered) / _rate(job, rates) for job, _ in jobs)
    budget = budget_for(plan.items, options, None if place is None else place.free_bytes())
    working = max((working_bytes(item) for item in plan.items), default=0)
    largest = max((item.weight.nbytes for item in plan.items), default=0)
    pinned = budget.slab * budget.slabs
    return Forecast(
        seconds=max(read_s, decode_s + fold_s),
        read_s=read_s,
        decode_s=decode_s,
        fold_s=fold_s,
        nbytes=plan.nbytes,
        flops=flops,
        host_bytes=pinned if place else min(max(options.host_mem, largest), plan.nbytes) + working,
        device_bytes=budget.ring + working if place else 0,
        sampled_s=max(read_s, decode_s + sampled_s),
    )


def _flops(job: Job, sample: Sample | None) -> float:
    pairs = job.n * (job.n - 1) / 2
    if sample is not None:
        pairs = min(pairs, sample.pairs)
    again = 6 if job.version == BASE else 1  # merged, and the drift: two folds in plain torch
    return again * max(job.heads, 1) * 2 * pairs * job.d


Rates = dict[tuple[object, ...], float]  # kind of job -> operations a second; () for all others


def _kind(job: Job) -> tuple[object, ...]:
    return job.side, min(job.n, TRIAL_VECTORS), min(job.d, TRIAL_LENGTH), job.heads > 0


def _rate(job: Job, rates: Rates) -> float:
    return rates.get(_kind(job), rates[()])


def _fold_rates(jobs: list[tuple[Job, Item]], folder: Folder, device: Device | None) -> Rates:
    """Operations a second of the kinds of jobs that cost most; their mean for the others."""
    costs: dict[tuple[object, ...], float] = {}
    example: dict[tuple[object, ...], tuple[Job, Item]] = {}
    for job, item in jobs:
        kind = _kind(job)
        costs[kind] = costs.get(kind, 0.0) + job.flops
        if kind not in example or job.flops > example[kind][0].flops:
            example[kind] = job, item
    rates: Rates = {}
    exact = Folder(replace(folder.settings, sample=None), device)
    for kind in sorted(costs, key=lambda k: -costs[k])[:SHAPES]:
        job, item = example[kind]
        rates[kind] = _fold_rate(job, decoded_dtype(item.weight), exact, device)
    weight = sum(costs[kind] for kind in rates)
    if weight > 0:
        rates[()] = weight / sum(costs[kind] / rate for kind, rate in rates.items())
    else:
        rates[()] = 1.0  # nothing has a pair
    return rates


def _fold_rate(job: Job, dtype: torch.dtype, folder: Folder, device: Device | None) -> float:
    n = min(job.n, TRIAL_VECTORS * (1 if device is None else DEVICE_SCALE))
    d = min(job.d, TRIAL_LENGTH)
    shape = (max(n, 2), max(d, 1)) if job.side == "rows" else (max(d, 1), max(n, 2))  # as stored: (out, in)
    place = "cpu" if device is None else device.device
    weight = torch.rand(shape, device=place).sub(0.5).to(dtype)
    trial = Job(0, Matrix("trial", None, "Other", False, 0, shape[0], shape[1]), job.side, max(n, 2), max(d, 1))

    def fold() -> None:
        for fetch in folder.start([trial], {trial.source: weight}):
            folder.rows(fetch)

    return max(trial.flops, 1.0) / _seconds(fold)


def _read_rate(plan: Plan) -> float:
    """Bytes a second of positional reads, 0 where there is nothing to read."""
    layout = lay_out([item.weight for item in plan.items], plan.catalog.memory)
    if not layout.segments:
        return 0.0
    segments = sorted(layout.segments, key=lambda segment: -segment.nbytes)
    step = max(1, len(segments) // PLACES)
    chosen = [replace(segment, nbytes=min(segment.nbytes, PLACE_BYTES)) for segment in segments[::step][:PLACES]]
    files, done = Files(), 0
    began = time.perf_counter()
    try:
        for segment in chosen:
            into = memoryview(bytearray(segment.nbytes))
            started = time.perf_counter()
            try:
                files.read(segment, into)
                done += segment.nbytes
            except CheckpointError:
                began += time.perf_counter() - started  # a scan says what cannot be read
    finally:
        files.close()
    return done / max(time.perf_counter() - began, 1e-9)


def _decode_s(plan: Plan, device: Device | None) -> float:
    """Seconds of decoding: of each coding the smallest weight is tried."""
    smallest: dict[str, Item] = {}
    values: dict[str, float] = {}
    for item in plan.items:
        coding = item.weight.coding
        if coding == PLAIN:
            continue
        values[coding] = values.get(coding, 0.0) + item.weight.nbytes
        if coding not in smallest or item.weight.nbytes < smallest[coding].weight.nbytes:
            smallest[coding] = item
    return sum(values[coding] * _decode_one(item, plan, device) for coding, item in smallest.items())


def _decode_one(item: Item, plan: Plan, device: Device | None) -> float:
    """Seconds per stored byte; 0 for what cannot be read, or is too large for a trial."""
    if item.weight.nbytes > DECODE_BYTES:
        return 0.0
    layout = lay_out([item.weight], plan.catalog.memory)
    memory = torch.empty(layout.nbytes, dtype=torch.uint8)
    files = Files()
    try:
        for segment in layout.segments:
            files.read(segment, memory.numpy().data[segment.at : segment.at + segment.nbytes])
        parts: dict[str, Tensor] = {}
        for role, extent in item.weight.parts.items():
            if role in layout.places[0]:
                at = layout.places[0][role]
                parts[role] = stored_tensor(memory[at : at + extent.nbytes], extent)
            else:
                parts[role] = plan.catalog.memory[extent.name]
            if device is not None:
                parts[role] = parts[role].to(device.device)

        def run() -> None:
            found = decode(item.weight, parts)
            if device is not None:
                device.fetch(found.reshape(-1)[:1])[1].synchronize()

        return _seconds(run) / max(item.weight.nbytes, 1)
    except (CheckpointError, InputError):
        return 0.0
    finally:
        files.close()


def _seconds(call: Callable[[], None]) -> float:
    """The shorter of two runs; the first may load code."""
    return max(min(_timed(call) for _ in range(2)), 1e-9)


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

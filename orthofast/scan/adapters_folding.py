"""Merged weights and updates folded while their base is at hand: rows, drift and relative change."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.kernels import Sample
from orthofast.kernels.drift import drift_stats
from orthofast.metrics.drift import conformal_drift_from
from orthofast.scan.adapters_update import (
    ADDED,
    DELTA,
    LORA,
    MAGNITUDE,
    MERGED,
    REPLACEMENT,
    Factors,
    Update,
    change_sums,
    difference,
    factors_of,
    merge,
    small_vectors,
    square_sums,
    update_of,
)
from orthofast.scan.decoders.contract import Weight, as_stored
from orthofast.scan.engines import Group
from orthofast.scan.folding import Fetch, Folder, Job, is_shortage

NO_MEMORY = "no memory for the merged weight beside its base"


def start_versions(
    jobs: list[Job], weights: Mapping[tuple[int, int | None], Tensor], group: Group, folder: Folder
) -> list[Fetch]:
    """Start the folds of what an adapter makes of weights whose base is at hand; one merged weight at a time.

    Args:
        jobs: of the base, as they were handed to ``folder.start``.
        weights: the decoded base weights, likewise.
        group: with the parts of the adapter.
        folder: folds them.
    """
    fetches: list[Fetch] = []
    for source, base in weights.items():
        weight, parts = group.items[source[0]].weight, group.parts[source[0]]
        update = update_of(weight)
        if update is None or update.kind == ADDED or isinstance(parts, CheckpointError):
            continue
        own = [job for job in jobs if job.source == source]
        try:
            _start(own, source, base, _Given(weight, parts, update), folder, fetches)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            folder.relieve()
            version = MERGED if update.merges else DELTA
            fetches.append(Fetch([replace(job, version=version) for job in own], NO_MEMORY))
    return fetches


class _Given:
    """The parts that an adapter has of one weight."""

    def __init__(self, weight: Weight, parts: Mapping[str, Tensor], update: Update) -> None:
        found = {role: as_stored(parts[role], weight.parts[role]) for role in (MAGNITUDE, REPLACEMENT) if role in parts}
        self.update = update
        self.magnitude, self.replacement = found.get(MAGNITUDE), found.get(REPLACEMENT)
        self.factors: Factors | None = factors_of(weight, parts, update) if update.kind == LORA else None
        self.plain = self.factors is not None and not found  # the change is scale * B A and nothing else

    def merged(self, base: Tensor, expert: int | None) -> Tensor:
        """The weight of the merged model."""
        if self.replacement is not None:
            base = self.replacement if expert is None else self.replacement[expert : expert + 1]
        return base if self.factors is None else merge(base, self.factors, self.magnitude, expert)


def _start(
    jobs: list[Job], source: tuple[int, int | None], base: Tensor, given: _Given, folder: Folder, fetches: list[Fetch]
) -> None:
    changes: dict[Job, Tensor] = {}  # (sets,) sums of squares
    factors = given.factors
    for job in jobs if factors is not None else ():
        assert factors is not None
        vectors = small_vectors(factors, job.matrix, job.side).reshape(max(job.heads, 1), job.n, -1)
        if given.plain:
            changes[job] = square_sums(vectors) * given.update.scale * given.update.scale
        unit = _unit(vectors, torch.float64 if folder.settings.precision == "float64" else torch.float32)
        fetches += folder.start([replace(job, version=DELTA, d=vectors.shape[2], given=True)], {source: unit})
        del vectors, unit
    if given.update.merges:
        began = time.perf_counter()
        merged = given.merged(base, source[1])
        moved = {job: _moved(job, base, merged, changes.get(job), folder) for job in jobs}
        folder.fold_s += time.perf_counter() - began
        for fetch in folder.start([replace(job, version=MERGED) for job in jobs], {source: merged}):
            if isinstance(fetch.values, Tensor):
                folder.attach(fetch, torch.cat([moved[replace(job, version=jobs[0].version)] for job in fetch.jobs]))
            fetches.append(fetch)
        del merged
    if factors is None and given.replacement is not None:
        expert = source[1]
        after = given.replacement if expert is None else given.replacement[expert : expert + 1]
        fetches += folder.start([replace(job, version=DELTA) for job in jobs], {source: difference(base, after)})


def _unit(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same directions within the range of ``dtype``, whatever the scale of the factors."""
    peak = vectors.abs().amax()
    return (vectors / torch.where(peak > 0, peak, 1.0)).to(dtype)


def _moved(job: Job, base: Tensor, merged: Tensor, change: Tensor | None, folder: Folder) -> Tensor:
    """(sets, 2) float64: drift of the cosines, and size of the change over that of the base; NaN where undefined."""
    before, after = (job.view(x).reshape(max(job.heads, 1), job.n, job.d) for x in (base, merged))
    if change is None:
        change = change_sums(before, after)
    relative = (change / square_sums(before)).sqrt()
    settings = folder.settings
    if settings.sample is not None:
        before, after = _some(before, settings.sample), _some(after, settings.sample)
    drift = conformal_drift_from(drift_stats(before, after, precision=settings.precision, backend=settings.backend))
    return torch.stack([drift.absolute, relative], 1)


def _some(x: Tensor, sample: Sample) -> Tensor:
    """(b, k, d): vectors drawn by the seed, so many that they have about as many pairs as the sample."""
    count = math.isqrt(2 * sample.pairs) + 1
    if count >= x.shape[1]:
        return x
    drawn = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(sample.seed))[:count]
    return x[:, drawn.sort().values.to(x.device)]

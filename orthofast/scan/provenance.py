"""Run a plan into a result and record where its numbers come from: versions, machine, files, settings, seconds."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

from orthofast.kernels import Sample, dispatch
from orthofast.kernels.contract import make_request
from orthofast.kernels.sampling import checked_sample
from orthofast.scan.budgets import batches, budget_for, open_engine
from orthofast.scan.copies import find_copies
from orthofast.scan.devices import Device, open_device
from orthofast.scan.folding import BINS, Folder, Settings
from orthofast.scan.journal import RANK_SUFFIX, Journal, plan_digest
from orthofast.scan.options import ScanOptions
from orthofast.scan.pipeline import Finished, Progress, run
from orthofast.scan.plan import Item, Plan
from orthofast.scan.ranks import Scan, Team, restarted
from orthofast.scan.result import Row, ScanResult
from orthofast.scan.sharing import collect_published, measure_alone, measure_together
from orthofast.scan.tally import Tally


class Interrupted(KeyboardInterrupt):
    """A scan was interrupted (Ctrl-C); what it had measured is kept.

    Attributes:
        result: rows of all weights that were finished; the others are listed as skipped.
    """

    def __init__(self, result: ScanResult) -> None:
        super().__init__("the scan was interrupted")
        self.result = result


@dataclass(slots=True)
class _Spent:
    started: float = field(default_factory=time.perf_counter)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    read_s: float = 0.0
    fold_s: float = 0.0
    wait_s: float = 0.0
    reused: int = 0
    measured: int = 0
    backends: set[str] = field(default_factory=set)


def measure(
    plan: Plan,
    *,
    precision: str = "auto",
    backend: str | None = None,
    heads: bool = False,
    sample: int | Sample | None = None,
    device: str | torch.device | None = None,
    options: ScanOptions | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> ScanResult:
    """Measure every matrix of a plan, order the rows and add the provenance.

    Args:
        plan: from ``make_plan``.
        precision: as in ``gram_stats``.
        backend: as in ``gram_stats``.
        heads: also each attention head by itself.
        sample: estimate each PII from about this many random pairs; an int, or a ``Sample`` with a seed.
        device: where the folds run, such as "cuda"; None for the processor.
        options: memory, journal and what else is asked for seldom.
        progress: called with (bytes done, bytes in all, name of the latest weight), from the caller's thread.
        team: other processes that call this with the same plan, from ``team_from_environment``; each gets the result,
            and each writes a journal of its own (``.rank0`` and so on is appended to its name).

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve.
        Interrupted: instead of KeyboardInterrupt, with what was measured until then.
    """
    spent, options = _Spent(), options or ScanOptions()
    settings = Settings(
        plan.sides,
        heads=heads,
        sample=None if sample is None else checked_sample(sample),
        detail=options.detail,
        precision=precision,
        backend=backend,
    )
    place = open_device(device)
    states = _states(plan.catalog.files)
    tally = Tally(plan, {})
    scan: Scan | None = None

    def finished(item: Item, rows: list[Row]) -> None:
        if journal is not None:
            journal.add(item, rows)
        tally.add(item, rows)
        spent.measured += 1
        if progress is not None:
            progress(tally.done_bytes, plan.nbytes, item.weight.name)

    def run_parts(parts: Iterable[list[Item]], report: Finished) -> None:
        _run(parts, plan, settings, options, place, spent, report)

    try:
        with ExitStack() as opened:
            shared = team is not None or options.journal is not None
            identity = _identity(settings, place) if shared else {}
            journal = _open_journal(plan, options, identity, team, opened)
            tally = Tally(plan, find_copies(plan.items, plan.catalog.memory))
            spent.reused = _reuse(journal, tally)
            if team is None:
                measure_alone(tally, run_parts, finished)
            else:
                scan = team.begin(plan_digest(plan, identity))
                opened.callback(scan.stop)
                measure_together(scan, tally, settings, run_parts, finished)
                scan.leave()
                spent.measured = len(dict(tally.known())) - spent.reused  # by all ranks
    except KeyboardInterrupt:
        if scan is not None:
            collect_published(scan, tally)
        raise Interrupted(_result(plan, tally, settings, place, spent, team, states)) from None
    return _result(plan, tally, settings, place, spent, team, states)


def _open_journal(
    plan: Plan, options: ScanOptions, identity: Mapping[str, object], team: Team | None, opened: ExitStack
) -> Journal | None:
    if options.journal is None:
        return None
    path = Path(options.journal)
    if team is not None:
        path = path.with_name(f"{path.name}{RANK_SUFFIX}{team.rank}")
    resume = options.resume or (team is not None and restarted())
    journal = Journal(path, identity, memory=plan.catalog.memory, resume=resume)
    opened.callback(journal.close)
    if resume:
        journal.read_others(Path(options.journal))
    return journal


def _reuse(journal: Journal | None, tally: Tally) -> int:
    """Take over what the journal has; how many weights that were."""
    count = 0
    for item in tally.missing if journal is not None and journal.finished else ():
        assert journal is not None
        rows = journal.rows(item)
        if rows is not None:
            tally.add(item, rows)
            count += 1
    return count


def _run(
    parts: Iterable[list[Item]],
    plan: Plan,
    settings: Settings,
    options: ScanOptions,
    device: Device | None,
    spent: _Spent,
    finished: Finished,
) -> None:
    """Measure lists of a plan's weights as they come; what was spent is known even where this ends early."""
    with nullcontext() if device is None else device.scope():
        free = None if device is None else device.free_bytes()
        budget = budget_for(plan.items, options, free)
        engine, budget = open_engine(plan, budget, options, device)
        folder = Folder(settings, device)
        began = time.perf_counter()
        try:
            drawn = (batch for part in parts for batch in batches(part, budget))
            run(drawn, engine, folder, finished, device)
        finally:
            engine.close()
            spent.fold_s += folder.fold_s
            spent.read_s += engine.read_s
            spent.wait_s += time.perf_counter() - began - folder.fold_s
            spent.backends |= folder.backends


def _states(files: Iterable[Path]) -> dict[Path, tuple[int, ...] | None]:
    """What changes when a file is written again: its number, size and time; None where it is gone."""
    found: dict[Path, tuple[int, ...] | None] = {}
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found[file] = None
        else:
            found[file] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _result(
    plan: Plan,
    tally: Tally,
    settings: Settings,
    device: Device | None,
    spent: _Spent,
    team: Team | None,
    states: Mapping[Path, tuple[int, ...] | None],
) -> ScanResult:
    catalog = plan.catalog
    changed = [file.name for file, state in _states(states).items() if state != states[file]]
    sample = settings.sample
    provenance: dict[str, object] = {
        "checkpoint": catalog.root.absolute().name or str(catalog.root),
        "format": catalog.format,
        "revision": catalog.revision,
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": {
            "machine": platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "device": device_name(device),
        "backends": sorted(spent.backends),
        "files": [{"name": file.name, "nbytes": size} for file, size in catalog.files.items()],
        "config": {"model_type": catalog.config.get("model_type"), "sha256": catalog.config_digest},
        "precision": settings.precision,
        "vectors": list(plan.sides),
        "heads": settings.heads,
        "sample": None if sample is None else {"pairs": sample.pairs, "seed": sample.seed},
        "detail": settings.detail,
        **({} if plan.adapter is None else {"adapter": dict(plan.adapter)}),
        "ranks": 1 if team is None else team.size,
        "notes": [*catalog.notes, *(f"{name} changed while it was read: scan it again" for name in changed)],
        "weights": {"measured": spent.measured, "reused": spent.reused, "missing": len(tally.missing)},
        "timings": {
            "read_s": spent.read_s,
            "fold_s": spent.fold_s,
            "wait_s": spent.wait_s,
            "total_s": time.perf_counter() - spent.started,
        },
        "date": spent.date,
    }
    return ScanResult(tally.rows(), tally.skipped(), provenance)


def _identity(settings: Settings, device: Device | None) -> dict[str, object]:
    """All that decides a number beside the stored bytes: options, versions, and the code that folds."""
    place = "cpu" if device is None else device.device
    folds = []
    for dtype in (torch.float32, torch.bfloat16):
        chosen = dispatch.choose(make_request(torch.ones(2, 2, dtype=dtype, device=place)), settings.backend)
        folds.append([chosen.NAME, getattr(chosen, "DETAIL", None)])  # with the instruction set
    return {
        "settings": asdict(settings),
        "bins": BINS,
        "device": device_name(device),
        "folds": folds,
        "versions": versions(),
    }


def device_name(device: Device | None) -> str:
    """What folds: the processor, or a GPU by name."""
    return "cpu" if device is None else device.name


def versions() -> dict[str, str]:
    """Versions of orthofast, torch, numpy and Python."""
    return {
        "orthofast": own_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def own_version() -> str:
    """The installed version, or "0+source" when run from a folder that was never installed."""
    try:
        return importlib.metadata.version("orthofast")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"

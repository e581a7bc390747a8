"""Runs of experiments: seeds in parallel processes, one folder an experiment, finished seeds kept.

A folder holds ``manifest.json`` (commit, versions, settings), ``seed-N.json`` (what that seed measured, written as soon
as it is finished), ``raw.json`` and ``raw.csv`` (all seeds), ``figure.png``, ``figure.svg`` and ``verdict.json``.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from orthofast.errors import InputError, MissingPackageError, OrthofastError
from orthofast.lab.drawing import pictures
from orthofast.lab.experiment import Absent, Experiment, Raw, Settings
from orthofast.lab.registry import REGISTRY
from orthofast.lab.verdict import Verdict, failed, not_run

Told = Callable[[str, str], None]  # (identifier, what happened)
# a change of these changes no number
SHOWING = {f"orthofast.lab.{name}" for name in ("drawing", "figures", "page", "registry", "command", "runs")}
PICTURES = ("figure.svg", "figure.png", "figure-dark.svg")


@dataclass(frozen=True)
class Outcome:
    """What came of one entry.

    Attributes:
        entry: the experiment, or why there is none.
        verdict: on it.
        seeds: that were measured.
        folder: where its files are; None if none were written.
    """

    entry: Experiment | Absent
    verdict: Verdict
    seeds: int
    folder: Path | None


@dataclass(frozen=True)
class _Task:
    id: str
    settings: Settings
    mark: str  # of settings and source: equal marks give equal numbers


def run_all(
    entries: Sequence[Experiment | Absent],
    settings: Settings,
    out: Path,
    *,
    seeds: int = 3,
    jobs: int = 1,
    fresh: bool = False,
    told: Told = lambda identifier, what: None,
) -> list[Outcome]:
    """Run experiments and write all there is to show of each but the page.

    Args:
        entries: of the registry, or others like them (those run in this process).
        settings: of all; its seed is the first one.
        out: folder, made if it is not there.
        seeds: how many, of experiments that depend on them.
        jobs: processes; 1 runs here. Numbers do not depend on it: each run has one thread.
        fresh: measure again what is there already.
        told: hears what is going on.

    Returns:
        One outcome an entry, in their order.

    Raises:
        InputError: if an argument cannot be used, or nothing can be written.
    """
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} needs a positive integer, got {value!r}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {out} cannot be made: {error.strerror}") from None
    plans = {entry.id: _plan(entry, settings, seeds) for entry in entries if isinstance(entry, Experiment)}
    experiments = {entry.id: entry for entry in entries if isinstance(entry, Experiment)}
    results: dict[str, dict[int, dict[str, Any]]] = {identifier: {} for identifier in plans}
    errors: dict[str, Verdict] = {}
    waiting: list[_Task] = []
    for task in (task for tasks in plans.values() for task in tasks):
        kept = None if fresh else _kept(_seed_file(out, task), task.mark)
        if kept is None:
            waiting.append(task)
        else:
            results[task.id][task.settings.seed] = kept
            told(task.id, "kept")
    with contextlib.closing(_measured(waiting, experiments, jobs, told)) as measured:
        for task, found in measured:
            if isinstance(found, Verdict):
                errors.setdefault(task.id, found)
            else:
                _write_json(_seed_file(out, task), found)
                results[task.id][task.settings.seed] = found
            told(task.id, "done")
    outcomes = []
    for entry in entries:
        if isinstance(entry, Absent):
            outcomes.append(Outcome(entry, not_run(entry.reason), 0, None))
            continue
        told(entry.id, "judging")
        outcomes.append(_concluded(entry, plans[entry.id], results[entry.id], errors.get(entry.id), out))
    return outcomes


def _plan(experiment: Experiment, settings: Settings, seeds: int) -> list[_Task]:
    count = seeds if experiment.statistical else 1
    plans = [replace(settings, seed=settings.seed + offset) for offset in range(count)]
    return [_Task(experiment.id, plan, _mark(experiment, plan)) for plan in plans]


def _mark(experiment: Experiment, settings: Settings) -> str:
    """Of settings, the sources in the lab that its numbers come from, and the packages."""
    told = json.dumps([experiment.id, settings.to_dict(), _sources(experiment.run.__module__), _versions()])
    return hashlib.sha256(told.encode()).hexdigest()


@cache
def _sources(name: str) -> list[str]:
    """Source of a module and of all modules of its package that it takes something from, directly or not."""
    package, found, coming = name.rpartition(".")[0], {}, [name]
    while coming:
        module = sys.modules.get(coming.pop())
        if module is None or module.__name__ in found or not inspect.getsourcefile(module):
            continue
        found[module.__name__] = inspect.getsource(module)
        used = (value if inspect.ismodule(value) else inspect.getmodule(value) for value in vars(module).values())
        others = {other.__name__ for other in used if other is not None}
        coming += [other for other in others if other.rpartition(".")[0] == package and other not in SHOWING]
    return [found[module] for module in sorted(found)]


def _kept(file: Path, mark: str) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(found, dict) and {"raw", "settings", "seconds"} <= found.keys()
    return found if complete and found.get("mark") == mark else None


def _measured(
    tasks: Sequence[_Task], experiments: dict[str, Experiment], jobs: int, told: Told
) -> Generator[tuple[_Task, dict[str, Any] | Verdict]]:
    """What each task measured, or why it did not, as they finish."""
    elsewhere = [task for task in tasks if jobs > 1 and REGISTRY.get(task.id) is experiments[task.id]]
    here = [task for task in tasks if task not in elsewhere]
    if elsewhere:
        yield from _in_processes(elsewhere, min(jobs, len(elsewhere)), told)
    for task in here:
        told(task.id, "running")
        yield task, _guarded(lambda task=task: _run(experiments[task.id], task))  # type: ignore[misc]


def _in_processes(tasks: Sequence[_Task], jobs: int, told: Told) -> Generator[tuple[_Task, dict[str, Any] | Verdict]]:
    before = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    queue = list(reversed(tasks))
    running: dict[Future[dict[str, Any] | Verdict], _Task] = {}
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        try:
            while queue or running:
                while queue and len(running) < jobs:
                    task = queue.pop()
                    told(task.id, "running")
                    running[pool.submit(_task, task)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            lost = failed("the process that ran it was lost, out of memory perhaps; try --jobs 1")
            yield from ((task, lost) for task in (*running.values(), *queue))
        except BaseException:  # an interrupt waits for no experiment
            for child in multiprocessing.active_children():
                if child not in before:
                    child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _quiet() -> None:
    """Of a worker: its parent alone answers an interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _task(task: _Task) -> dict[str, Any] | Verdict:
    entry = REGISTRY[task.id]
    assert isinstance(entry, Experiment)
    return _guarded(lambda: _run(entry, task))


def _guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | Verdict:
    """Missing data or packages are told, any other error too: one experiment never stops the others."""
    try:
        return work()
    except (InputError, MissingPackageError) as error:
        return not_run(str(error))
    except OrthofastError as error:
        return failed(str(error))
    except Exception as error:  # noqa: BLE001
        return failed(f"{type(error).__name__}: {error}")


def _run(experiment: Experiment, task: _Task) -> dict[str, Any]:
    settings = task.settings
    if experiment.needs and settings.data not in experiment.needs:
        raise InputError(f"runs on {', '.join(experiment.needs)}, not on {settings.data}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            numpy.random.seed(settings.seed)  # noqa: NPY002 - of packages that use it
            wall, cpu = time.perf_counter(), time.process_time()
            raw = plain(experiment.run(settings))
            seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    finally:
        torch.set_num_threads(threads)
    return {"id": task.id, "mark": task.mark, "settings": settings.to_dict(), "seconds": seconds, "raw": raw}


def _concluded(
    experiment: Experiment, plan: list[_Task], found: dict[int, dict[str, Any]], error: Verdict | None, out: Path
) -> Outcome:
    """Everything of an experiment but its seeds' own files."""
    folder = out / experiment.id
    complete = [found[task.settings.seed] for task in plan if task.settings.seed in found]
    if error is not None or len(complete) < len(plan):
        verdict = error or failed("a seed gave nothing")
        if folder.is_dir():
            for name in (*PICTURES, "raw.json", "raw.csv"):
                (folder / name).unlink(missing_ok=True)
            _write_json(folder / "verdict.json", verdict.to_dict())
        return Outcome(experiment, verdict, len(complete), folder if folder.is_dir() else None)
    raws: list[Raw] = [one["raw"] for one in complete]
    try:
        verdict = experiment.verdict(raws)
        drawn = pictures(experiment.figure(raws), f"{experiment.id}  {experiment.title}", len(raws))
    except Exception as problem:  # noqa: BLE001
        verdict, drawn = failed(f"its numbers could not be judged: {type(problem).__name__}: {problem}"), {}
    _write_json(folder / "manifest.json", _manifest(experiment, complete))
    _write_json(folder / "raw.json", {str(one["settings"]["seed"]): one["raw"] for one in complete})
    write_whole(folder / "raw.csv", _csv(complete))
    for name, content in drawn.items():
        write_whole(folder / name, content)
    _write_json(folder / "verdict.json", verdict.to_dict())
    return Outcome(experiment, verdict, len(raws), folder)


def _manifest(experiment: Experiment, complete: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {key: value for key, value in complete[0]["settings"].items() if key != "seed"}
    return {
        "id": experiment.id,
        "title": experiment.title,
        "paper": experiment.paper,
        "claim": experiment.claim,
        "size": experiment.size,
        "settings": settings,
        "seeds": [one["settings"]["seed"] for one in complete],
        "seconds": [one["seconds"] for one in complete],
        "commit": commit(),
        "versions": _versions(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    for package in ("orthofast", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the source tree this runs from, with "+" if files differ from it; "unknown" outside one."""
    place = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(place), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def plain(value: Any) -> Any:
    """What JSON can hold: tensors become lists, numbers that are not finite become None.

    >>> plain({"loss": torch.tensor([0.5, math.nan]), 3: (1, True)})
    {'loss': [0.5, None], '3': [1, True]}
    """
    if isinstance(value, torch.Tensor | numpy.ndarray | numpy.generic):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise InputError(f"raw numbers need what JSON can hold, got {type(value).__name__}")


def _csv(complete: list[dict[str, Any]]) -> str:
    """One number a line: seed, name with its keys joined by dots, value."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seed", "name", "value"])
    for one in complete:
        table.writerows((one["settings"]["seed"], name, value) for name, value in _leaves("", one["raw"]))
    return text.getvalue()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}" if name else str(key), one)
    else:
        yield name, value


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that a reader never sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{target} cannot be written: {error.strerror}") from None


def _write_json(target: Path, value: Any) -> None:
    write_whole(target, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def _seed_file(out: Path, task: _Task) -> Path:
    return out / task.id / f"seed-{task.settings.seed}.json"

"""Run groups of weights through decoding and folding; on a device the next group is folded while values come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.adapters_folding import start_versions
from orthofast.scan.decoders import decode
from orthofast.scan.devices import Device
from orthofast.scan.engines import Engine, Group
from orthofast.scan.folding import Fetch, Folder, Job, calls, error_row, is_shortage, jobs_of
from orthofast.scan.matrices import Matrix
from orthofast.scan.plan import Item
from orthofast.scan.result import Row

IN_FLIGHT = 1  # groups whose values are still on their way from a device

Progress = Callable[[int, int, str], None]
Finished = Callable[[Item, list[Row]], None]


@dataclass(slots=True)
class _Folded:
    """A group whose folds were started."""

    group: Group
    rows: dict[int, list[Row]] = field(default_factory=dict)  # by index of the weight
    fetches: list[Fetch] = field(default_factory=list)


def run(
    batches: Iterable[list[Item]], engine: Engine, folder: Folder, finished: Finished, device: Device | None = None
) -> None:
    """Measure batches of weights, in order.

    Args:
        batches: drawn as memory allows, a few ahead of the fold.
        engine: brings them to where they are folded.
        folder: folds them.
        finished: called with each weight and its rows, from the caller's thread.
        device: where the folds run, None for the processor.

    Raises:
        InputError: if precision is none of the known ones.
        BackendError: if the named backend cannot serve.
    """
    flight: deque[_Folded] = deque()
    for group in engine.groups(batches):
        if group is None:  # no memory for the next one
            _harvest(flight.popleft(), engine, folder, finished)
            continue
        flight.append(_fold(group, folder, finished, device))
        while len(flight) > (0 if device is None else IN_FLIGHT):
            _harvest(flight.popleft(), engine, folder, finished)
    while flight:
        _harvest(flight.popleft(), engine, folder, finished)


def _fold(group: Group, folder: Folder, finished: Finished, device: Device | None) -> _Folded:
    """Start the folds of a group; on the processor they are done on return, and reported one call at a time."""
    folded = _Folded(group)
    jobs: list[Job] = []
    for index, (item, parts) in enumerate(zip(group.items, group.parts, strict=True)):
        if isinstance(parts, CheckpointError):
            folded.rows[index] = _failed(item.matrices, str(parts), folder)
        else:
            folded.rows[index] = []
            jobs += jobs_of(item, folder.settings, index)
    reported = 0
    for call in calls(jobs, device):
        weights: dict[tuple[int, int | None], Tensor] = {}
        for source in dict.fromkeys(job.source for job in call):
            found = _decoded(group, *source, device)
            if isinstance(found, Tensor):
                weights[source] = found
            else:
                matrices = [job.matrix for job in call if job.source == source and not job.heads]
                folded.rows[source[0]] += _failed(dict.fromkeys(matrices), found, folder)
        ready = [job for job in call if job.source in weights]
        if ready:
            folded.fetches += folder.start(ready, weights)
            folded.fetches += start_versions(ready, weights, group, folder)
        if device is None:
            _gather(folded, folder)
            through = call[-1].item + (call[-1].alone is None)  # else experts may follow
            _report(folded, finished, reported, through)
            reported = through
    if device is None:
        _report(folded, finished, reported, len(group.items))
    return folded


def _harvest(folded: _Folded, engine: Engine, folder: Folder, finished: Finished) -> None:
    """Wait for a group's values, give its memory back and report what was not reported yet."""
    _gather(folded, folder)
    engine.release(folded.group)
    _report(folded, finished, 0, len(folded.group.items))


def _gather(folded: _Folded, folder: Folder) -> None:
    for fetch in folded.fetches:
        for job, rows in folder.rows(fetch):
            folded.rows[job.item] += rows
    folded.fetches.clear()


def _report(folded: _Folded, finished: Finished, start: int, stop: int) -> None:
    for index in range(start, stop):
        rows = folded.rows.pop(index, None)
        if rows is not None:
            finished(folded.group.items[index], rows)


def _decoded(group: Group, index: int, expert: int | None, device: Device | None) -> Tensor | str:
    """The values of a weight or of one expert in it, or why there are none."""
    item, parts = group.items[index], group.parts[index]
    assert not isinstance(parts, CheckpointError)
    for _ in range(2):
        try:
            return decode(item.weight, parts, slice(None) if expert is None else slice(expert, expert + 1))
        except CheckpointError as error:
            return str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if device is None:
                break
            device.relieve()
    return f"{item.weight.first.file.name}: no memory to decode {item.weight.name!a}"


def _failed(matrices: Iterable[Matrix], error: str, folder: Folder) -> list[Row]:
    return [error_row(matrix, side, error) for matrix in matrices for side in folder.settings.sides]

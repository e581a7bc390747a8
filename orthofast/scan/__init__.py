"""Scan checkpoints: every matrix, rows and columns, measured or listed with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.errors import InputError, OrthofastError
from orthofast.kernels import Sample
from orthofast.scan.adapters import open_adapter, with_adapter
from orthofast.scan.options import ScanOptions
from orthofast.scan.pipeline import Progress
from orthofast.scan.plan import make_plan
from orthofast.scan.presets import preset
from orthofast.scan.provenance import Interrupted, measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import Row, ScanResult, Skipped, Spread, Table5
from orthofast.scan.selection import keep_roles, keep_sides

__all__ = [
    "Interrupted",
    "Progress",
    "Row",
    "ScanOptions",
    "ScanResult",
    "Skipped",
    "Spread",
    "Table5",
    "scan_checkpoint",
    "scan_many",
]


def scan_checkpoint(
    checkpoint: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
    *,
    adapter: str | os.PathLike[str] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    vectors: str = "both",
    heads: bool = False,
    sample: int | Sample | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    backend: str | None = None,
    options: ScanOptions | None = None,
    progress: Progress | None = None,
) -> ScanResult:
    """Measure the PII of every matrix of a checkpoint, rows and columns, reading each tensor once.

    PII is the mean absolute cosine over all pairs of vectors (Lu et al. 2024, Definition 1); beside it stands its value
    for isotropic random vectors of the same length. Memory stays bounded, whatever the checkpoint's size.

    Args:
        checkpoint: a file, an index of shards, a folder, the name of a model on the Hugging Face hub, a module or a
            state dict, as :func:`orthofast.scan.readers.checkpoint.open_checkpoint` takes them.
        adapter: folder or hub name of a LoRA adapter as PEFT saves it: each weight it changes is measured three times
            from one read, as "base", "merged" and "delta" (the update alone), with drift and relative change.
        include: measure only tensors whose name matches one of these globs.
        exclude: leave out tensors whose name matches one of these globs.
        vectors: "rows" (one vector per output), "cols" (one per input) or "both".
        heads: also each attention head by itself, where the configuration tells how many there are.
        sample: estimate each PII from about this many random pairs, with its standard error; an int or a
            :class:`orthofast.kernels.Sample` with a seed. None folds all pairs.
        device: where the folds run, such as "cuda"; None for the processor.
        precision: as in :func:`orthofast.gram_stats`.
        backend: obeyed or refused; None takes the fastest that can serve.
        options: layers, preset, memory, journal and what else most scans leave as it is: :class:`ScanOptions`.
        progress: called with (bytes done, bytes in all, name of the latest weight), from the caller's thread.

    Returns:
        A :class:`ScanResult`; a tensor that cannot be read is a row with its error.

    Raises:
        CheckpointError: if nothing can be read; the message names the file.
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve.
        MissingPackageError: if an optional package is needed and not installed.
        Interrupted: instead of KeyboardInterrupt, with what was measured until then.

    >>> from torch import nn
    >>> result = scan_checkpoint(nn.Linear(8, 4), vectors="rows")
    >>> [(row.name, row.n, row.d) for row in result.rows]
    [('weight', 4, 8)]
    """
    options = options or ScanOptions()
    catalog = open_checkpoint(checkpoint)
    chosen = None if options.preset is None else preset(options.preset, catalog.config)
    layers = chosen.layers if chosen is not None and options.layers is None else options.layers
    plan = make_plan(catalog, include=include, exclude=exclude, vectors=vectors, layers=layers)
    if adapter is not None:
        plan = with_adapter(plan, open_adapter(adapter))
    if chosen is not None:
        plan = keep_roles(plan, chosen.sides)
    result = measure(
        plan,
        precision=precision,
        backend=backend,
        heads=heads,
        sample=sample,
        device=device,
        options=options,
        progress=progress,
    )
    if chosen is not None:
        result.rows = keep_sides(result.rows, chosen.sides)
        result.provenance["preset"] = options.preset
    return result


def scan_many(
    checkpoints: Iterable[str | os.PathLike[str]], *, executor: Executor | None = None, **arguments: Any
) -> Iterator[tuple[str | os.PathLike[str], ScanResult | OrthofastError]]:
    """Scan a fleet of checkpoints, one task each, on any executor: processes, dask's ``Client.get_executor()``, MPI's.

    Args:
        checkpoints: paths or hub names, each reachable from where the executor works.
        executor: of ``concurrent.futures``, or one like it; None scans here, one after the other.
        arguments: those of :func:`scan_checkpoint` but ``progress``, the same for all; they are pickled.

    Yields:
        (checkpoint, its result, or the error that prevented one), in the order given; one that fails stops no other.

    Raises:
        InputError: at once, if an argument cannot be shared.

    >>> from pathlib import Path
    >>> [(path.name, str(found)[:30]) for path, found in scan_many([Path("no-such-file.safetensors")])]
    [('no-such-file.safetensors', 'no-such-file.safetensors canno')]
    """
    options = arguments.get("options")
    if "progress" in arguments:
        raise InputError("progress cannot be shared by many scans; leave it out")
    if isinstance(options, ScanOptions) and options.journal is not None:
        raise InputError("journal belongs to one checkpoint; leave it out, or call scan_checkpoint for each")
    return _scans(list(checkpoints), executor, arguments)


def _scans(
    checkpoints: list[str | os.PathLike[str]], executor: Executor | None, arguments: Mapping[str, Any]
) -> Iterator[tuple[str | os.PathLike[str], ScanResult | OrthofastError]]:
    if executor is None:
        for checkpoint in checkpoints:
            yield checkpoint, _scan(checkpoint, arguments)
        return
    futures = [executor.submit(_scan, checkpoint, arguments) for checkpoint in checkpoints]
    try:
        for checkpoint, future in zip(checkpoints, futures, strict=True):
            try:
                yield checkpoint, future.result()
            except BrokenExecutor as error:
                yield checkpoint, OrthofastError(f"{checkpoint}: the worker that scanned it was lost ({error})")
    finally:
        for future in futures:
            future.cancel()


def _scan(checkpoint: str | os.PathLike[str], arguments: Mapping[str, Any]) -> ScanResult | OrthofastError:
    """One task; an error on purpose is a value, so that it reaches the caller from any worker."""
    try:
        return scan_checkpoint(checkpoint, **arguments)
    except OrthofastError as error:
        return error

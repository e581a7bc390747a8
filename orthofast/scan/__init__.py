"""Scan a checkpoint on disk: every matrix, rows and columns, measured or listed with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from orthofast.kernels import Sample
from orthofast.scan.options import ScanOptions
from orthofast.scan.pipeline import Progress
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import Interrupted, measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import Row, ScanResult, Skipped, Spread, Table5

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
]


def scan_checkpoint(
    path: str | os.PathLike[str],
    *,
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
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder with one of them.
        include: measure only tensors whose name matches one of these globs.
        exclude: leave out tensors whose name matches one of these globs.
        vectors: "rows" (one vector per output), "cols" (one per input) or "both".
        heads: also each attention head by itself, where the configuration tells how many there are.
        sample: estimate each PII from about this many random pairs, with its standard error; an int or a
            :class:`orthofast.kernels.Sample` with a seed. None folds all pairs.
        device: where the folds run, such as "cuda"; None for the processor.
        precision: as in :func:`orthofast.gram_stats`.
        backend: obeyed or refused; None takes the fastest that can serve.
        options: layers, memory, journal and what else most scans leave as it is: :class:`ScanOptions`.
        progress: called with (bytes done, bytes in all, name of the latest weight), from the caller's thread.

    Returns:
        A :class:`ScanResult`; a tensor that cannot be read is a row with its error.

    Raises:
        CheckpointError: if nothing can be read; the message names the file.
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve.
        Interrupted: instead of KeyboardInterrupt, with what was measured until then.
    """
    options = options or ScanOptions()
    plan = make_plan(open_checkpoint(path), include=include, exclude=exclude, vectors=vectors, layers=options.layers)
    return measure(
        plan,
        precision=precision,
        backend=backend,
        heads=heads,
        sample=sample,
        device=device,
        options=options,
        progress=progress,
    )

"""Triton backend: NVIDIA from Ampere on and AMD CDNA; a whole model in as few launches as it has dtypes and layouts.

Work  b*n*(n+1)/2*d multiply-adds on the tensor cores, times 3 for float32 with precision "highest".
Traffic  one read of the input for the lengths, then the tiles; float32 and float8 are rewritten once in 16 bits.
Memory  20 bytes a vector, 16 a tile, up to 32 MiB for per-vector sums; float32 takes 2 bytes an element ("high") or 4.
Accuracy  16- and 8-bit operands are exact; float32 is rounded to 11 bits once per element ("high", scaled by a power of
two per vector, lengths of the rounded vectors) or kept in 22 ("highest"); float32 in a tile, float64 between tiles.
Items whose mean |cos| is near the rounding floor are folded again in full: a second launch reads a mark on the device.
Refuses  other devices, cards before Ampere.

Nothing waits for the device. Under graph capture no table is copied: call once on the same tensors before capturing;
``torch.cuda.graph`` synchronises before it captures, so that the tables are there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels import reference, tiles
from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM, Request
from orthofast.kernels.triton_plan import Group, plan, shape_of
from orthofast.records import GramStats
from orthofast.views import BlockScaled

_why_not: str | None = None
try:
    import triton

    from orthofast.kernels import triton_block_scaled, triton_launch
except ImportError as error:  # a CPU build of torch brings none
    _why_not = f"triton cannot be imported ({error}); a CUDA build of torch brings it"

NAME = "triton_gpu"
_interpreter = threading.Lock()  # it runs one kernel at a time


def _interprets() -> bool:
    return bool(triton.knobs.runtime.interpret)


def supports(request: Request) -> str | None:
    """None for CUDA tensors from compute capability 8.0 on and AMD CDNA; for CPU tensors in Triton's interpreter."""
    if _why_not is not None:
        return _why_not
    device = request.x.device
    if device.type == "cpu" and _interprets():
        return None
    if device.type != "cuda":
        return f"needs a CUDA tensor, got one on {device}; move it with .cuda()"
    return _device_reason(device.index or 0)


@lru_cache(maxsize=64)
def _device_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return None if name.startswith("gfx9") else f"needs an AMD CDNA device (gfx9), got {name}"
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0):
        return None
    return f"needs compute capability 8.0 or newer (Ampere), got {capability[0]}.{capability[1]} on cuda:{index}"


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    """Row of the tile table, and processors; a slice of a device shows the processors it has."""
    if device.type == "cpu":
        return "interpreter", 2
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    return tiles.kind_of(capability, torch.version.hip is not None), properties.multi_processor_count


def gram_stats(request: Request) -> GramStats:
    """Fold one request."""
    return gram_stats_many([request])[0]


def gram_stats_many(requests: Sequence[Request]) -> list[GramStats]:
    """Fold all requests: one list of tiles per dtype, layout and tile shape.

    Raises:
        BackendError: if the device has no memory left, or tables are missing during graph capture.
    """
    records: list[GramStats | None] = [None] * len(requests)
    devices: dict[torch.device, list[int]] = {}
    for index, request in enumerate(requests):
        if request.precision == "float64":
            records[index] = reference.gram_stats(request)
        else:
            devices.setdefault(request.x.device, []).append(index)
    for device, indices in devices.items():
        with _on(device):
            found = _fold([requests[i] for i in indices], device)
        for index, record in zip(indices, found, strict=True):
            records[index] = record
    return [record for record in records if record is not None]


def block_scaled_problem(x: BlockScaled, y: BlockScaled | None, request: Request) -> str | None:
    """None if the kernel for block-scaled float8 folds these (b, n, d) matrices, else the sentence why not."""
    return triton_block_scaled.problem(x, y, request)


def block_scaled_gram_stats(x: BlockScaled, y: BlockScaled | None, request: Request) -> GramStats:
    """Fold block-scaled matrices; ``request`` says what is asked of them."""
    with _on(x.device):
        return triton_block_scaled.gram_stats(x, y, request, _device(x.device)[1])


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """The device current, and one sentence instead of an allocator's page."""
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:  # numpy stands in for the device, and would warn of NaN
            with _interpreter, np.errstate(all="ignore"):
                yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0] >> 20
        raise BackendError(
            f"{NAME} found no memory on {device} ({free} MiB free); free some, or pass fewer matrices at a time"
        ) from error


def _fold(requests: Sequence[Request], device: torch.device) -> list[GramStats]:
    kind, processors = _device(device)
    shapes = tuple([shape_of(request) for request in requests])
    records = [_empty(request) if shape.x[0] == 0 else None for request, shape in zip(requests, shapes, strict=True)]
    for group in plan(shapes, device, kind):
        made = triton_launch.launch(group, [requests[i] for i in group.requests], device, processors)
        _wrap(group, requests, made, records)
    return [record for record in records if record is not None]


def _empty(request: Request) -> GramStats:
    """The record of no items."""
    return reference.gram_stats(request)


def _wrap(
    group: Group, requests: Sequence[Request], made: triton_launch.Results, records: list[GramStats | None]
) -> None:
    """Cut the results of a group into records; views, no copies."""
    method = group.method
    items = [shape.x[0] for shape in group.shapes]
    pairs, zero, nonfinite = (made.counts[i].split(items) for i in range(3))
    floor = made.sums[4].split(items) if method.decides else None
    fields: dict[str, Sequence[Tensor]] = {}
    for row, (bit, name) in enumerate(((ABS_SUM, "abs_sum"), (SQ_SUM, "sq_sum"), (SUM, "sum"), (ABS_MAX, "abs_max"))):
        if method.want & bit:
            fields[name] = made.sums[row].split(items)
    if method.want & ABS_MAX:
        fields["argmax"] = made.counts[3:5].T.split(items)
    if method.want & HIST and made.hist is not None:
        fields["hist"] = made.hist.split(items)
    sizes = [size for shape in group.shapes for size in _vector_counts(shape.x, shape.y)]
    norms = made.norm_sq.split(sizes)
    rows = made.row_abs.split(sizes) if method.want & ROW_ABS and made.row_abs is not None else None
    step = 2 if method.cross else 1
    for place, (index, shape) in enumerate(zip(group.requests, group.shapes, strict=True)):
        record = GramStats(
            pairs=pairs[place],
            zero=zero[place],
            nonfinite=nonfinite[place],
            norm_sq=norms[step * place].view(shape.x[:2]),
            row_abs=None if rows is None else rows[step * place].view(shape.x[:2]),
            floor=None if floor is None else floor[place],
            cross=method.cross,
        )
        for name, parts in fields.items():
            setattr(record, name, parts[place])
        if shape.y is not None:
            record.norm_sq_y = norms[step * place + 1].view(shape.y[:2])
            record.row_abs_y = None if rows is None else rows[step * place + 1].view(shape.y[:2])
        records[index] = record


def _vector_counts(x: tuple[int, ...], y: tuple[int, ...] | None) -> tuple[int, ...]:
    return (x[0] * x[1],) if y is None else (x[0] * x[1], y[0] * y[1])

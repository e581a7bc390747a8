"""Triton backend: NVIDIA from Ampere on and AMD CDNA; a whole model in as few launches as it has dtypes and layouts.

Work  b*n*(n+1)/2*d multiply-adds on the tensor cores, times 3 for float32 with precision "highest".
Traffic  one read of the input for the lengths, then the tiles; float32 and float8 are rewritten once in 16 bits.
Memory  20 bytes a vector, 16 a tile, up to 32 MiB for per-vector sums; float32 takes 4 bytes an element.
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
from typing import cast

import numpy as np
import torch
from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels import calls, gradients, reference, tiles
from orthofast.kernels.contract import Request
from orthofast.kernels.gradients import ABS, Curve, PairGradient
from orthofast.kernels.triton_plan import Group, plan, shape_of
from orthofast.records import GramStats
from orthofast.views import BlockScaled

_why_not: str | None = None
try:
    import triton
    from triton.runtime.errors import OutOfResources

    from orthofast.kernels import triton_block_scaled, triton_gradient, triton_launch
    from orthofast.kernels.triton_records import GroupRecord
    from orthofast.kernels.triton_twins import Twins, measure, same_places, twins_of
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
    x = request.x
    if x.is_cuda:
        return _device_reason(x.get_device())
    if x.is_cpu and _interprets():
        return None
    return f"needs a CUDA tensor, got one on {x.device}; move it with .cuda()"


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
    devices: dict[int, list[int]] = {}  # -1: the interpreter's
    for index, request in enumerate(requests):
        if request.precision == "float64":
            records[index] = reference.gram_stats(request)
        else:
            devices.setdefault(request.x.get_device(), []).append(index)
    for indices in devices.values():
        device = requests[indices[0]].x.device
        with _on(device):
            found = _fold([requests[i] for i in indices], device)
        for index, record in zip(indices, found, strict=True):
            records[index] = record
    return [record for record in records if record is not None]


def abs_gradient(request: Request, curve: Curve = ABS, *, gradient: bool = True) -> PairGradient:
    """Sum a curve of the cosines with its gradient, on the tensor cores where those can be right."""
    if triton_gradient.problem(request, curve) is not None:
        return gradients.abs_gradient(request, curve, gradient=gradient)
    device = request.x.device
    with _on(device):
        kind, processors = _device(device)
        tile = triton_gradient.tile_for(kind, triton_gradient.parts_of(request))
        return triton_gradient.abs_gradient(request, tile, processors, curve, gradient=gradient)


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
    except OutOfResources as error:  # of one processor, when a kernel is loaded
        raise BackendError(f"{NAME} needs more {error.name} than {device} has; pass backend='reference'") from error


def _fold(requests: Sequence[Request], device: torch.device) -> list[GramStats]:
    shapes, kind = tuple(map(shape_of, requests)), _device(device)[0]
    xs, ys = [request.x for request in requests], [request.y for request in requests]
    twins = twins_of(shapes, same_places(xs), device, kind)
    records = _launched(plan(shapes, device, kind), twins, xs, ys, device)
    # no group folds a request of no items
    return [reference.gram_stats(requests[i]) if record is None else record for i, record in enumerate(records)]


def _launched(
    groups: Sequence[Group],
    twins: Sequence[Twins],
    xs: Sequence[Tensor],
    ys: Sequence[Tensor | None] | None,
    device: torch.device,
) -> list[GramStats | None]:
    """One launch sequence a group; each request's record is cut out of its group's results when it is read."""
    records: list[GramStats | None] = [None] * len(xs)
    processors = _device(device)[1]
    measured = measure(twins, groups, xs, device)
    for at, group in enumerate(groups):
        tensors: list[Tensor] = []
        for index in group.requests:
            tensors.append(xs[index])
            other = None if ys is None else ys[index]
            if other is not None:
                tensors.append(other)
        made = triton_launch.launch(group, tensors, device, processors, measured.get(at))
        for place, index in enumerate(group.requests):
            records[index] = GroupRecord.cut(group, made, place)
    return records


def again(requests: Sequence[Request]) -> calls.Again | None:
    """How to fold other tensors of the same shapes, strides and alignment; None where a request needs more."""
    device = requests[0].x.device
    if any(r.precision == "float64" or r.x.device != device or r.x.shape[0] == 0 for r in requests):
        return None
    shapes, kind = tuple(map(shape_of, requests)), _device(device)[0]
    groups = plan(shapes, device, kind)
    known: dict[tuple[int, ...], Sequence[Twins]] = {}
    alone = frozenset(group.method.alone for group in groups)

    def fold(xs: Sequence[Tensor]) -> list[GramStats]:
        if alone != {-1}:  # tensor maps are made of (b, n, d)
            xs = [x.detach()[None] if i in alone and x.dim() == 2 else x for i, x in enumerate(xs)]
        places = same_places(xs)
        twins = known.get(places)
        if twins is None:
            twins = known[places] = twins_of(shapes, places, device, kind)
        with _on(device):
            return cast(list[GramStats], _launched(groups, twins, xs, None, device))

    return fold

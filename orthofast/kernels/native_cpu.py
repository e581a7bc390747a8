"""Native CPU backend: packed panels and register blocks in C++, one team of threads, sums folded in registers.

Work  b*n*(n+1)/2*d multiply-adds.  Extra memory  12 bytes a vector and about 2 MiB a thread.
Accuracy  operands exact (float32, or bfloat16 pairs for 16- and 8-bit input), float32 in a tile, float64 between
tiles; precision "high" rounds float32 to bfloat16 and recomputes exactly what falls near the rounding floor.
Refuses  anything but CPU tensors, and everything where the extension was not built.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels import gradients
from orthofast.kernels.contract import ABS_MAX, ABS_SUM, HIST, ROW_ABS, SQ_SUM, SUM, Request
from orthofast.kernels.gradients import ABS, Curve, PairGradient, gradient_dtype
from orthofast.kernels.reference import measured
from orthofast.records import GramStats

_why_not: str | None = None
try:
    from orthofast import _cpu
except ImportError as error:  # the install went without a compiler
    _why_not = f"the native module is not built ({error}); install orthofast where a C++ compiler is found"

NAME = "native_cpu"
ENVIRONMENT = "ORTHOFAST_ISA"
_SUMS, _COUNTS = 5, 5  # columns of the two result tables, see csrc/core/gram_stats.h
_PACK = struct.Struct("25q").pack
_DTYPE = {
    torch.float64: 0,
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
    torch.float8_e4m3fnuz: 6,
    torch.float8_e5m2fnuz: 7,
}
_CURVE = {"abs": 0, "huber": 1, "sqrt": 2, "square": 3}
_EXTREME = 1e60  # a squared length beyond this, or below its inverse, is divided out in two steps
_PRECISION = {"highest": 0, "high": 1, "float64": 2}


def _force_isa() -> None:
    level = os.environ.get(ENVIRONMENT)
    if level and _why_not is None and not _cpu.force_isa(level):
        raise BackendError(f"{ENVIRONMENT} needs one of {', '.join(_cpu.isa_levels())} on this machine, got {level!r}")


_force_isa()
DETAIL = None if _why_not is not None else f"{_cpu.isa()} instructions"


def supports(request: Request) -> str | None:
    """None for CPU tensors where the native module was built."""
    if _why_not is not None:
        return _why_not
    if request.x.device.type != "cpu":
        return f"needs a CPU tensor, got one on {request.x.device}"
    return None


def gram_stats(request: Request) -> GramStats:
    """Fold one request."""
    record, packed, _sums = _prepare(request)
    _cpu.gram_stats(packed, torch.get_num_threads())
    return record


def gram_stats_many(requests: Sequence[Request]) -> list[GramStats]:
    """Fold all requests with one team of threads over one queue of tiles."""
    prepared = [_prepare(request) for request in requests]
    _cpu.gram_stats(b"".join([packed for _, packed, _ in prepared]), torch.get_num_threads())
    return [record for record, _, _ in prepared]


def _prepare(request: Request) -> tuple[GramStats, bytes, Tensor]:
    """The record whose memory the fold fills, the request as integers, and the sums: hold them until it is done."""
    x, y, want = request.x, request.y, request.want
    b, n, d = x.shape
    sums, norm_sq = _floats(b, _SUMS), _floats(b, n)
    counts = _integers(b, _COUNTS)
    row_abs = _floats(b, n) if want & ROW_ABS else None
    hist = _integers(b, request.bins) if want & HIST else None
    pairs, zero, nonfinite, _, _ = counts.unbind(1)
    record = GramStats(
        pairs=pairs,
        zero=zero,
        nonfinite=nonfinite,
        norm_sq=norm_sq,
        abs_sum=sums.select(1, 0) if want & ABS_SUM else None,
        sq_sum=sums.select(1, 1) if want & SQ_SUM else None,
        sum=sums.select(1, 2) if want & SUM else None,
        abs_max=sums.select(1, 3) if want & ABS_MAX else None,
        argmax=counts[:, 3:] if want & ABS_MAX else None,
        row_abs=row_abs,
        hist=hist,
        floor=sums.select(1, 4) if request.precision == "high" else None,
    )
    other: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)
    if y is not None:
        record.cross = True
        record.norm_sq_y = _floats(b, y.shape[1])
        record.row_abs_y = _floats(b, y.shape[1]) if want & ROW_ABS else None
        other = _side(y, record.norm_sq_y, record.row_abs_y)
    packed = _PACK(
        *_side(x, norm_sq, row_abs),
        *other,
        y is not None,
        request.normalize,
        _DTYPE[x.dtype],
        _PRECISION[request.precision],
        want,
        request.bins,
        b,
        d,
        sums.data_ptr(),
        counts.data_ptr(),
        0 if hist is None else hist.data_ptr(),
    )
    return record, packed, sums


# fresh memory through numpy: half the time of torch.empty, which counts for small matrices
def _floats(*shape: int) -> Tensor:
    return torch.from_numpy(np.empty(shape))


def _integers(*shape: int) -> Tensor:
    return torch.from_numpy(np.empty(shape, np.int64))


def _side(x: Tensor, norm_sq: Tensor, row_abs: Tensor | None) -> tuple[int, ...]:
    return (x.data_ptr(), x.shape[1], *x.stride(), norm_sq.data_ptr(), 0 if row_abs is None else row_abs.data_ptr())


def abs_gradient(request: Request, curve: Curve = ABS, *, gradient: bool = True) -> PairGradient:
    """Sum a curve of the cosines of all pairs, with its gradients, in one sweep over pairs of blocks of unit vectors.

    Work 1.5*b*n*n*d multiply-adds (3*b*n*m*d between two sets). Extra memory: the gradients, as much for the unit
    vectors, and about 1.2 MiB a thread. Squares of many short vectors go to ``gradients``: they need no pairs.
    """
    x, y = request.x, request.y
    if curve.kind == "square" and gradients.prefers_square_side(x, y):
        return gradients.abs_gradient(request, curve, gradient=gradient)
    wide = gradient_dtype(x.dtype, request.precision) == torch.float64
    lengths = gram_stats(replace(request, want=0, bins=0, precision="float64" if wide else "highest"))
    assert lengths.norm_sq is not None
    units, inverse = _units(x, lengths.norm_sq, request, wide)
    dx = torch.zeros_like(units) if gradient else None
    fields = [units.data_ptr(), 0 if dx is None else dx.data_ptr(), inverse.data_ptr(), x.shape[1]]
    dy = None
    if y is None:
        fields += [0, 0, 0, 0]
    else:
        assert lengths.norm_sq_y is not None
        others, inverse_y = _units(y, lengths.norm_sq_y, request, wide)
        dy = torch.zeros_like(others) if gradient else None
        fields += [others.data_ptr(), 0 if dy is None else dy.data_ptr(), inverse_y.data_ptr(), y.shape[1]]
    b, _, d = x.shape
    total = torch.empty(b, dtype=torch.float64)
    fields += [y is not None, wide, _CURVE[curve.kind], b, d, total.data_ptr()]
    _cpu.pair_gradient(fields, curve.width, torch.get_num_threads())
    bad = lengths.nonfinite > 0
    if bool(bad.any()):
        total.masked_fill_(bad, float("nan"))
        for made in (dx, dy):
            if made is not None:
                made.masked_fill_(bad.view(-1, 1, 1), float("nan"))
    return PairGradient(lengths.pairs, total, dx, dy)


def _units(x: Tensor, norm_sq: Tensor, request: Request, wide: bool) -> tuple[Tensor, Tensor]:
    """Unit vectors (b, n, d), contiguous and zero for zero vectors, and the inverse of their lengths (b, n) float64."""
    dtype = torch.float64 if wide else torch.float32
    units = torch.empty(x.shape, dtype=dtype)
    zero = norm_sq == 0
    inverse = torch.where(zero, 1.0, norm_sq).rsqrt_()
    if bool(((norm_sq < _EXTREME) & ((norm_sq > 1 / _EXTREME) | zero)).all()):
        torch.mul(x.to(dtype), inverse.to(dtype).unsqueeze(2), out=units)
        return units, inverse
    for item, vectors in enumerate(x):
        side = measured(vectors, request)
        units[item] = side.vectors(0, len(vectors))
        inverse[item] = side.inverse.squeeze(1).to(torch.float64) * side.scale.squeeze(1).to(torch.float64)
    return units, inverse

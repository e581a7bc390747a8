"""Native CUDA backend: a persistent Hopper kernel in C++, fed by the copy engine, folding on tensor cores.

Work  b*n*(n+1)/2*d multiply-adds in tiles of 256 x 256 pairs for two processors, or 128 x 128 for one.
Traffic  a tile reads 512 or 256 vectors, each once.
Memory  about 200 bytes a tile and 4 a vector; float32 (4 bytes an element) and float8 (2) get 16-bit operands of
their own; per-vector sums take a float per vector and tile.
Accuracy  16- and 8-bit operands are exact, float32 in a tile, float64 between tiles. float32 "high": one product of
fp16 operands under a power-of-two scale for each vector, folded again with two operands each where the mean falls near
the rounding floor, as a device flag decides; "highest": two operands each from the start. bfloat16 vectors are read as
they are; lengths outside 1e-13 to 1e18, whose products float32 may not hold, give NaN instead of a wrong cosine.
Refuses  devices other than compute capability 9.0, float64, histograms, 16-bit vectors without 16-byte alignment.
Nothing waits for the device: every launch goes to the current stream, and can be captured in a graph.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels.contract import ABS_MAX, ABS_SUM, ROW_ABS, SQ_SUM, SUM, Request
from orthofast.records import GramStats

_why_not: str | None = None
try:
    from orthofast import _cuda
except ImportError as error:  # the install went without nvcc
    _why_not = f"the Hopper module is not built ({error}); install orthofast where nvcc is found"

NAME = "native_cuda"
DETAIL = "wgmma, copy engine, pairs of processors"
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
_PRECISION = {"highest": 0, "high": 1, "float64": 2}
_NO_RESULTS = (0, 0, 0)


def supports(request: Request) -> str | None:
    """None for tensors on a Hopper GPU that the kernel can read; the sentence why not for all others."""
    if _why_not is not None:
        return _why_not
    x = request.x
    if x.device.type != "cuda":
        return f"needs a CUDA tensor, got one on {x.device}"
    return _lack(x.get_device()) or _refusal(request)


def gram_stats(request: Request) -> GramStats:
    """Fold one request."""
    return gram_stats_many([request])[0]


def gram_stats_many(requests: Sequence[Request]) -> list[GramStats]:
    """Fold all requests of a device with one work list, and one launch for each operand type and orientation.

    Raises:
        BackendError: if a launch fails; what CUDA said is in the sentence.
    """
    by_device: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        by_device.setdefault(request.x.get_device(), []).append(index)
    records: dict[int, GramStats] = {}
    for device, indices in by_device.items():
        records.update(zip(indices, _fold(device, [requests[i] for i in indices]), strict=True))
    return [records[index] for index in range(len(requests))]


def _fold(device: int, requests: Sequence[Request]) -> list[GramStats]:
    processors = _processors(device)
    with torch.cuda.device(device):
        records, packed, _held = _prepare(requests)
        try:
            size = _cuda.workspace_bytes(packed, processors)
            workspace = torch.empty(size, dtype=torch.uint8, device=requests[0].x.device)
            stream = torch.cuda.current_stream(device).cuda_stream
            _cuda.gram_stats(packed, workspace.data_ptr(), size, processors, device, stream)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"backend {NAME} failed on cuda:{device}: {error}") from error
    return records


@lru_cache(maxsize=64)
def _lack(device: int) -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this torch drives AMD ones"
    sentence = _cuda.lack(device)
    return sentence or None


@lru_cache(maxsize=64)
def _processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _refusal(request: Request) -> str | None:
    x, y = request.x, request.y
    if x.dtype not in _DTYPE:
        return f"has no arithmetic for {x.dtype}"
    return _cuda.refusal(_packed(request, _side(x), (0,) * 7 if y is None else _side(y), _NO_RESULTS)) or None


def _packed(request: Request, x: tuple[int, ...], y: tuple[int, ...], results: tuple[int, ...]) -> bytes:
    b, _, d = request.x.shape
    return _PACK(
        *x,
        *y,
        request.y is not None,
        request.normalize,
        _DTYPE[request.x.dtype],
        _PRECISION[request.precision],
        request.want,
        request.bins,
        b,
        d,
        *results,
    )


def _side(x: Tensor, norm_sq: Tensor | None = None, row_abs: Tensor | None = None) -> tuple[int, ...]:
    addresses = (0 if out is None else out.data_ptr() for out in (norm_sq, row_abs))
    return (x.data_ptr(), x.shape[1], *x.stride(), *addresses)


def _prepare(requests: Sequence[Request]) -> tuple[list[GramStats], bytes, list[Tensor]]:
    """Records whose memory the fold fills, the requests as integers, and that memory: hold it until all is launched."""
    device = requests[0].x.device
    items = [request.x.shape[0] for request in requests]
    sums = torch.empty((sum(items), _SUMS), dtype=torch.float64, device=device)
    counts = torch.empty((sum(items), _COUNTS), dtype=torch.int64, device=device)
    # one call cuts a column for all requests: 144 matrices would pay for each view of their own
    abs_sum, sq_sum, total, abs_max, floor = (column.split(items) for column in sums.unbind(1))
    pairs, zero, nonfinite, _, _ = (column.split(items) for column in counts.unbind(1))
    argmax = counts[:, 3:].split(items)
    norms, row_sums = _per_vector(requests, device)
    records, packed = [], []
    at = 0  # result tables: 40 bytes a row in both
    for r, request in enumerate(requests):
        want = request.want
        record = GramStats(
            pairs=pairs[r],
            zero=zero[r],
            nonfinite=nonfinite[r],
            norm_sq=norms[r][0],
            abs_sum=abs_sum[r] if want & ABS_SUM else None,
            sq_sum=sq_sum[r] if want & SQ_SUM else None,
            sum=total[r] if want & SUM else None,
            abs_max=abs_max[r] if want & ABS_MAX else None,
            argmax=argmax[r] if want & ABS_MAX else None,
            row_abs=row_sums[r][0],
            floor=floor[r] if request.precision == "high" else None,
        )
        other: tuple[int, ...] = (0,) * 7
        if request.y is not None:
            record.cross, record.norm_sq_y, record.row_abs_y = True, norms[r][1], row_sums[r][1]
            other = _side(request.y, norms[r][1], row_sums[r][1])
        results = (sums.data_ptr() + 8 * _SUMS * at, counts.data_ptr() + 8 * _COUNTS * at, 0)
        packed.append(_packed(request, _side(request.x, norms[r][0], row_sums[r][0]), other, results))
        records.append(record)
        at += items[r]
    return records, b"".join(packed), [sums, counts]


_Pair = tuple[Tensor | None, Tensor | None]  # of x and of y


def _per_vector(requests: Sequence[Request], device: torch.device) -> tuple[list[_Pair], list[_Pair]]:
    """Squared lengths and sums per vector of both sides of every request, cut from one piece of memory."""
    shapes: list[tuple[int, int]] = []
    for request in requests:
        for side in (request.x, request.y):
            if side is not None:
                shapes += [(side.shape[0], side.shape[1])] * (2 if request.want & ROW_ABS else 1)
    memory = torch.empty(sum(b * n for b, n in shapes), dtype=torch.float64, device=device)
    pieces = iter(
        piece.view(shape) for piece, shape in zip(memory.split([b * n for b, n in shapes]), shapes, strict=True)
    )
    norms: list[_Pair] = []
    row_sums: list[_Pair] = []
    for request in requests:
        wants_rows = bool(request.want & ROW_ABS)
        found = [
            (next(pieces), next(pieces) if wants_rows else None) if side is not None else (None, None)
            for side in (request.x, request.y)
        ]
        norms.append((found[0][0], found[1][0]))
        row_sums.append((found[0][1], found[1][1]))
    return norms, row_sums

"""Numba backend: tiles through SciPy's BLAS, folded where they lie; no compiler needed.

Work  b*n*(n+1)/2*d multiply-adds: a product per tile, a symmetric product on the diagonal.
Memory  20*b*n bytes of lengths, 64 KiB of partial results (8 MiB with row_abs), and per thread one tile and,
unless BLAS reads the input where it is, two panels: at most 8 MiB in float32, 16 MiB in float64.
Traffic  each tile reads 2*TILE*d elements; float32 with one contiguous axis is never copied, other input is widened
panel by panel.
Accuracy  products in float32 (float64 on request) of exactly scaled operands; lengths, weights and sums in float64.
The bits do not depend on the number of threads: tiles depend on shapes alone, partial results are added in order.
Refuses other devices than the CPU, and machines without numba or SciPy.

One Python thread runs the loops where the threads of SciPy's BLAS cannot be held (``numba_threads``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthofast.kernels.contract import (
    ABS_MAX,
    ABS_SUM,
    FLOAT8,
    HIST,
    ROW_ABS,
    SQ_SUM,
    SUM,
    Request,
    pair_count,
    poison,
)
from orthofast.kernels.numba_threads import machine
from orthofast.records import GramStats

NAME = "numba_cpu"
TILES = ((4096, 1024), (1024, 512), (512, 256), (0, 128))  # (vectors from, tile): large for BLAS, many to share
PANEL = 512  # elements of a vector widened at a time: a panel stays in a second-level cache
WAVE = 1024  # tiles between two gatherings of partial results
WORK_PER_THREAD = 1 << 24  # multiply-adds that pay for waking a thread
STORED: dict[torch.dtype, type[np.generic]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}  # what the loops read; float8 is looked up by byte

Array = np.ndarray[Any, np.dtype[Any]]


@functools.cache
def _missing() -> str | None:
    for package in ("numba", "scipy"):
        if importlib.util.find_spec(package) is None:
            return f"it needs {package}, which is not installed; pip install {package}"
    return None


def supports(request: Request) -> str | None:
    """None, or why this request cannot be served."""
    if request.x.device.type != "cpu":
        return f"it folds tensors on the CPU, got one on {request.x.device}"
    return _missing()


def gram_stats(request: Request) -> GramStats:
    """Fold one request."""
    return gram_stats_many([request])[0]


def gram_stats_many(requests: Sequence[Request]) -> list[GramStats]:
    """Fold requests together: those of one dtype and one wish share their threads and their queue of tiles."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, request in enumerate(requests):
        key = (request.x.dtype, request.precision == "float64", request.normalize, request.want, request.bins)
        groups.setdefault(key, []).append(index)
    records: dict[int, GramStats] = {}
    for indices in groups.values():
        records.update(zip(indices, _fold_group([requests[i] for i in indices]), strict=True))
    return [records[index] for index in range(len(requests))]


@dataclass(slots=True)
class _Owner:
    """Where the results of one request begin."""

    item: int
    vector: int = 0
    side: int = 0
    vector_y: int = 0
    side_y: int = 0


@dataclass(slots=True)
class _Plan:
    """The tables of a group of requests, and where each request finds its results."""

    sides: Array
    items: Array
    owners: list[_Owner]
    vectors: int
    units: int
    tiles: int
    work: int


def _plan(loops: ModuleType, requests: Sequence[Request]) -> _Plan:
    """Lay out sides, items and tiles: functions of the shapes alone."""
    sides: list[tuple[int, ...]] = []
    items: list[tuple[int, ...]] = []
    owners: list[_Owner] = []
    vectors = units = 0
    for request in requests:
        owner = _Owner(len(items), vectors, len(sides))
        for x in (request.x,) if request.y is None else (request.x, request.y):
            owner.vector_y, owner.side_y = vectors, len(sides)
            b, n, d = x.shape
            between, step, stride = x.stride()
            step = step if n > 1 else max(1, d)  # strides of single elements mean nothing
            stride = stride if d > 1 else 1
            address, itemsize, here = x.data_ptr(), x.element_size(), -(-n // loops.UNIT)
            for i in range(b):
                place = (address + i * between * itemsize, step, stride, n, d, vectors + i * n, units + i * here)
                sides.append((*place, loops.PACKED, 0, 0))
            vectors, units = vectors + b * n, units + b * here
        n, m = request.x.shape[1], request.x.shape[1] if request.y is None else request.y.shape[1]
        block = _tile_of(max(n, m))
        down, across = -(-n // block), -(-m // block)
        tiles = down * (down + 1) // 2 if request.y is None else down * across
        work = n * (n + 1) // 2 * request.x.shape[2] if request.y is None else n * m * request.x.shape[2]
        for i in range(request.x.shape[0]):
            items.append((owner.side + i, owner.side_y + i, block, tiles, len(items), work))
        owners.append(owner)
    ordered = np.array(items, dtype=np.int64).reshape(len(items), loops.ITEM_COLUMNS + 1)
    ordered = ordered[np.argsort(-ordered[:, -1], kind="stable")]  # long ones first: all threads finish together
    counts = ordered[:, loops.FIRST_TILE].copy()
    ordered[:, loops.FIRST_TILE] = np.cumsum(counts) - counts
    return _Plan(
        sides=np.array(sides, dtype=np.int64).reshape(len(sides), loops.SIDE_COLUMNS),
        items=ordered,
        owners=owners,
        vectors=vectors,
        units=units,
        tiles=int(counts.sum()),
        work=int(ordered[:, -1].sum()),
    )


def _tile_of(vectors: int) -> int:
    return next(tile for least, tile in TILES if vectors >= least)


def _fold_group(requests: Sequence[Request]) -> list[GramStats]:
    """Fold requests of one dtype, arithmetic and wish."""
    loops = _loops()
    request = requests[0]
    plan = _plan(loops, requests)
    compute = np.dtype(np.float64 if request.precision == "float64" else np.float32)
    stored: Array = np.empty(0, dtype=STORED.get(request.x.dtype, np.uint8))
    table = _float8_values(request.x.dtype)
    want, vectors, count = request.want, plan.vectors, len(plan.items)

    norm_sq = torch.empty(vectors, dtype=torch.float64)
    inverse, scale = np.empty(vectors), np.empty(vectors, dtype=compute)
    totals = torch.zeros((4, count), dtype=torch.float64)  # abs_sum, sq_sum, sum, abs_max
    totals[3] = -1
    argmax = torch.full((count, 2), -1, dtype=torch.int64)
    row_abs = torch.zeros(vectors if want & ROW_ABS else 0, dtype=torch.float64)
    hist = torch.zeros((count, request.bins) if want & HIST else (0, 0), dtype=torch.int64)

    limit, safe = (1022, 300) if compute == np.float64 else (126, 30)
    with machine() as held:
        threads = max(1, min(torch.get_num_threads() if held.blas_is_held else 1, plan.work // WORK_PER_THREAD))
        queue = np.zeros(1, dtype=np.int64)
        lengths = (stored, table, plan.sides, plan.units, queue, norm_sq.numpy(), inverse, scale, limit)
        held.run([functools.partial(loops.measure, *lengths)] * min(threads, plan.units))
        loops.survey(stored, plan.sides, inverse, scale, request.normalize, safe)
        if want and plan.tiles:
            block = int(plan.items[:, loops.BLOCK].max())
            slots = min(WAVE, plan.tiles)
            sums, pairs = np.empty((slots, 4)), np.empty((slots, 4), dtype=np.int64)
            parts = np.empty((2, slots, block if want & ROW_ABS else 0))
            packed = bool((plan.sides[:, loops.LAYOUT] == loops.PACKED).any())
            longest = int(plan.sides[:, loops.LENGTH].max())
            widest = min(block, int(plan.sides[:, loops.COUNT].max()))
            panel = min(PANEL, longest) if packed else 0
            rooms = [_room(compute, widest, panel, want, request.bins) for _ in range(threads)]
            addresses = loops.blas_addresses(compute)
            for begin in range(0, plan.tiles, WAVE):
                end = min(begin + WAVE, plan.tiles)
                queue[0] = 0
                given = (stored, table, plan.sides, plan.items, begin, end, queue, inverse, scale, addresses)
                results = (sums, pairs, parts[0], parts[1])
                held.run(
                    [
                        functools.partial(loops.fold, *given, *room[:-1], want, *results, room[-1], hist.numpy())
                        for room in rooms[: end - begin]
                    ]
                )
                _gather(plan, loops, begin, end, want, results, totals.numpy(), argmax.numpy(), row_abs.numpy())
    totals[3].masked_fill_(totals[3] < 0, float("nan"))
    return [
        _record(one, owner, plan, loops, norm_sq, totals, argmax, row_abs, hist)
        for one, owner in zip(requests, plan.owners, strict=True)
    ]


def _gather(
    plan: _Plan, loops: ModuleType, begin: int, end: int, want: int, results: tuple[Array, ...],
    totals: Array, argmax: Array, row_abs: Array,
) -> None:  # fmt: skip
    """Add the partial results of the tiles from ``begin`` to ``end`` to their items, in the order of the tiles."""
    sums, pairs, row_parts, column_parts = results
    index = np.searchsorted(plan.items[:, loops.FIRST_TILE], np.arange(begin, end), side="right") - 1
    output = plan.items[index, loops.OUTPUT]
    for k in range(3):
        np.add.at(totals[k], output, sums[: end - begin, k])  # one after another
    if want & ABS_MAX:
        for slot, at in enumerate(output):
            best, found = totals[3, at], sums[slot, 3]
            earlier = tuple(pairs[slot, :2]) < tuple(argmax[at])
            if found >= 0 and (found > best or (found == best and earlier)):
                totals[3, at], argmax[at] = found, pairs[slot, :2]
    if want & ROW_ABS:
        for slot, item in enumerate(plan.items[index]):
            left, right, block = plan.sides[item[loops.LEFT]], plan.sides[item[loops.RIGHT]], item[loops.BLOCK]
            for side, start, part in ((left, pairs[slot, 2], row_parts), (right, pairs[slot, 3], column_parts)):
                count = min(block, side[loops.COUNT] - start)
                first = side[loops.FIRST] + start
                row_abs[first : first + count] += part[slot, :count]


def _room(compute: np.dtype[Any], block: int, panel: int, want: int, bins: int) -> tuple[Array | None, ...]:
    """What one thread writes to: BLAS arguments, a tile, two panels, the counts of a tile."""
    return (
        np.zeros(3, dtype=np.uint8),
        np.zeros(6, dtype=np.int32),
        np.zeros(2, dtype=compute),
        np.empty(block * block, dtype=compute),
        np.empty((2, block if panel else 0, panel), dtype=compute),
        None if want == ABS_SUM else np.zeros(bins, dtype=np.int64),
    )


def _record(
    request: Request, owner: _Owner, plan: _Plan, loops: ModuleType,
    norm_sq: Tensor, totals: Tensor, argmax: Tensor, row_abs: Tensor, hist: Tensor,
) -> GramStats:  # fmt: skip
    """Cut the record of one request out of the results of its group."""
    (b, n, _), want = request.x.shape, request.want
    m = None if request.y is None else request.y.shape[1]
    mine = slice(owner.item, owner.item + b)
    left = plan.sides[owner.side : owner.side + b]
    right = left if m is None else plan.sides[owner.side_y : owner.side_y + b]
    zero, bad = left[:, loops.ZERO], left[:, loops.NONFINITE]
    left_zero, right_zero = (zero, right[:, loops.ZERO]) if request.normalize else (0 * zero, 0 * zero)
    pairs = [pair_count(n, m, int(p), int(q)) for p, q in zip(left_zero, right_zero, strict=True)]
    if m is not None:
        zero, bad = zero + right[:, loops.ZERO], bad + right[:, loops.NONFINITE]

    def cut(values: Tensor, first: int, count: int) -> Tensor:
        return values[first : first + b * count].view(b, count)

    record = GramStats(
        pairs=torch.tensor(pairs, dtype=torch.int64),
        zero=torch.from_numpy(np.array(zero)),
        nonfinite=torch.from_numpy(np.array(bad)),
        norm_sq=cut(norm_sq, owner.vector, n),
        abs_sum=totals[0, mine] if want & ABS_SUM else None,
        sq_sum=totals[1, mine] if want & SQ_SUM else None,
        sum=totals[2, mine] if want & SUM else None,
        abs_max=totals[3, mine] if want & ABS_MAX else None,
        argmax=argmax[mine] if want & ABS_MAX else None,
        row_abs=cut(row_abs, owner.vector, n) if want & ROW_ABS else None,
        hist=hist[mine] if want & HIST else None,
        norm_sq_y=None if m is None else cut(norm_sq, owner.vector_y, m),
        row_abs_y=cut(row_abs, owner.vector_y, m) if m is not None and want & ROW_ABS else None,
        floor=torch.zeros(b, dtype=torch.float64),
        cross=m is not None,
    )
    return poison(record) if bad.any() else record


@functools.cache
def _float8_values(dtype: torch.dtype) -> Array:
    """(256,) float32: what each byte of a float8 dtype means; empty for the others."""
    if dtype not in FLOAT8:
        return np.empty(0, dtype=np.float32)
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy()


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("orthofast.kernels.numba_folds")

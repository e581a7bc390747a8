"""What the Triton fold must know before it can launch, from shapes and strides alone, kept for calls that come again.

Requests that one launch can serve form a group: same dtype, access, tile and fields. A group's tables name its sides
(one set of vectors of one item) and problems (one item of one request); per call only addresses are filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthofast.kernels import tiles
from orthofast.kernels.contract import ABS_MAX, ABS_SUM, FLOAT8, HIST, ROW_ABS, Request
from orthofast.kernels.schedule import MOST_TILES, Problem, WorkList, bands, tile_count, tiles_of, work_list
from orthofast.kernels.tiles import Tile

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]

# columns, as triton_access names them
SIDE_COLUMNS, PROBLEM_COLUMNS = 10, 20
ROWS, COLUMNS, ANY = 0, 1, 2
ALIGNED_BYTES, ALIGNED_ELEMENTS, PADDED_ELEMENTS = 16, 8, 16
ALONE_TILES = 4 * tiles.PROCESSORS  # work that fills the device by itself and gains from tensor maps
FINISH_BLOCK = 256


class Shape(NamedTuple):
    """All that a plan may depend on: a request without its addresses."""

    dtype: torch.dtype
    x: tuple[int, ...]  # b, n, d
    x_stride: tuple[int, ...]
    y: tuple[int, ...] | None
    y_stride: tuple[int, ...] | None
    aligned: bool  # addresses are multiples of 16 bytes
    normalize: bool
    want: int
    bins: int
    precision: str

    @property
    def problem(self) -> Problem:
        """Its items, as the schedule sees them."""
        b, n, d = self.x
        return Problem(n, d, None if self.y is None else self.y[1], b)


def shape_of(request: Request) -> Shape:
    """A request as the key of its plan."""
    x, y = request.x, request.y
    aligned = x.data_ptr() % ALIGNED_BYTES == 0 and (y is None or y.data_ptr() % ALIGNED_BYTES == 0)
    return Shape(
        x.dtype,
        x.shape,
        x.stride(),
        None if y is None else y.shape,
        None if y is None else y.stride(),
        aligned,
        request.normalize,
        request.want,
        request.bins,
        request.precision,
    )


@dataclass(frozen=True, slots=True)
class Method:
    """How a request is folded; requests of one method share launches.

    Attributes:
        layout: of the operands the fold reads: rows, columns, or any strides.
        stored: layout of the input as ``prepare`` reads it.
        own: the fold reads 16-bit parts made by ``prepare``, not the input.
        parts: 1, or 3 products of high and low parts.
        watched: unscaled bfloat16 whose products may leave float32: such problems are folded again, scaled.
        decides: operands are rounded: problems near the rounding floor are folded again, in full.
    """

    dtype: torch.dtype
    cross: bool
    normalize: bool
    want: int
    bins: int
    layout: int
    stored: int
    aligned: bool
    own: bool
    parts: int
    watched: bool
    decides: bool
    tile: Tile
    alone: int = -1  # number of a request that takes a launch for itself

    @property
    def sums(self) -> int:
        """Fields of the fold's own launch; the histogram has one of its own."""
        return self.want & ~HIST | (ABS_SUM if self.decides else 0)


@lru_cache(maxsize=4096)
def method_of(shape: Shape, kind: str) -> Method:
    """The method of one request on a device of this kind."""
    layouts = [_layout(shape.x, shape.x_stride)]
    sides = [(shape.x, shape.x_stride)]
    if shape.y is not None and shape.y_stride is not None:
        layouts.append(_layout(shape.y, shape.y_stride))
        sides.append((shape.y, shape.y_stride))
    stored = layouts[0] if len(set(layouts)) == 1 else ANY
    aligned = shape.aligned and stored != ANY and all(_is_aligned(*side, stored) for side in sides)
    exact16 = shape.dtype in (torch.float16, torch.bfloat16)
    rounded = shape.dtype == torch.float32 and shape.precision == "high" and shape.normalize
    layout = stored if aligned or not exact16 else ANY
    if not exact16 and stored == ANY:
        layout = ROWS  # what prepare makes of odd strides
    parts = 1 if exact16 or shape.dtype in FLOAT8 or rounded else 3
    heavy = bool(shape.want & (ABS_MAX | HIST))
    return Method(
        dtype=shape.dtype,
        cross=shape.y is not None,
        normalize=shape.normalize,
        want=shape.want,
        bins=shape.bins,
        layout=layout,
        stored=stored,
        aligned=aligned,
        own=not exact16,
        parts=parts,
        watched=shape.dtype == torch.bfloat16 and shape.normalize and layout != ANY,
        decides=rounded and shape.want != 0,  # lengths alone need no second look
        tile=tiles.fold_tile(kind, shape.problem, parts=parts, careful=layout == ANY, heavy=heavy),
    )


def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Which dimension lies without gaps; of a single vector or entry, either."""
    if stride[2] == 1 or shape[2] <= 1:
        return ROWS
    return COLUMNS if stride[1] == 1 else ANY


def _is_aligned(shape: tuple[int, ...], stride: tuple[int, ...], layout: int) -> bool:
    contiguous, across = (shape[2], stride[1]) if layout == ROWS else (shape[1], stride[2])
    flat = stride[2 if layout == ROWS else 1] == 1
    item = stride[0] % ALIGNED_ELEMENTS == 0 or shape[0] == 1
    return flat and contiguous % ALIGNED_ELEMENTS == 0 and across % ALIGNED_ELEMENTS == 0 and item


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries [begin, stop) whose slots fit the budget: whole problems, or some tile columns of one."""

    begin: int
    stop: int
    first_column: int
    last_column: int
    row_base: int  # slots of earlier pieces
    column_base: int
    starts: bool  # first piece of its problems
    units: tuple[int, int]  # range of units whose vectors take part


@dataclass(slots=True, eq=False)
class Group:
    """Requests of one method: tables without addresses, work list, sizes of everything that is allocated."""

    kind: str  # of device, in the table of tiles
    method: Method
    requests: list[int]
    shapes: list[Shape]
    sides: Int64
    problems: Int64
    base: Int64  # per side, which of the group's tensors it lies in
    shift: Int64  # and how many bytes into it
    left: Int64  # side of each problem
    right: Int64
    work: WorkList
    units: Int32
    vectors: int
    elements: int  # of 16-bit scratch, per part
    first_vector: list[int]  # per request, x then y
    first_problem: list[int]
    items: list[int]  # per request
    vector_counts: list[int]  # per request, x then y, of all items
    batched: list[tuple[int, int, int]]  # of these counts, which are of several items: b, n
    pieces: list[Piece]
    slots: tuple[int, int]
    vector_block: tuple[int, int]
    static: tuple[Tensor, Any] | None = None  # int32 entries, then units, on the device; event of the copy
    placed: dict[tuple[int, ...], tuple[Tensor, Any]] = field(default_factory=dict)

    @property
    def problem_count(self) -> int:
        """Items of all requests."""
        return len(self.problems)


@lru_cache(maxsize=128)
def plan(shapes: tuple[Shape, ...], device: torch.device, kind: str) -> tuple[Group, ...]:
    """Groups of these requests; the device is part of the key, for groups keep tables there."""
    found: dict[Method, list[int]] = {}
    for index, shape in enumerate(shapes):
        if shape.x[0] == 0:
            continue
        method = method_of(shape, kind)
        if tiles.has_tensor_maps(kind) and _fills_the_device(shape, method):
            method = replace(method, alone=index)
        found.setdefault(method, []).append(index)
    return tuple(_group(method, indices, [shapes[i] for i in indices], kind) for method, indices in found.items())


def _fills_the_device(shape: Shape, method: Method) -> bool:
    tile = method.tile
    return tile_count([shape.problem], tile.block_m, tile.block_n) >= ALONE_TILES


def _padded(length: int) -> int:
    return -(-length // PADDED_ELEMENTS) * PADDED_ELEMENTS


def _group(method: Method, requests: list[int], shapes: list[Shape], kind: str) -> Group:
    tile = method.tile
    work = work_list(tuple(shape.problem for shape in shapes), tile.block_m, tile.block_n)
    block = tiles.prepare_block(kind, method.stored == COLUMNS)
    made = [_sides_of(method, shape) for shape in shapes]  # each as if it were alone
    vectors = elements = row_slots = column_slots = problem_count = 0
    first_vector: list[int] = []
    first_problem: list[int] = []
    tensors = 0
    for shape, (sides, problems, base, _) in zip(shapes, made, strict=True):
        b, n, d = shape.x
        m = n if shape.y is None else shape.y[1]
        sides[:, 5] += vectors
        sides[:, 6] += elements
        sides[:, 8] += problem_count
        np.add(base, tensors, out=base)
        for right in (0, 1):
            side = sides[right if method.cross else 0 :: 2 if method.cross else 1]
            problems[:, 3 * right + 1 : 3 * right + 3] = side[:, 1:3]
            problems[:, 9 + right] = side[:, 5]
            problems[:, 15 + 2 * right : 17 + 2 * right] = side[:, 6:8]
        problems[:, 6:9] = n, m, d
        columns, heights = -(-m // tile.block_n), -(-n // tile.block_m)
        problems[:, 13] = row_slots + np.arange(b) * (columns * n)
        problems[:, 14] = column_slots + np.arange(b) * (heights * m)
        row_slots, column_slots = row_slots + b * columns * n, column_slots + b * heights * m
        first_problem.append(problem_count)
        first_vector.append(vectors)
        if method.cross:
            first_vector.append(vectors + b * n)
        vectors += b * (n + m if method.cross else n)
        elements += int(np.sum(sides[:, 7] * sides[:, 4 if method.layout == COLUMNS else 3])) if method.own else 0
        problem_count, tensors = problem_count + b, tensors + (2 if method.cross else 1)
    ends = [end for shape in shapes for end in (shape.x, shape.y) if end is not None]
    sides = np.concatenate([part[0] for part in made])
    problems = np.concatenate([part[1] for part in made])
    problems[:, 11], problems[:, 12] = work.first, work.count
    left = np.arange(problem_count) * (2 if method.cross else 1)
    units, unit_first = _units(sides, block[0])
    group = Group(
        kind=kind,
        method=method,
        requests=requests,
        shapes=shapes,
        sides=sides,
        problems=problems,
        base=np.concatenate([part[2] for part in made]),
        shift=np.concatenate([part[3] for part in made]),
        left=left,
        right=left + 1 if method.cross else left,
        work=work,
        units=units,
        vectors=vectors,
        elements=elements,
        first_vector=first_vector,
        first_problem=first_problem,
        items=[shape.x[0] for shape in shapes],
        vector_counts=[end[0] * end[1] for end in ends],
        batched=[(place, end[0], end[1]) for place, end in enumerate(ends) if end[0] != 1],
        pieces=[],
        slots=(row_slots, column_slots),
        vector_block=block,
    )
    group.pieces = _pieces(group, unit_first)
    return group


def _sides_of(method: Method, shape: Shape) -> tuple[Int64, Int64, Int64, Int64]:
    """Sides (item by item, left before right), empty problems, tensor of each side, bytes from its beginning."""
    b = shape.x[0]
    both = [(shape.x, shape.x_stride)]
    if shape.y is not None and shape.y_stride is not None:
        both.append((shape.y, shape.y_stride))
    sides = np.zeros((b, len(both), SIDE_COLUMNS), np.int64)
    shift = np.zeros((b, len(both)), np.int64)
    items = np.arange(b)
    vectors = elements = 0
    for role, ((_, n, d), stride) in enumerate(both):
        out_stride = _padded(n if method.layout == COLUMNS else d)
        size = out_stride * (d if method.layout == COLUMNS else n)
        sides[:, role, 1:5] = stride[1], stride[2], n, d
        sides[:, role, 5] = vectors + items * n
        sides[:, role, 6], sides[:, role, 7] = elements + items * size, out_stride
        sides[:, role, 8], sides[:, role, 9] = items, role
        shift[:, role] = items * (stride[0] * method.dtype.itemsize)
        vectors, elements = vectors + b * n, elements + b * size
    base = np.tile(np.arange(len(both)), b)
    return sides.reshape(-1, SIDE_COLUMNS), np.zeros((b, PROBLEM_COLUMNS), np.int64), base, shift.ravel()


def _units(sides: Int64, block: int) -> tuple[Int32, Int64]:
    """(units, 2) int32: side and block of its vectors; and the first unit of each side, one more for the end."""
    blocks = -(-sides[:, 3] // block)
    first = np.concatenate([[0], np.cumsum(blocks)])
    units = np.empty((int(first[-1]), 2), np.int32)
    units[:, 0] = np.repeat(np.arange(len(sides)), blocks)
    units[:, 1] = np.arange(len(units)) - np.repeat(first[:-1], blocks)
    return units, first


def _pieces(group: Group, unit_first: Int64) -> list[Piece]:
    """Cut the work so that slots of per-vector sums stay within the budget; without such sums nothing is cut."""
    most, method, tile = tiles.SLOT_BYTES // 4, group.method, group.method.tile
    if sum(group.slots) <= most or not method.want & ROW_ABS:
        return [Piece(0, len(group.work), 0, MOST_TILES, 0, 0, True, (0, len(group.units)))]
    pieces: list[Piece] = []
    room = (1, 1)
    first, count, table = group.work.first, group.work.count, group.problems

    def units(begin: int, end: int) -> tuple[int, int]:
        return int(unit_first[group.left[begin]]), int(unit_first[group.right[end] + 1])

    for shape, begin in zip(group.shapes, group.first_problem, strict=True):
        b, n, _ = shape.x
        m = n if shape.y is None else shape.y[1]
        columns, heights = -(-m // tile.block_n), -(-n // tile.block_m)
        together = most // max(1, columns * n + heights * m)  # items whose slots fit
        if together:
            for start in range(begin, begin + b, together):
                end = min(start + together, begin + b) - 1
                pieces.append(
                    Piece(int(first[start]), int(first[end] + count[end]), 0, MOST_TILES,
                          int(table[start, 13]), int(table[start, 14]), True, units(start, end))
                )  # fmt: skip
            room = max(room[0], together * columns * n), max(room[1], together * heights * m)
            continue
        column = tiles_of(n, m if method.cross else None, tile.block_m, tile.block_n) >> 16
        per_column = n + heights * tile.block_n
        for low, high in bands(columns, most // per_column):
            inside = np.flatnonzero((column >= low) & (column < high))
            for number in range(begin, begin + b):
                at = int(first[number]) + (int(inside[0]) if len(inside) else 0)
                pieces.append(
                    Piece(at, at + len(inside), low, high, int(table[number, 13]), int(table[number, 14]), low == 0,
                          units(number, number))
                )  # fmt: skip
            width = min(high * tile.block_n, m) - low * tile.block_n
            room = max(room[0], (high - low) * n), max(room[1], heights * width)
    group.slots = room
    return pieces


def tables(group: Group, where: tuple[int, ...]) -> Int64:
    """Sides, then problems, flat int64, with addresses filled in."""
    sides, problems = group.sides.copy(), group.problems.copy()
    sides[:, 0] = np.array(where, np.int64)[group.base] + group.shift
    problems[:, 0], problems[:, 3] = sides[group.left, 0], sides[group.right, 0]
    return np.concatenate([sides.ravel(), problems.ravel()])

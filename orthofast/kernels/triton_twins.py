"""Matrices that one call folds by rows and by columns: found by shapes and addresses, their lengths read once.

The vectors of both groups then lie in one allocation, of which each group has its part; a group takes part only if all
its matrices come twice, so that its own ``prepare`` falls away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthofast.kernels import tiles
from orthofast.kernels.triton_launch import TYPES, Measured
from orthofast.kernels.triton_lengths import END_COLUMNS, JOIN_BLOCK, MATRIX_COLUMNS, join_strips, measure_tiles
from orthofast.kernels.triton_lists import copied, hold, recorded
from orthofast.kernels.triton_plan import ANY, ROWS, Group, Shape, plan

PAD = 4  # vectors and marks of a group begin at a multiple, for 16 bytes of alignment
KEPT_TABLES = 16


@dataclass(slots=True, eq=False)
class Twins:
    """One launch over matrices of one dtype, read once for both of their sides.

    Attributes:
        pairs: requests of the rows and of the columns of each matrix.
        groups: positions of the groups that take part.
        matrices: table of the items' matrices, without addresses; ``owner`` is the pair of each, ``shift`` its bytes
            into it.
    """

    pairs: list[tuple[int, int]]
    groups: tuple[int, ...]
    dtype: torch.dtype
    watched: bool
    normalize: bool
    aligned: bool
    block: tuple[int, int, int]
    matrices: NDArray[np.int64]
    owner: NDArray[np.int64]
    shift: NDArray[np.int64]
    ends: NDArray[np.int64]
    tiles: NDArray[np.int32]
    joins: NDArray[np.int32]
    strips: int
    vectors: dict[int, int]  # group -> first of its vectors in the joint allocation
    marks: dict[int, int]
    sizes: tuple[int, int]  # vectors, marks in all
    placed: dict[tuple[int, ...], list[tuple[Tensor, Any]]]


def same_places(xs: Sequence[Tensor]) -> tuple[int, ...]:
    """For each tensor the first one at its address."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(x.data_ptr(), index) for index, x in enumerate(xs)])


def measure(
    twins: Sequence[Twins], groups: Sequence[Group], xs: Sequence[Tensor], device: torch.device
) -> dict[int, Measured]:
    """Lengths of the groups that take part, by the position of the group."""
    found: dict[int, Measured] = {}
    for twin in twins:
        found.update(_measure(twin, groups, xs, device))
    return found


def _measure(twin: Twins, groups: Sequence[Group], xs: Sequence[Tensor], device: torch.device) -> dict[int, Measured]:
    tables = _on_device(twin, tuple([xs[i].data_ptr() for i, _ in twin.pairs]), device)
    if tables is None:
        return {}
    matrices, ends, units, joins = tables
    vectors, marks = twin.sizes
    norm_sq = torch.empty(vectors, dtype=torch.float64, device=device)
    factors = torch.empty(3 * vectors, dtype=torch.float32, device=device)
    todo = torch.zeros(marks, dtype=torch.int32, device=device) if twin.watched else None
    strips = torch.empty(2 * twin.strips, dtype=torch.float32, device=device)
    block_n, block_d, strip = twin.block
    measure_tiles[(len(twin.tiles),)](
        units, matrices, strips, twin.strips,
        DTYPE=TYPES[twin.dtype], ALIGNED=twin.aligned, BLOCK_N=block_n, BLOCK_D=block_d, STRIP=strip, num_warps=8,
    )  # fmt: skip
    join_strips[(len(twin.joins),)](
        joins, ends, strips, twin.strips, norm_sq, factors, todo,
        WATCHED=twin.watched, NORMALIZE=twin.normalize, BLOCK_V=JOIN_BLOCK, num_warps=4,
    )  # fmt: skip
    found = {}
    for at in twin.groups:
        group, first = groups[at], twin.vectors[at]
        found[at] = Measured(
            norm_sq=norm_sq[first : first + group.vectors],
            factors=factors[3 * first : 3 * (first + group.vectors)],
            todo=None if todo is None else todo[twin.marks[at] : twin.marks[at] + 1 + group.problem_count],
        )
    return found


def _on_device(twin: Twins, where: tuple[int, ...], device: torch.device) -> list[Tensor] | None:
    """Tables and lists; None where they are new while a graph is captured: each group then reads for itself."""
    known = twin.placed.get(where)
    if known is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        matrices = twin.matrices.copy()
        matrices[:, 0] = np.array(where, np.int64)[twin.owner] + twin.shift
        while len(twin.placed) >= KEPT_TABLES:
            twin.placed.pop(next(iter(twin.placed)))
        hosts = (matrices.ravel(), twin.ends.ravel(), twin.tiles.ravel(), twin.joins.ravel())
        known = twin.placed[where] = [(copied(torch.from_numpy(host), device), recorded(device)) for host in hosts]
    hold(device, *known)
    return [tensor for tensor, _ in known]


@lru_cache(maxsize=128)
def twins_of(shapes: tuple[Shape, ...], places: tuple[int, ...], device: torch.device, kind: str) -> tuple[Twins, ...]:
    """What is read once among these requests; one launch per dtype and alignment.

    Args:
        shapes: as ``plan`` takes them.
        places: of their x, as ``same_places`` gives them.
        device: that holds them.
        kind: of the device, in the table of tiles.
    """
    if len(set(places)) == len(places):
        return ()
    groups = plan(shapes, device, kind)
    home = {index: at for at, group in enumerate(groups) for index in group.requests}
    pairs = _paired(shapes, places, groups, home)
    while True:  # a group that is not wholly paired takes its partners out
        covered = {index for pair in pairs for index in pair}
        whole = {at for at, group in enumerate(groups) if covered.issuperset(group.requests)}
        kept = [pair for pair in pairs if home[pair[0]] in whole and home[pair[1]] in whole]
        if len(kept) == len(pairs):
            break
        pairs = kept
    together: dict[tuple[torch.dtype, bool], list[tuple[int, int]]] = {}
    for pair in pairs:
        method = groups[home[pair[0]]].method
        together.setdefault((method.dtype, method.aligned), []).append(pair)
    return tuple(_twins(part, groups, home, shapes, kind) for part in together.values())


def _paired(
    shapes: Sequence[Shape], places: Sequence[int], groups: Sequence[Group], home: dict[int, int]
) -> list[tuple[int, int]]:
    """Each request by columns with a request by rows whose transpose it is."""
    waiting: dict[Any, list[int]] = {}
    pairs = []
    for index, shape in enumerate(shapes):
        if index not in home:
            continue
        method = groups[home[index]].method
        if method.own or method.cross or method.stored == ANY or 0 in shape.x or min(shape.x[1:]) == 1:
            continue
        (b, *sizes), (step, *strides) = shape.x, shape.x_stride
        by_rows = method.stored == ROWS
        if not by_rows:  # seen as the matrix whose columns these are
            sizes.reverse()
            strides.reverse()
        matrix = places[index], shape.dtype, method.aligned, b, *sizes, step if b > 1 else 0, *strides
        partners = waiting.get((matrix, not by_rows))
        if partners:
            other = partners.pop()
            pairs.append((index, other) if by_rows else (other, index))
        else:
            waiting.setdefault((matrix, by_rows), []).append(index)
    return pairs


def _twins(
    pairs: list[tuple[int, int]], groups: Sequence[Group], home: dict[int, int], shapes: Sequence[Shape], kind: str
) -> Twins:
    block = tiles.lengths_block(kind)
    block_n, _, strip = block
    taking = tuple(sorted({home[index] for pair in pairs for index in pair}))
    vectors: dict[int, int] = {}
    marks: dict[int, int] = {}
    sizes = [0, 0]
    for at in taking:
        vectors[at], marks[at] = sizes
        sizes[0] += -(-groups[at].vectors // PAD) * PAD
        sizes[1] += -(-(1 + groups[at].problem_count) // PAD) * PAD
    matrices: list[list[int]] = []
    ends: list[list[int]] = []
    owner, shift, units, joins = [], [], [], []
    strips = 0
    for number, pair in enumerate(pairs):
        (b, n, d), (step, across, _) = shapes[pair[0]].x, shapes[pair[0]].x_stride
        counts = (-(-d // strip), -(-n // block_n))  # strips of a row, of a column
        for item in range(b):
            row_strips, column_strips = strips, strips + counts[0] * n
            strips = column_strips + counts[1] * d
            tile_grid = np.indices((counts[1], counts[0])).reshape(2, -1).T
            units.append(np.column_stack([np.full(len(tile_grid), len(matrices)), tile_grid]))
            matrices.append([0, across, n, d, row_strips, column_strips])
            owner.append(number)
            shift.append(item * step * shapes[pair[0]].dtype.itemsize)
            for index, size, begin, parts in zip(pair, (n, d), (row_strips, column_strips), counts, strict=True):
                at = home[index]
                group, place = groups[at], groups[at].requests.index(index)
                first = group.first_vector[place] + item * size
                problem = group.first_problem[place] + item
                blocks = np.arange(-(-size // JOIN_BLOCK))
                joins.append(np.column_stack([np.full(len(blocks), len(ends)), blocks]))
                ends.append(
                    [size, begin, parts, vectors[at] + first, 3 * vectors[at] + first, group.vectors,
                     marks[at], marks[at] + 1 + problem]
                )  # fmt: skip
    method = groups[home[pairs[0][0]]].method
    return Twins(
        pairs=pairs,
        groups=taking,
        dtype=method.dtype,
        watched=method.watched,
        normalize=method.normalize,
        aligned=method.aligned,
        block=block,
        matrices=np.array(matrices, np.int64).reshape(-1, MATRIX_COLUMNS),
        owner=np.array(owner, np.int64),
        shift=np.array(shift, np.int64),
        ends=np.array(ends, np.int64).reshape(-1, END_COLUMNS),
        tiles=np.concatenate(units).astype(np.int32),
        joins=np.concatenate(joins).astype(np.int32),
        strips=strips,
        vectors=vectors,
        marks=marks,
        sizes=(sizes[0], sizes[1]),
        placed={},
    )

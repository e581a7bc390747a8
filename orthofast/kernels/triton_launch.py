"""Launches of the Triton fold for one group of requests: memory, tables on the device, kernels in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orthofast.errors import BackendError
from orthofast.kernels import tiles
from orthofast.kernels.contract import ABS_MAX, HIST, ROW_ABS
from orthofast.kernels.triton_folds import fold
from orthofast.kernels.triton_lists import copied, hold, is_capturing, recorded
from orthofast.kernels.triton_plan import ANY, COLUMNS, FINISH_BLOCK, Group, tables
from orthofast.kernels.triton_prepare import finish, join_rows, poison_vectors, prepare

TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.uint8,
    torch.float8_e5m2: tl.uint8,
    torch.float8_e4m3fnuz: tl.uint8,
    torch.float8_e5m2fnuz: tl.uint8,
}
FORMATS = {
    torch.float8_e4m3fn: 1,
    torch.float8_e5m2: 2,
    torch.float8_e4m3fnuz: 3,
    torch.float8_e5m2fnuz: 4,
}  # numbers of triton_access
ALWAYS, IF_MARKED, IF_UNMARKED = 0, 1, 2
MOST_BINS_IN_SHARED = 2047
KEPT_TABLES, KEPT_BYTES = 64, 32 << 20  # sets of addresses a group remembers: so many, within so much memory
NO_MAPS: tuple[Any, Any, Any, Any] = (None, None, None, None)


@dataclass(slots=True, eq=False)
class Results:
    """What a group's launches leave: (5, problems) sums and counts, per-vector fields over all vectors."""

    sums: Tensor
    counts: Tensor
    norm_sq: Tensor
    row_abs: Tensor | None
    hist: Tensor | None


@dataclass(slots=True, eq=False)
class Measured:
    """What is known of a group before its launches: lengths, factors, marks; as ``prepare`` would leave them."""

    norm_sq: Tensor
    factors: Tensor
    todo: Tensor | None


@dataclass(slots=True, eq=False)
class _Memory:
    """Device memory of one call."""

    entries: Tensor
    units: Tensor
    sides: Tensor
    problems: Tensor
    factors: Tensor
    partials: Tensor
    arguments: Tensor | None
    row_slots: Tensor | None
    column_slots: Tensor | None
    high: Tensor | None
    low: Tensor | None
    todo: Tensor | None


def launch(
    group: Group, tensors: Sequence[Tensor], device: torch.device, processors: int, measured: Measured | None = None
) -> Results:
    """Fold the requests of one group on the current stream; ``tensors`` are their x, each followed by its y."""
    method = group.method
    memory, results = _allocate(group, tensors, device, measured)
    run = _Run(group, tensors, memory, results, device, processors)
    if measured is None:
        run.prepare()
    if method.sums:
        run.fold(rescue=False)
        if method.watched:
            run.fold(rescue=True)
    run.finish(ALWAYS)
    if method.decides:
        run.prepare(rescue=True)
        run.fold(rescue=True)
        run.finish(IF_MARKED)
    if method.want & ROW_ABS:
        run.poison()
    if results.hist is not None:
        run.count()
        results.hist.masked_fill_((results.counts[2] > 0).unsqueeze(1), 0)
    return results


def _allocate(
    group: Group, tensors: Sequence[Tensor], device: torch.device, measured: Measured | None
) -> tuple[_Memory, Results]:
    method, count = group.method, group.problem_count
    static, table = _on_device(group, tensors, device)
    cut = 2 * len(group.work)
    side_cells = group.sides.size

    def fresh(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    entries = len(group.work)
    rows = bool(method.want & ROW_ABS)
    memory = _Memory(
        entries=static[:cut],
        units=static[cut:],
        sides=table[:side_cells],
        problems=table[side_cells:],
        factors=fresh(3 * group.vectors, dtype=torch.float32) if measured is None else measured.factors,
        partials=fresh(4 * entries, dtype=torch.float32),
        arguments=fresh(entries, dtype=torch.int64) if method.want & ABS_MAX else None,
        row_slots=fresh(group.slots[0], dtype=torch.float32) if rows else None,
        column_slots=fresh(group.slots[1], dtype=torch.float32) if rows else None,
        high=fresh(group.elements, dtype=torch.float16) if method.own else None,
        low=fresh(group.elements, dtype=torch.float16) if method.parts == 3 or method.decides else None,
        todo=None if measured is None else measured.todo,
    )
    if measured is None and (method.watched or method.decides):
        memory.todo = torch.zeros(1 + count, dtype=torch.int32, device=device)
    results = Results(
        sums=fresh(5, count, dtype=torch.float64),
        counts=fresh(5, count, dtype=torch.int64),
        norm_sq=fresh(group.vectors, dtype=torch.float64) if measured is None else measured.norm_sq,
        row_abs=fresh(group.vectors, dtype=torch.float64) if rows else None,
        hist=torch.zeros((count, method.bins), dtype=torch.int64, device=device) if method.want & HIST else None,
    )
    return memory, results


def _on_device(group: Group, tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists and tables of the group; copied only where shapes or addresses are new."""
    where = tuple([tensor.data_ptr() for tensor in tensors])
    known = group.placed.get(where)
    if known is None or group.static is None:
        if is_capturing(device):
            raise BackendError(
                "triton_gpu needs its tables on the device before a graph is captured: call it once on the same tensors"
            )
        if group.static is None:
            lists = np.concatenate([group.work.entries.ravel(), group.units.ravel()])
            group.static = copied(torch.from_numpy(lists), device), recorded(device)
        fitting = KEPT_BYTES // max(1, group.sides.nbytes + group.problems.nbytes)
        if len(group.placed) >= max(1, min(KEPT_TABLES, fitting)):
            group.placed.pop(next(iter(group.placed)), None)
        known = group.placed[where] = copied(torch.from_numpy(tables(group, where)), device), recorded(device)
    hold(device, group.static, known)
    return group.static[0], known[0]


class _Run:
    """The launches of one call; every one on the current stream."""

    def __init__(
        self,
        group: Group,
        tensors: Sequence[Tensor],
        memory: _Memory,
        results: Results,
        device: torch.device,
        processors: int,
    ) -> None:
        self.group, self.tensors, self.memory, self.results = group, tensors, memory, results
        self.method, self.processors = group.method, processors
        self.maps = tensor_maps(group, tensors, memory.high, memory.low)

    def prepare(self, *, rescue: bool = False) -> None:
        method, group, memory = self.method, self.group, self.memory
        if not len(group.units):
            return
        vectors, elements = group.vector_block
        prepare[(len(group.units),)](
            memory.units, memory.sides, self.results.norm_sq, memory.factors, memory.high, memory.low, memory.todo,
            group.vectors,
            DTYPE=TYPES[method.dtype],
            FORMAT=FORMATS.get(method.dtype, 0),
            LAYOUT=method.stored,
            PARTS=(2 if method.parts == 3 or rescue else 1) if method.own else 0,
            SCALED=method.dtype == torch.float32,
            WATCHED=method.watched,
            NORMALIZE=method.normalize,
            ALIGNED=method.aligned,
            CONDITION=IF_MARKED if rescue else ALWAYS,
            BLOCK_V=vectors,
            BLOCK_D=elements,
            num_warps=4,
        )  # fmt: skip

    def fold(self, *, rescue: bool) -> None:
        """All pieces, each followed by the per-vector sums it completes."""
        method, group, memory = self.method, self.group, self.memory
        condition = IF_MARKED if rescue else ALWAYS
        for piece in group.pieces:
            self._fold(method.sums, piece.begin, piece.stop, piece, rescue, condition)
            if not method.want & ROW_ABS or piece.units[0] == piece.units[1]:
                continue
            join_rows[(piece.units[1] - piece.units[0],)](
                memory.units[2 * piece.units[0] :], memory.sides, memory.problems, memory.row_slots,
                memory.column_slots, self.results.row_abs, memory.todo, piece.row_base, piece.column_base,
                piece.first_column, piece.last_column,
                CROSS=method.cross,
                FIRST=piece.starts,
                CONDITION=condition,
                BLOCK_M=method.tile.block_m,
                BLOCK_N=method.tile.block_n,
                BLOCK_V=group.vector_block[0],
                num_warps=1,
            )  # fmt: skip

    def count(self) -> None:
        """Histograms: marked problems from exact operands, the others from those the sums used."""
        marks = self.memory.todo is not None
        piece = self.group.pieces[0]
        entries = len(self.group.work)
        self._fold(HIST, 0, entries, piece, False, IF_UNMARKED if marks else ALWAYS)
        if marks:
            self._fold(HIST, 0, entries, piece, True, IF_MARKED)

    def _fold(self, want: int, begin: int, stop: int, piece: Any, rescue: bool, condition: int) -> None:
        method, group, memory = self.method, self.group, self.memory
        if begin == stop:
            return
        tile, layout, own, parts = method.tile, method.layout, method.own, method.parts
        if rescue and method.decides:
            tile, parts = tiles.with_two_parts(group.kind, tile), 3
        elif rescue:
            layout, own = ANY, False
        x_map, y_map, x_low, y_low = self.maps if layout != ANY else NO_MAPS
        fold[(tiles.programs(tile, stop - begin, self.processors),)](
            memory.entries, memory.problems, x_map, y_map, x_low, y_low, memory.high, memory.low, memory.factors,
            memory.partials, memory.arguments, memory.row_slots, memory.column_slots, self.results.hist, memory.todo,
            begin, stop, len(group.work), group.vectors, piece.row_base, piece.column_base, piece.first_column,
            piece.last_column, method.bins,
            DTYPE=tl.float16 if own else TYPES[method.dtype],
            LAYOUT=layout,
            MAPS=x_map is not None,
            OWN=own,
            PARTS=parts,
            WANT=want,
            CROSS=method.cross,
            NORMALIZE=method.normalize,
            CONDITION=condition,
            FACTOR=1 if layout == ANY and method.dtype == torch.bfloat16 else 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STEP=tile.block_k,
            BINS=_bins(method.bins) if want & HIST else 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip

    def finish(self, condition: int) -> None:
        method, group, memory = self.method, self.group, self.memory
        finish[(group.problem_count,)](
            memory.problems, self.results.norm_sq, memory.partials, memory.arguments, self.results.sums,
            self.results.counts, memory.todo, len(group.work), group.problem_count,
            WANT=method.sums & ~ROW_ABS,
            CROSS=method.cross,
            NORMALIZE=method.normalize,
            DECIDES=method.decides and condition == ALWAYS,
            CONDITION=condition,
            BLOCK=FINISH_BLOCK,
            num_warps=4,
        )  # fmt: skip

    def poison(self) -> None:
        group, memory = self.group, self.memory
        if len(group.units):
            poison_vectors[(len(group.units),)](
                memory.units, memory.sides, self.results.counts, self.results.row_abs, group.problem_count,
                BLOCK_V=group.vector_block[0],
                num_warps=1,
            )  # fmt: skip


def _bins(bins: int) -> int:
    """A power of two with room for what is masked; 0 where counters would not fit in shared memory."""
    return max(16, triton.next_power_of_2(bins + 1)) if bins <= MOST_BINS_IN_SHARED else 0


def tensor_maps(
    group: Group, tensors: Sequence[Tensor], high: Tensor | None, low: Tensor | None
) -> tuple[Any, Any, Any, Any]:
    """Tensor maps x, y, low x, low y of a request that has a launch for itself; elsewhere none."""
    method, tile = group.method, group.method.tile
    if method.alone < 0 or method.layout == ANY:
        return NO_MAPS
    if method.layout == COLUMNS and group.problem_count > 1:
        return NO_MAPS  # a step past the last entry would read the next item
    ends = (0, 1) if method.cross else (0, 0)
    for end in ends:
        b, n, d = tensors[end].shape
        if n == 0 or d == 0 or b * n >= 1 << 31:
            return NO_MAPS
        if not method.own and b > 1 and tensors[end].stride(0) != n * tensors[end].stride(1):
            return NO_MAPS
    maps: list[Any] = [
        _map(group, tensors[end], end, part, block)
        for part in ((high, low) if method.own else (tensors[0], None))
        for end, block in zip(ends, (tile.block_m, tile.block_n), strict=True)
    ]
    return maps[0], maps[1], maps[2], maps[3]


def _map(group: Group, tensor: Tensor, end: int, part: Tensor | None, block: int) -> Any:
    """Tensor map of one end of a request, over its input or over the 16-bit part made of it."""
    method, step = group.method, group.method.tile.block_k
    if part is None:
        return None
    b, n, d = tensor.shape
    if method.own:
        _, _, _, _, _, _, start, stride, _, _ = group.sides[end].tolist()
        base = part[start:]
    else:
        base, stride = tensor, tensor.stride(2 if method.layout == COLUMNS else 1)
    if method.layout == COLUMNS:
        return TensorDescriptor(base, [d, n], [stride, 1], [step, block])
    return TensorDescriptor(base, [b * n, d], [stride, 1], [block, step])

"""The update an adapter makes to one weight: the merged weight in blocks, and the update's vectors from its factors.

With A (r, in) and B (out, r) the update of an (out, in) matrix is ``scale * B A`` (Lu et al. 2024, appendix Eq. 24).
Its rows have the cosines of the rows of ``B R^T`` where ``A^T = Q R``: vectors of length r, so it is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthofast.scan.decoders import decoded_dtype
from orthofast.scan.decoders.contract import Weight, as_stored
from orthofast.scan.matrices import Matrix
from orthofast.views import FLOAT8

UPDATE = "update"  # key in Weight.settings
A, B, MAGNITUDE, REPLACEMENT = "adapter_a", "adapter_b", "adapter_magnitude", "adapter_replacement"  # roles of parts
LORA, REPLACED, ADDED = "lora", "replaced", "added"
BASE, MERGED, DELTA = "base", "merged", "delta"  # what a row is of
VERSIONS = (None, BASE, MERGED, DELTA)  # in the order of a result
CPU_VALUES = 1 << 20  # made at a time: 4 MB of float32
GPU_VALUES = 1 << 25


@dataclass(frozen=True, slots=True)
class Update:
    """How the parts of an adapter change a weight.

    Attributes:
        kind: "lora", "replaced" (the adapter brings the whole weight) or "added" (the base has none of that name).
        scale: what B A is multiplied by.
        rank: of the factors, of each expert.
        transposed: whether (B A)^T and not B A has the stored shape.
        experts: matrices whose factors lie in A (experts * r, in) and B (out, r * experts); 0 for one.
        merges: whether base plus update is a weight that was trained.
        only: the one of the experts that the weight is, where the base stores them one by one; None elsewhere.
        rows: of B that belong to it: from, to; where the model fuses what the base keeps apart.
    """

    kind: str
    scale: float = 1.0
    rank: int = 0
    transposed: bool = False
    experts: int = 0
    merges: bool = True
    only: int | None = None
    rows: tuple[int, int] = (0, 0)


def update_of(weight: Weight) -> Update | None:
    """What an adapter does to a weight; None without one."""
    found = weight.settings.get(UPDATE)
    return found if isinstance(found, Update) else None


def version_of(weight: Weight) -> str | None:
    """What the rows of the stored weight are of."""
    update = update_of(weight)
    return None if update is None else MERGED if update.kind == ADDED else BASE


def update_bytes(weight: Weight) -> int:
    """Bytes that measuring an update takes beside the stored parts: one copy of the weight, and the factors."""
    update = update_of(weight)
    if update is None or update.kind == ADDED:
        return 0
    factors = max(weight.shape[0], math.prod(weight.shape[1:])) * update.rank * 8
    return math.prod(weight.shape) * merged_dtype(decoded_dtype(weight)).itemsize + factors


def merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a merged weight: the base's, as merge_and_unload leaves it; no 8-bit floats, which would lose it."""
    return torch.bfloat16 if dtype in FLOAT8 else dtype


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one update, as stored.

    Attributes:
        a: (experts * r, in, ...).
        b: (out, r * experts, ...).
        update: how they act.
    """

    a: Tensor
    b: Tensor
    update: Update

    def stored(self, expert: int) -> tuple[Tensor, Tensor]:
        """Left (x, r) and right (r, y) factor of a stored (x, y) matrix; kernels flat per filter."""
        a, b, update = self.a, self.b, self.update
        if update.experts:
            expert = expert if update.only is None else update.only
            if a.shape[0] != update.rank:  # not of this expert alone
                a = a.reshape(update.experts, -1, a.shape[-1])[expert]
            b = b.reshape(b.shape[0], -1, update.experts)[:, :, expert]
        if update.only is not None:
            b = b[slice(*update.rows)]
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        return (a.T, b.T) if self.update.transposed else (b, a)

    def of(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Left (out, r) and right (r, in) factor of one matrix in the weight, in float64."""
        left, right = self.stored(matrix.expert or 0)
        if matrix.stack and not self.update.experts:  # experts one behind the other on one axis
            left = left.reshape(matrix.stack, -1, left.shape[1])[matrix.expert]
        if matrix.transposed:
            left, right = right.T, left.T
        chosen = replace(matrix, transposed=False, stack=0, axes="", inward=left.shape[1]).view(left)
        return chosen.double(), right.double()


def factors_of(weight: Weight, parts: Mapping[str, Tensor], update: Update) -> Factors:
    """The factors among a weight's parts."""
    return Factors(as_stored(parts[A], weight.parts[A]), as_stored(parts[B], weight.parts[B]), update)


def small_vectors(factors: Factors, matrix: Matrix, side: str) -> Tensor:
    """(n, min(r, d)) float64: vectors with the lengths and cosines of the update's rows or columns, but for the scale.

    A scale of 0 is kept: then all are zero.
    """
    left, right = factors.of(matrix)
    if side == "cols":
        left, right = right.T, left.T
    reduced: Tensor = torch.linalg.qr(right.T, mode="r").R  # (min(r, d), r), upper triangular
    return (left if factors.update.scale else torch.zeros_like(left)) @ reduced.T


def merge(base: Tensor, factors: Factors, magnitude: Tensor | None = None, expert: int | None = None) -> Tensor:
    """Base plus scaled update, in the type of the base: rounded once, as PEFT's merge_and_unload does.

    Memory: the result, and blocks of ``CPU_VALUES`` or ``GPU_VALUES`` values.

    Args:
        base: the stored weight, or a stack of one expert; not written to.
        factors: of the update.
        magnitude: lengths of DoRA, one per row of B: W = m (W + dW) / |W + dW|, Liu et al. 2024, Eq. 5.
        expert: whose factors, where ``base`` is a stack of that one alone.
    """
    result = torch.empty(base.shape, dtype=merged_dtype(base.dtype), device=base.device)
    if factors.update.experts and factors.update.only is None:
        for index in range(len(base)):
            left, right = factors.stored(index if expert is None else expert)
            _merge(base[index], result[index], left, right, factors.update, None)
    else:
        left, right = factors.stored(0)
        flat = base if base.dim() == 2 else base.reshape(left.shape[0], -1)
        _merge(flat, result.view(flat.shape), left, right, factors.update, magnitude)
    return result


def _merge(base: Tensor, result: Tensor, left: Tensor, right: Tensor, update: Update, magnitude: Tensor | None) -> None:
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    left, right = left.to(base.device, work), right.to(base.device, work)
    values = CPU_VALUES if base.device.type == "cpu" else GPU_VALUES
    step = max(1, values // max(1, base.shape[1]))
    scale = torch.tensor(update.scale, dtype=torch.float64).to(base.device, work)  # infinite if it must

    def summed(start: int) -> Tensor:
        """(rows of the block, columns): base plus update."""
        block = left[start : start + step] @ right
        block *= scale
        block += base[start : start + step].to(work)
        return block

    lengths = None if magnitude is None else magnitude.to(base.device, work).reshape(-1)
    factor = None
    if lengths is not None and update.transposed:  # the lengths are of stored columns
        squares = torch.zeros(base.shape[1], dtype=torch.float64, device=base.device)
        for start in range(0, base.shape[0], step):
            squares += summed(start).double().square().sum(0)
        factor = lengths / squares.sqrt().to(work)
    for start in range(0, base.shape[0], step):
        block = summed(start)
        if factor is not None:
            block *= factor
        elif lengths is not None:
            block *= (lengths[start : start + step] / torch.linalg.vector_norm(block, dim=1)).unsqueeze(1)
        result[start : start + step] = block.to(result.dtype)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """After minus before, in the wider of their types, made in blocks."""
    dtype = torch.promote_types(merged_dtype(before.dtype), merged_dtype(after.dtype))
    result = torch.empty(before.shape, dtype=dtype, device=before.device)
    step = max(1, CPU_VALUES // max(1, math.prod(before.shape[1:])))
    for start in range(0, len(before), step):
        block = slice(start, start + step)
        result[block] = after[block].double() - before[block].double()
    return result


def square_sums(x: Tensor) -> Tensor:
    """(b,) float64: sums of squares of (b, n, d), made in blocks of vectors in a fixed order."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    values = CPU_VALUES if x.device.type == "cpu" else GPU_VALUES
    step = max(1, values // max(1, len(x) * x.shape[2]))
    for start in range(0, x.shape[1], step):
        sums += x[:, start : start + step].double().square().sum((1, 2))
    return sums


def change_sums(before: Tensor, after: Tensor) -> Tensor:
    """(b,) float64: sums of squared differences of two (b, n, d), likewise."""
    sums = torch.zeros(len(before), dtype=torch.float64, device=before.device)
    values = CPU_VALUES if before.device.type == "cpu" else GPU_VALUES
    step = max(1, values // max(1, len(before) * before.shape[2]))
    for start in range(0, before.shape[1], step):
        block = slice(start, start + step)
        sums += (after[:, block].double() - before[:, block].double()).square().sum((1, 2))
    return sums

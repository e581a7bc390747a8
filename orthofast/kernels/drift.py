"""How cosines differ between two versions of the same vectors: one fold over two aligned sets, and its door.

A tile of cosines is made of each version and the two are compared before the next: no n x n matrix is stored.
Work  twice that of one fold, b*n*(n+1)*d multiply-adds.  Memory  O(n) per item and the blocks of two reference folds.
Accuracy  that of the reference: unit vectors and products in float32 (float64 on request or for float64 input), sums in
float64 in fixed order. Backends without a kernel for it are served by these blocks of rows, which run on any device.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import dispatch, doors
from orthofast.kernels.contract import Request, make_request
from orthofast.kernels.reference import Side, measured, tile_sum, tiles
from orthofast.records import DriftStats

# backends with a kernel of their own, and the file that holds it
KERNELS = {"triton_gpu": "orthofast.kernels.triton_drift"}


class Kernel(Protocol):
    """What a file with a drift kernel offers."""

    def supports(self, before: Request, after: Request) -> str | None:
        """None if these can be compared, else the sentence why not."""

    def drift_stats(self, before: Request, after: Request) -> DriftStats:
        """Compare two checked requests."""


def drift_stats(before: Tensor, after: Tensor, *, precision: str = "auto", backend: str | None = None) -> DriftStats:
    """Compare the cosines of all pairs of vectors between two versions of them.

    Args:
        before: (b, n, d) or (n, d); any float dtype, any strides.
        after: of the same shape, on the same device; its dtype may differ, each version is taken as it is stored.
        precision: "auto" and "highest" (exact operands, float32 products; float64 where either version is), "high"
            (the same here) or "float64".
        backend: obeyed or refused; None takes the fastest that can serve.

    Returns:
        A :class:`orthofast.records.DriftStats`, on the device; the same bits from run to run.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> found = drift_stats(torch.eye(2), torch.tensor([[1.0, 0.0], [-0.6, 0.8]]))
    >>> found.pairs.tolist(), round(found.abs_change.item(), 6), round(found.change.item(), 6)
    ([1], 0.6, 0.6)
    """
    if doors.handler_of(before, after) is not None:
        raise InputError("before and after need plain tensors, got one spread over processes; pass its .full_tensor()")
    first, second = make_request(before, precision=precision), make_request(after, precision=precision)
    if first.x.shape != second.x.shape:
        raise InputError(
            f"after needs the shape of before, {tuple(first.x.shape)}, got {tuple(second.x.shape)}; "
            "compare two versions of the same vectors"
        )
    if first.x.device != second.x.device:
        raise InputError(f"after needs the device of before, {first.x.device}, got {second.x.device}; move one of them")
    if "float64" in (first.precision, second.precision):
        first.precision = second.precision = "float64"
    chosen = dispatch.choose(first, backend)
    if chosen.NAME in KERNELS:
        kernel = cast(Kernel, importlib.import_module(KERNELS[chosen.NAME]))
        if kernel.supports(first, second) is None:
            return kernel.drift_stats(first, second)
    return by_blocks(first, second)


def by_blocks(before: Request, after: Request) -> DriftStats:
    """The comparison in plain torch, an item at a time, blocks of rows of both versions side by side."""
    x, y = before.x, after.x
    b, device = x.shape[0], x.device
    pairs, zero, nonfinite = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(3))
    abs_change, change = (torch.zeros(b, dtype=torch.float64, device=device) for _ in range(2))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # it would round the operands
        for item in range(b):
            left, right = measured(x[item], before), measured(y[item], after)
            kept = left.keep & right.keep
            count = kept.sum()
            pairs[item], zero[item] = count * (count - 1) // 2, (~kept).sum()
            nonfinite[item] = (left.bad | right.bad).sum()
            for side in (left, right):
                side.inverse.masked_fill_(~kept.unsqueeze(1), 0.0)  # a vector left out has cosine 0 in both versions
            abs_change[item], change[item] = _item(left, right)
    poisoned = nonfinite > 0
    return DriftStats(
        pairs=pairs,
        zero=zero,
        nonfinite=nonfinite,
        abs_change=abs_change.masked_fill_(poisoned, float("nan")),
        change=change.masked_fill_(poisoned, float("nan")),
    )


def _item(left: Side, right: Side) -> tuple[Tensor, Tensor]:
    """Sums over the pairs of one item of | |c| - |c'| | and of |c - c'|."""
    total = torch.zeros(2, dtype=torch.float64, device=left.x.device)
    # equal shapes and dtypes of products: the two cut their tiles alike
    for (origin, old), (_, new) in zip(tiles(left, left), tiles(right, right), strict=True):
        if origin[0] == origin[1]:
            old.triu_(1)
            new.triu_(1)
        total[1] += tile_sum((old - new).abs_())
        total[0] += tile_sum(old.abs_().sub_(new.abs_()).abs_())
    return total[0], total[1]

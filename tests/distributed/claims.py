"""What every rank claims about sharded matrices; run by several processes together, never by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orthofast
from orthofast import metrics
from orthofast.distributed import sharded
from orthofast.kernels import gram_stats
from orthofast.records import GramStats

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
FIELDS = [name for name in GramStats.__slots__ if name not in ("cross", "standard_error")]
EVERYTHING = ("abs_sum", "sq_sum", "sum", "abs_max", "row_abs")
ROUNDING = 1e-9  # of float64 results, relative


@cache
def line(*shape: int) -> DeviceMesh:
    """The ranks as a mesh, in a line unless a shape is given."""
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def split(weight: Tensor, where: str) -> DTensor:
    return distribute_tensor(weight, line(), [PLACEMENTS[where]])


def matrix(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same Gaussian matrix on every rank."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n * d)).to(dtype)


def assert_plain(*values: Tensor) -> None:
    for value in values:
        assert type(value) is Tensor, f"a {type(value).__name__} is no replicated plain tensor"


def assert_same_record(got: GramStats, one: GramStats, tolerance: float = ROUNDING) -> None:
    for name in FIELDS:
        a, b = getattr(got, name), getattr(one, name)
        if name == "floor":
            continue
        assert (a is None) == (b is None), name
        if b is None:
            continue
        assert_plain(a)
        if b.dtype == torch.int64:
            assert torch.equal(a, b), f"{name}: {a} for {b}"
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def bits(*values: Tensor | None) -> list[bytes]:
    return [
        value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for value in values
        if value is not None
    ]


def measures_are_those_of_one_process(n: int, d: int, where: str, vectors: str) -> list[bytes]:
    weight = matrix(n, d)
    shards = split(weight, where)
    found: list[Tensor] = []
    for name in (
        "pii",
        "mean_squared_cosine",
        "orthogonality_gap",
        "singular_value_gap",
        "max_coherence",
        "diagonal_dominance",
    ):
        measure = getattr(metrics, name)
        got, one = measure(shards, vectors=vectors), measure(weight, vectors=vectors)
        pairs = [(got, one)] if isinstance(got, Tensor) else list(zip(got, one, strict=True))
        for a, b in pairs:
            assert_plain(a)
            torch.testing.assert_close(a, b, rtol=ROUNDING, atol=1e-12, equal_nan=True, msg=f"{name}: {a} for {b}")
            found.append(a)
    counts = metrics.cosine_histogram(shards, bins=16, vectors=vectors).counts
    assert torch.equal(counts, metrics.cosine_histogram(weight, bins=16, vectors=vectors).counts)
    return bits(*found, counts)


def records_are_those_of_one_process(dtype: torch.dtype, where: str, normalize: bool, marks: str) -> list[bytes]:
    weight = matrix(53, 20, torch.float32)
    if marks in ("zero", "nan"):
        weight[[3, 30, 52]] = 0
    if marks == "nan":
        weight[40, 2] = float("nan")
    weight = weight.to(dtype)
    # torch splits no float8: each rank takes its part of the bytes
    bytewise = weight.view(torch.uint8) if dtype.itemsize == 1 else weight
    local = split(bytewise, where).to_local().view(dtype)
    shards = DTensor.from_local(local, line(), [PLACEMENTS[where]], shape=weight.shape, stride=weight.stride())
    options: dict[str, Any] = {"want": EVERYTHING, "normalize": normalize, "bins": 8 if normalize else 0}
    options["precision"] = "float64"
    got, one = gram_stats(shards, **options), gram_stats(weight, **options)
    assert_same_record(got, one)
    return bits(*(getattr(got, name) for name in FIELDS))


def gradients_are_those_of_one_process(
    name: str, n: int, d: int, where: str, vectors: str, dtype: torch.dtype
) -> list[bytes]:
    weight = matrix(n, d, dtype)
    if n > 4:
        weight[n // 2] = 0
    measure = getattr(metrics, name)
    leaf = weight.clone().requires_grad_()
    one = measure(leaf, vectors=vectors)
    (3 * one).backward()
    shards = split(weight, where).requires_grad_()
    got = measure(shards, vectors=vectors)
    assert_plain(got)
    (3 * got).backward()
    grad, true = shards.grad, leaf.grad
    assert isinstance(grad, DTensor)
    assert true is not None
    assert grad.placements == shards.placements
    assert grad.dtype == dtype
    rounding = {torch.float64: ROUNDING, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, one, rtol=rounding, atol=1e-12, equal_nan=True)
    whole = grad.full_tensor()
    torch.testing.assert_close(whole, true, rtol=0, atol=rounding * float(true.abs().max()))
    return bits(got, whole)


def several_items_have_gradients(where: str) -> None:
    """Heads that lie on one rank each, and heads whose entries are split over all ranks."""
    heads = 2 * dist.get_world_size()
    weight, factors = matrix(5 * heads, 6), torch.arange(1.0, heads + 1, dtype=torch.float64)
    leaf, shards = weight.clone().requires_grad_(), split(weight, where).requires_grad_()
    one = orthofast.pii(leaf, vectors="heads", heads=heads)
    got = orthofast.pii(shards, vectors="heads", heads=heads)
    torch.testing.assert_close(got, one, rtol=ROUNDING, atol=0)
    (one * factors).sum().backward()
    (got * factors).sum().backward()
    grad = shards.grad
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), cast(Tensor, leaf.grad), rtol=0, atol=1e-12)
    assert_same_record(
        gram_stats(shards.view(heads, 5, 6), want=EVERYTHING), gram_stats(weight.view(heads, 5, 6), want=EVERYTHING)
    )


@contextmanager
def folds_counted() -> Iterator[list[int]]:
    """Pairs of vectors that this rank hands to the fold, call by call."""
    done: list[int] = []
    fold = sharded.fold

    def counting(x: Tensor, y: Tensor | None = None, **options: Any) -> GramStats:
        n = x.shape[1]
        done.append(n * (n - 1) // 2 if y is None else n * y.shape[1])
        return fold(x, y, **options)

    with mock.patch.object(sharded, "fold", counting):
        yield done


def work_of(n: int, where: str) -> int:
    """Pairs folded on this rank."""
    with folds_counted() as done:
        orthofast.pii(split(matrix(n, 7), where))
    return sum(done)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (list, tuple)) else (made,):
            if type(value) is Tensor:
                self.elements = max(self.elements, value.numel())
        return made


def memory_of(where: str, vectors: str, gradient: bool) -> tuple[int, int]:
    """Largest tensor and largest message, in elements, while a 900 x 256 matrix is measured."""
    shards = split(matrix(900, 256, torch.float32), where).requires_grad_(gradient)
    messages = [0]
    operation = dist.P2POp

    def noted(op: Any, tensor: Tensor, *rest: Any) -> Any:
        messages.append(tensor.numel())
        return operation(op, tensor, *rest)

    with mock.patch.object(dist, "P2POp", noted), Largest() as largest:
        value = orthofast.pii(shards, vectors=vectors)
        if gradient:
            value.backward()
    return largest.elements, max(messages)

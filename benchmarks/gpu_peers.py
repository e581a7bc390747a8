"""The contestants of a GPU run: what people use today, the library's products, and our backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gpu_cases import GpuCase
from benchmarks.peers import OURS, PRODUCT, RIVAL, Contestant, backend_refuses, naive
from orthofast.kernels import dispatch, gluon_folds, gram_stats
from orthofast.kernels.contract import make_request
from orthofast.records import GramStats

PANEL = 2048  # rows of a block; its float32 product with all vectors is what is stored
GLUON = "gluon_folds"
GLUON_LEAST = 4096  # vectors; the kernel is for large sets
STORED_MOST = 40 << 30  # bytes of N x N that a contestant may keep at a time


def backends() -> tuple[str, ...]:
    """Our backends for a CUDA device, in the order dispatch asks them."""
    return dispatch.ORDER.get("cuda", dispatch.ANY_DEVICE)


def naive_float32(vectors: Tensor) -> Tensor:
    """Naive torch on operands widened to float32."""
    return naive(vectors.float())


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of 16-bit operands with a float32 result; a 16-bit result would round each cosine."""
    if left.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float().T)


def block_rows(vectors: Tensor) -> Tensor:
    """Blocks of rows against themselves and all later rows through the library's product; nothing of ours."""
    n = len(vectors)
    inverse = vectors.float().square().sum(1).rsqrt()
    total = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        size = wide_product(vectors[start:stop], vectors[start:]).abs_()
        size *= inverse[start:]
        first = size[:, : stop - start].triu(1).sum(1) + size[:, stop - start :].sum(1)
        total += (first * inverse[start:stop]).sum(dtype=torch.float64)
    return total / (n * (n - 1) / 2)


def cast_mm(vectors: Tensor) -> Tensor:
    """A bfloat16 copy and its bare product with itself."""
    short = vectors.to(torch.bfloat16)
    return torch.mm(short, short.T)


@contextmanager
def tf32(_threads: int = 0) -> Iterator[None]:
    """float32 products by the matrix units' short format, restored afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@lru_cache(maxsize=1)
def _compiled(_key: tuple[object, ...], backend: str) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(naive, dynamic=False, fullgraph=True, backend=backend)
    return compiled


def _bind_compiled(vectors: Tensor) -> Callable[[], object]:
    # a rehearsal needs no code generator
    backend = "inductor" if vectors.device.type == "cuda" else "eager"
    call = _compiled((vectors.shape, vectors.stride(), vectors.dtype), backend)
    return lambda: call(vectors)


def _float(result: Any) -> float:
    return float(result)


def record_value(record: GramStats) -> float:
    """Mean |cos| of a record."""
    if record.abs_sum is None:
        raise ValueError("a record without abs_sum has no mean |cos|")
    return float(record.abs_sum.sum() / record.pairs.sum())


def _stores(bytes_each: float, *, whole_only: bool = True) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        if whole_only and not getattr(case, "whole_field", False):
            return "run where all contestants are: 8192x8192 and 4096x4096"
        if case.dtype.startswith("float8"):
            return "torch has no product of 8-bit floats with these semantics"
        if case.n * case.n * bytes_each > STORED_MOST:
            return f"would store {case.n * case.n * bytes_each / 2**30:.0f} GiB"
        return None

    return refuses


def _only(dtype: str, then: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: then(case) if case.dtype == dtype else f"concerns {dtype} input only"


def _sixteen_bits(then: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: "is naive itself for float32 input" if case.dtype == "float32" else then(case)


def rivals() -> list[Contestant]:
    """What people use today."""
    return [
        Contestant("naive", RIVAL, lambda w: lambda: naive(w), _float, _stores(6)),
        Contestant("naive_float32", RIVAL, lambda w: lambda: naive_float32(w), _float, _sixteen_bits(_stores(12))),
        Contestant("naive_tf32", RIVAL, lambda w: lambda: naive(w), _float, _only("float32", _stores(12)), tf32),
        Contestant("naive_compiled", RIVAL, _bind_compiled, _float, _stores(6), core=False),
        Contestant("block_rows", RIVAL, lambda w: lambda: block_rows(w), _float, _stores(0, whole_only=False)),
    ]


def products() -> list[Contestant]:
    """The bare product W W^T by the library, the yardstick of the promises."""
    return [
        Contestant("mm", PRODUCT, lambda w: lambda: torch.mm(w, w.T), None, _stores(2, whole_only=False)),
        Contestant("cast_mm", PRODUCT, lambda w: lambda: cast_mm(w), None, _only("float32", _stores(2))),
    ]


def _refuses(name: str, precision: str, device: torch.device) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        if precision != "auto" and case.dtype != "float32":
            return "16-bit and 8-bit operands are exact in any precision"
        return backend_refuses(name, _vectors_like(case, device), precision)

    return refuses


def _fold(vectors: Tensor, backend: str, precision: str) -> Callable[[], object]:
    return lambda: gram_stats(vectors, backend=backend, precision=precision)


def ours(device: torch.device) -> list[Contestant]:
    """Every backend for the device; those that round float32 by default also with exact operands."""
    found = []
    for name in backends():
        for precision in ("auto", "highest"):
            label = name if precision == "auto" else f"{name}@{precision}"
            found.append(
                Contestant(
                    label,
                    OURS,
                    partial(_fold, backend=name, precision=precision),
                    record_value,
                    _refuses(name, precision, device),
                    exact=precision == "highest",
                )
            )
    return found


def _fold_in_gluon(vectors: Tensor) -> Tensor:
    x, n = vectors[None], len(vectors)
    norm_sq = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32).double().square()
    return gluon_folds.abs_sum(x, norm_sq)[0] / (n * (n - 1) / 2)


def gluon(device: torch.device) -> Contestant:
    """The warp-specialised Hopper fold, lengths by torch within the timed call; no backend yet."""

    def refuses(case: Case) -> str | None:
        if case.dtype != "bfloat16":
            return "run on bfloat16 only"
        found = gluon_folds.problem(_vectors_like(case, device)[None])
        if found is None and case.n < GLUON_LEAST:
            return f"run from {GLUON_LEAST} vectors on"
        return found

    return Contestant(GLUON, OURS, lambda w: lambda: _fold_in_gluon(w), _float, refuses)


def _vectors_like(case: Case, device: torch.device) -> Tensor:
    """Memory of the shape, dtype and strides of a case."""
    dtype = getattr(torch, case.dtype)
    if getattr(case, "side", "rows") == "cols":
        return torch.empty((case.d, case.n), dtype=dtype, device=device).T
    return torch.empty((case.n, case.d), dtype=dtype, device=device)


def default_backend(case: GpuCase, device: torch.device) -> str:
    """The backend that serves a plain call on vectors such as these."""
    return dispatch.choose(make_request(_vectors_like(case, device))).NAME


def field(device: torch.device) -> list[Contestant]:
    """All contestants of one case."""
    return [*rivals(), *products(), *ours(device), gluon(device)]

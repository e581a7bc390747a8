"""The contestants: what people use today, the bare products, and our backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import Case
from orthofast.errors import OrthofastError
from orthofast.kernels import dispatch, gram_stats
from orthofast.kernels.contract import make_request
from orthofast.records import GramStats

RIVAL, PRODUCT, OURS = "rival", "product", "ours"
STORED_BYTES_MOST = 12 << 30  # contestants that store N x N twice or more are left out above this
SLOW_PEER_FLOPS = 4e11  # beyond it the minor peers tell nothing that 4096x4096 has not told


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to get the number, or a bare product to compare with.

    Attributes:
        bind: the call to time, for one (n, d) tensor.
        value: the mean |cos| in what the call returned; None for a bare product.
        refuses: the reason why this case is not run, or None.
        around: entered before the timed calls, for a number of threads; restores what it changed.
        core: whether a target speaks of it.
        exact: whether operands are used as they are (ours only; decides the tolerance of the gate).
    """

    name: str
    group: str
    bind: Callable[[Tensor], Callable[[], object]]
    value: Callable[[Any], float] | None
    refuses: Callable[[Case], str | None] = lambda _case: None
    around: Callable[[int], AbstractContextManager[object]] = lambda _threads: nullcontext()
    core: bool = True
    exact: bool = True


def naive(vectors: Tensor) -> Tensor:
    """Mean |cos| as it is written everywhere: normalise, product, absolute value, diagonal out, mean."""
    unit = functional.normalize(vectors, dim=1)
    size = (unit @ unit.T).abs()
    size.fill_diagonal_(0)
    n = len(vectors)
    return size.sum(dtype=torch.float32) / (n * (n - 1))


def naive_inplace(vectors: Tensor) -> Tensor:
    """The same with one N x N matrix instead of two."""
    unit = functional.normalize(vectors, dim=1)
    size = (unit @ unit.T).abs_().fill_diagonal_(0)
    n = len(vectors)
    return size.sum(dtype=torch.float32) / (n * (n - 1))


@contextmanager
def medium_precision(_threads: int = 0) -> Iterator[None]:
    """float32 products through oneDNN: ``set_float32_matmul_precision("medium")``, restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def _compiled(_key: tuple[object, ...]) -> Callable[[Tensor], Tensor]:
    # without the reset a ninth shape would quietly run uncompiled
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(naive, dynamic=False, fullgraph=True)
    return compiled


def _bind_compiled(vectors: Tensor) -> Callable[[], object]:
    call = _compiled((vectors.shape, vectors.dtype, torch.get_num_threads()))
    return lambda: call(vectors)


def _bind_torchmetrics(vectors: Tensor) -> Callable[[], object]:
    from torchmetrics.functional.pairwise import pairwise_cosine_similarity

    n = len(vectors)

    def call() -> Tensor:
        similarity: Tensor = pairwise_cosine_similarity(vectors, zero_diagonal=True)
        return similarity.abs().sum(dtype=torch.float32) / (n * (n - 1))

    return call


def _bind_sklearn(vectors: Tensor) -> Callable[[], object]:
    import numpy as np
    from sklearn.metrics.pairwise import cosine_similarity  # type: ignore[import-untyped]

    array, n = vectors.numpy(), len(vectors)

    def call() -> float:
        size = cosine_similarity(array)
        np.abs(size, out=size)
        np.fill_diagonal(size, 0)
        return float(size.sum()) / (n * (n - 1))

    return call


def _blas_threads(threads: int) -> AbstractContextManager[object]:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    limits: AbstractContextManager[object] = threadpool_limits(limits=threads, user_api="blas")
    return limits


def _float(result: Any) -> float:
    return float(result)


def _record_value(record: GramStats) -> float:
    if record.abs_sum is None:
        raise ValueError("a record without abs_sum has no mean |cos|")
    return float(record.abs_sum.sum() / record.pairs.sum())


def _large(case: Case) -> str | None:
    if case.flops > SLOW_PEER_FLOPS:
        return "left out of the largest shapes to keep the run within its time; see 4096x4096 and 30522x384"
    return None


def _needs(package: str, then: Callable[[Case], str | None] = _large) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        return then(case) if find_spec(package) else f"{package} is not installed"

    return refuses


def _numpy_only(case: Case) -> str | None:
    return "numpy has no bfloat16" if case.dtype == "bfloat16" else _large(case)


def _float32_only(case: Case) -> str | None:
    return None if case.dtype == "float32" else "the setting concerns float32 products only"


def rivals() -> list[Contestant]:
    """What people use today."""
    return [
        Contestant("naive", RIVAL, lambda w: lambda: naive(w), _float),
        Contestant("naive_inplace", RIVAL, lambda w: lambda: naive_inplace(w), _float, _large, core=False),
        Contestant("naive_compiled", RIVAL, _bind_compiled, _float, _large, core=False),
        Contestant("naive_medium", RIVAL, lambda w: lambda: naive(w), _float, _float32_only, medium_precision),
        Contestant("torchmetrics", RIVAL, _bind_torchmetrics, _float, _needs("torchmetrics"), core=False),
        Contestant("sklearn", RIVAL, _bind_sklearn, _float, _needs("sklearn", _numpy_only), _blas_threads, core=False),
    ]


def products() -> list[Contestant]:
    """The bare product W W^T alone, by the library torch takes and by oneDNN."""
    return [
        Contestant("mm", PRODUCT, lambda w: lambda: torch.mm(w, w.T), None, core=False),
        Contestant("mm_medium", PRODUCT, lambda w: lambda: torch.mm(w, w.T), None, _float32_only, medium_precision),
    ]


def backend_refuses(name: str, vectors: Tensor, precision: str = "auto") -> str | None:
    """The sentence why a backend cannot serve these vectors, or None."""
    try:
        return dispatch.load(name).supports(make_request(vectors, precision=precision))
    except (ImportError, OrthofastError) as error:
        return str(error)


def _ours(name: str, precision: str) -> Contestant:
    def refuses(case: Case) -> str | None:
        if precision == "high" and case.dtype != "float32":
            return "16-bit operands are exact as they are; nothing to round"
        probe = torch.zeros((), dtype=getattr(torch, case.dtype)).expand(case.n, case.d)
        return backend_refuses(name, probe, precision)

    label = name if precision == "auto" else f"{name}@{precision}"
    return Contestant(
        label,
        OURS,
        lambda w: lambda: gram_stats(w, backend=name, precision=precision),
        _record_value,
        refuses,
        exact=precision != "high",
    )


def ours() -> list[Contestant]:
    """Every backend, and the first of them with rounded operands."""
    backends = [_ours(name, "auto") for name in dispatch.NAMES]
    return [backends[0], _ours(dispatch.NAMES[0], "high"), *backends[1:]]


def field() -> list[Contestant]:
    """All contestants of one case."""
    return [*rivals(), *products(), *ours()]

"""The one primitive: fold all pairs of vectors into a record. This is its only door."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels import calls, dispatch, doors
from orthofast.kernels.autograd import mean_abs_cosine, mean_square_cosine
from orthofast.kernels.contract import _DEFAULT_WANT, Request, make_request, make_requests
from orthofast.kernels.sampling import Sample, gram_stats_sampled
from orthofast.records import GramStats

__all__ = ["Sample", "gram_stats", "gram_stats_many", "mean_abs_cosine", "mean_square_cosine"]


def gram_stats(
    x: Tensor,
    y: Tensor | None = None,
    *,
    normalize: bool = True,
    want: Iterable[str] = _DEFAULT_WANT,
    bins: int = 0,
    sample: int | Sample | None = None,
    precision: str = "auto",
    backend: str | None = None,
) -> GramStats:
    """Fold the cosines of all pairs of vectors into a few sums; the Gram matrix is never stored.

    Args:
        x: (b, n, d) or (n, d): ``b`` independent sets of ``n`` vectors of length ``d``; any float dtype, any strides.
        y: (b, m, d) or (m, d): fold the pairs between ``x`` and ``y`` instead of those within ``x``.
        normalize: cosines (True), or raw dot products.
        want: fields to compute, among "abs_sum", "sq_sum", "sum", "abs_max", "row_abs", "hist".
        bins: equal bins on [-1, 1] for the histogram of signed cosines; 0 for none.
        sample: estimate from about this many random pairs instead of all; an int, or a :class:`Sample` with a seed.
        precision: "highest" (exact operands), "high" (float32 rounded to 16 bits, faster), "float64", or "auto":
            "highest", but "high" for float32 on CUDA. There "high" is one fp16 pass, each vector scaled by a power of
            two; items whose mean is near the rounding floor (``floor``) are folded again with full operands.
        backend: "native_cpu" or "numba_cpu" on a CPU, "triton_gpu" or "native_cuda" on a GPU, "reference" anywhere:
            obeyed or refused; None takes the first in the device's order that can.

    Returns:
        A :class:`GramStats`; the same bits for any number of threads and from run to run.

    Raises:
        InputError: if an argument cannot be used.
        BackendError: if the named backend cannot serve the call.

    >>> import torch
    >>> record = gram_stats(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), want=["abs_sum", "abs_max"])
    >>> record.pairs.tolist(), record.abs_sum.tolist(), record.argmax.tolist()
    ([3], [1.0], [[0, 1]])
    """
    handler = doors.handler_of(x, y)
    if handler is not None:
        named = (want,) if isinstance(want, str) else tuple(want)
        return handler.gram_stats(
            x, y, normalize=normalize, want=named, bins=bins, sample=sample, precision=precision, backend=backend
        )
    request = make_request(x, y, normalize=normalize, want=want, bins=bins, precision=precision)
    if sample is not None:
        return gram_stats_sampled(request, sample, _fold_with(backend))
    return dispatch.choose(request, backend).gram_stats(request)


def gram_stats_many(
    xs: Sequence[Tensor],
    *,
    normalize: bool = True,
    want: Iterable[str] = _DEFAULT_WANT,
    bins: int = 0,
    precision: str = "auto",
    backend: str | None = None,
) -> list[GramStats]:
    """Fold many sets of vectors, of any shapes and dtypes, in one go: one record each, in order.

    Arguments as in :func:`gram_stats`; ``xs`` is a sequence of (b, n, d) or (n, d) tensors.

    >>> import torch
    >>> [r.pairs.item() for r in gram_stats_many([torch.ones(3, 2), torch.ones(4, 5)])]
    [3, 6]
    """
    want = want if want is _DEFAULT_WANT or isinstance(want, str) else tuple(want)
    if doors.handler_of(*xs) is not None:  # each in its turn: all ranks see the same order
        return [
            gram_stats(x, normalize=normalize, want=want, bins=bins, precision=precision, backend=backend) for x in xs
        ]
    key = calls.key_of(xs, normalize, want, bins, precision, dispatch.forced(backend))
    again = calls.find(key)
    if again is not None:
        return again(xs)
    requests = make_requests(xs, normalize=normalize, want=want, bins=bins, precision=precision)
    records: list[GramStats | None] = [None] * len(requests)
    chosen = dispatch.choose_each(requests, backend)
    if key is not None and len(chosen) == 1:
        calls.remember(key, getattr(dispatch.load(next(iter(chosen))), "again", None), requests)
    for name, indices in chosen.items():
        found = dispatch.load(name).gram_stats_many([requests[i] for i in indices])
        for index, record in zip(indices, found, strict=True):
            records[index] = record
    done = [record for record in records if record is not None]
    if len(done) != len(requests):
        raise BackendError(f"backends returned {len(done)} records for {len(requests)} requests")
    return done


def _fold_with(backend: str | None) -> Callable[[Request], GramStats]:
    def fold(request: Request) -> GramStats:
        return dispatch.choose(request, backend).gram_stats(request)

    return fold

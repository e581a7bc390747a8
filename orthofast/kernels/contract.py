"""What is asked of a backend: a request that is already checked, and how a record is finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.records import GramStats

ABS_SUM, SQ_SUM, SUM, ABS_MAX, ROW_ABS, HIST = 1, 2, 4, 8, 16, 32
WANT_BITS = {"abs_sum": ABS_SUM, "sq_sum": SQ_SUM, "sum": SUM, "abs_max": ABS_MAX, "row_abs": ROW_ABS, "hist": HIST}
PRECISIONS = ("auto", "highest", "high", "float64")
MAX_BINS = 65536  # one int64 counter per bin, thread and item
FLOAT8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))
DTYPES = FLOAT8 | {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DEFAULT_WANT = ("abs_sum",)


@dataclass(slots=True, eq=False)
class Request:
    """One fold, checked: a backend may trust every field.

    Attributes:
        x: (b, n, d), strided, floating point, detached.
        y: (b, m, d) of the same dtype and device, or None for the pairs within ``x``.
        normalize: fold cosines (True) or raw dot products.
        want: bit set of the fields to compute.
        bins: bins of the histogram, 0 without one.
        precision: "highest" (exact operands), "high" (rounded operands) or "float64".
    """

    x: Tensor
    y: Tensor | None
    normalize: bool
    want: int
    bins: int
    precision: str


def make_request(
    x: Tensor,
    y: Tensor | None = None,
    *,
    normalize: bool = True,
    want: Iterable[str] = _DEFAULT_WANT,
    bins: int = 0,
    precision: str = "auto",
) -> Request:
    """Check the arguments of a fold once, for all backends.

    Raises:
        InputError: with the argument, what was needed and what came.
    """
    x = _checked(x, "x")
    if y is not None:
        y = _checked(y, "y")
        if y.dtype != x.dtype or y.device != x.device:
            raise InputError(
                f"y needs the dtype and device of x ({x.dtype} on {x.device}), "
                f"got {y.dtype} on {y.device}; convert one of them"
            )
        if y.shape[0] != x.shape[0] or y.shape[2] != x.shape[2]:
            raise InputError(
                f"y needs shape (b, m, d) with b={x.shape[0]} and d={x.shape[2]} as in x, got {tuple(y.shape)}"
            )
    bits = _fields(want, bins, normalize)
    return Request(x, y, bool(normalize), bits, bins, _arithmetic(x, precision))


def make_requests(
    xs: Sequence[Tensor],
    *,
    normalize: bool = True,
    want: Iterable[str] = _DEFAULT_WANT,
    bins: int = 0,
    precision: str = "auto",
) -> list[Request]:
    """As :func:`make_request` for each of ``xs``; what they share is checked once.

    Raises:
        InputError: with the argument, what was needed and what came.
    """
    checked = [_checked(x, "x") for x in xs]
    bits, normalize = _fields(want, bins, normalize), bool(normalize)
    known: dict[tuple[torch.dtype, bool], str] = {}
    requests = []
    for x in checked:
        kind = x.dtype, x.is_cuda
        arithmetic = known.get(kind)
        if arithmetic is None:
            arithmetic = known[kind] = _arithmetic(x, precision)
        requests.append(Request(x, None, normalize, bits, bins, arithmetic))
    return requests


def _fields(want: Iterable[str], bins: int, normalize: bool) -> int:
    bits = ABS_SUM if want is _DEFAULT_WANT else _want_bits(want)
    if isinstance(bins, bool) or not isinstance(bins, int) or not 0 <= bins <= MAX_BINS:
        raise InputError(f"bins needs an integer from 0 to {MAX_BINS}, got {bins!r}")
    if bins:
        if not normalize:
            raise InputError("bins needs normalize=True: the bins divide [-1, 1], the range of a cosine")
        bits |= HIST
    elif bits & HIST:
        raise InputError("want='hist' needs bins: pass the number of bins on [-1, 1], e.g. bins=64")
    return bits


def _arithmetic(x: Tensor, precision: str) -> str:
    if precision == "auto":
        # float32 on a GPU: one pass of 16 bits is twenty times the rate of float32 arithmetic
        rounded = x.dtype == torch.float32 and x.is_cuda
        return "float64" if x.dtype == torch.float64 else "high" if rounded else "highest"
    if precision not in PRECISIONS:
        raise InputError(f"precision needs one of {', '.join(PRECISIONS)}, got {precision!r}")
    if x.dtype == torch.float64:
        return "float64"
    if precision == "high" and x.dtype != torch.float32:
        return "highest"  # 16-bit and 8-bit operands are exact as they are
    return precision


def _checked(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} needs a torch.Tensor, got {type(x).__name__}; wrap it with torch.as_tensor")
    if x.layout is not torch.strided:
        raise InputError(f"{name} needs a dense tensor, got layout {x.layout}; call .to_dense() first")
    if x.dtype not in DTYPES:
        raise InputError(
            f"{name} needs a floating-point dtype (float64, 32, 16, bfloat16 or float8), "
            f"got {x.dtype}; convert it with .to(torch.float32)"
        )
    if x.is_meta:
        raise InputError(f"{name} is on the meta device and holds no values; load or initialise it first")
    if x.dim() == 2:
        x = x[None]
    elif x.dim() != 3:
        raise InputError(
            f"{name} needs shape (b, n, d) or (n, d), got {tuple(x.shape)}; reshape it, or see orthofast.views"
        )
    if x.is_neg():  # a lazy minus sign, which reading the memory would miss
        x = x.resolve_neg()
    return x.detach() if x.requires_grad else x


def _want_bits(want: Iterable[str]) -> int:
    bits = 0
    for name in (want,) if isinstance(want, str) else want:
        if name not in WANT_BITS:
            raise InputError(f"want needs names among {', '.join(WANT_BITS)}, got {name!r}")
        bits |= WANT_BITS[name]
    return bits


def pair_count(n: int, m: int | None, zero: int = 0, zero_y: int = 0) -> int:
    """Pairs of a fold after zero vectors are left out: n(n-1)/2, or n*m for a cross fold."""
    if m is None:
        return (n - zero) * (n - zero - 1) // 2
    return (n - zero) * (m - zero_y)


def poison(record: GramStats) -> GramStats:
    """Write NaN into the float sums of items whose vectors hold NaN or Inf, and -1 into their argmax."""
    bad = record.nonfinite > 0
    nan = float("nan")
    for name in ("abs_sum", "sq_sum", "sum", "abs_max"):
        value = getattr(record, name)
        if value is not None:
            value.masked_fill_(bad, nan)
    for name in ("row_abs", "row_abs_y"):
        value = getattr(record, name)
        if value is not None:
            value.masked_fill_(bad.unsqueeze(1), nan)
    if record.argmax is not None:
        record.argmax.masked_fill_(bad.unsqueeze(1), -1)
    if record.hist is not None:
        record.hist.masked_fill_(bad.unsqueeze(1), 0)
    return record

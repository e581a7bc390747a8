"""What was promised for a GPU (an H200), as verdicts from a results file; ratios are of medians within one run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu_cases import EMBEDDING, FILTERS, LARGE
from benchmarks.gpu_measured import GpuResults
from benchmarks.targets import Place, Target

Measure = Callable[[GpuResults, str, str, str], float | None]
BF16, F32 = "bfloat16", "float32"
SQUARE = "8192x8192"
BODY = "BERT-base body"
WHOLE = "rows+cols"
VOCABULARY = "x".join(map(str, EMBEDDING))
FILTER_SETS = "x".join(map(str, FILTERS))


def _over(rival: str) -> Measure:
    return lambda results, shape, dtype, side: results.over("measurements", shape, dtype, side, rival)


def _faster(rival: str) -> Measure:
    def ratio(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
        over = results.over("measurements", shape, dtype, side, rival)
        return None if over is None else 1 / over

    return ratio


def _model_ms(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    name = results.default("model", shape, dtype, side)
    taken = None if name is None else results.device_ms("model", shape, dtype, side, name)
    return None if taken is None else taken.median


def _model_host_ms(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    name = results.default("model", shape, dtype, side)
    taken = None if name is None else results.host_us("model", shape, dtype, side, name)
    return None if taken is None else taken.median / 1e3


def _filters_over_read(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    name, copied = results.default("filters", shape, dtype, side), results.copy_gb_per_s()
    taken = None if name is None else results.device_ms("filters", shape, dtype, side, name)
    if taken is None or copied is None:
        return None
    items, n, d = FILTERS
    read_ms = items * n * d * {BF16: 2, F32: 4}[dtype] / (copied * 1e9) * 1e3
    return taken.median / read_ms


def _rate_frac(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    own, other = results.rate(shape, dtype, side), results.rate("28672x8192", dtype, side)
    return None if own is None or other is None else own / other


def _extra_mib(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    name = results.default("measurements", shape, dtype, side)
    row = None if name is None else results.timed("measurements", shape, dtype, side, name)
    return None if row is None or row["extra_mib"] is None else float(row["extra_mib"])


def _backward_over_forward(results: GpuResults, shape: str, dtype: str, side: str) -> float | None:
    name = results.default("gradient", shape, dtype, side)
    return None if name is None else results.over("gradient", shape, dtype, side, name, "+gradient")


def _under(text: str, bound: float, places: tuple[Place, ...], measure: Measure, unit: str = "") -> Target:
    return Target(text, unit, bound, places, measure, at_least=False)


GPU_TARGETS: tuple[Target, ...] = (
    _under(
        "large bfloat16 matrices, time over `torch.mm(w, w.T)` alone",
        0.55,
        tuple((f"{rows}x{columns}", BF16, side) for rows, columns in LARGE for side in ("rows", "cols")),
        _over("mm"),
    ),
    _under(
        "4096x4096 bfloat16, time over `torch.mm(w, w.T)` alone",
        0.65,
        tuple(("4096x4096", BF16, side) for side in ("rows", "cols")),
        _over("mm"),
    ),
    Target(
        "8192x8192 bfloat16, faster than naive torch in the same dtype",
        "x",
        2.5,
        ((SQUARE, BF16, "rows"),),
        _faster("naive"),
    ),
    Target(
        "8192x8192 bfloat16, faster than naive torch in float32",
        "x",
        15.0,
        ((SQUARE, BF16, "rows"),),
        _faster("naive_float32"),
    ),
    _under(
        "8192x8192 float32, default precision, time over a bfloat16 cast and `torch.mm`",
        0.60,
        ((SQUARE, F32, "rows"),),
        _over("cast_mm"),
    ),
    _under("BERT-base, rows and columns of 72 matrices, on the device", 0.6, ((BODY, BF16, WHOLE),), _model_ms, "ms"),
    _under("the same, one Python call", 0.3, ((BODY, BF16, WHOLE),), _model_host_ms, "ms"),
    _under(
        "10,000 filters of 64x576, time over one read at the measured copy bandwidth",
        1.5,
        ((FILTER_SETS, BF16, "rows"),),
        _filters_over_read,
        "x",
    ),
    Target(
        "128256x8192 embedding, FLOP rate over that of 28672x8192", "", 0.92, ((VOCABULARY, BF16, "rows"),), _rate_frac
    ),
    _under("128256x8192 embedding, extra memory", 64.0, ((VOCABULARY, BF16, "rows"),), _extra_mib, "MiB"),
    _under(
        "cold first call",
        3.0,
        (("4096x4096", BF16, "rows"), ("4096x4096", BF16, "cols"), ("4096x4096", F32, "rows")),
        lambda results, shape, dtype, side: results.cold_s(shape, dtype, side),
        "s",
    ),
    _under(
        "8192x8192 bfloat16, value and gradient, time over autograd through naive torch",
        0.6,
        ((SQUARE, BF16, "rows"),),
        lambda results, shape, dtype, side: results.over("gradient", shape, dtype, side, "autograd", "+gradient"),
    ),
    _under(
        "8192x8192 bfloat16, value and gradient, time over the value alone",
        3.5,
        ((SQUARE, BF16, "rows"),),
        _backward_over_forward,
        "x",
    ),
)

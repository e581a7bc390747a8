"""Cases of the kernel tests as data: shape, dtype and layout, each with an id such as b1-n63-d100-bf16-rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from orthofast.records import GramStats
from tests import oracle, tolerance

ALL = ("abs_sum", "sq_sum", "sum", "abs_max", "row_abs")
SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}
DTYPES = tuple(SHORT)
LAYOUTS = ("rows", "cols", "strided", "shared", "offset", "gapped")


@dataclass(frozen=True)
class Case:
    """One input. ``m`` is None for the pairs within one set, else the vectors of the other side."""

    n: int
    d: int
    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    b: int = 1
    m: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        other = "" if self.m is None else f"-m{self.m}"
        return f"b{self.b}-n{self.n}{other}-d{self.d}-{SHORT[self.dtype]}-{self.layout}"

    def x(self) -> Tensor:
        return self._laid_out(self.n, self.seed)

    def y(self) -> Tensor | None:
        return None if self.m is None else self._laid_out(self.m, self.seed + 1)

    def _laid_out(self, n: int, seed: int) -> Tensor:
        b, d, dtype = self.b, self.d, self.dtype
        if self.layout == "rows":
            return gaussian((b, n, d), seed, dtype)
        if self.layout == "cols":  # the columns of a stored matrix
            return gaussian((b, d, n), seed, dtype).transpose(1, 2)
        if self.layout == "strided":  # every other vector, every third entry
            return gaussian((b, 2 * n, 3 * d), seed, dtype)[:, ::2, ::3]
        if self.layout == "shared":  # all items are the same memory
            return gaussian((1, n, d), seed, dtype).expand(b, n, d)
        if self.layout == "offset":  # a window that starts at an odd address
            return gaussian((b, n + 1, d + 3), seed, dtype)[:, 1:, 3:]
        if self.layout == "gapped":  # every other item
            return gaussian((2 * b, n, d), seed, dtype)[::2]
        raise ValueError(self.layout)


def gaussian(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal entries with a common part, so that cosines are neither all tiny nor all of one sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    tilt = torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (values + 0.5 * tilt).to(dtype)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.float64)


def truth_of(x: Tensor, y: Tensor | None = None, normalize: bool = True) -> list[oracle.Truth]:
    """The oracle on every item of (b, n, d)."""
    others = [None] * len(x) if y is None else [wide(item).numpy() for item in y]
    return [oracle.gram_stats(wide(item).numpy(), other, normalize) for item, other in zip(x, others, strict=True)]


@lru_cache(maxsize=512)
def case_truth(case: Case, normalize: bool = True) -> list[oracle.Truth]:
    """Oracle of a case, shared by the backends."""
    return truth_of(case.x(), case.y(), normalize)


def assert_record(
    got: GramStats,
    x: Tensor,
    y: Tensor | None = None,
    *,
    truth: list[oracle.Truth] | None = None,
    normalize: bool = True,
    precision: str = "auto",
    rival_x: Tensor | None = None,
    rival_y: Tensor | None = None,
    bins: int = 0,
) -> None:
    """The error rule on every item and field of a record of (b, n, d).

    ``rival_x`` are the same directions at lengths that plain torch can square without overflow.
    """
    truth = truth_of(x, y, normalize) if truth is None else truth
    dtype = tolerance.compute_dtype(x, precision)
    floor = tolerance.FLOOR[dtype]
    rival_x = x if rival_x is None else rival_x
    rival_y = y if rival_y is None else rival_y
    assert got.pairs.shape == (len(x),)
    for item, true in enumerate(truth):
        rival = tolerance.plain(
            rival_x[item], None if rival_y is None else rival_y[item], true, normalize=normalize, dtype=dtype
        )
        size = 1.0
        if not normalize:
            longest = float(true.norm_sq.max(initial=0)) ** 0.5
            longest_y = longest if true.norm_sq_y is None else float(true.norm_sq_y.max(initial=0)) ** 0.5
            size = longest * longest_y or 1.0
        tolerance.assert_within_rule(got, item, true, rival, floor=floor, size=size)
        if bins:
            assert got.hist is not None
            assert got.hist.shape == (len(x), bins)
            tolerance.assert_hist_within_band(got.hist[item], true.cosines, 2 * rival.largest_error + floor)


def same_bits(left: GramStats, right: GramStats) -> bool:
    """Whether every field holds the same bits; NaN equals NaN."""
    for name in GramStats.__slots__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor) and (a.shape, a.dtype, a.numpy().tobytes()) != (b.shape, b.dtype, b.numpy().tobytes()):
            return False
    return True


# tile edges of the backends: 8 rows, panels of 12, 24 or 48 vectors, blocks of 256 and 384 vectors, 256 entries
SMALL = (0, 1, 2, 7)
VECTORS = (8, 9, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97, 255, 256, 257, 383, 384, 385)
LENGTHS = (15, 16, 17, 31, 33, 47, 48, 49, 64, 95, 97, 255, 256, 257, 383, 384, 385, 511, 513)

SHAPES = [
    *(Case(n, d) for n in SMALL for d in (*SMALL, 48, 257)),
    *(Case(n, d) for n in (49, 97) for d in (0, 1, 2)),
    *(Case(n, 33) for n in VECTORS),
    *(Case(50, d) for d in LENGTHS),
    Case(385, 257),
    Case(769, 100),
    Case(97, 1000),
    Case(3, 1_000_003),
    Case(3, 1_000_003, torch.bfloat16),
    Case(3, 1_000_003, layout="cols"),
    Case(2, 96, b=5),
    Case(48, 257, b=3),
]
TYPES = [
    Case(n, d, dtype, layout, b) for dtype in DTYPES for n, d, b in ((63, 100, 1), (50, 257, 2)) for layout in LAYOUTS
] + [
    *(Case(n, d, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64) for n, d in ((385, 65), (97, 513))),
    *(Case(n, d, dtype) for dtype in DTYPES for n, d in ((1, 5), (2, 1), (7, 3), (0, 4), (4, 0))),
]
CROSSES = [
    *(Case(n, 33, m=m) for n, m in ((0, 5), (5, 0), (1, 1), (2, 385), (385, 2), (47, 49), (96, 97), (257, 255))),
    *(Case(40, d, m=30) for d in (0, 1, 255, 257, 513)),
    *(Case(40, 65, dtype, layout, 2, m=51) for dtype in DTYPES for layout in ("rows", "cols", "gapped")),
    Case(384, 48, m=385),
    Case(2, 1_000_003, m=2),
]

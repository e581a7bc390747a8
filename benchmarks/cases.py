"""The shapes that are timed, their random data, and the matrices of a BERT-base body."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HUGE_FLOPS = 1e11  # from here one call of naive torch takes seconds: no warm-up at full size


@dataclass(frozen=True, slots=True)
class Case:
    """One matrix: ``n`` vectors of length ``d``; and how many rounds it is given.

    Attributes:
        least: rounds every contestant of a target runs, whatever the budget.
        most: rounds after which more would not help.
        threads: thread counts it is run with.
    """

    n: int
    d: int
    dtype: str
    least: int = 3
    most: int = 21
    threads: tuple[int, ...] = (1, 2)

    @property
    def shape(self) -> str:
        """As written in tables: ``4096x4096``."""
        return f"{self.n}x{self.d}"

    @property
    def flops(self) -> int:
        """Useful floating-point operations, n^2 d: each unordered pair once, multiply and add."""
        return self.n * self.n * self.d

    @property
    def huge(self) -> bool:
        """Whether a call is too dear to spend one on warming up."""
        return self.flops > HUGE_FLOPS

    def cost_s(self, threads: int) -> float:
        """Rough seconds for the least rounds of a full field; used only to share out the time budget."""
        rate = {"float32": 44e9, "bfloat16": 90e9}[self.dtype] * threads  # useful FLOP/s of naive torch
        field = {"float32": 6.0, "bfloat16": 5.0}[self.dtype]  # a whole round, in times of naive torch
        stored = self.n * self.n * 2e-9  # N x N written and read through memory
        return 3.0 + self.least * field * (self.flops / rate + stored)


# n, d, least rounds, most rounds, thread counts
_SHAPES: tuple[tuple[int, int, int, int, tuple[int, ...]], ...] = (
    (64, 576, 11, 31, (1, 2)),
    (512, 512, 9, 31, (1, 2)),
    (768, 768, 9, 21, (1, 2)),
    (768, 3072, 7, 15, (1, 2)),
    (3072, 768, 5, 11, (1, 2)),
    (4096, 4096, 3, 7, (1, 2)),
    (30522, 384, 3, 5, (1, 2)),
    (8192, 8192, 3, 5, (1, 2)),
    (11008, 4096, 3, 5, (1, 2)),
    (32000, 4096, 1, 2, (2,)),  # one thread would take five minutes a round
)
QUICK_SHAPES = frozenset(("64x576", "512x512", "768x3072", "3072x768", "4096x4096"))
FULL_ONLY_THREADS = {"32000x4096": "one thread would take five minutes a round; timed with two"}


def all_cases() -> tuple[Case, ...]:
    """Every case of the full run, small to large, float32 and bfloat16 side by side."""
    return tuple(Case(n, d, dtype, least, most, threads) for n, d, least, most, threads in _SHAPES for dtype in DTYPES)


def quick_cases() -> tuple[Case, ...]:
    """The cases of a run of a few minutes: shapes up to 4096x4096, few rounds."""
    picked = [case for case in all_cases() if case.shape in QUICK_SHAPES]
    return tuple(Case(c.n, c.d, c.dtype, min(c.least, 2 if c.n >= 3072 else 3), 7, c.threads) for c in picked)


def named(names: Iterable[str], cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases whose shape (``4096x4096``) is among the names.

    Raises:
        ValueError: if a name is none of the cases.
    """
    known = {case.shape: case for case in cases}
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"--only needs one of {', '.join(known)}, got {name!r}")
    return tuple(case for case in cases if case.shape in wanted)


def draw(case: Case, seed: int) -> Tensor:
    """Gaussian vectors (n, d) in the dtype of the case; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.n, case.d, generator=generator).to(DTYPES[case.dtype])


BERT_LAYERS = 12
BERT_LAYER: tuple[tuple[int, int], ...] = ((768, 768),) * 4 + ((3072, 768), (768, 3072))


def bert_body(dtype: str, seed: int, layers: int = BERT_LAYERS) -> list[Tensor]:
    """Rows and columns of the 72 matrices of a BERT-base body: 144 sets of vectors; columns are strided views."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [
        torch.randn(rows, columns, generator=generator).to(DTYPES[dtype])
        for _ in range(layers)
        for rows, columns in BERT_LAYER
    ]
    return [side for matrix in matrices for side in (matrix, matrix.T)]

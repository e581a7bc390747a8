"""What a GPU run measures: the matrices that were promised, tiny ones for a rehearsal, and their random data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import BERT_LAYER, BERT_LAYERS, Case

SIDES = ("rows", "cols")
L2_TIMES = 4  # inputs in rotation exceed the last cache so many times
MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class GpuCase(Case):
    """The vectors of one stored matrix.

    Attributes:
        side: "rows", or "cols" for the columns, which are read as strided views.
        whole_field: all contestants, or only those a promise speaks of.
    """

    side: str = "rows"
    whole_field: bool = False

    @property
    def shape(self) -> str:
        """The stored matrix: its columns are ``n`` vectors too."""
        return f"{self.n}x{self.d}" if self.side == "rows" else f"{self.d}x{self.n}"

    @property
    def place(self) -> tuple[str, str, str]:
        """Shape, dtype and side, by which results are found again."""
        return self.shape, self.dtype, self.side

    @property
    def item_bytes(self) -> int:
        """Bytes of one matrix."""
        return self.n * self.d * int(getattr(torch, self.dtype).itemsize)


def stored(rows: int, columns: int, dtype: str, side: str, least: int, most: int, *, whole: bool = False) -> GpuCase:
    """The rows or the columns of a stored matrix as a case."""
    n, d = (rows, columns) if side == "rows" else (columns, rows)
    return GpuCase(n, d, dtype, least, most, side=side, whole_field=whole)


LARGE = ((8192, 8192), (28672, 8192), (8192, 28672), (32000, 8192))
EMBEDDING = (128256, 8192)
FILTERS = (10_000, 64, 576)
GRADIENT = (8192, 8192)


def speed_cases(*, dry: bool) -> tuple[GpuCase, ...]:
    """Single matrices, the most telling first: a run that is stopped has those."""
    if dry:
        return (
            stored(48, 32, "bfloat16", "rows", 2, 2, whole=True),
            stored(32, 48, "bfloat16", "cols", 1, 1),
            stored(48, 32, "float32", "rows", 1, 1, whole=True),
        )
    return (
        stored(8192, 8192, "bfloat16", "rows", 7, 21, whole=True),
        stored(4096, 4096, "bfloat16", "rows", 7, 21, whole=True),
        stored(8192, 8192, "float32", "rows", 5, 11, whole=True),
        *(stored(*sides, "bfloat16", "rows", 5, 11) for sides in LARGE[1:]),
        stored(4096, 4096, "bfloat16", "cols", 5, 15),
        *(stored(*sides, "bfloat16", "cols", 5, 11) for sides in LARGE),
        stored(8192, 8192, "float16", "rows", 3, 7),
        stored(8192, 8192, "float8_e4m3fn", "rows", 3, 7),
        stored(1024, 8192, "bfloat16", "rows", 5, 11),
        stored(2048, 2048, "bfloat16", "rows", 5, 11),
    )


def embedding_case(*, dry: bool) -> GpuCase:
    """A vocabulary of a large model."""
    return stored(96, 16, "bfloat16", "rows", 1, 1) if dry else stored(*EMBEDDING, "bfloat16", "rows", 2, 5)


def filters_shape(*, dry: bool) -> tuple[int, int, int]:
    """Items, filters of each, entries of each."""
    return (5, 8, 9) if dry else FILTERS


def gradient_case(*, dry: bool) -> GpuCase:
    """The matrix whose value and gradient are taken."""
    return stored(24, 16, "bfloat16", "rows", 1, 2) if dry else stored(*GRADIENT, "bfloat16", "rows", 5, 11)


def gaussian(shape: Sequence[int], dtype: str, seed: int, device: torch.device) -> Tensor:
    """Normal entries of the real dtype, drawn on the device; the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    wanted = getattr(torch, dtype)
    # eight bits have no generator of their own
    drawn = torch.float16 if wanted.itemsize == 1 else wanted
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=drawn).to(wanted)


def draw(case: GpuCase, seed: int, device: torch.device) -> Tensor:
    """The vectors (n, d) of a case; columns as a view of the stored matrix."""
    if case.side == "rows":
        return gaussian((case.n, case.d), case.dtype, seed, device)
    return gaussian((case.d, case.n), case.dtype, seed, device).T


def copies(item_bytes: int, l2_bytes: int) -> int:
    """Inputs to rotate among so that no call finds its own in the cache."""
    return max(1, min(MOST_COPIES, 1 + L2_TIMES * l2_bytes // max(1, item_bytes)))


def bert_on(device: torch.device, dtype: str, seed: int, *, dry: bool) -> list[Tensor]:
    """Rows and columns of the 72 matrices of a BERT-base body: 144 sets; of two small matrices in a rehearsal."""
    shapes = ((24, 16), (16, 24)) if dry else BERT_LAYER * BERT_LAYERS
    matrices = [gaussian(shape, dtype, seed * 1000 + number, device) for number, shape in enumerate(shapes)]
    return [side for matrix in matrices for side in (matrix, matrix.T)]

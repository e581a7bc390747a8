"""The matrices inside one decoded weight: blocks of a fused one, experts of a stack, heads, each as (out, in)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from orthofast.scan.roles import Reading


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix inside a tensor, as (out, in).

    Attributes:
        name: the tensor's name, with "[query]" and the like for a block of a fused one.
        layer: row of the table, None outside the layers.
        role: one of ``roles.ROLES``.
        transposed: stored as (in, out).
        start: first row of the (out, in) matrix.
        stop: one past the last row.
        inward: length of a row.
        expert: index in a stack of experts, None elsewhere.
        heads: attention heads the matrix is cut into, 0 where that is not known.
        head_axis: "rows" where a head owns rows of the (out, in) matrix, "cols" where it owns columns.
    """

    name: str
    layer: str | None
    role: str
    transposed: bool
    start: int
    stop: int
    inward: int
    expert: int | None = None
    heads: int = 0
    head_axis: str = "rows"

    def view(self, tensor: Tensor) -> Tensor:
        """(out, in) view of the stored tensor; convolution kernels are flattened per filter."""
        if tensor.dim() != 2:
            tensor = tensor.reshape(-1, self.inward)
        return (tensor.T if self.transposed else tensor)[self.start : self.stop]

    def sizes(self, side: str) -> tuple[int, int]:
        """Number of vectors ``n`` and their length ``d`` on one side."""
        out = self.stop - self.start
        return (out, self.inward) if side == "rows" else (self.inward, out)


def is_table(shape: tuple[int, ...], reading: Reading) -> bool:
    """Whether it is one: position tables of vision models carry a batch axis: (1, n, d)."""
    return len(shape) == 3 and shape[0] == 1 and reading.role == "Embedding"


def matrices_of(name: str, shape: tuple[int, ...], reading: Reading) -> Iterator[Matrix]:
    """The matrices to measure in a weight of this shape, as its name was read."""
    out, inward = shape[::-1] if reading.transposed else (shape[0], math.prod(shape[1:]))
    if is_table(shape, reading):
        out, inward = shape[1:]
    if not reading.parts:
        yield Matrix(name, reading.layer, reading.role, reading.transposed, 0, out, inward)
    for part in reading.parts:
        yield Matrix(
            f"{name}[{part.label}]", reading.layer, part.role, reading.transposed, part.start, part.stop, inward
        )

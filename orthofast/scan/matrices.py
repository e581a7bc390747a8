"""The matrices inside one decoded weight: parts of a fused one, experts of a stack, heads, each as (out, in)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from orthofast.scan.roles import Reading


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix inside a tensor, as (out, in).

    The rows of the (out, in) matrix are cut into ``repeats`` equal runs; rows ``start`` to ``stop`` of each are here.

    Attributes:
        name: the tensor's name, with "[query]" for a part of a fused one and "[3]" for an expert of a stack.
        layer: row of the table, None outside the layers.
        role: one of ``roles.ROLES``.
        transposed: stored as (in, out).
        start: first row of each run.
        stop: one past the last row of each run.
        inward: length of a row.
        expert: index of the expert, None elsewhere.
        heads: attention heads the matrix is cut into, 0 where that is not known.
        head_axis: "rows" where a head owns rows of the (out, in) matrix, "cols" where it owns columns.
        repeats: how many runs; 1 for one block of rows.
        stack: experts that lie behind each other on the first stored axis; 0 where none do.
        axes: which of three stored axes are outputs and which inputs, such as "ioo"; empty for two axes.
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
    repeats: int = 1
    stack: int = 0
    axes: str = ""

    @property
    def out(self) -> int:
        """Rows of the matrix."""
        return self.repeats * (self.stop - self.start)

    @property
    def copies(self) -> bool:
        """Whether :meth:`view` has to copy: runs of several rows have no single stride, nor have some axes."""
        return (self.repeats > 1 and self.stop - self.start > 1) or self.axes in ("ioo", "oio")

    def view(self, tensor: Tensor) -> Tensor:
        """The (out, in) matrix inside the stored tensor: no copy, unless :attr:`copies`; kernels flat per filter."""
        whole = self._whole(tensor)
        if self.repeats == 1:
            return whole[self.start : self.stop]
        return self._runs(whole).flatten(0, 1)

    def head_views(self, tensor: Tensor) -> Tensor:
        """The vectors of each attention head: (heads, head's size, in), or (heads, head's size, out) for an output.

        A head owns rows of queries, keys and values, and columns of the output; both are the vectors here.
        """
        if self.head_axis == "cols":
            return _cut(self.view(tensor).T, self.heads)
        if self.repeats == self.heads:
            return self._runs(self._whole(tensor))  # one run is one head: no copy
        return _cut(self.view(tensor), self.heads)

    def sizes(self, side: str) -> tuple[int, int]:
        """Number of vectors ``n`` and their length ``d`` on one side."""
        return (self.out, self.inward) if side == "rows" else (self.inward, self.out)

    def head_sizes(self) -> tuple[int, int]:
        """Number of vectors ``n`` in one head and their length ``d``; needs ``heads``."""
        n, d = self.sizes(self.head_axis)
        return n // self.heads, d

    def _whole(self, tensor: Tensor) -> Tensor:
        """The (out, in) matrix the runs are cut from."""
        if self.stack:
            tensor = tensor.reshape(self.stack, -1, tensor.shape[-1])[self.expert]
        elif self.axes:
            order = [i for i, axis in enumerate(self.axes) if axis == "o"]
            order += [i for i, axis in enumerate(self.axes) if axis == "i"]
            outs = self.axes.count("o")
            return tensor.permute(order).flatten(0, outs - 1).flatten(1)
        elif tensor.dim() != 2:
            tensor = tensor.reshape(-1, self.inward)
        return tensor.T if self.transposed else tensor

    def _runs(self, whole: Tensor) -> Tensor:
        """(repeats, rows of a run, in)."""
        return _cut(whole, self.repeats)[:, self.start : self.stop]


def _cut(matrix: Tensor, runs: int) -> Tensor:
    """(runs, rows of a run, columns): a view."""
    return matrix.reshape(runs, -1, matrix.shape[1])


def is_table(shape: tuple[int, ...], reading: Reading) -> bool:
    """Whether it is one: position tables of vision models carry a batch axis: (1, n, d)."""
    return len(shape) == 3 and shape[0] == 1 and reading.role == "Embedding"


def holds_matrices(shape: tuple[int, ...], reading: Reading) -> bool:
    """Whether name and shape together tell which matrices lie in a weight of two axes or more."""
    if len(shape) == 2 or reading.stack or reading.axes or reading.role.startswith("Conv") or is_table(shape, reading):
        return True
    return reading.known and reading.role != "Other" and all(size == 1 for size in shape[2:])  # 1 x 1 kernels


def matrices_of(name: str, shape: tuple[int, ...], reading: Reading) -> Iterator[Matrix]:
    """The matrices to measure in a weight of this shape, as its name was read."""
    inner = shape
    if reading.stack:
        inner = shape[1:] if len(shape) == 3 else (shape[0] // reading.stack, shape[1])
    elif is_table(shape, reading):
        inner = shape[1:]
    out, inward = inner[::-1] if reading.transposed else (inner[0], math.prod(inner[1:]))
    if reading.axes:
        out = math.prod(size for size, axis in zip(shape, reading.axes, strict=True) if axis == "o")
        inward = math.prod(shape) // max(out, 1)
    whole = Matrix(
        name,
        reading.layer,
        reading.role,
        reading.transposed,
        0,
        out,
        inward,
        reading.expert,
        reading.heads,
        reading.head_axis,
        stack=reading.stack,
        axes=reading.axes,
    )
    for expert in range(reading.stack) if reading.stack else (reading.expert,):
        label = f"{name}[{expert}]" if reading.stack else name
        if not reading.parts:
            yield whole if not reading.stack else replace(whole, name=label, expert=expert)
        for part in reading.parts:
            yield replace(
                whole,
                name=f"{label}[{part.label}]",
                role=part.role,
                start=part.start,
                stop=part.stop,
                expert=expert,
                heads=part.heads,
                head_axis="rows",
                repeats=part.repeats,
            )

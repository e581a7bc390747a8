"""A row: what one due step measured, by key; and how values per layer become means, extremes and worst layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

PREFIX = "orthofast"
AGGREGATES = ("mean", "min", "max", "argmin", "argmax")  # a layer of such a name keeps its ".weight"
Value: TypeAlias = "float | str"


@dataclass(slots=True)
class Row:
    """One due step.

    Attributes:
        step: the training step.
        values: numbers, and texts under keys that end in argmin or argmax or hold an error; a plain dict.
    """

    step: int
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """The values without the texts."""
        return {key: value for key, value in self.values.items() if isinstance(value, float)}


def path_of(name: str) -> str:
    """What stands for a layer in a key: its module's path, ".weight" left out where nothing is lost by it."""
    path = name.removesuffix(".weight")
    return name if path in AGGREGATES else path


def add_metric(
    row: Row, metric: str, paths: Sequence[str], values: Sequence[float], *, low_is_worse: bool, worst_k: int | None
) -> None:
    """Add mean, worst value and where it is, and the ``worst_k`` worst layers (None: all) of one metric.

    A layer with NaN is left out of mean and extreme, and stands among the worst.
    """
    known = [(value, path) for value, path in zip(values, paths, strict=True) if not math.isnan(value)]
    key = f"{PREFIX}/{metric}"
    if known:
        row.values[f"{key}/mean"] = math.fsum(value for value, _ in known) / len(known)
        worst, where = min(known) if low_is_worse else max(known, key=lambda pair: pair[0])
        side = "min" if low_is_worse else "max"
        row.values[f"{key}/{side}"] = worst
        row.values[f"{key}/arg{side}"] = where
    order = range(len(paths))
    if worst_k is not None:
        sign = 1 if low_is_worse else -1

        def rank(index: int) -> tuple[bool, float]:
            missing = math.isnan(values[index])
            return (not missing, 0.0 if missing else sign * values[index])

        order = sorted(order, key=rank)[:worst_k]  # type: ignore[assignment]
    for index in order:
        row.values[f"{key}/{paths[index]}"] = values[index]

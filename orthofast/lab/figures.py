"""What a figure shows, declared apart from how it is drawn: panels of lines, bars or cells, one number a seed each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orthofast.errors import InputError

KINDS = ("lines", "bars", "dots", "cells")
Runs = Sequence[Sequence[float | None]]  # one sequence over x for each seed


@dataclass(frozen=True)
class Series:
    """One line of points, or one colour of bars.

    Attributes:
        name: in the legend; series of one name look alike in all panels.
        x: where, shared by all seeds; text for bars.
        runs: (seeds, len(x)) values; None leaves a gap. The mean is drawn (the geometric one on a
            logarithmic axis), the band goes from least to largest.
        published: the paper's own numbers: drawn hollow and without a band, in the look of the measured series of that
            name, with or without ", published" behind it.
    """

    name: str
    x: Sequence[float | str]
    runs: Runs
    published: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x: title of the axis, with unit.
        y: the same.
        series: what is drawn.
        title: above it.
        kind: "lines", "bars" (x is text), "dots" (the same without bars, so that the axis need not hold 0), or "cells"
            (each series a row, its value a shade). Bars on a logarithmic axis are drawn as dots.
        x_log: logarithmic axis.
        y_log: the same.
        points: draw points on lines; leave them out for long series.
        levels: horizontal lines, such as a theory's value: (name, y); none is drawn for None.
        rows: title of the vertical axis of cells, where ``y`` is that of the shades.

    Raises:
        InputError: if an axis has no title, or the kind is not known.
    """

    x: str
    y: str
    series: Sequence[Series]
    title: str = ""
    kind: str = "lines"
    x_log: bool = False
    y_log: bool = False
    points: bool = True
    levels: Sequence[tuple[str, float | None]] = field(default_factory=tuple)
    rows: str = ""

    def __post_init__(self) -> None:
        for name, title in (("x", self.x), ("y", self.y)):
            if not title.strip():
                raise InputError(f"{name} of a panel needs the title of its axis, got {title!r}")
        if self.kind not in KINDS:
            raise InputError(f"kind of a panel needs one of {', '.join(KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Figure:
    """Panels side by side.

    Attributes:
        panels: of it.
        caption: what a reader needs to know; seeds and band are added when it is drawn.
    """

    panels: Sequence[Panel]
    caption: str = ""

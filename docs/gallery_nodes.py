"""What a recorded experiment looks like in the manual: document nodes, so that no text of it is taken for markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from docutils import nodes
from sphinx import addnodes

from docs.gallery_figures import THEMES, Drawing
from docs.lab_counts import UNRECORDED
from docs.recorded import Judged
from orthofast.lab.experiment import Absent, Experiment
from orthofast.lab.page import MARKS, number
from orthofast.lab.verdict import NOT_REPRODUCED, NOT_RUN, REPRODUCED, Check

NOTHING = "–"


class FigureFrame(nodes.container):  # type: ignore[misc]
    """A frame that scrolls on narrow pages."""


class ThemedImage(nodes.image):  # type: ignore[misc]
    """An image for light or for dark pages, with its size."""


@dataclass(frozen=True)
class Shown:
    """A recorded experiment of one data set.

    Attributes:
        data: its name for people; empty where the experiment takes none.
        judged: numbers and verdict.
        drawings: by theme.
    """

    data: str
    judged: Judged
    drawings: dict[str, Drawing]

    @property
    def seeds(self) -> str:
        """How many, in words."""
        count = len(self.judged.run.seeds)
        return "1 seed" if count == 1 else f"{count} seeds"

    @property
    def on(self) -> str:
        """Such as " on digits", after a verdict."""
        return f" on {self.data}" if self.data else ""


def section_of(entry: Experiment | Absent, shown: Sequence[Shown]) -> nodes.section:
    """All there is of one table or figure, under a heading that the label ``lab-`` and its identifier lead to.

    Args:
        entry: of the registry.
        shown: what is recorded of it, a data set each.
    """
    title = nodes.title("", f"{entry.id}: {entry.title}")
    made = nodes.section("", title, ids=[entry.id.lower()], classes=["lab-entry"])
    made["names"].append(f"lab-{entry.id.lower()}")
    line = nodes.paragraph(classes=["lab-verdicts"])
    if isinstance(entry, Absent):
        line += [status_of(NOT_RUN), nodes.Text(f": {entry.reason}.")]
    for one in shown:
        line += nodes.Text(" · ") if len(line) else []
        line += [status_of(one.judged.verdict.status), nodes.Text(f"{one.on}, {one.seeds}")]
    if isinstance(entry, Experiment) and not shown:
        line += status_of(UNRECORDED)
    made += [line, nodes.paragraph("", entry.claim)]
    if isinstance(entry, Absent):
        if entry.published:
            made += table("lab-numbers", ["what", "published"], [list(pair) for pair in entry.published.items()])
        return made
    made += [_soft(note) for note in dict.fromkeys(one.judged.verdict.note for one in shown) if note]
    made += [_soft(f"Here: {size}") for size in dict.fromkeys(one.judged.run.size for one in shown) if size]
    deciding, others = _rows(shown, deciding=True), _rows(shown, deciding=False)
    heads = ["what", "published", *(f"{one.data or 'measured'}, {one.seeds}" for one in shown)]
    if deciding:
        made += table("lab-numbers lab-conditions", [*heads[:2], "needed", *heads[2:]], deciding)
    if others:
        summary = f"{len(others)} more number{'s' if len(others) > 1 else ''}, which decide nothing"
        made += _folded(summary, table("lab-numbers", heads, others))
    for index, one in enumerate(shown):
        frame = FigureFrame("", *(_image(entry, one, theme) for theme in THEMES), classes=["lab-figure"])
        made += frame if index == 0 else _folded(f"The figure of {one.data}", frame)
    seconds = shown[0].judged.run.cpu_s if shown else 0.0
    cost = (
        f" measures it again, in {max(1, round(seconds))} CPU s on the recorded machine." if shown else " measures it."
    )
    made += nodes.paragraph(
        "", "", nodes.literal("", f"orthofast lab {entry.id}"), nodes.Text(cost), classes=["lab-soft"]
    )
    return made


def overview_row(entry: Experiment | Absent, columns: Sequence[Shown | None]) -> list[list[nodes.Node]]:
    """Its line in the table of all: what, the verdict on each data set, a condition measured and published.

    The condition is the first that fails where the claim is not reproduced, else the first.

    Args:
        entry: of the registry.
        columns: what is recorded, a place for each data set.
    """
    what: list[nodes.Node] = [_reference(entry.id), nodes.Text(f" {entry.title}")]
    recorded = [one for one in columns if one is not None]
    several = len(columns) > 1
    checks = [check for check in recorded[0].judged.verdict.checks if check.holds is not None] if recorded else []
    first = next((check for check in checks if not check.holds), checks[0] if checks else None)
    below = entry.reason if isinstance(entry, Absent) else first.what if first else ""
    if below:
        what.append(_below(below))
    verdicts: list[nodes.Node] = []
    for one in recorded:
        verdicts.append(status_of(one.judged.verdict.status))
        verdicts += [_below(one.on)] if several and one.data else []
    verdicts = verdicts or [status_of(NOT_RUN if isinstance(entry, Absent) else UNRECORDED)]
    if first is None:
        return [what, verdicts, [nodes.Text(NOTHING)], [nodes.Text(NOTHING)]]
    needed = _below(f"needed {first.needed}" + (f",{recorded[0].on}" if several and recorded[0].data else ""))
    return [what, verdicts, [_number(first), needed], [nodes.Text(number(first.published))]]


def _below(text: str) -> nodes.inline:
    """A line of its own under a cell's first."""
    return nodes.inline("", text, classes=["lab-below"])


def status_of(status: str) -> nodes.inline:
    """A verdict with its mark, coloured; the words say the same."""
    mark = MARKS.get(status, "?")
    return nodes.inline("", f"{mark} {status}", classes=["lab-status", f"lab-{status.replace(' ', '-')}"])


def measured(check: Check) -> str:
    """Mean and spread, for people."""
    return number(check.measured) + ("" if check.spread is None else f" ± {number(check.spread)}")


def table(
    classes: str, heads: Sequence[str], rows: Sequence[Sequence[str | Sequence[nodes.Node]]], width: int = 0
) -> nodes.table:
    """A table of text, or of nodes.

    Args:
        classes: separated by spaces.
        heads: of the columns.
        rows: cells, as many as there are heads.
        width: of the first column in per cent; by content if 0.
    """
    group = nodes.tgroup("", cols=len(heads))
    rest = (100 - width) // max(1, len(heads) - 1)
    group += [nodes.colspec("", colwidth=rest if index else width or rest) for index in range(len(heads))]
    group += nodes.thead("", _table_row(list(heads)))
    group += nodes.tbody("", *(_table_row(row, heads) for row in rows))
    return nodes.table("", group, classes=[*classes.split(), "colwidths-given" if width else "colwidths-auto"])


def _rows(shown: Sequence[Shown], *, deciding: bool) -> list[list[str | list[nodes.Node]]]:
    """One row for each number that any data set has; equal ones of several data sets share it."""
    found: dict[tuple[str, str, str], dict[str, Check]] = {}
    for one in shown:
        for check in one.judged.verdict.checks:
            if (check.holds is not None) == deciding:
                found.setdefault((check.what, number(check.published), check.needed), {})[one.data] = check
    rows: list[list[str | list[nodes.Node]]] = []
    for (what, published, needed), by_data in found.items():
        cells: list[str | list[nodes.Node]] = [what, published, *([needed] if deciding else [])]
        rows.append(cells + [_measured_cell(by_data.get(one.data)) for one in shown])
    return rows


def _number(check: Check) -> nodes.inline:
    return nodes.inline("", measured(check), classes=["lab-value"])


def _measured_cell(check: Check | None) -> str | list[nodes.Node]:
    if check is None or check.holds is None:
        return NOTHING if check is None else [_number(check)]
    status, said = (REPRODUCED, "holds") if check.holds else (NOT_REPRODUCED, "does not hold")
    name = f"lab-{status.replace(' ', '-')}"
    return [_number(check), nodes.Text(" "), nodes.inline("", f"{MARKS[status]} {said}", classes=["lab-holds", name])]


def _table_row(cells: Sequence[str | Sequence[nodes.Node]], heads: Sequence[str] = ()) -> nodes.row:
    """A row; each cell but the first says its column too, which narrow pages show instead of the heads."""
    made = nodes.row()
    for index, cell in enumerate(cells):
        content = [nodes.Text(cell)] if isinstance(cell, str) else list(cell)
        if heads and index:
            content.insert(0, nodes.inline("", f"{heads[index]}: ", classes=["lab-label"]))
        made += nodes.entry("", nodes.paragraph("", "", *content))
    return made


def _reference(identifier: str) -> addnodes.pending_xref:
    return addnodes.pending_xref(
        "",
        nodes.inline("", identifier, classes=["std", "std-ref"]),
        refdomain="std",
        reftype="ref",
        reftarget=f"lab-{identifier.lower()}",
        refexplicit=True,
        refwarn=True,
    )


def _soft(text: str) -> nodes.paragraph:
    return nodes.paragraph("", text, classes=["lab-soft"])


def _folded(summary: str, content: nodes.Node) -> list[nodes.Node]:
    """Content that a click opens; docutils has no node for it."""
    opened = f'<details class="lab-more"><summary>{escape(summary)}</summary>'
    return [nodes.raw("", opened, format="html"), content, nodes.raw("", "</details>", format="html")]


def _image(entry: Experiment, shown: Shown, theme: str) -> ThemedImage:
    drawing = shown.drawings[theme]
    checks = [check for check in shown.judged.verdict.checks if check.holds is not None]
    held = f"{sum(bool(check.holds) for check in checks)} of {len(checks)} conditions hold"
    return ThemedImage(
        uri=str(drawing.file),
        alt=f"{entry.id}{shown.on}: {entry.title}. {held}.",
        width=str(drawing.width),
        height=str(drawing.height),
        classes=[f"only-{theme}"],
    )

"""Sphinx extension of the lab's gallery: ``{lab-verdicts}``, a table of all, ``{lab-paper} S0``, a paper's entries.

Every recorded experiment is judged and drawn before any page is read, so that a record that no longer fits the lab
stops the build with the experiment's identifier.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from docs import recorded
from docs.gallery_figures import draw
from docs.gallery_nodes import FigureFrame, Shown, ThemedImage, overview_row, section_of, status_of, table
from docs.lab_counts import COLUMNS, UNRECORDED, seeds_of, statuses
from docs.recorded import Record
from orthofast.errors import OrthofastError
from orthofast.lab import registry
from orthofast.lab.experiment import PAPERS
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED

FIGURES = "_build/figures"  # beside the built pages, under the folder of the sources


@dataclass(frozen=True)
class Gallery:
    """All that is recorded.

    Attributes:
        records: one a data set, digits first.
        shown: identifier -> what is recorded of it, a place for each record.
    """

    records: list[Record]
    shown: dict[str, list[Shown | None]]


@cache
def gallery(sources: Path) -> Gallery:
    """Judge and draw what ``results/`` in the folder of the manual's sources holds.

    Raises:
        InputError: if a record cannot be read or no longer fits the lab.
    """
    records = recorded.records(sources / "results")
    shown: dict[str, list[Shown | None]] = {identifier: [None] * len(records) for identifier in registry.REGISTRY}
    for place, record in enumerate(records):
        judged = recorded.judge(record)
        drawn = draw(record.key, judged.values(), sources / FIGURES)
        for identifier, one in judged.items():
            shown[identifier][place] = Shown(record.name if one.experiment.needs else "", one, drawn[identifier])
    return Gallery(records, shown)


class OfGallery(SphinxDirective):
    """What both directives share."""

    def found(self) -> Gallery:
        """The gallery; the page is read again when a record or the lab changes."""
        sources = Path(self.env.srcdir)
        lab = Path(registry.__file__).parent
        for file in (*sources.glob("results/lab-*.json"), *lab.glob("*.py"), *Path(__file__).parent.glob("*.py")):
            self.env.note_dependency(str(file))
        return gallery(sources)


class LabVerdicts(OfGallery):
    """All entries, a table for each paper, after the counts of each data set."""

    def run(self) -> list[nodes.Node]:
        """The nodes."""
        found = self.found()
        made: list[nodes.Node] = [_counts(record) for record in found.records]
        heads = ["table or figure", "verdict", "measured", "published"]
        for key, paper in PAPERS.items():
            rows = [
                overview_row(registry.REGISTRY[identifier], columns)
                for identifier, columns in found.shown.items()
                if identifier.startswith(f"{key}-")
            ]
            title = nodes.title("", paper)
            made.append(nodes.section("", title, table("lab-overview", heads, rows, 46), ids=[key.lower()]))
        return made


class LabPaper(OfGallery):
    """The entries of one paper, a section each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes."""
        key, found, made = self.arguments[0], self.found(), []
        if key not in PAPERS:
            raise self.error(f"lab-paper needs one of {', '.join(PAPERS)}, got {key!r}")
        for identifier, columns in found.shown.items():
            if not identifier.startswith(f"{key}-"):
                continue
            entry = registry.REGISTRY[identifier]
            section = section_of(entry, [one for one in columns if one is not None])
            for image in section.findall(ThemedImage):
                image["uri"] = f"/{FIGURES}/{Path(image['uri']).name}"
            self.state.document.note_explicit_target(section, section)
            made.append(section)
        return made


def _counts(record: Record) -> nodes.paragraph:
    """How many of what, and what the numbers come from."""
    counts = Counter(statuses(record).values())
    if not record.whole:
        counts = Counter({status: counts[status] for status in (REPRODUCED, NOT_REPRODUCED)})
    made = nodes.paragraph("", "", nodes.strong("", record.name), nodes.Text(": "), classes=["lab-counts"])
    for index, status in enumerate(one for one in (*COLUMNS, UNRECORDED) if counts[one]):
        made += [nodes.Text(", " if index else ""), nodes.Text(f"{counts[status]} "), status_of(status)]
    about = record.about
    minutes = round(sum(run.cpu_s for run in record.runs.values()) / 60)
    made += nodes.Text(
        f"; {seeds_of(record)}, scale {about['scale']}, {minutes} CPU minutes on {about['machine']['cores']} cores, "
        f"torch {about['versions']['torch']}, commit {about['commit']}. "
    )
    file = f"lab-{record.key}.json"
    text = nodes.inline("", "The numbers of every seed")
    made += addnodes.download_reference("", "", text, reftarget=f"/results/{file}", refdoc="", refexplicit=True)
    made += nodes.Text(".")
    return made


def prepare(app: Any) -> None:
    """Judge and draw all, before any page is read."""
    try:
        gallery(Path(app.srcdir))
    except OrthofastError as error:
        raise ExtensionError(str(error)) from error


def visit_frame(writer: Any, _node: nodes.Element) -> None:
    """A frame that a keyboard can scroll."""
    writer.body.append('<figure class="lab-figure" tabindex="0">\n')


def depart_frame(writer: Any, _node: nodes.Element) -> None:
    """Its end."""
    writer.body.append("</figure>\n")


def visit_image(writer: Any, node: nodes.Element) -> None:
    """With its size, so that nothing moves when the file arrives; a hidden one is not fetched."""
    builder = writer.builder
    place = posixpath.join(builder.imgpath, quote(builder.images[node["uri"]]))
    size = f'width="{node["width"]}" height="{node["height"]}"'
    classes, alt = escape(" ".join(node["classes"])), escape(node["alt"])
    writer.body.append(f'<img class="{classes}" src="{place}" alt="{alt}" {size} loading="lazy">\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("lab-verdicts", LabVerdicts)
    app.add_directive("lab-paper", LabPaper)
    app.add_node(FigureFrame, html=(visit_frame, depart_frame))
    app.add_node(ThemedImage, html=(visit_image, None))
    app.add_css_file("gallery.css")
    app.connect("builder-inited", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

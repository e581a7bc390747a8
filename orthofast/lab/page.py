"""One page of all experiments: verdicts, measured beside published numbers, figures; self-contained, no scripts."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orthofast.lab.drawing import DARK_OF
from orthofast.lab.experiment import PAPERS, Experiment, Settings
from orthofast.lab.runs import Outcome, commit, write_whole
from orthofast.lab.svg import embedded
from orthofast.lab.verdict import FAILED, NOT_REPRODUCED, NOT_RUN, REPRODUCED, Check

STATUSES = (REPRODUCED, NOT_REPRODUCED, NOT_RUN, FAILED)
MARKS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", NOT_RUN: "–", FAILED: "!"}


def write_summary(outcomes: Sequence[Outcome], settings: Settings, out: Path) -> None:
    """``verdicts.json`` and ``index.html`` of all outcomes.

    Raises:
        InputError: if they cannot be written.
    """
    verdicts = {one.entry.id: summary_of(one, settings) for one in outcomes}
    write_whole(out / "verdicts.json", json.dumps(verdicts, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    write_whole(out / "index.html", render(outcomes, settings))


def summary_of(outcome: Outcome, settings: Settings) -> dict[str, Any]:
    """An entry of ``verdicts.json``: the verdict, and what was measured and published by what it is of."""
    entry, verdict = outcome.entry, outcome.verdict
    published = {check.what: check.published for check in verdict.checks}
    if not isinstance(entry, Experiment):
        published = dict(entry.published)
    ran = outcome.seeds > 0 and isinstance(entry, Experiment)
    return {
        "verdict": verdict.status,
        "title": entry.title,
        "paper": entry.paper,
        "claim": entry.claim,
        "data": settings.data if ran and isinstance(entry, Experiment) and entry.needs else None,
        "scale": settings.scale if ran else None,
        "seeds": outcome.seeds,
        "measured": {check.what: check.measured for check in verdict.checks},
        "published": published,
        "holds": {check.what: check.holds for check in verdict.checks},
        "note": verdict.note,
    }


def render(outcomes: Sequence[Outcome], settings: Settings) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("orthofast.lab").joinpath("index.html.j2").read_text("utf-8"))
    papers = [
        {"name": name, "entries": [_entry(one) for one in outcomes if one.entry.id.startswith(f"{key}-")]}
        for key, name in PAPERS.items()
    ]
    counts = [(status, sum(one.verdict.status == status for one in outcomes)) for status in STATUSES]
    return template.render(
        papers=[paper for paper in papers if paper["entries"]],
        counts=[(status, MARKS[status], count) for status, count in counts if count],
        dark_of=DARK_OF.items(),
        settings=settings,
        commit=commit(),
    )


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry, verdict = outcome.entry, outcome.verdict
    runnable = isinstance(entry, Experiment)
    return {
        "id": entry.id,
        "title": entry.title,
        "claim": entry.claim,
        "status": verdict.status,
        "mark": MARKS[verdict.status],
        "css": verdict.status.replace(" ", "-"),
        "note": verdict.note,
        "size": entry.size if isinstance(entry, Experiment) else "",
        "seeds": outcome.seeds,
        "checks": [_row(check) for check in verdict.checks],
        "published": [] if runnable else list(entry.published.items()),  # type: ignore[union-attr]
        "figure": _figure(outcome),
        "folder": entry.id if outcome.folder is not None else "",
    }


def _row(check: Check) -> dict[str, str]:
    measured = number(check.measured)
    if check.spread is not None:
        measured += f" ± {number(check.spread)}"
    return {
        "what": check.what,
        "measured": measured,
        "published": number(check.published),
        "needed": check.needed,
        "mark": "" if check.holds is None else MARKS[REPRODUCED if check.holds else NOT_REPRODUCED],
        "css": "" if check.holds is None else "holds" if check.holds else "fails",
        "said": "" if check.holds is None else "holds" if check.holds else "does not hold",
    }


def number(value: float | str | None) -> str:
    """A number for people: four digits; text as it is; a dash for nothing.

    >>> number(0.123456), number(12345.0), number("image"), number(None), number(2e-7)
    ('0.1235', '12345', 'image', '–', '2.000e-07')
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.3e}"


def _figure(outcome: Outcome) -> Markup:
    """The light picture in the page's own text; the page's style sheet darkens its colours."""
    file = None if outcome.folder is None else outcome.folder / "figure.svg"
    if file is None or not file.is_file():
        return Markup("")
    entry = outcome.entry
    name = html.escape(f"Figure of {entry.id}: {entry.title}")
    return Markup(embedded(file.read_text(encoding="utf-8"), name, entry.id))

"""How many of the papers' tables and figures are reproduced, as text for README.md and docs/lab.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from docs.recorded import Record, judge
from orthofast.lab.experiment import PAPERS, Absent
from orthofast.lab.registry import REGISTRY
from orthofast.lab.verdict import NOT_REPRODUCED, NOT_RUN, REPRODUCED

UNRECORDED = "not recorded"
PAGES = {"S0": "independence", "S1": "representations", "S2": "conditioning", "S3": "batchnorm"}
COLUMNS = (REPRODUCED, NOT_REPRODUCED, NOT_RUN)


def statuses(record: Record) -> dict[str, str]:
    """Identifier -> verdict, for every entry of the registry.

    Raises:
        InputError: if the record no longer fits the lab.
    """
    judged = judge(record)
    return {
        key: judged[key].verdict.status if key in judged else NOT_RUN if isinstance(entry, Absent) else UNRECORDED
        for key, entry in REGISTRY.items()
    }


def seeds_of(record: Record) -> str:
    """How many seeds, in words."""
    most = max(len(run.seeds) for run in record.runs.values())
    return "one seed" if most == 1 else f"{most} seeds where the claim is statistical"


def short(records: Sequence[Record]) -> str:
    """A sentence for each record."""
    return "\n".join(_sentence(record) for record in records)


def full(records: Sequence[Record]) -> str:
    """Each record by paper, and what is not reproduced by name; links are of a page in docs/."""
    return "\n\n".join(_section(record) for record in records)


def _sentence(record: Record) -> str:
    counts = Counter(statuses(record).values())
    held, failing = counts[REPRODUCED], counts[NOT_REPRODUCED]
    left = counts[NOT_RUN] if record.whole else 0
    rest = f"; {left} more {'is' if left == 1 else 'are'} not run here" if left else ""
    return (
        f"On {record.name} ({seeds_of(record)}) {held} of {held + failing} tables, figures and claims\n"
        f"{'is' if held == 1 else 'are'} reproduced, {failing} {'is' if failing == 1 else 'are'} not{rest}."
    )


def _section(record: Record) -> str:
    found = statuses(record)
    columns = [*COLUMNS[: 3 if record.whole else 2]]
    if record.whole and UNRECORDED in found.values():
        columns.append(UNRECORDED)
    lines = [f"| {record.name} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for key, paper in PAPERS.items():
        counts = Counter(status for one, status in found.items() if one.startswith(f"{key}-"))
        cells = " | ".join(str(counts[column]) for column in columns)
        lines.append(f"| [{paper}](gallery/{PAGES[key]}.md) | {cells} |")
    total = Counter(found.values())
    lines.append(f"| all | {' | '.join(str(total[column]) for column in columns)} |")
    about = record.about
    seeds = seeds_of(record)
    lines += [
        "",
        f"{seeds[0].upper()}{seeds[1:]}; scale {about['scale']}, commit {about['commit']}. Not reproduced:",
        "",
    ]
    failing = [f"- {key}: {REGISTRY[key].title}" for key, status in found.items() if status == NOT_REPRODUCED]
    return "\n".join([*lines, *(failing or ["- none"])])

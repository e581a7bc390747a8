"""`python -m benchmarks.render [--check]`: numbers of README.md, docs/benchmarks.md, docs/lab.md, from results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_tables, race_tables, tables
from benchmarks.gpu_measured import GpuResults, load_all_gpu
from benchmarks.machine import RESULTS, ROOT
from benchmarks.measured import Results, load_all
from docs import lab_counts
from docs.recorded import Record, records

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LAB_BEGIN, LAB_END = "<!-- lab:begin -->", "<!-- lab:end -->"
EMPTY = "Nothing is recorded yet: `python -m benchmarks.run cpu` measures this machine."


def between(text: str, body: str, name: str, begin: str = BEGIN, end: str = END) -> str:
    """The text with everything between the two markers replaced.

    Raises:
        ValueError: if the markers are not there once each, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name} needs one {begin} and one {end} after it; add them where the tables belong")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def pages(found: Sequence[Results], found_gpu: Sequence[GpuResults] = (), races: Sequence[str] = ()) -> dict[str, str]:
    """File, relative to the repository -> what belongs between its markers; the GPU's promises are always there.

    Args:
        found: of the main benchmark, machine by machine.
        found_gpu: of the GPU's.
        races: sections of the smaller benchmarks, for the manual alone.
    """
    short = "\n\n".join(tables.short(results) for results in found) or EMPTY
    full = "\n\n".join(tables.full(results) for results in found) or EMPTY
    return {
        "README.md": f"{short}\n\n{gpu_tables.short(found_gpu)}",
        "docs/benchmarks.md": "\n\n".join([full, *races, gpu_tables.full(found_gpu)]),
    }


def lab_pages(found: Sequence[Record]) -> dict[str, str]:
    """File -> what belongs between its markers of the lab; none where no run of the lab is recorded.

    Raises:
        ValueError: if a record no longer fits the lab.
    """
    return {"README.md": lab_counts.short(found), "docs/lab.md": lab_counts.full(found)} if found else {}


def render(root: Path, results: Path, *, check: bool) -> list[str]:
    """Write the pages, or with ``check`` only compare; names of the files that differed.

    Raises:
        ValueError: if a page has no markers or a results file cannot be used.
        OSError: if a page is missing.
    """
    bodies = [
        (name, body, BEGIN, END)
        for name, body in pages(load_all(results), load_all_gpu(results), race_tables.sections(results)).items()
    ]
    recorded = lab_pages(records(root / "docs" / "results"))
    bodies += [(name, body, LAB_BEGIN, LAB_END) for name, body in recorded.items()]
    changed = []
    for name in dict.fromkeys(name for name, *_ in bodies):
        path = root / name
        old = new = path.read_text()
        for _, body, begin, end in (one for one in bodies if one[0] == name):
            new = between(new, body, name, begin, end)
        if new != old:
            changed.append(name)
            if not check:
                path.write_text(new)
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is as the results say, 1 when ``--check`` found a difference, 2 when a file cannot be used."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__)
    made.add_argument("--check", action="store_true", help="change nothing; fail if a page differs from the results")
    options = made.parse_args(arguments)
    try:
        changed = render(ROOT, RESULTS, check=options.check)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name in changed:
        print(
            f"{name} differs from the results; run python -m benchmarks.render" if options.check else f"written: {name}"
        )
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.render [--check]`: the tables of README.md and docs/benchmarks.md, from results files only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_tables, race_tables, tables
from benchmarks.gpu_measured import GpuResults, load_all_gpu
from benchmarks.machine import RESULTS, ROOT
from benchmarks.measured import Results, load_all

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
EMPTY = "Nothing is recorded yet: `python -m benchmarks.run cpu` measures this machine."


def between(text: str, body: str, name: str) -> str:
    """The text with everything between the two markers replaced.

    Raises:
        ValueError: if the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} needs one {BEGIN} and one {END} after it; add them where the tables belong")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


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


def render(root: Path, results: Path, *, check: bool) -> list[str]:
    """Write both pages, or with ``check`` only compare; names of the files that differed.

    Raises:
        ValueError: if a page has no markers or a results file cannot be used.
        OSError: if a page is missing.
    """
    changed = []
    for name, body in pages(load_all(results), load_all_gpu(results), race_tables.sections(results)).items():
        path = root / name
        old = path.read_text()
        new = between(old, body, name)
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

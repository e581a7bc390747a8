"""``orthofast report``: a result rendered again, without its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orthofast.commands.exits import exit_codes
from orthofast.commands.outputs import check_targets, write
from orthofast.commands.terminal import print_result
from orthofast.scan.comparison import compare
from orthofast.scan.output import write_whole
from orthofast.scan.result import ScanResult


def report(
    result: Annotated[Path, typer.Argument(help="The .json file of a scan.")],
    output: Annotated[
        list[Path] | None,
        typer.Option("-o", "--output", help="Write FILE (.html, .md, .csv, .json, .parquet, .png, .svg). Repeatable."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An older result: the page also shows what changed since.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    long: Annotated[bool, typer.Option("--long", help="One line per matrix and side.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print no tables, only errors.")] = False,
) -> None:
    """Render a result again, as tables on the terminal and as files; no weight is read."""
    with exit_codes():
        targets = output or []
        check_targets(targets)
        found = ScanResult.load(result)
        changes = compare(ScanResult.load(against), found) if against is not None else None
        pages = [target for target in targets if target.suffix.lower() == ".html"]
        for page in pages:
            write_whole(page, found.to_html(changes))
            if not quiet:
                typer.echo(f"wrote {page}", err=True)
        write(found, [target for target in targets if target not in pages], quiet)
        if json_:
            sys.stdout.write(found.to_json())
        elif not (quiet or targets):
            print_result(found, long)

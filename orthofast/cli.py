"""The command ``orthofast``: which commands there are; each stands in a file of ``orthofast/commands``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from orthofast.commands.check import check
from orthofast.commands.demo import demo
from orthofast.commands.diff import diff
from orthofast.commands.doctor import doctor
from orthofast.commands.inspect import inspect
from orthofast.commands.lab import PASSED_ON, lab
from orthofast.commands.report import report
from orthofast.commands.scan import scan
from orthofast.scan.provenance import own_version

app = typer.Typer(
    name="orthofast",
    help="Measure how orthogonal the vectors inside a neural network are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (scan, inspect, diff, report, check, doctor, demo):
    app.command()(command)
app.command(context_settings=PASSED_ON, add_help_option=False)(lab)


def main() -> None:
    """Entry point of the console script."""
    if sys.stdout is None:  # closed by the caller: what would be printed goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    app(prog_name="orthofast")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orthofast {own_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure how orthogonal the vectors inside a neural network are."""

"""The lab's command line: which experiments run, with which settings, and what stands on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from orthofast.errors import OrthofastError
from orthofast.lab.experiment import Absent, Experiment, Settings
from orthofast.lab.page import number, write_summary
from orthofast.lab.registry import find
from orthofast.lab.runs import Outcome, Told, run_all
from orthofast.lab.table5 import OPTION
from orthofast.lab.verdict import FAILED, NOT_REPRODUCED, NOT_RUN, REPRODUCED

STYLES = {REPRODUCED: "green", NOT_REPRODUCED: "yellow", NOT_RUN: "dim", FAILED: "red"}
WIDE = 160
TABLE5 = "S0-T5"
UNUSABLE, SOME_FAILED, INTERRUPTED = 2, 3, 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def lab(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Identifiers such as S1-F2a, or papers such as S1; all of them if left. Or: table5 MODEL..., for "
            "Table 5 of Lu et al. 2024 on checkpoints at hand, each a file, a folder or a name."
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the experiments and run nothing.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of results.")] = Path("lab"),
    data: Annotated[str, typer.Option("--data", help="digits, mnist, cifar10 or cifar100.")] = "digits",
    data_folder: Annotated[
        Path | None, typer.Option("--data-folder", help="Where the files of mnist or cifar lie; none is downloaded.")
    ] = None,
    scale: Annotated[str, typer.Option("--scale", help="small: two CPU cores; paper: the paper's sizes.")] = "small",
    device: Annotated[str, typer.Option("--device", help="Where networks train, such as cuda.")] = "cpu",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many, where the claim is statistical.")] = 3,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes, one thread each; the number of cores if left.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there already.")] = False,
) -> None:
    """Measure the papers' tables and figures, and judge their claims.

    Results with the same settings are kept: an interrupted run goes on where it was. Exit codes: 0 done, whatever the
    verdicts, 2 wrong usage, 3 an experiment stopped with an error, 130 interrupted.
    """
    try:
        experiments, models = list(experiments or ()), []
        if experiments[:1] == ["table5"]:
            experiments, models = [TABLE5], experiments[1:]
        entries = find(experiments)
        if listed:
            print_list(entries)
            return
        settings = Settings(
            scale=scale,
            data=data,
            data_folder=None if data_folder is None else str(data_folder),
            device=device,
            options=((OPTION, "\n".join(models)),) if models else (),
        )
        total = sum(seeds if entry.statistical else 1 for entry in entries if isinstance(entry, Experiment))
        with _bar(total) as told:
            jobs = jobs or (os.cpu_count() or 1)
            outcomes = run_all(entries, settings, out, seeds=seeds, jobs=jobs, fresh=fresh or bool(models), told=told)
        write_summary(outcomes, settings, out)
    except OrthofastError as error:
        typer.echo(f"orthofast: {error}", err=True)
        raise typer.Exit(UNUSABLE) from None
    except KeyboardInterrupt:
        typer.echo("orthofast: interrupted; finished seeds are kept, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    print_outcomes(outcomes)
    typer.echo(f"{out / 'index.html'}")
    if any(one.verdict.status == FAILED for one in outcomes):
        raise typer.Exit(SOME_FAILED)


def main() -> None:
    """Entry point of ``python -m orthofast.lab``."""
    app(prog_name="orthofast lab")


def print_list(entries: Sequence[Experiment | Absent]) -> None:
    """One line an entry."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in ("id", "runs on", "what"):
        table.add_column(head, no_wrap=head != "what", overflow="fold")
    for entry in entries:
        if isinstance(entry, Absent):
            table.add_row(entry.id, Text("not run here", style="dim"), Text(f"{entry.title}; {entry.reason}"))
        else:
            table.add_row(entry.id, Text(", ".join(entry.needs) or "no data"), Text(entry.title))
    _console().print(table)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Verdicts, with the conditions that decided them."""
    out = _console()
    for one in outcomes:
        status = one.verdict.status
        line = Text(f"{one.entry.id:9}")
        line.append(f"{status:16}", style=STYLES[status])
        line.append(one.entry.title)
        out.print(line, soft_wrap=True)
        if status in (NOT_RUN, FAILED):
            out.print(Text(f"          {one.verdict.note}", style="dim"), soft_wrap=True)
        for check in one.verdict.checks:
            if check.holds is None:
                continue
            mark = "holds " if check.holds else "fails "
            spread = "" if check.spread is None else f" ± {number(check.spread)}"
            said = f"{check.what}: {number(check.measured)}{spread}, needed {check.needed}"
            said += "" if check.published is None else f", published {number(check.published)}"
            out.print(Text(f"          {mark}", style=STYLES[REPRODUCED if check.holds else NOT_REPRODUCED]) + said)


def _console(stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE, color_system=None)


@contextmanager
def _bar(total: int) -> Iterator[Told]:
    """A bar over all seeds of all experiments, on a terminal; lines elsewhere."""
    err = _console(stderr=True)
    if not err.is_terminal:

        def line(identifier: str, what: str) -> None:
            if what in ("running", "kept"):
                err.print(Text(f"{identifier} {what}"))

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total)
        busy: list[str] = []

        def told(identifier: str, what: str) -> None:
            if what == "running":
                busy.append(identifier)
            elif what in ("done", "kept"):
                if identifier in busy:
                    busy.remove(identifier)
                bar.advance(task)
            bar.update(task, description=", ".join(busy) if what != "judging" else f"judging {identifier}")

        yield told

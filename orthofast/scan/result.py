"""What a scan found: rows, what was skipped, provenance; and its forms as table, JSON, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orthofast.errors import InputError
from orthofast.scan import report
from orthofast.scan.plan import layer_order
from orthofast.scan.roles import ROLES, TABLE5

SCHEMA_VERSION = 1
SUFFIXES = (".json", ".csv", ".html", ".md")


@dataclass(slots=True)
class Row:
    """One matrix seen from one side.

    Attributes:
        name: of the tensor; "[query]" and the like is appended for a block of a fused one.
        layer: row of the table, such as "0" or "decoder.3"; None outside the layers.
        role: one of ``roles.ROLES``; None for a file that cannot be read.
        vectors: "rows" or "cols" of the (out, in) matrix.
        n: number of vectors.
        d: their length.
        pii: mean absolute cosine over all pairs; None where it is undefined or failed.
        baseline: mean absolute cosine of isotropic random vectors of length ``d``.
        ratio: pii / baseline.
        zero: vectors of length 0, left out of the pairs.
        nonfinite: vectors that hold NaN or Inf.
        error: one sentence when the matrix could not be measured, else None.
        head: index of the attention head whose vectors these are; None for the whole matrix.
        expert: index in a stack of experts; None elsewhere.
        adapter: "base", "merged" or "delta" where an adapter was scanned with its base; None elsewhere.
        standard_error: of ``pii`` when it was estimated from a sample, None when it is exact.
        max_abs: largest absolute cosine; None where it was not asked for.
        max_pair: which two vectors have it.
        histogram: counts of the signed cosines in equal bins on [-1, 1]; None where it was not asked for.
        drift: mean absolute change of the cosines from the base to the merged weight.
        relative_change: Frobenius norm of the change over that of the base.
        tied: other names under which the checkpoint has the same tensor.
    """

    name: str
    layer: str | None
    role: str | None
    vectors: str
    n: int | None
    d: int | None
    pii: float | None
    baseline: float | None
    ratio: float | None
    zero: int | None
    nonfinite: int | None
    error: str | None
    head: int | None = None
    expert: int | None = None
    adapter: str | None = None
    standard_error: float | None = None
    max_abs: float | None = None
    max_pair: tuple[int, int] | None = None
    histogram: tuple[int, ...] | None = None
    drift: float | None = None
    relative_change: float | None = None
    tied: tuple[str, ...] = ()


FIELDS = tuple(Row.__slots__)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, smallest and largest of some values, how many they are, and the mean baseline beside them."""

    mean: float
    min: float
    max: float
    count: int
    baseline: float


@dataclass(frozen=True, slots=True)
class Table5:
    """One side in the layout of Lu et al. 2024, Table 5.

    Attributes:
        vectors: "rows" or "cols".
        columns: roles that occur, in the paper's order.
        layers: rows from top to bottom.
        cells: (layer, role) -> PII; the mean where a layer has several matrices of a role (experts).
        ratios: (layer, role) -> PII over baseline.
        footer: role -> spread over the layers.
    """

    vectors: str
    columns: tuple[str, ...]
    layers: tuple[str, ...]
    cells: dict[tuple[str, str], float]
    ratios: dict[tuple[str, str], float]
    footer: dict[str, Spread]


@dataclass(slots=True)
class ScanResult:
    """Everything one scan found.

    Attributes:
        rows: one per matrix and side, in the order of the layers.
        skipped: every tensor that was not measured.
        provenance: versions, machine, files, settings, timings, date.
    """

    rows: list[Row]
    skipped: list[Skipped]
    provenance: dict[str, object] = field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        """Rows that carry an error."""
        return [row for row in self.rows if row.error is not None]

    def sides(self) -> tuple[str, ...]:
        """Which of "rows" and "cols" were measured."""
        return tuple(side for side in ("rows", "cols") if any(row.vectors == side for row in self.rows))

    def summary(self) -> dict[tuple[str, str], Spread]:
        """(side, role) -> spread of PII over all matrices of that role, in the order of ``roles.ROLES``."""
        found = {}
        for side in self.sides():
            for role in ROLES:
                rows = [row for row in self.rows if row.vectors == side and row.role == role]
                spread = _spread(rows)
                if spread is not None:
                    found[side, role] = spread
        return found

    def table5(self, side: str = "rows") -> Table5:
        """The layers x roles table of one side.

        Raises:
            InputError: if ``side`` is neither "rows" nor "cols".
        """
        if side not in ("rows", "cols"):
            raise InputError(f"side needs 'rows' or 'cols', got {side!r}")
        groups: dict[tuple[str, str], list[Row]] = {}
        layers: set[str] = set()
        for row in self.rows:
            if row.vectors == side and row.role in TABLE5 and row.layer is not None:
                layers.add(row.layer)
                if row.pii is not None:
                    groups.setdefault((row.layer, row.role), []).append(row)
        order = tuple(sorted(layers, key=layer_order))
        columns = TABLE5 if layers else ()
        spreads = {key: spread for key, rows in groups.items() if (spread := _spread(rows)) is not None}
        footer = {}
        for role in columns:
            spread = _spread([row for key, rows in groups.items() if key[1] == role for row in rows])
            if spread is not None:
                footer[role] = spread
        cells = {key: spread.mean for key, spread in spreads.items()}
        ratios = {key: spread.mean / spread.baseline for key, spread in spreads.items()}
        return Table5(side, columns, order, cells, ratios, footer)

    def to_dict(self) -> dict[str, object]:
        """The JSON document as Python objects; no NaN, None instead."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rows": [_finite(asdict(row)) for row in self.rows],
            "skipped": [asdict(entry) for entry in self.skipped],
            "provenance": _finite(self.provenance),
        }

    def to_json(self) -> str:
        """The result as one JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """The rows as CSV, one line per matrix and side; an empty field where a value is missing."""
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(_finite(asdict(row)))
        return out.getvalue()

    def to_markdown(self) -> str:
        """Table 5 of each side, the matrices outside it, and what was skipped."""
        lines: list[str] = []
        for side in self.sides():
            table = self.table5(side)
            if table.layers:
                lines += ["", f"PII of the {side}, mean absolute cosine over all pairs", ""]
                lines += _markdown(("layer", *table.columns), _table_lines(table))
        others = [row for row in self.rows if row.role not in TABLE5 or row.layer is None or row.error]
        if others:
            heads = ("name", "role", "vectors", "n", "d", "pii", "baseline", "ratio", "error")
            values = [[number(getattr(row, head)) for head in heads] for row in others]
            lines += ["", "Outside the table", "", *_markdown(heads, values)]
        if self.skipped:
            lines += ["", "Skipped", "", *_markdown(("name", "reason"), [[s.name, s.reason] for s in self.skipped])]
        return "\n".join(lines).lstrip("\n") + "\n"

    def to_html(self) -> str:
        """The result as one self-contained page.

        Raises:
            OrthofastError: if the packages of the extra ``report`` are not installed.
        """
        return report.render(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the form that the suffix names (.json, .csv, .html, .md); a reader never sees half a file.

        Raises:
            InputError: if the suffix is none of these, or the file cannot be written.
        """
        target = Path(path)
        content = writer_for(target)(self)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with temporary.open("x", encoding="utf-8", newline="") as handle:
                handle.write(content)
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{target} cannot be written: {error.strerror}") from None


def writer_for(target: Path) -> Callable[[ScanResult], str]:
    """The function that makes the form a file name's suffix asks for.

    Raises:
        InputError: if the suffix is unknown.
    """
    forms: dict[str, Callable[[ScanResult], str]] = {
        ".json": ScanResult.to_json,
        ".csv": ScanResult.to_csv,
        ".html": ScanResult.to_html,
        ".md": ScanResult.to_markdown,
    }
    form = forms.get(target.suffix.lower())
    if form is None:
        raise InputError(f"the output file needs one of the suffixes {', '.join(SUFFIXES)}, got {target.name!r}")
    return form


def number(value: object) -> str:
    """A value for people: four digits behind the point, nothing where it is missing."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def footer_lines(table: Table5) -> list[list[str]]:
    """Mean, min, max, baseline and mean over baseline of each column."""

    def line(label: str, pick: Callable[[Spread], float]) -> list[str]:
        return [label, *(number(pick(table.footer[c])) if c in table.footer else "" for c in table.columns)]

    return [
        line("mean", lambda s: s.mean),
        line("min", lambda s: s.min),
        line("max", lambda s: s.max),
        line("baseline", lambda s: s.baseline),
        line("ratio", lambda s: s.mean / s.baseline),
    ]


def body_lines(table: Table5) -> list[list[str]]:
    """One line per layer."""
    return [[layer, *(number(table.cells.get((layer, c))) for c in table.columns)] for layer in table.layers]


def _table_lines(table: Table5) -> list[list[str]]:
    return body_lines(table) + footer_lines(table)


def _markdown(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    rule = "| " + " | ".join("---" for _ in heads) + " |"
    return [_markdown_line(heads), rule, *(_markdown_line(line) for line in lines)]


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |"


def _markdown_cell(text: str) -> str:
    """Names come from a foreign file: nothing in them may end the cell or become markup."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, safe)
    return "".join("\\" + c if c in "\\|`*[]" else c for c in printable(text))


def printable(text: str) -> str:
    """Control characters made visible, so that a name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _spread(rows: list[Row]) -> Spread | None:
    known = [(row.pii, row.baseline) for row in rows if row.pii is not None and row.baseline is not None]
    if not known:
        return None
    values = [pii for pii, _ in known]
    baseline = statistics.fmean(base for _, base in known)
    return Spread(statistics.fmean(values), min(values), max(values), len(values), baseline)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value

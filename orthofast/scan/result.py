"""What a scan found: rows, what was skipped, provenance; and its forms: JSON, CSV, Markdown, Parquet, page, plots."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orthofast.errors import InputError
from orthofast.scan import charts, frames, page_data, report
from orthofast.scan.comparison import Comparison, versions_of
from orthofast.scan.document import SCHEMA_VERSION, finite, parse
from orthofast.scan.output import write_whole
from orthofast.scan.roles import TABLE5
from orthofast.scan.tables import (
    CONDENSED,
    Spread,
    Table5,
    body_lines,
    condensed,
    footer_lines,
    markdown_table,
    number,
    roles_in,
    spread_of,
    table5_of,
    whole,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["FIELDS", "SCHEMA_VERSION", "SUFFIXES", "Row", "ScanResult", "Skipped", "Spread", "Table5", "form_of"]

SUFFIXES = (".json", ".csv", ".parquet", ".md", ".html", ".png", ".svg")


@dataclass(slots=True)
class Row:
    """One matrix seen from one side.

    Attributes:
        name: of the tensor; "[query]" and the like is appended for a block of a fused one.
        layer: row of the table, such as "0" or "decoder.3"; None outside the layers.
        role: one of ``roles.ROLES``; None for a file that cannot be read.
        vectors: "rows" or "cols" of the (out, in) matrix.
        n: number of vectors.
        d: their length; of an adapter's delta its rank, the length its vectors have in the space they span.
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

    @property
    def sampled(self) -> bool:
        """Whether some value is an estimate from a sample of the pairs."""
        return any(row.standard_error is not None for row in self.rows)

    def sides(self) -> tuple[str, ...]:
        """Which of "rows" and "cols" were measured."""
        return tuple(side for side in ("rows", "cols") if any(row.vectors == side for row in self.rows))

    def views(self) -> tuple[str, ...]:
        """The sides to show a table of: "paper" alone where a preset chose one side for each role."""
        known: dict[str | None, set[str]] = {}
        for row in self.rows:
            known.setdefault(row.role, set()).add(row.vectors)
        chosen = self.provenance.get("preset") == "paper" and all(len(sides) == 1 for sides in known.values())
        return ("paper",) if chosen else self.sides()

    def summary(self, version: str = "base") -> dict[tuple[str, str], Spread]:
        """(side, role) -> spread of PII over all whole matrices of that role, in the order of ``roles.ROLES``.

        Args:
            version: "base", "merged" or "delta", for a result that has an adapter's rows.
        """
        rows = whole(self.rows, version)
        found = {}
        for side in self.sides():
            for role in roles_in(row.role for row in rows):
                spread = spread_of(row for row in rows if row.vectors == side and row.role == role)
                if spread is not None:
                    found[side, role] = spread
        return found

    def table5(self, side: str = "rows", version: str = "base") -> Table5:
        """The layers x roles table of one side: whole matrices only, a layer's experts as their mean.

        Args:
            side: "rows", "cols", or "paper": the columns of queries, keys and values, the rows of the others, as the
                script behind Lu et al. 2024, Table 5, takes them.
            version: "base", "merged" or "delta", for a result that has an adapter's rows.

        Raises:
            InputError: if an argument is none of these.
        """
        return table5_of(self.rows, side, version)

    def to_dict(self) -> dict[str, object]:
        """The JSON document as Python objects; no NaN, None instead."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rows": [finite(asdict(row)) for row in self.rows],
            "skipped": [asdict(entry) for entry in self.skipped],
            "provenance": finite(self.provenance),
        }

    def to_json(self) -> str:
        """The result as one JSON document; a line for every row."""
        document = self.to_dict()
        lines = [f' "schema_version": {SCHEMA_VERSION}']
        for name in ("rows", "skipped"):
            entries = document[name]
            assert isinstance(entries, list)
            inside = ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in entries)
            lines.append(f' "{name}": [\n  {inside}\n ]' if entries else f' "{name}": []')
        lines.append(f' "provenance": {json.dumps(document["provenance"], indent=1, allow_nan=False)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> ScanResult:
        """The result that :meth:`to_json` wrote, by this version or an earlier one.

        Args:
            text: the JSON document.
            source: how messages name it.

        Raises:
            InputError: if it is no document of a scan, a field has the wrong type, or its version is later.
        """
        found = parse(text, source)
        return cls([Row(**row) for row in found["rows"]], [Skipped(**s) for s in found["skipped"]], found["provenance"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScanResult:
        """Read a ``.json`` file that :meth:`write` made.

        Raises:
            InputError: if it cannot be read or is no document of a scan.
        """
        source = Path(path)
        try:
            return cls.from_json(source.read_text("utf-8"), source.name)
        except OSError as error:
            raise InputError(f"{source} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(
                f"{source.name} is no text in UTF-8; a result is what 'orthofast scan -o FILE.json' wrote"
            ) from None

    def to_csv(self) -> str:
        """The rows as CSV, one line per matrix and side; an empty field where a value is missing."""
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            entry = finite(asdict(row))
            for name in ("max_pair", "histogram", "tied"):
                entry[name] = " ".join(map(str, entry[name] or ()))
            writer.writerow(entry)
        return out.getvalue()

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, one line per matrix and side.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        return frames.to_pandas(self.rows, FIELDS)

    def to_parquet(self) -> bytes:
        """The rows as the bytes of a Parquet file.

        Raises:
            MissingPackageError: if pyarrow is not installed.
        """
        return frames.to_parquet(self.rows, FIELDS)

    def to_markdown(self) -> str:
        """Table 5 of each side, the matrices outside it, and what was skipped."""
        lines: list[str] = []
        for side in self.views():
            table = self.table5(side)
            if table.layers:
                taken = f"{side}" if side != "paper" else "columns of queries, keys and values, else of the rows"
                lines += ["", f"PII of the {taken}, mean absolute cosine over all pairs", ""]
                lines += markdown_table(("layer", *table.columns), body_lines(table) + footer_lines(table))
        others, by_role = condensed(self.outside_table())
        if by_role:
            lines += ["", "Outside the table, by role", "", *markdown_table(CONDENSED, by_role)]
        if others:
            heads = ("name", "role", "vectors", "n", "d", "pii", "baseline", "ratio", "error")
            values = [[number(getattr(row, head)) for head in heads] for row in others]
            lines += ["", "Outside the table", "", *markdown_table(heads, values)]
        if self.skipped:
            gathered = [[name, str(count), reason] for name, reason, count in page_data.reasons(self.skipped)]
            lines += ["", "Skipped", "", *markdown_table(("name", "tensors", "reason"), gathered)]
        return "\n".join(lines).lstrip("\n") + "\n"

    def outside_table(self) -> list[Row]:
        """Rows that :meth:`table5` does not show: other roles, no layer, failed; heads and adapters are left out."""
        shown = [row for row in self.rows if row.error or (row.head is None and row.adapter in (None, "base"))]
        return [row for row in shown if row.role not in TABLE5 or row.layer is None or row.error]

    def to_html(self, comparison: Comparison | None = None) -> str:
        """The result as one self-contained page.

        Args:
            comparison: of an older result with this one, shown too; None shows an adapter's effect where there is one.

        Raises:
            MissingPackageError: if the packages of the extra ``report`` are not installed.
        """
        return report.render(self, comparison or versions_of(self))

    def plot(self, path: str | os.PathLike[str], what: str = "all", side: str | None = None) -> None:
        """Draw the heat map and the curves over depth into a ``.png`` or ``.svg`` file, for papers and slides.

        Args:
            path: the file; its suffix chooses the form.
            what: "heat" (layer by role), "curves" (over depth), "histograms" (of the cosines) or "all".
            side: "rows" or "cols"; None draws what was measured.

        Raises:
            InputError: if an argument is unknown, there is nothing to draw, or the file cannot be written.
            MissingPackageError: if the packages of the extra ``report`` are not installed.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind not in charts.SUFFIXES:
            raise InputError(f"a plot needs one of the suffixes {', '.join(charts.SUFFIXES)}, got {target.name!r}")
        write_whole(target, charts.picture(self, kind, what, side))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the form that the suffix names, one of :data:`SUFFIXES`; a reader never sees half a file.

        Raises:
            InputError: if the suffix is none of these, or the file cannot be written.
            MissingPackageError: if the form needs a package that is not installed.
        """
        target = Path(path)
        write_whole(target, form_of(target)(self))


def form_of(target: Path) -> Callable[[ScanResult], str | bytes]:
    """The function that makes the form a file name's suffix asks for.

    Raises:
        InputError: if the suffix is unknown.
        MissingPackageError: if the form needs a package that is not installed.
    """
    suffix = target.suffix.lower()
    forms: dict[str, Callable[[ScanResult], str | bytes]] = {
        ".json": ScanResult.to_json,
        ".csv": ScanResult.to_csv,
        ".parquet": ScanResult.to_parquet,
        ".md": ScanResult.to_markdown,
        ".html": ScanResult.to_html,
        ".png": lambda result: charts.picture(result, suffix),
        ".svg": lambda result: charts.picture(result, suffix),
    }
    if suffix not in forms:
        raise InputError(f"the output file needs one of the suffixes {', '.join(SUFFIXES)}, got {target.name!r}")
    needed = {".parquet": frames.require_parquet, ".html": report.require_packages}
    needed |= dict.fromkeys(charts.SUFFIXES, charts.require_packages)
    if suffix in needed:
        needed[suffix]()
    return forms[suffix]

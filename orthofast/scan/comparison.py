"""Two results side by side: which matrices changed, by how much, and which are on one side only."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthofast.errors import InputError
from orthofast.scan import report
from orthofast.scan.document import finite
from orthofast.scan.output import write_whole
from orthofast.scan.plan import layer_order, natural
from orthofast.scan.renaming import renamer
from orthofast.scan.roles import ROLES
from orthofast.scan.tables import markdown_table, number, percent, roles_in

if TYPE_CHECKING:
    from orthofast.scan.result import Row, ScanResult

SCHEMA_VERSION = 1
SUFFIXES = (".json", ".csv", ".md", ".html")
STATUSES = ("changed", "equal", "missing", "added", "reshaped", "failed")

Key = tuple[str, str, int | None, int | None, str | None]


@dataclass(slots=True)
class Change:
    """One matrix from one side, before and after.

    Attributes:
        name: of the tensor.
        layer: row of the table; None outside the layers.
        role: one of ``roles.ROLES``.
        vectors: "rows" or "cols".
        n: number of vectors.
        d: their length.
        status: "changed", "equal", "missing" (only before), "added" (only after), "reshaped" (the sizes differ) or
            "failed" (one of the two could not be measured).
        before: PII before; None where there is none.
        after: PII after.
        ratio_before: over the isotropic baseline.
        ratio_after: the same after.
        relative: (after - before) / before; None where either is missing or ``before`` is 0.
        drift: mean absolute change of the absolute cosines, pair by pair; None unless both weights were at hand.
        relative_change: Frobenius norm of the weights' change over that of the weight before; None likewise.
        head: index of the attention head; None for the whole matrix.
        expert: index in a stack of experts; None elsewhere.
        note: a sentence on sizes or errors, or None.
    """

    name: str
    layer: str | None
    role: str | None
    vectors: str
    n: int | None
    d: int | None
    status: str
    before: float | None = None
    after: float | None = None
    ratio_before: float | None = None
    ratio_after: float | None = None
    relative: float | None = None
    drift: float | None = None
    relative_change: float | None = None
    head: int | None = None
    expert: int | None = None
    note: str | None = None


FIELDS = tuple(Change.__slots__)


@dataclass(frozen=True, slots=True)
class Shift:
    """What became of the PII of several matrices.

    Attributes:
        count: matrices measured on both sides.
        before: mean PII before.
        after: mean PII after.
        least: smallest relative change.
        mean: mean relative change.
        most: largest relative change.
        drift: mean drift; None where it was not measured.
        relative_change: mean relative change of the weights; None likewise.
    """

    count: int
    before: float
    after: float
    least: float
    mean: float
    most: float
    drift: float | None
    relative_change: float | None


@dataclass(slots=True)
class Comparison:
    """Everything a comparison found.

    Attributes:
        changes: one per matrix and side, in the order of the layers.
        before: provenance of the first result.
        after: provenance of the second.
    """

    changes: list[Change]
    before: dict[str, object] = field(default_factory=dict)
    after: dict[str, object] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many matrices and sides have each status; those that occur."""
        found = {status: sum(change.status == status for change in self.changes) for status in STATUSES}
        return {status: count for status, count in found.items() if count}

    def names(self, status: str) -> list[str]:
        """Tensors with that status, each once."""
        return list(dict.fromkeys(change.name for change in self.changes if change.status == status))

    def whole(self) -> list[Change]:
        """Changes of whole matrices measured on both sides; no heads."""
        return [change for change in self.changes if change.head is None and change.status in ("changed", "equal")]

    def sides(self) -> tuple[str, ...]:
        """Which of "rows" and "cols" were measured."""
        return tuple(side for side in ("rows", "cols") if any(change.vectors == side for change in self.changes))

    def by_role(self) -> dict[tuple[str, str], Shift]:
        """(side, role) -> what became of the whole matrices of that role."""
        return self._grouped(lambda change: change.role)

    def by_layer(self) -> dict[tuple[str, str], Shift]:
        """(side, layer) -> what became of the whole matrices of that layer."""
        found = self._grouped(lambda change: change.layer)
        return dict(sorted(found.items(), key=lambda entry: (entry[0][0] != "rows", layer_order(entry[0][1]))))

    def most_changed(self, count: int = 20) -> list[Change]:
        """Whole matrices whose PII moved furthest, relative to what it was."""
        moved = [change for change in self.whole() if change.relative]
        return sorted(moved, key=lambda change: -abs(change.relative or 0.0))[:count]

    def to_dict(self) -> dict[str, object]:
        """The JSON document as Python objects; no NaN, None instead."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "kind": "diff",
            "counts": self.counts(),
            "changes": [asdict(change) for change in self.changes],
            "by_role": [{"vectors": k[0], "role": k[1], **asdict(s)} for k, s in self.by_role().items()],
            "by_layer": [{"vectors": k[0], "layer": k[1], **asdict(s)} for k, s in self.by_layer().items()],
            "before": self.before,
            "after": self.after,
        }
        found: dict[str, object] = finite(document)
        return found

    def to_json(self) -> str:
        """The comparison as one JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """The changes as CSV, one line per matrix and side; an empty field where a value is missing."""
        out = io.StringIO()
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(finite(asdict(change)) for change in self.changes)
        return out.getvalue()

    def to_markdown(self) -> str:
        """Before and after by role, the matrices that changed most, and what is on one side only."""
        lines = [", ".join(f"{count} {status}" for status, count in self.counts().items()) or "nothing to compare", ""]
        heads = ("role", "vectors", "matrices", "before", "after", "change", "drift", "|dW|/|W|")
        shifts = self.by_role()
        if shifts:
            table = [
                [role, side, str(s.count), number(s.before), number(s.after), percent(s.mean), *map(number, _moved(s))]
                for (side, role), s in shifts.items()
            ]
            lines += ["PII by role", "", *markdown_table(heads, table), ""]
        most = self.most_changed()
        if most:
            table = [
                [c.name, c.vectors, number(c.before), number(c.after), percent(c.relative), *map(number, _moved(c))]
                for c in most
            ]
            lines += ["Changed most", "", *markdown_table(("name", *heads[1:2], *heads[3:]), table), ""]
        for status, title in (("missing", "Only before"), ("added", "Only after"), ("reshaped", "Other sizes")):
            names = self.names(status)
            if names:
                lines += [title, "", *markdown_table(("name",), [[name] for name in names]), ""]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The comparison as one self-contained page.

        Raises:
            MissingPackageError: if the packages of the extra ``report`` are not installed.
        """
        return report.render_comparison(self)

    def write(self, path: str | Path) -> None:
        """Write the form that the suffix names, one of :data:`SUFFIXES`; a reader never sees half a file.

        Raises:
            InputError: if the suffix is none of these, or the file cannot be written.
            MissingPackageError: if the form needs a package that is not installed.
        """
        target = Path(path)
        write_whole(target, comparison_form(target)(self))

    def _grouped(self, label: Callable[[Change], str | None]) -> dict[tuple[str, str], Shift]:
        groups: dict[tuple[str, str], list[Change]] = {}
        for change in self.whole():
            name = label(change)
            if name is not None and change.before is not None and change.after is not None:
                groups.setdefault((change.vectors, name), []).append(change)
        order = {role: place for place, role in enumerate(roles_in(name for _, name in groups))}
        return {key: _shift(groups[key]) for key in sorted(groups, key=lambda key: (key[0] != "rows", order[key[1]]))}


def comparison_form(target: Path) -> Callable[[Comparison], str]:
    """The function that makes the form a file name's suffix asks for.

    Raises:
        InputError: if the suffix is unknown.
        MissingPackageError: if the form needs a package that is not installed.
    """
    forms: dict[str, Callable[[Comparison], str]] = {
        ".json": Comparison.to_json,
        ".csv": Comparison.to_csv,
        ".md": Comparison.to_markdown,
        ".html": Comparison.to_html,
    }
    form = forms.get(target.suffix.lower())
    if form is None:
        raise InputError(f"a comparison needs one of the suffixes {', '.join(SUFFIXES)}, got {target.name!r}")
    if form is Comparison.to_html:
        report.require_packages()
    return form


def compare(before: ScanResult, after: ScanResult) -> Comparison:
    """Match the rows of two results by name, side, head and expert; a wrapper's prefix on one side does not count."""
    rename = renamer({row.name for row in before.rows}, {row.name for row in after.rows})
    rows = [replace(row, name=rename(row.name)) for row in before.rows]
    return Comparison(compare_rows(rows, after.rows), {**before.provenance}, {**after.provenance})


def versions_of(result: ScanResult) -> Comparison | None:
    """Base against merged within one result; None where no adapter was scanned."""
    merged = [row for row in result.rows if row.adapter == "merged"]
    if not merged:
        return None
    base = [row for row in result.rows if row.adapter == "base"]
    touched = {_key(row)[:4] for row in merged}
    changes = compare_rows([row for row in base if _key(row)[:4] in touched], merged, across_versions=True)
    return Comparison(changes, {**result.provenance}, {**result.provenance})


def compare_rows(before: Iterable[Row], after: Iterable[Row], across_versions: bool = False) -> list[Change]:
    """One change per matrix and side of either; ``across_versions`` matches rows of an adapter's versions."""

    def key(row: Row) -> Key:
        found = _key(row)
        return (*found[:4], None) if across_versions or found[4] == "base" else found

    old = {key(row): row for row in before}
    new = {key(row): row for row in after}
    changes = [_change(old.get(found), new.get(found)) for found in dict.fromkeys((*old, *new))]
    return sorted(changes, key=_order)


def relative(before: float | None, after: float | None) -> float | None:
    """(after - before) / before; None where either is missing or ``before`` is 0."""
    if before is None or after is None or before == 0:
        return 0.0 if before == after == 0 else None
    return (after - before) / before


def _key(row: Row) -> Key:
    return row.name, row.vectors, row.head, row.expert, row.adapter


def _change(old: Row | None, new: Row | None) -> Change:
    row = new or old
    assert row is not None
    change = Change(row.name, row.layer, row.role, row.vectors, row.n, row.d, "", head=row.head, expert=row.expert)
    if old is not None:
        change.before, change.ratio_before = old.pii, old.ratio
    if new is not None:
        change.after, change.ratio_after = new.pii, new.ratio
        change.drift, change.relative_change = new.drift, new.relative_change
    if old is None or new is None:
        change.status = "added" if old is None else "missing"
    elif old.error or new.error:
        change.status, change.note = "failed", old.error or new.error
    elif (old.n, old.d) != (new.n, new.d):
        change.status, change.note = "reshaped", f"{old.n} vectors of {old.d} before, {new.n} of {new.d} after"
    else:
        same = (old.pii, old.zero) == (new.pii, new.zero) and not (new.drift or new.relative_change)
        change.status, change.relative = "equal" if same else "changed", relative(old.pii, new.pii)
    return change


def _order(change: Change) -> tuple[object, ...]:
    role = ROLES.index(change.role) if change.role in ROLES else len(ROLES)
    where = change.layer is None, layer_order(change.layer or "")
    inside = (-1 if change.expert is None else change.expert, -1 if change.head is None else change.head)
    return (*where, role, natural(change.name), change.vectors != "rows", *inside)


def _shift(changes: Sequence[Change]) -> Shift:
    moved = [change.relative for change in changes if change.relative is not None] or [math.nan]
    return Shift(
        len(changes),
        statistics.fmean(change.before or 0.0 for change in changes),
        statistics.fmean(change.after or 0.0 for change in changes),
        min(moved),
        statistics.fmean(moved),
        max(moved),
        _mean(change.drift for change in changes),
        _mean(change.relative_change for change in changes),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _moved(found: Any) -> tuple[float | None, float | None]:
    return found.drift, found.relative_change

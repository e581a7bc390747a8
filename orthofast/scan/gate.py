"""Conditions on a result for continuous integration: such as "role=Query: pii > 0.1" or "nonfinite > 0"."""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from orthofast.errors import InputError
from orthofast.scan.comparison import relative

if TYPE_CHECKING:
    from orthofast.scan.result import Row, ScanResult

Key = tuple[str, str, int | None, int | None, str | None]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
MEASURES = (
    "pii",
    "ratio",
    "baseline",
    "max_abs",
    "zero",
    "nonfinite",
    "standard_error",
    "drift",
    "relative_change",
    "n",
    "d",
    "failed",
    "change",
)
ALIASES = {"pii_ratio": "ratio", "error": "failed", "errors": "failed", "delta": "change"}
SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "min": min,
    "max": max,
    "count": len,
}
SELECTORS = ("role", "layer", "name", "vectors", "head", "expert", "adapter")
EXPRESSION = re.compile(
    r"\s*(?:(?P<summary>[a-z]+)\s*\(\s*(?P<inner>\w+)\s*\)|(?P<measure>\w+))"
    r"\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<bound>[-+]?\d[\d.eE+-]*)\s*(?P<percent>%?)\s*"
)
EXAMPLE = '"role=Query: pii > 0.1", "max(ratio) > 2" or "nonfinite > 0"'


@dataclass(frozen=True, slots=True)
class Condition:
    """When a gate fails: a measure of the selected rows beyond a bound.

    Attributes:
        text: as it was written.
        selectors: (field, glob) that a row must match.
        summary: "mean", "min", "max" or "count" over the rows; empty for each row by itself.
        measure: one of :data:`MEASURES`.
        sign: how it compares with the bound.
        bound: the bound.
    """

    text: str
    selectors: tuple[tuple[str, str], ...]
    summary: str
    measure: str
    sign: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value is beyond the bound, so that the gate fails."""
        return OPERATORS[self.sign](value, self.bound)


@dataclass(frozen=True, slots=True)
class Violation:
    """A row, or a summary of several, beyond its bound.

    Attributes:
        name: of the tensor; of a summary what was summed up, such as "mean of 12 matrices".
        vectors: "rows" or "cols"; empty for a summary.
        role: of the matrix, None for a summary.
        layer: of the matrix, None outside layers or for a summary.
        value: what was found.
        head: index of the head, None for a whole matrix.
        expert: index of the expert, None elsewhere.
    """

    name: str
    vectors: str
    role: str | None
    layer: str | None
    value: float
    head: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one condition: how many rows were looked at, and those beyond the bound."""

    condition: Condition
    rows: int
    violations: tuple[Violation, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is beyond the bound."""
        return not self.violations

    def to_dict(self) -> dict[str, object]:
        """The verdict as plain objects for JSON."""
        return {
            "condition": self.condition.text,
            "passed": self.passed,
            "rows": self.rows,
            "violations": [asdict(violation) for violation in self.violations],
        }


def parse_condition(text: str) -> Condition:
    """Read a condition.

    ``[field=glob[,field=glob...]:] measure sign bound[%]``, with ``mean(...)``, ``min(...)``, ``max(...)`` or
    ``count(...)`` around the measure for one value of all selected rows instead of a look at each.

    Raises:
        InputError: if it cannot be read.

    >>> parse_condition("role=Query, layer=1*: pii > 10%").bound
    0.1
    """
    head, colon, tail = text.rpartition(":")
    found = EXPRESSION.fullmatch(tail)
    if found is None:
        raise InputError(f"a condition needs the form of {EXAMPLE}, got {text!r}")
    measure = found["inner"] or found["measure"]
    measure = ALIASES.get(measure, measure)
    if measure not in MEASURES:
        raise InputError(f"{text!r} needs one of the measures {', '.join(MEASURES)}, got {measure!r}")
    if found["summary"] and found["summary"] not in SUMMARIES:
        raise InputError(f"{text!r} needs one of {', '.join(SUMMARIES)} around a measure, got {found['summary']!r}")
    try:
        bound = float(found["bound"]) / (100 if found["percent"] else 1)
    except ValueError:
        raise InputError(f"{text!r} needs a number as its bound, got {found['bound']!r}") from None
    selectors = tuple(_selector(word, text) for word in head.split(",")) if colon else ()
    return Condition(text, selectors, found["summary"] or "", measure, found["sign"], bound)


def judge(
    result: ScanResult,
    conditions: Iterable[Condition],
    baseline: ScanResult | None = None,
    max_delta: float | None = None,
) -> list[Verdict]:
    """Hold a result against conditions.

    Args:
        result: what is judged. Rows of whole matrices and of experts, and of heads where a condition selects them; of
            an adapter the base and the merged weights, unless a condition selects others.
        conditions: from :func:`parse_condition`.
        baseline: an older result; the measure "change" is PII against its row there, (new - old) / old.
        max_delta: fail where the size of that change is larger, or where a row of the baseline is gone.

    Raises:
        InputError: if a condition selects no row or asks for what no row has, or a baseline is missing.
    """
    old = None if baseline is None else {_key(row): row for row in baseline.rows}
    verdicts = [_verdict(condition, result.rows, old) for condition in conditions]
    if max_delta is not None:
        if old is None:
            raise InputError("a largest change needs a baseline: the JSON file of an older scan")
        verdicts.append(_drifted(result.rows, old, max_delta))
    if not verdicts:
        raise InputError(f"a check needs a condition such as {EXAMPLE}, or a baseline with a largest change")
    return verdicts


def _selector(word: str, text: str) -> tuple[str, str]:
    field, equals, glob = (part.strip() for part in word.partition("="))
    if not equals or field not in SELECTORS or not glob:
        raise InputError(f"{text!r} needs selectors such as role=Query of {', '.join(SELECTORS)}, got {word.strip()!r}")
    return field, glob


def _selected(condition: Condition, rows: Iterable[Row]) -> list[Row]:
    fields = {field for field, _ in condition.selectors}
    found = []
    for row in rows:
        if ("head" not in fields and row.head is not None) or ("adapter" not in fields and row.adapter == "delta"):
            continue
        if all(_matches(row, field, glob) for field, glob in condition.selectors):
            found.append(row)
    return found


def _matches(row: Row, field: str, glob: str) -> bool:
    value = getattr(row, field)
    if value is None:
        return False
    text, glob = (str(value), glob) if field == "name" else (str(value).lower(), glob.lower())
    return fnmatchcase(text, glob) or (field == "role" and fnmatchcase(text.removesuffix(".weight"), glob))


def _verdict(condition: Condition, rows: Sequence[Row], old: dict[Key, Row] | None) -> Verdict:
    if condition.measure == "change" and old is None:
        raise InputError(f"{condition.text!r} needs a baseline: the JSON file of an older scan")
    selected = _selected(condition, rows)
    if not selected and condition.selectors:
        roles = sorted({row.role for row in rows if row.role})
        raise InputError(f"{condition.text!r} selects no row; the result has the roles {', '.join(roles) or 'none'}")
    found = [(row, value) for row in selected if (value := _value(row, condition.measure, old)) is not None]
    if not found and condition.summary != "count" and selected:
        raise InputError(f"{condition.text!r} asks for {condition.measure}, which no selected row of the result has")
    if condition.summary:
        values = [value for _, value in found]
        summed = float(SUMMARIES[condition.summary](values)) if values or condition.summary == "count" else None
        name = f"{condition.summary} of {len(values)} values"
        beyond = [Violation(name, "", None, None, summed)] if summed is not None and condition.holds(summed) else []
    else:
        beyond = [_violation(row, value) for row, value in found if condition.holds(value)]
    return Verdict(condition, len(found), tuple(beyond))


def _value(row: Row, measure: str, old: dict[Key, Row] | None) -> float | None:
    if measure == "failed":
        return float(row.error is not None)
    if measure == "change":
        before = (old or {}).get(_key(row))
        return None if before is None else relative(before.pii, row.pii)
    value = getattr(row, measure)
    return None if value is None else float(value)


def _drifted(rows: Sequence[Row], old: dict[Key, Row], limit: float) -> Verdict:
    """Every row that both results have, and every one that only the old one has."""
    condition = Condition(f"change beyond {100 * limit:g} %", (), "", "change", ">", limit)
    beyond, looked_at = [], 0
    new = {_key(row): row for row in rows if row.adapter != "delta"}
    for key, before in old.items():
        if before.pii is None or before.adapter == "delta":
            continue
        looked_at += 1
        row = new.get(key)
        moved = None if row is None else relative(before.pii, row.pii)
        if row is None or moved is None:
            beyond.append(_violation(before, float("nan")))
        elif abs(moved) > limit:
            beyond.append(_violation(row, moved))
    if not looked_at:
        raise InputError("the baseline holds no measured matrix to compare with")
    return Verdict(condition, looked_at, tuple(beyond))


def _violation(row: Row, value: float) -> Violation:
    return Violation(row.name, row.vectors, row.role, row.layer, value, row.head, row.expert)


def _key(row: Row) -> Key:
    return row.name, row.vectors, row.head, row.expert, None if row.adapter == "base" else row.adapter

"""What a page shows of a result, small enough for any model: cells, curves, histograms, pairs, lines, reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import betainc

from orthofast.scan.plan import layer_order, natural
from orthofast.scan.roles import ROLES
from orthofast.scan.tables import spread_of, whole

if TYPE_CHECKING:
    from orthofast.scan.result import Row, ScanResult, Skipped

LINES = 2000  # of the table of all matrices; an expert's matrices and a matrix's heads are one line
PAIRS = 60  # of the list of the most parallel
GROUPS = 1000  # of reasons why tensors were skipped
POINTS = 15_000  # of all histograms by layer together; beyond that only their sums over the layers
HEAD_CELLS = 30_000  # of all heat maps of heads
DIGITS = 5  # significant ones of a number in a chart

Entry = dict[str, Any]


@dataclass(slots=True)
class Line:
    """A line of the table: a matrix, or a layer's experts of one role, with the range of its heads.

    Attributes:
        row: the matrix; of experts, their sums, means and extremes.
        count: how many matrices the line stands for.
        low: smallest PII among them.
        high: largest PII among them.
        heads: how many heads were measured on their own.
        head_low: the smallest PII among the heads.
        head_high: the largest.
    """

    row: Row
    count: int = 1
    low: float | None = None
    high: float | None = None
    heads: int = 0
    head_low: float | None = None
    head_high: float | None = None


def short(role: str) -> str:
    """A role's name on a chart."""
    return role.removesuffix(".weight")


def brief(value: float | None) -> float | None:
    """As many digits as a chart can show."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def cells(rows: Iterable[Row], side: str, version: str = "base") -> list[Entry]:
    """One entry per layer and role: mean PII and ratio, the extremes where there are several matrices."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in whole(rows, version):
        if row.vectors == side and row.ratio is not None and row.layer is not None and row.role:
            groups.setdefault((row.layer, row.role), []).append(row)
    found = []
    for (layer, role), members in groups.items():
        spread = spread_of(members)
        assert spread is not None
        ratios = [row.ratio for row in members if row.ratio is not None]
        found.append(
            {
                "layer": layer,
                "role": short(role),
                "pii": brief(spread.mean),
                "ratio": brief(sum(ratios) / len(ratios)),
                "low": brief(min(ratios)),
                "high": brief(max(ratios)),
                "name": members[0].name if len(members) == 1 else f"{len(members)} matrices",
                "n": members[0].n,
                "d": members[0].d,
            }
        )
    return found


def orders(entries: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """Layers and roles of these entries, as they are drawn."""
    entries = list(entries)
    layers = sorted({entry["layer"] for entry in entries}, key=layer_order)
    present = {entry["role"] for entry in entries}
    known = [short(role) for role in ROLES]
    return layers, [role for role in known if role in present] + sorted(present - set(known))


def tower(layer: str) -> str:
    """The label without its number: a curve must not run on from one stack into the next."""
    return re.sub(r"\d+", "", layer) if layer.startswith(("encoder.", "decoder.")) or layer.isdecimal() else ""


def head_cells(rows: Iterable[Row], side: str) -> list[Entry]:
    """One entry per layer, role and head; none where no head was measured or there are too many to draw."""
    found = [
        {
            "layer": row.layer,
            "role": short(row.role),
            "head": row.head,
            "ratio": brief(row.ratio),
            "base": row.baseline,
        }
        for row in rows
        if row.head is not None
        and row.vectors == side
        and row.ratio is not None
        and row.layer is not None
        and row.role
        and row.adapter in (None, "base")
    ]
    return found if len(found) <= HEAD_CELLS else []


def histograms(rows: Iterable[Row], side: str) -> list[Entry]:
    """Shares of the signed cosines per bin: by role over all layers, by layer too while that stays small.

    Entries of kind "chance" hold the share that isotropic random vectors of that length would have there: the cosine of
    two has the density ``(1 - c^2)^((d - 3) / 2)``.
    """
    sums: dict[tuple[str, str], tuple[np.ndarray[Any, Any], int]] = {}
    for row in whole(rows):
        if row.histogram and row.vectors == side and row.role and row.d is not None and sum(row.histogram):
            counts = np.array(row.histogram, dtype=np.int64)
            for layer in ("all", row.layer) if row.layer is not None else ("all",):
                known, d = sums.get((row.role, layer), (np.zeros_like(counts), row.d))
                if known.shape == counts.shape:
                    sums[row.role, layer] = known + counts, d
    by_layer = sum(int(np.count_nonzero(counts)) for counts, _ in sums.values()) <= POINTS
    found: list[Entry] = []

    def add(kind: str, role: str, layer: str, shares: np.ndarray[Any, Any], least: float) -> None:
        width = 2.0 / len(shares)
        for place in np.flatnonzero(shares > least).tolist():
            middle, share = round(-1.0 + (place + 0.5) * width, 9), float(f"{shares[place]:.3g}")
            found.append(
                {"kind": kind, "layer": layer, "role": short(role), "at": middle, "width": width, "share": share}
            )

    for (role, layer), (counts, d) in sums.items():
        if layer == "all":
            edges = np.linspace(-1.0, 1.0, len(counts) + 1)
            if d > 1:
                expected = np.diff(betainc((d - 1) / 2, (d - 1) / 2, (edges + 1) / 2))
                add("chance", role, layer, expected, float(1 / (3 * counts.sum())))  # not a third of a pair
        if layer == "all" or by_layer:
            add("found", role, layer, counts / counts.sum(), 0.0)
    return found


def pairs(rows: Iterable[Row]) -> list[Row]:
    """The matrices with the most parallel pairs, the closest first; no heads, and no pair of the adapter's delta."""
    known = [row for row in rows if row.max_abs is not None and row.max_pair is not None]
    known = [row for row in known if row.head is None and row.adapter != "delta" and row.max_pair != (-1, -1)]
    return sorted(known, key=lambda row: (-(row.max_abs or 0.0), natural(row.name), row.vectors))[:PAIRS]


def lines(rows: Sequence[Row]) -> tuple[list[Line], int]:
    """The table of all matrices, and how many of its lines are left out because there are more than :data:`LINES`.

    What stays then are failures and the lines furthest from their baseline.
    """
    found: dict[tuple[str, str, str | None, bool], list[Row]] = {}
    heads: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        if row.head is not None:
            heads.setdefault((row.name, row.vectors, row.adapter), []).append(row)
        else:
            alone = row.expert is None
            name = row.name if alone else expert_pattern(row.name, row.expert or 0)
            found.setdefault((name, row.vectors, row.adapter, row.error is not None), []).append(row)
    made = []
    for (name, vectors, adapter, _), members in found.items():
        line = _line(name, members)
        _add_heads(line, heads.pop((name, vectors, adapter), []))
        made.append(line)
    for (name, _, _), members in heads.items():  # heads measured without their matrix
        line = _line(f"{name} (heads)", members)
        _add_heads(line, members)
        made.append(line)
    if len(made) <= LINES:
        return made, 0
    kept = sorted(range(len(made)), key=lambda place: (made[place].row.error is None, -_distance(made[place].row)))
    return [made[place] for place in sorted(kept[:LINES])], len(made) - LINES


def expert_pattern(name: str, expert: int) -> str:
    """A tensor's name with a star for the expert's number; the layer's number stays."""
    found = list(re.finditer(rf"(?<![0-9A-Za-z_]){expert}(?![0-9A-Za-z_])", name))
    return name if not found else f"{name[: found[-1].start()]}*{name[found[-1].end() :]}"


def reasons(skipped: Iterable[Skipped]) -> list[tuple[str, str, int]]:
    """(names with a star for numbers, reason, how many), in the order of the names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in skipped:
        groups.setdefault((re.sub(r"\d+", "*", entry.name), entry.reason), []).append(entry.name)
    found = [
        (names[0] if len(names) == 1 else pattern, reason, len(names)) for (pattern, reason), names in groups.items()
    ]
    if len(found) > GROUPS:
        rest = sum(count for _, _, count in found[GROUPS:])
        found = [*found[:GROUPS], ("further names", "as the JSON document lists", rest)]
    return found


def failures(result: ScanResult) -> list[tuple[str, str]]:
    """(name, sentence) of what could not be measured, each once."""
    return list(dict.fromkeys((row.name, row.error or "") for row in result.failed))


def _line(name: str, members: list[Row]) -> Line:
    if len(members) == 1 and members[0].name == name:
        row = members[0]
        return Line(row)
    spread = spread_of(members)
    first = members[0]
    ratios = [row.ratio for row in members if row.ratio is not None]
    joined = type(first)(
        name,
        first.layer,
        first.role,
        first.vectors,
        first.n,
        first.d,
        spread.mean if spread else None,
        first.baseline,
        sum(ratios) / len(ratios) if ratios else None,
        sum(row.zero or 0 for row in members),
        sum(row.nonfinite or 0 for row in members),
        first.error,
        adapter=first.adapter,
        max_abs=max((row.max_abs for row in members if row.max_abs is not None), default=None),
    )
    return Line(joined, len(members), spread.min if spread else None, spread.max if spread else None)


def _add_heads(line: Line, members: list[Row]) -> None:
    spread = spread_of(members)
    if spread is not None:
        line.heads, line.head_low, line.head_high = spread.count, spread.min, spread.max


def _distance(row: Row) -> float:
    """How far from chance, in either direction."""
    return abs(float(np.log(row.ratio))) if row.ratio else 0.0


def packed(entries: Sequence[Entry]) -> dict[str, Any]:
    """The same records by column; a column with few different values as these and their places."""
    columns: dict[str, Any] = {}
    for name in entries[0] if entries else ():
        values = [entry[name] for entry in entries]
        words = list(dict.fromkeys(values))
        if len(words) * 3 <= len(values):
            place = {word: index for index, word in enumerate(words)}
            columns[name] = {"words": words, "at": [place[value] for value in values]}
        else:
            columns[name] = values
    return columns

"""Rows gathered into layers x roles: which rows count once, means with their extremes, the lines of a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orthofast.errors import InputError
from orthofast.scan.plan import layer_order
from orthofast.scan.roles import ROLES, TABLE5

if TYPE_CHECKING:
    from orthofast.scan.result import Row

VIEWS = ("rows", "cols", "paper")
BY_COLUMNS = ("Query", "Keys", "Values")  # the sides of the paper's own script: columns of these, rows of the others
CONDENSED = ("role", "vectors", "matrices", "mean", "min", "max", "baseline", "ratio")
LISTED, MOST = 40, 400  # rows outside the table: so many are listed in any case, and at most so many
VERSIONS = ("base", "merged", "delta")


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
        vectors: "rows", "cols", or "paper" for the sides of the paper's script.
        columns: roles that occur, in the paper's order.
        layers: rows from top to bottom.
        cells: (layer, role) -> PII; the mean where a layer has several matrices of a role (experts).
        ratios: (layer, role) -> PII over baseline.
        footer: role -> spread over the layers.
        spreads: (layer, role) -> spread over the matrices of that cell: one, or a layer's experts.
    """

    vectors: str
    columns: tuple[str, ...]
    layers: tuple[str, ...]
    cells: dict[tuple[str, str], float]
    ratios: dict[tuple[str, str], float]
    footer: dict[str, Spread]
    spreads: dict[tuple[str, str], Spread] = field(default_factory=dict)


def whole(rows: Iterable[Row], version: str = "base") -> list[Row]:
    """Rows of whole matrices, experts among them, no heads; of one version where an adapter was scanned.

    Raises:
        InputError: if ``version`` is none of "base", "merged" and "delta".
    """
    if version not in VERSIONS:
        raise InputError(f"version needs 'base', 'merged' or 'delta', got {version!r}")
    versions = (None, "base") if version == "base" else (version,)
    return [row for row in rows if row.head is None and row.adapter in versions]


def spread_of(rows: Iterable[Row]) -> Spread | None:
    """The spread of PII over those rows that have one; None without any."""
    known = [(row.pii, row.baseline) for row in rows if row.pii is not None and row.baseline is not None]
    if not known:
        return None
    values = [pii for pii, _ in known]
    baseline = statistics.fmean(base for _, base in known)
    return Spread(statistics.fmean(values), min(values), max(values), len(values), baseline)


def condensed(rows: Sequence[Row]) -> tuple[list[Row], list[list[str]]]:
    """Rows outside the table as a reader can take them in: a few one by one, of many those in layers by role.

    Returns:
        What is listed one by one, and lines of role, vectors, matrices, mean, min, max, baseline, ratio.
    """
    if len(rows) <= LISTED:
        return list(rows), []
    alone = [row for row in rows if row.layer is None or row.error]
    lines = []
    for side in ("rows", "cols"):
        for role in roles_in(row.role for row in rows):
            inside = [r for r in rows if (r.vectors, r.role) == (side, role) and r.layer is not None and not r.error]
            spread = spread_of(inside)
            if spread is not None:
                values = (spread.mean, spread.min, spread.max, spread.baseline, spread.mean / spread.baseline)
                lines.append([role, side, str(spread.count), *map(number, values)])
    return alone[:MOST], lines


def roles_in(roles: Iterable[str | None]) -> list[str]:
    """These roles, each once: in the order of ``roles.ROLES``, then what older and later versions name."""
    present = {role for role in roles if role is not None}
    return [role for role in ROLES if role in present] + sorted(present - set(ROLES))


def table5_of(rows: Sequence[Row], side: str, version: str = "base") -> Table5:
    """The layers x roles table of one side; see ``ScanResult.table5``.

    Raises:
        InputError: if ``side`` or ``version`` is unknown.
    """
    if side not in VIEWS:
        raise InputError(f"side needs 'rows', 'cols' or 'paper', got {side!r}")
    groups: dict[tuple[str, str], list[Row]] = {}
    layers: set[str] = set()
    for row in whole(rows, version):
        wanted = side if side != "paper" else "cols" if row.role in BY_COLUMNS else "rows"
        if row.vectors == wanted and row.role in TABLE5 and row.layer is not None:
            layers.add(row.layer)
            if row.pii is not None:
                groups.setdefault((row.layer, row.role), []).append(row)
    spreads = {key: spread for key, found in groups.items() if (spread := spread_of(found)) is not None}
    footer = {}
    for role in TABLE5:
        spread = spread_of([row for key, found in groups.items() if key[1] == role for row in found])
        if spread is not None:
            footer[role] = spread
    cells = {key: spread.mean for key, spread in spreads.items()}
    ratios = {key: spread.mean / spread.baseline for key, spread in spreads.items()}
    order = tuple(sorted(layers, key=layer_order))
    return Table5(side, TABLE5 if layers else (), order, cells, ratios, footer, spreads)


def number(value: object) -> str:
    """A value for people: four digits behind the point, nothing where it is missing."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def percent(value: float | None) -> str:
    """A relative change for people, with its sign."""
    return "" if value is None or value != value else f"{100 * value:+.2f} %" if value else "0"


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


def markdown_table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A table in Markdown, a line each; what is foreign in the cells stays text."""
    heads = list(heads)
    rule = "| " + " | ".join("---" for _ in heads) + " |"
    return [_markdown_line(heads), rule, *(_markdown_line(line) for line in lines)]


def printable(text: str) -> str:
    """Control characters made visible, so that a name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_markdown_cell(cell) for cell in cells) + " |"


def _markdown_cell(text: str) -> str:
    """Names come from a foreign file: nothing in them may end the cell or become markup."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(mark, safe)
    return "".join("\\" + c if c in "\\|`*[]" else c for c in printable(text))

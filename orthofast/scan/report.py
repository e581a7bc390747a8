"""Results and comparisons as one self-contained page: charts, tables, provenance, no request to any network.

Owns jinja2, a package of the extra ``report``; it is imported only when a page is rendered.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from orthofast.errors import MissingPackageError
from orthofast.scan import charts, comparison_charts, page_data
from orthofast.scan.page_data import Line
from orthofast.scan.tables import BY_COLUMNS, number, percent

if TYPE_CHECKING:
    from orthofast.scan.comparison import Comparison
    from orthofast.scan.result import ScanResult

PACKAGES = (*charts.PACKAGES, "jinja2")
INSTALL = charts.INSTALL
TITLES = charts.SIDE_TITLES | {"paper": f"As in the paper's script: columns of {', '.join(BY_COLUMNS)}, else rows"}

Column = tuple[str, str, Callable[[Line], str]]


def missing_packages() -> list[str]:
    """Packages of the extra ``report`` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Refuse early, before a long scan.

    Raises:
        MissingPackageError: if a package of the extra ``report`` is missing; the message says how to install it.
    """
    missing = missing_packages()
    if missing:
        raise MissingPackageError(f"the HTML report needs {', '.join(missing)}; install the extra with {INSTALL}")


def render(result: ScanResult, comparison: Comparison | None = None) -> str:
    """One HTML page of about 1 MB that works from a file, offline.

    Args:
        result: what is shown.
        comparison: of an older result with this one, or of an adapter's versions; it stands on the page too.

    Raises:
        MissingPackageError: if the packages of the extra ``report`` are not installed.
    """
    require_packages()
    sides = result.sides()
    specs, datasets = charts.charts_of(result)
    moved: dict[str, object] = {"comparison": comparison}
    if comparison is not None:
        moved_specs, moved_data = comparison_charts.charts_of(comparison)
        specs, datasets = specs | moved_specs, datasets | moved_data
        moved |= _comparison_tables(comparison)
    lines, left_out = page_data.lines(result.rows)
    tables = {side: table for side in result.views() if (table := result.table5(side)).layers}
    return _page(
        "report.html.j2",
        specs,
        datasets,
        title=result.provenance.get("checkpoint", "scan"),
        result=result,
        provenance=result.provenance,
        sides=sides,
        titles=TITLES,
        tables=tables,
        experts={key for table in tables.values() for key, spread in table.spreads.items() if spread.count > 1},
        failures=page_data.failures(result),
        matrices=_table(lines),
        left_out=left_out,
        pairs=page_data.pairs(result.rows),
        reasons=page_data.reasons(result.skipped),
        facts=_facts(result.provenance),
        **moved,
    )


def render_comparison(comparison: Comparison) -> str:
    """The page of two results side by side, without either's own charts.

    Raises:
        MissingPackageError: if the packages of the extra ``report`` are not installed.
    """
    require_packages()
    specs, datasets = comparison_charts.charts_of(comparison)
    names = [str(known.get("checkpoint", "a result")) for known in (comparison.before, comparison.after)]
    return _page(
        "comparison.html.j2",
        specs,
        datasets,
        title=f"{names[0]} and {names[1]}",
        names=names,
        titles=TITLES,
        sides=comparison.sides(),
        comparison=comparison,
        facts_before=_facts(comparison.before),
        facts_after=_facts(comparison.after),
        **_comparison_tables(comparison),
    )


def _page(template: str, specs: dict[str, Any], datasets: dict[str, Any], **shown: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files("orthofast.scan").joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {"number": number, "percent": percent, "small": _small}
    drawn: dict[str, list[str]] = {}
    for name in specs:
        kind, _, side = name.rpartition("-")
        drawn.setdefault(kind, []).append(side)
    columns = max((len({entry["role"] for entry in entries}) for entries in datasets.values()), default=0)
    data = {name: page_data.packed(entries) for name, entries in datasets.items()}
    return environment.get_template(template).render(
        drawn=drawn,
        columns=columns,
        charts=_script_json(specs),
        datasets=_script_json(data),
        bundle=charts.bundle().replace("</script", "<\\/script"),
        **shown,
    )


def _script_json(value: object) -> str:
    """JSON that cannot leave its script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _table(lines: list[Line]) -> dict[str, Any]:
    """Heads of the columns and the cells of every line; columns that say nothing are left out."""
    columns: list[Column] = [
        ("name", "word", lambda line: line.row.name),
        ("layer", "word", lambda line: line.row.layer or ""),
        ("role", "word", lambda line: line.row.role or ""),
        ("vectors", "word", lambda line: line.row.vectors),
        ("n", "num", lambda line: number(line.row.n)),
        ("d", "num", lambda line: number(line.row.d)),
        ("PII", "num", lambda line: number(line.row.pii)),
        ("baseline", "num", lambda line: number(line.row.baseline)),
        ("ratio", "num", lambda line: number(line.row.ratio)),
        ("zero", "num", lambda line: number(line.row.zero)),
        ("NaN/Inf", "num", lambda line: number(line.row.nonfinite)),
    ]
    optional: list[Column] = [
        ("matrices", "num", lambda line: str(line.count) if line.count > 1 else ""),
        ("lowest", "num", lambda line: number(line.low)),
        ("highest", "num", lambda line: number(line.high)),
        ("heads", "num", lambda line: str(line.heads) if line.heads else ""),
        ("lowest head", "num", lambda line: number(line.head_low)),
        ("highest head", "num", lambda line: number(line.head_high)),
        ("std. error", "num", lambda line: _small(line.row.standard_error)),
        ("max |cos|", "num", lambda line: number(line.row.max_abs)),
        ("version", "word", lambda line: line.row.adapter or ""),
        ("drift", "num", lambda line: _small(line.row.drift)),
        ("|dW|/|W|", "num", lambda line: _small(line.row.relative_change)),
    ]
    columns += [column for column in optional if any(column[2](line) for line in lines)]
    return {
        "heads": [(name, kind) for name, kind, _ in columns],
        "lines": [([cell(line) for _, _, cell in columns], line.row.error) for line in lines],
    }


def _comparison_tables(comparison: Comparison) -> dict[str, Any]:
    names = {status: comparison.names(status) for status in ("missing", "added", "reshaped", "failed")}
    return {
        "counts": comparison.counts(),
        "shifts": comparison.by_role(),
        "most": comparison.most_changed(40),
        "one_sided": {status: found for status, found in names.items() if found},
    }


def _small(value: float | None) -> str:
    """A small number for people: three digits that count."""
    return "" if value is None else f"{value:.3g}"


def _facts(known: dict[str, object]) -> list[tuple[str, str]]:
    """Provenance as lines for people."""
    lines = []
    for key, value in known.items():
        if isinstance(value, dict):
            shown = ", ".join(
                f"{name.replace('_', ' ')} {_plain(entry)}" for name, entry in value.items() if entry is not None
            )
        elif isinstance(value, list):
            shown = "; ".join(_plain(entry) for entry in value)
        else:
            shown = _plain(value) if value is not None else ""
        if shown:
            lines.append((key.replace("_", " "), shown))
    return lines


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(str(entry) if name == "name" else f"{entry:,} bytes" for name, entry in value.items())
    return str(value)

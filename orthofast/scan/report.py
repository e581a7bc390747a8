"""The result as one self-contained page: charts, tables and provenance, no request to any network.

Owns the packages of the extra ``report`` (altair, vl-convert, jinja2); they are imported only when a page is rendered.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from orthofast.errors import OrthofastError
from orthofast.scan.plan import layer_order
from orthofast.scan.roles import ROLES

if TYPE_CHECKING:
    from orthofast.scan.result import Row, ScanResult

PACKAGES = ("altair", "vl_convert", "jinja2")
INSTALL = "pip install 'orthofast[report]'"
BUNDLE = "window.vegaEmbed = vegaEmbed;"
LABELLED_LAYERS = 48  # beyond that a number inside each cell cannot be read
CELL_PX = 26
LEVEL_CHARACTERS = 56  # of all labels together, while they fit side by side
DOTTED_LAYERS = 40
SIDE_TITLES = {"rows": "Rows: one vector per output", "cols": "Columns: one vector per input"}


def missing_packages() -> list[str]:
    """Packages of the extra ``report`` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Refuse early, before a long scan.

    Raises:
        OrthofastError: if a package of the extra ``report`` is missing; the message says how to install it.
    """
    missing = missing_packages()
    if missing:
        raise OrthofastError(f"the HTML report needs {', '.join(missing)}; install the extra with {INSTALL}")


def render(result: ScanResult) -> str:
    """One HTML page of about 1 MB that works from a file, offline.

    Raises:
        OrthofastError: if the packages of the extra ``report`` are not installed.
    """
    require_packages()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("orthofast.scan").joinpath("report.html.j2").read_text("utf-8"))
    sides = result.sides()
    tables = {side: table for side in sides if (table := result.table5(side)).layers}
    everything = [entry["ratio"] for side in sides for entry in _grouped(result, side)]
    span = (min([0.5, *everything]), max([2.0, *everything]))  # one scale, so that the sides compare
    charts = {f"heat-{side}": _heat_map(result, side, span) for side in sides}
    charts |= {f"curves-{side}": _curves(result, side) for side in sides}
    charts = {name: chart for name, chart in charts.items() if chart is not None}
    return template.render(
        result=result,
        provenance=result.provenance,
        sides=sides,
        titles=SIDE_TITLES,
        tables=tables,
        spreads=result.summary(),
        facts=_facts(result),
        chart_ids=list(charts),
        charts=_script_json(charts),
        bundle=_bundle().replace("</script", "<\\/script"),
    )


@cache
def _bundle() -> str:
    import vl_convert

    return str(vl_convert.javascript_bundle(BUNDLE))


def _script_json(value: object) -> str:
    """JSON that cannot leave its script element, whatever names it holds."""
    text = json.dumps(value, allow_nan=False)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _measured(result: ScanResult, side: str) -> list[Row]:
    return [row for row in result.rows if row.vectors == side and row.ratio is not None and row.layer is not None]


def _grouped(result: ScanResult, side: str) -> list[dict[str, Any]]:
    """One entry per layer and role: the mean where there are several matrices."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _measured(result, side):
        groups.setdefault((row.layer or "", row.role or ""), []).append(row)
    entries = []
    for (layer, role), rows in groups.items():
        pii = sum(row.pii or 0.0 for row in rows) / len(rows)
        ratio = sum(row.ratio or 0.0 for row in rows) / len(rows)
        short = role.removesuffix(".weight")
        name = rows[0].name if len(rows) == 1 else f"{len(rows)} matrices"
        entries.append(
            {"layer": layer, "role": short, "pii": pii, "ratio": ratio, "name": name, "n": rows[0].n, "d": rows[0].d}
        )
    return entries


def _orders(entries: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    layers = sorted({entry["layer"] for entry in entries}, key=layer_order)
    present = {entry["role"] for entry in entries}
    return layers, [short for role in ROLES if (short := role.removesuffix(".weight")) in present]


def _heat_map(result: ScanResult, side: str, span: tuple[float, float]) -> dict[str, Any] | None:
    import altair

    entries = _grouped(result, side)
    if not entries:
        return None
    layers, roles = _orders(entries)
    bottom, top = span
    # logarithmic steps around 1: half and double are equally far from chance
    scale = altair.Scale(
        type="log", domain=[bottom, 1, top], range=["#2166ac", "#f7f4ef", "#b2182b"], interpolate="lab", clamp=True
    )
    tooltip = [
        altair.Tooltip("name:N", title="matrix"),
        altair.Tooltip("layer:N"),
        altair.Tooltip("role:N"),
        altair.Tooltip("pii:Q", title="PII", format=".5f"),
        altair.Tooltip("ratio:Q", title="over baseline", format=".3f"),
        altair.Tooltip("n:Q", title="vectors"),
        altair.Tooltip("d:Q", title="length"),
    ]
    across = altair.X("role:N", sort=roles, title=None, axis=altair.Axis(orient="top", labelAngle=-35, labelLimit=120))
    down = altair.Y("layer:N", sort=layers, title="layer", axis=altair.Axis(labelLimit=110, labelOverlap=True))
    colour = altair.Color(
        "ratio:Q",
        scale=scale,
        legend=altair.Legend(
            title="PII / isotropic baseline",
            orient="bottom",
            gradientLength=200,
            format=".2~f",
            values=_ticks(bottom, top),
        ),
    )
    data = _data(entries)
    drawn: Any = altair.Chart(data).mark_rect(stroke=None).encode(x=across, y=down, color=colour, tooltip=tooltip)
    height = max(3, len(layers)) * CELL_PX
    if len(layers) <= LABELLED_LAYERS:
        strong = f"datum.ratio > {top**0.6:.4f} || datum.ratio < {bottom**0.6:.4f}"
        ink = altair.condition(strong, altair.value("#ffffff"), altair.value("#1a1a1a"))
        text = (
            altair.Chart(data)
            .mark_text(fontSize=11)
            .encode(x=across, y=down, text=altair.Text("ratio:Q", format=".2f"), color=ink, tooltip=tooltip)
        )
        drawn = altair.layer(drawn, text)
    else:
        height = min(1200, len(layers) * 10)
    described = f"Heat map of PII over its isotropic baseline, {side}, layer by role; the tables below hold the numbers"
    return _specified(drawn.properties(width="container", height=height, description=described))


def _curves(result: ScanResult, side: str) -> dict[str, Any] | None:
    import altair

    entries = _grouped(result, side)
    layers, roles = _orders(entries)
    if len(layers) < 2:
        return None
    layers.sort(key=lambda layer: (not layer.startswith("encoder."), _tower(layer), layer_order(layer)))
    for entry in entries:
        entry |= {"depth": layers.index(entry["layer"]), "tower": _tower(entry["layer"])}
    level = sum(map(len, layers)) <= LEVEL_CHARACTERS
    named = _data(entries)
    focus = altair.selection_point(fields=["role"], bind="legend")
    hollow = altair.condition(focus, altair.value(1.0), altair.value(0.12))
    across = altair.X(
        "layer:O",
        sort=layers,
        title="layer",
        axis=altair.Axis(labelAngle=0 if level else -60, labelOverlap=True),
    )
    lines = (
        altair.Chart(named)
        .mark_line(point=altair.OverlayMarkDef(size=28) if len(layers) <= DOTTED_LAYERS else False, strokeWidth=1.8)
        .encode(
            x=across,
            y=altair.Y("ratio:Q", title="PII / isotropic baseline", scale=altair.Scale(zero=False, nice=True)),
            color=altair.Color(
                "role:N",
                sort=roles,
                legend=altair.Legend(title=None, orient="bottom", columns=3, symbolType="stroke"),
                scale=altair.Scale(domain=roles, scheme="tableau10"),
            ),
            strokeDash=altair.StrokeDash("role:N", sort=roles, legend=None),
            opacity=hollow,
            order=altair.Order("depth:Q"),
            detail="tower:N",
            tooltip=[
                altair.Tooltip("role:N"),
                altair.Tooltip("layer:N"),
                altair.Tooltip("pii:Q", title="PII", format=".5f"),
                altair.Tooltip("ratio:Q", title="over baseline", format=".3f"),
            ],
        )
        .add_params(focus)
    )
    chance = altair.Chart(_data([{"one": 1.0}])).mark_rule(strokeDash=[2, 3], color="#888").encode(y="one:Q")
    described = (
        f"PII over its isotropic baseline, {side}, one line per role from the first layer to the last; 1 is chance"
    )
    return _specified(altair.layer(lines, chance).properties(width="container", height=260, description=described))


def _tower(layer: str) -> str:
    """The label without its number: a curve must not run on from one stack into the next."""
    return re.sub(r"\d+", "", layer) if layer.startswith(("encoder.", "decoder.")) or layer.isdecimal() else ""


def _data(values: list[dict[str, Any]]) -> dict[str, Any]:
    return {"values": values}


def _ticks(bottom: float, top: float) -> list[float]:
    return [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if bottom <= tick <= top]


def _specified(chart: Any) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)  # colours of axes and text come from the page: light or dark
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _facts(result: ScanResult) -> list[tuple[str, str]]:
    """Provenance as lines for people."""
    known = result.provenance
    lines = []
    for key, value in known.items():
        if isinstance(value, dict):
            shown = ", ".join(
                f"{name.replace('_', ' ')} {_plain(entry)}" for name, entry in value.items() if entry is not None
            )
        elif isinstance(value, list):
            shown = "; ".join(_plain(entry) for entry in value)
        else:
            shown = _plain(value)
        if shown:
            lines.append((key.replace("_", " "), shown))
    return lines


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(str(entry) if name == "name" else f"{entry:,} bytes" for name, entry in value.items())
    return str(value)

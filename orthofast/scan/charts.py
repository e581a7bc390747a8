"""Charts of a result: declared once, drawn by the page or written as PNG and SVG; owns altair and vl-convert."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from orthofast.errors import InputError, MissingPackageError
from orthofast.scan.page_data import Entry, cells, head_cells, histograms, orders, tower

if TYPE_CHECKING:
    from orthofast.scan.result import ScanResult

PACKAGES = ("altair", "vl_convert")
INSTALL = "pip install 'orthofast[report]'"
BUNDLE = "window.vegaEmbed = vegaEmbed;"
SUFFIXES = (".png", ".svg")
SIDE_TITLES = {"rows": "Rows: one vector per output", "cols": "Columns: one vector per input"}
KINDS = ("heat", "curves", "histograms")
LABELLED_LAYERS = 48  # beyond that a number inside each cell cannot be read
CELL_PX = 26
LEVEL_CHARACTERS = 56  # of all labels together, while they fit side by side
DOTTED_LAYERS = 40
PICTURE_PX = 460  # width of one chart of a picture
PNG_SCALE = 2.0
ROOM_FOR_LABELS = {"padding": {"left": 5, "top": 5, "bottom": 5, "right": 30}}  # the last slanted one hangs over
LOW, CHANCE, HIGH = "#2166ac", "#f7f4ef", "#b2182b"
RATIO_TITLE = "PII / isotropic baseline"

Spec = dict[str, Any]


def missing_packages() -> list[str]:
    """Packages that charts need and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Refuse early, before a long scan.

    Raises:
        MissingPackageError: if altair or vl-convert is missing; the message says how to install them.
    """
    missing = missing_packages()
    if missing:
        raise MissingPackageError(f"plots need {', '.join(missing)}; install the extra with {INSTALL}")


def library() -> Any:
    """The package altair, for the other files that declare charts."""
    require_packages()
    import altair

    return altair


@cache
def bundle() -> str:
    """The charting library as one script, for a page that asks no network."""
    import vl_convert

    return str(vl_convert.javascript_bundle(BUNDLE))


def charts_of(result: ScanResult) -> tuple[dict[str, Spec], dict[str, list[Entry]]]:
    """Chart id -> declaration, and the data they name: heat maps, curves, heads, histograms of each side."""
    sides = result.sides()
    datasets = {f"cells-{side}": cells(result.rows, side) for side in sides}
    everything = [ratio for entries in datasets.values() for entry in entries if (ratio := entry["ratio"])]
    span = (min([0.5, *everything]), max([2.0, *everything]))  # one scale, so that the sides compare
    specs: dict[str, Spec] = {}
    for side in sides:
        entries = datasets[f"cells-{side}"]
        layers, roles = orders(entries)
        for entry in entries:
            entry |= {"depth": layers.index(entry["layer"]), "tower": tower(entry["layer"])}
        if entries:
            specs[f"heat-{side}"] = heat_map(f"cells-{side}", layers, roles, span)
        if len(layers) > 1:
            ranges = any(entry["low"] < entry["high"] for entry in entries)
            specs[f"curves-{side}"] = curves(f"cells-{side}", layers, roles, ranges)
        datasets[f"heads-{side}"] = head_cells(result.rows, side)
        if datasets[f"heads-{side}"]:
            specs[f"heads-{side}"] = head_map(f"heads-{side}", *orders(datasets[f"heads-{side}"]), span)
        datasets[f"histograms-{side}"] = histograms(result.rows, side)
        if datasets[f"histograms-{side}"]:
            specs[f"histograms-{side}"] = histogram(f"histograms-{side}", *orders(datasets[f"histograms-{side}"]))
    return specs, {name: entries for name, entries in datasets.items() if entries}


def picture(result: ScanResult, suffix: str, what: str = "all", side: str | None = None) -> str | bytes:
    """Charts of a result as a file's content: the text of an SVG, the bytes of a PNG.

    Raises:
        InputError: if an argument is unknown or there is nothing to draw.
        MissingPackageError: if altair or vl-convert is missing.
    """
    require_packages()
    import vl_convert

    if what not in (*KINDS, "all"):
        raise InputError(f"what needs 'heat', 'curves', 'histograms' or 'all', got {what!r}")
    if side not in (None, "rows", "cols"):
        raise InputError(f"side needs 'rows', 'cols' or None, got {side!r}")
    specs, datasets = charts_of(result)
    lines = []
    for kind in KINDS if what == "all" else (what,):
        names = [f"{kind}-{found}" for found in result.sides() if side in (None, found)]
        drawn = [
            still
            for name in names
            if name in specs
            for still in _stills(specs[name], kind, name, _roles(datasets, name))
        ]
        for name in names:
            datasets |= specs.get(name, {}).get("datasets", {})
        if drawn:
            lines.append({"concat": drawn, "columns": 4 if kind == "histograms" else 2, "spacing": 40})
    if not lines:
        raise InputError(f"there is nothing to draw for {what!r}: no such matrix was measured, or in one layer only")
    spec: Spec = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "vconcat": lines, "spacing": 36}
    spec |= {"resolve": {"scale": {"color": "independent"}}, "datasets": datasets, "background": "white"}
    spec["config"] = {"view": {"stroke": None}, "axis": {"labelFontSize": 11, "titleFontWeight": "normal"}}
    if suffix == ".svg":
        return str(vl_convert.vegalite_to_svg(spec))
    return bytes(vl_convert.vegalite_to_png(spec, scale=PNG_SCALE))


def heat_map(data: str, layers: list[str], roles: list[str], span: tuple[float, float]) -> Spec:
    """Layer by role, the ratio to the baseline as colour."""
    altair = library()
    bottom, top = span
    tooltip = [
        altair.Tooltip("name:N", title="matrix"),
        altair.Tooltip("layer:N"),
        altair.Tooltip("role:N"),
        altair.Tooltip("pii:Q", title="PII", format=".5f"),
        altair.Tooltip("ratio:Q", title="over baseline", format=".3f"),
        altair.Tooltip("low:Q", title="lowest ratio", format=".3f"),
        altair.Tooltip("high:Q", title="highest ratio", format=".3f"),
        altair.Tooltip("n:Q", title="vectors"),
        altair.Tooltip("d:Q", title="length"),
    ]
    across = altair.X("role:N", sort=roles, title=None, axis=altair.Axis(orient="top", labelAngle=-35, labelLimit=120))
    down = altair.Y("layer:N", sort=layers, title="layer", axis=altair.Axis(labelLimit=110, labelOverlap=True))
    source = altair.NamedData(name=data)
    drawn: Any = (
        altair.Chart(source).mark_rect(stroke=None).encode(x=across, y=down, color=_ratio_colour(span), tooltip=tooltip)
    )
    height = max(3, len(layers)) * CELL_PX
    if len(layers) <= LABELLED_LAYERS:
        strong = f"datum.ratio > {top**0.6:.4f} || datum.ratio < {bottom**0.6:.4f}"
        ink = altair.condition(strong, altair.value("#ffffff"), altair.value("#1a1a1a"))
        text = (
            altair.Chart(source)
            .mark_text(fontSize=11)
            .encode(x=across, y=down, text=altair.Text("ratio:Q", format=".2f"), color=ink, tooltip=tooltip)
        )
        drawn = altair.layer(drawn, text)
    else:
        height = min(1200, len(layers) * 10)
    described = "Heat map of PII over its isotropic baseline, layer by role; the tables below hold the numbers"
    return specified(drawn.properties(width="container", height=height, description=described)) | ROOM_FOR_LABELS


def curves(data: str, layers: list[str], roles: list[str], ranges: bool) -> Spec:
    """One line per role from the first layer to the last; with ``ranges`` a band from lowest to highest expert."""
    altair = library()
    layers = sorted(layers, key=lambda layer: (not layer.startswith("encoder."), tower(layer), layers.index(layer)))
    level = sum(map(len, layers)) <= LEVEL_CHARACTERS
    single = altair.param(
        name="single",
        value="all roles",
        bind=altair.binding_select(options=["all roles", *roles], name="single out "),
    )
    alone = "single === 'all roles' || datum.role === single"
    focus = altair.selection_point(fields=["role"], bind="legend", name="focus")
    chosen = altair.PredicateComposition({"and": [{"param": "focus"}, alone]})
    across = altair.X(
        "layer:O", sort=layers, title="layer", axis=altair.Axis(labelAngle=0 if level else -60, labelOverlap=True)
    )
    colour = altair.Color(
        "role:N",
        sort=roles,
        legend=altair.Legend(
            title=None, orient="bottom", columns=3, symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2
        ),
        scale=altair.Scale(domain=roles, scheme="tableau10"),
    )
    height = altair.Y("ratio:Q", title=RATIO_TITLE, scale=altair.Scale(zero=False, nice=True))
    source = altair.NamedData(name=data)
    band = (
        altair.Chart(source)
        .transform_filter("datum.low < datum.high")
        .mark_area(opacity=0.18)
        .encode(
            x=across,
            y=altair.Y("low:Q", title=RATIO_TITLE),
            y2="high:Q",
            color=colour,
            detail="tower:N",
            opacity=altair.condition(chosen, altair.value(0.18), altair.value(0.03)),
        )
    )
    lines = (
        altair.Chart(source)
        .mark_line(point=altair.OverlayMarkDef(size=28) if len(layers) <= DOTTED_LAYERS else False, strokeWidth=1.8)
        .encode(
            x=across,
            y=height,
            color=colour,
            strokeDash=altair.StrokeDash("role:N", sort=roles, legend=None),
            opacity=altair.condition(chosen, altair.value(1.0), altair.value(0.12)),
            order=altair.Order("depth:Q"),
            detail="tower:N",
            tooltip=[
                altair.Tooltip("role:N"),
                altair.Tooltip("layer:N"),
                altair.Tooltip("pii:Q", title="PII", format=".5f"),
                altair.Tooltip("ratio:Q", title="over baseline", format=".3f"),
                altair.Tooltip("low:Q", title="lowest ratio", format=".3f"),
                altair.Tooltip("high:Q", title="highest ratio", format=".3f"),
            ],
        )
        .add_params(focus, single)
    )
    chance = altair.Chart({"values": [{"one": 1.0}]}).mark_rule(strokeDash=[2, 3], color="#888").encode(y="one:Q")
    described = "PII over its isotropic baseline, one line per role from the first layer to the last; 1 is chance"
    drawn = altair.layer(band, lines, chance) if ranges else altair.layer(lines, chance)
    return specified(drawn.properties(width="container", height=260, description=described))


def head_map(data: str, layers: list[str], roles: list[str], span: tuple[float, float]) -> Spec:
    """Layer by head, the ratio to the baseline as colour, for one role at a time."""
    altair = library()
    role = _pick("role", roles, "role ")
    tooltip = [
        altair.Tooltip("role:N"),
        altair.Tooltip("layer:N"),
        altair.Tooltip("head:Q"),
        altair.Tooltip("pii:Q", title="PII", format=".5f"),
        altair.Tooltip("ratio:Q", title="over baseline", format=".3f"),
    ]
    drawn = (
        altair.Chart(altair.NamedData(name=data))
        .mark_rect(stroke=None)
        .encode(
            x=altair.X("head:O", title="head", axis=altair.Axis(labelAngle=0, labelOverlap=True)),
            y=altair.Y("layer:N", sort=layers, title="layer", axis=altair.Axis(labelLimit=110, labelOverlap=True)),
            color=_ratio_colour(span),
            tooltip=tooltip,
        )
        .add_params(role)
        .transform_filter("datum.role === role")
        .transform_calculate(pii="datum.ratio * datum.base")
    )
    height = max(3, len(layers)) * CELL_PX if len(layers) <= LABELLED_LAYERS else min(900, len(layers) * 9)
    described = "Heat map of PII over its isotropic baseline inside each attention head, layer by head"
    return specified(drawn.properties(width="container", height=height, description=described))


def histogram(data: str, layers: list[str], roles: list[str]) -> Spec:
    """Share of all pairs in each bin of the cosine, beside that of random vectors, for one role and layer at a time."""
    altair = library()
    ordered = ["all", *(layer for layer in layers if layer != "all")]
    role, layer = _pick("role", roles, "role "), _pick("layer", ordered, "layer ")
    source = altair.NamedData(name=data)
    across = altair.X(
        "left:Q", title="cosine of a pair", scale=altair.Scale(nice=False, zero=False), axis=altair.Axis(tickCount=7)
    )
    scale = altair.Scale(type="log", nice=False)
    axis = altair.Axis(format="~e", tickCount=6)
    shown = "datum.role === role && datum.kind === "
    bars = (
        altair.Chart(source)
        .transform_filter(f"{shown}'found' && datum.layer === layer")
        .transform_calculate(left="datum.at - datum.width / 2", right="datum.at + datum.width / 2")
        .transform_joinaggregate(least="min(share)")
        .transform_calculate(floor="datum.least / 3")
        .mark_rect(opacity=0.8, color="#5b8cbe")
        .encode(
            x=across,
            x2="right:Q",
            y=altair.Y("share:Q", title="share of the pairs", scale=scale, axis=axis),
            y2=altair.Y2("floor:Q"),
            tooltip=[
                altair.Tooltip("left:Q", title="from", format=".4f"),
                altair.Tooltip("right:Q", title="to", format=".4f"),
                altair.Tooltip("share:Q", format=".3e"),
            ],
        )
    )
    chance = (
        altair.Chart(source)
        .transform_filter(f"{shown}'chance'")
        .mark_line(strokeDash=[4, 3], color="#e45756", strokeWidth=1.6)
        .encode(x="at:Q", y=altair.Y("share:Q", scale=scale))
    )
    drawn = altair.layer(bars, chance).add_params(role, layer).properties(width="container", height=240)
    described = "Histogram of the cosines of all pairs on a logarithmic scale; dashed, that of random vectors"
    return specified(drawn.properties(description=described))


def specified(chart: Any) -> Spec:
    """A declaration whose colours of axes and text come from the page: light or dark."""
    spec: Spec = chart.to_dict()
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _pick(name: str, options: list[str], label: str) -> Any:
    altair = library()
    return altair.param(name=name, value=options[0], bind=altair.binding_select(options=options, name=label))


def _ratio_colour(span: tuple[float, float]) -> Any:
    """Logarithmic steps around 1: half and double are equally far from chance."""
    altair = library()
    bottom, top = span
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if bottom <= tick <= top]
    scale = altair.Scale(type="log", domain=[bottom, 1, top], range=[LOW, CHANCE, HIGH], interpolate="lab", clamp=True)
    legend = altair.Legend(title=RATIO_TITLE, orient="bottom", gradientLength=200, format=".2~f", values=ticks)
    return altair.Color("ratio:Q", scale=scale, legend=legend)


def _stills(spec: Spec, kind: str, name: str, roles: list[str]) -> list[Spec]:
    """A chart for a picture: a width of its own, a title, no controls; a histogram once for every role."""
    made = {key: value for key, value in spec.items() if key not in ("$schema", "autosize", "datasets", "padding")}
    title = SIDE_TITLES[name.removeprefix(f"{kind}-")]
    if kind != "histograms":
        return [_fixed(made, {}) | {"width": PICTURE_PX, "title": _title(title)}]
    found = []
    for role in roles:
        values = {"role": json.dumps(role), "layer": "'all'"}
        found.append(_fixed(made, values) | {"width": PICTURE_PX // 2, "title": _title(f"{role}. {title}")})
    return found


def _roles(datasets: dict[str, list[Entry]], name: str) -> list[str]:
    return orders(datasets.get(name, []))[1]


def _title(text: str) -> Spec:
    return {"text": text, "anchor": "start", "fontSize": 13}


def _fixed(spec: Any, values: dict[str, str]) -> Any:
    """The same without parameters: these values in filters, and what holds while nothing is singled out."""
    if isinstance(spec, list):
        return [_fixed(entry, values) for entry in spec]
    if not isinstance(spec, dict):
        return spec
    made = {key: _fixed(entry, values) for key, entry in spec.items() if key != "params"}
    if "param" in json.dumps(made.get("condition", "")):
        return {"value": made["condition"]["value"]}
    if isinstance(made.get("filter"), str):
        for name, value in values.items():
            made["filter"] = made["filter"].replace(f"datum.{name} === {name}", f"datum.{name} === {value}")
    return made

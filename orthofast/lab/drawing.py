"""Figures as Vega-Lite declarations, written as PNG and SVG: colours that colour-blind readers tell apart, and shapes.

Owns vl-convert, a package of the extra ``lab``. The palette is that of Okabe and Ito (2008), its yellow left out and
its light colours last; each series has also a dash and a marker of its own, so that a black-and-white print says the
same. All scales are set here, so that one key serves all panels.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import vl_convert

from orthofast.lab.axes import LETTER_PX, Axis, axis_of, place
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.svg import recoloured, renumbered, rounded

Spec = dict[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#3b3b3b", "#b87a00", "#3b9bd1")
DARK_COLOURS = ("#56b4e9", "#ff8c42", "#2fcf9f", "#e7a5c9", "#d9d9d9", "#f2b632", "#8ccbf2")
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [4, 2], [1, 3], [14, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
FILLS = (0.6, 0.3, 0.75, 0.15, 0.45, 0.25, 0.7)
SIZES = (78, 58, 62, 56, 60, 50, 50)  # later ones leave the earlier ones to be seen
WIDTH, ALONE, HEIGHT, CELL_PX, BAR_PX = 300, 430, 210, 13, 40
SMALL_PX = 6.0  # mean width of a letter of captions
TITLE_PX = 8.6
ENTRY_PX = 22
PNG_SCALE = 2.0
LIGHT = {"ink": "#1b1f24", "soft": "#46505a", "line": "#c9ced4", "page": "#ffffff"}
DARK = {"ink": "#e6e9ee", "soft": "#a0a9b4", "line": "#3d454f", "page": "#1d2127"}
DARK_OF = dict(zip((*LIGHT.values(), *COLOURS), (*DARK.values(), *DARK_COLOURS), strict=True))
SMALLEST = 1e-300


class _Look(NamedTuple):
    colour: str
    dash: list[int]
    shape: str
    size: int
    fill: float  # of bars: light and dark in turn, for prints without colour


def declaration(figure: Figure, title: str, seeds: int, *, dark: bool = False) -> Spec:
    """The figure as a Vega-Lite declaration.

    Args:
        figure: what it shows.
        title: above all panels.
        seeds: how many were run, for the caption.
        dark: colours for a dark page.
    """
    looks = _looks(figure)
    wide = ALONE if len(figure.panels) == 1 else WIDTH
    panels = [_cells(panel) if panel.kind == "cells" else _panel(panel, looks, wide) for panel in figure.panels]
    columns = min(2, len(panels))
    across = sum(max(panel["width"] + 76 for panel in panels[column::columns]) for column in range(columns))
    across = max(across, 420)
    key = _key(figure, looks, across)
    subtitle = [*_wrapped(figure.caption, across / SMALL_PX), *_wrapped(_seeds(figure, seeds), across / SMALL_PX)]
    found: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": _wrapped(title, across / TITLE_PX), "subtitle": subtitle, "anchor": "start", "offset": 10},
        "vconcat": [*key, {"concat": panels, "columns": 2, "spacing": 24}],
        "spacing": 14,
        "background": LIGHT["page"],
        "config": _config(),
    }
    if not dark:
        return found
    dark_found: Spec = json.loads(json.dumps(found), object_hook=_darkened)
    return dark_found


def pictures(figure: Figure, title: str, seeds: int) -> dict[str, str | bytes]:
    """The files of a figure by name: PNG and SVG for print, SVG for a dark page."""
    light = declaration(figure, title, seeds)
    svg = renumbered(rounded(str(vl_convert.vegalite_to_svg(light))))
    return {
        "figure.svg": svg,
        "figure.png": bytes(vl_convert.vegalite_to_png(light, scale=PNG_SCALE)),
        "figure-dark.svg": recoloured(svg, DARK_OF),
    }


def _darkened(part: Spec) -> Spec:
    return {key: DARK_OF.get(value, value) if isinstance(value, str) else value for key, value in part.items()}


def _config() -> Spec:
    return {
        "aria": False,
        "font": "DejaVu Sans, Helvetica, Arial, sans-serif",
        "view": {"stroke": None},
        "title": {
            "color": LIGHT["ink"],
            "subtitleColor": LIGHT["soft"],
            "fontSize": 14,
            "subtitleFontSize": 11,
            "subtitlePadding": 4,
        },
        "axis": {
            "labelColor": LIGHT["ink"],
            "titleColor": LIGHT["ink"],
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "labelFlush": False,
            "labelOverlap": False,
            "titleFontSize": 12,
            "domainColor": LIGHT["soft"],
            "tickColor": LIGHT["soft"],
            "gridColor": LIGHT["line"],
            "gridOpacity": 0.6,
        },
        "legend": {"labelColor": LIGHT["ink"], "titleColor": LIGHT["ink"], "titleFontWeight": "normal"},
    }


def _seeds(figure: Figure, seeds: int) -> str:
    """In words: what is drawn of several seeds."""
    if seeds == 1:
        return "One seed; a gap where it has no number."
    spread = [panel for panel in figure.panels if any(len(one.runs) > 1 for one in panel.series)]
    if not spread:
        return ""
    logarithmic = any(panel.y_log for panel in spread)
    kinds = {_kind(panel) for panel in spread}
    ranges = [word for word, of in (("bands", {"lines"}), ("thin lines", {"bars", "dots"})) if kinds & of]
    mean = f"Mean of {seeds} seeds" + (", geometric on logarithmic axes" if logarithmic else "")
    reach = f"; {' and '.join(ranges)} from the least to the largest" if ranges else ""
    return f"{mean}{reach}; a gap where a seed has no number."


def _kind(panel: Panel) -> str:
    return "dots" if panel.kind == "bars" and panel.y_log else panel.kind


def _looks(figure: Figure) -> dict[str, _Look]:
    """Of each series; a published one looks like the measured one of its name."""
    series = [one for panel in figure.panels if panel.kind != "cells" for one in panel.series]
    names = list(dict.fromkeys(one.name for one in series))
    own = list(dict.fromkeys(_plain(name, names) for name in names))
    looks = {}
    for name in names:
        index = own.index(_plain(name, names))
        lists: tuple[Sequence[Any], ...] = (COLOURS, DASHES, SHAPES, SIZES, FILLS)
        colour, dash, shape, size, fill = (values[index % len(values)] for values in lists)
        if index >= len(COLOURS):  # the same colour comes again with another dash and shape
            dash, shape = DASHES[(index + 2) % len(DASHES)], SHAPES[(index + 3) % len(SHAPES)]
        looks[name] = _Look(colour, dash, shape, size, fill)
    return looks


def _plain(name: str, names: Sequence[str]) -> str:
    measured = name.removesuffix(", published")
    return measured if measured in names else name


def _panel(panel: Panel, looks: dict[str, _Look], wide: int) -> Spec:
    kind = _kind(panel)
    rows = [_rows(one, panel) for one in panel.series]
    known = [value for part in rows for row in part if row["y"] is not None for value in (row["low"], row["high"])]
    known += [height for _, height in _heights(panel)]
    y = axis_of(known, log=panel.y_log, zero=kind == "bars", length=HEIGHT)
    width = float(wide)
    if kind == "lines":
        places = [float(row["x"]) for part in rows for row in part]
        margin = 0.03 if panel.points else 0.0
        x = axis_of(places, log=panel.x_log, margin=margin, length=width, measured=True, upright=False)
        angle = 0
    else:
        names = list(dict.fromkeys(str(x) for one in panel.series for x in one.x))
        width = max(width, len(names) * (14.0 * len(panel.series) + 12))
        labels, angle = _named(names, width / len(names))
        x = Axis(-0.5, len(names) - 0.5, False, tuple(range(len(names))), tuple(labels))
        rows = _grouped(rows, names, width / len(names))
    axes = {
        "x": _encoded("x", x, panel.x, grid=kind == "lines", angle=angle),
        "y": _encoded("y", y, panel.y, grid=True, angle=0),
    }
    layers: list[Spec] = []
    for one, part in zip(panel.series, rows, strict=True):
        layers += _series(one, part, looks[one.name], kind, panel.points or one.published, axes)
    layers += _levels(panel, y, axes)
    if panel.title:
        layers.append(_text(panel.title, width / 2, -10, {"align": "center", "fontWeight": "bold", "fontSize": 12}))
    return {"layer": layers, "width": width, "height": HEIGHT}


def _encoded(field: str, axis: Axis, title: str, *, grid: bool, angle: int) -> Spec:
    labels, ticks = json.dumps(axis.labels, ensure_ascii=False), json.dumps(axis.ticks)
    shown: Spec = {"values": list(axis.ticks), "labelExpr": f"{labels}[indexof({ticks}, datum.value)]", "grid": grid}
    if field == "y" and set("⁰¹²³⁴⁵⁶⁷⁸⁹") & set(labels):
        shown["titlePadding"] = 12  # raised digits are measured too narrow
    if angle:
        shown |= {"labelAngle": angle, "labelAlign": "right", "labelBaseline": "top"}
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {
            "type": "log" if axis.log else "linear",
            "domain": [axis.low, axis.high],
            "nice": False,
            "zero": False,
        },
        "axis": shown,
    }


def _series(
    series: Series, rows: list[dict[str, Any]], look: _Look, kind: str, points: bool, axes: dict[str, Spec]
) -> list[Spec]:
    """Band, line or bar, markers, range."""
    layers: list[Spec] = []
    low, high = {"y": axes["y"] | {"field": "low"}}, {"y2": {"field": "high"}}
    spread = not series.published and any(row["y"] is not None and row["low"] < row["high"] for row in rows)
    if kind == "lines":
        if spread:
            layers.append(
                {"mark": {"type": "area", "fill": look.colour, "opacity": 0.2}, "encoding": axes | low | high}
            )
        if not series.published:
            layers.append({"mark": {"type": "line", **_stroke(look, 2)}, "encoding": axes})
    elif kind == "bars":
        to = {"x": axes["x"] | {"field": "left"}, "x2": {"field": "right"}, "y2": {"field": "zero"}}
        layers.append({"mark": _bar(look, series.published), "encoding": axes | to})
    if points or kind != "lines":
        layers.append({"mark": _marker(look, series.published), "encoding": axes})
    if kind != "lines" and spread:  # above the marker, which may be longer than the range
        rule = {"type": "rule", "strokeWidth": 1.5, "color": LIGHT["ink"]}
        layers.append({"mark": rule, "encoding": axes | low | high})
    for layer in layers:
        layer["data"] = {"values": rows}
    return layers


def _stroke(look: _Look, width: float) -> Spec:
    return {"stroke": look.colour, "strokeDash": look.dash, "strokeWidth": width}


def _bar(look: _Look, hollow: bool) -> Spec:
    fill = {"type": "rect", "fill": look.colour, "fillOpacity": 0.0 if hollow else look.fill}
    return fill | {"stroke": look.colour, "strokeWidth": 1.2, "strokeDash": [3, 2] if hollow else [1, 0]}


def _marker(look: _Look, hollow: bool) -> Spec:
    mark = {"type": "point", "shape": look.shape, "opacity": 1}
    if hollow:
        return mark | {"size": 80, "fill": LIGHT["page"], "stroke": look.colour, "strokeWidth": 1.8}
    return mark | {"size": look.size, "fill": look.colour, "stroke": LIGHT["page"], "strokeWidth": 0.8}


def _text(text: str, x: float, y: float, mark: Spec) -> Spec:
    """A line of text at pixels."""
    values = {"values": [{"text": text}]}
    fixed = {"type": "text", "x": x, "y": y, "baseline": "middle", "color": LIGHT["ink"]}
    return {"data": values, "mark": fixed | mark, "encoding": {"text": {"field": "text", "type": "nominal"}}}


def _levels(panel: Panel, axis: Axis, axes: dict[str, Spec]) -> list[Spec]:
    """Horizontal lines with names at their end, which are moved apart where they would touch."""
    layers: list[Spec] = []
    edge = math.inf
    for index, (name, y) in enumerate(_heights(panel)):
        source = {"values": [{"y": y, "name": name}]}
        rule = {"type": "rule", "strokeDash": DASHES[2 + index % 3], "color": LIGHT["soft"], "strokeWidth": 1.4}
        layers.append({"data": source, "mark": rule, "encoding": {"y": axes["y"]}})
        at = min(HEIGHT * (1 - place(axis, y)), edge - 13)
        edge = at
        text = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 11, "color": LIGHT["ink"]}
        spot = {"x": "width", "dx": 5, "y": at}
        layers.append({"data": source, "mark": text | spot, "encoding": {"text": {"field": "name", "type": "nominal"}}})
    return layers


def _heights(panel: Panel) -> list[tuple[str, float]]:
    """Levels that can be drawn, lowest first."""
    known = [(name, y) for name, y in panel.levels if y is not None and math.isfinite(y)]
    return sorted((level for level in known if not panel.y_log or level[1] > SMALLEST), key=lambda level: level[1])


def _grouped(rows: list[list[dict[str, Any]]], names: list[str], step: float) -> list[list[dict[str, Any]]]:
    """Rows at the places of their names, beside each other."""
    each = min(0.8 / len(rows), BAR_PX / step)
    start = -each * len(rows) / 2
    found = []
    for index, part in enumerate(rows):
        moved = []
        for row in part:
            left = names.index(str(row["x"])) + start + index * each
            moved.append(row | {"x": left + each / 2, "left": left, "right": left + each * 0.94, "zero": 0})
        found.append(moved)
    return found


def _named(names: list[str], step: float) -> tuple[list[str | list[str]], int]:
    """Labels of groups: in one line, in several, or slanted where a word is wider than a group."""
    letters = (step - 4) / LETTER_PX
    if max(len(name) for name in names) <= letters:
        return list(names), 0
    lines = [_wrapped(name, letters) for name in names]
    if max(len(line) for label in lines for line in label) <= letters:
        return [label if len(label) > 1 else label[0] for label in lines], 0
    return list(names), -30


def _key(figure: Figure, looks: dict[str, _Look], across: float) -> list[Spec]:
    """Names beside what their series look like, in rows; nothing where no series is drawn."""
    entries: dict[tuple[str, bool], tuple[str, bool]] = {}
    for panel in figure.panels:
        for one in panel.series if panel.kind != "cells" else ():
            entries.setdefault((one.name, one.published), (_kind(panel), panel.points))
    if not entries:
        return []
    layers: list[Spec] = []
    x, y = 0.0, 8.0
    named = {name for name, published in entries if not published}
    for (name, published), (kind, points) in entries.items():
        text = f"{name}, published" if published and name in named else name
        wide = 40 + LETTER_PX * len(text) + ENTRY_PX
        if x and x + wide > across:
            x, y = 0.0, y + 19
        layers += _entry(looks[name], kind, published, points, x, y)
        layers.append(_text(text, x + 40, y, {"align": "left", "fontSize": 11}))
        x += wide
    return [{"layer": layers, "width": across, "height": y + 8}]


def _entry(look: _Look, kind: str, published: bool, points: bool, x: float, y: float) -> list[Spec]:
    pixel: Spec = {"type": "quantitative", "scale": None, "axis": None}
    places = {"x": x, "middle": x + 17, "end": x + 34, "left": x + 10, "right": x + 24, "y": y, "foot": y + 8}
    at = {key: pixel | {"field": field} for key, field in (("x", "x"), ("y", "y"))}
    middle = {"x": pixel | {"field": "middle"}, "y": at["y"]}
    layers: list[Spec] = []
    if kind == "lines" and not published:
        rule = {"type": "rule", **_stroke(look, 2)}
        layers.append({"mark": rule, "encoding": at | {"x2": {"field": "end"}}})
    if kind == "bars":
        sides = {"x": pixel | {"field": "left"}, "x2": {"field": "right"}, "y2": {"field": "foot"}}
        layers.append({"mark": _bar(look, published), "encoding": at | sides})
    if points or published or kind != "lines":
        layers.append({"mark": _marker(look, published), "encoding": middle})
    return [{"data": {"values": [places]}} | layer for layer in layers]


def _cells(panel: Panel) -> Spec:
    rows = [one.name for one in panel.series]
    columns = list(dict.fromkeys(str(x) for one in panel.series for x in one.x))
    values = [{"row": one.name} | row for one in panel.series for row in _rows(one, panel)]
    widest = max(len(name) for name in columns) * LETTER_PX + 6
    many = len(columns) > 12
    across, down = (CELL_PX, CELL_PX) if many else (max(26.0, widest), 26.0)
    ticks = {"values": [name for index, name in enumerate(columns) if index % 5 == 4 or index == 0]} if many else {}
    upright = {"values": [name for index, name in enumerate(rows) if index % 5 == 4 or index == 0]} if many else {}
    shades = {"scheme": "cividis", "domain": [0, 1]}
    legend = {"orient": "right", "gradientLength": 110, "gradientStrokeColor": LIGHT["line"]}
    spec: Spec = {
        "data": {"values": [value | {"x": str(value["x"])} for value in values]},
        "mark": {"type": "rect", "stroke": LIGHT["line"], "strokeWidth": 0.5},
        "encoding": {
            "x": {
                "field": "x",
                "type": "ordinal",
                "sort": columns,
                "title": panel.x,
                "axis": {"labelAngle": 0} | ticks,
            },
            "y": {"field": "row", "type": "ordinal", "sort": rows, "title": panel.rows or panel.x, "axis": upright},
            "color": {"field": "y", "type": "quantitative", "title": panel.y, "scale": shades, "legend": legend},
        },
    }
    width, height = across * len(columns), down * len(rows)
    layers = [spec]
    if panel.title:
        layers.append(_text(panel.title, width / 2, -10, {"align": "center", "fontWeight": "bold", "fontSize": 12}))
    return {"layer": layers, "width": width, "height": height, "resolve": {"scale": {"color": "independent"}}}


def _rows(series: Series, panel: Panel) -> list[dict[str, Any]]:
    """One a place: the mean of all seeds, the least and the largest; without numbers where a seed has none."""
    rows: list[dict[str, Any]] = []
    for index, x in enumerate(series.x):
        values = [run[index] for run in series.runs]
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        if panel.y_log:
            known = [value for value in known if value > SMALLEST]
        row: dict[str, Any] = {"x": x, "y": None, "low": None, "high": None}
        if known and len(known) == len(values):
            mean = statistics.geometric_mean if panel.y_log else statistics.fmean
            row |= {"y": mean(known), "low": min(known), "high": max(known)}
        rows.append(row)
    return rows


def _wrapped(text: str, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines

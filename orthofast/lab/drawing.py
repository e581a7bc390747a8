"""Figures as Vega-Lite declarations, written as PNG and SVG: colours that colour-blind readers tell apart, and shapes.

Owns vl-convert, a package of the extra ``lab``. The palette is that of Okabe and Ito (2008) without its yellow; lines
differ by dashes and points by shapes too, so that a black-and-white print says the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import vl_convert

from orthofast.lab.figures import Figure, Panel, Series

Spec = dict[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
DARK_COLOURS = ("#56B4E9", "#FF8C42", "#2FCF9F", "#E7A5C9", "#F2B632", "#8CCBF2", "#B9B9B9")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [1, 3], [10, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
WIDTH, ALONE, HEIGHT, BAR_PX, CELL_PX = 300, 430, 210, 16, 26
PNG_SCALE = 2.0
LIGHT = {"ink": "#1b1f24", "soft": "#46505a", "line": "#c9ced4", "page": "white"}
DARK = {"ink": "#e6e9ee", "soft": "#a0a9b4", "line": "#3d454f", "page": "#1d2127"}
SMALLEST = 1e-300
LARGE = "datum.value >= 1e5 || datum.value < 1e-3"
SHORT = f"datum.label == '' ? '' : format(datum.value, {LARGE} ? '.0e' : '~g')"


def declaration(figure: Figure, title: str, seeds: int, *, dark: bool = False) -> Spec:
    """The figure as a Vega-Lite declaration.

    Args:
        figure: what it shows.
        title: above all panels.
        seeds: how many were run, for the caption.
        dark: colours for a dark page.
    """
    names = list(dict.fromkeys(one.name for panel in figure.panels for one in panel.series if panel.kind != "cells"))
    levels = list(dict.fromkeys(name for panel in figure.panels for name, _ in panel.levels))
    theme = DARK if dark else LIGHT
    band = "one seed" if seeds == 1 else f"mean of {seeds} seeds, band from least to largest"
    subtitle = [*_wrapped(figure.caption, 110 if len(figure.panels) > 1 else 76), band]
    width = ALONE if len(figure.panels) == 1 else WIDTH
    first = next((panel for panel in figure.panels if panel.kind != "cells"), None)
    panels = [_panel(panel, names, levels, width, dark, panel is first) for panel in figure.panels]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": title, "subtitle": subtitle, "anchor": "start", "offset": 12},
        "concat": panels,
        "columns": 2,
        "spacing": 28,
        "background": theme["page"],
        # domains and ranges are alike everywhere, so that one legend serves
        "resolve": {"scale": {"color": "independent", "shape": "independent", "strokeDash": "independent"}},
        "config": {
            "font": "DejaVu Sans, Helvetica, Arial, sans-serif",
            "view": {"stroke": None},
            "title": {
                "color": theme["ink"],
                "subtitleColor": theme["soft"],
                "fontSize": 14,
                "subtitleFontSize": 11,
                "subtitlePadding": 4,
            },
            "axis": {
                "labelColor": theme["ink"],
                "titleColor": theme["soft"],
                "titleFontWeight": "normal",
                "labelFontSize": 11,
                "labelFlush": False,
                "titleFontSize": 12,
                "domainColor": theme["soft"],
                "tickColor": theme["soft"],
                "gridColor": theme["line"],
                "gridOpacity": 0.6,
            },
            "legend": {
                "labelColor": theme["ink"],
                "titleColor": theme["soft"],
                "labelFontSize": 11,
                "labelLimit": 260,
                "symbolSize": 90,
                "symbolStrokeWidth": 2,
                "orient": "bottom",
                "columns": 3 if len(figure.panels) > 1 else 2,
            },
        },
    }


def pictures(figure: Figure, title: str, seeds: int) -> dict[str, str | bytes]:
    """The files of a figure by name: PNG and SVG for print, SVG for a dark page."""
    light = declaration(figure, title, seeds)
    return {
        "figure.svg": str(vl_convert.vegalite_to_svg(light)),
        "figure.png": bytes(vl_convert.vegalite_to_png(light, scale=PNG_SCALE)),
        "figure-dark.svg": str(vl_convert.vegalite_to_svg(declaration(figure, title, seeds, dark=True))),
    }


def _panel(panel: Panel, names: list[str], levels: list[str], across: int, dark: bool, legend: bool) -> Spec:
    if panel.kind == "cells":
        return _cells(panel, dark)
    values = [row for one in panel.series for row in _rows(one, panel)]
    drawn: Spec = {"title": {"text": panel.title, "fontSize": 12, "anchor": "middle"}} if panel.title else {}
    colour = _scaled("series", names, DARK_COLOURS if dark else COLOURS, legend)
    x_kind = "nominal" if panel.kind == "bars" else "quantitative"
    x_axis: Spec = {"field": "x", "type": x_kind, "title": panel.x, "scale": {"nice": False, "zero": False}}
    y_axis: Spec = {"field": "y", "type": "quantitative", "title": panel.y, "scale": {"zero": panel.kind == "bars"}}
    for axis, log in ((x_axis, panel.x_log), (y_axis, panel.y_log)):
        if log:
            axis["scale"] = {"type": "log", "nice": axis is y_axis}
            axis["axis"] = {"tickCount": 6, "labelExpr": SHORT}
    if panel.kind == "bars":
        layers = _bars(panel, x_axis, y_axis, colour)
    else:
        layers = _lines(panel, names, x_axis, y_axis, colour, legend)
    layers += [_level(name, y, levels, dark) for name, y in panel.levels]
    width: Any = across
    if panel.kind == "bars":
        width = {"step": BAR_PX * max(1, len(panel.series)) + 14, "for": "position"}
    return drawn | {"data": {"values": values}, "layer": layers, "width": width, "height": HEIGHT}


def _lines(panel: Panel, names: list[str], x_axis: Spec, y_axis: Spec, colour: Spec, shown: bool) -> list[Spec]:
    dash = _scaled("series", names, DASHES, shown)
    shape = _scaled("series", names, SHAPES, shown)
    ours, theirs = {"filter": "!datum.published"}, {"filter": "datum.published"}
    band_y = y_axis | {"field": "low"}
    # dashes around filled shapes would fray them
    look: Spec = {"symbolStrokeWidth": 0} if panel.points else {"symbolType": "stroke", "symbolSize": 500}
    legend: Spec = {"legend": look} if shown else {}
    layers: list[Spec] = [
        {
            "transform": [ours],
            "mark": {"type": "area", "opacity": 0.2},
            "encoding": {"x": x_axis, "y": band_y, "y2": {"field": "high"}, "fill": colour | {"legend": None}},
        },
        {
            "transform": [ours],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {"x": x_axis, "y": y_axis, "color": colour | legend, "strokeDash": dash | legend},
        },
    ]
    if panel.points:
        layers.append(
            {
                "transform": [ours],
                "mark": {"type": "point", "filled": True, "size": 46, "opacity": 1},
                "encoding": {"x": x_axis, "y": y_axis, "color": colour | legend, "shape": shape | legend},
            }
        )
    if any(one.published for one in panel.series):
        layers.append(
            {
                "transform": [theirs],
                "mark": {"type": "point", "filled": False, "size": 90, "strokeWidth": 2, "opacity": 1},
                "encoding": {"x": x_axis, "y": y_axis, "color": colour | legend, "shape": shape | legend},
            }
        )
    return layers


def _bars(panel: Panel, x_axis: Spec, y_axis: Spec, colour: Spec) -> list[Spec]:
    order = list(dict.fromkeys(str(x) for one in panel.series for x in one.x))
    x_axis = x_axis | {"sort": order, "axis": {"labelAngle": 0 if len(order) < 5 else -30, "labelLimit": 150}}
    x_axis.pop("scale", None)
    offset = {"field": "series", "type": "nominal", "sort": colour["scale"]["domain"]}
    shared = {"x": x_axis, "xOffset": offset}
    return [
        {
            "mark": {"type": "bar", "stroke": "#00000066", "strokeWidth": 0.5},
            "encoding": shared | {"y": y_axis, "color": colour},
        },
        {
            "transform": [{"filter": "datum.low < datum.high"}],
            "mark": {"type": "rule", "strokeWidth": 1.5, "color": "#00000099"},
            "encoding": shared | {"y": y_axis | {"field": "low"}, "y2": {"field": "high"}},
        },
    ]


def _cells(panel: Panel, dark: bool) -> Spec:
    rows = [one.name for one in panel.series]
    columns = list(dict.fromkeys(str(x) for one in panel.series for x in one.x))
    values = [{"row": one.name} | row for one in panel.series for row in _rows(one, panel)]
    return {
        "data": {"values": [value | {"x": str(value["x"])} for value in values]},
        "mark": {"type": "rect", "stroke": (DARK if dark else LIGHT)["line"]},
        "encoding": {
            "x": {"field": "x", "type": "ordinal", "sort": columns, "title": panel.x, "axis": {"labelAngle": 0}},
            "y": {"field": "row", "type": "ordinal", "sort": rows, "title": panel.title or None},
            "color": {
                "field": "y",
                "type": "quantitative",
                "title": panel.y,
                "scale": {"scheme": "cividis", "domain": [0, 1]},
                "legend": {"orient": "right", "columns": 1},
            },
        },
        "width": {"step": CELL_PX},
        "height": {"step": CELL_PX},
        "resolve": {"scale": {"color": "independent"}},
    }


def _level(name: str, y: float, levels: list[str], dark: bool) -> Spec:
    """A horizontal line with its name on it."""
    theme = DARK if dark else LIGHT
    dash = DASHES[2 + levels.index(name) % 3]
    source = {"values": [{"y": y, "name": name}]}
    mark = {"type": "rule", "strokeDash": dash, "color": theme["soft"], "strokeWidth": 1.2}
    at = {"y": {"field": "y", "type": "quantitative"}}
    text = {"type": "text", "align": "left", "baseline": "middle", "dx": 4, "fontSize": 10}
    return {
        "data": source,
        "layer": [
            {"mark": mark, "encoding": at},
            {
                "mark": text | {"color": theme["soft"], "x": "width"},
                "encoding": at | {"text": {"field": "name", "type": "nominal"}},
            },
        ],
    }


def _rows(series: Series, panel: Panel) -> list[dict[str, Any]]:
    rows = []
    for index, x in enumerate(series.x):
        values = [run[index] for run in series.runs]
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        if panel.y_log:
            known = [value for value in known if value > SMALLEST]
        if not known or len(known) < len(values):
            continue
        rows.append(
            {
                "x": x,
                "y": statistics.fmean(known),
                "low": min(known),
                "high": max(known),
                "series": series.name,
                "published": series.published,
            }
        )
    return rows


def _scaled(field: str, domain: list[str], values: Sequence[Any], legend: bool) -> Spec:
    spread = [values[index % len(values)] for index in range(len(domain))]
    found: Spec = {"field": field, "type": "nominal", "title": None, "scale": {"domain": domain, "range": spread}}
    return found if legend else found | {"legend": None}


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines

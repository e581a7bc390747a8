"""Figures: readable axes, bars that can be seen, series told apart without colour, gaps, dark colours, rounding."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from orthofast.errors import InputError
from orthofast.lab import drawing
from orthofast.lab.axes import Axis, axis_of, place, written
from orthofast.lab.drawing import COLOURS, DARK, DARK_COLOURS, DARK_OF, LIGHT, declaration, pictures
from orthofast.lab.experiment import Absent, Experiment, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.page import render
from orthofast.lab.runs import Outcome
from orthofast.lab.svg import embedded, recoloured, renumbered, rounded
from orthofast.lab.verdict import below, judge, not_run

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def svg_of(*panels: Panel, seeds: int = 1) -> str:
    return str(pictures(Figure(panels), "A title", seeds)["figure.svg"])


def texts(svg: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(r">([^<>]+)</(?:text|tspan)>", svg)]


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Centres of the markers filled with a colour, the key's among them."""
    found = re.findall(rf'<path transform="translate\(([\d.-]+),([\d.-]+)\)"[^>]*fill="{colour}"', svg)
    return [(float(x), float(y)) for x, y in found]


# Axes


@pytest.mark.parametrize(
    ("low", "high"), [(1e-14, 100), (2e-7, 5e-6), (0.04, 0.19), (0.98, 1.02), (1, 1e10), (3, 3), (0.9, 1100), (2, 70)]
)
@pytest.mark.parametrize("upright", [True, False])
def test_a_logarithmic_axis_has_a_few_short_labels_that_are_its_ticks(low: float, high: float, upright: bool) -> None:
    axis = axis_of([low, high], log=True, upright=upright, length=210 if upright else 300)
    assert 2 <= len(axis.ticks) <= 10
    assert list(axis.ticks) == sorted(axis.ticks)
    assert axis.low <= low <= high <= axis.high
    assert all(axis.low * (1 - 1e-9) <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        assert isinstance(label, str)
        assert len(label) <= 9
        assert value(label) == pytest.approx(tick, rel=1e-3)


def value(label: str) -> float:
    """The number that a label says."""
    plain, raised = re.fullmatch(r"([−\d.·]+?)([⁻⁰¹²³⁴-⁹]*)", label).groups()  # type: ignore[union-attr]
    if not raised:
        return float(plain.replace("−", "-"))
    factor = plain.removesuffix("10").removesuffix("·").replace("−", "-")
    return float(factor or 1) * 10.0 ** float(raised.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))


def test_labels_of_a_lying_axis_do_not_touch() -> None:
    axis = axis_of([0.0003, 0.001, 0.003, 0.05, 0.1, 0.2], log=True, length=300, measured=True, upright=False)
    assert len(axis.ticks) >= 4
    edges = [
        (300 * place(axis, tick) - 3.3 * len(label), 300 * place(axis, tick) + 3.3 * len(label))
        for tick, label in zip(axis.ticks, axis.labels, strict=True)
    ]
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))


def test_a_few_measured_places_bear_the_ticks_and_whole_numbers_stay_whole() -> None:
    assert axis_of([1, 2, 3], measured=True, upright=False, length=300).labels == ("1", "2", "3")
    assert axis_of([16, 64, 512], log=True, measured=True, upright=False, length=300).labels == ("16", "64", "512")
    layers = axis_of([float(layer) for layer in range(1, 14)], measured=True, upright=False, length=300)
    assert all(tick == int(tick) for tick in layers.ticks)
    assert written([-0.5, 0.0], log=False) == ["−0.5", "0.0"]


def test_the_labels_of_the_picture_are_those_of_the_axis() -> None:
    values = [1e-14, 1e-5, 1e4]
    found = texts(svg_of(Panel("layer", "eigenvalue", [Series("one", [1, 2, 3], [values])], y_log=True)))
    axis = axis_of(values, log=True)
    assert set(axis.labels) <= set(found)
    assert {"layer", "eigenvalue", "one", "1", "2", "3"} <= set(found)
    assert not [text for text in found if re.search(r"\de[+-]?\d|\d{6,}", text)]


# Bars


def test_bars_on_a_logarithmic_axis_are_marks_at_their_values() -> None:
    runs = [[0.001, 0.1, 10.0], [0.004, 0.4, 40.0]]
    panel = Panel("optimiser", "loss", [Series("one", ["a", "b", "c"], runs)], kind="bars", y_log=True)
    layers = panels_of(declaration(Figure([panel]), "A title", 2))[0]["layer"]
    assert "rect" not in {layer["mark"]["type"] for layer in layers}  # it would begin at 0, which is nowhere
    svg = svg_of(panel, seeds=2)
    inside = marks(svg, COLOURS[0])[1:]
    assert len(inside) == 3
    heights = [y for _, y in inside]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)  # equal factors
    assert heights[0] - heights[1] > 30
    ranges = re.findall(r'<line transform="[^"]*" x2="0" y2="([\d.-]+)" stroke="#1b1f24"', svg)
    assert len(ranges) == 3
    assert all(abs(float(length)) > 5 for length in ranges)


def test_bars_begin_at_zero_and_end_at_their_values_beside_each_other() -> None:
    series = [Series("one", ["a", "b"], [[1.0, 3.0]]), Series("two", ["a", "b"], [[2.0, None]])]
    spec = declaration(Figure([Panel("x", "y", series, kind="bars")]), "A title", 1)
    layers = [layer for layer in panels_of(spec)[0]["layer"] if layer["mark"]["type"] == "rect"]
    domain = layers[0]["encoding"]["y"]["scale"]["domain"]
    assert domain[0] == 0
    assert domain[1] >= 3
    one, two = (layer["data"]["values"] for layer in layers)
    assert [(row["zero"], row["y"]) for row in one] == [(0, 1.0), (0, 3.0)]
    assert one[0]["right"] <= two[0]["left"] < two[0]["right"] < one[1]["left"]
    assert two[1]["y"] is None
    assert len(marks(svg_of(Panel("x", "y", series, kind="bars")), COLOURS[1])) == 1 + 1  # one in the key


def panels_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["vconcat"][-1]["concat"]
    return found


# Series


@pytest.mark.parametrize("kind", ["lines", "bars", "dots"])
def test_series_are_told_apart_without_colour(kind: str) -> None:
    x: list[float | str] = ["a", "b"] if kind != "lines" else [1, 2]
    series = [Series(f"s{index}", x, [[1.0 + index, 2.0]]) for index in range(10)]
    series += [Series(f"s{index}, published", x, [[1.5, 2.5]], published=True) for index in range(2)]
    panel = panels_of(declaration(Figure([Panel("x", "y", series, kind=kind)]), "A title", 1))[0]
    points = [layer["mark"] for layer in panel["layer"] if layer["mark"]["type"] == "point"]
    looks = [(mark["shape"], mark["fill"] == LIGHT["page"]) for mark in points]
    assert len(points) == len(series)
    dashes = [json.dumps(layer["mark"]["strokeDash"]) for layer in panel["layer"] if layer["mark"]["type"] == "line"]
    if kind == "lines":
        dashes += ["", ""]
        assert len(set(dashes[:7])) == 7
        assert len(set(zip(looks, dashes, strict=True))) == len(series)
    assert len(set(looks[:7])) == 7
    # a published one is the measured one's marker, hollow
    assert [looks[10], looks[11]] == [(looks[0][0], True), (looks[1][0], True)]
    assert points[10]["stroke"] == points[0]["fill"]


@pytest.mark.parametrize(("colours", "page"), [(COLOURS, LIGHT["page"]), (DARK_COLOURS, DARK["page"])])
def test_every_colour_stands_out_from_its_page(colours: tuple[str, ...], page: str) -> None:
    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in colours:
        pair = sorted((light(colour), light(page)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3, colour  # WCAG 1.4.11


def test_the_mean_of_seeds_its_range_and_a_gap_where_one_has_no_number() -> None:
    runs = [[1.0, None, 2.0, 4.0], [3.0, 5.0, 8.0, math.inf]]
    panel = Panel("layer", "loss", [Series("one", [1, 2, 3, 4], runs)])
    rows = drawing._rows(panel.series[0], panel)
    assert [(row["y"], row["low"], row["high"]) for row in rows] == [
        (2.0, 1.0, 3.0),
        (None, None, None),
        (5.0, 2.0, 8.0),
        (None, None, None),
    ]
    logarithmic = Panel("layer", "loss", panel.series, y_log=True)
    assert [row["y"] for row in drawing._rows(panel.series[0], logarithmic)][2] == pytest.approx(4.0)
    svg = svg_of(panel, seeds=2)
    lines = re.findall(rf'<path d="([^"]*)"[^>]*stroke="{COLOURS[0]}"', svg)
    assert [line.count("M") for line in lines] == [2]
    words = " ".join(texts(svg))
    assert "Mean of 2 seeds; bands from the least to the largest; a gap where a seed has no number." in words
    assert "geometric on logarithmic axes" in " ".join(texts(svg_of(logarithmic, seeds=2)))
    bars = Panel("x", "y", [Series("one", ["a"], [[1.0], [2.0]])], kind="bars")
    assert "thin lines from the least to the largest" in " ".join(texts(svg_of(bars, seeds=2)))


def test_names_of_levels_do_not_overlap() -> None:
    levels = [("upper", 1.001), ("lower", 1.0), ("far", 0.0)]
    svg = svg_of(Panel("layer", "gap", [Series("one", [1, 2], [[0.0, 1.0]])], levels=levels))
    at = {
        name: float(found[1])
        for name in ("upper", "lower", "far")
        if (found := re.search(rf"<text[^>]*translate\([\d.]+,([\d.-]+)\)[^>]*>{name}</text>", svg))
    }
    assert at["lower"] - at["upper"] >= 12
    assert at["far"] - at["lower"] > 100


@pytest.mark.parametrize(("x", "y", "kind"), [("", "y", "lines"), ("x", " ", "bars"), ("x", "y", "pie")])
def test_a_panel_needs_titles_and_a_kind(x: str, y: str, kind: str) -> None:
    with pytest.raises(InputError, match="of a panel needs"):
        Panel(x, y, [], kind=kind)


# Text of pictures

EVERYTHING = Figure(
    [
        Panel(
            "step", "loss (nats)", [Series(f"s{i}", [1, 2, 3], [[0.1, 1 / 3, i], [0.2, 0.7, i + 1]]) for i in range(3)]
        ),
        Panel("x", "y", [Series("s1", ["a"], [[1 / 7], [2.0]])], "bars", "bars", levels=[("half", 0.5)]),
        Panel(
            "vector",
            "|cos|",
            [Series("1", ["1", "2"], [[1.0, 1 / 3]]), Series("2", ["1", "2"], [[0.1, 1.0]])],
            "",
            "cells",
        ),
    ],
    "Less < more & so on.",
)


def test_dark_pictures_are_the_light_ones_in_other_colours() -> None:
    assert len(set(DARK_OF)) == len(DARK_OF) == len(LIGHT) + len(COLOURS)
    drawn = pictures(EVERYTHING, "A title", 2)
    spec = declaration(EVERYTHING, "A title", 2, dark=True)
    assert drawn["figure-dark.svg"] == renumbered(rounded(str(vl_convert.vegalite_to_svg(spec))))
    assert drawn["figure-dark.svg"] != drawn["figure.svg"]
    left = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', str(drawn["figure-dark.svg"]))) & set(LIGHT.values())
    assert not left
    swapped = {"#111111": "#222222", "#222222": "#111111"}
    assert recoloured('<a fill="#111111" stroke="#222222"/>', swapped) == '<a fill="#222222" stroke="#111111"/>'


def test_rounding_moves_no_coordinate_by_more_than_half_of_its_last_digit() -> None:
    exact = str(vl_convert.vegalite_to_svg(declaration(EVERYTHING, "A title", 2)))
    short = rounded(exact)
    assert len(short) < len(exact)
    before, after = NUMBER.findall(exact), NUMBER.findall(short)
    assert len(before) == len(after) > 500
    moved = [abs(float(one) - float(other)) for one, other in zip(before, after, strict=True)]
    assert 0 < max(moved) <= 0.005 + 1e-9
    assert texts(exact) == texts(short)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, found or "") for name, found in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_each_picture_once_without_scripts_or_anything_from_outside(tmp_path: Path) -> None:
    def outcome(key: str) -> Outcome:
        folder = tmp_path / key
        folder.mkdir()
        for name, content in pictures(EVERYTHING, f"{key} <b>", 2).items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        checks = [below("PII & more", [0.25, 0.75], 1.0, 0.125)]
        entry = Experiment(
            key,
            'a "title"',
            "It is.",
            lambda s: {},
            lambda r: judge(checks, "A note."),
            lambda r: EVERYTHING,
            size="digits.",
        )
        return Outcome(entry, judge(checks, "A note."), 2, folder)

    gone = Absent("S2-T1", "a table", "A claim.", "no data", {"error": "3.14 ± 0.15"})
    page = render([outcome("S1-F1"), outcome("S1-F2a"), Outcome(gone, not_run("no data"), 0, None)], Settings())
    reader = _Reader()
    reader.feed(page)
    assert reader.tags.count("svg") == 2
    assert not {"script", "img", "object", "iframe", "embed", "b"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    for name, found in reader.attributes:
        if name in ("href", "src", "xlink:href", "srcset"):
            assert not re.match(r"(https?:|//|javascript:)", found), found
    assert "@import" not in page
    assert re.findall(r"url\(([^)]*)", page) == [f"#{one}" for one in re.findall(r"url\(#([^)]*)", page)]
    names = [found for name, found in reader.attributes if name == "id"]
    assert len(names) == len(set(names))
    assert {found for _, found in reader.attributes for found in re.findall(r"url\(#([^)]*)", found)} <= set(names)
    policy = [found for name, found in reader.attributes if name == "content" and "default-src" in found]
    assert policy[0].startswith("default-src 'none'")
    assert "script" not in policy[0]
    told = " ".join(reader.text)
    for words in ("0.5 ± 0.3536", "0.125", "A note.", "2 seeds", "3.14 ± 0.15", "digits", "small", "2 reproduced"):
        assert words in told, words
    for light, dark in DARK_OF.items():
        assert f'figure [fill="{light}"] {{ fill: {dark}; }}' in page


def test_a_picture_on_a_page_keeps_every_text_and_mark() -> None:
    svg = str(pictures(EVERYTHING, "A title", 2)["figure.svg"])
    shorter = embedded(svg, "a name", "S1-F1")
    assert len(shorter) < 0.8 * len(svg)
    assert texts(shorter) == texts(svg)
    for colour in (*COLOURS[:3], *LIGHT.values()):
        for attribute in ("fill", "stroke"):
            assert shorter.count(f'{attribute}="{colour}"') == svg.count(f'{attribute}="{colour}"'), colour


def test_an_axis_of_nothing_still_is_one() -> None:
    empty = axis_of([], log=True)
    assert isinstance(empty, Axis)
    assert empty.low < empty.high
    svg_of(Panel("x", "y", [Series("one", [1, 2], [[None, None]])], y_log=True))

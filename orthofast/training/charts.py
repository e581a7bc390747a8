"""Charts of a conditioning report. Loaded by the report when one is asked for: it imports altair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair

from orthofast.errors import InputError

if TYPE_CHECKING:
    from orthofast.training.report import Report

SIDES = {"x": "inputs", "g": "output gradients", "F": "Kronecker product"}
SUFFIXES = (".png", ".svg", ".html")
HEIGHT = 14  # pixels a layer


def of_conditioning(report: Report, p: float, path: Path | None) -> Any:
    """Two panels, layers from top to bottom in the order of their calls: largest eigenvalues, and kappa_p.

    Args:
        report: the numbers.
        p: which kappa.
        path: where to save; None does not.
    """
    if path is not None and path.suffix not in SUFFIXES:
        raise InputError(f"path needs to end in {', '.join(SUFFIXES)}, got {path.name}")
    values: list[dict[str, Any]] = []
    for name, row in report.layers.items():
        for side, of in SIDES.items():
            kappa = getattr(row, f"kappa_{side}").get(p, math.nan)
            values.append(
                {
                    "layer": name or "(model)",
                    "of": of,
                    "lambda_max": _positive(getattr(row, f"lambda_max_{side}")),
                    "kappa": _positive(kappa),
                    "lower bound": f"kappa_{side}[{p}]" in row.lower_bounds,
                }
            )
    eigenvalues = _panel(report, values, "lambda_max", "largest eigenvalue")
    kappas = _panel(report, values, "kappa", f"kappa, p = {100 * p:g} %")
    chart: Any = altair.hconcat(eigenvalues, kappas)
    chart = chart.properties(title=f"Conditioning of layers: labels {report.labels}, N = {report.n}")
    if path is not None:
        chart.save(str(path), **({"inline": True} if path.suffix == ".html" else {}))
    return chart


def _panel(report: Report, values: list[dict[str, Any]], field: str, title: str) -> Any:
    names = [name or "(model)" for name in report.layers]
    shapes = altair.Scale(domain=[False, True], range=["circle", "triangle-right"])
    marks = (
        altair.Chart(altair.InlineData(values=values))
        .mark_point(filled=True, size=50)
        .encode(
            x=altair.X(f"{field}:Q", title=title, scale=altair.Scale(type="log")),
            y=altair.Y("layer:N", sort=names, title=None),
            color=altair.Color("of:N", title="of", sort=list(SIDES.values())),
            shape=altair.Shape("lower bound:N", scale=shapes),
            tooltip=["layer:N", "of:N", altair.Tooltip(f"{field}:Q", format=".4g"), "lower bound:N"],
        )
    )
    return marks.properties(width=260, height=max(60, HEIGHT * len(names)))


def _positive(value: float) -> float | None:
    """A value a logarithmic axis can show."""
    return value if value > 0 and math.isfinite(value) else None

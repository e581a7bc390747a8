"""Charts of a comparison: bars of what became of each role, a heat map of layer by role."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orthofast.scan.charts import (
    CELL_PX,
    CHANCE,
    HIGH,
    LABELLED_LAYERS,
    LOW,
    ROOM_FOR_LABELS,
    Spec,
    library,
    specified,
)
from orthofast.scan.page_data import Entry, brief, orders, short

if TYPE_CHECKING:
    from orthofast.scan.comparison import Comparison

LEAST_SPAN = 0.01  # colours of a change of 1 % are the strongest where nothing changed more
BAR_PX = 24


def charts_of(comparison: Comparison) -> tuple[dict[str, Spec], dict[str, list[Entry]]]:
    """Chart id -> declaration, and the data they name: bars and heat maps of each side."""
    specs: dict[str, Spec] = {}
    datasets: dict[str, list[Entry]] = {}
    groups = {side: _cells(comparison, side) for side in comparison.sides()}
    span = max([LEAST_SPAN, *(abs(entry["change"]) for entries in groups.values() for entry in entries)])
    for side, entries in groups.items():
        bars = [
            {
                "role": short(role),
                "least": brief(shift.least),
                "change": brief(shift.mean),
                "most": brief(shift.most),
                "before": brief(shift.before),
                "after": brief(shift.after),
                "count": shift.count,
            }
            for (found, role), shift in comparison.by_role().items()
            if found == side and shift.mean == shift.mean
        ]
        if bars:
            datasets[f"bars-{side}"] = bars
            specs[f"bars-{side}"] = _bars(f"bars-{side}", [str(bar["role"]) for bar in bars])
        if entries:
            datasets[f"moved-{side}"] = entries
            specs[f"moved-{side}"] = _heat_map(f"moved-{side}", *orders(entries), span)
    return specs, datasets


def _cells(comparison: Comparison, side: str) -> list[Entry]:
    """One entry per layer and role: the mean change where a layer has several matrices."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for change in comparison.whole():
        if change.vectors == side and change.layer is not None and change.role and change.relative is not None:
            groups.setdefault((change.layer, change.role), []).append(change)
    return [
        {
            "layer": layer,
            "role": short(role),
            "change": brief(sum(change.relative for change in found) / len(found)),
            "before": brief(sum(change.before for change in found) / len(found)),
            "after": brief(sum(change.after for change in found) / len(found)),
            "name": found[0].name if len(found) == 1 else f"{len(found)} matrices",
        }
        for (layer, role), found in groups.items()
    ]


def _bars(data: str, roles: list[str]) -> Spec:
    altair = library()
    source = altair.NamedData(name=data)
    down = altair.Y("role:N", sort=roles, title=None, axis=altair.Axis(labelLimit=120))
    tooltip = [
        altair.Tooltip("role:N"),
        altair.Tooltip("before:Q", title="mean PII before", format=".5f"),
        altair.Tooltip("after:Q", title="mean PII after", format=".5f"),
        altair.Tooltip("change:Q", title="mean change", format="+.2%"),
        altair.Tooltip("least:Q", title="smallest", format="+.2%"),
        altair.Tooltip("most:Q", title="largest", format="+.2%"),
        altair.Tooltip("count:Q", title="matrices"),
    ]
    axis = altair.Axis(format="+.2~%", tickCount=5, labelOverlap=True)
    colour = altair.condition("datum.change < 0", altair.value("#4393c3"), altair.value("#d6604d"))
    bars = (
        altair.Chart(source)
        .mark_bar(height={"band": 0.7})
        .encode(
            y=down, x=altair.X("change:Q", title="change of PII, relative", axis=axis), color=colour, tooltip=tooltip
        )
    )
    reach = (
        altair.Chart(source)
        .mark_rule(color="#888", strokeWidth=1.5)
        .encode(y=down, x="least:Q", x2="most:Q", tooltip=tooltip)
    )
    described = (
        "Bars of the mean relative change of PII by role; the thin line reaches from the smallest to the largest"
    )
    drawn = altair.layer(bars, reach).properties(
        width="container", height=max(3, len(roles)) * BAR_PX, description=described
    )
    return specified(drawn)


def _heat_map(data: str, layers: list[str], roles: list[str], span: float) -> Spec:
    altair = library()
    source = altair.NamedData(name=data)
    tooltip = [
        altair.Tooltip("name:N", title="matrix"),
        altair.Tooltip("layer:N"),
        altair.Tooltip("role:N"),
        altair.Tooltip("before:Q", title="PII before", format=".5f"),
        altair.Tooltip("after:Q", title="PII after", format=".5f"),
        altair.Tooltip("change:Q", format="+.3%"),
    ]
    scale = altair.Scale(domain=[-span, 0, span], range=[LOW, CHANCE, HIGH], interpolate="lab", clamp=True)
    legend = altair.Legend(title="change of PII", orient="bottom", gradientLength=200, format="+.2~%", tickCount=5)
    across = altair.X("role:N", sort=roles, title=None, axis=altair.Axis(orient="top", labelAngle=-35, labelLimit=120))
    down = altair.Y("layer:N", sort=layers, title="layer", axis=altair.Axis(labelLimit=110, labelOverlap=True))
    drawn = (
        altair.Chart(source)
        .mark_rect(stroke=None)
        .encode(x=across, y=down, color=altair.Color("change:Q", scale=scale, legend=legend), tooltip=tooltip)
    )
    height = max(3, len(layers)) * CELL_PX if len(layers) <= LABELLED_LAYERS else min(1200, len(layers) * 10)
    described = "Heat map of the relative change of PII, layer by role"
    return specified(drawn.properties(width="container", height=height, description=described)) | ROOM_FOR_LABELS

"""Axes of figures: which range is shown, where ticks stand and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LETTER_PX = 6.7  # mean width of a letter of a tick's label
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STEPS = (1.0, 2.0, 5.0, 10.0)
FEW = 10  # measured places that may all bear a tick


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low: its beginning, in the numbers' unit.
        high: its end.
        log: whether it is logarithmic.
        ticks: where they stand, rising.
        labels: their text, one a tick; a label of several lines is a list of them.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    labels: tuple[str | list[str], ...]


def axis_of(
    values: Sequence[float],
    *,
    log: bool = False,
    zero: bool = False,
    margin: float = 0.04,
    length: float = 210.0,
    measured: bool = False,
    upright: bool = True,
) -> Axis:
    """The axis that shows all values.

    Args:
        values: finite ones; above 0 on a logarithmic axis.
        log: logarithmic.
        zero: 0 is on it; of a linear axis.
        margin: room at both ends, as a share of the axis.
        length: in pixels.
        measured: ticks stand at the values where those are few and short.
        upright: whether it stands; a lying axis needs room for the labels' width.

    >>> axis_of([1e-7, 1e5], log=True).labels
    ('10⁻⁶', '10⁻⁴', '10⁻²', '10⁰', '10²', '10⁴')
    >>> axis_of([0.04, 0.2], log=True).labels
    ('0.05', '0.1', '0.2')
    >>> axis_of([1, 2, 3], measured=True).ticks
    (1, 2, 3)
    """
    shown = sorted({*values, 0.0}) if zero and not log else sorted(set(values))
    if not shown or (zero and shown == [0.0]):  # bars of no height
        shown = [1.0, 10.0] if log else [0.0, 1.0]
    low, high = (math.log10(shown[0]), math.log10(shown[-1])) if log else (shown[0], shown[-1])
    room = (high - low) * margin if high > low else 0.15 if log else 0.1 * abs(high) or 1.0
    start = low - (0.0 if zero and low == 0 else room)
    end = high + (0.0 if zero and high == 0 else room)
    most = max(3, int(length / (30 if upright else 48)))
    if measured and _short(shown):
        ticks: Sequence[float] = shown
    elif log:
        ticks = _decades(start, end, most)
    else:
        ticks = _even(start, end, most, whole=measured and all(value == int(value) for value in shown))
    labels = written(ticks, log)
    bounds = (10**start, 10**end) if log else (start, end)
    axis = Axis(*bounds, log, tuple(ticks), tuple(labels))
    return axis if upright else _apart(axis, length)


def place(axis: Axis, value: float) -> float:
    """Where a value stands on an axis: 0 at its beginning, 1 at its end."""
    if axis.log:
        return math.log(value / axis.low) / math.log(axis.high / axis.low)
    return (value - axis.low) / (axis.high - axis.low)


def written(ticks: Sequence[float], log: bool) -> list[str]:
    """Labels that tell all ticks apart, in powers of ten where numbers would be long.

    >>> written([1e-5, 2e-5], True), written([0.5, 1.0], False), written([1e10], False)
    (['10⁻⁵', '2·10⁻⁵'], ['0.5', '1.0'], ['10¹⁰'])
    """
    sizes = [abs(tick) for tick in ticks if tick]
    if sizes and (max(sizes) >= 1e5 or (min(sizes) < 1e-4 and (log or max(sizes) < 1e-3))):
        return [_power(tick) for tick in ticks]
    if log or not sizes:
        return [_minus(f"{tick:g}") for tick in ticks]
    texts = [f"{tick:.6g}" for tick in ticks]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return [_minus(f"{tick:.{decimals}f}") for tick in ticks]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.3e}".split("e")
    size = f"10{str(int(exponent)).translate(RAISED)}"
    factor = f"{float(mantissa):g}"
    return size if factor == "1" else _minus(f"{factor}·{size}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _short(values: Sequence[float]) -> bool:
    return len(values) <= FEW and all(len(f"{value:g}") <= 6 and float(f"{value:g}") == value for value in values)


def _even(start: float, end: float, most: int, whole: bool = False) -> list[float]:
    rough = (end - start) / most
    size = 10 ** math.floor(math.log10(rough))
    step = next(step * size for step in STEPS if step * size >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first = math.ceil(start / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, math.floor(end / step + 1e-9) + 1)]


def _decades(start: float, end: float, most: int) -> list[float]:
    """Powers of ten, evenly; also 2 and 5 of each, or more, on a short axis."""
    powers = range(math.ceil(start - 1e-9), math.floor(end + 1e-9) + 1)
    if len(powers) >= 3:
        step = next(step for step in (1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500) if len(powers) <= step * most)
        return [float(f"1e{power}") for power in powers if power % step == 0]
    for factors in ((1, 2, 5), (1, 2, 3, 5, 7)):
        every = [(power, factor) for power in range(math.floor(start), math.ceil(end) + 1) for factor in factors]
        found = [float(f"{f}e{p}") for p, f in every if start - 1e-9 <= p + math.log10(f) <= end + 1e-9]
        if len(found) >= 3:
            return found
    return _even(10**start, 10**end, most)


def _apart(axis: Axis, length: float) -> Axis:
    """Only ticks whose labels do not touch, from the first one on."""
    kept: list[int] = []
    edge = -math.inf
    for index, (tick, label) in enumerate(zip(axis.ticks, axis.labels, strict=True)):
        half = LETTER_PX * len(label) / 2
        middle = place(axis, tick) * length
        if middle - half >= edge:
            kept.append(index)
            edge = middle + half + 6
    chosen = tuple(axis.ticks[index] for index in kept)
    return Axis(axis.low, axis.high, axis.log, chosen, tuple(axis.labels[index] for index in kept))

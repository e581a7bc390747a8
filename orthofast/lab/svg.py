"""Text of SVG pictures: colours of a dark page, coordinates rounded, and what a page needs no copy of left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

DECIMALS = 2
_PAINT = re.compile(r'\b(fill|stroke|stop-color)="(#[0-9a-fA-F]{6})"')
_PLACED = re.compile(r'\b(d|x|y|x1|x2|y1|y2|width|height|transform|points)="([^"]*)"')
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_EMPTY = re.compile(r"<g(?: [^<>]*)?></g>|<path[^<>]*(?:d=\"\"|d=\"M0,0h0v0h0Z\")[^<>]*/>")
_FRAME = re.compile(r'<path class="(?:back|fore)ground"[^<>]*/>')
_SILENT = re.compile(
    r' (?:class|role|aria-[a-z]+|pointer-events|font-family)="[^"]*"| (?:opacity="1"|xmlns:xlink="[^"]*"|version="1.1")'
)
_COUNTED = re.compile(r"\bgradient_(\d+)\b")
_LINK = re.compile(r'(\bid="|url\(#)')


def recoloured(svg: str, colours: Mapping[str, str]) -> str:
    """The picture with each colour replaced, as ``#rrggbb``.

    >>> recoloured('<rect fill="#ffffff"/>', {"#ffffff": "#000000"})
    '<rect fill="#000000"/>'
    """
    return _PAINT.sub(lambda found: f'{found[1]}="{colours.get(found[2].lower(), found[2])}"', svg)


def rounded(svg: str, decimals: int = DECIMALS) -> str:
    """The picture with coordinates of that many decimals; no coordinate moves by more than half of the last one.

    >>> rounded('<path d="M0.123456,7h-0.001"/>')
    '<path d="M0.12,7h0"/>'
    """
    return _PLACED.sub(lambda found: f'{found[1]}="{_NUMBER.sub(lambda n: _short(n[0], decimals), found[2])}"', svg)


def renumbered(svg: str) -> str:
    """The picture with its gradients numbered from 0; Vega counts on from one picture to the next.

    >>> renumbered('<linearGradient id="gradient_7"/><rect fill="url(#gradient_7)"/>')
    '<linearGradient id="gradient_0"/><rect fill="url(#gradient_0)"/>'
    """
    order = {name: str(place) for place, name in enumerate(dict.fromkeys(_COUNTED.findall(svg)))}
    return _COUNTED.sub(lambda found: f"gradient_{order[found[1]]}", svg)


def embedded(svg: str, name: str, prefix: str) -> str:
    """The picture for a page of many: an image with a name, identifiers of its own, nothing that shows nothing.

    Args:
        svg: of Vega, light.
        name: what a reader hears, escaped.
        prefix: of all identifiers.
    """
    found = _SILENT.sub("", _FRAME.sub("", svg))
    for _ in range(12):
        shorter = _EMPTY.sub("", found)
        if shorter == found:
            break
        found = shorter
    found = _LINK.sub(lambda link: f"{link[1]}{prefix}-", found)
    return found.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _short(number: str, decimals: int) -> str:
    text = f"{float(number):.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text

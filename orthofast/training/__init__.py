"""Training: penalties, initialisers and monitors. Names only; a file is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthofast.training.layers import Layer, Layers, Skipped, find_layers

__all__ = [
    "Layer",
    "Layers",
    "Skipped",
    "find_layers",
]

_HOME = {
    "Layer": "layers",
    "Layers": "layers",
    "Skipped": "layers",
    "find_layers": "layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orthofast.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"orthofast.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Training: penalties, initialisers and monitors. Names only; a file is loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthofast.training.layers import Layer, Layers, Skipped, find_layers
    from orthofast.training.monitor import Monitor
    from orthofast.training.sinks import Console, Csv, JsonLines, MLflow, TensorBoard, WandB

__all__ = [
    "Console",
    "Csv",
    "JsonLines",
    "Layer",
    "Layers",
    "MLflow",
    "Monitor",
    "Skipped",
    "TensorBoard",
    "WandB",
    "find_layers",
]

_HOME = {
    "Console": "sinks",
    "Csv": "sinks",
    "JsonLines": "sinks",
    "Layer": "layers",
    "Layers": "layers",
    "MLflow": "sinks",
    "Monitor": "monitor",
    "Skipped": "layers",
    "TensorBoard": "sinks",
    "WandB": "sinks",
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

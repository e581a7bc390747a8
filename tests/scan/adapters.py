"""Adapters as PEFT saves them, written by hand: factors, configuration, and the update they stand for in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from orthofast.scan import Row, ScanResult

START = "base_model.model."
SETTINGS: Mapping[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
QUERY, KEY, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
SHAPES = {QUERY: (24, 16), KEY: (8, 16), DOWN: (16, 20), "model.embed_tokens": (30, 16)}


def base_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    made = {f"{name}.weight": torch.randn(shape, generator=random) + 0.3 for name, shape in SHAPES.items()}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **settings: object) -> Path:
    """A folder with adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {START + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def lora(module: str, out: int, inward: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random factors of one module."""
    random = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inward, generator=random) + 0.2,
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=random) - 0.1,
    }


def update(tensors: Mapping[str, Tensor], module: str, scale: float = 2.0) -> np.ndarray:
    """scale * B A in float64."""
    a, b = (tensors[f"{module}.lora_{letter}.weight"].double().numpy() for letter in "AB")
    return np.asarray(scale * b @ a)


def versions(result: ScanResult, name: str, side: str = "rows", head: int | None = None) -> dict[str | None, Row]:
    """Version -> the row of one matrix from one side."""
    found = [r for r in result.rows if r.name == name and r.vectors == side and r.head == head]
    assert len({row.adapter for row in found}) == len(found)
    return {row.adapter: row for row in found}


def numpy_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute change of |cos| over the pairs of rows, in float64, by the definition."""
    cosines = []
    for x in (before, after):
        unit = x / np.sqrt((x**2).sum(1, keepdims=True))
        cosines.append(np.abs(unit @ unit.T))
    upper = np.triu_indices(len(before), 1)
    return float(np.abs(cosines[0][upper] - cosines[1][upper]).mean())

"""What the tests of the pipeline share: a small model of several dtypes, groups of a few bytes, rows as numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orthofast.scan import budgets, engines, folding
from orthofast.scan.result import ScanResult
from tests.scan.checkpoints import write_shards

MIB = 1 << 20


def mixed_model(folder: Path) -> Path:
    """Forty small weights in three files."""
    tensors = {}
    for i in range(40):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4]
        tensors[f"layers.{i}.weight"] = torch.randn(20 + 3 * i, 40 - i % 7).to(dtype)
    return write_shards(folder, tensors)


def numbers(result: ScanResult) -> list[tuple[object, ...]]:
    return [(row.name, row.vectors, row.head, row.pii, row.error) for row in result.rows]


def shrink(monkeypatch: pytest.MonkeyPatch, group: int, read: int = 1000) -> None:
    """Groups and reads of a few bytes."""
    monkeypatch.setattr(budgets, "HOST_GROUP_BYTES", group)
    monkeypatch.setattr(budgets, "DEVICE_GROUP_BYTES", group)
    monkeypatch.setattr(budgets, "READ_BYTES", read)
    monkeypatch.setattr(engines, "READ_BYTES", read)
    monkeypatch.setattr(folding, "CALL_FLOPS", 1.0)

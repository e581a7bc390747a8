"""Roles as the table shows them: up in its cell beside the gate, experts as their mean with the extremes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orthofast.scan import scan_checkpoint
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write


def test_up_is_the_table_cell_and_gate_is_reported(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    tensors = make_tensors(family)
    result = scan_checkpoint(write(tmp_path, tensors, family.config))
    up = tensors["model.layers.0.mlp.up_proj.weight"].numpy()
    gate = tensors["model.layers.0.mlp.gate_proj.weight"].numpy()
    assert result.table5("rows").cells["0", "Linear_1.weight"] == pytest.approx(numpy_pii(up), abs=2e-7)
    assert {r.name: r.pii for r in result.rows if r.vectors == "cols"}[
        "model.layers.0.mlp.gate_proj.weight"
    ] == pytest.approx(numpy_pii(gate.T), abs=2e-7)
    assert abs(numpy_pii(up) - numpy_pii(gate)) > 1e-4


def test_the_mean_over_experts_fills_a_cell(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight": torch.from_numpy(generator.normal(size=(9, 6)) + i)
        for i in range(3)
    }
    result = scan_checkpoint(write(tmp_path, tensors))
    mean = sum(numpy_pii(t.numpy()) for t in tensors.values()) / 3
    assert result.table5("rows").cells["0", "Linear_1.weight"] == pytest.approx(mean, abs=1e-12)
    assert result.table5("rows").footer["Linear_1.weight"].count == 3


def test_stacked_experts_are_rows_of_their_own(tmp_path: Path) -> None:
    """Each expert of a fused stack has its rows, and the cell is the mean over all of them."""
    generator = np.random.default_rng(1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stack = generator.normal(size=(3, 10, 12)) + np.arange(3)[:, None, None]
    config = {"model_type": "qwen3_moe", "hidden_size": 12}
    result = scan_checkpoint(write(tmp_path, {name: torch.from_numpy(stack)}, config))
    rows = {(row.name, row.vectors): row for row in result.rows}
    for e in range(3):
        up = rows[f"{name}[{e}][up]", "rows"]
        assert (up.role, up.expert, up.n, up.d) == ("Linear_1.weight", e, 5, 12)
        assert up.pii == pytest.approx(numpy_pii(stack[e, 5:]), abs=1e-12)
        assert rows[f"{name}[{e}][gate]", "cols"].pii == pytest.approx(numpy_pii(stack[e, :5].T), abs=1e-12)
    footer = result.table5("rows").footer["Linear_1.weight"]
    each = [numpy_pii(stack[e, 5:]) for e in range(3)]
    assert (footer.min, footer.max, footer.count) == (pytest.approx(min(each)), pytest.approx(max(each)), 3)

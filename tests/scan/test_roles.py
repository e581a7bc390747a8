"""Every name of every family is read as the role, layer and orientation it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orthofast.scan import scan_checkpoint
from orthofast.scan.roles import Roles
from tests.scan.checkpoints import FAMILIES, Family, make_tensors, numpy_pii, write


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_names_get_their_role_layer_and_vectors(family: Family, tmp_path: Path) -> None:
    tensors = make_tensors(family)
    result = scan_checkpoint(write(tmp_path / "m", tensors, family.config))
    rows = {(row.name, row.vectors): row for row in result.rows}
    skipped = {entry.name for entry in result.skipped}
    seen = set()
    for name, (_, expected) in family.tensors.items():
        if expected is None:
            assert name in skipped
            continue
        assert name not in skipped
        for matrix in expected:
            weight = tensors[name].double().numpy()
            if weight.ndim == 3 and weight.shape[0] == 1:
                weight = weight[0]
            weight = weight.T if matrix.in_out else weight.reshape(len(weight), -1)
            weight = weight[slice(*matrix.block)] if matrix.block else weight
            for side, vectors in (("rows", weight), ("cols", weight.T)):
                row = rows[name + matrix.label, side]
                seen.add((row.name, side))
                assert (row.role, row.layer, row.error) == (matrix.role, matrix.layer, None)
                assert (row.n, row.d) == vectors.shape
                assert row.pii == pytest.approx(numpy_pii(vectors), abs=2e-7)
    assert seen == set(rows)  # nothing was invented
    assert len(result.skipped) + sum(1 for _, e in family.tensors.values() if e) == len(family.tensors)


def test_gpt2_orientation_matters() -> None:
    """The two readings of a Conv1D differ on this data, so the family test above can fail."""
    tensors = make_tensors(FAMILIES["gpt2"])
    square = tensors["transformer.h.3.attn.c_proj.weight"].double().numpy()
    assert abs(numpy_pii(square) - numpy_pii(square.T)) > 1e-3


def test_square_c_proj_follows_the_model_type() -> None:
    shapes = {"h.0.attn.c_proj.weight": (8, 8)}
    name, shape = next(iter(shapes.items()))
    assert Roles(shapes, {"model_type": "gpt2"}).read(name, shape).transposed
    assert not Roles(shapes, {"model_type": "gpt_bigcode"}).read(name, shape).transposed
    assert not Roles(shapes, {}).read(name, shape).transposed


def test_a_linear_c_attn_outweighs_a_wrong_config() -> None:
    shapes = {"h.0.attn.c_attn.weight": (24, 8), "h.0.attn.c_proj.weight": (8, 8)}
    roles = Roles(shapes, {"model_type": "gpt2"})
    assert not roles.read("h.0.attn.c_proj.weight", (8, 8)).transposed
    assert [part.role for part in roles.read("h.0.attn.c_attn.weight", (24, 8)).parts] == ["Query", "Keys", "Values"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("model.layers.0.mlp.up_proj", "model.layers.12.mlp.up_proj"), ("0", "12")),
        (
            ("encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wi"),
            ("encoder.0", "decoder.0"),
        ),
        (
            ("text_model.encoder.layers.1.mlp.fc1", "vision_model.encoder.layers.1.mlp.fc1"),
            ("text_model.1", "vision_model.1"),
        ),
    ],
)
def test_layers_are_numbered_apart_only_where_there_are_several_stacks(
    layers: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    shapes = {f"{name}.weight": (8, 8) for name in layers}
    roles = Roles(shapes, {})
    assert tuple(roles.read(name, shape).layer for name, shape in shapes.items()) == expected


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

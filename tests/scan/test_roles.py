"""Every name of every family is read as the role, layer, orientation and rows it has."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from orthofast.scan.matrices import Matrix, holds_matrices, matrices_of
from orthofast.scan.roles import Reading, Roles
from tests.scan.checkpoints import FAMILIES, Family, make_tensors
from tests.scan.families import LANGUAGE
from tests.scan.families_vision import VISION

ALL = FAMILIES | LANGUAGE | VISION


def is_skipped(shape: tuple[int, ...], reading: Reading) -> bool:
    vector = len(shape) < 2 or (len(shape) > 2 and math.prod(shape[:-1]) == 1)
    return reading.skip is not None or vector or not holds_matrices(shape, reading)


def read(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> dict[str, list[Matrix]]:
    roles = Roles(shapes, config)
    found = {}
    for name, shape in shapes.items():
        reading = roles.read(name, shape)
        found[name] = [] if is_skipped(shape, reading) else list(matrices_of(name, shape, reading))
    return found


@pytest.mark.parametrize("family", ALL.values(), ids=ALL.keys())
def test_names_get_their_role_layer_and_rows(family: Family) -> None:
    tensors = make_tensors(family)
    found = read({name: shape for name, (shape, _) in family.tensors.items()}, family.config)
    for name, (shape, expected) in family.tensors.items():
        assert len(found[name]) == len(expected or ()), name
        for matrix, wanted in zip(found[name], expected or (), strict=True):
            weight = tensors[name]
            assert (matrix.name, matrix.role, matrix.layer) == (name + wanted.label, wanted.role, wanted.layer)
            assert matrix.expert == wanted.expert
            if wanted.expert is not None and f"[{wanted.expert}]" in wanted.label:
                weight = weight.reshape(family.experts, -1, shape[-1])[wanted.expert]
            if weight.dim() == 3 and weight.shape[0] == 1:
                weight = weight[0]
            weight = weight.flatten(1).T if wanted.in_out else weight.flatten(1)
            weight = weight if wanted.rows is None else weight[list(wanted.rows)]
            assert torch.equal(matrix.view(tensors[name]), weight), name
            assert matrix.sizes("rows") == tuple(weight.shape)
            assert matrix.sizes("cols") == tuple(weight.T.shape)
            if wanted.heads is not None:
                assert matrix.heads == wanted.heads, name
            if not matrix.copies:
                assert (
                    matrix.view(tensors[name]).untyped_storage().data_ptr()
                    == tensors[name].untyped_storage().data_ptr()
                )


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


def test_a_pattern_of_names_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninety thousand names of a mixture of experts differ in two numbers."""
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": (4, 8)
        for layer in range(20)
        for expert in range(40)
        for leaf in ("gate_proj", "up_proj")
    }
    roles = Roles(shapes, {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]})
    judged = []
    judge = roles._judge
    monkeypatch.setattr(roles, "_judge", lambda name, *rest: judged.append(name) or judge(name, *rest))
    read = {name: roles.read(name, shape) for name, shape in shapes.items()}
    assert len(judged) <= 2 * 2  # layer 0 may be the first convolution
    assert {(r.layer, r.expert) for r in read.values()} == {(str(i), e) for i in range(20) for e in range(40)}

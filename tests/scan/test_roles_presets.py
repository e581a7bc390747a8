"""The preset of the paper measures what its scripts measured (Lu et al. 2024, Table 5)."""

from __future__ import annotations

import pytest

from orthofast.errors import InputError
from orthofast.scan.presets import preset
from orthofast.scan.roles import ROLES, TABLE5, Roles
from tests.scan.checkpoints import FAMILIES


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2 without prefix or config", "t5", "llama"])
def test_language_models_are_read_at_layer_0(family: str) -> None:
    chosen = preset("paper", FAMILIES[family].config)
    assert "0" in chosen.layers
    assert [chosen.sides[role] for role in TABLE5] == [("cols",)] * 3 + [("rows",)] * 3


def test_both_stacks_of_t5_have_their_row() -> None:
    shapes = {name: shape for name, (shape, _) in FAMILIES["t5"].tensors.items()}
    roles = Roles(shapes, FAMILIES["t5"].config)
    layers = {roles.read(name, shape).layer for name, shape in shapes.items()}
    assert {"encoder.0", "decoder.0"} == layers & set(preset("paper", {"model_type": "t5"}).layers)


def test_qwen_is_read_at_layer_8_by_columns() -> None:
    chosen = preset("paper", {"model_type": "qwen"})
    assert chosen.layers == ("8",)
    assert [chosen.sides[role] for role in TABLE5] == [("rows", "cols")] * 3 + [("cols",)] * 3
    assert chosen.sides["Linear_1.gate"] == ("cols",)


def test_every_role_of_a_preset_exists_and_others_are_left_out() -> None:
    assert set(preset("paper", {}).sides) == {*TABLE5, "Linear_1.gate"} <= set(ROLES)


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="preset needs one of 'paper', got 'table5'"):
        preset("table5", {})

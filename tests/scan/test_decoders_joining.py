"""Which stored tensors make up a weight: companions anywhere, exclusions by whole words, faults, the rest by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Fault
from orthofast.scan.decoders import block_scaled, decode, decoded_bytes
from orthofast.scan.decoders.contract import matches
from orthofast.scan.weights import PLAIN, join_weights, method_of
from tests.scan.quantised import catalog_of, described, found, fp8_blocks, gptq, parts_of, words_of

MODULE = "model.layers.0.self_attn.q_proj"
NAME = f"{MODULE}.weight"
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}
    },
    "ignore": ["lm_head"],
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def float8(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def packed() -> dict[str, Tensor]:
    return {
        f"{NAME}_packed": words_of(torch.randint(0, 16, (32, 64)).numpy(), 4),
        f"{NAME}_scale": torch.rand(32, 2),
        f"{NAME}_zero_point": words(4, 2),
        f"{NAME}_shape": torch.tensor([32, 64]),
    }


def awq() -> dict[str, Tensor]:
    return {f"{MODULE}.qweight": words(64, 4), f"{MODULE}.qzeros": words(2, 4), f"{MODULE}.scales": torch.rand(2, 32)}


def nf4() -> dict[str, Tensor]:
    return {
        NAME: torch.zeros(32, 1, dtype=torch.uint8),
        f"{NAME}.absmax": torch.rand(8),
        f"{NAME}.quant_map": torch.rand(16),
        f"{NAME}.quant_state.bitsandbytes__nf4": described({"blocksize": 8, "shape": [8, 8]}),
    }


def mxfp4() -> dict[str, Tensor]:
    return {f"{NAME}_blocks": torch.ones(2, 4, 3, 16).byte(), f"{NAME}_scales": torch.ones(2, 4, 3).byte()}


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ({"quant_method": "fp8"}, {NAME: float8(200, 130), f"{NAME}_scale_inv": torch.rand(2, 2)}),
        ({"quant_method": "gptq", "bits": 4}, gptq(MODULE).tensors),
        (AWQ, awq()),
        (PACKED, packed()),
        ({"quant_method": "bitsandbytes"}, nf4()),
        ({}, nf4()),
        ({"quant_method": "mxfp4"}, mxfp4()),
        ({"quant_method": "bitsandbytes"}, {NAME: torch.ones(4, 8).char(), f"{MODULE}.SCB": torch.rand(4)}),
    ],
    ids=["fp8", "gptq", "awq", "compressed-tensors", "bitsandbytes", "of itself", "mxfp4", "int8"],
)
def test_a_part_that_is_missing_or_of_another_shape_is_a_fault_in_one_sentence(
    method: Mapping[str, object], tensors: dict[str, Tensor]
) -> None:
    weights, every = found(catalog_of(tensors, method))
    assert list(weights) == [NAME]
    needed = [extent.name for role, extent in weights[NAME].parts.items() if role not in ("weight", "index")]
    for name in needed:
        rest = {key: value for key, value in tensors.items() if key != name}
        _, every = found(catalog_of(rest, method))
        assert every.found == []
        if every.faults:
            assert [fault.name for fault in every.faults] == [NAME]
            assert name in every.faults[0].error
            assert "is missing" in every.faults[0].error
        else:  # without it nothing says that the rest is quantised
            assert NAME in dict(every.skipped)
        odd = tensors | {name: torch.cat([tensors[name]] * 3)[:-1]}
        weights, every = found(catalog_of(odd, method))
        assert weights == {}
        assert [fault.name for fault in every.faults] == [NAME]
        assert any(each in every.faults[0].error for each in needed)  # the parts contradict each other
        assert every.faults[0].error.startswith(f"{NAME} cannot be decoded: ")


def test_a_companion_in_a_broken_shard_is_named_with_what_is_wrong_with_it() -> None:
    catalog = catalog_of({NAME: float8(4, 4)}, {"quant_method": "fp8"})
    catalog.faults.append(Fault(f"{NAME}_scale", "shard 2 is missing"))
    every = join_weights(catalog)
    assert [fault.error for fault in every.faults] == [
        f"{NAME} cannot be decoded: {NAME}_scale_inv or {NAME}_scale is missing: shard 2 is missing"
    ]


def test_companions_are_found_in_any_file() -> None:
    data, scales = fp8_blocks(torch.randn(130, 140))
    catalog = catalog_of({NAME: data, f"{NAME}_scale_inv": scales}, {"quant_method": "fp8"})
    catalog.extents[1] = replace(catalog.extents[1], file=Path("another"))
    weight = join_weights(catalog).found[0]
    assert {extent.file for extent in weight.parts.values()} == {Path("checkpoint"), Path("another")}


@pytest.mark.parametrize(
    ("module", "pattern", "named"),
    [
        ("model.layers.0.mlp.gate", "mlp.gate", True),
        ("model.layers.0.mlp.gate_up_proj", "mlp.gate", False),
        ("model.layers.0.mlp.gate_up_proj", "gate", False),
        ("model.layers.10.mlp.gate", "layers.1", False),
        ("lm_head", "lm_head", True),
        ("model.layers.0.mlp.gate", "model.layers.0", True),
        ("model.vision.block", "vision.*", True),
        ("model.layers.0.mlp.gate", r"re:.*mlp\.gate$", True),
        ("model.layers.0.mlp.gate_up_proj", r"re:.*mlp\.gate$", False),
        ("a", "re:(", False),
        ("a", "", False),
    ],
)
def test_exclusions_are_whole_words_between_dots(module: str, pattern: str, named: bool) -> None:
    assert matches(module, pattern) is named


def test_an_excluded_float8_weight_needs_no_scale() -> None:
    router = "model.layers.0.mlp.gate.weight"
    tensors = {router: float8(4, 8), NAME: float8(4, 8), f"{NAME}_scale": torch.ones(1)}
    config: dict[str, object] = {"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate"]}
    weights, every = found(catalog_of(tensors, config))
    assert {name: weight.coding for name, weight in weights.items()} == {router: PLAIN, NAME: "scaled"}
    assert every.faults == []
    _, every = found(catalog_of(tensors, config | {"modules_to_not_convert": ["lp.gate", "mlp.gat"]}))
    assert [fault.name for fault in every.faults] == [router]


@pytest.mark.parametrize(
    ("config", "tensors", "word"),
    [
        ({"quant_method": "aqlm"}, {"codes": words(2, 3, 1), "codebooks": torch.rand(1, 4, 1, 2)}, "aqlm"),
        ({"quant_method": "HQQ"}, {"W_q": torch.ones(3, 4).byte(), "scale": torch.rand(3, 1)}, "hqq"),
        ({"quant_method": "exl2"}, {"q_weight": words(3, 4), "q_scale": words(1, 4)}, "exl2"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            {"qweight": words(3, 4), "B": torch.ones(3)},
            "marlin",
        ),
        ({"quant_method": "gptq", "bits": 5}, {"qweight": words(5, 4), "scales": torch.ones(1, 4)}, "5 bits"),
        (AWQ | {"version": "gemv"}, {"qweight": words(3, 4), "scales": torch.ones(3)}, "gemv"),
        (PACKED | {"format": "marlin-24"}, {"weight_packed": words(3, 4), "meta": words(3, 4)}, "marlin-24"),
        (PACKED | {"format": "mxfp6-pack-quantized"}, {"weight_packed": torch.ones(3, 4).byte()}, "mxfp6"),
        (PACKED, {"compressed": torch.rand(4), "bitmask": torch.ones(4, 4).byte()}, "sparse-bitmask"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, {"weight": torch.ones(3, 4).byte()}, "W4A8_AWQ"),
        ({"bits": 4}, {"qweight": words(3, 4)}, "unnamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_decoded_is_skipped_by_name_and_the_rest_stays(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], word: str
) -> None:
    named = {f"{MODULE}.{key}": tensor for key, tensor in tensors.items()}
    plain = {"model.embed_tokens.weight": torch.rand(4, 4), "model.norm.weight": torch.rand(4)}
    weights, every = found(catalog_of(named | plain, config))
    assert set(weights) == set(plain)
    assert every.faults == []
    reasons = dict(every.skipped)
    assert set(reasons) == set(named)
    assert all(reason.startswith("unsupported quantisation") and word in reason for reason in reasons.values())


def test_without_a_configuration_nothing_is_guessed() -> None:
    tensors = {
        **gptq(MODULE).tensors,
        "a.weight": float8(200, 130),
        "a.weight_scale_inv": torch.rand(2, 2),
        "b.weight": float8(200, 130),
        "b.weight_scale": torch.rand(200, 1),
        "c.weight": float8(4, 4),
        "f.weight": float8(4, 4),
        "f.scale_weight": torch.tensor(2.0),
        "d_blocks": torch.ones(2, 4, 3, 16).byte(),
        "e.weight": torch.ones(4, 4).char(),
        "e.weight_scale": torch.rand(4, 1),
    }
    catalog = catalog_of(tensors)
    weights, every = found(catalog)
    codings = {name: weight.coding for name, weight in weights.items()}
    assert codings["a.weight"] == codings["f.weight"] == "scaled"
    assert codings["c.weight"] == PLAIN
    assert {"b.weight", "d_blocks", "e.weight", f"{MODULE}.qweight"} <= set(dict(every.skipped))
    assert "[200, 1]" in dict(every.skipped)["b.weight"]
    assert any("no configuration" in note for note in catalog.notes)
    assert every.faults == []


def test_gguf_types_that_nobody_decodes_are_named_and_broken_ones_are_faults() -> None:
    octets = torch.zeros(180, dtype=torch.uint8)
    kinds = {"a": ("GGUF_Q8_K", (1, 256)), "b": ("GGUF_Q4_0", (3, 64)), "c": ("GGUF_Q4_0", (10, 20))}
    _, every = found(catalog_of(dict.fromkeys(kinds, octets), **kinds))
    assert dict(every.skipped) == {"a": "unsupported quantisation GGUF type Q8_K"}
    assert [fault.name for fault in every.faults] == ["b", "c"]
    assert "180 bytes" in every.faults[0].error
    assert "whole blocks of 32" in every.faults[1].error


def test_every_stored_tensor_is_read_or_listed() -> None:
    described_away = {f"{MODULE}.bias": torch.rand(32), f"{MODULE}.input_scale": torch.ones(1)}
    for tensors, config in ((packed(), PACKED), (awq(), AWQ), (nf4(), {}), (mxfp4(), {"quant_method": "mxfp4"})):
        weights, every = found(catalog_of(tensors | described_away, config))
        read = {extent.name for weight in weights.values() for extent in weight.parts.values()}
        assert read | set(dict(every.skipped)) == set(tensors | described_away)
        assert not read & set(dict(every.skipped))


def test_hostile_descriptions_are_faults() -> None:
    for state in (
        {"blocksize": 8, "shape": [-1, 8]},
        {"blocksize": 0, "shape": [8, 8]},
        {"blocksize": 8, "shape": [1 << 40, 1 << 40]},
        {"blocksize": 8},
        {"blocksize": 7, "shape": [8, 8]},
        {"blocksize": 8, "shape": [8, 8], "nested_blocksize": 2, "nested_offset": "1"},
    ):
        tensors = nf4() | {f"{NAME}.quant_state.bitsandbytes__nf4": described(state)}
        weights, every = found(catalog_of(tensors))
        assert weights == {}
        assert [fault.name for fault in every.faults] == [NAME]
    garbage = nf4() | {f"{NAME}.quant_state.bitsandbytes__nf4": torch.full((9,), 255, dtype=torch.uint8)}
    long = nf4() | {f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(70_000, dtype=torch.uint8)}
    for tensors, word in ((garbage, "JSON"), (long, "70000")):
        _, every = found(catalog_of(tensors))
        assert word in every.faults[0].error


def test_an_index_of_groups_that_points_outside_is_an_error_of_that_weight() -> None:
    layer = gptq(MODULE, act_order=True)
    layer.tensors[f"{MODULE}.g_idx"][3] = 2  # two groups: 0 and 1
    weights, _ = found(catalog_of(layer.tensors, layer.quantization))
    with pytest.raises(CheckpointError, match=rf"{NAME} cannot be decoded: .*group 2 of 2"):
        decode(weights[NAME], parts_of(weights[NAME], layer.tensors))


def test_parts_that_were_not_read_and_unknown_codings_are_errors() -> None:
    layer = gptq(MODULE)
    weights, _ = found(catalog_of(layer.tensors, layer.quantization))
    with pytest.raises(CheckpointError, match="scale, zero were not read"):
        decode(weights[NAME], {"weight": layer.tensors[f"{MODULE}.qweight"], "index": layer.tensors[f"{MODULE}.g_idx"]})
    with pytest.raises(CheckpointError, match="'other' is not known"):
        decode(replace(weights[NAME], coding="other"), parts_of(weights[NAME], layer.tensors))


def test_a_plain_weight_is_its_part() -> None:
    tensor = torch.rand(5, 4)
    weights, _ = found(catalog_of({NAME: tensor}))
    assert decode(weights[NAME], {"weight": tensor}).data_ptr() == tensor.data_ptr()
    assert torch.equal(decode(weights[NAME], {"weight": tensor}, slice(1, 3)), tensor[1:3])
    assert decoded_bytes(weights[NAME]) == 0
    assert block_scaled(weights[NAME], {"weight": tensor}) is None


@pytest.mark.parametrize(
    ("entries", "method"),
    [
        ({}, None),
        ({"quant_method": "FP8"}, "fp8"),
        ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
        ({"config_groups": {}, "format": "dense"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_algo": "FP8"}, "modelopt"),
    ],
)
def test_methods_of_files_older_than_their_name(entries: Mapping[str, object], method: str | None) -> None:
    assert method_of(entries) == method

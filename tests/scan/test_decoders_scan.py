"""A quantised twin through the whole scan: the fold of the oracle's values, close to the model it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orthofast.scan import scan_checkpoint
from tests.scan.checkpoints import numpy_pii
from tests.scan.quantised import (
    Gptq,
    described,
    fp8_blocks,
    fp8_values,
    golden,
    gptq,
    words_of,
    write_checkpoint,
    write_gguf,
)

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
EMBEDDING = "model.embed_tokens.weight"
Twin = tuple[dict[str, Tensor], dict[str, object], dict[str, np.ndarray]]


def model() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"{layer}.weight": torch.randn(64, 96, generator=random) / 8 + 0.05 for layer in LAYERS}


def nearest(weight: Tensor, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, zero points and half-precision scales of groups of columns: (out, in), (out, g), (out, g)."""
    runs = weight.double().numpy().reshape(weight.shape[0], -1, group)
    top = (1 << bits) - 1
    low, high = np.minimum(runs.min(-1), 0), np.maximum(runs.max(-1), 0)
    scales = ((high - low) / top).astype(np.float16).astype(np.float64)
    zeros = np.clip(np.round(-low / scales), 1, top).astype(np.int64)
    q = np.clip(np.round(runs / scales[..., None]) + zeros[..., None], 0, top).astype(np.int64)
    return q.reshape(weight.shape), zeros, scales


def grouped(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    return (q - zeros.repeat(group, 1)) * scales.repeat(group, 1)


def twin_float8(weights: dict[str, Tensor]) -> Twin:
    tensors, truth = {}, {}
    for name, weight in weights.items():
        data, scales = fp8_blocks(weight, (48, 40))  # ragged on both sides
        tensors |= {name: data, f"{name}_scale_inv": scales}
        truth[name] = fp8_values(data, scales, (48, 40))
    return tensors, {"quant_method": "fp8", "weight_block_size": [48, 40]}, truth


def twin_gptq(weights: dict[str, Tensor]) -> Twin:
    tensors, truth = {}, {}
    for name, weight in weights.items():
        q, zeros, scales = nearest(weight, 32, 4)
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = words_of(q, 4).T
        tensors[f"{module}.qzeros"] = words_of(zeros.T - 1, 4)
        tensors[f"{module}.scales"] = torch.from_numpy(scales.T.copy()).half()
        tensors[f"{module}.g_idx"] = (torch.arange(96) // 32).int()
        truth[name] = grouped(q, zeros, scales, 32)
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, truth


def twin_awq(weights: dict[str, Tensor]) -> Twin:
    def packed(table: np.ndarray) -> Tensor:
        runs = table.reshape(table.shape[0], -1, 8)[:, :, (0, 2, 4, 6, 1, 3, 5, 7)]
        return words_of(runs.reshape(table.shape), 4)

    tensors, truth = {}, {}
    for name, weight in weights.items():
        q, zeros, scales = nearest(weight, 32, 4)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.qweight": packed(q.T), f"{module}.qzeros": packed(zeros.T)}
        tensors[f"{module}.scales"] = torch.from_numpy(scales.T.copy()).half()
        truth[name] = grouped(q, zeros, scales, 32)
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, truth


def twin_packed(weights: dict[str, Tensor]) -> Twin:
    tensors, truth = {}, {}
    for name, weight in weights.items():
        q, zeros, scales = nearest(weight, 32, 6)
        tensors |= {f"{name}_packed": words_of(q, 6), f"{name}_zero_point": words_of(zeros.T, 6).T}
        tensors |= {f"{name}_scale": torch.from_numpy(scales).float(), f"{name}_shape": torch.tensor([64, 96])}
        truth[name] = grouped(q, zeros, scales, 32)
    told = {"weights": {"num_bits": 6, "type": "int", "symmetric": False, "group_size": 32}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": told}}
    return tensors, config, truth


def twin_nf4(weights: dict[str, Tensor]) -> Twin:
    table = golden("bitsandbytes nf4").stored["model.layers.0.mlp.down_proj.weight.quant_map"]
    tensors, truth = {}, {}
    for name, weight in weights.items():
        blocks = weight.reshape(-1, 64)
        maxima = blocks.abs().amax(1)
        codes = (blocks / maxima[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1).byte().view(-1, 2)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 96]}
        tensors |= {name: codes[:, :1] << 4 | codes[:, 1:], f"{name}.absmax": maxima}
        tensors |= {
            f"{name}.quant_map": table.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": described(state),
        }
        truth[name] = (table.double()[codes.long()].view(-1, 64) * maxima.double()[:, None]).view(64, 96).numpy()
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, truth


def twin_int8(weights: dict[str, Tensor]) -> Twin:
    tensors, truth = {}, {}
    for name, weight in weights.items():
        maxima = weight.abs().amax(1)
        values = (weight * 127 / maxima[:, None]).round().char()
        tensors |= {name: values, f"{name.removesuffix('weight')}SCB": maxima}
        truth[name] = values.double().numpy() * maxima.double().numpy()[:, None] / 127
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, truth


TWINS = {"float8": twin_float8, "gptq": twin_gptq, "awq": twin_awq, "packed": twin_packed, "nf4": twin_nf4}
TWINS["int8"] = twin_int8


@pytest.mark.parametrize("make", TWINS.values(), ids=TWINS)
def test_pii_of_a_twin_is_that_of_the_decoded_values(make: Callable[[dict[str, Tensor]], Twin], tmp_path: Path) -> None:
    weights = model()
    tensors, quantization, truth = make(weights)
    plain = {EMBEDDING: torch.randn(40, 96)}
    folder = write_checkpoint(tmp_path, tensors | plain, {"model_type": "llama", "quantization_config": quantization})
    result = scan_checkpoint(folder)
    rows = {(row.name, row.vectors): row for row in result.rows}
    assert {name for name, _ in rows} == {*weights, EMBEDDING}
    assert [row.error for row in result.rows if row.error] == []
    for name, weight in weights.items():
        for side, turn in (("rows", lambda x: x), ("cols", lambda x: x.T)):
            row = rows[name, side]
            assert (row.n, row.d) == turn(weight).shape
            assert row.pii == pytest.approx(numpy_pii(turn(truth[name])), rel=1e-6)  # the decoded values
            assert row.pii == pytest.approx(numpy_pii(turn(weight).numpy()), rel=0.08)  # the model before
        assert rows[name, "rows"].role in ("Query", "Linear_2.weight", "Atten_Output")


def test_a_fault_of_one_weight_is_a_row_and_the_others_are_measured(tmp_path: Path) -> None:
    layers: list[Gptq] = [gptq(layer, seed=seed) for seed, layer in enumerate(LAYERS)]
    tensors = {name: tensor for layer in layers for name, tensor in layer.tensors.items()}
    del tensors[f"{LAYERS[1]}.scales"]
    config = {"model_type": "llama", "quantization_config": layers[0].quantization}
    result = scan_checkpoint(write_checkpoint(tmp_path, tensors, config))
    errors = {row.name: row.error for row in result.rows if row.error}
    assert list(errors) == [f"{LAYERS[1]}.weight"]
    assert f"{LAYERS[1]}.scales is missing" in errors[f"{LAYERS[1]}.weight"]
    for layer, name in ((layers[0], LAYERS[0]), (layers[2], LAYERS[2])):
        row = next(row for row in result.rows if row.name == f"{name}.weight" and row.vectors == "rows")
        assert row.pii == pytest.approx(numpy_pii(layer.values), rel=1e-6)


def test_experts_of_gpt_oss_are_cut_as_the_unquantised_model_has_them(tmp_path: Path) -> None:
    """Gate and up alternate along the outputs; stored as (experts, out, in), named as (experts, in, out)."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    random = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 12, 2, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(125, 129, (2, 12, 2), generator=random, dtype=torch.uint8)
    config = {"model_type": "gpt_oss", "num_local_experts": 2, "hidden_size": 64, "intermediate_size": 6}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    folder = write_checkpoint(tmp_path / "four bits", {f"{name}_blocks": blocks, f"{name}_scales": scales}, config)
    four = {(row.name, row.vectors): row for row in scan_checkpoint(folder).rows}
    pair = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat((pair, -pair))
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()  # (2, 12, 2, 32)
    values = (table[codes] * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)  # (2, 12, 64)
    del config["quantization_config"]
    folder = write_checkpoint(tmp_path / "plain", {name: values.transpose(1, 2)}, config)
    plain = {(row.name, row.vectors): row for row in scan_checkpoint(folder).rows}
    assert four.keys() == plain.keys()
    assert len(four) == 8  # two experts, gate and up, rows and columns
    for key, row in four.items():
        assert row.pii == pytest.approx(plain[key].pii, rel=1e-6)
    for role, first in (("Linear_1.gate", 0), ("Linear_1.weight", 1)):
        expected = {numpy_pii(values[expert, first::2].numpy()) for expert in (0, 1)}
        measured = {row.pii for (_, side), row in four.items() if side == "rows" and row.role == role}
        assert sorted(measured) == pytest.approx(sorted(expected), rel=1e-6)


def test_a_gguf_file_of_every_type(tmp_path: Path) -> None:
    numbers = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13}
    numbers |= {"Q6_K": 14, "MXFP4": 39}
    cases = {kind: golden(f"gguf {kind}") for kind in numbers}
    names = {kind: f"blk.{layer}.ffn_up.weight" for layer, kind in enumerate(numbers)}
    tensors = {}
    for kind, case in cases.items():
        assert case.gguf is not None
        tensors[names[kind]] = (numbers[kind], case.gguf[1], case.stored["w"])
    result = scan_checkpoint(write_gguf(tmp_path / "model.gguf", tensors), vectors="rows")
    rows = {row.name: row for row in result.rows}
    assert len(rows) == 11
    for layer, (kind, case) in enumerate(cases.items()):
        row = rows[names[kind]]
        assert (row.role, row.layer, row.error) == ("Linear_1.weight", str(layer), None)
        assert row.pii == pytest.approx(numpy_pii(case.values.numpy()), rel=1e-5, abs=1e-7)

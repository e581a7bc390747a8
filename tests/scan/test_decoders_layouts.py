"""Layouts against loops in float64 written from their specifications; every one of them broken once, seen red."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthofast.scan.catalog import TORCH_DTYPES
from orthofast.scan.decoders import block_scaled, decode
from orthofast.scan.decoders.fourbit import E2M1
from orthofast.scan.decoders.words import unpack, unpack_down
from tests.scan.quantised import (
    catalog_of,
    decoded,
    described,
    found,
    fp8_blocks,
    fp8_values,
    gptq,
    parts_of,
    words_of,
    words_of_three_bits,
)

MODULE = "model.layers.1.mlp.up_proj"
NAME = f"{MODULE}.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("shape", [(256, 128), (129, 257), (64, 300), (576, 130)], ids=str)
def test_float8_blocks_with_ragged_edges(shape: tuple[int, int]) -> None:
    data, scales = fp8_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    tensors = {NAME: data, f"{NAME}_scale_inv": scales}
    truth = fp8_values(data, scales)
    for config in (FP8, {"quant_method": "fp8"}, {}):
        values = decoded(NAME, tensors, config)
        np.testing.assert_allclose(values.numpy(), truth, rtol=2**-23)
    assert torch.equal(decoded(NAME, tensors, FP8, slice(3, 61)), decoded(NAME, tensors, FP8)[3:61])


def test_float8_blocks_are_handed_to_the_fold_undecoded() -> None:
    data, scales = fp8_blocks(torch.randn(40, 24), (16, 16))
    tensors = {NAME: data, f"{NAME}_scale_inv": scales}
    weights, _ = found(catalog_of(tensors, FP8 | {"weight_block_size": [16, 16]}))
    parts = parts_of(weights[NAME], tensors)
    blocks = block_scaled(weights[NAME], parts)
    assert blocks is not None
    assert blocks.block == (16, 16)
    assert blocks.data.data_ptr() == data.data_ptr()
    assert torch.equal(blocks.dequantized(), decode(weights[NAME], parts))


@pytest.mark.parametrize("dtype", [name for name in TORCH_DTYPES if name.startswith("F8")])
def test_every_float8_of_a_processor_is_what_torch_makes_of_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthofast.scan.decoders.scaled.MANY", 0)
    data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(TORCH_DTYPES[dtype])
    values = decoded(NAME, {NAME: data, f"{NAME}_scale": torch.tensor([1.0])}, {"quant_method": "fp8"})
    torch.testing.assert_close(values, data.to(torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "scale",
    [
        "one",
        "one of no axes",
        "rows",
        "rows by one",
        "columns",
        "experts",
        "expert rows",
        "expert columns",
        "expert blocks",
    ],
)
def test_what_a_float8_scale_belongs_to_is_told_by_its_shape(scale: str) -> None:
    random = torch.Generator().manual_seed(1)
    shape = (3, 130, 140) if scale.startswith("expert") else (130, 140)
    data = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    sizes = {"one": (1,), "one of no axes": (), "rows": (130,), "rows by one": (130, 1), "experts": (3, 1, 1)}
    sizes |= {
        "expert rows": (3, 130, 1),
        "expert blocks": (3, 2, 2),
        "expert columns": (3, 1, 140),
        "columns": (1, 140),
    }
    factors = torch.rand(sizes[scale], generator=random) + 0.5
    name = "model.layers.0.mlp.experts.down_proj" if scale.startswith("expert") else NAME
    values = decoded(name, {name: data, f"{name}_scale": factors}, {"quant_method": "fp8"})
    wide, per = data.double().numpy(), factors.double().numpy()
    truth = np.empty_like(wide)
    for place in np.ndindex(*shape):
        *expert, i, j = place
        at: dict[str, tuple[int, ...]] = {
            "one": (0,),
            "one of no axes": (),
            "rows": (i,),
            "rows by one": (i, 0),
            "columns": (0, j),
            "expert columns": (*expert, 0, j),
            "experts": (*expert, 0, 0),
            "expert rows": (*expert, i, 0),
            "expert blocks": (*expert, i // 128, j // 128),
        }
        truth[place] = wide[place] * per[at[scale]]
    np.testing.assert_allclose(values.numpy(), truth, rtol=2**-23)
    if len(shape) == 3:
        first = decoded(name, {name: data, f"{name}_scale": factors}, {"quant_method": "fp8"}, slice(1, 2))
        assert torch.equal(first, values[1:2])


@pytest.mark.parametrize("stored", ["U8", "F8_E8M0"])
def test_scales_that_are_powers_of_two_are_read_as_exponents(stored: str) -> None:
    data = torch.randn(4, 64).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120, 127], [0, 130], [1, 126], [127, 125]], dtype=torch.uint8)
    scale = exponents if stored == "U8" else exponents.view(torch.float8_e8m0fnu)
    told = {"weights": {"num_bits": 8, "type": "float", "group_size": 32}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {"group_0": told}}
    values = decoded(NAME, {NAME: data, f"{NAME}_scale": scale}, config)
    for i in range(4):
        for j in range(64):
            assert float(values[i, j]) == math.ldexp(float(data[i, j]), int(exponents[i, j // 32]) - 127)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, act_order: bool, version: int) -> None:
    layer = gptq(MODULE, bits, version=version, act_order=act_order, seed=bits)
    values = decoded(NAME, layer.tensors, layer.quantization)
    assert tuple(values.shape) == layer.values.shape == (32, 64)
    np.testing.assert_array_equal(values.double().numpy(), layer.values)  # 9 + 11 bits: exact in float32
    part = decoded(NAME, layer.tensors, layer.quantization, slice(5, 11))
    assert torch.equal(part, values[5:11])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_of_the_first_format_has_its_zero_points_of_nothing_back(bits: int) -> None:
    """Ones are taken off whole words, so that a zero point of 0 borrows from the next; 3 bits wrap one by one."""
    second = gptq(MODULE, bits, version=2, zeros_below=3)
    name = f"{MODULE}.qzeros"
    zeros = unpack(second.tensors[name], bits, 32).numpy().astype(np.int64)
    assert (zeros == 0).any()
    if bits == 3:
        first = words_of_three_bits((zeros - 1) & 7)
    else:
        ones = sum(1 << at for at in range(0, 32, bits))
        words = second.tensors[name].numpy().view(np.uint32).astype(np.int64)
        first = torch.from_numpy(((words - ones) & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
    config = {key: value for key, value in second.quantization.items() if key != "checkpoint_format"}
    values = decoded(NAME, second.tensors | {name: first}, config)
    np.testing.assert_array_equal(values.double().numpy(), second.values)


def test_gptq_without_an_index_of_groups_takes_bits_from_the_configuration() -> None:
    layer = gptq(MODULE, 8)
    del layer.tensors[f"{MODULE}.g_idx"]
    np.testing.assert_array_equal(decoded(NAME, layer.tensors, layer.quantization).double().numpy(), layer.values)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_words_are_one_stream_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    words = words_of(values, bits)
    np.testing.assert_array_equal(unpack(words, bits, count).numpy(), values)
    np.testing.assert_array_equal(unpack_down(words.T, bits, count).numpy(), values.T)


def test_three_bits_are_shifted_as_the_first_library_shifts_them() -> None:
    values = np.random.default_rng(0).integers(0, 8, (3, 64))
    assert torch.equal(words_of_three_bits(values), words_of(values, 3))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_older_compressed_tensors_hold_whole_values(bits: int) -> None:
    each, number = 32 // bits, np.random.default_rng(bits)
    values = number.integers(0, 1 << bits, (4, 128))
    words = np.zeros((4, -(-128 // each)), dtype=np.uint32)
    for i in range(128):
        words[:, i // each] |= values[:, i].astype(np.uint32) << np.uint32(bits * (i % each))
    scale = torch.rand(4, 4)
    told = {"weights": {"num_bits": bits, "type": "int", "symmetric": True, "group_size": 32}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": told}}
    tensors = {
        f"{NAME}_packed": torch.from_numpy(words.view(np.int32)),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([4, 128]),
    }
    truth = (values - (1 << bits - 1)) * scale.double().numpy().repeat(32, 1)
    np.testing.assert_allclose(decoded(NAME, tensors, config).numpy(), truth, rtol=2**-23)


@pytest.mark.parametrize("unordered", [False, True])
def test_compressed_tensors_follow_their_index_of_groups(unordered: bool) -> None:
    number = np.random.default_rng(3)
    values, scale = number.integers(0, 16, (4, 64)), torch.rand(4, 2)
    index = np.full(64, -1) if unordered else number.permutation(np.arange(64) // 32)
    told = {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32},
        "targets": ["re:.*up_proj$"],
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": told}}
    tensors = {
        f"{NAME}_packed": words_of(values, 4),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([4, 64]),
        f"{NAME}_g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    groups = np.arange(64) // 32 if unordered else index
    truth = (values - 8) * scale.double().numpy()[:, groups]
    np.testing.assert_allclose(decoded(NAME, tensors, config).numpy(), truth, rtol=2**-23)


def test_stacked_experts_of_compressed_tensors() -> None:
    number, scale = np.random.default_rng(4), torch.rand(2, 3, 2)
    values = number.integers(0, 16, (2, 3, 64))
    zeros = number.integers(0, 16, (2, 3, 2))
    along = torch.stack([words_of(z.T, 4).T for z in zeros])  # packed along the rows
    told = {"weights": {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": told}}
    tensors = {
        f"{NAME}_packed": torch.stack([words_of(v, 4) for v in values]),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([2, 3, 64]),
        f"{NAME}_zero_point": along.contiguous(),
    }
    truth = (values - zeros.repeat(32, 2)) * scale.double().numpy().repeat(32, 2)
    whole = decoded(NAME, tensors, config)
    np.testing.assert_allclose(whole.numpy(), truth, rtol=2**-23)
    assert torch.equal(decoded(NAME, tensors, config, slice(1, 2)), whole[1:])


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(symmetric: bool) -> None:
    number, order = np.random.default_rng(5), (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ packs column order[i] as nibble i
    q, z = number.integers(0, 16, (64, 24)), number.integers(0, 16, (2, 24))
    scales = torch.rand(2, 24).half()

    def packed(table: np.ndarray) -> torch.Tensor:
        runs = table.reshape(table.shape[0], -1, 8)[:, :, order]
        return words_of(runs.reshape(table.shape), 4)

    tensors = {f"{MODULE}.qweight": packed(q), f"{MODULE}.scales": scales, f"{MODULE}.qzeros": packed(z)}
    config: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}
    if symmetric:
        del tensors[f"{MODULE}.qzeros"]
        config["zero_point"] = False
        z = np.full_like(z, 8)
    truth = ((q - z.repeat(32, 0)) * scales.double().numpy().repeat(32, 0)).T
    values = decoded(NAME, tensors, config)
    np.testing.assert_array_equal(values.double().numpy(), truth)
    assert torch.equal(decoded(NAME, tensors, config, slice(3, 13)), values[3:13])


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_first_value_in_the_high_half(nested: bool) -> None:
    number, block, each = np.random.default_rng(6), 4, 2
    table = np.sort(number.normal(size=16)).astype(np.float32)
    codes = number.integers(0, 16, 15)  # an odd count
    state: dict[str, object] = {"quant_type": "nf4", "blocksize": block, "shape": [3, 5], "dtype": "float16"}
    maxima = number.uniform(0.5, 1, 4).astype(np.float32)
    tensors = {}
    if nested:
        bytes_of, whole = number.integers(0, 256, 4).astype(np.uint8), number.uniform(0.5, 1, 2).astype(np.float32)
        levels = np.linspace(-1, 1, 256, dtype=np.float32)
        state |= {"nested_blocksize": each, "nested_offset": 0.75, "nested_dtype": "float32"}
        maxima = levels[bytes_of] * whole.repeat(each) + np.float32(0.75)
        tensors = {
            f"{NAME}.nested_absmax": torch.from_numpy(whole),
            f"{NAME}.nested_quant_map": torch.from_numpy(levels),
        }
    stored = torch.from_numpy(bytes_of if nested else maxima)
    padded = np.append(codes, 0).reshape(-1, 2)
    tensors |= {
        NAME: torch.from_numpy((padded[:, 0] << 4 | padded[:, 1]).astype(np.uint8)).unsqueeze(1),
        f"{NAME}.absmax": stored,
        f"{NAME}.quant_map": torch.from_numpy(table),
        f"{NAME}.quant_state.bitsandbytes__nf4": described(state),
    }
    truth = np.array([table[code] * maxima[i // block] for i, code in enumerate(codes)]).reshape(3, 5)
    for config in ({"quant_method": "bitsandbytes"}, {}):  # the tensors say it of themselves
        values = decoded(NAME, tensors, config)
        np.testing.assert_array_equal(values.numpy(), truth)
        assert torch.equal(decoded(NAME, tensors, config, slice(1, 2)), values[1:2])


def test_bitsandbytes_bytes_stored_as_another_type_are_the_same_bytes() -> None:
    octets = torch.randint(0, 256, (16,), dtype=torch.uint8)
    common = {
        f"{NAME}.absmax": torch.rand(4),
        f"{NAME}.quant_map": torch.rand(16),
        f"{NAME}.quant_state.bitsandbytes__nf4": described({"quant_type": "nf4", "blocksize": 8, "shape": [4, 8]}),
    }
    as_bytes, as_halves = ({NAME: x.view(-1, 1)} | common for x in (octets, octets.view(torch.bfloat16)))
    assert torch.equal(decoded(NAME, as_bytes, {}), decoded(NAME, as_halves, {}))


def test_mxfp4_is_exact_in_bfloat16_and_comes_as_the_model_has_it() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.arange(2 * 5 * 3 * 16).to(torch.uint8).view(2, 5, 3, 16)
    scales = torch.tensor([0, 1, 100, 127, 128, 250, 255]).to(torch.uint8).repeat(5)[:30].view(2, 5, 3)
    for config in ({"quant_method": "mxfp4"}, {}):
        values = decoded(name, {f"{name}_blocks": blocks, f"{name}_scales": scales}, config)
        assert values.dtype == torch.bfloat16
        assert tuple(values.shape) == (2, 96, 5)  # (experts, in, out)
        for e, o, g, k in np.ndindex(2, 5, 3, 32):
            octet = int(blocks[e, o, g, k // 2])
            code = octet >> 4 if k % 2 else octet & 15
            got, power = float(values[e, 32 * g + k, o]), int(scales[e, o, g])
            if power == 255:
                assert math.isnan(got)
            else:
                assert got == math.ldexp(E2M1[code], power - 127)


def test_nvfp4_of_both_makers() -> None:
    octets = torch.arange(4 * 16).to(torch.uint8).view(4, 16) * 4
    scales = (torch.rand(4, 2) * 10).to(torch.float8_e4m3fn)
    whole = torch.tensor([3.0])
    told = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    form = "nvfp4-pack-quantized"
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": told | {"format": form}}}
    divided = {f"{NAME}_packed": octets, f"{NAME}_scale": scales, f"{NAME}_global_scale": whole}
    times = {NAME: octets, f"{NAME}_scale": scales, f"{NAME}_scale_2": whole}
    for tensors, quantization, factor in (
        (divided, config, 1 / 3),
        (times, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, 3),
        (times, {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, 3),
    ):
        values = decoded(NAME, tensors, quantization)
        for i, j in np.ndindex(4, 32):
            octet = int(octets[i, j // 2])
            truth = E2M1[octet >> 4 if j % 2 else octet & 15] * float(scales[i, j // 16]) * factor
            assert float(values[i, j]) == pytest.approx(truth, rel=2**-22)


def test_rare_gguf_types_go_through_the_package_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is another's: what it is asked, and how its answers are put together, is ours."""
    asked = []

    def dequantize(rows: np.ndarray, kind: object) -> np.ndarray:
        asked.append((rows.shape[0], kind))
        return rows[:, :1].astype(np.float32).repeat(512, 1)

    package, quants, constants = (types.ModuleType(name) for name in ("gguf", "gguf.quants", "gguf.constants"))
    quants.dequantize = dequantize  # type: ignore[attr-defined]
    constants.GGMLQuantizationType = {"IQ4_XS": "the type"}  # type: ignore[attr-defined]
    package.quants = quants  # type: ignore[attr-defined]
    package.__spec__ = sys.__spec__
    for name, module in (("gguf", package), ("gguf.quants", quants), ("gguf.constants", constants)):
        monkeypatch.setitem(sys.modules, name, module)
    octets = torch.arange(7).to(torch.uint8).repeat_interleave(272).view(7, 272)
    weights, _ = found(catalog_of({"w": octets}, w=("GGUF_IQ4_XS", (7, 512))))
    values = decode(weights["w"], {"weight": octets})
    assert torch.equal(values, torch.arange(7.0).unsqueeze(1).expand(7, 512))
    assert torch.equal(decode(weights["w"], {"weight": octets}, slice(2, 4)), values[2:4])
    assert {kind for _, kind in asked} == {"the type"}
    assert sum(rows for rows, _ in asked) == 9


def test_a_missing_package_is_one_sentence_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, every = found(catalog_of({"w": torch.zeros(272, dtype=torch.uint8)}, w=("GGUF_IQ4_XS", (1, 512))))
    assert (every.found, every.faults) == ([], [])
    assert [(name, "pip install" in reason and "IQ4_XS" in reason) for name, reason in every.skipped] == [("w", True)]


def test_memory_given_is_written_into() -> None:
    layer = gptq(MODULE)
    weights, _ = found(catalog_of(layer.tensors, layer.quantization))
    parts = parts_of(weights[NAME], layer.tensors)
    memory = torch.full((5000,), math.nan)
    values = decode(weights[NAME], parts, into=memory)
    assert values.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert torch.equal(values, decode(weights[NAME], parts))
    assert bool(memory[values.numel() :].isnan().all())
    assert values.T.is_contiguous()  # as stored: nothing is transposed


def test_zero_points_of_one_byte_and_a_last_group_that_is_shorter() -> None:
    number, scale = np.random.default_rng(7), torch.rand(4, 3)
    values, zeros = number.integers(0, 16, (4, 72)), number.integers(-8, 8, (4, 3))
    told = {"weights": {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": told}}
    tensors = {
        f"{NAME}_packed": words_of(values, 4),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([4, 72]),
        f"{NAME}_zero_point": torch.from_numpy(zeros.astype(np.int8)),
    }
    per_column = np.arange(72) // 32
    truth = (values - 8 - zeros[:, per_column]) * scale.double().numpy()[:, per_column]
    np.testing.assert_allclose(decoded(NAME, tensors, config).numpy(), truth, rtol=2**-23)

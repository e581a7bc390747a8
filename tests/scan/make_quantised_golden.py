"""Writes quantised_golden.json: small weights stored by the real packages, and the values these packages decode.

Needs gguf, compressed-tensors, bitsandbytes and transformers, which the tests do not: run it only to add a case.
    PYTHONPATH=. python tests/scan/make_quantised_golden.py
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("quantised_golden.json")
MODULE = "model.layers.0.mlp.down_proj"
PACKAGES = ("gguf", "compressed-tensors", "bitsandbytes", "transformers", "torch")
GGUF_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# bytes of a block that are halves: random bits there would be NaN or Inf
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "MXFP4": ()}
HALVES |= {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def coded(tensor: Tensor) -> dict[str, object]:
    """Dtype, shape and compressed bytes; float32 values by planes of their bytes, which compress better."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    planes = flat.view(-1, tensor.element_size()).T.contiguous().numpy().tobytes()
    text = base64.b85encode(zlib.compress(planes, 9)).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "bytes": text}


def case(config: dict[str, Any], stored: dict[str, Tensor], name: str, values: Tensor) -> dict[str, Any]:
    tensors = {key: coded(tensor) for key, tensor in stored.items()}
    return {"quantization": config, "stored": tensors, "weight": name, "values": coded(values)}


def matrix(out: int, inward: int, seed: int) -> Tensor:
    return torch.randn(out, inward, generator=torch.Generator().manual_seed(seed)) + 0.3


def gguf_cases() -> dict[str, Any]:
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for seed, kind in enumerate(GGUF_TYPES):
        number = np.random.default_rng(seed)
        size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        blocks = number.integers(0, 256, (6, nbytes), dtype=np.uint8)
        for at in HALVES[kind]:
            blocks[:, at : at + 2] = number.normal(size=(6, 1)).astype(np.float16).view(np.uint8)
        if kind == "MXFP4":
            blocks[:, 0] = (0, 1, 2, 126, 130, 100)  # the two subnormal powers among them
        raw = blocks.reshape(3, 2 * nbytes)
        values = quants.dequantize(raw, GGMLQuantizationType[kind])
        found[f"gguf {kind}"] = case({}, {"w": torch.from_numpy(raw)}, "w", torch.from_numpy(values.copy()))
        found[f"gguf {kind}"]["gguf"] = [f"GGUF_{kind}", [3, 2 * size]]
    return found


def compressed_cases() -> dict[str, Any]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def made(form: str, weight: Tensor, stored: dict[str, Tensor], **args: Any) -> dict[str, Any]:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        codec = BaseCompressor.get_value_from_registry(form)
        kept = codec.compress({"weight": weight} | stored, scheme)
        values = codec.decompress(dict(kept), scheme)["weight"].float()
        told = json.loads(scheme.model_dump_json(include={"targets": True, "weights": True}))
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": told}}
        named = {f"{MODULE}.{key}": value for key, value in kept.items() if value is not None}
        return case(config | {"ignore": ["lm_head"]}, named, f"{MODULE}.weight", values)

    def grid(weight: Tensor, group: int, top: float) -> Tensor:
        return (weight.unflatten(1, (-1, group)).abs().amax(-1) / top).bfloat16().float()

    found = {}
    for bits in range(1, 9):
        group, weight = 32, matrix(12 if bits in (3, 4, 8) else 5, 96, bits)
        scale = grid(weight, group, max(1, 2 ** (bits - 1) - 1))
        common = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group}
        found[f"pack-quantized {bits} bits"] = made(
            "pack-quantized", weight, {"weight_scale": scale}, **common, symmetric=True
        )
        if bits in (3, 4, 8):
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            zero = torch.randint(low, high + 1, scale.shape, generator=torch.Generator().manual_seed(bits)).to(
                torch.int8
            )
            found[f"pack-quantized {bits} bits with zero points"] = made(
                "pack-quantized", weight, {"weight_scale": scale, "weight_zero_point": zero}, **common, symmetric=False
            )
    weight = matrix(5, 70, 20)
    channel = grid(weight, 70, 7)
    found["pack-quantized per channel, odd width"] = made(
        "pack-quantized", weight, {"weight_scale": channel}, num_bits=4, type="int", strategy="channel", symmetric=True
    )
    zero = torch.full((5, 1), 9, dtype=torch.int8)
    found["int-quantized per channel with zero points"] = made(
        "int-quantized",
        weight,
        {"weight_scale": grid(weight, 70, 127), "weight_zero_point": zero},
        num_bits=8,
        type="int",
        strategy="channel",
        symmetric=False,
    )
    for strategy, scale in (("channel", grid(weight, 70, 448)), ("tensor", (weight.abs().max() / 448).reshape(1))):
        found[f"float-quantized per {strategy}"] = made(
            "float-quantized",
            weight,
            {"weight_scale": scale},
            num_bits=8,
            type="float",
            strategy=strategy,
            symmetric=True,
        )
    weight = matrix(20, 48, 21)
    blocks = torch.rand(2, 3, generator=torch.Generator().manual_seed(3)) / 100 + 0.005
    found["float-quantized blocks, ragged"] = made(
        "float-quantized",
        weight,
        {"weight_scale": blocks},
        num_bits=8,
        type="float",
        strategy="block",
        block_structure=[16, 16],
        symmetric=True,
    )
    weight = matrix(4, 64, 22)
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    local = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn).float()
    found["nvfp4-pack-quantized"] = made(
        "nvfp4-pack-quantized",
        weight,
        {"weight_scale": local, "weight_global_scale": whole},
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
    )
    power = 2.0 ** torch.floor(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(-1) / 6))
    found["mxfp4-pack-quantized"] = made(
        "mxfp4-pack-quantized",
        weight,
        {"weight_scale": power},
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        symmetric=True,
    )
    return found


def awq_cases() -> dict[str, Any]:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    random = torch.Generator().manual_seed(30)
    words = torch.randint(-(2**31), 2**31 - 1, (64, 3), generator=random, dtype=torch.int64).to(torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (4, 3), generator=random, dtype=torch.int64).to(torch.int32)
    scales = torch.rand(4, 24, generator=random).half()
    q, scale, zero = AutoAWQConverter(group_size=16)._convert_gemm_module(words, scales, zeros)
    wide = [each.float() for each in (q, zero.repeat_interleave(16, 1), scale.repeat_interleave(16, 1))]
    stored = {f"{MODULE}.qweight": words, f"{MODULE}.qzeros": zeros, f"{MODULE}.scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    return {"awq gemm": case(config, stored, f"{MODULE}.weight", (wide[0] - wide[1]) * wide[2])}


def bitsandbytes_cases() -> dict[str, Any]:
    import bitsandbytes.functional as bnb

    found = {}
    name = f"{MODULE}.weight"
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            weight = matrix(9, 45, 40) if nested else matrix(7, 45, 41)  # odd counts, ragged blocks
            packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
            stored = {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
            values = bnb.dequantize_4bit(packed, state)
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
            found[f"bitsandbytes {kind}{' nested' if nested else ''}"] = case(config, stored, name, values)
    weight = matrix(6, 40, 42)
    maxima = weight.abs().amax(1)
    values8 = (weight * (127 / maxima)[:, None]).round().to(torch.int8)
    back = torch.ops.bitsandbytes.int8_vectorwise_dequant(values8, maxima)
    stored = {name: values8, f"{MODULE}.SCB": maxima, f"{MODULE}.weight_format": torch.zeros((), dtype=torch.uint8)}
    found["bitsandbytes int8"] = case({"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, name, back)
    return found


def gpt_oss_cases() -> dict[str, Any]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(50)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(118, 130, (3, 6, 2), generator=random, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = convert_moe_packed_tensors(blocks, scales)  # (experts, in, out)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return {"mxfp4 of gpt-oss": case({"quant_method": "mxfp4"}, stored, name, values)}


if __name__ == "__main__":
    cases = gguf_cases() | compressed_cases() | awq_cases() | bitsandbytes_cases() | gpt_oss_cases()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    head = json.dumps({"made by": Path(__file__).name, "versions": versions})[:-1]
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(made)}" for name, made in cases.items())
    FILE.write_text(f'{head},\n"cases": {{\n{body}\n}}}}\n', encoding="utf-8")

"""Small quantised checkpoints: those recorded from the real packages, and packers written from the specifications."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from orthofast.scan.catalog import TORCH_DTYPES, Catalog, Extent
from orthofast.scan.decoders import decode
from orthofast.scan.weights import Weight, Weights, join_weights

GOLDEN = json.loads(Path(__file__).with_name("quantised_golden.json").read_text(encoding="utf-8"))["cases"]
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@dataclass(frozen=True)
class Golden:
    """A weight as a package stores it, and the values the package decodes."""

    quantization: Mapping[str, object]
    stored: dict[str, Tensor]
    weight: str
    values: Tensor
    gguf: tuple[str, tuple[int, ...]] | None = None


def golden(name: str) -> Golden:
    told: dict[str, Any] = GOLDEN[name]
    stored = {key: _tensor(value) for key, value in told["stored"].items()}
    kind = (told["gguf"][0], tuple(told["gguf"][1])) if "gguf" in told else None
    return Golden(told["quantization"], stored, told["weight"], _tensor(told["values"]), kind)


def _tensor(told: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, told["dtype"])
    planes = np.frombuffer(zlib.decompress(base64.b85decode(told["bytes"])), dtype=np.uint8)
    flat = torch.from_numpy(planes.reshape(dtype.itemsize, -1).T.copy()).reshape(-1).view(dtype)
    return flat.view(told["shape"])


def catalog_of(
    tensors: Mapping[str, Tensor], quantization: Mapping[str, object] | None = None, **gguf: tuple[str, tuple[int, ...]]
) -> Catalog:
    """A catalog of tensors in memory; ``gguf`` gives the type and shape of tensors that are blocks."""
    catalog = Catalog(Path("checkpoint"), memory=dict(tensors), format="memory", quantization=quantization or {})
    for name, tensor in tensors.items():
        dtype, shape = gguf.get(name, (NAMES[tensor.dtype], tuple(tensor.shape)))
        catalog.extents.append(Extent(name, catalog.root, 0, tensor.numel() * tensor.element_size(), dtype, shape))
    return catalog


def found(catalog: Catalog) -> tuple[dict[str, Weight], Weights]:
    weights = join_weights(catalog)
    return {weight.name: weight for weight in weights.found}, weights


def parts_of(weight: Weight, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensors[extent.name] for role, extent in weight.parts.items()}


def decoded(
    name: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, object], span: slice = slice(None)
) -> Tensor:
    """The values of one weight of a checkpoint that must hold it without a fault."""
    weights, all_of_them = found(catalog_of(tensors, quantization))
    assert all_of_them.faults == []
    return decode(weights[name], parts_of(weights[name], tensors), span)


def described(state: Mapping[str, object]) -> Tensor:
    """A description as bitsandbytes stores it: JSON in bytes."""
    return torch.frombuffer(bytearray(json.dumps(state), "utf-8"), dtype=torch.uint8)


def words_of(values: np.ndarray, bits: int) -> Tensor:
    """(rows, count) integers -> (rows, words) int32: one stream of bits per row, lowest bits first."""
    rows = []
    for row in values.tolist():
        stream = sum(int(value) << bits * i for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([stream >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def words_of_three_bits(values: np.ndarray) -> Tensor:
    """(rows, 32 n) -> (rows, 3 n), shift by shift as AutoGPTQ writes them (qlinear_cuda, pack)."""
    rows = np.zeros((values.shape[0], values.shape[1] // 32 * 3), dtype=np.uint32)
    wide = values.astype(np.uint32)
    for start in range(0, values.shape[1], 32):
        word = start // 32 * 3
        for j in range(10):
            rows[:, word] |= wide[:, start + j] << np.uint32(3 * j)
        rows[:, word] |= wide[:, start + 10] << np.uint32(30)
        rows[:, word + 1] |= (wide[:, start + 10] >> np.uint32(2)) & np.uint32(1)
        for j in range(10):
            rows[:, word + 1] |= wide[:, start + 11 + j] << np.uint32(3 * j + 1)
        rows[:, word + 1] |= wide[:, start + 21] << np.uint32(31)
        rows[:, word + 2] |= (wide[:, start + 21] >> np.uint32(1)) & np.uint32(3)
        for j in range(10):
            rows[:, word + 2] |= wide[:, start + 22 + j] << np.uint32(3 * j + 2)
    return torch.from_numpy(rows.view(np.int32))


@dataclass(frozen=True)
class Gptq:
    """A GPTQ layer and its values, in float64 by the definition (q - z) * s."""

    tensors: dict[str, Tensor]
    quantization: dict[str, object]
    values: np.ndarray  # (out, in)


def gptq(
    module: str,
    bits: int = 4,
    out: int = 32,
    inward: int = 64,
    group: int = 32,
    version: int = 1,
    act_order: bool = False,
    seed: int = 0,
    zeros_below: int | None = None,
) -> Gptq:
    number = np.random.default_rng(seed)
    groups, top = inward // group, 1 << bits
    q = number.integers(0, top, (out, inward))
    zeros = number.integers(1 if version == 1 else 0, zeros_below or top, (groups, out))
    scales = torch.from_numpy(number.uniform(0.01, 0.02, (groups, out))).half()
    index = np.arange(inward) // group
    if act_order:
        index = number.permutation(index)
    values = np.empty((out, inward))
    for i in range(out):
        for j in range(inward):
            g = index[j]
            values[i, j] = (int(q[i, j]) - int(zeros[g, i])) * float(scales[g, i])
    pack = words_of_three_bits if bits == 3 else lambda table: words_of(table, bits)
    tensors = {
        f"{module}.qweight": pack(q).T.contiguous(),  # (in * bits / 32, out)
        f"{module}.qzeros": pack(zeros - 1 if version == 1 else zeros).contiguous(),
        f"{module}.scales": scales,
        f"{module}.g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    config: dict[str, object] = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Gptq(tensors, config, values)


def fp8_blocks(weight: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """Float8 values and the inverse scales of their blocks, by loops over the blocks (DeepSeek-V3)."""
    out, inward = weight.shape
    scales = torch.empty(math.ceil(out / block[0]), math.ceil(inward / block[1]))
    data = torch.empty(out, inward, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].abs().max() / 448
            data[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return data, scales


def fp8_values(data: Tensor, scales: Tensor, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """README_WEIGHTS.md of DeepSeek-V3: each value times weight_scale_inv of its block; float64, value by value."""
    wide, factors = data.double().numpy(), scales.double().numpy()
    values = np.empty_like(wide)
    for i in range(wide.shape[0]):
        for j in range(wide.shape[1]):
            values[i, j] = wide[i, j] * factors[i // block[0], j // block[1]]
    return values


def write_gguf(path: Path, tensors: Mapping[str, tuple[int, tuple[int, ...], Tensor]]) -> Path:
    """A GGUF file of version 3 with one entry; name -> (ggml's number of the type, shape, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    header += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    data = b""
    for name, (kind, shape, octets) in tensors.items():
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))  # innermost first
        header += text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(data))
        data += octets.numpy().tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    """model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder

"""The same weights in other formats: float8 blocks, GGUF, torch files, a distributed checkpoint; and an adapter.

``bin`` and ``dcp`` hold the very same bits. ``fp8`` is rounded in blocks of 128 x 128, which leaves every planted
structure as it is; GGUF's blocks keep duplicate, zero and orthogonal rows. Rows of queries and keys stay in their order
(llama.cpp permutes them inside each head; PII does not depend on it).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.checkpoint_content import Bits, Content, whole
from benchmarks.checkpoint_files import numbered, shards, write_file, write_index, write_planted, write_shards
from benchmarks.checkpoint_plants import BUMPS, EXACT, P, Planted, bump_cols, bump_rows
from benchmarks.checkpoint_shapes import BLOCK, F32, FLOAT8, Shapes, Spec, config, scaled, tensors

Floats = NDArray[np.float32]

SHARD_GB = 5.0
F8_MAX = 448.0
DCP_LIMIT_BYTES = 8 << 30  # held in memory
RANK, ALPHA, RISE = 16, 32, 2.0**-7  # of the adapter; what it adds to every entry of one matrix, over alpha / rank
SUPER, SUB = 256, 32  # values of a Q4_K block and of its parts


def as_torch(content: Content, spec: Spec) -> Tensor:
    """One tensor as torch has it."""
    bits = np.concatenate(list(content.blocks(spec))).reshape(spec.shape)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}[spec.dtype]
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype)


def is_linear(spec: Spec) -> bool:
    """A layer's own matrix, as quantisers take it: no embedding, no head, no router."""
    return len(spec.shape) == 2 and ".layers." in spec.name and not spec.name.endswith("gate.weight")


def _start(folder: Path, settings: dict[str, object], planted: Iterable[Planted]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_planted(folder, planted)


def _only(model: Shapes, twin: str, *types: str) -> None:
    if model.model_type not in types:
        raise ValueError(f"the twin {twin} needs a model of type {' or '.join(types)}, got {model.model_type}")


def write_bin(folder: Path, model: Shapes, content: Content) -> None:
    """``pytorch_model.bin``, in shards that are held in memory one at a time."""
    _start(folder, config(model), content.planted)
    parts = shards(tensors(model), SHARD_GB * 1e9)
    names = numbered("pytorch_model", ".bin", len(parts))
    for name, part in zip(names, parts, strict=True):
        torch.save({spec.name: as_torch(content, spec) for spec in part}, folder / name)
    if len(parts) > 1:
        write_index(folder / "pytorch_model.bin.index.json", parts, names)


def write_dcp(folder: Path, model: Shapes, content: Content) -> None:
    """A folder of torch.distributed.checkpoint, made from the whole model in memory."""
    from torch.distributed.checkpoint.state_dict_saver import save

    size = sum(spec.nbytes for spec in tensors(model))
    if size > DCP_LIMIT_BYTES:
        raise ValueError(f"the twin dcp needs a model of at most {DCP_LIMIT_BYTES} bytes, got {size}; pass --layers")
    _start(folder, config(model), content.planted)
    state: dict[str, Any] = {spec.name: as_torch(content, spec) for spec in tensors(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process saves
        save(state, checkpoint_id=folder, no_dist=True)


def float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) in float8 and one factor for each block of 128 x 128, the last ones ragged."""
    n, d = values.shape
    padded = torch.zeros(-(-n // BLOCK) * BLOCK, -(-d // BLOCK) * BLOCK)
    padded[:n, :d] = values
    grid = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = (grid.abs().amax((1, 3)) / F8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    stored = (grid / scale[:, None, :, None]).clamp(-F8_MAX, F8_MAX).view(padded.shape)[:n, :d]
    return stored.to(torch.float8_e4m3fn).contiguous(), scale


def write_fp8(folder: Path, model: Shapes, content: Content) -> None:
    """Linear layers as DeepSeek stores them, everything else as it was."""
    _only(model, "fp8", "llama", "mixtral")
    _start(folder, {**config(model), "quantization_config": FLOAT8}, content.planted)
    linear = {spec.name: spec for spec in tensors(model) if is_linear(spec)}
    specs: list[Spec] = []
    for spec in tensors(model):
        specs += scaled(spec.name, spec.shape) if spec.name in linear else [spec]

    def blocks(spec: Spec) -> Iterator[Bits]:
        source = linear.get(spec.name.removesuffix("_scale_inv"))
        if source is None:
            yield from content.blocks(spec)
            return
        stored, scale = float8(torch.from_numpy(whole(content, source)))
        yield scale.numpy() if spec.scales else stored.view(torch.uint8).numpy()

    write_shards(folder, specs, blocks, SHARD_GB)


def q4_k(values: Floats) -> NDArray[np.uint8]:
    """Rows (n, d) as Q4_K, 144 bytes for 256 values: eight parts with a 6-bit scale and a 6-bit minimum each.

    Plain rounding: smallest and largest value of a part become 0 and 15.
    """
    n = len(values)
    parts = values.reshape(-1, SUPER // SUB, SUB)  # (blocks, 8, 32)
    lowest = np.minimum(parts.min(2), 0)
    steps = (parts.max(2) - lowest) / 15
    by_step = (steps.max(1, keepdims=True) / 63).astype(np.float16)
    by_lowest = (-lowest.min(1, keepdims=True) / 63).astype(np.float16)

    def sixths(wanted: Floats, unit: NDArray[np.float16]) -> NDArray[np.uint8]:
        factor = unit.astype(np.float32)
        found = np.divide(wanted, factor, out=np.zeros_like(wanted), where=factor > 0)
        return np.clip(np.rint(found), 0, 63).astype(np.uint8)

    scale, minimum = sixths(steps, by_step), sixths(-lowest, by_lowest)  # (blocks, 8)
    step = (by_step.astype(np.float32) * scale)[..., None]
    raised = parts + (by_lowest.astype(np.float32) * minimum)[..., None]
    levels = np.divide(raised, step, out=np.zeros_like(raised), where=step > 0)
    digits = np.clip(np.rint(levels), 0, 15).astype(np.uint8).reshape(-1, 4, 2, SUB)
    packed = np.concatenate(
        [
            by_step.view(np.uint8),
            by_lowest.view(np.uint8),
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            minimum[:, :4] | (minimum[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4,
            (digits[:, :, 0] | digits[:, :, 1] << 4).reshape(len(digits), -1),
        ],
        axis=1,
    )
    return packed.reshape(n, -1)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
GGUF_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
GGUF_EDGES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF; all experts of a layer share one."""
    stem = name.removesuffix(".weight")
    if stem in GGUF_EDGES:
        return f"{GGUF_EDGES[stem]}.weight"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    found = GGUF_EXPERTS[rest.rsplit(".", 1)[1]] if ".experts." in rest else GGUF_NAMES[rest]
    return f"blk.{layer}.{found}.weight"


def write_gguf(folder: Path, model: Shapes, content: Content, kind: str) -> None:
    """One GGUF file with a vocabulary as long as the embedding; rows that Q4_K cannot hold are Q8_0."""
    import gguf

    _only(model, f"gguf-{kind.lower()}", "llama", "mixtral")
    lossless = [one for one in content.planted if one.structure not in BUMPS or one.structure == "orthogonal"]
    named = [replace(one, name=gguf_name(one.name)) for one in lossless if ".experts." not in one.name]
    _start(folder, {}, named)
    (folder / "config.json").unlink()
    groups: dict[str, list[Spec]] = {}
    for spec in tensors(model):
        groups.setdefault(gguf_name(spec.name), []).append(spec)

    def how(spec: Spec) -> Any:
        if len(spec.shape) == 1 or spec.name.endswith("gate.weight"):
            return gguf.GGMLQuantizationType.F32
        fits = kind == "Q4_K" and spec.shape[1] % SUPER == 0
        return gguf.GGMLQuantizationType.Q4_K if fits else gguf.GGMLQuantizationType.Q8_0

    writer = gguf.GGUFWriter(folder / f"model-{kind}.gguf", "llama")
    writer.add_block_count(model.layers)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(model.vocabulary)])
    writer.add_token_types([1] * model.vocabulary)
    for name, specs in groups.items():
        stored, shape = how(specs[0]), specs[0].shape
        if stored != gguf.GGMLQuantizationType.F32:
            shape = gguf.quant_shape_to_byte_shape(shape, stored)
        shape = (len(specs), *shape) if len(specs) > 1 else shape
        element = np.dtype(np.float32 if stored == gguf.GGMLQuantizationType.F32 else np.uint8)
        writer.add_tensor_info(name, shape, element, int(np.prod(shape)) * element.itemsize, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for specs in groups.values():
        stored = how(specs[0])
        parts = []
        for spec in specs:
            values = whole(content, spec)
            quantised = q4_k(values) if stored == gguf.GGMLQuantizationType.Q4_K else gguf.quantize(values, stored)
            parts.append(quantised)
        writer.write_tensor_data(np.stack(parts) if len(parts) > 1 else parts[0])
    writer.close()


def write_lora(folder: Path, model: Shapes, content: Content) -> None:
    """A PEFT adapter of queries and values: in the first layer it lifts a bump, and adds nothing to the values.

    All other factors are random. ``planted.json`` says what base and adapter together must give.
    """
    _only(model, "lora", "llama", "mixtral")
    base = [spec for spec in tensors(model) if spec.name.split(".")[-2] in ("q_proj", "v_proj")]
    lifted, still = base[0], base[1]
    added = ALPHA / RANK * RISE
    n, d = lifted.shape
    merged = BUMPS["bump"] + added
    planted = []
    for side, sizes, find in (("rows", (n, d), bump_rows), ("cols", (d, n), bump_cols)):
        pii, tolerance, _ = find(n, d, P + added, merged)
        place = Planted(lifted.name, "bump", side, *sizes, pii, tolerance, adapter="merged")
        planted += [place, replace(place, structure="rank 1", pii=1.0, tolerance=EXACT, adapter="delta")]
    planted += [replace(one, adapter="merged") for one in content.planted if one.name == still.name]
    settings: dict[str, object] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "bias": "none", "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "base_model_name_or_path": None,
    }  # fmt: skip
    _start(folder, settings, planted)
    (folder / "config.json").rename(folder / "adapter_config.json")
    specs = []
    for spec in base:
        stem = f"base_model.model.{spec.name.removesuffix('.weight')}"
        specs += [Spec(f"{stem}.lora_A.weight", (RANK, spec.shape[1]), F32)]
        specs += [Spec(f"{stem}.lora_B.weight", (spec.shape[0], RANK), F32)]

    def blocks(spec: Spec) -> Iterator[Bits]:
        for block in content.blocks(spec):
            values = block.view(np.float32)
            down = ".lora_A." in spec.name
            if lifted.name.removesuffix(".weight") in spec.name:
                values[:] = 0
                line = values[0] if down else values[:, 0]
                line[:] = 1.0 if down else RISE
            elif still.name.removesuffix(".weight") in spec.name and not down:
                values[:] = 0
            yield block

    write_file(folder / "adapter_model.safetensors", specs, blocks)


TWINS: dict[str, Callable[[Path, Shapes, Content], None]] = {
    "fp8": write_fp8,
    "gguf-q8_0": lambda folder, model, content: write_gguf(folder, model, content, "Q8_0"),
    "gguf-q4_k": lambda folder, model, content: write_gguf(folder, model, content, "Q4_K"),
    "bin": write_bin,
    "lora": write_lora,
    "dcp": write_dcp,
}

"""Small checkpoints on disk, one per family, with what each name must be read as; and PII by float64 numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

Q, K, V, O, UP, DOWN = "Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight"  # noqa: E741
GATE, EMBED, HEAD, CONV, OTHER = "Linear_1.gate", "Embedding", "Head", "Conv", "Other"
ROUTER = "Router"
SKIP = None


@dataclass(frozen=True)
class Expected:
    """One matrix as the scan must name and place it; ``rows`` are its rows in the (out, in) matrix, None for all."""

    role: str
    layer: str | None
    label: str = ""
    in_out: bool = False
    rows: Sequence[int] | None = None
    expert: int | None = None
    heads: int | None = None  # None where a test says nothing of them


@dataclass(frozen=True)
class Family:
    """Names as they are on disk, shapes, and for each what is expected (None: must be skipped)."""

    config: Mapping[str, object]
    tensors: dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]] = field(default_factory=dict)
    experts: int = 0  # experts on the first axis of a stack


def one(
    role: str, layer: str | None = None, in_out: bool = False, expert: int | None = None, heads: int | None = None
) -> tuple[Expected, ...]:
    return (Expected(role, layer, in_out=in_out, expert=expert, heads=heads),)


def thirds(layer: str, size: int, in_out: bool = False) -> tuple[Expected, ...]:
    names = ((Q, "query"), (K, "key"), (V, "value"))
    return tuple(
        Expected(r, layer, f"[{n}]", in_out, range(i * size, (i + 1) * size)) for i, (r, n) in enumerate(names)
    )


def per_head(layer: str, heads: int, size: int) -> tuple[Expected, ...]:
    """Query, key and value of each head beside each other."""
    names = ((Q, "query"), (K, "key"), (V, "value"))
    rows = [[3 * size * h + i * size + r for h in range(heads) for r in range(size)] for i in range(3)]
    return tuple(Expected(r, layer, f"[{n}]", rows=rows[i], heads=heads) for i, (r, n) in enumerate(names))


def bert(prefix: str, cross: bool = False) -> dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]:
    found: dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]] = {
        f"{prefix}embeddings.word_embeddings.weight": ((29, 12), one(EMBED)),
        f"{prefix}embeddings.position_embeddings.weight": ((16, 12), one(EMBED)),
        f"{prefix}embeddings.token_type_embeddings.weight": ((2, 12), one(EMBED)),
        f"{prefix}embeddings.LayerNorm.weight": ((12,), SKIP),
        f"{prefix}pooler.dense.weight": ((12, 12), one(OTHER)),
    }
    for i in (0, 1, 10):
        at, layer = f"{prefix}encoder.layer.{i}.", str(i)
        for attention, label in (("attention", layer), ("crossattention", f"{layer}.cross"))[: 2 if cross else 1]:
            found |= {
                f"{at}{attention}.self.query.weight": ((12, 12), one(Q, label)),
                f"{at}{attention}.self.query.bias": ((12,), SKIP),
                f"{at}{attention}.self.key.weight": ((12, 12), one(K, label)),
                f"{at}{attention}.self.value.weight": ((12, 12), one(V, label)),
                f"{at}{attention}.output.dense.weight": ((12, 12), one(O, label)),
                f"{at}{attention}.output.LayerNorm.weight": ((12,), SKIP),
            }
        found |= {
            f"{at}intermediate.dense.weight": ((24, 12), one(UP, layer)),
            f"{at}output.dense.weight": ((12, 24), one(DOWN, layer)),
        }
    return found


def gpt2(prefix: str) -> dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]:
    at = f"{prefix}h.3."
    return {
        f"{prefix}wte.weight": ((31, 12), one(EMBED)),
        f"{prefix}wpe.weight": ((16, 12), one(EMBED)),
        f"{at}attn.bias": ((1, 1, 16, 16), SKIP),
        f"{at}attn.masked_bias": ((), SKIP),
        f"{at}ln_1.weight": ((12,), SKIP),
        f"{at}attn.c_attn.weight": ((12, 36), thirds("3", 12, in_out=True)),
        f"{at}attn.c_attn.bias": ((36,), SKIP),
        f"{at}attn.c_proj.weight": ((12, 12), one(O, "3", in_out=True)),
        f"{at}mlp.c_fc.weight": ((12, 48), one(UP, "3", in_out=True)),
        f"{at}mlp.c_proj.weight": ((48, 12), one(DOWN, "3", in_out=True)),
    }


def llama(prefix: str = "model.", bias: bool = False) -> dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]:
    found: dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]] = {
        f"{prefix}embed_tokens.weight": ((31, 16), one(EMBED)),
        f"{prefix}norm.weight": ((16,), SKIP),
        "lm_head.weight": ((31, 16), one(HEAD)),
    }
    for i in (0, 1):
        at = f"{prefix}layers.{i}."
        found |= {
            f"{at}self_attn.q_proj.weight": ((16, 16), one(Q, str(i))),
            f"{at}self_attn.k_proj.weight": ((8, 16), one(K, str(i))),
            f"{at}self_attn.v_proj.weight": ((8, 16), one(V, str(i))),
            f"{at}self_attn.o_proj.weight": ((16, 16), one(O, str(i))),
            f"{at}self_attn.rotary_emb.inv_freq": ((4,), SKIP),
            f"{at}mlp.gate_proj.weight": ((40, 16), one(GATE, str(i))),
            f"{at}mlp.up_proj.weight": ((40, 16), one(UP, str(i))),
            f"{at}mlp.down_proj.weight": ((16, 40), one(DOWN, str(i))),
            f"{at}input_layernorm.weight": ((16,), SKIP),
        }
        if bias:
            found[f"{at}self_attn.q_proj.bias"] = ((16,), SKIP)
    return found


def t5(gated: bool) -> dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]:
    found: dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]] = {"shared.weight": ((31, 12), one(EMBED))}
    for stack, feed in (("encoder", 1), ("decoder", 2)):
        at, layer = f"{stack}.block.0.", f"{stack}.0"
        for sub, name, label in ((0, "SelfAttention", layer), (1, "EncDecAttention", f"{layer}.cross"))[:feed]:
            for leaf, role in (("q", Q), ("k", K), ("v", V), ("o", O)):
                found[f"{at}layer.{sub}.{name}.{leaf}.weight"] = ((12, 12), one(role, label))
        found[f"{at}layer.0.SelfAttention.relative_attention_bias.weight"] = ((32, 2), SKIP)
        found[f"{at}layer.0.layer_norm.weight"] = ((12,), SKIP)
        inner = {"wi_0": GATE, "wi_1": UP} if gated else {"wi": UP}
        for leaf, role in inner.items():
            found[f"{at}layer.{feed}.DenseReluDense.{leaf}.weight"] = ((20, 12), one(role, layer))
        found[f"{at}layer.{feed}.DenseReluDense.wo.weight"] = ((12, 20), one(DOWN, layer))
    return found


def vit(layers: str, names: dict[str, str]) -> dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]:
    at = f"vit.{layers}.0."
    shapes = {UP: (24, 12), DOWN: (12, 24)}
    found: dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]] = {
        "vit.embeddings.cls_token": ((1, 1, 12), SKIP),
        "vit.embeddings.position_embeddings": ((1, 17, 12), one(EMBED)),
        "vit.embeddings.patch_embeddings.projection.weight": ((12, 3, 4, 4), one(CONV)),
        f"{at}layernorm_before.weight": ((12,), SKIP),
        "classifier.weight": ((5, 12), one(HEAD)),
    }
    return found | {f"{at}{name}.weight": (shapes.get(role, (12, 12)), one(role, "0")) for name, role in names.items()}


VIT_HUB = {
    "attention.attention.query": Q,
    "attention.attention.key": K,
    "attention.attention.value": V,
    "attention.output.dense": O,
    "intermediate.dense": UP,
    "output.dense": DOWN,
}
VIT_V5 = {
    "attention.q_proj": Q,
    "attention.k_proj": K,
    "attention.v_proj": V,
    "attention.o_proj": O,
    "mlp.fc1": UP,
    "mlp.fc2": DOWN,
}

FAMILIES: dict[str, Family] = {
    "bert": Family({"model_type": "bert"}, bert("bert.")),
    "bert without prefix or config": Family({}, bert("")),
    "bert decoder with cross attention": Family({"model_type": "bert"}, bert("bert.", cross=True)),
    "sentence-transformers prefix": Family({}, bert("0.auto_model.")),
    "roberta": Family(
        {"model_type": "roberta"},
        bert("roberta.")
        | {"lm_head.dense.weight": ((12, 12), one(OTHER)), "lm_head.decoder.weight": ((29, 12), one(HEAD))},
    ),
    "gpt2": Family({"model_type": "gpt2"}, gpt2("transformer.")),
    "gpt2 without prefix or config": Family({}, gpt2("")),
    "gpt2 compiled": Family({"model_type": "gpt2"}, gpt2("_orig_mod.transformer.")),
    "gpt2 square projections only": Family(
        {"model_type": "gpt2"}, {"h.0.attn.c_proj.weight": ((12, 12), one(O, "0", in_out=True))}
    ),
    "gpt_bigcode multi-query": Family(
        {"model_type": "gpt_bigcode", "multi_query": True, "n_head": 3},
        {
            "transformer.h.0.attn.c_attn.weight": (
                (20, 12),
                (
                    Expected(Q, "0", "[query]", rows=range(12)),
                    Expected(K, "0", "[key]", rows=range(12, 16)),
                    Expected(V, "0", "[value]", rows=range(16, 20)),
                ),
            ),
            "transformer.h.0.attn.c_proj.weight": ((12, 12), one(O, "0")),
            "transformer.h.0.mlp.c_fc.weight": ((48, 12), one(UP, "0")),
        },
    ),
    "gpt_bigcode multi-head": Family(
        {"model_type": "gpt_bigcode", "multi_query": False, "n_head": 3},
        {"transformer.h.0.attn.c_attn.weight": ((36, 12), per_head("0", 3, 4))},
    ),
    "gpt-neox without config stays whole": Family(
        {}, {"gpt_neox.layers.0.attention.query_key_value.weight": ((36, 12), one("QKV", "0"))}
    ),
    "an unknown family's fused matrix stays whole": Family(
        {"model_type": "nobody_knows", "num_attention_heads": 4, "num_key_value_heads": 2},
        {
            "model.layers.0.self_attn.qkv_proj.weight": ((32, 16), one("QKV", "0")),
            "model.layers.0.attention.wqkv.weight": ((32, 16), one("QKV", "0")),
        },
    ),
    "gpt-neox": Family(
        {"model_type": "gpt_neox", "num_attention_heads": 3, "hidden_size": 12},
        {
            "gpt_neox.layers.0.attention.query_key_value.weight": ((36, 12), per_head("0", 3, 4)),
            "gpt_neox.layers.0.attention.dense.weight": ((12, 12), one(O, "0")),
            "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": ((48, 12), one(UP, "0")),
            "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": ((12, 48), one(DOWN, "0")),
        },
    ),
    "phi3 fused": Family(
        {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2},
        {
            "model.layers.0.self_attn.qkv_proj.weight": (
                (32, 16),
                (
                    Expected(Q, "0", "[query]", rows=range(16)),
                    Expected(K, "0", "[key]", rows=range(16, 24)),
                    Expected(V, "0", "[value]", rows=range(24, 32)),
                ),
            ),
            "model.layers.0.mlp.gate_up_proj.weight": (
                (48, 16),
                (Expected(GATE, "0", "[gate]", rows=range(24)), Expected(UP, "0", "[up]", rows=range(24, 48))),
            ),
        },
    ),
    "llama": Family({"model_type": "llama"}, llama()),
    "mistral": Family({"model_type": "mistral"}, llama()),
    "qwen2": Family({"model_type": "qwen2"}, llama(bias=True)),
    "llama wrapped": Family({"model_type": "llama"}, llama("module.model.")),
    "mixtral experts": Family(
        {"model_type": "mixtral"},
        {
            "model.layers.0.block_sparse_moe.gate.weight": ((4, 16), one(ROUTER, "0")),
            "model.layers.0.block_sparse_moe.experts.0.w1.weight": ((24, 16), one(GATE, "0", expert=0)),
            "model.layers.0.block_sparse_moe.experts.0.w2.weight": ((16, 24), one(DOWN, "0", expert=0)),
            "model.layers.0.block_sparse_moe.experts.13.w3.weight": ((24, 16), one(UP, "0", expert=13)),
        },
    ),
    "t5": Family({"model_type": "t5"}, t5(gated=False)),
    "t5 v1.1": Family({"model_type": "t5"}, t5(gated=True)),
    "vit on the hub": Family({"model_type": "vit"}, vit("encoder.layer", VIT_HUB)),
    "vit in transformers 5": Family({"model_type": "vit"}, vit("layers", VIT_V5)),
    "plain mlp": Family(
        {},
        {
            "fc1.weight": ((20, 12), one(OTHER, "fc1")),
            "fc1.bias": ((20,), SKIP),
            "fc2.weight": ((5, 20), one(OTHER, "fc2")),
            "conv1.weight": ((6, 3, 3, 3), one(CONV, "conv1")),
            "bn1.weight": ((6,), SKIP),
            "bn1.num_batches_tracked": ((), SKIP),
        },
    ),
    "plain sequential": Family(
        {}, {"0.weight": ((20, 12), one(OTHER, "0")), "2.weight": ((5, 20), one(OTHER, "2")), "2.bias": ((5,), SKIP)}
    ),
    "plain list of layers": Family({}, {f"layers.{i}.weight": ((9, 9), one(OTHER, str(i))) for i in (0, 3, 11)}),
    "plain conv1d by name": Family({}, {"conv.weight": ((6, 4, 5), one(CONV, "conv"))}),
    "resnet stages": Family(
        {},
        {
            "conv1.weight": ((6, 3, 7, 7), one(CONV, "conv1")),
            "layer2.1.conv1.weight": ((8, 6, 3, 3), one(CONV, "layer2.1")),
        },
    ),
    "nn.TransformerEncoder": Family(
        {},
        {
            "layers.0.self_attn.in_proj_weight": ((36, 12), thirds("0", 12)),
            "layers.0.self_attn.out_proj.weight": ((12, 12), one(O, "0")),
            "layers.0.linear1.weight": ((24, 12), one(UP, "0")),
            "layers.0.linear2.weight": ((12, 24), one(DOWN, "0")),
        },
    ),
}


def make_tensors(family: Family, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random values with a common offset, so that PII is far from the baseline and no two sides agree."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) + 0.4).to(dtype) for name, (shape, _) in family.tensors.items()
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, object] | None = None) -> Path:
    """A folder as the hub has it: model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """The same tensors dealt over several files, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        dealt = dict(list(tensors.items())[i::shards])
        save_file(dealt, folder / file)
        weight_map |= dict.fromkeys(dealt, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def numpy_pii(vectors: np.ndarray) -> float:
    """Mean absolute cosine over the pairs of rows, in float64, by the definition; zero rows left out."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(1))
    unit = wide[lengths > 0] / lengths[lengths > 0, None]
    n = len(unit)
    return float(np.triu(np.abs(unit @ unit.T), 1).sum() / (n * (n - 1) / 2))

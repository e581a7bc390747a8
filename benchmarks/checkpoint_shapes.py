"""Names, shapes and stored types of known models, tensor by tensor, as their files on the hub have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

BF16, F32, F8 = "BF16", "F32", "F8_E4M3"
ITEM_BYTES = {BF16: 2, F32: 4, F8: 1, "F16": 2}
BLOCK = 128  # side of a float8 block that shares one scale


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file.

    Attributes:
        name: as on the hub.
        shape: as stored, (out, in) for a matrix.
        dtype: as safetensors names it.
        scales: it holds the scales of float8 blocks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = BF16
    scales: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shapes:
    """What decides a model's tensors; the letters of the models' own configurations.

    Attributes:
        model_type: "llama", "mixtral" or "deepseek_v3".
        hidden: width.
        layers: in the whole model.
        inner: width between the two linear layers of a dense block.
        vocabulary: rows of embedding and head.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: length of one head.
        experts: of a layer, 0 for none.
        expert_inner: width of an expert.
        dense_layers: layers before the first with experts.
        q_rank: of the queries' factors (latent attention).
        kv_rank: of the keys' and values'.
        rope_dim: rotated part of a head there.
        edges: with embedding, last norm and head.
        last_layers: with the layer that predicts one more token, only in a whole model.
    """

    model_type: str
    hidden: int
    layers: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    experts: int = 0
    expert_inner: int = 0
    dense_layers: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 64
    edges: bool = True
    last_layers: int = 0


LLAMA_70B = Shapes("llama", 8192, 80, 28672, 128256, 64, 8)
MIXTRAL = Shapes("mixtral", 4096, 32, 14336, 32000, 32, 8, experts=8, expert_inner=14336)
DEEPSEEK = Shapes(
    "deepseek_v3", 7168, 61, 18432, 129280, 128, 128, experts=256, expert_inner=2048, dense_layers=3, q_rank=1536,
    kv_rank=512, last_layers=1,
)  # fmt: skip
MODELS = {
    "llama-3-70b": LLAMA_70B,
    "llama-3-8b": Shapes("llama", 4096, 32, 14336, 128256, 32, 8),
    "mixtral-8x7b": MIXTRAL,
    "deepseek-v3": DEEPSEEK,
    # the same trees at sizes for tests and short runs
    "llama-500m": Shapes("llama", 1024, 14, 4096, 32000, 16, 4, head_dim=64),
    "llama-30m": Shapes("llama", 512, 4, 1408, 2048, 8, 2, head_dim=64),
    "llama-small": Shapes("llama", 256, 3, 768, 512, 8, 2, head_dim=32),
    "mixtral-small": Shapes("mixtral", 128, 2, 256, 320, 4, 2, head_dim=32, experts=4, expert_inner=192),
    "deepseek-small": Shapes(
        "deepseek_v3", 256, 3, 448, 320, 4, 4, head_dim=64, experts=4, expert_inner=192, dense_layers=1, q_rank=160,
        kv_rank=96, rope_dim=16,
    ),
}  # fmt: skip


def tensors(model: Shapes) -> Iterator[Spec]:
    """All tensors in the model's order: embedding, layers, last norm, head."""
    if model.edges:
        yield Spec("model.embed_tokens.weight", (model.vocabulary, model.hidden))
    for layer in range(model.layers):
        yield from layer_tensors(model, layer)
    if model.edges:
        yield Spec("model.norm.weight", (model.hidden,))
        yield Spec("lm_head.weight", (model.vocabulary, model.hidden))
    for layer in range(model.layers, model.layers + model.last_layers):
        yield from _last_layer(model, layer)


def layer_tensors(model: Shapes, layer: int) -> Iterator[Spec]:
    """Those of one layer."""
    at = f"model.layers.{layer}."
    hidden = model.hidden
    if model.q_rank:
        yield from _latent_attention(model, at)
    else:
        wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
        for leaf, shape in (
            ("q_proj", (wide, hidden)), ("k_proj", (narrow, hidden)), ("v_proj", (narrow, hidden)),
            ("o_proj", (hidden, wide)),
        ):  # fmt: skip
            yield Spec(f"{at}self_attn.{leaf}.weight", shape)
    if model.experts and layer >= model.dense_layers:
        yield from _experts(model, at)
    else:
        yield from _feed_forward(model, f"{at}mlp.", model.inner)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Spec(f"{at}{norm}.weight", (hidden,))


def _feed_forward(model: Shapes, at: str, inner: int) -> Iterator[Spec]:
    shapes = {"gate_proj": (inner, model.hidden), "up_proj": (inner, model.hidden), "down_proj": (model.hidden, inner)}
    for leaf, shape in shapes.items():
        yield from _linear(model, f"{at}{leaf}", shape)


def _experts(model: Shapes, at: str) -> Iterator[Spec]:
    hidden, inner = model.hidden, model.expert_inner
    if model.model_type == "mixtral":
        yield Spec(f"{at}block_sparse_moe.gate.weight", (model.experts, hidden))
        for expert in range(model.experts):
            for leaf, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield Spec(f"{at}block_sparse_moe.experts.{expert}.{leaf}.weight", shape)
        return
    yield Spec(f"{at}mlp.gate.weight", (model.experts, hidden))
    yield Spec(f"{at}mlp.gate.e_score_correction_bias", (model.experts,), F32)
    for place in (*(f"experts.{expert}" for expert in range(model.experts)), "shared_experts"):
        yield from _feed_forward(model, f"{at}mlp.{place}.", inner)


def _latent_attention(model: Shapes, at: str) -> Iterator[Spec]:
    hidden, heads, own = model.hidden, model.heads, model.head_dim
    yield from _linear(model, f"{at}self_attn.q_a_proj", (model.q_rank, hidden))
    yield Spec(f"{at}self_attn.q_a_layernorm.weight", (model.q_rank,))
    yield from _linear(model, f"{at}self_attn.q_b_proj", (heads * (own + model.rope_dim), model.q_rank))
    yield from _linear(model, f"{at}self_attn.kv_a_proj_with_mqa", (model.kv_rank + model.rope_dim, hidden))
    yield Spec(f"{at}self_attn.kv_a_layernorm.weight", (model.kv_rank,))
    yield from _linear(model, f"{at}self_attn.kv_b_proj", (heads * 2 * own, model.kv_rank))
    yield from _linear(model, f"{at}self_attn.o_proj", (hidden, heads * own))


def _last_layer(model: Shapes, layer: int) -> Iterator[Spec]:
    at, hidden = f"model.layers.{layer}.", model.hidden
    yield Spec(f"{at}embed_tokens.weight", (model.vocabulary, hidden))
    yield Spec(f"{at}enorm.weight", (hidden,))
    yield Spec(f"{at}hnorm.weight", (hidden,))
    yield Spec(f"{at}eh_proj.weight", (hidden, 2 * hidden))
    yield from layer_tensors(model, layer)
    yield Spec(f"{at}shared_head.norm.weight", (hidden,))
    yield Spec(f"{at}shared_head.head.weight", (model.vocabulary, hidden))


def _linear(model: Shapes, name: str, shape: tuple[int, int]) -> Iterator[Spec]:
    """One linear layer; DeepSeek stores float8 and a scale for each block, ragged at the edges."""
    if model.model_type == "deepseek_v3":
        yield from scaled(f"{name}.weight", shape)
    else:
        yield Spec(f"{name}.weight", shape)


def scaled(name: str, shape: tuple[int, ...]) -> Iterator[Spec]:
    """A matrix as float8 with its block scales."""
    yield Spec(name, shape, F8)
    yield Spec(f"{name}_scale_inv", tuple(-(-size // BLOCK) for size in shape), F32, scales=True)


def with_layers(model: Shapes, layers: int | None = None, gb: float | None = None) -> Shapes:
    """The first layers of a model, or as many as fit into so many gigabytes (at least one).

    Raises:
        ValueError: if the model has not so many; by size a model of Llama's or Mixtral's kind may be made deeper.
    """
    if layers is None and gb is None:
        return model
    if layers is None:
        assert gb is not None
        each = sum(spec.nbytes for spec in layer_tensors(model, model.dense_layers))
        rest = sum(spec.nbytes for spec in tensors(replace(model, layers=0, last_layers=0)))
        layers = max(1, int((gb * 1e9 - rest) // each))
    elif not 1 <= layers <= model.layers:
        raise ValueError(f"layers needs 1 to {model.layers}, got {layers}")
    return replace(model, layers=layers, last_layers=model.last_layers if layers == model.layers else 0)


def config(model: Shapes) -> dict[str, object]:
    """What ``config.json`` says of the shapes."""
    names = {"llama": "Llama", "mixtral": "Mixtral", "deepseek_v3": "DeepseekV3"}
    found: dict[str, object] = {
        "architectures": [f"{names[model.model_type]}ForCausalLM"],
        "model_type": model.model_type,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if model.model_type == "mixtral":
        found |= {"num_local_experts": model.experts, "num_experts_per_tok": 2}
    if model.model_type != "deepseek_v3":
        return found | {"head_dim": model.head_dim}
    return found | {
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": model.expert_inner,
        "first_k_dense_replace": model.dense_layers,
        "num_nextn_predict_layers": model.last_layers,
        "q_lora_rank": model.q_rank,
        "kv_lora_rank": model.kv_rank,
        "qk_nope_head_dim": model.head_dim,
        "qk_rope_head_dim": model.rope_dim,
        "v_head_dim": model.head_dim,
        "quantization_config": FLOAT8,
    }


FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}

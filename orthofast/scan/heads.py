"""Attention heads as a model's configuration gives them, for each of its towers and layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUERY = ("num_attention_heads", "n_head", "num_heads", "n_heads", "num_query_heads", "attention_heads")
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "n_kv_heads", "multi_query_group_num")
SIZE = ("head_dim", "d_kv", "kv_channels", "attention_head_dim", "attention_head_size", "d_head")
HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "dim", "embedding_length")
# words of a tensor's name -> keys of the configuration of that tower
TOWERS = (
    (re.compile(r"thinker"), ("thinker_config",)),
    (re.compile(r"talker"), ("talker_config",)),
    (re.compile(r"vision|visual|image|vit\b|vpm|vit_"), ("vision_config", "vision_encoder", "visual", "encoder")),
    (re.compile(r"audio|speech"), ("audio_config", "audio_encoder", "speech_config", "encoder")),
    (re.compile(r"q_?former"), ("qformer_config",)),
    (re.compile(r"text_encoder"), ("text_encoder", "text_config")),
    (re.compile(r"text|language|llm"), ("text_config", "llm_config", "language_config", "decoder")),
    (re.compile(r"encoder"), ("encoder",)),
    (re.compile(r"decoder"), ("decoder", "decoder_config", "text_config")),
)
TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of one layer; 0 stands for what the configuration does not tell.

    Attributes:
        query: heads of the queries and of the output's columns.
        key_value: heads of the keys and values; fewer than ``query`` where queries share them.
        size: rows of one head in queries and keys.
        value_size: rows of one head in values, columns of one in the output.
    """

    query: int = 0
    key_value: int = 0
    size: int = 0
    value_size: int = 0

    def rows(self, role: str, rows: int) -> int:
        """Heads in a matrix of this role with so many rows; 0 unless both fit."""
        if role == "Query":
            return _fit(rows, self.query, self.size)
        if role == "Keys":
            return _fit(rows, self.key_value, self.size)
        return _fit(rows, self.key_value, self.value_size or self.size) if role == "Values" else 0

    def columns(self, columns: int) -> int:
        """Heads in the columns of the attention's output; 0 unless they fit."""
        return _fit(columns, self.query, self.value_size or self.size)


def tower_of(config: Mapping[str, object], segments: Sequence[str]) -> Mapping[str, object]:
    """The part of a configuration that rules the tensor with these words in its name.

    >>> config = {"model_type": "llava", "text_config": {"num_attention_heads": 8}, "vision_config": {"num_heads": 4}}
    >>> tower_of(config, ["vision_tower", "layers", "0"])
    {'num_heads': 4}
    >>> tower_of(config, ["model", "layers", "0"])
    {'num_attention_heads': 8}
    """
    found = config
    for segment in segments:
        for word, keys in TOWERS:
            if not word.search(segment):
                continue
            inner = next((found[key] for key in keys if isinstance(found.get(key), Mapping)), None)
            if isinstance(inner, Mapping):
                found = inner
                break
            if "vision_config" in keys and "vocab_size" in found:
                return {}  # sizes of the text say nothing of the images
    for _ in range(2):  # thinker_config.text_config
        if natural(found, QUERY):
            break
        inner = next((found[key] for key in TEXT if isinstance(found.get(key), Mapping)), None)
        found = inner if isinstance(inner, Mapping) else found
    return found


def heads_of(tower: Mapping[str, object], segments: Sequence[str] = (), layer: int | None = None) -> Heads:
    """Heads of one layer of a tower.

    Args:
        tower: from :func:`tower_of`.
        segments: words of the tensor's name; encoders and decoders may have heads of their own.
        layer: number of the layer, for configurations that list one value per layer.

    >>> heads_of({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512})
    Heads(query=8, key_value=2, size=64, value_size=0)
    """
    attention = tower.get("attn_config")
    inner = attention if isinstance(attention, Mapping) else {}
    side = "decoder" if "decoder" in segments else "encoder"
    query = natural(tower, (f"{side}_attention_heads", f"{side}_num_heads", *QUERY), layer)
    shared = natural(tower, KEY_VALUE, layer) or natural(inner, KEY_VALUE, layer)
    if tower.get("model_type") in ("chatglm", "glm4") and not tower.get("multi_query_attention", True):
        shared = 0
    size = natural(tower, ("qk_head_dim", *SIZE), layer)
    nope, rope = natural(tower, ("qk_nope_head_dim",)), natural(tower, ("qk_rope_head_dim",))
    if nope and rope:
        size = nope + rope
    hidden = natural(tower, HIDDEN)
    if not size and query and hidden % query == 0:
        size = hidden // query
    return Heads(query, shared or query, size, natural(tower, ("v_head_dim",), layer))


def with_latent_sizes(config: Mapping[str, object]) -> Mapping[str, object]:
    """The configuration of a GGUF file with the sizes of latent attention under the names other files use."""
    settings, architecture = config.get("gguf"), config.get("model_type")
    if not isinstance(settings, Mapping) or not natural(config, ("kv_lora_rank",)):
        return config
    prefix = f"{architecture}.attention"
    keys = natural(settings, (f"{prefix}.key_length_mla", f"{prefix}.key_length"))
    values = natural(settings, (f"{prefix}.value_length_mla", f"{prefix}.value_length"))
    rope = natural(settings, (f"{architecture}.rope.dimension_count",))
    if not 0 < rope < keys:
        return config
    return {**config, "qk_nope_head_dim": keys - rope, "qk_rope_head_dim": rope, "v_head_dim": values}


def varies(tower: Mapping[str, object]) -> bool:
    """Whether the layers of a tower differ in their heads."""
    return any(isinstance(tower.get(key), list | tuple) for key in (*QUERY, *KEY_VALUE, *SIZE))


def natural(config: Mapping[str, object], keys: Sequence[str], layer: int | None = None) -> int:
    """The first of these keys that holds a positive whole number, or a list with one for this layer; else 0."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list | tuple) and layer is not None and layer < len(value):
            value = value[layer]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _fit(rows: int, heads: int, size: int) -> int:
    """Heads that a side of a matrix holds; a known size must fit too."""
    if not heads or rows % heads or (size and rows != heads * size):
        return 0
    return heads

"""How the rows of a fused matrix are dealt to its parts: one function per layout, chosen by family and configuration.

The layouts are those of the modelling code in transformers and of the converters in llama.cpp. A cut that is not
certain gives no parts: a wrong one is worse than one matrix of role QKV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orthofast.scan.heads import Heads, natural

THIRDS = (("query", "Query"), ("key", "Keys"), ("value", "Values"))
HALVES = (("gate", "Linear_1.gate"), ("up", "Linear_1.weight"))
CODEGEN_BLOCKS = 4  # the model was trained on four devices, and its rows still lie so


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a fused (out, in) matrix that belong together.

    The rows are cut into ``repeats`` equal runs; the part is rows ``start`` to ``stop`` of every run.

    Attributes:
        label: what is appended to the tensor's name.
        role: the role of the part.
        start, stop: rows within each run.
        repeats: how many runs; 1 for one block.
        heads: attention heads in the part, 0 where that is not known.
    """

    label: str
    role: str
    start: int
    stop: int
    repeats: int = 1
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Fused:
    """What a layout is told: the sizes of the (out, in) matrix, its heads, and its tower's configuration."""

    out: int
    inward: int
    heads: Heads
    tower: Mapping[str, object]


def parts_of(layout: str, fused: Fused) -> tuple[Part, ...]:
    """The parts of a fused matrix; none where the cut is not certain.

    >>> [(part.role, part.start, part.stop) for part in parts_of("thirds", Fused(12, 4, Heads(), {}))]
    [('Query', 0, 4), ('Keys', 4, 8), ('Values', 8, 12)]
    """
    return LAYOUTS[layout](fused)


def _thirds(fused: Fused) -> tuple[Part, ...]:
    """Query, key and value, or key and value alone, each as large as the input."""
    if fused.out == 3 * fused.inward:
        return _equal_thirds(fused)
    if fused.out != 2 * fused.inward:
        return ()
    shared = _whole(fused.heads.key_value, fused.inward)
    return _cut((fused.inward, fused.inward), THIRDS[1:], (shared, shared))


def _equal_thirds(fused: Fused) -> tuple[Part, ...]:
    if fused.out % 3:
        return ()
    size = fused.out // 3
    return _cut((size,) * 3, THIRDS, (_whole(fused.heads.query, size),) * 3)


def _gated_quarters(fused: Fused) -> tuple[Part, ...]:
    if fused.out % 4:
        return ()
    return _cut((fused.out // 4,) * 4, (("gate", "Attention.gate"), *THIRDS), (0, *(fused.heads.query,) * 3))


def _grouped(fused: Fused) -> tuple[Part, ...]:
    """All query heads, then all key heads, then all value heads."""
    query, shared = fused.heads.query, fused.heads.key_value
    if not query or not shared or fused.out % (query + 2 * shared):
        return ()
    size = fused.out // (query + 2 * shared)
    return _cut((query * size, shared * size, shared * size), THIRDS, (query, shared, shared))


def _per_head(fused: Fused) -> tuple[Part, ...]:
    """Query, key and value of one head beside each other, head after head."""
    heads = fused.heads.query
    if not heads or fused.out % (3 * heads):
        return ()
    return _cut((fused.out // (3 * heads),) * 3, THIRDS, (heads,) * 3, heads)


def _per_group(fused: Fused) -> tuple[Part, ...]:
    """The query heads that share a key, that key, its value; group after group."""
    query, shared = fused.heads.query, fused.heads.key_value
    if not query or not shared or query % shared or fused.out % (query + 2 * shared):
        return ()
    size = fused.out // (query + 2 * shared)
    return _cut((query // shared * size, size, size), THIRDS, (query, shared, shared), shared)


def _falcon(fused: Fused) -> tuple[Part, ...]:
    """Three layouts under one name: groups (40B, 180B), one shared key (7B), head by head (RW)."""
    tower, heads = fused.tower, fused.heads
    old_40b = tower.get("model_type") == "RefinedWeb"
    if tower.get("new_decoder_architecture") or old_40b:
        return _per_group(fused)
    if tower.get("multi_query", tower.get("model_type") == "falcon"):
        return _grouped(Fused(fused.out, fused.inward, Heads(heads.query, 1, heads.size), tower))
    return _per_head(fused)


def _gpt_bigcode(fused: Fused) -> tuple[Part, ...]:
    if fused.tower.get("multi_query", True):
        return _grouped(Fused(fused.out, fused.inward, Heads(fused.heads.query, 1, fused.heads.size), fused.tower))
    return _per_head(fused)


def _chatglm(fused: Fused) -> tuple[Part, ...]:
    return _grouped(fused) if fused.tower.get("multi_query_attention") else _per_head(fused)


def _codegen(fused: Fused) -> tuple[Part, ...]:
    """Four blocks; in each: query, value, key."""
    query, key, value = THIRDS
    if fused.out % (3 * CODEGEN_BLOCKS):
        return ()
    size = fused.out // (3 * CODEGEN_BLOCKS)
    return _cut((size,) * 3, (query, value, key), (fused.heads.query,) * 3, CODEGEN_BLOCKS)


def _doubled_query(fused: Fused) -> tuple[Part, ...]:
    """Head after head: its queries, then the gate of its output; a matrix of the plain size is all queries."""
    query, size = fused.heads.query, fused.heads.size
    if not query or fused.out != 2 * query * size:
        return ()
    return _cut((size, size), (THIRDS[0], ("gate", "Attention.gate")), (query, query), query)


def _key_value(fused: Fused) -> tuple[Part, ...]:
    """All keys, then all values."""
    if fused.out % 2:
        return ()
    shared = _whole(fused.heads.key_value, fused.out // 2)
    return _cut((fused.out // 2,) * 2, THIRDS[1:], (shared, shared))


def _latent_key_value(fused: Fused) -> tuple[Part, ...]:
    """Head after head: the keys without position, then the values (multi-head latent attention)."""
    keys = natural(fused.tower, ("qk_nope_head_dim",))
    values, query = natural(fused.tower, ("v_head_dim",)), fused.heads.query
    if not keys or not values or fused.out != query * (keys + values):
        return ()
    return _cut((keys, values), THIRDS[1:], (query, query), query)


def _latent_and_rope(fused: Fused) -> tuple[Part, ...]:
    """Rows that compress keys and values, then the rotary key all heads share."""
    rope = natural(fused.tower, ("qk_rope_head_dim",))
    if not rope or rope >= fused.out:
        return ()
    return _cut((fused.out - rope, rope), (("latent", "KV.latent"), ("rope", "Keys.rope")), (0, 0))


def _linear_sizes(fused: Fused) -> tuple[int, int, int, int]:
    """Key heads, value heads and their sizes in gated linear attention; 0 where the configuration does not tell."""
    keys = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    first, second, third, last = (natural(fused.tower, (key,)) for key in keys)
    return first, second, third, last


def _linear_qkv(fused: Fused) -> tuple[Part, ...]:
    """Linear attention: all queries, all keys, all values; as many queries as keys."""
    keys, values, key_size, value_size = _linear_sizes(fused)
    if not fused.out == 2 * keys * key_size + values * value_size > 0:
        return ()
    return _cut((keys * key_size, keys * key_size, values * value_size), THIRDS, (keys, keys, values))


def _linear_qkvz(fused: Fused) -> tuple[Part, ...]:
    """Key head after key head: its query, the key, the values that share them, and their gates."""
    keys, values, key_size, value_size = _linear_sizes(fused)
    if not keys or values % keys or fused.out != 2 * (keys * key_size + values * value_size):
        return ()
    sizes = (key_size, key_size, values // keys * value_size, values // keys * value_size)
    return _cut(sizes, (*THIRDS, ("gate", "Attention.gate")), (keys, keys, values, values), keys)


def _gate_up(fused: Fused) -> tuple[Part, ...]:
    return () if fused.out % 2 else _cut((fused.out // 2,) * 2, HALVES, (0, 0))


def _gate_up_if_doubled(fused: Fused) -> tuple[Part, ...]:
    """Gate, then up, where the matrix has twice the rows of the width between the layers."""
    return _gate_up(fused) if fused.out == 2 * natural(fused.tower, ("ffn_hidden_size", "intermediate_size")) else ()


def _up_gate(fused: Fused) -> tuple[Part, ...]:
    return () if fused.out % 2 else _cut((fused.out // 2,) * 2, HALVES[::-1], (0, 0))


def _gate_up_alternating(fused: Fused) -> tuple[Part, ...]:
    """Even rows are the gate, odd rows go up."""
    return () if fused.out % 2 else _cut((1, 1), HALVES, (0, 0), fused.out // 2)


LAYOUTS: dict[str, Callable[[Fused], tuple[Part, ...]]] = {
    "thirds": _thirds,
    "equal_thirds": _equal_thirds,
    "gated_quarters": _gated_quarters,
    "grouped": _grouped,
    "per_head": _per_head,
    "per_group": _per_group,
    "falcon": _falcon,
    "gpt_bigcode": _gpt_bigcode,
    "chatglm": _chatglm,
    "codegen": _codegen,
    "doubled_query": _doubled_query,
    "key_value": _key_value,
    "latent_key_value": _latent_key_value,
    "latent_and_rope": _latent_and_rope,
    "linear_qkv": _linear_qkv,
    "linear_qkvz": _linear_qkvz,
    "gate_up": _gate_up,
    "gate_up_if_doubled": _gate_up_if_doubled,
    "up_gate": _up_gate,
    "gate_up_alternating": _gate_up_alternating,
}


def _cut(
    sizes: Sequence[int], labels: Sequence[tuple[str, str]], heads: Sequence[int], repeats: int = 1
) -> tuple[Part, ...]:
    """Consecutive parts of these sizes, in each of the runs."""
    parts = []
    start = 0
    for size, (label, role), count in zip(sizes, labels, heads, strict=True):
        parts.append(Part(label, role, start, start + size, repeats, count))
        start += size
    return tuple(parts)


def _whole(heads: int, rows: int) -> int:
    """Heads, where they divide the rows."""
    return heads if heads and rows % heads == 0 else 0

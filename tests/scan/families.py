"""Language models as their files name them: latent attention, stacked experts, fused matrices, GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.scan.checkpoints import (
    DOWN,
    EMBED,
    GATE,
    HEAD,
    OTHER,
    ROUTER,
    SKIP,
    UP,
    Expected,
    Family,
    K,
    O,
    Q,
    V,
    one,
    thirds,
)

DEPTHWISE, MIXER = "Conv.depthwise", "Mixer"
ATTENTION_GATE = ("gate", "Attention.gate")
Names = dict[str, tuple[tuple[int, ...], tuple[Expected, ...] | None]]


def grouped(layer: str, query: int, shared: int, size: int) -> tuple[Expected, ...]:
    """All queries, then all keys, then all values."""
    ends = (query * size, (query + shared) * size, (query + 2 * shared) * size)
    return (
        Expected(Q, layer, "[query]", rows=range(ends[0]), heads=query),
        Expected(K, layer, "[key]", rows=range(ends[0], ends[1]), heads=shared),
        Expected(V, layer, "[value]", rows=range(ends[1], ends[2]), heads=shared),
    )


def runs(layer: str, count: int, parts: Sequence[tuple[str, str, int, int]]) -> tuple[Expected, ...]:
    """Parts (label, role, rows in a run, heads) that follow each other in each of several runs."""
    length = sum(size for _, _, size, _ in parts)
    found = []
    start = 0
    for label, role, size, heads in parts:
        rows = [run * length + start + row for run in range(count) for row in range(size)]
        found.append(Expected(role, layer, f"[{label}]", rows=rows, heads=heads))
        start += size
    return tuple(found)


def stacked(role: str, layer: str, count: int, in_out: bool = False) -> tuple[Expected, ...]:
    return tuple(Expected(role, layer, f"[{e}]", in_out, expert=e) for e in range(count))


def stacked_gate_up(
    layer: str, count: int, width: int, in_out: bool, alternating: bool = False
) -> tuple[Expected, ...]:
    rows = (range(0, 2 * width, 2), range(1, 2 * width, 2)) if alternating else (range(width), range(width, 2 * width))
    return tuple(
        Expected(role, layer, f"[{e}][{label}]", in_out, rows=rows[i], expert=e)
        for e in range(count)
        for i, (label, role) in enumerate((("gate", GATE), ("up", UP)))
    )


def halves(layer: str, width: int, first: str = "gate") -> tuple[Expected, ...]:
    order = (("gate", GATE), ("up", UP)) if first == "gate" else (("up", UP), ("gate", GATE))
    return tuple(
        Expected(role, layer, f"[{label}]", rows=range(i * width, (i + 1) * width))
        for i, (label, role) in enumerate(order)
    )


LATENT = {"num_attention_heads": 2, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "hidden_size": 9}


def deepseek(at: str, layer: str) -> Names:
    latent = Expected("KV.latent", layer, "[latent]", rows=range(5))
    rope = Expected("Keys.rope", layer, "[rope]", rows=(5, 6))
    return {
        f"{at}self_attn.q_a_proj.weight": ((6, 9), one("Query.latent", layer, heads=0)),
        f"{at}self_attn.q_a_proj.weight_scale_inv": ((1, 1), SKIP),
        f"{at}self_attn.q_a_layernorm.weight": ((6,), SKIP),
        f"{at}self_attn.q_b_proj.weight": ((10, 6), one(Q, layer, heads=2)),
        f"{at}self_attn.kv_a_proj_with_mqa.weight": ((7, 9), (latent, rope)),
        f"{at}self_attn.kv_b_proj.weight": ((14, 5), runs(layer, 2, (("key", K, 3, 2), ("value", V, 4, 2)))),
        f"{at}self_attn.o_proj.weight": ((9, 8), one(O, layer, heads=2)),
        f"{at}mlp.gate.weight": ((16, 9), one(ROUTER, layer)),
        f"{at}mlp.gate.e_score_correction_bias": ((16,), SKIP),
        f"{at}mlp.experts.0.gate_proj.weight": ((4, 9), one(GATE, layer, expert=0)),
        f"{at}mlp.experts.15.up_proj.weight": ((4, 9), one(UP, layer, expert=15)),
        f"{at}mlp.experts.15.down_proj.weight": ((9, 4), one(DOWN, layer, expert=15)),
        f"{at}mlp.shared_experts.up_proj.weight": ((4, 9), one(UP, layer)),
    }


def gguf(layer: int = 0) -> Names:
    at = f"blk.{layer}."
    return {
        "token_embd.weight": ((31, 16), one(EMBED)),
        "output.weight": ((31, 16), one(HEAD)),
        "output_norm.weight": ((16,), SKIP),
        "rope_freqs.weight": ((4,), SKIP),
        f"{at}attn_norm.weight": ((16,), SKIP),
        f"{at}attn_q.weight": ((16, 16), one(Q, str(layer), heads=4)),
        f"{at}attn_k.weight": ((8, 16), one(K, str(layer), heads=2)),
        f"{at}attn_v.weight": ((8, 16), one(V, str(layer), heads=2)),
        f"{at}attn_output.weight": ((16, 16), one(O, str(layer), heads=4)),
    }


GGUF: Mapping[str, object] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 16}
LANGUAGE: dict[str, Family] = {
    "deepseek v3 with its layer of prediction": Family(
        {"model_type": "deepseek_v3", "num_hidden_layers": 4, "num_nextn_predict_layers": 1, **LATENT},
        {"model.embed_tokens.weight": ((29, 9), one(EMBED))}
        | deepseek("model.layers.3.", "3")
        | deepseek("model.layers.4.", "mtp.0")
        | {
            "model.layers.4.embed_tokens.weight": ((29, 9), one(EMBED, "mtp.0")),
            "model.layers.4.eh_proj.weight": ((9, 18), one(OTHER, "mtp.0")),
            "model.layers.4.shared_head.head.weight": ((29, 9), one(HEAD, "mtp.0")),
        },
    ),
    "latent attention without a config stays whole": Family(
        {}, {"model.layers.0.self_attn.kv_b_proj.weight": ((14, 5), one("KV", "0"))}
    ),
    "gguf llama": Family({"model_type": "llama", **GGUF}, gguf(11)),
    "gguf experts": Family(
        {"model_type": "llama", **GGUF},
        {
            "blk.0.ffn_gate_inp.weight": ((3, 16), one(ROUTER, "0")),
            "blk.0.ffn_gate_exps.weight": ((3, 6, 16), stacked(GATE, "0", 3)),
            "blk.0.ffn_up_exps.weight": ((3, 6, 16), stacked(UP, "0", 3)),
            "blk.0.ffn_down_exps.weight": ((3, 16, 6), stacked(DOWN, "0", 3)),
            "blk.0.ffn_up_shexp.weight": ((6, 16), one(UP, "0")),
        },
        experts=3,
    ),
    "gguf phi3 keeps its fused matrices": Family(
        {"model_type": "phi3", "intermediate_size": 20, **GGUF},
        {
            "blk.0.attn_qkv.weight": ((32, 16), grouped("0", 4, 2, 4)),
            "blk.0.ffn_up.weight": ((40, 16), halves("0", 20)),
            "blk.1.ffn_up.weight": ((20, 16), one(UP, "1")),
        },
    ),
    "gguf deepseek2": Family(
        {
            "model_type": "deepseek2",
            "num_attention_heads": 2,
            "head_dim": 7,
            "kv_lora_rank": 5,
            "gguf": {
                "deepseek2.attention.key_length": 7,
                "deepseek2.attention.key_length_mla": 5,
                "deepseek2.attention.value_length_mla": 4,
                "deepseek2.rope.dimension_count": 2,
            },
        },
        {
            "blk.0.attn_q_a.weight": ((6, 9), one("Query.latent", "0")),
            "blk.0.attn_q_b.weight": ((10, 6), one(Q, "0", heads=2)),
            "blk.0.attn_kv_b.weight": ((14, 5), runs("0", 2, (("key", K, 3, 2), ("value", V, 4, 2)))),
        },
    ),
    "gguf t5": Family(
        {},
        {
            "enc.blk.0.attn_q.weight": ((12, 12), one(Q, "enc.0")),
            "dec.blk.0.attn_o.weight": ((12, 12), one(O, "dec.0")),
            "dec.blk.0.cross_attn_k.weight": ((12, 12), one(K, "dec.0.cross")),
            "dec.blk.0.ffn_down.weight": ((12, 20), one(DOWN, "dec.0")),
        },
    ),
    "internlm2": Family(
        {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2},
        {
            "model.tok_embeddings.weight": ((31, 18), one(EMBED)),
            "model.layers.0.attention.wqkv.weight": (
                (30, 18),
                runs("0", 2, (("query", Q, 9, 6), ("key", K, 3, 2), ("value", V, 3, 2))),
            ),
            "model.layers.0.attention.wo.weight": ((18, 18), one(O, "0", heads=6)),
            "model.layers.0.feed_forward.w1.weight": ((20, 18), one(GATE, "0")),
            "model.layers.0.feed_forward.w3.weight": ((20, 18), one(UP, "0")),
            "model.layers.0.feed_forward.w2.weight": ((18, 20), one(DOWN, "0")),
            "output.weight": ((31, 18), one(HEAD)),
        },
    ),
    "chatglm2": Family(
        {
            "model_type": "chatglm",
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 4,
            "kv_channels": 4,
            "ffn_hidden_size": 20,
        },
        {
            "transformer.embedding.word_embeddings.weight": ((31, 16), one(EMBED)),
            "transformer.encoder.layers.0.self_attention.query_key_value.weight": ((32, 16), grouped("0", 4, 2, 4)),
            "transformer.encoder.layers.0.self_attention.dense.weight": ((16, 16), one(O, "0", heads=4)),
            "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": ((40, 16), halves("0", 20)),
            "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": ((16, 20), one(DOWN, "0")),
            "transformer.output_layer.weight": ((31, 16), one(HEAD)),
        },
    ),
    "baichuan": Family({}, {"model.layers.0.self_attn.W_pack.weight": ((36, 12), thirds("0", 12))}),
    "openelm has other heads in each layer": Family(
        {"model_type": "openelm", "head_dim": 4, "num_query_heads": [4, 6], "num_kv_heads": [2, 3]},
        {
            "transformer.token_embeddings.weight": ((31, 16), one(EMBED)),
            "transformer.layers.0.attn.qkv_proj.weight": ((32, 16), grouped("0", 4, 2, 4)),
            "transformer.layers.1.attn.qkv_proj.weight": ((48, 16), grouped("1", 6, 3, 4)),
            "transformer.layers.1.attn.out_proj.weight": ((16, 24), one(O, "1", heads=6)),
            "transformer.layers.1.ffn.proj_1.weight": ((40, 16), one(UP, "1")),
            "transformer.layers.1.ffn.proj_2.weight": ((16, 20), one(DOWN, "1")),
        },
    ),
    "qwen3-vl-moe stores experts as (in, out)": Family(
        {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 12, "num_attention_heads": 2}},
        {
            "model.language_model.layers.0.mlp.experts.gate_up_proj": ((2, 12, 10), stacked_gate_up("0", 2, 5, True)),
            "model.language_model.layers.0.mlp.experts.down_proj": ((2, 5, 12), stacked(DOWN, "0", 2, True)),
        },
        experts=2,
    ),
    "the same after transformers turned them": Family(
        {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 12, "num_attention_heads": 2}},
        {
            "model.language_model.layers.0.mlp.experts.gate_up_proj": ((2, 10, 12), stacked_gate_up("0", 2, 5, False)),
            "model.language_model.layers.0.mlp.experts.down_proj": ((2, 12, 5), stacked(DOWN, "0", 2)),
        },
        experts=2,
    ),
    "stacked experts without a config: the width tells the sides, nothing tells gate from up": Family(
        {},
        {
            "model.embed_tokens.weight": ((31, 12), one(EMBED)),
            "model.layers.0.mlp.experts.gate_up_proj": ((2, 12, 10), stacked(UP, "0", 2, True)),
            "model.layers.0.mlp.experts.down_proj": ((2, 5, 12), stacked(DOWN, "0", 2, True)),
            "model.layers.1.mlp.experts.gate_up_proj": ((2, 10, 12), stacked(UP, "1", 2)),
        },
        experts=2,
    ),
    "gpt-oss with biases": Family(
        {"model_type": "gpt_oss", "hidden_size": 6, "intermediate_size": 6},
        {
            "model.layers.0.mlp.router.weight": ((2, 6), one(ROUTER, "0")),
            "model.layers.0.mlp.experts.gate_up_proj": ((2, 6, 12), stacked_gate_up("0", 2, 6, True, True)),
            "model.layers.0.mlp.experts.gate_up_proj_bias": ((2, 12), SKIP),
            "model.layers.0.mlp.experts.down_proj": ((2, 6, 6), stacked(DOWN, "0", 2, True)),
            "model.layers.0.mlp.experts.down_proj_bias": ((2, 6), SKIP),
            "model.layers.0.self_attn.sinks": ((4,), SKIP),
        },
        experts=2,
    ),
    "aria": Family(
        {"model_type": "aria", "text_config": {"model_type": "aria_text"}},
        {
            "language_model.model.layers.0.mlp.experts.fc1.weight": ((2, 6, 12), stacked_gate_up("0", 2, 6, True)),
            "language_model.model.layers.0.mlp.experts.fc2.weight": ((2, 6, 6), stacked(DOWN, "0", 2, True)),
        },
        experts=2,
    ),
    "granitemoe": Family(
        {"model_type": "granitemoe"},
        {
            "model.layers.0.block_sparse_moe.router.layer.weight": ((2, 6), one(ROUTER, "0")),
            "model.layers.0.block_sparse_moe.input_linear.weight": ((2, 8, 6), stacked_gate_up("0", 2, 4, False)),
            "model.layers.0.block_sparse_moe.output_linear.weight": ((2, 6, 4), stacked(DOWN, "0", 2)),
            "model.layers.0.shared_mlp.input_linear.weight": ((8, 6), halves("0", 4)),
        },
        experts=2,
    ),
    "jetmoe has experts in its attention": Family(
        {"model_type": "jetmoe"},
        {
            "model.layers.0.self_attention.experts.input_linear.weight": ((2, 8, 6), stacked(Q, "0", 2)),
            "model.layers.0.self_attention.experts.output_linear.weight": ((2, 6, 8), stacked(O, "0", 2)),
            "model.layers.0.self_attention.kv_proj.weight": (
                (16, 6),
                (Expected(K, "0", "[key]", rows=range(8)), Expected(V, "0", "[value]", rows=range(8, 16))),
            ),
        },
        experts=2,
    ),
    "dbrx keeps experts on one axis": Family(
        {
            "model_type": "dbrx",
            "n_heads": 4,
            "d_model": 16,
            "attn_config": {"kv_n_heads": 2},
            "ffn_config": {"moe_num_experts": 3},
        },
        {
            "transformer.blocks.0.norm_attn_norm.norm_1.weight": ((16,), SKIP),
            "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": ((32, 16), grouped("0", 4, 2, 4)),
            "transformer.blocks.0.norm_attn_norm.attn.out_proj.weight": ((16, 16), one(O, "0", heads=4)),
            "transformer.blocks.0.ffn.router.layer.weight": ((3, 16), one(ROUTER, "0")),
            "transformer.blocks.0.ffn.experts.mlp.w1": ((15, 16), stacked(GATE, "0", 3)),
            "transformer.blocks.0.ffn.experts.mlp.v1": ((15, 16), stacked(UP, "0", 3)),
            "transformer.blocks.0.ffn.experts.mlp.w2": ((15, 16), stacked(DOWN, "0", 3, True)),
        },
        experts=3,
    ),
    "experts on one axis without a config": Family({}, {"transformer.blocks.0.ffn.experts.mlp.w1": ((15, 16), SKIP)}),
    "nomic": Family(
        {"model_type": "nomic_bert"},
        {
            "encoder.layers.0.attn.Wqkv.weight": ((36, 12), thirds("0", 12)),
            "encoder.layers.0.mlp.fc11.weight": ((20, 12), one(UP, "0")),
            "encoder.layers.0.mlp.fc12.weight": ((20, 12), one(GATE, "0")),
            "encoder.layers.0.mlp.fc2.weight": ((12, 20), one(DOWN, "0")),
        },
    ),
    "neobert and its wo": Family(
        {"model_type": "neobert"},
        {
            "encoder.weight": ((31, 12), one(EMBED)),
            "transformer_encoder.0.qkv.weight": ((36, 12), thirds("0", 12)),
            "transformer_encoder.0.wo.weight": ((12, 12), one(O, "0")),
            "transformer_encoder.0.ffn.w12.weight": ((40, 12), halves("0", 20)),
            "transformer_encoder.0.ffn.w3.weight": ((12, 20), one(DOWN, "0")),
        },
    ),
    "refact": Family(
        {"model_type": "gpt_refact"},
        {
            "transformer.h.0.mlp.linear_1.weight": ((20, 12), one(GATE, "0")),
            "transformer.h.0.mlp.linear_3.weight": ((20, 12), one(UP, "0")),
            "transformer.h.0.mlp.c_proj.weight": ((12, 20), one(DOWN, "0")),
        },
    ),
    "gte puts up before gate": Family(
        {"model_type": "new", "num_attention_heads": 3},
        {
            "new.encoder.layer.0.attention.qkv_proj.weight": ((36, 12), grouped("0", 3, 3, 4)),
            "new.encoder.layer.0.mlp.up_gate_proj.weight": ((40, 12), halves("0", 20, "up")),
        },
    ),
    "hrm puts the gate before query, key and value": Family(
        {"model_type": "hrm_text", "num_attention_heads": 3, "hidden_size": 12},
        {
            "model.layers.0.attn.gqkv_proj.weight": (
                (48, 12),
                runs("0", 1, ((*ATTENTION_GATE, 12, 0), ("query", Q, 12, 3), ("key", K, 12, 3), ("value", V, 12, 3))),
            ),
        },
    ),
    "falcon 40B as it was first published": Family(
        {"model_type": "RefinedWeb", "n_head": 4, "n_head_kv": 2},
        {
            "transformer.h.0.self_attention.query_key_value.weight": (
                (24, 12),
                runs("0", 2, (("query", Q, 6, 4), ("key", K, 3, 2), ("value", V, 3, 2))),
            ),
        },
    ),
    "molmo puts up before gate": Family(
        {"model_type": "molmo2", "text_config": {"model_type": "molmo2_text", "num_attention_heads": 4}},
        {
            "model.transformer.wte.new_embedding": ((3, 16), one(EMBED)),
            "model.transformer.blocks.0.self_attn.att_proj.weight": ((48, 16), grouped("0", 4, 4, 4)),
            "model.transformer.blocks.0.mlp.ff_proj.weight": ((40, 16), halves("0", 20, "up")),
        },
    ),
    "qwen 1": Family(
        {"model_type": "qwen", "num_attention_heads": 3, "hidden_size": 12},
        {
            "transformer.h.0.attn.c_attn.weight": ((36, 12), thirds("0", 12)),
            "transformer.h.0.attn.c_proj.weight": ((12, 12), one(O, "0", heads=3)),
            "transformer.h.0.mlp.w1.weight": ((20, 12), one(UP, "0")),
            "transformer.h.0.mlp.w2.weight": ((20, 12), one(GATE, "0")),
            "transformer.h.0.mlp.c_proj.weight": ((12, 20), one(DOWN, "0")),
        },
    ),
    "qwen3-next": Family(
        {
            "model_type": "qwen3_next",
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 3,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 3,
            "linear_value_head_dim": 2,
        },
        {
            "model.layers.3.self_attn.q_proj.weight": (
                (12, 8),
                runs("3", 2, (("query", Q, 3, 2), (*ATTENTION_GATE, 3, 2))),
            ),
            "model.layers.3.self_attn.o_proj.weight": ((8, 6), one(O, "3", heads=2)),
            "model.layers.0.linear_attn.in_proj_qkvz.weight": (
                (28, 8),
                runs("0", 2, (("query", Q, 3, 2), ("key", K, 3, 2), ("value", V, 4, 4), (*ATTENTION_GATE, 4, 4))),
            ),
            "model.layers.0.linear_attn.in_proj_ba.weight": ((8, 8), one(MIXER, "0")),
            "model.layers.0.linear_attn.conv1d.weight": ((20, 1, 4), one(DEPTHWISE, "0")),
            "model.layers.0.linear_attn.A_log": ((4,), SKIP),
            "model.layers.0.mlp.shared_expert_gate.weight": ((1, 8), one(ROUTER, "0")),
            "mtp.layers.0.self_attn.k_proj.weight": ((3, 8), one(K, "mtp.0", heads=1)),
        },
    ),
    "xlnet keeps heads on an axis": Family(
        {"model_type": "xlnet", "n_head": 2, "d_model": 6},
        {
            "transformer.layer.0.rel_attn.q": ((6, 2, 3), one(Q, "0", in_out=True, heads=2)),
            "transformer.layer.0.rel_attn.o": ((6, 2, 3), one(O, "0", heads=2)),
            "transformer.layer.0.ff.layer_1.weight": ((9, 6), one(UP, "0")),
            "transformer.layer.0.ff.layer_2.weight": ((6, 9), one(DOWN, "0")),
        },
    ),
}

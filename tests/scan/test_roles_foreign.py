"""Names, shapes and configurations of any kind are read without an error, and what is read fits the tensor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthofast.scan.matrices import holds_matrices, matrices_of
from orthofast.scan.roles import ROLES, Roles

LISTS = ("model.layers.0", "encoder.block.1.layer.0", "decoder.h.7", "blk.3", "visual.stages.1.blocks.2", "transformer")
CONTEXTS = (
    "self_attn",
    "attn",
    "mlp",
    "mlp.experts",
    "mlp.experts.2",
    "mixer",
    "linear_attn",
    "crossattention",
    "",
    "odd",
)
LEAVES = (
    *(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "wqkv",
        "Wqkv",
        "attn_qkv",
    ),
    *(
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "kv",
        "gqkv_proj",
        "in_proj_qkv",
        "in_proj_qkvz",
        "att_proj",
        "c_proj",
        "mlp.w1",
    ),
    *(
        "gate_up_proj",
        "up_gate_proj",
        "down_proj",
        "mlp.w2",
        "w1",
        "w3",
        "gate",
        "router",
        "fc1",
        "ffn_up",
        "embed_tokens",
    ),
    *(
        "rel_attn.q",
        "rel_attn.o",
        "attn_k_b",
        "attn_v_b",
        "conv",
        "bias",
        "lm_head",
        "dense_h_to_4h",
        "0",
        "",
        "\u00fc",
    ),
)
TYPES = (
    "",
    "gpt2",
    "falcon",
    "bloom",
    "codegen",
    "gpt_oss",
    "dbrx",
    "chatglm",
    "qwen3_next",
    "internlm2",
    "gpt_bigcode",
)
SIZES = st.one_of(
    *[st.integers(1, 4)] * 3,
    st.integers(-1, 9),
    st.just("4"),
    st.none(),
    st.lists(st.integers(0, 4), max_size=2),
    st.booleans(),
)
KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "num_experts", "v_head_dim", "n_layer")
PARTS = (LISTS, CONTEXTS, LEAVES, ("weight", "weight", "", "bias"))
names = st.tuples(*map(st.sampled_from, PARTS)).map(lambda words: ".".join(word for word in words if word))
sizes = st.sampled_from((0, 1, 2, 3, 4, 6, 8, 12, 16, 24))
shapes = st.sampled_from((2, 2, 2, 3, 3, 1, 4)).flatmap(lambda axes: st.tuples(*[sizes] * axes))
fitting = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 8}
latent = fitting | {"qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 1, "num_experts": 2}
other = st.dictionaries(st.sampled_from((*KEYS, "qk_nope_head_dim", "qk_rope_head_dim")), SIZES)
configs = st.one_of(st.just(fitting), st.just(latent), other)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(names, shapes, min_size=1, max_size=4), configs, st.sampled_from(TYPES))
def test_what_is_read_fits_the_tensor(
    tensors: dict[str, tuple[int, ...]], config: dict[str, object], model_type: str
) -> None:
    roles = Roles(tensors, config | {"model_type": model_type, "text_config": config})
    for name, shape in tensors.items():
        reading = roles.read(name, shape)
        assert (reading.role in ROLES) == (reading.skip is None)
        if reading.skip is not None or len(shape) < 2 or 0 in shape or not holds_matrices(shape, reading):
            continue
        tensor = torch.arange(float(math.prod(shape))).view(shape)
        found = list(matrices_of(name, shape, reading))
        assert len({matrix.name for matrix in found}) == len(found) > 0
        seen = torch.cat([matrix.view(tensor).flatten() for matrix in found])
        assert sorted(seen.tolist()) == list(range(math.prod(shape)))  # each value once
        for matrix in found:
            assert matrix.view(tensor).shape == matrix.sizes("rows") == matrix.sizes("cols")[::-1]
            if matrix.heads:
                heads = matrix.head_views(tensor)
                assert tuple(heads.shape) == (matrix.heads, *matrix.head_sizes())
                whole = matrix.view(tensor) if matrix.head_axis == "rows" else matrix.view(tensor).T
                assert torch.equal(heads.flatten(0, 1), whole)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "weight",
        ".weight",
        "layers." + "9" * 5000 + ".fc1.weight",
        "router" * 100_000 + ".a.b.c",
        "layers.٣.fc1",
    ],
    ids=["empty", "dot", "weight", "dot weight", "a long number", "a long name", "arabic digits"],
)
def test_names_that_say_nothing_are_read(name: str) -> None:
    roles = Roles({name: (4, 4)}, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1})
    assert roles.read(name, (4, 4)).role in ("Other", "Linear_1.weight")

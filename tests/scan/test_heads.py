"""Attention heads: how many a matrix has, which vectors belong to which, one record per head."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from orthofast.kernels import gram_stats
from orthofast.metrics.coherence import pii_from
from orthofast.scan.heads import Heads, heads_of, tower_of
from orthofast.scan.matrices import Matrix, matrices_of
from orthofast.scan.roles import Roles
from tests.scan.checkpoints import numpy_pii

AT = "model.layers.0.self_attn."
SHARED: Mapping[str, object] = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}


def matrix(name: str, shape: tuple[int, ...], config: Mapping[str, object]) -> Matrix:
    return next(matrices_of(name, shape, Roles({name: shape}, config).read(name, shape)))


@pytest.mark.parametrize(
    ("leaf", "shape", "heads", "size"),
    [("q_proj", (12, 12), 4, 3), ("k_proj", (6, 12), 2, 3), ("v_proj", (6, 12), 2, 3), ("o_proj", (12, 12), 4, 3)],
)
def test_each_head_is_a_record_of_one_grouped_fold(leaf: str, shape: tuple[int, int], heads: int, size: int) -> None:
    """Queries, keys and values own rows, the output owns columns; shared keys are not repeated."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 0.3
    read = matrix(f"{AT}{leaf}.weight", shape, SHARED)
    views = read.head_views(weight)
    whole = weight.T if leaf == "o_proj" else weight
    assert read.head_axis == ("cols" if leaf == "o_proj" else "rows")
    assert views.shape == (heads, size, 12)
    assert views.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert read.head_sizes() == (size, 12)
    found = pii_from(gram_stats(views))
    for head in range(heads):
        own = whole[head * size : (head + 1) * size]
        assert torch.equal(views[head], own)
        assert found[head].item() == pytest.approx(numpy_pii(own.numpy()), abs=2e-7)


@pytest.mark.parametrize("label", ["[query]", "[key]", "[value]"])
def test_heads_of_an_interleaved_matrix_are_views_of_it(label: str) -> None:
    name, shape = "gpt_neox.layers.0.attention.query_key_value.weight", (24, 8)
    config = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 8}
    weight = torch.arange(24.0)[:, None].expand(24, 8).contiguous()
    reading = Roles({name: shape}, config).read(name, shape)
    part = next(m for m in matrices_of(name, shape, reading) if m.name.endswith(label))
    first = ["[query]", "[key]", "[value]"].index(label) * 2
    views = part.head_views(weight)
    assert views[..., 0].tolist() == [[6 * h + first, 6 * h + first + 1] for h in range(4)]
    assert views.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert part.copies
    assert torch.equal(part.view(weight), views.flatten(0, 1))


def test_query_heads_that_share_a_key_are_apart_in_a_grouped_matrix() -> None:
    """InternLM2: a group is three queries, their key, their value; each query head still is its own."""
    name, shape = "model.layers.0.attention.wqkv.weight", (20, 6)
    config = {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2}
    weight = torch.arange(20.0)[:, None].expand(20, 6).contiguous()
    query = next(matrices_of(name, shape, Roles({name: shape}, config).read(name, shape)))
    assert query.head_views(weight)[..., 0].tolist() == [[r, r + 1] for r in (0, 2, 4, 10, 12, 14)]


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("transformer.layer.0.rel_attn.k", (5, 2, 3), lambda w, h, r: w[:, h, r]),
        ("blk.0.attn_k_b.weight", (2, 5, 3), lambda w, h, r: w[h, :, r]),
        ("blk.0.attn_v_b.weight", (2, 3, 5), lambda w, h, r: w[h, r]),
    ],
)
def test_heads_on_an_axis_of_their_own(name: str, shape: tuple[int, ...], rows: object) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    read = matrix(name, shape, {})
    assert (read.out, read.inward, read.heads) == (6, 5, 2)
    wanted = torch.stack([torch.stack([rows(weight, h, r) for r in range(3)]) for h in range(2)])  # type: ignore[operator]
    assert torch.equal(read.head_views(weight), wanted)
    assert torch.equal(read.view(weight), wanted.flatten(0, 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 8, "hidden_size": 64}, Heads(8, 8, 8)),
        ({"n_head": 8, "n_embd": 64}, Heads(8, 8, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 12}, Heads(8, 2, 12)),
        ({"n_heads": 8, "d_model": 64, "attn_config": {"kv_n_heads": 2}}, Heads(8, 2, 8)),
        ({"num_heads": 8, "d_model": 64, "d_kv": 5}, Heads(8, 8, 5)),
        ({"num_attention_heads": 4, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 6}, Heads(4, 4, 5, 6)),
        ({"num_attention_heads": 5, "hidden_size": 64}, Heads(5, 5, 0)),
        ({"num_attention_heads": True, "hidden_size": "64"}, Heads()),
        ({}, Heads()),
    ],
)
def test_names_of_the_sizes_in_configurations(config: Mapping[str, object], expected: Heads) -> None:
    assert heads_of(config) == expected


def test_encoder_and_decoder_may_differ() -> None:
    config = {"encoder_attention_heads": 4, "decoder_attention_heads": 8, "d_model": 32}
    assert heads_of(config, ("model", "encoder", "layers")).query == 4
    assert heads_of(config, ("model", "decoder", "layers")).query == 8


def test_lists_hold_one_value_per_layer() -> None:
    config = {"num_query_heads": [4, 6], "num_kv_heads": [2, 3], "head_dim": 8}
    assert [heads_of(config, layer=i).query for i in (0, 1)] == [4, 6]
    assert heads_of(config, layer=2).query == heads_of(config).query == 0


@pytest.mark.parametrize(
    ("segments", "heads"),
    [
        (("model", "layers", "0"), 8),
        (("thinker", "model", "layers", "0"), 8),
        (("thinker", "visual", "blocks", "0"), 4),
        (("thinker", "audio_tower", "layers", "0"), 2),
        (("talker", "model", "layers", "0"), 16),
    ],
)
def test_towers_within_towers(segments: tuple[str, ...], heads: int) -> None:
    config = {
        "thinker_config": {
            "text_config": {"num_attention_heads": 8},
            "vision_config": {"num_heads": 4},
            "audio_config": {"encoder_attention_heads": 2},
        },
        "talker_config": {"num_attention_heads": 16},
    }
    assert heads_of(tower_of(config, segments), segments).query == heads


def test_sizes_of_the_text_are_not_used_for_images() -> None:
    config = {"vocab_size": 9, "num_attention_heads": 4, "hidden_size": 12}
    assert matrix("vision_tower.layers.0.self_attn.q_proj.weight", (12, 12), config).heads == 0
    assert matrix("model.layers.0.self_attn.q_proj.weight", (12, 12), config).heads == 4


def test_rows_that_do_not_fit_the_heads_have_none() -> None:
    """A head's size that is known must fit: 5 heads of 4 are not 5 heads of 3."""
    assert matrix(f"{AT}q_proj.weight", (15, 12), {"num_attention_heads": 5, "head_dim": 4}).heads == 0
    assert matrix(f"{AT}q_proj.weight", (14, 12), {"num_attention_heads": 5}).heads == 0
    assert matrix(f"{AT}q_proj.weight", (15, 12), {"num_attention_heads": 5}).heads == 5
    assert matrix(f"{AT}q_proj.weight", (16, 12), {}).heads == 0

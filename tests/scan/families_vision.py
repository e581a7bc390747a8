"""Vision models, state spaces, wrappers and several towers as their files name them."""

from __future__ import annotations

from tests.scan.checkpoints import (
    CONV,
    DOWN,
    EMBED,
    GATE,
    HEAD,
    OTHER,
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
from tests.scan.families import DEPTHWISE, MIXER, Names, halves


def clip(tower: str, norm: int) -> Names:
    at = f"{tower}.encoder.layers.3."
    names = {"self_attn.q_proj": Q, "self_attn.k_proj": K, "self_attn.v_proj": V, "self_attn.out_proj": O}
    return {f"{at}{name}.weight": ((norm, norm), one(role, f"{tower}.3", heads=4)) for name, role in names.items()} | {
        f"{at}mlp.fc1.weight": ((2 * norm, norm), one(UP, f"{tower}.3")),
        f"{at}mlp.fc2.weight": ((norm, 2 * norm), one(DOWN, f"{tower}.3")),
    }


def llama_layer(at: str, layer: str, wrapper: str = "") -> Names:
    return {
        f"{at}self_attn.q_proj{wrapper}.weight": ((16, 16), one(Q, layer)),
        f"{at}self_attn.k_proj{wrapper}.weight": ((8, 16), one(K, layer)),
        f"{at}mlp.down_proj{wrapper}.weight": ((16, 40), one(DOWN, layer)),
    }


VISION: dict[str, Family] = {
    "mamba": Family(
        {"model_type": "mamba"},
        {
            "backbone.embeddings.weight": ((31, 8), one(EMBED)),
            "backbone.layers.0.mixer.in_proj.weight": ((32, 8), one(MIXER, "0")),
            "backbone.layers.0.mixer.conv1d.weight": ((16, 1, 4), one(DEPTHWISE, "0")),
            "backbone.layers.0.mixer.x_proj.weight": ((9, 16), one(MIXER, "0")),
            "backbone.layers.0.mixer.out_proj.weight": ((8, 16), one(MIXER, "0")),
            "backbone.layers.0.mixer.A_log": ((16, 4), SKIP),
        },
    ),
    "hiera widens inside its attention": Family(
        {"model_type": "hiera"},
        {
            "hiera.encoder.stages.1.layers.0.attn.qkv.weight": ((72, 12), thirds("1.0", 24)),
            "hiera.encoder.stages.1.layers.0.attn.proj.weight": ((24, 24), one(O, "1.0")),
        },
    ),
    "segformer of timm": Family(
        {},
        {
            "block2.1.attn.q.weight": ((12, 12), one(Q, "block2.1")),
            "block2.1.attn.kv.weight": (
                (24, 12),
                (
                    Expected(K, "block2.1", "[key]", rows=range(12)),
                    Expected(V, "block2.1", "[value]", rows=range(12, 24)),
                ),
            ),
        },
    ),
    "a w1 without a w3 is no gate": Family(
        {},
        {
            "visual.resblocks.0.feed_forward.w1.weight": ((20, 12), one(UP, "0")),
            "visual.resblocks.0.feed_forward.w2.weight": ((12, 20), one(DOWN, "0")),
            "visual.resblocks.0.attn.in_proj.weight": ((36, 12), thirds("0", 12)),
        },
    ),
    "torchtitan": Family(
        {},
        {
            "tok_embeddings.weight": ((31, 16), one(EMBED)),
            "layers.0.attention.qkv_linear.wq.weight": ((16, 16), one(Q, "0")),
            "layers.0.attention.wo.weight": ((16, 16), one(O, "0")),
            "layers.0.feed_forward.w1.weight": ((40, 16), one(GATE, "0")),
            "layers.0.feed_forward.w3.weight": ((40, 16), one(UP, "0")),
            "output.weight": ((31, 16), one(HEAD)),
        },
    ),
    "timm vit and dino": Family(
        {},
        {
            "cls_token": ((1, 1, 12), SKIP),
            "pos_embed": ((1, 17, 12), one(EMBED)),
            "patch_embed.proj.weight": ((12, 3, 4, 4), one(CONV)),
            "blocks.10.attn.qkv.weight": ((36, 12), thirds("10", 12)),
            "blocks.10.attn.proj.weight": ((12, 12), one(O, "10")),
            "blocks.10.mlp.fc1.weight": ((24, 12), one(UP, "10")),
            "blocks.11.mlp.w12.weight": ((40, 12), halves("11", 20)),
            "blocks.11.mlp.w3.weight": ((12, 20), one(DOWN, "11")),
            "head.weight": ((5, 12), one(HEAD)),
        },
    ),
    "timm swin": Family(
        {},
        {
            "layers.2.blocks.5.attn.qkv.weight": ((36, 12), thirds("2.5", 12)),
            "layers.2.blocks.5.attn.relative_position_bias_table": ((169, 3), SKIP),
            "layers.2.blocks.5.mlp.fc2.weight": ((12, 24), one(DOWN, "2.5")),
        },
    ),
    "timm convnext": Family(
        {},
        {
            "stages.1.blocks.2.conv_dw.weight": ((12, 1, 7, 7), one(DEPTHWISE, "1.2")),
            "stages.1.blocks.2.mlp.fc1.weight": ((24, 12), one(UP, "1.2")),
            "stages.1.blocks.3.mlp.fc1.weight": ((24, 12, 1, 1), one(UP, "1.3")),
        },
    ),
    "torchvision vit": Family(
        {},
        {
            "conv_proj.weight": ((12, 3, 4, 4), one(CONV)),
            "encoder.pos_embedding": ((1, 17, 12), one(EMBED)),
            "encoder.layers.encoder_layer_3.self_attention.in_proj_weight": ((36, 12), thirds("3", 12)),
            "encoder.layers.encoder_layer_3.self_attention.out_proj.weight": ((12, 12), one(O, "3")),
            "encoder.layers.encoder_layer_3.mlp.0.weight": ((24, 12), one(UP, "3")),
            "encoder.layers.encoder_layer_3.mlp.3.weight": ((12, 24), one(DOWN, "3")),
            "heads.head.weight": ((5, 12), one(HEAD)),
        },
    ),
    "torchvision mobilenet": Family(
        {},
        {
            "features.0.0.weight": ((8, 3, 3, 3), one(CONV, "0.0")),
            "features.3.conv.0.0.weight": ((8, 1, 3, 3), one(DEPTHWISE, "3")),
            "features.3.conv.1.weight": ((6, 8, 1, 1), one(CONV, "3")),
            "classifier.1.weight": ((5, 12), one(HEAD)),
        },
    ),
    "a first convolution over one channel": Family({}, {"conv1.weight": ((6, 1, 5, 5), one(CONV, "conv1"))}),
    "wrapped by FSDP, compile and DDP": Family(
        {},
        llama_layer("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.", "0")
        | llama_layer("module._orig_mod.model.layers.1.", "1"),
    ),
    "saved with adapters around its layers": Family(
        {},
        llama_layer("base_model.model.model.layers.0.", "0", ".base_layer")
        | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": ((2, 16), one(OTHER, "0"))},
    ),
    "clip": Family(
        {
            "model_type": "clip",
            "text_config": {"num_attention_heads": 4, "hidden_size": 8},
            "vision_config": {"num_attention_heads": 4, "hidden_size": 12},
        },
        clip("text_model", 8)
        | clip("vision_model", 12)
        | {"text_projection.weight": ((7, 8), one(OTHER)), "visual_projection.weight": ((7, 12), one(OTHER))},
    ),
    "llava on the hub": Family(
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
            "vision_config": {"num_attention_heads": 3, "hidden_size": 12},
        },
        {
            "language_model.model.layers.0.self_attn.q_proj.weight": ((16, 16), one(Q, "language_model.0", heads=4)),
            "language_model.model.layers.0.self_attn.k_proj.weight": ((8, 16), one(K, "language_model.0", heads=2)),
            "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": (
                (12, 12),
                one(K, "vision_tower.0", heads=3),
            ),
            "language_model.lm_head.weight": ((31, 16), one(HEAD)),
            "multi_modal_projector.linear_1.weight": ((16, 12), one(OTHER)),
        },
    ),
    "qwen2-vl": Family(
        {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "vision_config": {"num_heads": 3}},
        {
            "visual.blocks.0.attn.qkv.weight": ((36, 12), thirds("visual.0", 12)),
            "visual.blocks.0.attn.proj.weight": ((12, 12), one(O, "visual.0", heads=3)),
            "visual.patch_embed.proj.weight": ((12, 3, 2, 4, 4), one(CONV)),
            "model.layers.0.self_attn.v_proj.weight": ((8, 16), one(V, "0", heads=2)),
            "model.layers.0.self_attn.o_proj.weight": ((16, 16), one(O, "0", heads=4)),
        },
    ),
    "three axes that no rule knows": Family({}, {"model.layers.0.odd.table": ((3, 4, 5), SKIP)}),
}

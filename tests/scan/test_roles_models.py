"""Models built by transformers: every matrix has a role, and fused ones are cut where the module cuts them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orthofast.scan.matrices import Matrix, holds_matrices, matrices_of
from orthofast.scan.roles import Roles

transformers = pytest.importorskip("transformers")
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "intermediate_size": 20, "pad_token_id": 0}
GPT: dict[str, Any] = {"vocab_size": 32, "n_embd": 48, "n_layer": 2, "n_head": 6}
DBRX: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 2,
    "max_seq_len": 8,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 3, "moe_top_k": 1},
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_key_value_heads": 6,
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
NEXT: dict[str, Any] = GROUPED | {
    "head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "layer_types": ["full_attention", "linear_attention"],
}

# family -> (class of the configuration, of the model, settings)
FUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL | {"intermediate_size": 20}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 32, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon 7B": (
        "FalconConfig",
        "FalconForCausalLM",
        SMALL | {"multi_query": True, "new_decoder_architecture": False},
    ),
    "falcon 40B": (
        "FalconConfig",
        "FalconForCausalLM",
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon RW": ("FalconConfig", "FalconForCausalLM", SMALL | {"multi_query": False, "alibi": True}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", GPT | {"n_head": 8, "rotary_dim": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "gpt_bigcode multi-query": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT | {"multi_query": True}),
    "gpt_bigcode multi-head": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT | {"multi_query": False}),
    "mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": 32, "d_model": 48, "n_layers": 2, "n_heads": 6}),
    "dbrx": ("DbrxConfig", "DbrxForCausalLM", DBRX),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", SMALL | {"intermediate_size": 20}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", SMALL | {"intermediate_size": 20, "pad_token_id": 0}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", NEXT),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", SMALL | LATENT),
}
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "kv_b_proj")


def build(config_class: str, model_class: str, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    return getattr(transformers, model_class)(config).eval(), json.loads(config.to_json_string(use_diff=False))


def matrices(model: nn.Module, config: dict[str, Any]) -> dict[str, list[Matrix]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    roles = Roles(shapes, config)
    return {name: list(matrices_of(name, shape, roles.read(name, shape))) for name, shape in shapes.items() if shape}


class Attention(TorchFunctionMode):
    """Records the queries, keys and values that reach the product of attention, whoever computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self._keep({key: named[key] for key in ("query", "key", "value")})
        elif func is torch.matmul and args[0].dim() == 4:
            self._keep({"value": args[1]} if "key" in self.seen else {"query": args[0], "key": args[1].transpose(2, 3)})
        elif func is torch.Tensor.baddbmm:
            self._keep({"query": kwargs["batch1"], "key": kwargs["batch2"].transpose(1, 2)})
        elif func is torch.bmm and "key" in self.seen:
            self._keep({"value": args[1]})
        return func(*args, **kwargs)

    def _keep(self, found: dict[str, Tensor]) -> None:
        for name, tensor in found.items():
            self.seen.setdefault(name, tensor.detach())

    def rows(self, name: str) -> list[int]:
        """Rows in the order of the heads; a key that several query heads share comes once."""
        numbers = self.seen[name].flatten().round().int().tolist()
        return [row for row in dict.fromkeys(numbers) if row >= 0]


@pytest.mark.parametrize("family", FUSED)
def test_fused_matrices_are_cut_where_the_module_cuts_them(family: str) -> None:
    """The fused module's output is replaced by the numbers of its rows: attention shows which go where."""
    model, config = build(*FUSED[family])
    wanted = "q_proj" if family == "qwen3_next" else FUSED_NAMES
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith(wanted))
    layer = name[: name.index(".", name.index("0"))]
    weight = module.weight.detach()
    out = weight.shape[1] if isinstance(module, transformers.pytorch_utils.Conv1D) else weight.shape[0]
    module.register_forward_hook(lambda _m, _x, y: torch.arange(float(out)).expand_as(y).clone())
    for other, part in model.named_modules():
        if other.startswith(layer) and other.endswith(("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
            part.register_forward_hook(lambda _m, x, _y: x[0])  # norms would hide the numbers
        if other.startswith(layer) and other.endswith("kv_a_proj_with_mqa"):  # the rotary key is not in this matrix
            part.register_forward_hook(lambda _m, _x, y: torch.full_like(y, -1.0))
        if other.startswith(layer) and other.endswith(("q_b_proj", "k_proj", "v_proj")) and other != name:
            part.register_forward_hook(lambda _m, _x, y: torch.full_like(y, -1.0))
    with Attention() as seen, torch.no_grad():
        model(input_ids=torch.tensor([[1]]), use_cache=False)  # one token at position 0: no rotation
    parts = {matrix.role: matrix for matrix in matrices(model, config)[f"{name}.weight"]}
    numbers = torch.arange(float(out))[:, None].expand(out, weight.numel() // out)
    stored = numbers.T if out != weight.shape[0] or family == "gpt2" else numbers
    roles = {"Query": "query", "Keys": "key", "Values": "value"}
    checked = [role for role in roles if role in parts]
    assert checked == {"qwen3_next": ["Query"], "deepseek_v3": ["Keys", "Values"]}.get(family, list(roles))
    for role in checked:
        found, matrix = parts[role].view(stored)[:, 0].int().tolist(), parts[role]
        assert found == seen.rows(roles[role]), role
        assert matrix.heads == len(set(map(tuple, seen.seen[roles[role]].flatten(0, -2).int().tolist()))), role
        assert matrix.head_views(stored)[..., 0].flatten().int().tolist() == found
    assert sum(matrix.out for matrix in parts.values()) == out


def test_gate_and_up_are_told_apart_by_the_activation() -> None:
    """Gate is what the activation is applied to."""
    for family in ("phi3", "modernbert"):
        model, config = build(*FUSED[family])
        name, module = next((n, m) for n, m in model.named_modules() if n.endswith(("gate_up_proj", "mlp.Wi")))
        parent = model.get_submodule(name.rpartition(".")[0])
        activation = next(part for part in parent.children() if not isinstance(part, nn.Linear | nn.Dropout))
        out = module.weight.shape[0]
        seen: list[Tensor] = []
        module.register_forward_hook(lambda _m, _x, y, out=out: torch.arange(float(out)).expand_as(y).clone())
        activation.register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[0].detach()))
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]]))
        gate = next(m for m in matrices(model, config)[f"{name}.weight"] if m.role == "Linear_1.gate")
        assert seen[0].flatten().int().tolist() == list(range(gate.start, gate.stop))


def run_gpt_oss(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    with torch.no_grad():
        experts.gate_up_proj_bias.zero_(), experts.down_proj_bias.zero_()
    return run_routed(experts, x, expert)


def run_routed(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    index = torch.full((len(x), 1), expert)
    return experts(x, index, torch.ones(len(x), 1)).flatten(0, -2)


def run_llama4(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    return experts(x.repeat(experts.num_experts, 1)).view(experts.num_experts, *x.shape)[expert]


def run_granite(experts: nn.Module, x: Tensor, expert: int) -> Tensor:
    sizes = [len(x) if e == expert else 0 for e in range(experts.input_linear.num_experts)]
    gate, up = experts.input_linear(x, sizes).chunk(2, dim=-1)
    return experts.output_linear(experts.activation(gate) * up, sizes)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def gated_gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


MOE: dict[str, Any] = GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 1}
EXPERTS: dict[str, tuple[str, str, dict[str, Any], str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE, "mlp.experts", run_routed, gated_silu),
    "gpt_oss of equal sides": (
        "GptOssConfig",
        "GptOssForCausalLM",
        MOE | {"hidden_size": 20, "head_dim": 8},
        "mlp.experts",
        run_gpt_oss,
        gated_gpt_oss,
    ),
    "llama4 of equal sides": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        MOE | {"hidden_size": 20, "head_dim": 8, "intermediate_size_mlp": 12, "moe_layers": [0]},
        "feed_forward.experts",
        run_llama4,
        gated_silu,
    ),
    "dbrx": ("DbrxConfig", "DbrxForCausalLM", DBRX, "ffn.experts", run_routed, gated_silu),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_stacked_experts_compute_what_the_module_computes(family: str) -> None:
    """down @ f(gate @ x, up @ x) with the matrices as read is the module's own output of that expert."""
    config_class, model_class, settings, path, run, gated = EXPERTS[family]
    model, config = build(config_class, model_class, settings)
    name, experts = next((n, m) for n, m in model.named_modules() if n.endswith(path))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.dim()))
    stored = {n: tensor for n, tensor in model.state_dict().items() if n.startswith(name)}
    found = [(m, stored[n]) for n, ms in matrices(model, config).items() if n in stored for m in ms]
    x = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) / 8
    assert {m.expert for m, _ in found if m.role == "Linear_2.weight"} == {0, 1, 2}
    for expert in (0, 2):
        read = {m.role: m.view(weight) for m, weight in found if m.expert == expert}
        hidden = gated(x @ read["Linear_1.gate"].T, x @ read["Linear_1.weight"].T)
        with torch.no_grad():
            torch.testing.assert_close(hidden @ read["Linear_2.weight"].T, run(experts, x, expert))


TOWERS: dict[str, Any] = {
    "text_config": {"model_type": "qwen2", **GROUPED},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 24,
        "image_size": 28,
        "patch_size": 14,
    },
}
ENCODER: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "d_model": 32}
DECODER: dict[str, Any] = {"decoder_attention_heads": 8, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 32}
# family -> (configuration, model, settings, heads of (queries, keys) in its text layers)
PLAIN: dict[str, tuple[str, str, dict[str, Any], tuple[int, int]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, (6, 2)),
    "bert": ("BertConfig", "BertForMaskedLM", SMALL | {"intermediate_size": 20}, (6, 6)),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"head_dim": 12}, (6, 2)),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 7, "d_ff": 24, "num_heads": 4}, (4, 4)),
    "bart": ("BartConfig", "BartForConditionalGeneration", ENCODER | DECODER, (4, 4)),
    "llava_onevision": ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration", TOWERS, (6, 2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        GROUPED | {"head_dim": 10, "num_experts": 4, "moe_intermediate_size": 8},
        (6, 2),
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", SMALL | LATENT, (6, 6)),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel", {"d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 20}, (6, 6)),
}


def judged(model: nn.Module, config: dict[str, Any]) -> Iterator[tuple[str, str, Matrix | None]]:
    """(name, role, matrix) of every matrix inside a layer; None where no rule knows the name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    roles = Roles(shapes, config)
    for name, shape in shapes.items():
        reading = roles.read(name, shape)
        if len(shape) >= 2 and reading.skip is None and reading.layer is not None:
            if not reading.known or not holds_matrices(shape, reading):
                yield name, "", None
            else:
                yield from ((name, matrix.role, matrix) for matrix in matrices_of(name, shape, reading))


@pytest.mark.parametrize("family", PLAIN)
def test_every_matrix_in_a_layer_has_a_role_and_its_heads(family: str) -> None:
    config_class, model_class, settings, (query, key) = PLAIN[family]
    config = getattr(transformers, config_class)(**settings)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    found = list(judged(model, json.loads(config.to_json_string(use_diff=False))))
    assert [name for name, role, _ in found if not role] == []
    wanted = {"Query": query, "Keys": key, "Values": key, "Atten_Output": query}
    seen = set()
    for name, role, matrix in found:
        if role not in wanted or matrix is None:
            continue
        heads = 4 if "vision" in name else 8 if family == "bart" and ".decoder." in name else wanted[role]
        assert (role, matrix.heads) == (role, heads), name
        assert matrix.head_axis == ("cols" if role == "Atten_Output" else "rows")
        seen.add(role)
    assert seen == set(wanted)
    assert {"Linear_1.weight", "Linear_2.weight"} <= {role for _, role, _ in found}


RENAMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral keeps each expert apart": ("MixtralConfig", "MixtralForCausalLM", MOE),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", NEXT | {"layer_types": None}),
    "nomic_bert fuses query, key and value": ("NomicBertConfig", "NomicBertModel", SMALL | {"intermediate_size": 20}),
    "vit": ("ViTConfig", "ViTModel", {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("family", RENAMED)
def test_names_on_disk_and_in_memory_have_the_same_values_under_each_role(family: str) -> None:
    config_class, model_class, settings = RENAMED[family]
    config = getattr(transformers, config_class)(**settings)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    state = model.state_dict()
    stored = revert_weight_conversion(model, state)
    assert set(stored) != set(state)
    found = []
    for tensors in (state, stored):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        roles = Roles(shapes, json.loads(config.to_json_string(use_diff=False)))
        count: Counter[tuple[str, str | None, int]] = Counter()
        for name, shape in shapes.items():
            reading = roles.read(name, shape)
            if len(shape) >= 2 and reading.skip is None:
                for m in matrices_of(name, shape, reading):
                    count[m.role, m.layer, m.heads] += m.out * m.inward
        found.append(count)
    assert found[0] == found[1]

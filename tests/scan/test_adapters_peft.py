"""Adapters that PEFT itself trained, saved and merged: the merged rows are those of its merged model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from orthofast.scan import Row, ScanResult, scan_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


class Vision(nn.Module):
    """A convolution, and attention of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.attn = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 5)


@dataclass(frozen=True)
class Case:
    """A model, the configuration of its adapter, and which matrices must change."""

    model: Callable[[], nn.Module]
    changed: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    twice: str | None = None  # a weight to which PEFT adds its update twice
    published: bool = False  # stored as on the hub, where experts lie one by one


CASES = {
    "plain": Case(llama, ("q_proj", "v_proj", "down_proj"), {"target_modules": LINEAR, "lora_alpha": 32}),
    "rank-stabilised": Case(llama, ("q_proj",), {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": Case(
        llama,
        ("q_proj", "v_proj", "down_proj"),
        {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.layers.1.mlp.*": 5, "proj": 3},
            "alpha_pattern": {"v_proj": 40, r"model\.layers\.\d+\.mlp\.down_proj": 7},
        },
    ),
    "DoRA": Case(llama, ("q_proj", "v_proj", "down_proj"), {"target_modules": LINEAR, "use_dora": True}),
    "Conv1D": Case(gpt2, ("c_attn", "c_proj", "c_fc"), {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "DoRA on Conv1D": Case(
        gpt2, ("c_attn", "c_proj", "c_fc"), {"target_modules": CONV1D, "fan_in_fan_out": True, "use_dora": True}
    ),
    "embeddings": Case(llama, ("embed_tokens", "q_proj"), {"target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA on embeddings": Case(llama, ("embed_tokens",), {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules that are saved whole": Case(
        llama, ("q_proj", "lm_head"), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ),
    "convolution and attention": Case(
        Vision,
        ("conv", "in_proj_weight", "out_proj"),
        {"target_modules": ["conv", "attn"]},
        twice="attn.out_proj.weight",
    ),
    "stacked experts": Case(
        mixtral,
        ("gate_up_proj", "down_proj", "q_proj"),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "stacked experts with ranks of their own": Case(
        mixtral,
        ("gate_up_proj", "down_proj"),
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 32},
        },
    ),
    "experts that the base stores one by one": Case(
        mixtral,
        ("experts.0.w1", "experts.2.w2", "experts.1.w3"),
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
        published=True,
    ),
    "stacked experts stored as (in, out), square": Case(
        gpt_oss, ("down_proj",), {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    ),
}


def train(model: nn.Module, settings: dict[str, Any]) -> Any:
    """An adapter none of whose factors is zero."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        value = parameter.detach()  # shares its memory
        noise = torch.randn(value.shape, generator=generator)
        if "lora_magnitude" in name:
            value *= 0.5 + noise.abs()
        elif "lora_" in name or "modules_to_save" in name:
            value += 0.05 * noise
    return adapted


def save(model: nn.Module, folder: Path, published: bool = False) -> Path:
    if published:
        model.save_pretrained(folder)  # type: ignore[operator]
        return folder
    folder.mkdir()
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )
    if hasattr(model, "config"):
        (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    return folder


def keyed(result: ScanResult, version: str | None) -> dict[tuple[object, ...], Row]:
    return {(r.name, r.vectors, r.head, r.expert): r for r in result.rows if r.adapter == version}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_merged_rows_are_those_of_the_merged_model(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = case.model().eval()
    base = save(model, tmp_path / "base", case.published)
    before_any = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = train(model, case.settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path / "adapter")
        united = adapted.merge_and_unload()
    if case.twice is not None:
        once = united.state_dict()[case.twice]  # shares its memory
        once += before_any[case.twice]
        once /= 2
    after = save(united, tmp_path / "merged", case.published)
    found = scan_checkpoint(base, adapter=tmp_path / "adapter", heads=True)
    assert found.failed == []
    wanted, merged, before = (
        keyed(scan_checkpoint(after, heads=True), None),
        keyed(found, "merged"),
        keyed(found, "base"),
    )
    assert {key: row.pii for key, row in before.items()} == {
        key: row.pii for key, row in keyed(scan_checkpoint(base, heads=True), None).items()
    }
    assert merged
    assert {name for name in case.changed for key in merged if name in str(key[0])} == set(case.changed)
    for key, row in wanted.items():
        known = merged.get(key) or before[key]
        assert known.pii == pytest.approx(row.pii, abs=2e-6), key
        assert (known.n, known.d, known.zero) == (row.n, row.d, row.zero)
        if key not in merged:
            assert row.pii == before[key].pii  # PEFT left it alone

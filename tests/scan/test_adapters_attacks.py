"""Adapters that are broken, of another model or of another kind: one sentence each, and the base is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthofast.errors import CheckpointError, InputError
from orthofast.scan import scan_checkpoint
from tests.scan.adapters import lora, save_adapter, versions
from tests.scan.checkpoints import write

QUERY, VALUE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
FACTORS = lora(QUERY, 24, 16)
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
GOOD = lora(VALUE, 8, 16)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(1)
    shapes = {QUERY: (24, 16), VALUE: (8, 16)}
    return write(tmp_path / "base", {f"{n}.weight": torch.randn(s, generator=random) for n, s in shapes.items()})


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "no B": ({A: FACTORS[A]}, {}, "lora_B of model.layers.0.self_attn.q_proj is missing"),
    "no A": ({B: FACTORS[B]}, {}, "lora_A of .*q_proj is missing"),
    "ranks that differ": ({A: torch.ones(3, 16), B: torch.ones(24, 4)}, {}, "have different ranks"),
    "a rank the configuration has not": (
        FACTORS,
        {"rank_pattern": {"q_proj": 2}},
        "has rank 4, adapter_config.json says 2",
    ),
    "a wider model": (lora(QUERY, 24, 32), {}, "the update of .* is 24 x 32, the base has a weight of shape .24, 16."),
    "a longer one": (lora(QUERY, 48, 16), {}, "the update of .* is 48 x 16"),
    "factors that are vectors": ({A: torch.ones(4), B: torch.ones(24, 4)}, {}, "make no update of a weight of shape"),
    "factors of three axes": (
        {A: torch.ones(4, 4, 4), B: torch.ones(24, 4, 1)},
        {},
        "make no update of a weight of shape",
    ),
    "integers": ({A: torch.ones(4, 16, dtype=torch.int32), B: FACTORS[B]}, {}, "is stored as I32"),
    "a module the base has not": (
        lora("model.layers.7.self_attn.q_proj", 24, 16),
        {},
        "model.layers.7.* is not in the base",
    ),
    "lengths of another size": (
        {**FACTORS, f"{QUERY}.lora_magnitude_vector": torch.ones(5)},
        {},
        r"lora_magnitude_vector of .* has shape \[5\], needed are 24 lengths",
    ),
    "parts of another kind": ({f"{QUERY}.lora_diag": torch.ones(4, 4)}, {}, "is a part that LoRA itself has not"),
}


@pytest.mark.parametrize(("tensors", "settings", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_merged_is_a_row_with_its_reason(
    tensors: dict[str, Tensor], settings: dict[str, object], sentence: str, base: Path, tmp_path: Path
) -> None:
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", {**GOOD, **tensors}, **settings))
    assert {row.adapter for row in result.failed} == {"delta"}
    for row in result.failed:
        assert "\n" not in str(row.error)
        assert re.search(sentence, str(row.error)), row.error
    assert set(versions(result, f"{QUERY}.weight")) == {"base"}
    assert set(versions(result, f"{VALUE}.weight")) == {"base", "merged", "delta"}


def test_a_missing_length_of_dora_is_named(base: Path, tmp_path: Path) -> None:
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS, use_dora=True))
    assert [row.error for row in result.failed] == [f"the adapter a: lora_magnitude_vector of {QUERY} is missing"] * 2


@pytest.mark.parametrize("alpha", [1e38, 1e300, -1e300])
def test_a_huge_scale_breaks_the_merged_weight_alone(alpha: float, base: Path, tmp_path: Path) -> None:
    usual = versions(scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS)), f"{QUERY}.weight")
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS, lora_alpha=alpha))
    found = versions(result, f"{QUERY}.weight")
    assert found["base"] == usual["base"]
    assert found["delta"] == usual["delta"]  # angles do not depend on the scale
    assert found["merged"].error is not None or found["merged"].pii == pytest.approx(found["delta"].pii, abs=1e-5)


def test_a_scale_of_zero_changes_nothing(base: Path, tmp_path: Path) -> None:
    found = versions(
        scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS, lora_alpha=0)), f"{QUERY}.weight"
    )
    assert (found["delta"].zero, found["delta"].pii) == (24, None)
    assert (found["merged"].pii, found["merged"].drift, found["merged"].relative_change) == (
        found["base"].pii,
        0.0,
        0.0,
    )


@pytest.mark.parametrize(("part", "rows", "cols"), [(A, 24, 1), (B, 1, 16)])
def test_numbers_that_are_none_are_counted(part: str, rows: int, cols: int, base: Path, tmp_path: Path) -> None:
    broken = {name: tensor.clone() for name, tensor in FACTORS.items()}
    broken[part][2, 2] = float("nan")
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", {**broken, **GOOD}))
    for side, count in (("rows", rows), ("cols", cols)):
        found = versions(result, f"{QUERY}.weight", side)
        assert found["base"].error is None
        assert found["merged"].nonfinite == count
        assert found["delta"].error is not None
        assert found["merged"].drift is None
    assert all(row.error is None for row in versions(result, f"{VALUE}.weight").values())


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "other", lora("transformer.h.0.attn.c_attn", 48, 16))
    with pytest.raises(CheckpointError, match="adapter other does not belong to this base: of its 1 modules none"):
        scan_checkpoint(base, adapter=adapter)


def test_two_places_for_one_module_are_not_guessed(tmp_path: Path) -> None:
    weight = torch.randn(24, 16)
    folder = write(tmp_path / "base", {f"{at}.{QUERY}.weight": weight + i for i, at in enumerate(("first", "second"))})
    result = scan_checkpoint(folder, adapter=save_adapter(tmp_path / "a", FACTORS))
    assert all("fits first.model" in str(row.error) for row in result.failed)
    assert len(result.failed) == 2


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "IA3": ({"peft_type": "IA3"}, "of the type IA3, which is not merged here"),
    "prefixes": ({"peft_type": "PREFIX_TUNING"}, "of the type PREFIX_TUNING"),
    "no type": ({"peft_type": None}, "without a peft_type"),
    "other layers": ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
    "QALoRA": ({"use_qalora": True}, "QALoRA"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "Arrow"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "MonteCLoRA": ({"monteclora_config": {"samples": 2}}, "MonteCLoRA"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "a rank of zero": ({"r": 0}, "gives r the value 0; a rank is a positive integer"),
    "a rank in words": ({"r": "eight"}, "gives r the value 'eight'"),
    "an endless scale": ({"lora_alpha": 10**400}, "gives lora_alpha the value 1000"),
    "no regex": ({"alpha_pattern": {"q_proj(": 2}}, "has no regex in alpha_pattern"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "needs an object of patterns as rank_pattern"),
}


@pytest.mark.parametrize(("settings", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_other_kinds_are_refused_by_name(
    settings: dict[str, object], sentence: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        scan_checkpoint(base, adapter=save_adapter(tmp_path / "mine", FACTORS, **settings))


@pytest.mark.parametrize(
    ("start", "label"),
    [("pissa", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"), ("loftq", "LoftQ"), ("lora_ga", "LoRA-GA")],
)
def test_starts_that_change_the_base_leave_the_update_alone(start: str, label: str, base: Path, tmp_path: Path) -> None:
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS, init_lora_weights=start))
    assert set(versions(result, f"{QUERY}.weight")) == {"base", "delta"}
    notes = result.provenance["notes"]
    assert isinstance(notes, list)
    assert any(f"initialised by {label}" in note for note in notes)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_starts_are_merged(start: object, base: Path, tmp_path: Path) -> None:
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", FACTORS, init_lora_weights=start))
    assert set(versions(result, f"{QUERY}.weight")) == {"base", "merged", "delta"}


def test_files_that_are_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is no adapter of PEFT"):
        scan_checkpoint(base, adapter=base)
    for name in ("one", "two"):
        save_adapter(tmp_path / "several" / name, FACTORS)
    with pytest.raises(CheckpointError, match="holds several adapters, one, two: name one"):
        scan_checkpoint(base, adapter=tmp_path / "several")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read|no-such-folder"):
        scan_checkpoint(base, adapter=tmp_path / "no-such-folder")
    with pytest.raises(InputError, match="adapter needs a path or a hub name, got a dict"):
        scan_checkpoint(base, adapter={})  # type: ignore[arg-type]
    (tmp_path / "several" / "one" / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not a JSON object"):
        scan_checkpoint(base, adapter=tmp_path / "several" / "one")


def test_a_cut_file_is_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", FACTORS)
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(CheckpointError, match=r"the adapter a holds no update: adapter_model\.safetensors"):
        scan_checkpoint(base, adapter=adapter)
    save_adapter(adapter, {**FACTORS, **GOOD})
    file.write_bytes(file.read_bytes()[:-40])
    result = scan_checkpoint(base, adapter=adapter)
    assert {row.adapter for row in result.failed} == {"delta"}
    assert len({row.name for row in result.failed}) == 1  # the other half is no fault of its own
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    file.unlink()
    with pytest.raises(CheckpointError, match="a holds no"):
        scan_checkpoint(base, adapter=adapter)

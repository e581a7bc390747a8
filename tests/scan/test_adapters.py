"""A base scanned with its LoRA adapter: merged weights, updates by their factors, drift, and what is read for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from orthofast.cli import app
from orthofast.scan import scan_checkpoint
from orthofast.scan.adapters import open_adapter, with_adapter
from orthofast.scan.journal import plan_digest
from orthofast.scan.plan import make_plan
from orthofast.scan.readers import hub
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.adapters import (
    DOWN,
    KEY,
    QUERY,
    base_tensors,
    lora,
    numpy_drift,
    save_adapter,
    update,
    versions,
)
from tests.scan.checkpoints import numpy_pii, write
from tests.scan.quantised import fp8_blocks, fp8_values, write_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", base_tensors())


def oriented(matrix: np.ndarray, side: str) -> np.ndarray:
    return matrix if side == "rows" else matrix.T


@pytest.mark.parametrize(("relative", "merged"), [(0.01, 0.03526), (0.1, 0.03535), (0.3, 0.0418), (1.0, 0.138)])
def test_small_updates_keep_the_merged_pii(relative: float, merged: float, tmp_path: Path) -> None:
    """Lu et al. 2024, appendix Eq. 24: that LoRA keeps PII is a statement about a small relative update."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=random)
    a, b = torch.randn(8, 512, generator=random), torch.randn(512, 8, generator=random)
    b *= relative * weight.norm() / (2 * b @ a).norm()
    folder = write(tmp_path / "base", {f"{QUERY}.weight": weight})
    adapter = save_adapter(
        tmp_path / "a", {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b}, r=8, lora_alpha=16
    )
    found = versions(scan_checkpoint(folder, adapter=adapter), f"{QUERY}.weight")
    assert found["base"].pii == pytest.approx(0.03526, abs=1e-4)
    assert found["merged"].pii == pytest.approx(merged, rel=0.02)
    assert found["delta"].pii == pytest.approx(0.2909, rel=0.02)  # mean |cos| of random vectors in 8 dimensions
    assert found["merged"].relative_change == pytest.approx(relative, rel=1e-5)
    assert (found["merged"].drift or 0) >= abs((found["merged"].pii or 0) - (found["base"].pii or 0)) - 1e-9


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_all_versions_agree_with_whole_matrices(side: str, base: Path, tmp_path: Path) -> None:
    given = lora(QUERY, 24, 16, seed=2) | lora(DOWN, 16, 20, seed=3)
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", given), precision="float64")
    weights = {name: tensor.double().numpy() for name, tensor in base_tensors().items()}
    for module in (QUERY, DOWN):
        weight, delta = weights[f"{module}.weight"], update(given, module)
        merged = (weight + delta).astype(np.float32).astype(np.float64)
        found = versions(result, f"{module}.weight", side)
        before, after = oriented(weight, side), oriented(merged, side)
        assert set(found) == {"base", "merged", "delta"}
        assert found["base"].pii == pytest.approx(numpy_pii(before), abs=1e-12)
        assert found["merged"].pii == pytest.approx(numpy_pii(after), abs=1e-7)
        assert found["delta"].pii == pytest.approx(numpy_pii(oriented(delta, side)), abs=1e-9)
        assert (found["delta"].n, found["delta"].d) == (before.shape[0], 4)
        assert found["merged"].drift == pytest.approx(numpy_drift(before, after), abs=1e-7)
        assert found["merged"].relative_change == pytest.approx(
            np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-9
        )
        assert found["base"].drift is None
        assert found["delta"].relative_change is None
    assert set(versions(result, f"{KEY}.weight", side)) == {"base"}


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_factors_of_any_rank_and_dependent_rows(rank: int, base: Path, tmp_path: Path) -> None:
    """More rows than columns, equal and zero rows of A: what Cholesky's factor of A A^T would not have."""
    given = lora(QUERY, 24, 16, rank)
    a = given[f"{QUERY}.lora_A.weight"]
    if rank > 1:
        a[1] = a[0]
        a[-1] = 0
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", given, r=rank), precision="float64")
    for side in ("rows", "cols"):
        found = versions(result, f"{QUERY}.weight", side)["delta"]
        assert found.pii == pytest.approx(numpy_pii(oriented(update(given, QUERY, 8 / rank), side)), abs=1e-9)
        assert found.d == min(rank, 16 if side == "rows" else 24)


def test_heads_and_parts_of_a_fused_weight(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(4)
    name = "transformer.h.0.attn.c_attn"
    weight = torch.randn(16, 48, generator=random)
    folder = write(tmp_path / "base", {f"{name}.weight": weight}, {"model_type": "gpt2", "n_head": 2, "n_embd": 16})
    given = lora(name, 48, 16, seed=5)
    adapter = save_adapter(tmp_path / "a", given, fan_in_fan_out=True)
    result = scan_checkpoint(folder, adapter=adapter, heads=True, precision="float64")
    delta = update(given, name)
    for part, label in enumerate(("query", "key", "value")):
        rows = delta[16 * part : 16 * part + 16]
        whole = weight.T.double().numpy()[16 * part : 16 * part + 16]
        for side in ("rows", "cols"):
            found = versions(result, f"{name}.weight[{label}]", side)
            assert found["delta"].pii == pytest.approx(numpy_pii(oriented(rows, side)), abs=1e-9)
            assert found["merged"].pii == pytest.approx(numpy_pii(oriented(whole + rows, side)), abs=1e-6)
            assert found["merged"].relative_change == pytest.approx(np.linalg.norm(rows) / np.linalg.norm(whole))
        for head in (0, 1):
            cut = slice(8 * head, 8 * head + 8)
            found = versions(result, f"{name}.weight[{label}]", "rows", head)
            assert found["delta"].pii == pytest.approx(numpy_pii(rows[cut]), abs=1e-9)
            assert found["merged"].drift == pytest.approx(numpy_drift(whole[cut], (whole + rows)[cut]), abs=1e-6)


def test_lengths_of_dora_do_not_move_rows(base: Path, tmp_path: Path) -> None:
    given = lora(QUERY, 24, 16)
    plain = scan_checkpoint(base, adapter=save_adapter(tmp_path / "plain", given))
    lengths = {f"{QUERY}.lora_magnitude_vector": torch.rand(24) + 0.1}
    dora = scan_checkpoint(base, adapter=save_adapter(tmp_path / "dora", given | lengths, use_dora=True))
    for side, same in (("rows", True), ("cols", False)):
        one, two = (versions(result, f"{QUERY}.weight", side)["merged"].pii for result in (plain, dora))
        assert (one == pytest.approx(two, abs=1e-7)) is same
    weight = base_tensors()[f"{QUERY}.weight"].double().numpy()
    summed = weight + update(given, QUERY)
    scaled = (
        summed
        / np.linalg.norm(summed, axis=1, keepdims=True)
        * lengths[f"{QUERY}.lora_magnitude_vector"].numpy()[:, None]
    )
    row = versions(dora, f"{QUERY}.weight")["merged"]
    assert row.relative_change == pytest.approx(np.linalg.norm(scaled - weight) / np.linalg.norm(weight), rel=1e-5)


NAMES = {
    "as they are": QUERY,
    "without the outer class": QUERY.removeprefix("model."),
    "inside a model of images and text": QUERY.replace("model.", "model.language_model."),
    "with the words in another order": QUERY.replace("model.", "language_model.model."),
    "compiled": f"_orig_mod.{QUERY}",
    "inside a class of its own": f"backbone.{QUERY}",
    "the end of the path": QUERY.removeprefix("model.layers."),
}


@pytest.mark.parametrize("module", NAMES.values(), ids=NAMES.keys())
def test_modules_are_found_by_their_paths(module: str, base: Path, tmp_path: Path) -> None:
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", lora(module, 24, 16)))
    assert set(versions(result, f"{QUERY}.weight")) == {"base", "merged", "delta"}
    assert result.failed == []


def test_a_path_that_agrees_word_for_word_comes_first(tmp_path: Path) -> None:
    other = f"language_model.{QUERY}"
    folder = write(tmp_path / "base", {f"{name}.weight": torch.randn(24, 16) for name in (QUERY, other)})
    result = scan_checkpoint(folder, adapter=save_adapter(tmp_path / "a", lora(QUERY, 24, 16)))
    assert (len(versions(result, f"{QUERY}.weight")), len(versions(result, f"{other}.weight"))) == (3, 1)
    assert result.failed == []


def renamed(folder: Path, to: str, how: Callable[[dict[str, Tensor], Path], None]) -> None:
    """The same adapter stored in another way."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    how(tensors, folder / to)


def shard(tensors: dict[str, Tensor], index: Path) -> None:
    names = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        names[name] = f"adapter_model-0000{number}-of-0000{len(tensors)}.safetensors"
        save_file({name: tensor}, index.with_name(names[name]))
    index.write_text(json.dumps({"weight_map": names}))


FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "torch": ("adapter_model.bin", torch.save),
    "shards": ("adapter_model.safetensors.index.json", shard),
    "names of the adapter left in": (
        "adapter_model.safetensors",
        lambda tensors, file: save_file(
            {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}, file
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_adapters_in_other_files(
    form: tuple[str, Callable[[dict[str, Tensor], Path], None]], base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16))
    wanted = scan_checkpoint(base, adapter=adapter).rows
    renamed(adapter, *form)
    assert scan_checkpoint(base, adapter=adapter).rows == wanted


def test_an_adapter_with_a_name_lies_one_folder_down(base: Path, tmp_path: Path) -> None:
    one = save_adapter(tmp_path / "a" / "mine", lora(QUERY, 24, 16))
    wanted = scan_checkpoint(base, adapter=one).rows
    assert scan_checkpoint(base, adapter=tmp_path / "a").rows == wanted
    assert scan_checkpoint(base, adapter=one / "adapter_model.safetensors").rows == wanted


def test_an_adapter_of_the_hub_has_its_name_and_commit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = save_adapter(tmp_path / "cache" / "snapshots" / commit, lora(QUERY, 24, 16))
    monkeypatch.setattr(hub, "fetch", lambda name: (folder, commit))
    facts = scan_checkpoint(base, adapter="org/mine@v1").provenance["adapter"]
    assert isinstance(facts, dict)
    assert (facts["name"], facts["revision"], facts["updates"]) == ("org/mine", commit, 1)


def test_a_module_in_memory_is_a_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    given = lora("0", 24, 16)
    renamed(save_adapter(tmp_path / "a", given), "adapter_model.bin", torch.save)
    found = versions(scan_checkpoint(model, adapter=tmp_path / "a"), "0.weight")
    merged = model[0].weight.detach().double().numpy() + update(given, "0")
    assert found["merged"].pii == pytest.approx(numpy_pii(merged), abs=1e-6)


def test_weights_that_the_adapter_brings_whole(base: Path, tmp_path: Path) -> None:
    """One in the place of the base's, one of another size (a longer vocabulary), one the base has not."""
    random = torch.Generator().manual_seed(6)
    given = {
        f"{DOWN}.weight": base_tensors()[f"{DOWN}.weight"] + torch.randn(16, 20, generator=random),
        "model.embed_tokens.modules_to_save.default.weight": torch.randn(33, 16, generator=random),
        "score.weight": torch.randn(5, 16, generator=random),
        "score.bias": torch.zeros(5),
    }
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", given))
    found = versions(result, f"{DOWN}.weight")
    old, new = base_tensors()[f"{DOWN}.weight"].double().numpy(), given[f"{DOWN}.weight"].double().numpy()
    assert found["merged"].pii == pytest.approx(numpy_pii(new), abs=1e-6)
    assert found["delta"].pii == pytest.approx(numpy_pii(new - old), abs=1e-6)
    assert found["merged"].relative_change == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old))
    longer = versions(result, "model.embed_tokens.weight")
    assert {version: row.n for version, row in longer.items()} == {"base": 30, "merged": 33}
    assert longer["merged"].drift is None
    assert set(versions(result, "score.weight")) == {"merged"}
    assert "score.bias" in " ".join(entry.name for entry in result.skipped)
    facts = result.provenance["adapter"]
    assert isinstance(facts, dict)
    assert (facts["updates"], facts["replaced"], facts["added"]) == (0, 1, 2)


def test_an_update_of_quantised_values(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(7)
    data, scales = fp8_blocks(torch.randn(24, 16, generator=random), (8, 8))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    folder = write_checkpoint(
        tmp_path / "base",
        {f"{QUERY}.weight": data, f"{QUERY}.weight_scale_inv": scales},
        config,
    )
    given = lora(QUERY, 24, 16)
    found = versions(scan_checkpoint(folder, adapter=save_adapter(tmp_path / "a", given)), f"{QUERY}.weight")
    values = fp8_values(data, scales, (8, 8))
    assert found["base"].pii == pytest.approx(numpy_pii(values), abs=1e-6)
    assert found["merged"].pii == pytest.approx(numpy_pii(values + update(given, QUERY)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_merged_weight_is_rounded_once_to_the_type_of_its_base(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = base_tensors(dtype)
    given = lora(QUERY, 24, 16)
    result = scan_checkpoint(write(tmp_path / "base", tensors), adapter=save_adapter(tmp_path / "a", given))
    exact = tensors[f"{QUERY}.weight"].double() + torch.from_numpy(update(given, QUERY))
    wide = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype  # 8 bits would lose the update
    wanted = scan_checkpoint({f"{QUERY}.weight": exact.to(wide)}).rows
    for row in wanted:
        found = versions(result, row.name, row.vectors)["merged"]
        assert found.pii == pytest.approx(row.pii, abs=3e-4 if wide == torch.bfloat16 else 1e-6)


def test_the_command_measures_and_tells(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16), init_lora_weights="pissa_niter_4")
    done = CliRunner().invoke(app, ["scan", str(base), "--adapter", str(adapter), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert {row["adapter"] for row in document["rows"]} == {"base", "delta"}
    assert "initialised by PiSSA" in done.stderr
    save_adapter(adapter, lora(QUERY, 24, 16))
    done = CliRunner().invoke(app, ["scan", str(base), "--adapter", str(adapter)])
    assert done.exit_code == 0
    assert "merged with the adapter" in done.stdout


def test_a_square_embedding_is_stored_as_inputs_by_outputs(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    given = lora("model.embed_tokens", 16, 16)
    stored = {name.replace("lora_", "lora_embedding_").removesuffix(".weight"): value for name, value in given.items()}
    folder = write(tmp_path / "base", {"model.embed_tokens.weight": weight})
    found = versions(scan_checkpoint(folder, adapter=save_adapter(tmp_path / "a", stored)), "model.embed_tokens.weight")
    merged = weight.double().numpy() + update(given, "model.embed_tokens").T
    assert found["merged"].pii == pytest.approx(numpy_pii(merged), abs=1e-6)


def test_nested_factors_of_equal_shapes_go_from_the_inside_out(tmp_path: Path) -> None:
    """Gate and up of stacked experts: the parameter that the model made first was wrapped first."""
    random = torch.Generator().manual_seed(3)
    at = "model.layers.0.mlp.experts"
    gate, up = (torch.randn(3, 8, 12, generator=random) for _ in range(2))
    a, b = torch.randn(2 * 3, 12, generator=random), torch.randn(8, 2 * 3, generator=random)
    given = {
        f"{at}.base_layer.lora_A.weight": a,
        f"{at}.base_layer.lora_B.weight": b,
        f"{at}.lora_A.weight": torch.zeros(2 * 3, 12),
        f"{at}.lora_B.weight": torch.zeros(8, 2 * 3),
    }
    folder = write(tmp_path / "base", {f"{at}.gate_proj": gate, f"{at}.up_proj": up}, {"hidden_size": 12})
    adapter = save_adapter(tmp_path / "a", given, r=2, target_parameters=["experts.up_proj", "experts.gate_proj"])
    result = scan_checkpoint(folder, adapter=adapter)
    for expert in range(3):
        delta = 4 * torch.einsum("or,ri->oi", b.view(8, 2, 3)[:, :, expert], a.view(3, 2, 12)[expert]).double()
        changed = versions(result, f"{at}.gate_proj[{expert}]")["merged"]
        assert changed.pii == pytest.approx(numpy_pii((gate[expert] + delta).numpy()), abs=1e-6)
        assert versions(result, f"{at}.up_proj[{expert}]")["merged"].relative_change == 0


def test_what_is_not_selected_is_left_alone(base: Path, tmp_path: Path) -> None:
    given = lora(QUERY, 24, 16) | lora(DOWN, 16, 20) | lora("model.layers.9.mlp.up_proj", 4, 4)
    given["score.weight"] = torch.ones(5, 16)
    result = scan_checkpoint(base, adapter=save_adapter(tmp_path / "a", given), include="*down_proj*")
    assert {row.name for row in result.rows} == {f"{DOWN}.weight"}
    assert result.failed == []


def test_a_weight_with_two_names_takes_the_update_of_either(tmp_path: Path) -> None:
    weight = torch.randn(30, 16)
    model = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    given = lora("lm_head", 30, 16)
    row = versions(scan_checkpoint(model, adapter=save_adapter(tmp_path / "a", given)), "model.embed_tokens.weight")
    assert row["merged"].tied == ("lm_head.weight",)
    assert row["merged"].pii == pytest.approx(numpy_pii(weight.double().numpy() + update(given, "lm_head")), abs=1e-6)


def test_ranks_that_see_other_adapters_do_not_agree(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16))
    digests = set()
    for alpha in (8, 9, 8):
        save_adapter(adapter, lora(QUERY, 24, 16), lora_alpha=alpha)
        digests.add(plan_digest(with_adapter(make_plan(open_checkpoint(base)), open_adapter(adapter)), {}))
    assert len(digests) == 2

"""Made checkpoints hold what they promise: names and sizes of the hub, planted PII, equal twins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import checkpoint_plants as plants
from benchmarks.checkpoint_content import LAYOUTS, Content, encoded, random_bits, whole
from benchmarks.checkpoint_shapes import MODELS, Spec, layer_tensors, tensors, with_layers
from benchmarks.checkpoint_twins import TWINS, float8, gguf_name, q4_k
from benchmarks.make_checkpoint import main, write_checkpoint
from orthofast.scan import scan_checkpoint
from orthofast.scan.decoders import decode
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests import oracle

# (GB in decimal units, tensors on disk), computed from the models' configurations
ON_HUB = {"llama-3-70b": (141.11, 723), "mixtral-8x7b": (93.41, 995), "deepseek-v3": (688.6, 91991)}


def rows_of(result, adapter="base"):
    return {(row.name, row.vectors): row for row in result.rows if (row.adapter or "base") == adapter}


def check(found, planted):
    """Every planted PII is found within its tolerance."""
    assert planted
    for one in planted:
        row = found[one["name"], one["side"]]
        d = row.d if one.get("adapter") == "delta" else one["d"]  # folded through its factors, shorter vectors
        assert (row.n, row.d) == (one["n"], d)
        if one["pii"] is None:
            assert row.error is not None
            assert "NaN" in row.error
            continue
        assert row.error is None, row
        assert row.pii == pytest.approx(one["pii"], abs=one["tolerance"], rel=0), one
        assert row.zero == one["zero"], one


def true_pii(vectors):
    """By float64 loops; vectors of length 0 belong to no pair."""
    truth = oracle.gram_stats(np.asarray(vectors, dtype=np.float64))
    return truth.abs_sum / truth.pairs


def planted_in(folder):
    return json.loads((folder / "planted.json").read_text())


@pytest.mark.parametrize("name", ON_HUB)
def test_sizes_and_counts_are_those_of_the_hub(name):
    specs = list(tensors(MODELS[name]))
    gb, count = ON_HUB[name]
    assert len({spec.name for spec in specs}) == len(specs) == count
    assert sum(spec.nbytes for spec in specs) / 1e9 == pytest.approx(gb, abs=0.01 if gb < 600 else 0.1)


def test_a_layer_of_llama_70b_takes_the_bytes_of_its_table():
    assert sum(spec.nbytes for spec in layer_tensors(MODELS["llama-3-70b"], 0)) == 1_711_308_800


@pytest.mark.parametrize("name", ["llama-small", "mixtral-small", "deepseek-small"])
def test_a_scan_finds_every_planted_pii_and_chance_elsewhere(name, tmp_path):
    write_checkpoint(tmp_path, MODELS[name], nan=True, shard_gb=0.001)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    content = Content(0, tensors(MODELS[name]), nan=True)
    found = rows_of(scan_checkpoint(tmp_path))
    planted = planted_in(tmp_path)
    assert {one["structure"] for one in planted} == {*plants.STRUCTURES, "nan"} - {"random"}
    check(found, planted)
    rest = [row for (name, _), row in found.items() if name not in {one["name"] for one in planted}]
    assert {row.name.split("[")[0] for row in rest} == {one.name for one in content.random}
    for row in rest:
        pii, tolerance, _ = plants.random_rows(row.n, row.d)
        assert row.pii == pytest.approx(pii, abs=tolerance, rel=0), row


@pytest.mark.parametrize("shape", [(12, 12), (7, 12), (29, 12), (24, 12)])
@pytest.mark.parametrize("structure", plants.BUMPS)
def test_closed_forms_of_the_bump_are_those_of_float64_loops(structure, shape):
    n, d = shape
    matrix = np.full(shape, plants.BUMPS[structure])
    matrix[np.arange(n), np.arange(n) % d] = plants.P
    for one in plants.expected("w", structure, shape):
        vectors = matrix if one.side == "rows" else matrix.T
        assert one.zero == int((vectors == 0).all(1).sum())
        assert one.pii == pytest.approx(true_pii(vectors), abs=1e-12)


def test_entries_are_independent_symmetric_draws():
    numbers = np.random.Generator(np.random.SFC64(3))
    bits = random_bits(numbers, (512, 512), "BF16")
    values = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert np.abs(values).max() < 0.125
    assert np.abs(values).min() >= 2**-7
    units = values / values.std()
    assert abs(units.mean()) < 5 / 512
    for a, b in ((units[1:], units[:-1]), (units[:, 1:], units[:, :-1]), (units[:, 4:], units[:, :-4])):
        assert abs((a * b).mean()) < 5 / 512  # standard error 1/512
        assert abs((np.abs(a) * np.abs(b)).mean() - np.abs(a).mean() * np.abs(b).mean()) < 5 / 512
    assert len(np.unique(random_bits(numbers, (1, 4096), "F32"))) > 4090


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_planted_numbers_are_exact_in_every_type(dtype):
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    sizes = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F8_E4M3": np.uint8}
    for value in (plants.P, *plants.BUMPS.values(), float("nan")):
        bits = np.array([encoded(value, dtype)], sizes[dtype])
        found = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(kinds[dtype]).item()
        assert found == value or (value != value and found != found)


def test_values_depend_on_the_seed_and_the_name_alone():
    spec = Spec("model.layers.2.self_attn.k_proj.weight", (64, 256))
    first = whole(Content(1, [spec]), spec)
    assert np.array_equal(first, whole(Content(1, [Spec("other", (3, 3)), spec]), spec))
    assert not np.array_equal(first, whole(Content(2, [spec]), spec))


def test_the_file_is_as_safetensors_reads_it_and_headers_alone_take_no_space(tmp_path):
    model = with_layers(MODELS["deepseek-small"], layers=2)
    content = write_checkpoint(tmp_path / "full", model)
    write_checkpoint(tmp_path / "hollow", model, hollow=True)
    full, hollow = (tmp_path / name / "model.safetensors" for name in ("full", "hollow"))
    assert full.stat().st_size == hollow.stat().st_size
    assert hollow.stat().st_blocks * 512 < full.stat().st_size / 4
    with safe_open(full, "pt") as one, safe_open(hollow, "pt") as other:
        assert set(one.keys()) == set(other.keys()) == {spec.name for spec in tensors(model)}
        for spec in tensors(model):
            assert list(one.get_slice(spec.name).get_shape()) == list(spec.shape)
    stored = load_file(full)
    spec = next(spec for spec in tensors(model) if spec.name.endswith("mlp.gate.weight"))
    assert torch.equal(stored[spec.name].float(), torch.from_numpy(whole(content, spec)))


def test_a_size_in_gigabytes_is_met_by_the_number_of_layers():
    small = with_layers(MODELS["llama-500m"], gb=0.3)
    large = with_layers(MODELS["llama-500m"], gb=2.0)
    assert small.layers < 14 < large.layers
    total = sum(spec.nbytes for spec in tensors(large))
    assert 1.9e9 < total <= 2.0e9
    with pytest.raises(ValueError, match="layers needs 1 to 14, got 15"):
        with_layers(MODELS["llama-500m"], layers=15)


@pytest.mark.parametrize("name", ["llama-small", "mixtral-small"])
def test_twins_agree_with_the_checkpoint_and_with_what_is_planted(name, tmp_path):
    model = replace(MODELS[name], layers=2)
    content = write_checkpoint(tmp_path / "base", model)
    base = rows_of(scan_checkpoint(tmp_path / "base"))
    for twin in ("bin", "dcp", "fp8", "gguf-q8_0", "gguf-q4_k"):
        TWINS[twin](tmp_path / twin, model, content)
        found = rows_of(scan_checkpoint(tmp_path / twin))
        check(found, planted_in(tmp_path / twin))
        if twin in ("bin", "dcp"):
            assert {key: row.pii for key, row in found.items()} == {key: row.pii for key, row in base.items()}
        elif twin == "fp8":
            assert set(found) == set(base)
            for key, row in found.items():
                assert row.pii == pytest.approx(base[key].pii, rel=0.02, abs=1e-6), key


@pytest.mark.parametrize(("twin", "error"), [("fp8", 0.04), ("gguf-q8_0", 0.01), ("gguf-q4_k", 0.12)])
def test_decoded_twins_are_the_weights_up_to_their_rounding(twin, error, tmp_path):
    model = replace(MODELS["llama-small"], layers=1)
    content = Content(0, tensors(model))
    TWINS[twin](tmp_path / twin, model, content)
    plan = make_plan(open_checkpoint(tmp_path / twin))
    truth = {spec.name: spec for spec in tensors(model)}
    named = {gguf_name(name): spec for name, spec in truth.items()} | truth
    for item in plan.items:
        parts = {
            role: torch.from_numpy(np.fromfile(extent.file, np.uint8, extent.nbytes, offset=extent.offset))
            for role, extent in item.weight.parts.items()
        }
        spec = named[item.weight.name]
        if content.structure(spec.name) in plants.BUMPS and twin != "fp8":
            continue
        values, weights = decode(item.weight, parts).double(), torch.from_numpy(whole(content, spec)).double()
        assert 1e-9 < (values - weights).norm() / weights.norm() + (twin == "fp8") < error + (twin == "fp8"), spec.name


def test_float8_blocks_are_ragged_at_the_edges_and_close():
    values = torch.randn(200, 300)
    stored, scale = float8(values)
    assert tuple(scale.shape) == (2, 3)
    spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert ((stored.float() * spread - values).abs() <= values.abs() / 16 + spread * 2**-10).all()


def test_q4_k_is_decoded_by_its_own_library_to_within_a_step():
    import gguf

    values = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    values[1, :256], values[2, 256:] = 0.0, np.abs(values[2, 256:])
    found = gguf.dequantize(q4_k(values), gguf.GGMLQuantizationType.Q4_K)
    parts = values.reshape(-1, 32)
    step = (parts.max(1) - np.minimum(parts.min(1), 0)) / 15
    # half a step, the minimum and 15 steps each rounded to one of 63
    assert (np.abs(found - values).reshape(-1, 32).max(1) <= 0.5 * step + 1.2 * 15 * step.max() / 63).all()
    assert np.abs(found[1, :256]).max() == 0


@pytest.mark.parametrize("name", ["llama-small", "mixtral-small"])
def test_the_adapter_lifts_the_bump_as_its_closed_form_says(name, tmp_path):
    model = replace(MODELS[name], layers=1)
    content = write_checkpoint(tmp_path / "base", model)
    TWINS["lora"](tmp_path, model, content)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    truth = {spec.name: spec for spec in tensors(model)}
    planted = planted_in(tmp_path)
    assert {one["adapter"] for one in planted} == {"merged", "delta"}
    for one in planted:
        stem = f"base_model.model.{one['name'].removesuffix('.weight')}"
        down, up = factors[f"{stem}.lora_A.weight"].double(), factors[f"{stem}.lora_B.weight"].double()
        delta = settings["lora_alpha"] / settings["r"] * up @ down
        weight = delta if one["adapter"] == "delta" else torch.from_numpy(whole(content, truth[one["name"]])) + delta
        vectors = (weight if one["side"] == "rows" else weight.T).numpy()
        assert true_pii(vectors) == pytest.approx(one["pii"], abs=1e-9)
    rest = [
        value for key, value in factors.items() if not any(one["name"].split(".weight")[0] in key for one in planted)
    ]
    assert all(value.abs().min() > 0 for value in rest)
    result = scan_checkpoint(tmp_path / "base", adapter=tmp_path)
    for adapter in ("merged", "delta"):
        check(rows_of(result, adapter), [one for one in planted if one["adapter"] == adapter])


def test_the_command_writes_and_refuses_in_one_sentence(tmp_path, capsys):
    assert main(["llama-small", str(tmp_path / "a"), "--layers", "1", "--body", "--seed", "3", "--twin", "lora"]) == 0
    assert (tmp_path / "a" / "lora" / "adapter_config.json").exists()
    assert "9 tensors" in capsys.readouterr().out
    assert main(["llama-small", str(tmp_path / "b"), "--layers", "4"]) == 2
    assert capsys.readouterr().err == "layers needs 1 to 3, got 4\n"
    assert main(["deepseek-small", str(tmp_path / "c"), "--twin", "gguf-q8_0"]) == 2
    assert "llama or mixtral" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.memory import peak_of\n"
        "from benchmarks.checkpoint_content import Content; from benchmarks.checkpoint_files import write_file\n"
        "from benchmarks.checkpoint_shapes import Spec\n"
        "small, large = Spec('small', (64, 64)), Spec('large', (24576, 2048))\n"
        "content = Content(0, [small, large]); write_file(Path(sys.argv[1]), [small], content.blocks)\n"
        "print(peak_of(lambda: write_file(Path(sys.argv[1]), [large], content.blocks))[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 << 20 < (tmp_path / "x").stat().st_size

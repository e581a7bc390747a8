"""The command, the machine's name, peak memory of a known size, and the cases as they were promised."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import calls, cases, keops, machine, memory, run
from benchmarks.peers import field
from orthofast.kernels import dispatch

SHAPES = [
    *("64x576", "512x512", "768x768", "768x3072", "3072x768", "4096x4096", "8192x8192"),
    *("11008x4096", "30522x384", "32000x4096"),
]


def test_every_promised_shape_is_a_case_in_both_dtypes():
    found = {(case.shape, case.dtype) for case in cases.all_cases()}
    assert found == {(shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")}


def test_large_cases_have_three_rounds_at_least():
    for case in cases.all_cases():
        assert case.least >= (1 if case.shape == "32000x4096" else 3)
        assert case.least <= case.most


def test_every_backend_is_a_contestant():
    names = {contestant.name for contestant in field()}
    assert {*dispatch.NAMES, f"{dispatch.NAMES[0]}@high", "naive", "naive_medium", "mm", "mm_medium"} <= names


def test_data_is_gaussian_of_the_real_dtype_and_repeats_with_its_seed():
    case = cases.Case(200, 300, "bfloat16")
    vectors = cases.draw(case, 1)
    assert vectors.dtype == torch.bfloat16
    assert vectors.shape == (200, 300)
    assert float(vectors.float().std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(vectors, cases.draw(case, 1))
    assert not torch.equal(vectors, cases.draw(case, 2))


def test_a_bert_body_is_rows_and_columns_of_six_matrices_a_layer_without_copies():
    sets = cases.bert_body("float32", 0, layers=2)
    assert len(sets) == 24
    assert [tuple(x.shape) for x in sets[8:12]] == [(3072, 768), (768, 3072), (768, 3072), (3072, 768)]
    assert sets[1].untyped_storage().data_ptr() == sets[0].untyped_storage().data_ptr()
    assert cases.BERT_LAYERS * len(cases.BERT_LAYER) * 2 == 144


@pytest.mark.parametrize(
    ("facts", "slug"),
    [
        ({"model": "AMD EPYC", "family": 25, "model_number": 17, "cores": 2}, "amd-epyc-f25m17-2c"),
        (
            {"model": "Intel(R) Xeon(R) CPU @ 2.20GHz", "family": 6, "model_number": 85, "cores": 8},
            "intel-xeon-f6m85-8c",
        ),
        ({"model": "aarch64", "family": None, "model_number": None, "cores": 4}, "aarch64-4c"),
    ],
)
def test_a_machine_is_named_by_processor_and_cores(facts, slug):
    assert machine.slug(facts) == slug


@pytest.mark.parametrize(
    ("family", "model", "name"), [("25", "17", "Zen 4"), ("25", "1", "Zen 3"), ("26", "2", "Zen 5"), ("23", "1", None)]
)
def test_amd_cores_are_named_where_known(family, model, name):
    assert machine.microarchitecture("AuthenticAMD", family, model) == name
    assert machine.microarchitecture("GenuineIntel", family, model) is None


def test_variables_that_pin_a_library_are_taken_away_and_named():
    given = {"HOME": "x", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "1"}
    clean = machine.without_pins(given)
    assert clean is not None
    assert "OPENBLAS_CORETYPE" not in clean
    assert "OMP_NUM_THREADS" not in clean
    assert machine.without_pins(clean) is None
    facts = machine.environment_facts({**clean, "NUMBA_CACHE_DIR": "some/where", "OMP_PROC_BIND": "true"})
    assert facts["unset"] == {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "1"}
    assert facts["set"] == {"NUMBA_CACHE_DIR": "(a path)", "OMP_PROC_BIND": "true"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cpu", "--only", "3x3"], "--only needs one of 64x576"),
        (["cpu", "--threads", "two"], "--threads needs positive numbers"),
        (["cpu", "--threads", "0"], "--threads needs positive numbers"),
        (["cpu", "--parts", "speed,taste"], "got taste"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, said, capsys):
    assert run.main(arguments) == 2
    assert said in capsys.readouterr().err


def gated(monkeypatch, tmp_path, factor):
    """A run of the command on one tiny case with the reference's value multiplied."""
    monkeypatch.setattr(machine, "PINS", ())
    case = cases.Case(48, 32, "float32", least=2, most=2, threads=(1,))
    monkeypatch.setattr(run, "quick_cases", lambda: (case,))
    real = next(contestant for contestant in field() if contestant.name == "reference")
    value = real.value
    assert value is not None
    bent = type(real)(real.name, real.group, real.bind, lambda record: value(record) * factor)
    monkeypatch.setattr(run, "field", lambda: [bent])
    out = tmp_path / "cpu.json"
    code = run.main(["cpu", "--quick", "--threads", "1", "--parts", "speed", "--out", str(out)])
    return code, json.loads(out.read_text())


def test_the_command_records_samples_and_succeeds_when_the_gate_is_passed(monkeypatch, tmp_path, capsys):
    code, data = gated(monkeypatch, tmp_path, 1.0)
    assert code == 0
    assert data["passed"] is True
    row = next(row for row in data["measurements"] if row["contestant"] == "reference")
    assert len(row["wall_s"]) == 2
    assert row["error"] < 1e-6
    assert "reference" in capsys.readouterr().out


def test_the_command_fails_and_reports_no_speed_when_ours_is_wrong(monkeypatch, tmp_path, capsys):
    code, data = gated(monkeypatch, tmp_path, 1.001)
    assert code == 1
    assert data["passed"] is False
    row = next(row for row in data["measurements"] if row["contestant"] == "reference")
    assert row["wall_s"] == []
    assert row["status"] == "failed"
    captured = capsys.readouterr()
    assert "did not pass the gate" in captured.err
    assert "targets" not in captured.out


def test_peak_memory_sees_what_is_freed_before_the_call_ends():
    def call():
        held = torch.ones(64 << 20, dtype=torch.uint8)
        return int(held[0])

    extra, method = memory.peak_of(call)
    if method == "VmHWM":
        assert 60 << 20 <= extra <= 80 << 20  # too large for memory that was freed before
    else:
        assert extra >= 0


def test_memory_is_measured_in_a_fresh_process_and_naive_needs_two_matrices():
    found = memory.measure(cases.Case(2048, 32, "float32"), "naive", 1)
    assert found["status"] == "measured", found
    assert found["input_mib"] == 0.25
    assert 28 <= found["extra_mib"] <= 60  # twice 16 MiB


def test_memory_of_an_unknown_contestant_is_a_failure_with_its_reason():
    found = memory.measure(cases.Case(8, 8, "float32"), "nobody", 1)
    assert found["status"] == "failed"
    assert "nobody" in found["reason"]


def test_keops_has_a_reason_wherever_it_is_not_run():
    assert keops.measure(cases.Case(64, 576, "bfloat16"), 1, 1.0)["status"] == "left out"
    if keops.refuses(cases.Case(64, 576, "float32")) is None:
        found = keops.measure(cases.Case(64, 576, "float32"), 1, 0.01)
        assert "did not finish within" in found["reason"]


def test_small_calls_and_many_matrices_are_gated_and_keep_every_sample():
    small = {row["contestant"]: row for row in calls.small_call(1, "float32", blocks=2, n=16, d=8)}
    assert len(small["reference"]["call_ns"]) == 2 * calls.SMALL_CALLS
    assert small["reference"]["error"] < 1e-6
    many = {row["contestant"]: row for row in calls.many_matrices(1, "float32", rounds=1, layers=1)}
    assert many["reference"]["sets"] == 12
    assert len(many["reference"]["wall_s"]) == len(many["naive loop"]["wall_s"]) == 1
    assert 0 < many["reference"]["error"] < 1e-6
    assert calls.ours_failed([{"contestant": "reference", "status": "failed"}]) == ["reference"]


def test_the_import_of_the_package_is_timed_after_torch():
    taken = calls._import_once(both=True)
    assert taken["added_ms"] > 0
    assert taken["torch_ms"] > taken["added_ms"]
    assert taken["heavy"] == []

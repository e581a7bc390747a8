"""The GPU run rehearsed on a CPU: every block, the gate, the budget; and processes that hang or crash on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gate, gpu_blocks, gpu_models, gpu_peers, gpu_run, machine
from benchmarks.cases import BERT_LAYER, BERT_LAYERS
from benchmarks.gpu_cases import copies, draw, speed_cases, stored
from benchmarks.gpu_device import DryDevice, Reading, Telemetry, parse_reading
from benchmarks.gpu_journal import BROKEN, OUT_OF_TIME, STUCK, Journal, backend_of, read
from benchmarks.gpu_measured import SECTIONS, load_gpu
from benchmarks.gpu_peers import backends, block_rows, field, gluon, naive_float32, ours
from benchmarks.gpu_race import MatrixContest, allowed, race
from benchmarks.peers import OURS, naive
from orthofast.errors import BackendError
from orthofast.kernels import dispatch

DEVICE = DryDevice()
MEASURING = "ceilings,speed,model,filters,embedding,gradient,drift"
SMALL = stored(40, 24, "bfloat16", "rows", 2, 2, whole=True)


def run(tmp_path, *arguments):
    out = tmp_path / "gpu.json"
    code = gpu_run.main(["--dry", "--in-process", "--out", str(out), *arguments])
    return code, json.loads(out.read_text()), out


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("dry"), "--blocks", MEASURING)


def test_a_rehearsal_runs_all_measuring_blocks_and_gates_everybody(rehearsed):
    code, data, _ = rehearsed
    assert code == 0
    assert data["passed"] is True
    assert data["dry"] is True
    assert [row["block"] for row in data["blocks"]] == MEASURING.split(",")
    for section in ("measurements", "model", "filters", "gradient"):
        own = [row for row in data[section] if row["group"] == OURS and row["status"] == "timed"]
        assert own, section
        for row in own:
            assert row["device_ms"], row
            assert row["host_us"], row
            assert row["error"] <= row["tolerance"], row
    rivals = {row["contestant"] for row in data["measurements"] if row["status"] == "timed"}
    assert {"naive", "naive_float32", "naive_tf32", "naive_compiled", "block_rows", "mm", "cast_mm"} <= rivals
    assert {row["contestant"] for row in data["gradient"]} >= {"autograd", "reference+gradient", "reference"}
    assert data["ceilings"][0]["gb_per_s"]
    assert data["trouble"] == []


def test_a_rehearsal_is_refused_as_a_result(rehearsed, tmp_path):
    _, data, out = rehearsed
    with pytest.raises(ValueError, match="dry run"):
        load_gpu(out)
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    path = folder / "gpu.json"
    path.write_text(json.dumps({**data, "dry": False, "checks": [{"test": "t", "outcome": "passed"}]}))
    assert load_gpu(path).data["dry"] is False
    for change, said in (
        ({"passed": False}, "did not pass"),
        ({"schema_version": 0}, "schema"),
        ({"checks": []}, "check"),
    ):
        path.write_text(json.dumps({**data, "dry": False, "checks": [1], **change}))
        with pytest.raises(ValueError, match=said):
            load_gpu(path)


def test_the_tests_of_the_device_are_rows_with_outcomes(tmp_path):
    code, data, _ = run(tmp_path, "--quick")
    assert code == 0
    assert data["check_runs"][0]["exit_code"] == 0, data["check_runs"]
    passed = [row["test"] for row in data["checks"] if row["outcome"] == "passed"]
    assert any("test_matches_oracle" in test for test in passed)
    assert data["measurements"] == []


def test_a_failing_test_fails_the_run(tmp_path, monkeypatch, capsys):
    def failing(context):
        context.journal.row("checks", {"test": "t[native]", "outcome": "failed", "reason": "off by one", "wall_s": 0.1})
        context.journal.row("check_runs", {"exit_code": 1, "wall_s": 0.1, "tail": ""})

    monkeypatch.setattr(gpu_run, "all_blocks", lambda: {"check": (1, failing)})
    code, data, _ = run(tmp_path)
    assert code == 1
    assert data["passed"] is False
    assert "FAILED: test t[native]: off by one" in capsys.readouterr().out


def bent(factor):
    """Naive torch, and the reference with its value multiplied."""

    def change(contestant):
        value = contestant.value
        return replace(contestant, value=lambda record: value(record) * factor) if value else contestant

    few = [c for c in field(DEVICE.torch_device) if c.name in ("naive", "reference")]
    return [change(c) if c.name == "reference" else c for c in few]


@pytest.mark.parametrize(("factor", "status"), [(1.0, "timed"), (1.001, "failed"), (float("nan"), "failed")])
def test_who_is_wrong_gets_no_time(factor, status):
    rows = race(MatrixContest(SMALL, DEVICE, block_rows), bent(factor), DEVICE, 60.0, Journal())
    own = next(row for row in rows if row.contestant == "reference")
    assert own.status == status
    assert bool(own.device_ms) == (status == "timed")
    assert next(row for row in rows if row.contestant == "naive").status == "timed"


def test_who_raises_is_named_and_the_others_are_timed():
    def broken(vectors):
        raise RuntimeError("no such kernel\nsecond line")

    contestants = bent(1.0)
    contestants[0] = replace(contestants[0], bind=lambda w: lambda: broken(w))
    rows = {
        row.contestant: row
        for row in race(MatrixContest(SMALL, DEVICE, block_rows), contestants, DEVICE, 60.0, Journal())
    }
    assert rows["naive"].reason == "RuntimeError: no such kernel"
    assert rows["reference"].status == "timed"


def test_a_refusal_is_no_failure():
    def refusing(vectors):
        raise BackendError("needs a CUDA tensor")

    own = [replace(c, bind=lambda w: lambda: refusing(w)) for c in field(DEVICE.torch_device) if c.name == "reference"]
    row = race(MatrixContest(SMALL, DEVICE, block_rows), own, DEVICE, 60.0, Journal())[0]
    assert row.status == "left out"
    assert "needs a CUDA tensor" in row.reason


def test_rivals_and_truths_agree_with_each_other():
    vectors = draw(stored(70, 33, "bfloat16", "cols", 1, 1), 3, DEVICE.torch_device)
    truth = gate.expected_pii(vectors)
    assert float(block_rows(vectors)) == pytest.approx(truth, rel=1e-6)
    assert float(naive_float32(vectors)) == pytest.approx(truth, rel=1e-6)
    leaf = vectors.double().requires_grad_()
    naive_in_float64 = (torch.nn.functional.normalize(leaf, dim=1) @ torch.nn.functional.normalize(leaf, dim=1).T).abs()
    (naive_in_float64.triu(1).sum() / (33 * 16)).backward()
    found = gpu_models.true_gradient(vectors)
    assert float((found - leaf.grad).norm() / leaf.grad.norm()) < 1e-12


def test_every_promised_matrix_is_a_case():
    found = {(case.shape, case.dtype, case.side) for case in speed_cases(dry=False)}
    for shape in ("8192x8192", "28672x8192", "8192x28672", "32000x8192", "4096x4096"):
        assert {(shape, "bfloat16", "rows"), (shape, "bfloat16", "cols")} <= found
    assert ("8192x8192", "float32", "rows") in found
    assert stored(28672, 8192, "bfloat16", "cols", 1, 1).n == 8192
    assert 2 * len(BERT_LAYER * BERT_LAYERS) == 144


def test_every_backend_of_the_device_is_a_contestant():
    names = {contestant.name for contestant in ours(DEVICE.torch_device)}
    assert set(backends()) <= names
    assert set(backends()) == set(dispatch.ORDER.get("cuda", dispatch.ANY_DEVICE))


def test_the_gluon_fold_takes_part_where_it_can_and_says_why_elsewhere():
    journal = Journal()
    rows = race(MatrixContest(SMALL, DEVICE, block_rows), [gluon(DEVICE.torch_device)], DEVICE, 60.0, journal)
    assert [(row.status, "Gluon kernel needs an NVIDIA GPU" in row.reason) for row in rows] == [("left out", True)]
    assert "bfloat16 only" in (gluon(DEVICE.torch_device).refuses(replace(SMALL, dtype="float32")) or "")


@pytest.mark.parametrize(("factor", "status"), [(1.0, "timed"), (1.001, "failed")])
def test_a_value_of_the_gluon_fold_is_compared_before_it_is_timed(monkeypatch, factor, status):
    def fold(x, norm_sq):
        unit = x.double() / norm_sq.sqrt().unsqueeze(2)
        return factor * (unit @ unit.mT).abs().triu(1).sum((1, 2))

    monkeypatch.setattr(gpu_peers.gluon_folds, "problem", lambda x: None)
    monkeypatch.setattr(gpu_peers.gluon_folds, "abs_sum", fold)
    monkeypatch.setattr(gpu_peers, "GLUON_LEAST", 1)
    contest = MatrixContest(SMALL, DEVICE, block_rows)
    (row,) = race(contest, [gluon(DEVICE.torch_device)], DEVICE, 60.0, Journal())
    assert row.status == status, row.reason


def test_inputs_in_rotation_exceed_the_cache():
    assert copies(134 << 20, 60 << 20) == 2
    assert copies(32 << 20, 60 << 20) * (32 << 20) > 4 * (60 << 20)
    assert copies(1 << 31, 60 << 20) == 1


def test_the_gate_allows_twice_the_error_of_plain_torch_and_a_floor_per_pair():
    assert allowed(0.01, 0.0, exact=True) == pytest.approx(3e-5)
    assert allowed(0.01, 1e-4, exact=True) == pytest.approx(2.3e-4)
    assert allowed(0.01, 0.0, exact=False) == pytest.approx(4e-5)


def test_telemetry_takes_numbers_where_there_are_some():
    reading = parse_reading("1980, 3201, 512.33, 61, 0x0000000000000004", 5.0)
    assert reading == Reading(5.0, 1980.0, 3201.0, 512.33, 61.0, "0x0000000000000004")
    missing = parse_reading("[N/A], 3201, [Not Supported], 61, Active", 6.0)
    assert missing is not None
    assert missing.sm_mhz is None
    assert parse_reading("no devices were found", 0.0) is None
    seen = Telemetry([reading, missing]).between(4.0, 7.0)
    assert seen["sm_mhz"] == 1980.0
    assert seen["power_w"] == 512.33
    assert Telemetry([reading]).between(8.0, 9.0)["sm_mhz"] == 1980.0
    assert Telemetry().between(0.0, 1.0) == {}


def journal_process(tmp_path, body):
    """A process that writes a journal and ends as ``body`` makes it."""
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys, time, os; from pathlib import Path; from benchmarks.gpu_journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), limit_s=0.3); j.watch()\n"
        "j.row('measurements', {'a': 1}); j.case_done('first'); j.row('measurements', {'a': 2})\n" + body
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=machine.ROOT, timeout=60, check=False)
    return done.returncode, read(path, done.returncode)


def test_a_contestant_that_hangs_is_stopped_and_named(tmp_path):
    code, story = journal_process(tmp_path, "with j.turn('native@highest'): time.sleep(50)")
    assert code == STUCK
    assert story.culprit == "native@highest"
    assert "took more than" in story.reason
    assert story.rows == [("measurements", {"a": 1})]
    assert story.done == {"first"}


def test_a_contestant_that_breaks_the_context_or_the_process_is_named(tmp_path):
    code, story = journal_process(tmp_path, "j.broken('native', 'illegal address')")
    assert (code, story.culprit) == (BROKEN, "native")
    assert "illegal address" in story.reason
    code, story = journal_process(tmp_path / "..", "with j.turn('triton'): os.abort()")
    assert code != 0
    assert story.culprit == "triton"


def test_a_process_that_ends_well_keeps_everything(tmp_path):
    code, story = journal_process(tmp_path, "with j.turn('x'): pass")
    assert (code, story.culprit) == (0, None)
    assert [row["a"] for _, row in story.rows] == [1, 2]
    assert backend_of("native@highest") == backend_of("native+gradient") == "native"


def test_a_culprit_is_left_out_and_the_block_starts_again(monkeypatch):
    """The first process dies in ``bad``; the second is told, and goes on after what was done."""
    orders = []

    def process(command, environment, allowance_s):
        order = json.loads(Path(command[-1]).read_text())
        orders.append(order)
        journal = Journal(Path(order["journal"]))
        if len(orders) == 1:
            journal.row("measurements", {"case": 1})
            journal.case_done("one")
            journal._write({"begin": "bad@highest"})
            return -11, ""
        journal.row("measurements", {"case": 2})
        return 0, ""

    monkeypatch.setattr(gpu_run, "run_whole", process)
    excluded: dict[str, str] = {}
    rows = gpu_run.supervised("speed", 60.0, excluded, dry=True, left_s=100.0)
    assert [row["case"] for section, row in rows if section == "measurements"] == [1, 2]
    assert next(row for section, row in rows if section == "trouble")["culprit"] == "bad@highest"
    assert list(excluded) == ["bad"]
    assert orders[1]["done"] == ["one"]
    assert "bad" in orders[1]["excluded"]


def test_who_is_excluded_is_not_called():
    journal = Journal(excluded={"reference": "reference hung"})
    rows = race(MatrixContest(SMALL, DEVICE, block_rows), field(DEVICE.torch_device), DEVICE, 60.0, journal)
    own = next(row for row in rows if row.contestant == "reference")
    assert (own.status, own.reason) == ("failed", "reference hung")


def test_a_block_in_a_process_of_its_own_brings_its_rows_back():
    rows = gpu_run.supervised("ceilings", 60.0, {}, dry=True, left_s=100.0)
    assert [section for section, _ in rows] == ["ceilings"]


def test_a_block_without_time_left_says_so():
    context = gpu_blocks.Context(DEVICE, Journal(), 0.0, time.perf_counter() - 1)
    gpu_blocks.speed(context)
    assert {section for section, _ in context.journal.rows} == {"left_out"}


def test_a_cold_call_is_timed_in_a_fresh_process():
    found = gpu_blocks._cold_once("reference", "cols", "float32", "cpu", 16)
    assert found["first_call_s"] > 0
    vectors = torch.eye(3)
    assert 0 <= found["value"] <= 1
    assert float(naive(vectors)) == 0
    refused = gpu_blocks._cold_once("nobody", "rows", "float32", "cpu", 16)
    assert "backend needs one of" in refused["reason"]


@pytest.mark.parametrize(("arguments", "said"), [(["--blocks", "speed,taste"], "got taste"), ([], "no CUDA device")])
def test_what_cannot_be_run_is_one_sentence(arguments, said, capsys):
    if not arguments and torch.cuda.is_available():
        pytest.skip("a device is here")
    assert gpu_run.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_writes_its_files_and_ends_with_the_table(tmp_path):
    done = subprocess.run(
        ["bash", str(machine.ROOT / "benchmarks" / "gpu_run.sh"), "--dry", "--blocks", "ceilings"],
        env={"PY": sys.executable, "OUT": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin", "BUDGET_S": "60"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OF A DRY RUN" in done.stdout
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["dry"] is True
    assert set(SECTIONS) <= set(data)
    assert (tmp_path / "gpu_run.log").read_text() == done.stdout


def test_a_command_out_of_time_takes_along_what_it_started(tmp_path):
    late = tmp_path / "late"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    code, output = gpu_blocks.run_whole([sys.executable, "-c", parent], dict(os.environ), 1.5)
    assert code == OUT_OF_TIME
    assert output.startswith("begun")
    time.sleep(2.5)
    assert not late.exists()

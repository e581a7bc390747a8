"""The commands beside a plain scan: inspect, report, choices of a scan, interruption and resuming, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from orthofast import cli
from orthofast.commands import scan as commands_scan
from orthofast.commands.amounts import memory_bytes, role_names
from orthofast.errors import InputError
from orthofast.scan import Row, ScanResult, report, scan_checkpoint
from orthofast.scan.forecast import Forecast
from orthofast.scan.journal import Journal
from orthofast.scan.plan import Item, make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.reading import Files
from tests.scan import synthetic
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write

HEADS = 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = FAMILIES["llama"]
    config = {**family.config, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    return write(tmp_path / "llama", make_tensors(family), config)


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def invoke(runner: CliRunner, *arguments: object) -> Any:
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def rows_of(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)["rows"]
    return found


def test_inspect_reads_headers_alone(model: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Files, "read", refused)
    done = invoke(runner, "inspect", model, "--no-forecast")
    assert done.exit_code == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["Linear_1.gate", "2", "2", "40x16", "F32"] in lines
    assert "2 layers" in done.stdout
    assert "model.layers.*.input_layernorm.weight" in done.stdout
    document = json.loads(invoke(runner, "inspect", model, "--no-forecast", "--json").stdout)
    assert document["forecast"] == {}
    roles = {entry["role"]: entry for entry in document["roles"]}
    assert roles["Keys"]["shapes"] == [{"shape": [8, 16], "count": 2}]
    assert (document["kind"], document["layers"], document["format"]) == ("inspection", ["0", "1"], "safetensors")
    counted = sum(entry["count"] for entry in document["skipped"]) + sum(e["matrices"] for e in document["roles"])
    assert counted == len(FAMILIES["llama"].tensors)
    shapes = [shape for shape, expected in FAMILIES["llama"].tensors.values() if expected is not None]
    assert document["nbytes"] == sum(4 * out * inward for out, inward in shapes)


def test_a_forecast_is_said_by_inspect_and_before_a_long_scan(
    model: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a scan here: about" in invoke(runner, "inspect", model).stdout
    known = json.loads(invoke(runner, "inspect", model, "--json").stdout)["forecast"]
    assert known["nbytes"] == make_plan(open_checkpoint(model)).nbytes
    assert "exact scan" not in invoke(runner, "scan", model).stderr
    long = Forecast(3600.0, 1.0, 0.0, 3600.0, 10, 1e15, 10, 0, 20.0)
    monkeypatch.setattr(commands_scan, "LONG_FLOPS", 0.0)
    monkeypatch.setattr(commands_scan, "forecast", lambda *_, **__: long)
    done = invoke(runner, "scan", model)
    assert done.stderr == (
        "orthofast: an exact scan takes about 60 min here; --sample 1000000 about 20.0 s, with a standard error\n"
    )
    assert invoke(runner, "scan", model, "-q").stderr == ""


def test_inspect_lists_matrices_and_what_cannot_be_read(model: Path, runner: CliRunner) -> None:
    done = invoke(runner, "inspect", model, "--long", "--roles", "query", "--layers", "1")
    assert next(line.split() for line in done.stdout.splitlines() if "q_proj" in line) == [
        *("model.layers.1.self_attn.q_proj.weight", "1", "Query", "16", "16", "F32")
    ]
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-8])
    assert invoke(runner, "inspect", model).exit_code in (2, 3)
    assert invoke(runner, "inspect", model / "absent").exit_code == 2


def test_a_result_is_rendered_again_without_its_weights(model: Path, runner: CliRunner, tmp_path: Path) -> None:
    stored = tmp_path / "result.json"
    printed = invoke(runner, "scan", model, "-o", stored, "--detail").stdout
    shutil.rmtree(model)
    done = invoke(runner, "report", stored)
    assert (done.exit_code, done.stdout) == (0, printed)
    targets = [tmp_path / f"again{suffix}" for suffix in (".html", ".md", ".csv", ".json", ".svg")]
    done = invoke(runner, "report", stored, *(word for target in targets for word in ("-o", target)))
    assert (done.exit_code, done.stdout) == (0, "")
    result = ScanResult.load(stored)
    assert targets[0].read_text("utf-8") == result.to_html()
    assert targets[1].read_text("utf-8") == result.to_markdown()
    assert targets[3].read_text("utf-8") == stored.read_text("utf-8")
    assert any(row.histogram and row.max_pair for row in result.rows)
    page = tmp_path / "changes.html"
    done = invoke(runner, "report", stored, "--against", stored, "-o", page, "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "Before and after" in page.read_text("utf-8")
    assert rows_of(invoke(runner, "report", stored, "--json").stdout) == rows_of(stored.read_text("utf-8"))
    assert invoke(runner, "report", tmp_path / "absent.json").exit_code == 2


def test_a_missing_package_gives_code_4(
    model: Path, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("altair", "no_such_package"))
    done = invoke(runner, "scan", model, "-o", tmp_path / "page.html")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "no_such_package; install the extra with pip install 'orthofast[report]'" in done.stderr
    assert not list(tmp_path.glob("page*"))


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C when so many weights are finished."""
    add, seen = Journal.add, []

    def stopping(self: Journal, item: Item, rows: list[Row]) -> None:
        if len(seen) == count:
            raise KeyboardInterrupt
        add(self, item, rows)
        seen.append(item)

    monkeypatch.setattr(Journal, "add", stopping)


def test_an_interrupted_scan_is_kept_and_goes_on(
    model: Path, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, journal = tmp_path / "result.json", tmp_path / "result.json.journal"
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        done = invoke(runner, "scan", model, "-o", target)
    assert done.exit_code == 130
    assert "interrupted, 11 weights were not reached; go on with --resume" in done.stderr
    partial = ScanResult.load(target)
    assert len(partial.rows) == 5 * 2
    assert partial.provenance["interrupted"] is True
    assert sum("interrupted" in entry.reason for entry in partial.skipped) == 11
    assert journal.exists()
    refused = invoke(runner, "scan", model, "-o", target)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "go on with it by --resume" in refused.stderr
    done = invoke(runner, "scan", model, "-o", target, "--resume")
    assert done.exit_code == 0, done.stderr
    result = ScanResult.load(target)
    assert result.rows == scan_checkpoint(model).rows
    assert result.provenance["weights"] == {"measured": 11, "reused": 5, "missing": 0}
    assert not journal.exists()
    assert invoke(runner, "scan", model, "--resume").exit_code == 2


def test_what_was_found_is_printed_when_there_is_no_file(
    model: Path, runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 8)
    done = invoke(runner, "scan", model, "--journal", tmp_path / "kept")
    assert done.exit_code == 130
    assert "16 measurements" in done.stdout
    assert (tmp_path / "kept").exists()


def test_an_interrupted_scan_prints_the_json_it_was_asked_for(
    model: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_after(monkeypatch, 8)
    done = invoke(runner, "scan", model, "--json", "--journal", tmp_path / "kept")
    assert done.exit_code == 130
    assert len(rows_of(done.stdout)) == 16
    assert json.loads(done.stdout)["provenance"]["interrupted"] is True


def test_a_file_that_cannot_be_written_costs_no_other(model: Path, runner: CliRunner, tmp_path: Path) -> None:
    taken = tmp_path / "taken.md"
    taken.mkdir()
    done = invoke(runner, "scan", model, "-o", taken, "-o", tmp_path / "result.json")
    assert done.exit_code == 2
    assert "taken.md cannot be written" in done.stderr
    assert len(ScanResult.load(tmp_path / "result.json").rows) == 32


def test_a_journal_that_was_named_stays(model: Path, runner: CliRunner, tmp_path: Path) -> None:
    assert invoke(runner, "scan", model, "--journal", tmp_path / "kept", "-q").exit_code == 0
    assert (tmp_path / "kept").exists()


def test_roles_heads_samples_and_sides(model: Path, runner: CliRunner) -> None:
    rows = rows_of(invoke(runner, "scan", model, "--json", "--roles", "query,linear_1", "--axis", "cols").stdout)
    assert {(row["role"], row["vectors"]) for row in rows} == {("Query", "cols"), ("Linear_1.weight", "cols")}
    document = json.loads(invoke(runner, "scan", model, "--json", "--roles", "Query", "--heads").stdout)
    heads = [row for row in document["rows"] if row["head"] is not None]
    assert [row["head"] for row in heads] == [*range(HEADS)] * 2
    weight = make_tensors(FAMILIES["llama"])[heads[0]["name"]].numpy()
    assert heads[0]["pii"] == pytest.approx(numpy_pii(weight[: heads[0]["n"]]), abs=1e-6)
    assert {entry["reason"] for entry in document["skipped"] if "k_proj" in entry["name"]} == {
        "not of the selected roles"
    }
    sampled = rows_of(
        invoke(runner, "scan", model, "--json", "--sample", "40", "--seed", "3", "--roles", "head").stdout
    )
    assert all(row["standard_error"] for row in sampled)


def test_the_papers_preset_takes_its_layer_and_sides(runner: CliRunner, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    tensors = make_tensors(family)
    model = write(tmp_path / "bert", tensors, family.config)
    done = invoke(runner, "scan", model, "--preset", "paper", "--json")
    document = json.loads(done.stdout)
    sides = {row["role"]: row["vectors"] for row in document["rows"]}
    assert {row["layer"] for row in document["rows"]} == {"0"}
    assert {sides[role] for role in ("Query", "Keys", "Values")} == {"cols"}
    assert {sides[role] for role in ("Atten_Output", "Linear_1.weight", "Linear_2.weight")} == {"rows"}
    printed = invoke(runner, "scan", model, "--preset", "paper").stdout
    line = next(text.split() for text in printed.splitlines() if text.startswith("0 "))
    query = tensors["bert.encoder.layer.0.attention.self.query.weight"].numpy().T
    up = tensors["bert.encoder.layer.0.intermediate.dense.weight"].numpy()
    assert (line[1], line[5]) == (f"{numpy_pii(query):.4f}", f"{numpy_pii(up):.4f}")
    assert "as in the paper's script" in printed
    assert invoke(runner, "scan", model, "--preset", "table5").exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1073741824", 1 << 30), ("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1.5g", 1_500_000_000), ("2kb", 2000)],
)
def test_sizes_of_memory(text: str, expected: int) -> None:
    assert memory_bytes(text, "--host-mem") == expected


@pytest.mark.parametrize("text", ["", "much", "4 parsecs", "-1GiB", "3i", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--host-mem needs a size"):
        memory_bytes(text, "--host-mem")


def test_roles_by_name() -> None:
    assert role_names(None) is None
    assert role_names(["query, Linear_1", "HEAD"]) == {"Query", "Linear_1.weight", "Head"}
    with pytest.raises(InputError, match="got 'queries'"):
        role_names(["queries"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host-mem", "lots"], "--host-mem needs"),
        (["--roles", "nose"], "roles needs"),
        (["--roles", "conv"], "roles leaves no matrix"),
        (["--engine", "steam"], "engine needs"),
        (["--sample", "0"], "sample"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_choices_that_cannot_be_are_one_sentence(
    arguments: list[str], word: str, model: Path, runner: CliRunner
) -> None:
    done = invoke(runner, "scan", model, *arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert word in done.stderr


def test_doctor_knows_devices_extras_and_how_fast_files_are_read(runner: CliRunner, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(9 << 20))
    done = invoke(runner, "doctor", tmp_path)
    assert done.exit_code == 0
    for word in ("devices", "report extra", "gguf extra", "hub extra"):
        assert word in done.stdout
    speed = next(line for line in done.stdout.splitlines() if line.startswith("reading"))
    assert speed.endswith("from probe")
    assert speed.count("iB/s") == 2
    assert "reading" not in invoke(runner, "doctor", "--no-probe").stdout
    assert invoke(runner, "doctor", tmp_path / "absent").exit_code == 2
    assert torch.__version__ in done.stdout


def test_what_an_adapter_made_of_its_base_is_told_by_role(runner: CliRunner, tmp_path: Path) -> None:
    result = synthetic.adapted(layers=2)
    result.write(tmp_path / "adapted.json")
    done = invoke(runner, "report", tmp_path / "adapted.json")
    lines = [line.split() for line in done.stdout.splitlines()]
    heads = lines.index(
        ["role", "vectors", "matrices", "base", "merged", "change", "drift", "|dW|/|W|", "delta", "alone"]
    )
    shown = {(line[0], line[1]): line for line in lines[heads + 1 : heads + 5]}
    assert set(shown) == {(role, side) for role in ("Query", "Values") for side in ("rows", "cols")}
    merged = [row for row in result.rows if (row.adapter, row.role, row.vectors) == ("merged", "Query", "rows")]
    assert shown["Query", "rows"][4] == f"{sum(row.pii or 0 for row in merged) / 2:.4f}"
    assert shown["Query", "rows"][7] == f"{sum(row.drift or 0 for row in merged) / 2:.3g}"
    assert "with the adapter" not in invoke(runner, "report", tmp_path / "adapted.json", "--long").stdout
    result.rows = [row for row in result.rows if row.adapter != "merged"]
    result.write(tmp_path / "delta.json")
    lines = [line.split() for line in invoke(runner, "report", tmp_path / "delta.json").stdout.splitlines()]
    mean = result.summary("delta")["rows", "Query"].mean
    assert ["Query", "rows", "2", f"{mean:.4f}"] in lines

"""The command line: exit codes, what goes to which stream, the JSON document, narrow terminals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from orthofast import cli
from orthofast.commands import scan as commands_scan
from orthofast.kernels import dispatch
from tests.scan.attacks import LFS
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write

ROOT = Path(__file__).parents[2]
COLUMNS = ["Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = FAMILIES["bert"]
    return write(tmp_path / "bert", make_tensors(family), family.config)


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    tensors = make_tensors(FAMILIES["bert"])
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 2] = float("nan")
    return write(tmp_path / "poisoned", tensors)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return CliRunner()


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-m", "orthofast", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, check=False)


def test_scan_prints_both_sides_and_the_baseline(model: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["scan", str(model)])
    assert done.exit_code == 0
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    heads = [i for i, line in enumerate(lines) if line == ["layer", *COLUMNS]]
    assert len(heads) == 2
    weight = make_tensors(FAMILIES["bert"])["bert.encoder.layer.10.intermediate.dense.weight"].numpy()
    for head, vectors in zip(heads, (weight, weight.T), strict=True):
        assert [line[0] for line in lines[head + 1 : head + 9]] == [
            "0",
            "1",
            "10",
            "mean",
            "min",
            "max",
            "baseline",
            "ratio",
        ]
        assert lines[head + 3][5] == f"{numpy_pii(vectors):.4f}"
    assert "outside the table" in done.stdout
    assert "bert.pooler.dense.weight" in done.stdout
    assert "skipped" in done.stdout


def test_json_is_alone_on_stdout(model: Path, tmp_path: Path) -> None:
    done = command(
        "scan", str(model), "--json", "-o", str(tmp_path / "out.csv"), "-o", str(tmp_path / "out.md"), cwd=tmp_path
    )
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert len(document["rows"]) == 2 * (4 + 3 * 6)
    assert "wrote" in done.stderr
    assert (tmp_path / "out.csv").read_text().count("\n") == len(document["rows"]) + 1
    assert "| layer | Query |" in (tmp_path / "out.md").read_text()


def test_failed_tensors_give_code_3_and_results_all_the_same(poisoned: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["scan", str(poisoned), "--json"])
    assert done.exit_code == 3
    rows = json.loads(done.stdout)["rows"]
    assert {row["name"] for row in rows if row["error"]} == {"bert.encoder.layer.1.output.dense.weight"}
    assert sum(row["pii"] is not None for row in rows) == len(rows) - 2
    assert "1 of 12 vectors hold NaN or Inf" in done.stderr


@pytest.mark.parametrize(
    "what", ["absent", "git-lfs", "empty folder", "suffix", "vectors", "layers", "backend", "output folder", "globs"]
)
def test_unreadable_input_and_wrong_usage_give_code_2(
    what: str, model: Path, tmp_path: Path, runner: CliRunner
) -> None:
    (tmp_path / "lfs.safetensors").write_bytes(LFS)
    (tmp_path / "nothing").mkdir()
    arguments, word = {
        "absent": (["no-such-model"], "no-such-model cannot be read"),
        "git-lfs": ([str(tmp_path / "lfs.safetensors")], "lfs.safetensors is a git-lfs pointer"),
        "empty folder": ([str(tmp_path / "nothing")], "nothing holds no .safetensors"),
        "suffix": ([str(model), "-o", "x.xlsx"], ".json, .csv, .parquet, .md, .html, .png, .svg"),
        "vectors": ([str(model), "--vectors", "heads"], "vectors needs"),
        "layers": ([str(model), "--layers", "5-2"], "layers needs"),
        "backend": ([str(model), "--backend", "abacus"], "abacus"),
        "output folder": ([str(model), "-o", str(tmp_path / "absent" / "x.json")], "does not exist"),
        "globs": ([str(model), "--include", "nothing*"], "no tensor"),
    }[what]
    done = runner.invoke(cli.app, ["scan", *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["scan"], ["scan", "a", "--nonsense"], ["nonsense"]])
def test_wrong_usage_gives_code_2(arguments: list[str], runner: CliRunner) -> None:
    done = runner.invoke(cli.app, arguments)
    assert (done.exit_code, done.stdout) == (2, "")


def test_an_interrupt_gives_code_130(model: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_scan, "measure", interrupted)
    done = runner.invoke(cli.app, ["scan", str(model)])
    assert (done.exit_code, done.stdout) == (130, "")
    assert "interrupted" in done.stderr


def test_missing_shards_are_said_first(tmp_path: Path, runner: CliRunner) -> None:
    save_file({"layers.0.weight": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    weight_map = {
        "layers.0.weight": "a.safetensors",
        "layers.1.weight": "b.safetensors",
        "layers.2.weight": "c.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = runner.invoke(cli.app, ["scan", str(tmp_path)])
    assert done.exit_code == 3
    assert "2 of 3 shards are missing: b.safetensors, c.safetensors" in done.stderr.splitlines()[0]
    assert "layers.0.weight" in done.stdout


def test_selection_of_layers_names_and_sides(model: Path, runner: CliRunner) -> None:
    done = runner.invoke(
        cli.app, ["scan", str(model), "--json", "--layers", "1,10", "--exclude", "*dense*", "--vectors", "rows"]
    )
    rows = json.loads(done.stdout)["rows"]
    assert [(row["layer"], row["role"], row["vectors"]) for row in rows] == [
        (layer, role, "rows") for layer in ("1", "10") for role in ("Query", "Keys", "Values")
    ]


def test_long_lists_every_matrix(model: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["scan", str(model), "--long", "--vectors", "cols"])
    assert done.exit_code == 0
    for name, (_, expected) in FAMILIES["bert"].tensors.items():
        assert (name in done.stdout) == (expected is not None)


def test_quiet_prints_nothing_but_writes(model: Path, tmp_path: Path, runner: CliRunner) -> None:
    target = tmp_path / "out.json"
    done = runner.invoke(cli.app, ["scan", str(model), "-q", "-o", str(target)])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text())["rows"]


@pytest.mark.parametrize("columns", ["24", "40", "60", "80", "200"])
def test_no_terminal_is_too_narrow_for_whole_numbers(columns: str, model: Path, runner: CliRunner) -> None:
    plain = runner.invoke(cli.app, ["scan", str(model)]).stdout
    terminal = {"FORCE_COLOR": "1", "COLUMNS": columns, "TERM": "xterm"}
    narrow = runner.invoke(cli.app, ["scan", str(model), "--no-progress"], env=terminal, color=True).stdout
    assert "\x1b" not in plain
    assert "\x1b" in narrow
    tables = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", narrow).split("skipped")[0]
    assert "…" not in tables
    found, expected = (sorted(re.findall(r"\d+\.\d{4}\b", text)) for text in (tables, plain))
    assert found == expected
    if int(columns) >= 40:
        assert max(len(line) for line in tables.splitlines() if not line.startswith("PII")) <= int(columns)


def test_no_color_is_honoured(model: Path, runner: CliRunner) -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm"}
    arguments = ["scan", str(model), "--no-progress"]
    coloured = runner.invoke(cli.app, arguments, env=terminal, color=True).stdout
    plain = runner.invoke(cli.app, arguments, env={**terminal, "NO_COLOR": "1"}, color=True).stdout
    colour = re.compile(r"\x1b\[[0-9;]*3[1-7]m")
    assert colour.search(coloured)
    assert not colour.search(plain)


def test_a_progress_bar_is_shown_on_a_terminal_only(model: Path, runner: CliRunner) -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}
    shown = runner.invoke(cli.app, ["scan", str(model), "--json"], env=terminal, color=True)
    assert "scanning" in shown.stderr
    assert json.loads(shown.stdout)["rows"]
    for quiet in ("--no-progress", "--quiet"):
        assert runner.invoke(cli.app, ["scan", str(model), quiet], env=terminal, color=True).stderr == ""


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, runner: CliRunner) -> None:
    save_file({"evil\x1b[2J[bold]\n.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    done = runner.invoke(cli.app, ["scan", str(tmp_path)])
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "evil\\x1b[2J[bold]\\n.weight" in done.stdout


def test_doctor_lists_every_backend_with_a_reason(runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["doctor"])
    assert done.exit_code == 0
    for name in dispatch.NAMES:
        assert re.search(rf"^[+ ] {name} +\S", done.stdout, re.MULTILINE)
    for word in (torch.__version__, "threads", "instruction set", "report extra", "float32", "bfloat16"):
        assert word in done.stdout


def test_version_and_module_are_the_command(tmp_path: Path) -> None:
    done = command("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert re.fullmatch(r"orthofast \d\S*\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "tail", "code", "sentence"),
    [
        ("scan {model}", "| true", 141, ""),
        ("scan {model} --json", "> /dev/full", 2, "orthofast: the output cannot be written: No space left on device\n"),
        ("scan {model} --json", ">&-", 0, ""),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback_and_no_failed_gate(
    arguments: str, tail: str, code: int, sentence: str, model: Path, tmp_path: Path
) -> None:
    line = f'"{sys.executable}" -m orthofast {arguments.format(model=model)} {tail}; exit ${{PIPESTATUS[0]}}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (code, sentence)

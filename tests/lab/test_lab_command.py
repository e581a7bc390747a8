"""``orthofast lab``: lists, refusals before anything runs, what is kept, interrupts, exit codes, closed pipes."""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from orthofast import cli
from orthofast.commands.terminal import Terminal
from orthofast.lab import command, runs, table5
from orthofast.lab.experiment import Absent, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.independence_parts import TinyTransformer
from orthofast.lab.registry import REGISTRY, find
from orthofast.lab.verdict import Verdict, below, judge

ROOT = Path(__file__).parents[2]
CALLS: list[int] = []
LONG = "a number whose name is much longer than what any terminal shows in one line, " * 4


def measure(settings: Settings) -> Raw:
    CALLS.append(settings.seed)
    return {"y": float(torch.rand(()))}


def interrupted(settings: Settings) -> Raw:
    if settings.seed == 1:
        raise KeyboardInterrupt
    return measure(settings)


def fail(settings: Settings) -> Raw:
    raise ValueError("no such thing")


def verdict(raws: Sequence[Raw]) -> Verdict:
    return judge([below(LONG, [raw["y"] for raw in raws], 1.0, 0.5)])


def figure(raws: Sequence[Raw]) -> Figure:
    return Figure([Panel("x", "y", [Series("drawn", ["a"], [[raw["y"]] for raw in raws])], kind="bars")], "Caption.")


TINY = Experiment("S1-F1", "tiny", "It is below 1.", measure, verdict, figure, needs=("digits", "mnist"))
ABSENT = Absent("S2-T1", "a table", "A claim.", "needs machines")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small experiment instead of all, no pictures."""
    CALLS.clear()
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "find", lambda wanted: find(wanted) if wanted else [TINY, ABSENT])
    monkeypatch.setattr(runs, "pictures", lambda *drawn: {})


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_the_list_is_a_line_an_entry_and_cuts_nothing() -> None:
    lines = invoke("--list", "S0", "S1", "S2", "S3").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["id", *REGISTRY]
    assert all(line == line.rstrip() for line in lines)
    for line, entry in zip(lines[1:], REGISTRY.values(), strict=True):
        assert entry.title in line
        assert (", ".join(entry.needs) or "no data" if isinstance(entry, Experiment) else entry.reason) in line
    assert [line.split()[0] for line in invoke("--list", "s3", "S0-T1").stdout.splitlines()[1:]] == [
        "S0-T1",
        "S3-T1",
        "S3-F1",
        "S3-F2",
        "S3-T2",
    ]


def test_a_terminal_folds_the_list_within_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(command, "console", lambda: screen)
    command.print_list(find(["S0-T1", "S0-A1"]))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 60
    assert len(lines) > 3
    assert lines[2].startswith(" " * 20)


def test_help_tells_every_option_and_the_exit_codes() -> None:
    told = re.sub(r"\s+", " ", invoke("--help").stdout)
    for word in ("--list", "--out", "--data", "--data-folder", "--scale", "--device", "--seeds", "--jobs", "--fresh"):
        assert word in told
    assert "table5 MODEL..." in told
    assert "0 done, whatever the verdicts, 2 wrong usage" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["S9"], "'S9' is no experiment; `orthofast lab --list` shows them all"),
        (["--data", "fashion"], "data needs one of digits, mnist, cifar10, cifar100, got 'fashion'"),
        (["--scale", "large"], "scale needs one of small, paper, got 'large'"),
        (["--data", "mnist"], "data=mnist needs a folder that holds train-images-idx3-ubyte"),
        (["--data", "mnist", "--data-folder", "absent"], "absent is no folder; data=mnist needs one that holds train-"),
        (["--data", "mnist", "--data-folder", "."], ". does not hold the files of mnist: train-images-idx3-ubyte"),
        (["--device", "cuda"], "--device cuda needs a CUDA device, torch finds none here; use --device cpu"),
        (["--device", "cuda:3"], "--device cuda:3 needs a CUDA device, torch finds none here"),
        (["--device", "mps"], "--device needs cpu or cuda, got 'mps'"),
        (["--device", "gpu"], "--device needs cpu, cuda or such as cuda:1, got 'gpu'"),
        (["--out", "taken"], "--out needs a folder, taken is a file"),
        (["--out", "taken/below"], "--out needs a folder that takes files, taken/below does not: Not a directory"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_before_anything_runs(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("taken").write_text("a file")
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"orthofast: {said}")
    assert done.stderr.count("\n") == 1
    assert CALLS == []
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_device_that_is_there_is_taken_and_one_beyond_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1"):
        command.check_device(name)
    with pytest.raises(command.InputError, match="--device cuda:2 needs a CUDA device, torch finds 2 here"):
        command.check_device("cuda:2")


def test_data_that_no_chosen_experiment_takes_is_not_asked_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find", lambda wanted: [replace(TINY, needs=())])
    assert invoke("--data", "cifar10", "--seeds", 1, "--jobs", 1, "--out", out).exit_code == 0
    assert CALLS == [0]


def test_seeds_are_counted_kept_and_measured_afresh(out: Path) -> None:
    done = invoke("--seeds", 2, "--jobs", 1, "--out", out)
    assert done.exit_code == 0
    assert CALLS == [0, 1]
    first, second, third, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"S1-F1 +reproduced +tiny", first)
    assert second.startswith(f"          holds {LONG}: ")  # in one line, however long
    assert second.endswith("needed below 1, published 0.5")
    assert re.fullmatch(r"S2-T1 +not run here +a table", third)
    assert rest == ["          needs machines", str(out / "index.html")]
    assert re.fullmatch(r"1 of 2  0:00:\d\d  S1-F1 done\n2 of 2  0:00:\d\d  S1-F1 done\n", done.stderr)
    again = invoke("--seeds", 3, "--jobs", 1, "--out", out)
    assert CALLS == [0, 1, 2]
    assert [line.split()[-1] for line in again.stderr.splitlines()] == ["kept", "kept", "done"]
    invoke("--seeds", 1, "--jobs", 1, "--out", out, "--fresh")
    assert CALLS == [0, 1, 2, 0]
    assert json.loads((out / "verdicts.json").read_text())["S1-F1"]["seeds"] == 1
    for option in ("--seeds", "--jobs"):
        assert invoke(option, 0, "--out", out).exit_code == 2


def test_an_interrupted_run_goes_on_where_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find", lambda wanted: [replace(TINY, run=interrupted)])
    done = invoke("--jobs", 1, "--out", out)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.endswith(
        "orthofast: interrupted; finished seeds are kept, the same command without --fresh goes on from there\n"
    )
    assert CALLS == [0]
    assert not (out / "verdicts.json").exists()
    monkeypatch.setattr(command, "find", lambda wanted: [TINY])
    assert invoke("--jobs", 1, "--out", out).exit_code == 0
    assert CALLS == [0, 1, 2]


def test_an_interrupt_while_the_page_is_written_keeps_seeds_too(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "find", lambda wanted: [TINY])
    monkeypatch.setattr(command, "write_summary", stopped)
    done = invoke("--jobs", 1, "--out", out)
    assert done.exit_code == 130
    assert "finished seeds are kept" in done.stderr
    assert "nothing was written" not in done.stderr


def test_an_interrupt_waits_for_no_experiment_in_another_process(tmp_path: Path) -> None:
    others = multiprocessing.active_children()
    workers: list[BaseProcess] = []
    running: list[str] = []

    def told(identifier: str, what: str) -> None:
        running.append(what)
        if len(running) == 2:
            workers.extend(set(multiprocessing.active_children()) - set(others))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run_all(find(["S0-M1"]), Settings(), tmp_path, seeds=2, jobs=2, told=told)
    assert workers
    assert all(worker.exitcode == -signal.SIGTERM for worker in workers)  # 0 had they been waited for


def test_an_experiment_that_stops_is_told_by_the_exit_code(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find", lambda wanted: [replace(TINY, run=fail), replace(TINY, id="S1-F2a")])
    done = invoke("--seeds", 1, "--jobs", 1, "--out", out)
    assert done.exit_code == 3
    assert re.search(r"^S1-F1 +failed +tiny\n +ValueError: no such thing$", done.stdout, re.MULTILINE)
    assert re.search(r"^S1-F2a +reproduced", done.stdout, re.MULTILINE)


def test_table5_of_models_that_are_named(out: Path, tmp_path: Path) -> None:
    missing = invoke("table5", tmp_path / "absent.safetensors", "--out", out, "--jobs", 1)
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert re.search(r"^orthofast: .*absent\.safetensors.*\n\Z", missing.stderr, re.MULTILINE)
    assert not (out / "verdicts.json").exists()
    torch.manual_seed(0)
    model = tmp_path / "model.pt"
    torch.save(TinyTransformer(11, 16, 32, 2, 2, 6).state_dict(), model)
    done = invoke("table5", model, "--out", out, "--jobs", 1)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^S0-T5 +reproduced", done.stdout, re.MULTILINE)
    assert "model.pt: largest PII over baseline" in done.stdout
    (found,) = json.loads((out / "S0-T5" / "raw.json").read_text()).values()
    assert list(found[f"{tmp_path.name}/model.pt"]["paper"]) == list(table5.ROLES)


def test_a_terminal_shows_a_bar_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(command, "console", lambda stderr=False: screen)
    with command._bar(4) as told:
        told("S1-F1", "running")
        told("S1-F2a", "running")
        told("S1-F1", "done")
        told("S1-F3", "kept")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"2/4 0:00:\d\d passed, \S+ left S1-F2a", shown)


def test_doctor_tells_of_the_labs_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    told = CliRunner().invoke(cli.app, ["doctor", "--no-probe"]).stdout
    assert re.search(r"^lab extra +\S", told, re.MULTILINE)

    def without(name: str, *more: Any) -> object:
        return None if name in ("sklearn", "vl_convert") else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    told = CliRunner().invoke(cli.app, ["doctor", "--no-probe"]).stdout
    assert re.search(r"^lab extra +missing vl_convert, sklearn.*orthofast\[lab\]", told, re.MULTILINE)


@pytest.mark.parametrize(("tail", "code"), [("| true", 141), (">&-", 0)])
def test_a_closed_output_is_no_traceback(tail: str, code: int, tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m orthofast lab --list {tail}; exit ${{PIPESTATUS[0]}}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (code, "")

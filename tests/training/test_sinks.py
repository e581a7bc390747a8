"""Sinks: each writes what a row holds, read back with the real package."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orthofast.errors import InputError, MissingPackageError
from orthofast.training import Console, Csv, JsonLines, MLflow, Monitor, TensorBoard, WandB
from orthofast.training.rows import Row, add_metric, path_of
from orthofast.training.sinks import Sinks, console_line

VALUES = {
    "orthofast/pii/mean": 0.25,
    "orthofast/pii/max": 0.5,
    "orthofast/pii/argmax": "blocks.1.attn.in_proj_weight[q]",
    "orthofast/pii/blocks.1.attn.in_proj_weight[q]": 0.5,
    "orthofast/pii/head": math.nan,
    "orthofast/nonfinite/head": 3.0,
    "orthofast/error/neck": 'RuntimeError: "no, no"',
    "orthofast/overhead": 0.004,
}


def row(step: int = 7, **more: float) -> Row:
    return Row(step, {**VALUES, **more})


def test_json_lines_are_appended_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for step in (7, 8):
        sink = JsonLines(path)
        sink.write(row(step))
        sink.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8]
    assert lines[0]["orthofast/pii/mean"] == 0.25
    assert lines[0]["orthofast/pii/head"] is None
    assert lines[0]["orthofast/error/neck"] == 'RuntimeError: "no, no"'


def test_csv_is_one_value_a_line_with_one_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for step in (7, 8):
        sink = Csv(path)
        sink.write(row(step))
        sink.close()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [7] * len(VALUES) + [8] * len(VALUES)
    assert {line["key"]: line["value"] for line in lines} == {key: str(value) for key, value in VALUES.items()}


def test_the_console_shows_means_extremes_and_trouble() -> None:
    line = console_line(row())
    assert line == (
        "orthofast step 7: pii 0.25 (max 0.5 at blocks.1.attn.in_proj_weight[q]) | head: 3 vectors with NaN or Inf | "
        'neck: RuntimeError: "no, no" | overhead 0.4 %'
    )
    plain = io.StringIO()
    Console(plain).write(row())
    assert plain.getvalue() == line + "\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_if_rich_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    Console(coloured).write(row())
    assert "\x1b[" in coloured.getvalue()
    assert "in_proj_weight[q]" in coloured.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    Console(plain).write(row())
    assert plain.getvalue() == console_line(row()) + "\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_scalars_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for step in (7, 9):
        sink.write(row(step))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    numbers = {key for key, value in VALUES.items() if isinstance(value, float)}
    assert set(events.Tags()["scalars"]) == numbers
    assert [(event.step, event.value) for event in events.Scalars("orthofast/pii/mean")] == [(7, 0.25), (9, 0.25)]


def test_a_writer_of_yours_stays_open() -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def add_scalar(self, key: str, value: float, step: int) -> None:
            self.calls.append((key, value, step))

        def flush(self) -> None:
            self.calls.append("flush")

    writer = Writer()
    sink = TensorBoard(writer)
    sink.write(Row(3, {"orthofast/pii/mean": 0.5, "orthofast/pii/argmax": "head"}))
    sink.close()
    assert writer.calls == [("orthofast/pii/mean", 0.5, 3), "flush"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_the_metrics_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        for step in (7, 9):
            MLflow().write(row(step))
    other = mlflow.tracking.MlflowClient()
    history = other.get_metric_history(run.info.run_id, "orthofast/pii/mean")
    assert [(point.step, point.value) for point in history] == [(7, 0.25), (9, 0.25)]
    keys = other.get_run(run.info.run_id).data.metrics
    assert keys["orthofast/pii/blocks.1.attn.in_proj_weight_q_"] == 0.5
    assert not any("argmax" in key for key in keys)
    MLflow(run.info.run_id).write(row(11))
    assert len(other.get_metric_history(run.info.run_id, "orthofast/pii/mean")) == 3


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_rows_behind_the_run_s_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    with pytest.raises(InputError, match=r"WandB needs a run; call wandb\.init\(\) first"):
        WandB().write(row())
    settings = wandb.Settings(console="off", x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="orthofast-test", settings=settings)
    try:
        run.log({"loss": 1.0}, step=50)
        WandB().write(row(7))
        WandB(run).write(row(9))
        run.log({"loss": 0.5}, step=60)
        summary = dict(run.summary)
    finally:
        run.finish()
    assert summary["orthofast/pii/mean"] == 0.25
    assert summary["orthofast/step"] == 9
    (log,) = tmp_path.rglob("run-*.wandb")
    assert b"orthofast/pii/mean" in log.read_bytes()


@pytest.mark.parametrize(
    ("module", "make", "package"),
    [
        ("torch.utils.tensorboard", TensorBoard, "tensorboard"),
        ("wandb", lambda path: WandB().write(row()), "wandb"),
        ("mlflow", lambda path: MLflow().write(row()), "mlflow-skinny"),
    ],
)
def test_a_missing_package_is_named(
    module: str, make: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"needs the package .*; pip install {package}"):
        make(tmp_path)


def test_all_kinds_may_stand_in_one_list(tmp_path: Path) -> None:
    seen: list[Any] = []
    model = nn.Linear(4, 6)
    sinks = [lambda values, step: seen.append((step, values)), JsonLines(tmp_path / "rows.jsonl"), Csv(tmp_path / "c")]
    with Monitor(model, every_n_steps=1, log=sinks, overhead=None) as monitor:
        monitor.step()
    line = json.loads((tmp_path / "rows.jsonl").read_text())
    (step, values) = seen[0]
    assert step == line.pop("step") == 1
    assert values == line
    assert values["orthofast/pii/weight"] == monitor.latest["orthofast/pii/weight"]
    assert [list, dict] == [type(seen), type(values)]


def test_a_sink_that_cannot_close_is_reported() -> None:
    class Stuck:
        def write(self, row: Row) -> None:
            pass

        def close(self) -> None:
            raise OSError("still busy")

    sinks = Sinks([Stuck()])
    with pytest.warns(RuntimeWarning, match="the sink Stuck raised OSError: still busy"):
        sinks.close()


@pytest.mark.parametrize("log", [3, "console", ["a"], Console, [JsonLines]])
def test_what_is_no_sink_is_refused(log: Any) -> None:
    with pytest.raises(InputError, match="log needs a callable"):
        Sinks(log)


def test_rows_take_means_over_what_is_known() -> None:
    made = Row(1)
    add_metric(made, "pii", ["a", "b", "c"], [0.2, math.nan, 0.4], low_is_worse=False, worst_k=2)
    assert made.values["orthofast/pii/mean"] == pytest.approx(0.3)
    assert (made.values["orthofast/pii/max"], made.values["orthofast/pii/argmax"]) == (0.4, "c")
    assert [key for key in made.values if key[-2:] in ("/a", "/b", "/c")] == ["orthofast/pii/b", "orthofast/pii/c"]
    low = Row(1)
    add_metric(low, "weight_domination", ["a", "b"], [0.2, 0.1], low_is_worse=True, worst_k=1)
    assert low.values["orthofast/weight_domination/argmin"] == "b"
    assert low.values["orthofast/weight_domination/b"] == 0.1
    assert "orthofast/weight_domination/a" not in low.values
    nothing = Row(1)
    add_metric(nothing, "pii", ["a"], [math.nan], low_is_worse=False, worst_k=None)
    assert list(nothing.values) == ["orthofast/pii/a"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("encoder.0.weight", "encoder.0"),
        ("attn.in_proj_weight[q]", "attn.in_proj_weight[q]"),
        ("weight", "weight"),
        ("max.weight", "max.weight"),
        ("lstm.weight_ih_l0[i]", "lstm.weight_ih_l0[i]"),
    ],
)
def test_a_key_is_the_module_s_path_and_no_aggregate(name: str, path: str) -> None:
    assert path_of(name) == path


def test_a_model_with_a_module_named_max_keeps_keys_apart() -> None:
    model = nn.ModuleDict({"max": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    with torch.no_grad():
        model["max"].weight.copy_(torch.eye(4, 3))
    monitor = Monitor(model, every_n_steps=1, metrics=("pii",), log=[], worst_k=None, overhead=None)
    monitor.step()
    assert monitor.latest["orthofast/pii/max.weight"] == 0
    assert monitor.latest["orthofast/pii/max"] == monitor.latest["orthofast/pii/b"] > 0


@pytest.mark.parametrize("package", ["lightning", "torchmetrics", "transformers"])
def test_an_adapter_without_its_host_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = f"orthofast.training.{package}"
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, adapter, raising=False)
    with pytest.raises(MissingPackageError, match=rf"{adapter} needs .*{package}.*; pip install"):
        importlib.import_module(adapter)

"""Many checkpoints on any executor: the results of one after the other, and a failure that stops nobody."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthofast.errors import CheckpointError, InputError, OrthofastError
from orthofast.scan import ScanOptions, ScanResult, scan_checkpoint, scan_many
from tests.scan.checkpoints import FAMILIES, make_tensors, write


class Pickling(Executor):
    """Hands task and answer over as bytes, as other processes would."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        task = pickle.loads(pickle.dumps((function, arguments, named)))
        future.set_result(pickle.loads(pickle.dumps(task[0](*task[1], **task[2]))))
        return future


class Losing(Executor):
    """A pool whose worker dies at the second task."""

    tasks = 0

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks += 1
        if self.tasks == 2:
            future.set_exception(BrokenProcessPool("a child process terminated abruptly"))
        else:
            future.set_result(function(*arguments, **named))
        return future


@pytest.fixture
def fleet(tmp_path: Path) -> list[Path]:
    paths = []
    for i in range(3):
        path = tmp_path / f"step{i}.safetensors"
        save_file({"layers.0.weight": torch.randn(12 + i, 9)}, path)
        paths.append(path)
    paths[1].write_bytes(b"spoilt")
    return paths


@pytest.mark.parametrize("executor", [None, Pickling(), ThreadPoolExecutor(2)], ids=["none", "pickling", "threads"])
def test_a_fleet_gives_the_results_of_single_scans(executor: Executor | None, fleet: list[Path]) -> None:
    found = list(scan_many(fleet, executor=executor, vectors="rows", options=ScanOptions(detail=True)))
    assert [path for path, _ in found] == fleet
    assert isinstance(found[1][1], CheckpointError)
    assert "step1.safetensors" in str(found[1][1])
    for i in (0, 2):
        result = found[i][1]
        assert isinstance(result, ScanResult)
        assert result.rows == scan_checkpoint(fleet[i], vectors="rows", options=ScanOptions(detail=True)).rows


def test_a_lost_worker_costs_its_checkpoint_alone(fleet: list[Path]) -> None:
    found = [outcome for _, outcome in scan_many([fleet[0], fleet[2], fleet[0]], executor=Losing())]
    assert [isinstance(outcome, ScanResult) for outcome in found] == [True, False, True]
    assert isinstance(found[1], OrthofastError)
    assert "step2.safetensors: the worker that scanned it was lost (a child" in str(found[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"progress": print}, "progress cannot be shared"),
        ({"options": ScanOptions(journal="j")}, "journal belongs to one checkpoint"),
    ],
)
def test_what_cannot_be_shared_is_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        scan_many([], **arguments)


def test_the_papers_preset_takes_its_layer_and_sides(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    write(tmp_path, make_tensors(family), family.config)
    whole = {(row.name, row.vectors): row for row in scan_checkpoint(tmp_path).rows}
    result = scan_checkpoint(tmp_path, options=ScanOptions(preset="paper"))
    assert {(row.role, row.vectors) for row in result.rows} == {
        ("Query", "cols"),
        ("Keys", "cols"),
        ("Values", "cols"),
        ("Atten_Output", "rows"),
        ("Linear_1.weight", "rows"),
        ("Linear_2.weight", "rows"),
    }
    assert {row.layer for row in result.rows} == {"0"}
    assert all(row == whole[row.name, row.vectors] for row in result.rows)
    assert result.provenance["preset"] == "paper"
    with pytest.raises(InputError, match="preset needs one of 'paper'"):
        scan_checkpoint(tmp_path, options=ScanOptions(preset="other"))


def test_a_module_is_scanned_where_it_is() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    rows = scan_checkpoint(module, vectors="rows").rows
    assert {row.name for row in rows} == {"0.weight", "2.weight"}
    again = scan_checkpoint(module.state_dict(), vectors="rows").rows
    assert [row.pii for row in again] == [row.pii for row in rows]
    assert os.environ.get("RANK") is None

"""Several processes measure one checkpoint: one result for all, whoever is lost on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from orthofast.commands import scan as commands_scan
from orthofast.errors import InputError, OrthofastError
from orthofast.scan import ScanOptions, scan_checkpoint
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import measure
from orthofast.scan.ranks import Team, local_device, restarted, team_from_environment, units_of
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.checkpoints import write_shards
from tests.scan.processes import end, is_alive, start, wait

WEIGHTS = 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.weight": torch.randn(24 + i, 20) for i in range(WEIGHTS)}
    tensors["layers.7.weight"][3, 3] = float("nan")
    tensors["layers.9.weight"] = tensors["layers.8.weight"].clone()
    return write_shards(tmp_path / "model", tensors)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def expected(model: Path) -> object:
    """Rows and skipped as JSON has them."""
    document = json.loads(scan_checkpoint(model).to_json())
    return document["rows"], document["skipped"]


def results(out: Path) -> dict[int, dict[str, object]]:
    return {int(file.stem.removeprefix("result")): json.loads(file.read_text()) for file in out.glob("result*.json")}


def journalled(out: Path, rank: int) -> set[str]:
    file = out / f"scan.journal.rank{rank}"
    lines = file.read_bytes().split(b"\n")[1:-1] if file.exists() else []
    return {json.loads(line)["name"] for line in lines}


def test_three_ranks_share_the_work_and_agree(model: Path, tmp_path: Path, store: dist.TCPStore) -> None:
    numbers = [start("scan_as_rank", model, tmp_path, store.port, rank, 3, 0.03, 60.0) for rank in range(3)]
    assert all(wait(number) for number in numbers)
    found = results(tmp_path)
    assert set(found) == {0, 1, 2}
    for document in found.values():
        assert (document["rows"], document["skipped"]) == expected(model)
    shares = [journalled(tmp_path, rank) for rank in range(3)]
    assert sum(map(len, shares)) == WEIGHTS - 1  # a copy is folded once
    assert sum(bool(share) for share in shares) > 1


def test_a_lost_rank_is_made_up_for_by_the_others(model: Path, tmp_path: Path, store: dist.TCPStore) -> None:
    whole = expected(model)
    slow = start("scan_as_rank", model, tmp_path, store.port, 1, 3, 0.4, 1.5)
    others = [start("scan_as_rank", model, tmp_path, store.port, rank, 3, 0.01, 1.5) for rank in (0, 2)]
    _await(lambda: len(journalled(tmp_path, 1)) >= 1)
    end(slow)  # with units that it drew and did not finish
    assert all(wait(number) for number in others)
    found = results(tmp_path)
    assert set(found) == {0, 2}
    for document in found.values():
        assert (document["rows"], document["skipped"]) == whole
    assert len(journalled(tmp_path, 0) | journalled(tmp_path, 2)) < WEIGHTS - 1  # what it had published was used


def test_a_team_goes_on_with_the_journals_of_all_ranks(model: Path, tmp_path: Path, store: dist.TCPStore) -> None:
    pair = [start("scan_as_rank", model, tmp_path, store.port, rank, 2, 0.03, 60.0) for rank in range(2)]
    _await(lambda: len(journalled(tmp_path, 0)) >= 4 and len(journalled(tmp_path, 1)) >= 4)
    for number in pair:
        end(number)
    kept = journalled(tmp_path, 0) | journalled(tmp_path, 1)
    assert results(tmp_path) == {}
    # one process alone
    alone = scan_checkpoint(model, options=ScanOptions(journal=tmp_path / "scan.journal", resume=True))
    assert (json.loads(alone.to_json())["rows"], json.loads(alone.to_json())["skipped"]) == expected(model)
    counts = alone.provenance["weights"]
    assert isinstance(counts, dict)
    assert counts["reused"] == len(kept - {"layers.7.weight"})  # what failed is tried again


def test_the_command_prints_and_writes_on_one_rank(model: Path, tmp_path: Path, store: dist.TCPStore) -> None:
    line = ("scan", model, "--json", "-o", "result.json")
    numbers = [start("command_as_rank", tmp_path, store.port, rank, 2, *line) for rank in range(2)]
    assert all(wait(number) for number in numbers)
    document = json.loads((tmp_path / "result.json").read_text())
    assert (document["rows"], document["skipped"]) == expected(model)
    assert document["provenance"]["ranks"] == 2
    assert document["provenance"]["weights"]["measured"] == WEIGHTS - 1
    assert json.loads((tmp_path / "out0").read_text()) == document
    assert (tmp_path / "out1").read_text() == ""
    assert not list(tmp_path.glob("*journal*"))
    assert (tmp_path / "code0").read_text() == "3"  # one weight holds NaN


class Ranks:
    """Ranks as threads of this process."""

    def __init__(self, store: dist.Store, size: int, **arguments: float) -> None:
        self.teams = [Team(store, rank, size, **arguments) for rank in range(size)]
        self.found: dict[int, object] = {}

    def run(self, measures: dict[int, Path], options: ScanOptions | None = None) -> None:
        def rank(number: int, model: Path) -> None:
            try:
                plan = make_plan(open_checkpoint(model))
                self.found[number] = measure(plan, options=options, team=self.teams[number]).rows
            except OrthofastError as error:
                self.found[number] = error

        threads = [threading.Thread(target=rank, args=pair) for pair in measures.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)


def test_ranks_that_see_different_checkpoints_are_refused(model: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", {f"layers.{i}.weight": torch.randn(9, 9) for i in range(4)})
    ranks = Ranks(dist.HashStore(), 2, patience_s=0.3)
    ranks.run({0: model})  # the other one is silent, and its share is done here
    assert [row.pii for row in ranks.found[0]] == [row.pii for row in scan_checkpoint(model).rows]  # type: ignore[attr-defined]
    ranks.run({1: other})
    assert isinstance(ranks.found[1], InputError)
    assert "rank 1 sees another checkpoint or other settings" in str(ranks.found[1])


def test_a_store_that_is_gone_is_one_sentence(model: Path) -> None:
    class Gone:
        def __getattr__(self, name: str) -> object:
            raise dist.DistNetworkError("Connection was likely closed. Did the remote server shutdown or crash?")

    class Prefix(Gone):
        def __init__(self, prefix: str, store: object) -> None:
            pass

    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "PrefixStore", Prefix)
    with patch.context(), pytest.raises(OrthofastError, match=r"store .* cannot be reached \(Connection was likely"):
        measure(make_plan(open_checkpoint(model)), team=Team(Gone(), 0, 2))  # type: ignore[arg-type]
    patch.undo()


def test_the_environment_names_the_team(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert team_from_environment() is None
    assert not restarted()
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted()
    assert (local_device("cuda"), local_device("cuda:1"), local_device("cpu")) == ("cuda:3", "cuda:1", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert team_from_environment() is None
    asked: list[str] = []

    def rendezvous(url: str, **_: object) -> Iterator[tuple[object, int, int]]:
        asked.append(url)
        yield dist.HashStore(), 1, 2

    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    monkeypatch.setenv("WORLD_SIZE", "2")
    team = team_from_environment()
    assert team is not None
    assert (team.rank, team.size, asked) == (1, 2, ["env://"])
    monkeypatch.setenv("RANK", "1")
    assert commands_scan._follows()
    monkeypatch.delenv("MASTER_ADDR")  # some batch systems set the others for programs of their own
    assert team_from_environment() is None
    assert not commands_scan._follows()


@given(st.lists(st.floats(0, 1e12), max_size=300), st.integers(1, 9))
def test_units_hold_every_weight_once_in_order_and_dear_ones_first(costs: list[float], size: int) -> None:
    units = units_of(costs, size)
    assert sorted(index for unit in units for index in unit) == list(range(len(costs)))
    assert all(unit == list(range(unit[0], unit[-1] + 1)) for unit in units)
    prices = [sum(costs[index] for index in unit) for unit in units]
    assert prices == sorted(prices, reverse=True)
    assert all(
        price <= sum(costs) / (64 * size) * 1.001 or len(unit) == 1 for unit, price in zip(units, prices, strict=True)
    )


def _await(condition: object, seconds: float = 60) -> None:
    ready = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():  # type: ignore[operator]
            return
        ready.wait(0.01)
    pytest.fail("what was waited for did not happen")


def test_processes_that_end_are_seen_to_end() -> None:
    number = start("slowly", 0.0)
    assert wait(number)
    assert not is_alive(number)

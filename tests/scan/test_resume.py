"""A scan that ended early goes on where it stopped, and gives the bits of one that never stopped."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthofast.errors import InputError
from orthofast.scan import Interrupted, ScanOptions, folding, scan_checkpoint
from orthofast.scan.catalog import Catalog, Extent
from orthofast.scan.journal import Journal, row_from
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.result import Row, ScanResult
from tests.scan.checkpoints import write_shards
from tests.scan.processes import end, is_alive, start

WEIGHTS = 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.weight": torch.randn(24 + i, 20) for i in range(WEIGHTS)}
    tensors["layers.7.weight"][3, 3] = float("nan")
    return write_shards(tmp_path / "model", tensors)


def content(result: ScanResult) -> object:
    """All but what differs between any two runs: dates, seconds, what was reused."""
    document = result.to_dict()
    return {key: document[key] for key in ("rows", "skipped")}


def counts(result: ScanResult) -> dict[str, int]:
    found = result.provenance["weights"]
    assert isinstance(found, dict)
    return found


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_a_journal_is_reused_to_the_bit(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    whole = scan_checkpoint(model)
    first = scan_checkpoint(model, options=ScanOptions(journal=journal))
    again = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
    assert content(first) == content(again) == content(whole)
    assert first.rows == again.rows
    assert counts(first) == {"measured": WEIGHTS, "reused": 0, "missing": 0}
    # what failed is tried again
    assert counts(again) == {"measured": 1, "reused": WEIGHTS - 1, "missing": 0}


def test_killed_scans_lose_only_what_was_under_way(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    whole = scan_checkpoint(model, options=ScanOptions(detail=True), heads=True)
    kept = 0
    for more in (1, 4, 9):  # lines to wait for before the kill
        process = start("scan_slowly", model, journal)
        deadline = time.monotonic() + 120
        while lines(journal) < kept + more and is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.002)
        end(process)
        assert lines(journal) >= kept
        kept = lines(journal)
    assert kept >= 9
    result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True, detail=True), heads=True)
    assert content(result) == content(whole)
    assert counts(result)["reused"] + counts(result)["measured"] == WEIGHTS
    # the first line names the format, and the weight with NaN has a line of each scan
    assert counts(result)["reused"] >= min(kept - 4, WEIGHTS - 1)


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_last_line_is_dropped(cut: int, model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    whole = scan_checkpoint(model, options=ScanOptions(journal=journal))
    text = journal.read_bytes()
    journal.write_bytes(text[:-cut])
    for measured in (2, 1):
        result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
        assert content(result) == content(whole)
        assert counts(result)["measured"] == measured
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_spoilt_line_costs_its_weight_alone(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    whole = scan_checkpoint(model, options=ScanOptions(journal=journal))
    text = journal.read_bytes().split(b"\n")
    text[5] = b"\xff" + text[5][3:]
    text[9] = b"{}"
    journal.write_bytes(b"\n".join(text))
    result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
    assert content(result) == content(whole)
    assert counts(result)["measured"] == 3


@pytest.mark.parametrize(
    "what", ["vectors", "heads", "sample", "detail", "precision", "backend", "file", "time", "version"]
)
def test_a_line_of_other_numbers_is_not_reused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"layers.{i}.weight": torch.randn(8, 6) for i in range(4)}, file)
    journal = tmp_path / "scan.journal"
    scan_checkpoint(file, options=ScanOptions(journal=journal))
    status = file.stat()
    arguments: dict[str, object] = {}
    detail = False
    if what == "vectors":
        arguments["vectors"] = "rows"
    elif what == "heads":
        arguments["heads"] = True
    elif what == "sample":
        arguments["sample"] = 5
    elif what == "detail":
        detail = True
    elif what == "precision":
        arguments["precision"] = "float64"
    elif what == "backend":
        arguments["backend"] = "reference"
    elif what == "version":
        monkeypatch.setattr("orthofast.scan.provenance.own_version", lambda: "99.0")
    elif what == "file":
        save_file({f"layers.{i}.weight": torch.randn(8, 6) for i in range(4)}, file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + (what in ("file", "time"))))
    result = scan_checkpoint(file, **arguments, options=ScanOptions(journal=journal, resume=True, detail=detail))  # type: ignore[arg-type]
    assert counts(result) == {"measured": 4, "reused": 0, "missing": 0}
    plain = scan_checkpoint(file, **arguments, options=ScanOptions(detail=detail))  # type: ignore[arg-type]
    assert content(result) == content(plain)


def test_other_weights_of_the_same_checkpoint_are_reused(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    scan_checkpoint(model, include="layers.1*", options=ScanOptions(journal=journal))
    result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
    assert counts(result)["reused"] == 11
    assert content(result) == content(scan_checkpoint(model))


def test_a_journal_that_is_there_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    scan_checkpoint(model, options=ScanOptions(journal=journal))
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"the journal .*scan\.journal is there already: go on with it \(resume\)"):
        scan_checkpoint(model, options=ScanOptions(journal=journal))
    assert journal.read_bytes() == before


def test_two_writers_are_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "scan.journal"
    journal = Journal(path, {})
    with pytest.raises(InputError, match=r"scan\.journal is being written by another scan"):
        Journal(path, {}, resume=True)
    journal.close()
    Journal(path, {}, resume=True).close()


def test_a_journal_that_cannot_be_written_is_one_sentence(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scan\.journal cannot be written: No such file"):
        scan_checkpoint(model, options=ScanOptions(journal=tmp_path / "absent" / "scan.journal"))


def test_values_in_memory_have_no_journal(tmp_path: Path) -> None:
    extent = Extent("w.weight", Path("state_dict"), 0, 36, "F32", (3, 3))
    catalog = Catalog(Path("state_dict"), [extent], format="memory", memory={"w.weight": torch.randn(3, 3)})
    with pytest.raises(
        InputError, match=r"a journal needs a checkpoint in files, but 'w\.weight' is a value in memory"
    ):
        measure(make_plan(catalog), options=ScanOptions(journal=tmp_path / "scan.journal", resume=True))
    assert len(measure(make_plan(catalog)).rows) == 2


def test_every_field_of_a_row_survives_its_line() -> None:
    row = Row("w[query]", None, None, "cols", 3, 4, 0.1 + 0.2, 5e-324, 1 / 3, 0, 0, None)
    row.head, row.expert, row.max_abs, row.max_pair, row.histogram = 2, 7, 0.7, (1, 2), (3, 0, 4)
    row.tied, row.standard_error, row.drift, row.relative_change, row.adapter = ("a", "b"), 1e-9, 0.1, 0.2, "delta"
    fields = json.loads(json.dumps({name: getattr(row, name) for name in Row.__slots__}))
    assert row_from(fields) == row


def test_an_interrupt_carries_what_was_measured(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "CALL_FLOPS", 1.0)
    journal = tmp_path / "scan.journal"
    seen: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == 11:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        scan_checkpoint(model, options=ScanOptions(journal=journal), progress=stop)
    partial = caught.value.result
    assert isinstance(caught.value, KeyboardInterrupt)
    assert {row.name for row in partial.rows} == set(seen)
    unreached = [entry for entry in partial.skipped if "interrupted" in entry.reason]
    assert len(unreached) == WEIGHTS - 11 == counts(partial)["missing"]
    whole = scan_checkpoint(model)
    assert {(r.name, r.vectors): r for r in whole.rows}.items() >= {
        (r.name, r.vectors): r for r in partial.rows
    }.items()
    result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
    assert content(result) == content(whole)
    assert counts(result)["reused"] >= 10


def test_no_thread_and_no_file_outlives_an_interrupt(model: Path) -> None:
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("needs /proc")
    before = len(list(opened.iterdir()))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(Interrupted):
            scan_checkpoint(model, progress=stop)
    assert len(list(opened.iterdir())) == before


def test_resuming_after_the_index_has_changed_measures_what_is_new(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "scan.journal"
    scan_checkpoint(model, options=ScanOptions(journal=journal))
    shard = min(model.glob("*.safetensors"))
    names = [extent.name for extent in open_checkpoint(model).extents if extent.file.name == shard.name]
    save_file({name: torch.randn(9, 9) for name in names}, shard)
    os.utime(shard, ns=(1, 1))
    result = scan_checkpoint(model, options=ScanOptions(journal=journal, resume=True))
    assert content(result) == content(scan_checkpoint(model))
    assert {row.name for row in result.rows if row.n == 9} == set(names)

"""Recorded runs: complete runs alone are taken, rounding turns nothing, what no longer fits the lab is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from docs import lab_counts, recorded
from orthofast.errors import InputError
from orthofast.lab import runs
from orthofast.lab.experiment import Absent, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED, Verdict, below, judge

COMMIT = "0123456789ab"
EDGE = 0.3 - 1e-12  # seven digits of it are 0.3


def measure(settings: Settings) -> Raw:
    edge = EDGE if settings.data == "digits" else 0.2
    return {"rows": {"2": 0.123456789, "0.5": edge}, "seed": settings.seed, "gone": float("nan")}


def verdict(raws: Sequence[Raw]) -> Verdict:
    return judge([below("mean", [raw["rows"]["2"] for raw in raws], 1.0), below("large", [0.2 for _ in raws], 0.3)])


def verdict_at_edge(raws: Sequence[Raw]) -> Verdict:
    return judge([below("edge", [raw["rows"]["0.5"] for raw in raws], 0.3, "below")])


def verdict_against(raws: Sequence[Raw]) -> Verdict:
    return judge([below("mean", [raw["rows"]["2"] for raw in raws], 0.1)], "Too large.")


def figure(raws: Sequence[Raw]) -> Figure:
    return Figure([Panel("x", "y", [Series("one", [1.0], [[raw["rows"]["2"]] for raw in raws])])])


ENTRIES = (
    Experiment("S0-T1", "on data", "It is small.", measure, verdict, figure, ("digits", "mnist"), size="few rows"),
    Experiment("S1-F1", "at the edge", "It is below.", measure, verdict_at_edge, figure, ("digits", "mnist")),
    Experiment("S3-F1", "no data", "It is tiny.", measure, verdict_against, figure, statistical=False),
)


@pytest.fixture(autouse=True)
def _small_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "RUNNABLE", {one.id: one for one in ENTRIES})
    registry = {one.id: one for one in ENTRIES} | {"S2-X1": Absent("S2-X1", "a table", "A claim.", "needs data")}
    monkeypatch.setattr(lab_counts, "REGISTRY", registry)
    monkeypatch.setattr(runs, "commit", lambda: COMMIT)
    monkeypatch.setattr(runs, "pictures", lambda *_: {})  # costs most of a run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.run_all(ENTRIES, Settings(), tmp_path / "lab", seeds=2)
    return tmp_path / "lab"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


def test_a_run_is_recorded_and_judged_as_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "lab-digits.json"
    assert recorded.main([str(folder), str(target)]) == 0
    assert "3 experiments on digits" in capsys.readouterr().out
    record = recorded.read(target)
    assert record.about["commit"] == COMMIT
    assert "data_folder" not in target.read_text()
    found = recorded.judge(record)
    assert {key: one.verdict.status for key, one in found.items()} == {
        "S0-T1": REPRODUCED,
        "S1-F1": REPRODUCED,
        "S3-F1": NOT_REPRODUCED,
    }
    assert {key: one.run.status for key, one in found.items()} == {
        key: one.verdict.status for key, one in found.items()
    }
    assert [len(record.runs[key].seeds) for key in ("S0-T1", "S1-F1", "S3-F1")] == [2, 2, 1]
    assert record.runs["S0-T1"].size == "few rows"
    assert list(record.runs["S0-T1"].raws[0]["rows"]) == ["2", "0.5"]  # not sorted
    lines = target.read_text().splitlines()
    assert [line[:7] for line in lines if line.startswith('"S')] == ['"S0-T1"', '"S1-F1"', '"S3-F1"']


def test_numbers_are_rounded_in_their_order_and_kept_whole_where_that_would_turn_a_condition(folder: Path) -> None:
    record = recorded.collect(folder)
    assert list(record.runs["S0-T1"].raws[1]["rows"].items()) == [("2", 0.1234568), ("0.5", 0.3)]
    assert record.runs["S0-T1"].raws[1] | {"rows": 0} == {"rows": 0, "seed": 1, "gone": None}
    # rounded, 0.3 is not below 0.3
    assert record.runs["S1-F1"].raws[0]["rows"] == {"2": 0.123456789, "0.5": EDGE}


def test_a_record_of_other_data_holds_what_reads_them(tmp_path: Path) -> None:
    runs.run_all(ENTRIES, Settings(data="mnist", data_folder="/somewhere/else"), tmp_path / "lab", seeds=1)
    record = recorded.collect(tmp_path / "lab")
    assert sorted(record.runs) == ["S0-T1", "S1-F1"]
    assert (record.name, record.key, record.whole) == ("MNIST", "mnist", False)
    assert "/somewhere" not in recorded.text_of(record)


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another commit": (
        "S1-F1/manifest.json",
        lambda held: held.update(commit="ffff"),
        "of two runs: commit 'ffff'|ffff",
    ),
    "another scale": ("S1-F1/manifest.json", lambda held: held["settings"].update(scale="paper"), "scale 'small'"),
    "another torch": (
        "S3-F1/manifest.json",
        lambda held: held["versions"].update(torch="1.0"),
        "of two runs: versions",
    ),
    "a failure": ("S0-T1/verdict.json", lambda held: held.update(status="failed", note="no memory"), "no memory"),
    "a lost seed": ("S0-T1/raw.json", lambda held: held.pop("1"), r"holds seeds 0 of \[0, 1\]"),
    "other seeds": ("S1-F1/manifest.json", lambda held: held["seeds"].pop(), r"holds seeds 0, 1 of \[0\]"),
    "other conditions": ("S0-T1/verdict.json", lambda held: held["checks"][0].update(holds=False), "other conditions"),
    "another verdict": ("S0-T1/verdict.json", lambda held: held.update(status=NOT_REPRODUCED), "other conditions"),
    "other numbers": ("S0-T1/raw.json", lambda held: held["0"].pop("rows"), r"cannot be judged \(KeyError: 'rows'\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_complete_run_is_refused(folder: Path, name: str) -> None:
    file, change, said = REFUSED[name]
    edit(folder / file, change)
    with pytest.raises(InputError, match=said):
        recorded.collect(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.update(commit=f"{COMMIT}+"), "names no state of the source"),
        (lambda held: held.update(commit="unknown"), "names no state of the source"),
        (lambda held: held["settings"].update(options=[["models", "mine"]]), "made with options"),
    ],
)
def test_a_run_that_nobody_can_repeat_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], said: str):
    for one in ENTRIES:
        edit(folder / one.id / "manifest.json", change)
    with pytest.raises(InputError, match=said):
        recorded.collect(folder)


def test_missing_and_mixed_experiments_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "S1-F1" / "manifest.json").rename(folder / "manifest.json")
    with pytest.raises(InputError, match="not complete, it lacks S1-F1"):
        recorded.collect(folder)
    (folder / "manifest.json").rename(folder / "S1-F1" / "manifest.json")
    runs.run_all(ENTRIES[:1], Settings(), folder, seeds=1)
    with pytest.raises(InputError, match=r"mixes seeds \[0\] and \[0, 1\]"):
        recorded.collect(folder)
    monkeypatch.setattr(recorded, "RUNNABLE", {"S0-T1": ENTRIES[0]})
    with pytest.raises(InputError, match="S1-F1 holds no experiment of this lab"):
        recorded.collect(folder)


def test_the_command_says_why_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for source, target, said in (
        (folder, "lab-mnist.json", "its record is called lab-digits.json"),
        (tmp_path / "empty", "lab-digits.json", "holds no results"),
        (tmp_path / "none.json", "lab-digits.json", "cannot be read"),
    ):
        assert recorded.main([str(source), str(tmp_path / target)]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
        assert not (tmp_path / target).exists()


def test_numbers_that_are_not_finite_and_places_are_refused(folder: Path) -> None:
    record = recorded.collect(folder)
    record.runs["S0-T1"].raws[0]["rows"]["2"] = float("inf")
    with pytest.raises(InputError, match="S0-T1 holds a number that is not finite"):
        recorded.text_of(record)
    record.runs["S0-T1"].raws[0]["rows"]["2"] = {"read from /home/me/model": 1}
    with pytest.raises(InputError, match="S0-T1 names '/home/me/model'"):
        recorded.text_of(record)


def test_a_changed_number_turns_a_verdict_and_verdicts_can_be_taken_anew(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "lab-digits.json"
    text = recorded.text_of(recorded.collect(folder))
    assert text.count("0.123456789") == 2
    file.write_text(text.replace("0.1234568", "2.0", 1))
    changed = recorded.judge(recorded.read(file))["S0-T1"]
    assert (changed.run.status, changed.verdict.status) == (REPRODUCED, NOT_REPRODUCED)
    assert recorded.main([str(file), str(file)]) == 0
    assert recorded.read(file).runs["S0-T1"].status == NOT_REPRODUCED


def test_what_no_longer_fits_the_lab_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded.collect(folder)
    del record.runs["S1-F1"].raws[1]["rows"]
    with pytest.raises(InputError, match=r"S1-F1 as recorded on digits cannot be judged \(KeyError: 'rows'\)"):
        recorded.judge(record)
    monkeypatch.setattr(recorded, "RUNNABLE", {"S1-F1": ENTRIES[1]})
    with pytest.raises(InputError, match="S0-T1 is recorded on digits, but no experiment"):
        recorded.judge(record)


@pytest.mark.parametrize("text", ["[]", "{}", '{"about": {"data": "digits"}, "experiments": {}}', "no JSON"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lab-digits.json").write_text(text)
    with pytest.raises(InputError, match=r"lab-digits\.json is no"):
        recorded.records(tmp_path)


def test_pages_count_verdicts_and_name_what_is_not_reproduced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    record = recorded.collect(folder)
    (tmp_path / "docs" / "results" / "lab-digits.json").write_text(recorded.text_of(record))
    both = f"{render.BEGIN}\n{render.END}\n{render.LAB_BEGIN}\nold\n{render.LAB_END}\nafter\n"
    for page in ("README.md", "docs/benchmarks.md", "docs/lab.md"):
        (tmp_path / page).write_text(both)
    (tmp_path / "results").mkdir()
    assert "docs/lab.md" in render.render(tmp_path, tmp_path / "results", check=False)
    assert render.render(tmp_path, tmp_path / "results", check=True) == []
    short, full = ((tmp_path / page).read_text() for page in ("README.md", "docs/lab.md"))
    assert "2 of 3 tables, figures and claims" in short
    assert "1 is not; 1 more is not run here." in short
    assert "| all | 2 | 1 | 1 |" in full
    assert "| [Lu et al. 2024](gallery/independence.md) | 1 | 0 | 0 |" in full
    assert "- S3-F1: no data" in full
    assert full.endswith("\nafter\n")
    del record.runs["S1-F1"]
    (tmp_path / "docs" / "results" / "lab-digits.json").write_text(recorded.text_of(record))
    assert render.render(tmp_path, tmp_path / "results", check=True) == ["README.md", "docs/lab.md"]
    assert "| digits | reproduced | not reproduced | not run here | not recorded |" in lab_counts.full([record])

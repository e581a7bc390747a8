"""The page of a folder shows what earlier runs left in it, as far as it is the same data and scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orthofast.lab import runs
from orthofast.lab.earlier import with_earlier
from orthofast.lab.experiment import Settings
from orthofast.lab.page import write_summary
from orthofast.lab.registry import find
from orthofast.lab.runs import run_all
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two experiments, which take no data."""
    monkeypatch.setattr(runs, "pictures", lambda *drawn: {})
    run_all(find(["S3-F1", "S1-F1"]), Settings(), tmp_path, seeds=1)
    return tmp_path


def test_another_experiment_of_the_folder_stays_on_its_page(kept: Path) -> None:
    now = run_all(find(["S1-F2a"]), Settings(), kept, seeds=1)
    both = with_earlier(now, Settings(), kept)
    assert [one.entry.id for one in both] == ["S1-F1", "S1-F2a", "S3-F1"], "the registry's order"
    write_summary(both, Settings(), kept)
    assert list(json.loads((kept / "verdicts.json").read_text())) == ["S1-F1", "S1-F2a", "S3-F1"]
    page = (kept / "index.html").read_text()
    assert all(f'id="{key}"' in page for key in ("S1-F1", "S1-F2a", "S3-F1"))


def test_this_run_comes_before_an_earlier_one_of_the_same_experiment(kept: Path) -> None:
    now = run_all(find(["S1-F1"]), Settings(), kept, seeds=2)
    assert [one.seeds for one in with_earlier(now, Settings(), kept)] == [2, 1]


def test_earlier_numbers_are_judged_anew(kept: Path) -> None:
    file = kept / "S3-F1" / "raw.json"
    assert [one.verdict.status for one in with_earlier([], Settings(), kept)] == [REPRODUCED] * 2
    raws = json.loads(file.read_text())
    raws["0"]["path"][-1] = [1.0, 1.0]
    file.write_text(json.dumps(raws))
    assert [one.verdict.status for one in with_earlier([], Settings(), kept)] == [REPRODUCED, NOT_REPRODUCED]


@pytest.mark.parametrize("name", ["manifest.json", "raw.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"0": {}}'])
def test_what_does_not_fit_is_left_out(kept: Path, name: str, content: str) -> None:
    (kept / "S3-F1" / name).write_text(content)
    assert [one.entry.id for one in with_earlier([], Settings(), kept)] == ["S1-F1"]


def test_other_settings_are_left_out(kept: Path) -> None:
    run_all(find(["S3-F2"]), Settings(), kept, seeds=1)
    assert [one.entry.id for one in with_earlier([], Settings(), kept)] == ["S1-F1", "S3-F1", "S3-F2"]
    assert with_earlier([], Settings(scale="paper"), kept) == []
    assert with_earlier([], Settings(device="cuda"), kept) == []
    others = with_earlier([], Settings(data="mnist"), kept)
    assert [one.entry.id for one in others] == ["S1-F1", "S3-F1"], "these take no data"

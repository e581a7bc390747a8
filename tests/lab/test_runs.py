"""Runs: every file is written, finished seeds are kept, other settings are not, one failure stops nothing else."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import orthofast
from orthofast.errors import InputError
from orthofast.lab import command, drawing, nets, runs
from orthofast.lab.experiment import Absent, Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.page import write_summary
from orthofast.lab.registry import ORDER, REGISTRY, RUNNABLE, find
from orthofast.lab.verdict import FAILED, NOT_RUN, REPRODUCED, Verdict, below, judge

ROOT = Path(__file__).parents[2]
CALLS: list[int] = []


def measure(settings: Settings) -> Raw:
    CALLS.append(settings.seed)
    drawn = torch.rand(3, dtype=torch.float64)
    return {"x": [1, 2, 3], "y": drawn, "nan": float("nan"), "seed": settings.seed}


def fail(settings: Settings) -> Raw:
    raise ValueError("no such thing")


def verdict(raws: Sequence[Raw]) -> Verdict:
    return judge([below("mean", [sum(raw["y"]) / 3 for raw in raws], 1.0, 0.5)], "a note")


def figure(raws: Sequence[Raw]) -> Figure:
    curve = Series("drawn", raws[0]["x"], [raw["y"] for raw in raws])
    bars = Series("drawn", ["a", "b", "c"], [raw["y"] for raw in raws])
    return Figure([Panel("x", "y", [curve], levels=[("half", 0.5)]), Panel("x", "y", [bars], kind="bars")], "Caption.")


TINY = Experiment("S1-F1", "tiny", "It is below 1.", measure, verdict, figure)
GOOD_FILES = {"manifest.json", "raw.json", "raw.csv", "verdict.json", "figure.png", "figure.svg", "figure-dark.svg"}


@pytest.fixture(autouse=True)
def _forget() -> None:
    CALLS.clear()


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    absent = Absent("S2-T1", "a table", "A claim.", "needs <more>", {"a": "1 ± 2"})
    found = runs.run_all([TINY, absent], Settings(), tmp_path, seeds=2)
    assert [one.verdict.status for one in found] == [REPRODUCED, NOT_RUN]
    folder = tmp_path / "S1-F1"
    assert {file.name for file in folder.iterdir()} == GOOD_FILES | {"seed-0.json", "seed-1.json"}
    raw = json.loads((folder / "raw.json").read_text())
    assert raw["1"]["seed"] == 1
    assert raw["0"]["nan"] is None
    assert raw["0"]["y"] != raw["1"]["y"]
    lines = (folder / "raw.csv").read_text().splitlines()
    assert lines[0] == "seed,name,value"
    assert f"0,y.1,{raw['0']['y'][1]}" in lines
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seeds"] == [0, 1]
    assert manifest["settings"]["data"] == "digits"
    assert {"torch", "numpy", "python", "orthofast"} <= manifest["versions"].keys()
    assert manifest["commit"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "verdict.json").read_text())["status"] == REPRODUCED
    write_summary(found, Settings(), tmp_path)
    kept = json.loads((tmp_path / "verdicts.json").read_text())
    assert kept["S1-F1"]["verdict"] == REPRODUCED
    assert kept["S1-F1"]["measured"]["mean"] == pytest.approx(sum(raw["0"]["y"] + raw["1"]["y"]) / 6)
    assert kept["S1-F1"]["published"] == {"mean": 0.5}
    assert (kept["S2-T1"]["verdict"], kept["S2-T1"]["published"]) == (NOT_RUN, {"a": "1 ± 2"})
    documented = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "lab.md").read_text(encoding="utf-8"), re.MULTILINE)
    fields = [name.strip("`") for row in documented for name in row.split(", ") if not name.startswith("`--")]
    assert fields == list(kept["S1-F1"]) == list(kept["S2-T1"])
    assert (kept["S2-T1"]["data"], kept["S2-T1"]["scale"], kept["S2-T1"]["seeds"]) == (None, None, 0)
    assert (kept["S1-F1"]["holds"], kept["S2-T1"]["holds"]) == ({"mean": True}, {})
    page = (tmp_path / "index.html").read_text()
    assert "needs &lt;more&gt;" in page
    assert page.count("<svg ") == 1
    assert not re.search(r"(src|href)=\"(https?:|//)", page)


def test_finished_seeds_are_kept_and_only_those_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "pictures", lambda *drawn: {})
    first = runs.run_all([TINY], Settings(), tmp_path, seeds=2)
    raw = (tmp_path / "S1-F1" / "raw.json").read_text()
    again = runs.run_all([TINY], Settings(), tmp_path, seeds=2)
    assert CALLS == [0, 1]
    assert again[0].verdict == first[0].verdict
    assert (tmp_path / "S1-F1" / "raw.json").read_text() == raw
    runs.run_all([TINY], Settings(), tmp_path, seeds=3)
    assert CALLS == [0, 1, 2]
    runs.run_all([TINY], Settings(data="mnist"), tmp_path, seeds=1)
    assert CALLS == [0, 1, 2, 0]
    runs.run_all([TINY], Settings(data="mnist"), tmp_path, seeds=1, fresh=True)
    assert CALLS == [0, 1, 2, 0, 0]
    (tmp_path / "S1-F1" / "seed-0.json").write_text("{ cut off")
    runs.run_all([TINY], Settings(data="mnist"), tmp_path, seeds=1)
    assert CALLS == [0, 1, 2, 0, 0, 0]
    whole = json.loads((tmp_path / "S1-F1" / "seed-0.json").read_text())
    for part in ("raw", "settings", "seconds"):
        lacking = {key: value for key, value in whole.items() if key != part}
        (tmp_path / "S1-F1" / "seed-0.json").write_text(json.dumps(lacking))
        assert runs.run_all([TINY], Settings(data="mnist"), tmp_path, seeds=1)[0].verdict.status == REPRODUCED
    assert len(CALLS) == 9


def test_a_measured_number_repeats_and_the_caller_keeps_its_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = runs.run_all([TINY], Settings(seed=7), tmp_path / "a", seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    other = runs.run_all([TINY], Settings(seed=7), tmp_path / "b", seeds=1)
    assert one[0].verdict == other[0].verdict
    assert CALLS == [7, 7]


def test_one_failure_is_told_and_stops_nothing_else(tmp_path: Path) -> None:
    broken = replace(TINY, id="S1-F2a", run=fail)
    misjudged = replace(TINY, id="S1-F2b", verdict=lambda raws: raws[9])  # type: ignore[arg-type, return-value]
    elsewhere = replace(TINY, id="S1-F3", needs=("mnist",))
    found = runs.run_all([broken, misjudged, elsewhere, TINY], Settings(), tmp_path, seeds=1)
    assert [one.verdict.status for one in found] == [FAILED, FAILED, NOT_RUN, REPRODUCED]
    assert found[0].verdict.note == "ValueError: no such thing"
    assert found[2].verdict.note == "runs on mnist, not on digits"
    write_summary(found, Settings(), tmp_path)
    assert "no such thing" in (tmp_path / "index.html").read_text()


def test_an_experiment_that_fails_later_shows_no_older_figure(tmp_path: Path) -> None:
    runs.run_all([TINY], Settings(), tmp_path, seeds=1)
    found = runs.run_all([replace(TINY, run=fail)], Settings(seed=3), tmp_path, seeds=1)
    assert found[0].verdict.status == FAILED
    assert not list((tmp_path / "S1-F1").glob("figure*"))
    assert json.loads((tmp_path / "S1-F1" / "verdict.json").read_text())["status"] == FAILED


def test_numbers_do_not_depend_on_processes(tmp_path: Path) -> None:
    entries = find(["S1-F1"])
    apart = runs.run_all(entries, Settings(), tmp_path / "apart", seeds=1, jobs=2)
    here = runs.run_all(entries, Settings(), tmp_path / "here", seeds=1, jobs=1)
    assert [one.verdict for one in apart] == [one.verdict for one in here]
    assert [one.verdict.status for one in here] == [REPRODUCED]
    raws = [(tmp_path / place / "S1-F1" / "raw.json").read_text() for place in ("apart", "here")]
    assert raws[0] == raws[1]


@pytest.mark.parametrize(("arguments", "said"), [({"seeds": 0}, "seeds needs"), ({"jobs": True}, "jobs needs")])
def test_arguments_that_cannot_be_used(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        runs.run_all([TINY], Settings(), tmp_path, **arguments)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="scale needs one of small, paper"):
        Settings(scale="large")
    with pytest.raises(InputError, match="data needs one of digits"):
        Settings(data="fashion")


def test_every_table_and_figure_of_the_papers_is_listed() -> None:
    listed = {
        "S0": "T1 T2 T3 T4 T5 F1 F2 A1 A2 A3 A4 M1 M2 M3",
        "S1": "F1 F2a F2b F3 T1 F4a F4b F5 F6 F6b F7 X1 X2 X3",
        "S2": "F1 F2 F3 F4 F5 F6 F7 F8 T1 T1b T2 X1 X2 X3",
        "S3": "T1 F1 F2 T2",
    }
    assert {f"{paper}-{key}" for paper, keys in listed.items() for key in keys.split()} <= set(REGISTRY)
    assert list(REGISTRY) == list(ORDER)
    assert len(set(ORDER)) == len(ORDER)
    for key, entry in REGISTRY.items():
        assert entry.id == key
        assert entry.title
        assert entry.claim.endswith((".", "?"))
        assert isinstance(entry, Experiment) or entry.reason
    assert [one.id for one in find(["s3"])] == ["S3-T1", "S3-F1", "S3-F2", "S3-T2"]
    with pytest.raises(InputError, match="'S7' is no experiment"):
        find(["S7"])


def test_the_lab_uses_public_names_only() -> None:
    rooms = {name: getattr(orthofast, name) for name in ("metrics", "training", "scan", "kernels")}
    for file in sorted((ROOT / "orthofast" / "lab").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("orthofast"):
                continue
            room = str(node.module).removeprefix("orthofast").removeprefix(".")
            if file.name == "command.py" and room.startswith("commands."):
                continue  # the terminal and the exit codes of the other commands
            if room == "lab" or room.startswith("lab.") or room == "errors":
                continue
            public = set(orthofast.__all__) | {"lab"} if room == "" else set(getattr(rooms.get(room), "__all__", ()))
            assert {alias.name for alias in node.names} <= public, f"{file.name}: {ast.unparse(node)}"


def test_the_command_lists_runs_and_refuses(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "orthofast", "lab", "S3-F1", "S1-X2", "--out", str(tmp_path / "out"), "--jobs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"S3-F1\s+reproduced", ran.stdout)
    assert re.search(r"S1-X2\s+not run here", ran.stdout)
    assert str(tmp_path / "out" / "index.html") in ran.stdout
    listed = CliRunner().invoke(command.app, ["--list"])
    assert all(re.search(rf"^{key}\s", listed.stdout, re.MULTILINE) for key in REGISTRY)
    wrong = CliRunner().invoke(command.app, ["S9"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("orthofast: 'S9' is no experiment")


def test_a_kept_seed_minds_the_sources_its_numbers_come_from() -> None:
    networks = Path(nets.__file__).read_text(encoding="utf-8")
    charts = Path(drawing.__file__).read_text(encoding="utf-8")
    experiment = REGISTRY["S0-T1"]
    assert isinstance(experiment, Experiment)
    found = runs._sources(experiment.run.__module__)
    assert networks in found
    assert charts not in found
    assert Path(sys.modules[experiment.run.__module__].__file__ or "").read_text(encoding="utf-8") in found


def _imported(name: str) -> set[str]:
    """Modules of the lab that one names in its imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(sys.modules[name].__file__ or "").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "orthofast.lab":
            found |= {f"orthofast.lab.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthofast.lab."):
            found.add(str(node.module))
    return found


def test_sources_are_all_that_is_imported_but_what_only_shows() -> None:
    shows = {f"orthofast.lab.{name}" for name in ("axes", "svg", "earlier", "absent")} | runs.SHOWING
    reached: set[str] = set()
    for name in {one.run.__module__ for one in RUNNABLE.values()}:
        found, coming = set(), {name}
        while coming:
            found |= coming
            coming = {one for part in coming for one in _imported(part)} - runs.SHOWING - found
        texts = {Path(sys.modules[one].__file__ or "").read_text(encoding="utf-8") for one in found}
        assert set(runs._sources(name)) == texts, name
        reached |= found
    assert not reached & shows
    # what shows is the declaration of figures alone, which holds no number
    assert {one for part in reached for one in _imported(part)} & shows == {"orthofast.lab.figures"}

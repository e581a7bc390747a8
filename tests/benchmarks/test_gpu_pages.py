"""Goals for a GPU: judged from made-up samples of known ratios, rendered, "not measured" where nothing was."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_report, render
from benchmarks.gpu_cases import EMBEDDING, FILTERS, LARGE
from benchmarks.gpu_measured import GPU_SCHEMA_VERSION, SECTIONS, GpuResults
from benchmarks.gpu_tables import full, short
from benchmarks.gpu_targets import GPU_TARGETS
from benchmarks.targets import judge, judge_all

GOALS = {target.text: target for target in GPU_TARGETS}
MM = next(text for text in GOALS if text.startswith("large bfloat16"))


def row(shape, side, contestant, device_ms, *, group="ours", dtype="bfloat16", host_us=20.0, extra_mib=1.0):
    rows, columns = (int(part) for part in shape.split("x")[-2:]) if shape[0].isdigit() else (0, 0)
    n, d = (rows, columns) if side == "rows" else (columns, rows)
    return {
        "shape": shape, "side": side, "n": n, "d": d, "dtype": dtype, "contestant": contestant, "group": group,
        "status": "timed", "reason": "", "device_ms": [device_ms] * 3, "host_us": [host_us] * 3, "telemetry": [],
        "extra_mib": extra_mib, "error": 1e-8, "tolerance": 1e-6, "value": 0.01, "expected": 0.01,
    }  # fmt: skip


def results(ours_ms=0.5, backend="first", **sections):
    measured = []
    for rows, columns in LARGE:
        for side in ("rows", "cols"):
            measured += [
                row(f"{rows}x{columns}", side, backend, ours_ms),
                row(f"{rows}x{columns}", side, "mm", 1.0, group="product"),
            ]
    data = {
        "schema_version": GPU_SCHEMA_VERSION, "dry": False, "passed": True, "date": "2026-01-01T00:00:00Z",
        "commit": "f" * 40, "dirty": False, "build": "pip", "excluded": {},
        "machine": {
            "model": "Some GPU", "driver": "1.0", "multiprocessors": 132, "memory_gib": 139.0, "l2_mib": 60.0,
            "power_limit_w": "700",
        },
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "numba": None},
        "backends": ["first", "second"],
        **{section: [] for section in SECTIONS},
        "checks": [{"test": "t", "outcome": "passed", "reason": "", "wall_s": 0.1}],
        "measurements": measured,
    }  # fmt: skip
    return {**data, **sections}


def worst(data, text):
    verdict = judge(GOALS[text], GpuResults(data))
    return verdict.word, verdict.worst


@pytest.mark.parametrize(("ours_ms", "word"), [(0.5, "met"), (0.549, "met"), (0.55, "not met"), (0.9, "not met")])
def test_the_goal_against_the_bare_product(ours_ms, word):
    assert worst(results(ours_ms), MM) == (word, pytest.approx(ours_ms))


def test_one_place_that_was_not_measured_leaves_the_goal_open():
    data = results()
    data["measurements"] = data["measurements"][2:]
    assert worst(data, MM)[0] == "not measured"


def test_the_default_backend_is_judged_not_the_fastest():
    data = results(0.9)
    data["measurements"] += [row(f"{r}x{c}", side, "second", 0.3) for r, c in LARGE for side in ("rows", "cols")]
    assert worst(data, MM)[0] == "not met"
    data["defaults"] = [
        {"place": [f"{r}x{c}", "bfloat16", side], "backend": "second"} for r, c in LARGE for side in ("rows", "cols")
    ]
    assert worst(data, MM)[0] == "met"


def test_a_default_backend_that_failed_the_gate_is_not_replaced_by_another():
    data = results()
    for measured in data["measurements"]:
        if measured["contestant"] == "first":
            measured.update(status="failed", device_ms=[])
    data["measurements"] += [row(f"{r}x{c}", side, "second", 0.3) for r, c in LARGE for side in ("rows", "cols")]
    data["defaults"] = [
        {"place": [f"{r}x{c}", "bfloat16", side], "backend": "first"} for r, c in LARGE for side in ("rows", "cols")
    ]
    assert worst(data, MM) == ("not measured", None)


def test_every_goal_can_be_met_and_missed():
    vocabulary, filters = "x".join(map(str, EMBEDDING)), "x".join(map(str, FILTERS))
    for good in (True, False):
        data = results(
            0.5 if good else 0.6,
            model=[row("BERT-base body", "rows+cols", "first", 0.5 if good else 0.7, host_us=200 if good else 400)],
            # 737 MB at 4000 GB/s are 0.184 ms
            ceilings=[{"what": "copy", "bytes": 1, "gb_per_s": [4000.0]}],
            filters=[row(filters, "rows", "first", 0.25 if good else 0.3)],
            cold=[
                {
                    "shape": "4096x4096", "side": side, "dtype": dtype, "backend": "default", "status": "timed",
                    "first_call_s": [2.0 if good else 4.0],
                }
                for side, dtype in (("rows", "bfloat16"), ("cols", "bfloat16"), ("rows", "float32"))
            ],
            gradient=[
                row("8192x8192", "rows", "autograd", 10.0, group="rival"),
                row("8192x8192", "rows", "first", 1.7),
                row("8192x8192", "rows", "first+gradient", 5.0 if good else 6.5),
            ],
        )  # fmt: skip
        ours = 0.5 if good else 0.6
        data["measurements"] += [
            row("8192x8192", "rows", "naive", 2.0 if good else 1.0, group="rival"),
            row("8192x8192", "rows", "naive_float32", 8.0 if good else 7.0, group="rival"),
            row("8192x8192", "rows", "first", ours, dtype="float32"),
            row("8192x8192", "rows", "cast_mm", 1.0, group="product", dtype="float32"),
            *(row("4096x4096", side, "first", 0.6 if good else 0.7) for side in ("rows", "cols")),
            *(row("4096x4096", side, "mm", 1.0, group="product") for side in ("rows", "cols")),
            row(vocabulary, "rows", "first", ours * (128256 / 28672) ** 2 / (1.0 if good else 0.9),
                extra_mib=10.0 if good else 70.0),
        ]  # fmt: skip
        words = {v.target.text: v.word for v in judge_all(GpuResults(data), GPU_TARGETS)}
        assert set(words.values()) == {"met" if good else "not met"}, words
        assert len(words) == 13


def test_without_a_device_every_goal_is_listed_as_not_measured():
    text = short([])
    assert text.count("| not measured |") == len(GPU_TARGETS)
    for target in GPU_TARGETS:
        assert target.text in text
    assert "not measured" in full([])
    assert not any(verdict.worst for verdict in judge_all(GpuResults({}), GPU_TARGETS))


def test_pages_show_the_ratios_of_a_device():
    found = [GpuResults(results(0.5, trouble=[]))]
    text = short(found)
    assert "| Some GPU |" in text
    assert f"| {MM} | under 0.55 | 0.5 |" in text
    page = full(found)
    assert "8192x8192 bfloat16 rows: 0.5" in page
    assert "1 passed, 0 skipped" in page
    assert "`mm`" in page


def test_a_rehearsal_stops_the_rendering(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(f"{render.BEGIN}\n{render.END}\n")
    folder = tmp_path / "results" / "some-gpu"
    folder.mkdir(parents=True)
    (folder / "gpu.json").write_text(json.dumps({**results(), "dry": True}))
    with pytest.raises(ValueError, match="dry run"):
        render.render(tmp_path, tmp_path / "results", check=False)
    (folder / "gpu.json").write_text(json.dumps(results()))
    assert render.render(tmp_path, tmp_path / "results", check=False) == ["README.md", "docs/benchmarks.md"]
    assert "Some GPU" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("section", "entry"),
    [
        ("checks", {"test": "t", "outcome": "failed", "reason": "wrong"}),
        ("check_runs", {"exit_code": 2}),
        ("measurements", {**row("8192x8192", "rows", "first", 1.0), "status": "failed", "reason": "wrong"}),
        ("trouble", {"block": "speed", "culprit": "first", "reason": "hung"}),
    ],
)
def test_whatever_of_ours_fails_fails_the_run(section, entry):
    data = results()
    assert gpu_report.failures(data) == []
    data[section] = [entry]
    assert len(gpu_report.failures(data)) == 1


def test_a_rival_may_fail():
    data = results()
    data["measurements"] = [{**row("8192x8192", "rows", "naive", 1.0, group="rival"), "status": "failed"}]
    assert gpu_report.failures(data) == []

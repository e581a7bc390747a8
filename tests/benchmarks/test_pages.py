"""Pages are what the results say: rendered between markers, checked, and refused when a gate failed."""

from __future__ import annotations

import json

import pytest

from benchmarks import render
from benchmarks.measured import Results, dump, load
from benchmarks.tables import ceilings, full, short, table
from tests.benchmarks.test_targets import timed

PAGE = f"# Title\n\n{render.BEGIN}\nold\n{render.END}\n\nafter\n"


def results_data(ours_s=0.5):
    rows = [
        timed("4096x4096", 1, "naive", [2.0, 2.0, 2.2]),
        timed("4096x4096", 1, "naive_medium", [1.5, 1.5, 1.5]),
        timed("4096x4096", 1, "mm_medium", [1.25], group="product", error=1e-7),
        timed("4096x4096", 1, "native_cpu", [ours_s] * 3, group="ours"),
        {**timed("4096x4096", 1, "keops", [1.0]), "status": "left out", "reason": "too slow", "wall_s": []},
    ]
    return {
        "schema_version": 1, "passed": True, "date": "2026-01-01T00:00:00Z", "commit": "f" * 40, "dirty": False,
        "machine": {
            "model": "Some CPU", "name": "Zen 4", "cores": 2, "flags": ["avx2"], "caches": {"L1": "32K"},
            "memory_gib": 8.0, "virtual": True,
        },
        "versions": {"torch": "2.13.0", "pykeops": None},
        "environment": {"unset": {"OPENBLAS_CORETYPE": "Haswell"}, "set": {}},
        "load_before": 0.1,
        "ceilings": {"fma_peak_gflops": {"float32": 117.0, "bfloat16": 230.0}},
        "measurements": rows,
        "memory": [
            {
                "shape": "4096x4096", "dtype": "float32", "contestant": name, "status": "measured", "method": "VmHWM",
                "extra_mib": mib, "input_mib": 64.0,
            }
            for name, mib in (("naive", 195.4), ("native_cpu", 4.25))
        ],
        "many": [], "small_calls": [],
        "import": {"torch_ms": [1000.0], "both_ms": [1030.0], "added_ms": [28.0], "also_loaded": []},
    }  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(PAGE)
    results = tmp_path / "results" / "some-cpu-2c"
    results.mkdir(parents=True)
    (results / "cpu.json").write_text(dump(results_data()))
    return tmp_path


def test_ratios_and_memory_of_the_short_table_come_from_the_samples():
    text = short(Results(results_data()))
    assert "| 4096x4096 float32 | 1 | 4.00x | 3.00x | – | 195 / 4.2 |" in text
    assert "| 4096x4096 float32 | 1 | 2.00x | 1.50x | – | 195 / 4.2 |" in short(Results(results_data(1.0)))


def test_the_full_page_names_reasons_verdicts_and_what_was_unset():
    text = full(Results(results_data()))
    assert "`keops`: too slow" in text
    assert "OPENBLAS_CORETYPE=Haswell" in text
    assert "not measured" in text
    assert "4096x4096 float32: 4 / –; 8192x8192 float32: – / –" in text
    assert "30 ms (process pairs), 28 ms (timed by itself)" in text


def test_the_explanation_of_the_ceiling_takes_its_numbers_from_the_results():
    data = results_data()
    data["measurements"][0]["wall_s"] = [4096**3 / 40e9]
    text = ceilings(Results(data))
    assert "reaches 40 useful GFLOP/s" in text
    assert f"{117 / 40:.2f} times" in text
    assert "Zen 5" in text
    data["ceilings"]["fma_peak_gflops"]["float32"] = 240.0
    assert "Zen 5" not in ceilings(Results(data))
    data["ceilings"]["fma_peak_gflops"] = {}
    assert "multiplies and adds at most" not in ceilings(Results(data))


def test_rendering_writes_once_and_check_notices_any_difference(tree):
    assert render.render(tree, tree / "results", check=True) == ["README.md", "docs/benchmarks.md"]
    assert (tree / "README.md").read_text() == PAGE
    assert render.render(tree, tree / "results", check=False) == ["README.md", "docs/benchmarks.md"]
    assert render.render(tree, tree / "results", check=True) == []
    text = (tree / "README.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nafter\n")
    (tree / "README.md").write_text(text.replace("4.00x", "5.00x"))
    assert render.render(tree, tree / "results", check=True) == ["README.md"]


def test_new_results_make_the_pages_stale(tree):
    render.render(tree, tree / "results", check=False)
    (tree / "results" / "some-cpu-2c" / "cpu.json").write_text(dump(results_data(0.4)))
    assert render.render(tree, tree / "results", check=True) == ["README.md", "docs/benchmarks.md"]


@pytest.mark.parametrize("text", ["no markers", PAGE + PAGE, f"{render.END}\n{render.BEGIN}"])
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="needs one"):
        render.between(text, "body", "README.md")


@pytest.mark.parametrize(("change", "said"), [({"passed": False}, "gate failed"), ({"schema_version": 0}, "schema")])
def test_results_that_cannot_be_shown_are_refused(tmp_path, change, said):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({**results_data(), **change}))
    with pytest.raises(ValueError, match=said):
        load(path)


def test_results_survive_being_written_one_measurement_a_line():
    data = results_data()
    text = dump(data)
    assert json.loads(text) == json.loads(json.dumps(data))
    assert sum("native_cpu" in line for line in text.splitlines()) == 2  # its times, its memory


def test_tables_are_markdown():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"

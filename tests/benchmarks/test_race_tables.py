"""Tables of the smaller benchmarks say what the samples say, and what was promised is what the benchmarks promise."""

from __future__ import annotations

import json

import pytest

from benchmarks import conditioning, monitor, race_tables, ring, scan
from benchmarks.measured import dump
from benchmarks.render import render
from tests.benchmarks.test_pages import tree  # noqa: F401
from tests.benchmarks.test_scan_benchmark import results

FACTS = {
    "commit": "a" * 40, "dirty": True, "date": "2026-01-01", "machine": {"model": "Some CPU", "name": None, "cores": 2},
    "versions": {"torch": "2.13.0", "modeldelta": "0.4.4"},
}  # fmt: skip


def scan_results():
    data = FACTS | results()
    data["ratio"][0] |= {"bytes": 5e8, "matrices": 9, "threads": 2}
    for row in data["memory"]:
        row |= {"layers": 3, "largest_mib": 60.0}
    data["open"][1] |= {"rival": "gguf.GGUFReader", "rival_s": [21.0]}
    timed = {"status": "timed", "reason": "", "computes": "x", "cpu_s": [1.0], "peak_mib": [300.0]}
    data["peers"] = [
        {**timed, "tool": "orthofast diff", "task": "diff", "wall_s": [2.0, 4.0, 9.0]},
        {**timed, "tool": "modeldelta", "task": "diff", "wall_s": [10.0]},
        {**timed, "tool": "weightwatcher", "task": "scan", "wall_s": [], "status": "failed", "reason": "no matplotlib"},
    ]
    data["peers_model"] = "llama-30m"
    data["verdicts"] = scan.verdicts(data)
    return data


def test_promises_are_those_of_the_benchmarks():
    assert (race_tables.MONITOR_FRAC, race_tables.MONITOR_EVERY) == (monitor.TARGET_FRAC, monitor.EVERY)
    assert race_tables.RING_RATIO == ring.TARGET
    assert race_tables.CONDITIONING == conditioning.TARGETS
    assert race_tables.RIDE_FRAC == conditioning.RIDE_TARGET
    assert race_tables.CONDITIONING_MIB == conditioning.MEMORY_TARGET_MIB


def test_a_scan_is_told_part_by_part_with_its_promises_and_what_was_not_measured():
    text = race_tables.scan(scan_results())
    assert "| scan of m over its folds alone | 1.1 | 1.09 | met |" in text
    assert "| m | 500 | 9 | 2 | 1.09 | 1.00 | 1.090 | 1.000 |" in text
    assert "| 2.00 | 3 | 9 of each matrix | 360 | 60 |" in text
    assert "gguf.GGUFReader 21.0 s" in text
    assert "| modeldelta 0.4.4 | diff | 10.00 | 2.50x | 1.00 | 300 | x |" in text
    assert "failed: no matplotlib" in text
    assert "On a GPU: not measured (no CUDA device)." in text


def test_a_gpu_run_is_told_by_its_largest_part():
    times = {"read": [2.0], "scan": [2.2]}
    gpu = {
        "status": "measured", "device": "H200", "layers": 20, "bytes": 34.2e9, "page cache": times, "disk": times,
        "copy_s": [1.0], "fold_s": [1.5], "ratio": {"page cache": 1.1, "disk": 1.1}, "host_mib": 900.0,
        "whole_s": {"page cache": 8.8, "disk": 8.8},
    }  # fmt: skip
    assert "| disk | 2.20 | 2.00 | 1.00 | 1.50 | 1.100 | 9 |" in race_tables.scan(FACTS | {"verdicts": [], "gpu": gpu})
    assert [one["verdict"] for one in scan.verdicts({"gpu": gpu})] == ["met"] * 3


def test_the_gradient_is_told_beside_autograd():
    row = {"shape": "8x8", "dtype": "float32", "threads": 1}
    data = {
        "measurements": [
            {**row, "contestant": "autograd", "wall_s": [0.1], "gradient_error": 2e-7},
            {**row, "contestant": "native_cpu", "wall_s": [0.03, 0.02, 0.04], "gradient_error": 3e-7},
        ],
        "memory": [{**row, "contestant": "native_cpu", "extra_mib": 7.0}],
        "verdicts": ["8x8: met"],
    }
    text = race_tables.gradient(data)
    assert "| 8x8 float32 | 1 | `native_cpu` | 30 | 0.300 | 7.0 | 3e-07 |" in text
    assert "- 8x8: met" in text


def test_a_monitor_that_changes_weights_or_takes_too_much_is_told_so():
    found = {"same_weights": False, "overhead_frac": [0.01, 0.03, 0.02]}
    own = {"due_over_step": 2.0, "idle_over_step": 0.0, "idle_ns": 70.0}
    text = race_tables.monitor(
        {"models": [{"model": "m", "step_cpu_ms": 9.0, "contestants": {"M": found}, "own": own}]}
    )
    assert "| m | M | +2.00 % | +1.40 – +2.60 | NO |" in text
    assert "2.000 % (promised at most 1 %: not met)" in text


def test_the_ring_is_judged_where_it_was_promised():
    row = {"n": 4, "d": 2, "ranks": 2, "wall_s": {"ring": [0.5], "gather": [1.0], "dtensor": [2.0]}}
    rows = [{**row, "gradient": grad, "cpu_s": row["wall_s"]} for grad in (False, True)]
    text = race_tables.ring({"rows": rows})
    assert "| 4x2 | value | 2 | 500.0 | 0.50 (0.50) | 0.25 (0.25) | met |" in text
    assert "| 4x2 | value and gradient | 2 | 500.0 | 0.50 (0.50) | 0.25 (0.25) |  |" in text


def test_spectra_are_told_with_our_share():
    rows = [{"race": "r", "contestant": name, "wall_s": [s]} for name, s in (("ours", 0.2), ("sort", 0.8))]
    data = {"measurements": rows, "memory": [{"race": "r", "contestant": "sort", "extra_mib": 64.0}], "verdicts": []}
    assert "| r | sort | 800 | 0.250 | 64.0 |" in race_tables.spectra(data)


def test_conditioning_is_told_with_riding_and_memory():
    data = {
        "passes": [
            {"net": "perceptron", "labels": "empirical", "off": {"orthofast float32": 2e-7}, "plain_cpu_ms": 5.0,
             "ratios": {"orthofast float32": [1.5, 1.2, 1.25], "other": [9.0]}},
        ],
        "rides": [{"net": "perceptron", "step_cpu_ms": 8.0, "more_frac": {"float32": [0.5], "float64": [0.9]}}],
        "memory_mib": {"orthofast float32": 10.0, "other": 99.0},
    }  # fmt: skip
    text = race_tables.conditioning(data)
    assert "| perceptron | empirical | orthofast float32 | 1.25 | 1.22 – 1.40 | 2e-07 | at most 1.3: met |" in text
    assert "float32 +0.50, float64 +0.90 (promised at most 0.4: not met)" in text
    assert "orthofast float32: peak memory 10.0 MiB beyond plain passes (promised at most 16: met)." in text
    assert "other: peak memory 99.0 MiB beyond plain passes." in text


def test_the_manual_has_a_section_for_each_file_and_the_readme_none(tree):  # noqa: F811
    results_folder = tree / "results"
    (results_folder / "some-cpu-2c" / "scan.json").write_text(dump(scan_results()))
    assert render(tree, results_folder, check=False) == ["README.md", "docs/benchmarks.md"]
    text = (tree / "docs" / "benchmarks.md").read_text()
    assert "## Scanning checkpoints: Some CPU, 2 cores\n\nCommit `aaaaaaaaaaaa` with uncommitted changes" in text
    assert text.index("Every contestant") < text.index("Scanning checkpoints") < text.index("## GPU")
    assert "Scanning" not in (tree / "README.md").read_text()
    assert render(tree, results_folder, check=True) == []


def test_a_file_of_another_form_is_named(tree):  # noqa: F811
    (tree / "results" / "some-cpu-2c" / "ring.json").write_text(json.dumps(FACTS))
    with pytest.raises(ValueError, match=r"some-cpu-2c/ring\.json is not what its benchmark writes"):
        render(tree, tree / "results", check=True)

"""Verdicts from made-up samples whose ratios are known: some must be met, some must not."""

from __future__ import annotations

import pytest

from benchmarks.measured import Results
from benchmarks.targets import BIG, TARGETS, THREADS, judge, judge_all


def timed(shape, threads, contestant, wall_s, *, dtype="float32", group="rival", error=1e-9):
    n, d = (int(side) for side in shape.split("x"))
    return {
        "shape": shape, "n": n, "d": d, "dtype": dtype, "threads": threads, "contestant": contestant, "group": group,
        "status": "timed", "reason": "", "wall_s": list(wall_s), "cpu_s": list(wall_s), "error": error,
    }  # fmt: skip


def target(text, bound):
    return next(t for t in TARGETS if t.text == text and t.bound == bound)


EXACT = target("float32 exact, faster than naive torch", 4.2)
HALF = target("float32 exact, half the time of the best float32 product over ours", 0.85)


def at_big(naive_s, ours_s):
    rows = []
    for shape in BIG:
        for threads in THREADS:
            rows.append(timed(shape, threads, "naive", naive_s))
            rows.append(timed(shape, threads, "native_cpu", ours_s, group="ours"))
    return rows


@pytest.mark.parametrize(
    ("naive_s", "ours_s", "word"),
    [
        ([4.3, 4.3, 4.3], [1.0, 1.0, 1.0], "met"),
        ([4.2], [1.0], "met"),
        ([4.19], [1.0], "not met"),
        ([1.0], [4.2], "not met"),
        # medians, not means: one slow sample of ours changes nothing
        ([4.3, 4.3, 4.3], [1.0, 1.0, 50.0], "met"),
        ([40.0, 4.1, 4.1], [1.0, 1.0, 1.0], "not met"),
    ],
)
def test_a_ratio_is_judged_by_the_medians(naive_s, ours_s, word):
    assert judge(EXACT, Results({"measurements": at_big(naive_s, ours_s)})).word == word


def test_one_place_below_the_bound_is_enough_to_miss_it():
    rows = at_big([5.0], [1.0])
    rows[-1]["wall_s"] = [1.5]
    verdict = judge(EXACT, Results({"measurements": rows}))
    assert verdict.word == "not met"
    assert verdict.worst == pytest.approx(5 / 1.5)


@pytest.mark.parametrize("status", ["left out", "failed"])
def test_a_place_without_a_time_is_never_met(status):
    rows = at_big([5.0], [1.0])
    rows[-1].update(status=status, wall_s=[])
    verdict = judge(EXACT, Results({"measurements": rows}))
    assert verdict.word == "not measured"
    assert judge(EXACT, Results({"measurements": []})).word == "not measured"


def test_memory_must_stay_below_its_bound_everywhere():
    memory = next(t for t in TARGETS if t.text.startswith("float32, native_cpu: extra memory"))

    def results(last):
        rows = [
            {"shape": s, "dtype": "float32", "contestant": "native_cpu", "status": "measured", "extra_mib": 3.0}
            for s, _, _ in memory.places
        ]
        rows[-1]["extra_mib"] = last
        return Results({"memory": rows})

    assert judge(memory, results(63.9)).word == "met"
    assert judge(memory, results(64.0)).word == "not met"
    assert judge(memory, results(64.0)).worst == 64.0


def test_half_of_the_best_product_ignores_products_of_shorter_operands():
    rows = []
    for shape, _, threads in HALF.places:
        rows.append(timed(shape, threads, "mm", [2.0], group="product", error=1e-7))
        rows.append(timed(shape, threads, "mm_medium", [1.0], group="product", error=1e-3))  # bfloat16 inside
        rows.append(timed(shape, threads, "native_cpu", [1.1], group="ours"))
    verdict = judge(HALF, Results({"measurements": rows}))
    assert verdict.word == "met"
    assert verdict.worst == pytest.approx(1.0 / 1.1)
    for row in rows:
        row["error"] = 1e-7
    assert judge(HALF, Results({"measurements": rows})).worst == pytest.approx(0.5 / 1.1)
    assert judge(HALF, Results({"measurements": rows})).word == "not met"


@pytest.mark.parametrize(("ours_error", "word"), [(1e-8, "met"), (1e-7, "not met"), (0.0, "met")])
def test_accuracy_is_compared_with_naive_torch(ours_error, word):
    accuracy = next(t for t in TARGETS if t.text == "bfloat16, error of naive torch over ours")
    rows = []
    for shape, dtype, threads in accuracy.places:
        rows.append(timed(shape, threads, "naive", [1.0], dtype=dtype, error=5e-5))
        rows.append(timed(shape, threads, "native_cpu", [1.0], dtype=dtype, error=ours_error))
    assert judge(accuracy, Results({"measurements": rows})).word == word


@pytest.mark.parametrize(("micros", "word"), [(59.0, "met"), (61.0, "not met")])
def test_the_small_call_is_judged_in_every_dtype_and_thread_count(micros, word):
    small = next(t for t in TARGETS if t.unit == "µs")
    rows = [
        {"dtype": dtype, "threads": threads, "contestant": "native_cpu", "status": "timed", "call_ns": [40_000] * 3}
        for _, dtype, threads in small.places
    ]
    rows[1]["call_ns"] = [micros * 1e3] * 3
    assert judge(small, Results({"small_calls": rows})).word == word


def test_the_import_is_judged_by_the_larger_of_both_ways_to_time_it():
    imported = next(t for t in TARGETS if "import" in t.text)
    noisy = {"torch_ms": [2000.0], "both_ms": [1900.0], "added_ms": [70.0]}
    assert judge(imported, Results({"import": noisy})).word == "not met"
    assert judge(imported, Results({"import": {**noisy, "added_ms": [20.0]}})).word == "met"
    assert judge(imported, Results({"import": {**noisy, "both_ms": [2090.0]}})).word == "not met"


def test_the_limit_is_peak_arithmetic_over_the_rivals_useful_rate():
    flops = 4096**3
    data = {
        "ceilings": {"fma_peak_gflops": {"float32": 100.0}},
        "measurements": [timed("4096x4096", 2, "naive", [flops / 50e9])],
    }
    assert Results(data).bound("4096x4096", "float32", 2, "naive", "float32") == pytest.approx(4.0)
    assert Results(data).bound("4096x4096", "float32", 2, "naive", "bfloat16") is None


def test_nothing_measured_is_nothing_met():
    assert {verdict.word for verdict in judge_all(Results({}))} == {"not measured"}

"""What a user meets besides one big fold: a small call, all matrices of a model in one call, and the import."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import DTYPES, bert_body
from benchmarks.peers import backend_refuses, medium_precision, naive
from benchmarks.timing import sample, turns
from orthofast.kernels import dispatch, gram_stats, gram_stats_many

ROOT = Path(__file__).resolve().parent.parent
SMALL_BLOCKS, SMALL_CALLS, SMALL_WARM = 20, 25, 50
IMPORT_PAIRS = 9


def small_call(threads: int, dtype: str, blocks: int = SMALL_BLOCKS, n: int = 64, d: int = 576) -> list[dict[str, Any]]:
    """Single calls on a small matrix, each timed on its own from Python, in turns; nanoseconds of every call."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    truth = gate.expected_pii(vectors)
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {"naive": lambda: naive(vectors)}
    for name in dispatch.NAMES:
        row = found[name] = _row(name, f"{n}x{d}", dtype, threads)
        reason = backend_refuses(name, vectors)
        if reason is not None:
            row.update(status="left out", reason=reason)
            continue
        record = gram_stats(vectors, backend=name)
        _judge(
            row,
            float(record.abs_sum.sum() / record.pairs.sum()) if record.abs_sum is not None else float("nan"),
            truth,
            n,
        )
        if row["status"] == "timed":
            calls[name] = _bound(vectors, name)
    found["naive"] = _row("naive", f"{n}x{d}", dtype, threads)
    for call in calls.values():
        for _ in range(SMALL_WARM):
            call()
    for number in range(blocks):
        for name in turns(list(calls), number):
            call, taken = calls[name], found[name]["call_ns"]
            for _ in range(SMALL_CALLS):
                start = time.perf_counter_ns()
                call()
                taken.append(time.perf_counter_ns() - start)
    torch.set_num_threads(before)
    return list(found.values())


def _bound(vectors: Tensor, name: str) -> Callable[[], object]:
    return lambda: gram_stats(vectors, backend=name)


def _row(name: str, shape: str, dtype: str, threads: int) -> dict[str, Any]:
    return {
        "shape": shape, "dtype": dtype, "threads": threads, "contestant": name,
        "status": "timed", "reason": "", "call_ns": [],
    }  # fmt: skip


def _judge(row: dict[str, Any], value: float, truth: float, n: int) -> None:
    row["error"] = gate.relative_error(value, truth)
    limit = gate.tolerance(n, exact=True)
    if not row["error"] <= limit:
        row.update(status="failed", reason=f"relative error {row['error']:.2g} is above the gate's {limit:.2g}")


def many_matrices(threads: int, dtype: str, rounds: int, layers: int | None = None) -> list[dict[str, Any]]:
    """A BERT-base body, rows and columns of every matrix: one call of gram_stats_many beside loops; seconds for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _many(threads, dtype, rounds, layers)
    finally:
        torch.set_num_threads(before)


def _many(threads: int, dtype: str, rounds: int, layers: int | None) -> list[dict[str, Any]]:
    sized = {} if layers is None else {"layers": layers}
    sets = bert_body(dtype, 0, **sized)
    # float64 of everything would cost more than the race: the six matrices of one layer are checked
    checked = 12
    truth = [gate.expected_pii(vectors) for vectors in sets[:checked]]
    found = {"naive loop": _many_row("naive loop", dtype, threads, len(sets))}
    calls: dict[str, Callable[[list[Tensor]], object]] = {"naive loop": lambda xs: [naive(x) for x in xs]}
    if dtype == "float32":
        found["naive_medium loop"] = _many_row("naive_medium loop", dtype, threads, len(sets))
        calls["naive_medium loop"] = _medium_loop
    for name in dispatch.NAMES:
        row = found[name] = _many_row(name, dtype, threads, len(sets))
        reason = next((r for r in (backend_refuses(name, x) for x in sets) if r is not None), None)
        if reason is not None:
            row.update(status="left out", reason=reason)
            continue
        records = gram_stats_many(sets, backend=name)
        values = [float(r.abs_sum / r.pairs) for r in records if r.abs_sum is not None]
        errors = [gate.relative_error(value, true) for value, true in zip(values[:checked], truth, strict=True)]
        row["error"] = max(errors)
        limit = gate.tolerance(min(len(x) for x in sets), exact=True)
        if not row["error"] <= limit or len(values) != len(sets):
            row.update(status="failed", reason=f"relative error {row['error']:.2g} is above the gate's {limit:.2g}")
            continue
        calls[name] = _many_bound(name)
    for number in range(rounds):
        if number:
            sets = bert_body(dtype, number, **sized)
        for name in turns(list(calls), number):
            call = calls[name]
            wall_s, cpu_s, _ = sample(lambda call=call, sets=sets: call(sets), 1)  # type: ignore[misc]
            found[name]["wall_s"].append(wall_s)
            found[name]["cpu_s"].append(cpu_s / threads)
    return list(found.values())


def _medium_loop(sets: list[Tensor]) -> object:
    with medium_precision():
        return [naive(x) for x in sets]


def _many_bound(name: str) -> Callable[[list[Tensor]], object]:
    return lambda sets: gram_stats_many(sets, backend=name)


def _many_row(name: str, dtype: str, threads: int, sets: int) -> dict[str, Any]:
    return {
        "model": "BERT-base body, rows and columns", "sets": sets, "dtype": dtype, "threads": threads,
        "contestant": name, "status": "timed", "reason": "", "wall_s": [], "cpu_s": [],
    }  # fmt: skip


_IMPORT = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
{second}
stop = time.perf_counter()
heavy = [name for name in ("triton", "numba", "safetensors", "rich", "typer") if name in set(sys.modules) - before]
print(json.dumps({{"torch_ms": (middle - start) * 1e3, "added_ms": (stop - middle) * 1e3, "heavy": heavy}}))
"""


def import_time(pairs: int = IMPORT_PAIRS) -> dict[str, Any]:
    """`import torch` alone and with `import orthofast`, each in a fresh process, in turns; every time in ms."""
    alone: list[float] = []
    both: list[float] = []
    added: list[float] = []
    heavy: set[str] = set()
    _import_once(True)  # writes bytecode, fills the page cache
    for number in range(pairs):
        for which in turns(["alone", "both"], number):
            taken = _import_once(which == "both")
            if which == "alone":
                alone.append(taken["torch_ms"])
            else:
                both.append(taken["torch_ms"] + taken["added_ms"])
                added.append(taken["added_ms"])
                heavy.update(taken["heavy"])
    return {"torch_ms": alone, "both_ms": both, "added_ms": added, "also_loaded": sorted(heavy)}


def _import_once(both: bool) -> dict[str, Any]:
    code = _IMPORT.format(second="import orthofast" if both else "pass")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    taken: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return taken


def ours_failed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of our backends that did not pass the gate."""
    return [row["contestant"] for row in rows if row["status"] == "failed" and row["contestant"] in dispatch.NAMES]

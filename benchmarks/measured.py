"""A results file, read back: medians, ratios, best products and memory, always from the raw samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.timing import Spread, spread

SCHEMA_VERSION = 1
FLOAT32_ERROR = 1e-5  # a "float32" product with a larger error used shorter operands
PER_LINE = ("measurements", "memory", "many", "small_calls")


@dataclass(frozen=True, slots=True)
class Results:
    """One machine's results; ``data`` is the file as it was written."""

    data: Mapping[str, Any]
    slug: str = ""

    def rows(self, **facts: object) -> Iterator[Mapping[str, Any]]:
        """Measurements whose fields equal the facts given."""
        for row in self.data.get("measurements", ()):
            if all(row.get(key) == value for key, value in facts.items()):
                yield row

    def row(self, shape: str, dtype: str, threads: int, contestant: str) -> Mapping[str, Any] | None:
        """The measurement of one contestant, whatever its status."""
        return next(self.rows(shape=shape, dtype=dtype, threads=threads, contestant=contestant), None)

    def wall(self, shape: str, dtype: str, threads: int, contestant: str) -> Spread | None:
        """Wall seconds of a call; None where it was not timed."""
        row = self.row(shape, dtype, threads, contestant)
        return spread(row["wall_s"]) if row is not None and row["status"] == "timed" and row["wall_s"] else None

    def ratio(self, shape: str, dtype: str, threads: int, rival: str, ours: str) -> float | None:
        """How many times faster ``ours`` is: the ratio of the medians."""
        slow, fast = self.wall(shape, dtype, threads, rival), self.wall(shape, dtype, threads, ours)
        return None if slow is None or fast is None else slow.median / fast.median

    def error_ratio(self, shape: str, dtype: str, threads: int, rival: str, ours: str) -> float | None:
        """How many times more accurate ``ours`` is than the rival."""
        theirs, own = (self.row(shape, dtype, threads, name) for name in (rival, ours))
        if theirs is None or own is None or theirs["error"] is None or own["error"] is None:
            return None
        return float(theirs["error"] / max(own["error"], 1e-16))

    def best_product_s(self, shape: str, dtype: str, threads: int) -> tuple[float, str] | None:
        """Median seconds and name of the fastest stored product W W^T that computes in this dtype's precision."""
        found = []
        for row in self.rows(shape=shape, dtype=dtype, threads=threads, group="product", status="timed"):
            honest = dtype != "float32" or (row["error"] is not None and row["error"] < FLOAT32_ERROR)
            if honest and row["wall_s"]:
                found.append((spread(row["wall_s"]).median, str(row["contestant"])))
        return min(found) if found else None

    def product_frac(self, shape: str, dtype: str, threads: int, ours: str) -> float | None:
        """Half the time of the best product over our time; 1 is the limit for a kernel no faster than the library."""
        best, own = self.best_product_s(shape, dtype, threads), self.wall(shape, dtype, threads, ours)
        return None if best is None or own is None else best[0] / 2 / own.median

    def product_rate(self, dtype: str, threads: int) -> tuple[float, str, str] | None:
        """Best GFLOP/s (2 n^2 d) of a stored product in any case; with the product's name and the shape."""
        found = []
        for row in self.rows(dtype=dtype, threads=threads, group="product", status="timed"):
            honest = dtype != "float32" or (row["error"] is not None and row["error"] < FLOAT32_ERROR)
            if honest and row["wall_s"]:
                rate = 2 * row["n"] ** 2 * row["d"] / spread(row["wall_s"]).median / 1e9
                found.append((rate, str(row["contestant"]), str(row["shape"])))
        return max(found) if found else None

    def useful_rate(self, shape: str, dtype: str, threads: int, contestant: str) -> float | None:
        """Useful GFLOP/s (n^2 d) of a contestant."""
        row, wall = self.row(shape, dtype, threads, contestant), self.wall(shape, dtype, threads, contestant)
        return None if row is None or wall is None else float(row["n"] ** 2 * row["d"] / wall.median / 1e9)

    def peak(self, dtype: str) -> float | None:
        """GFLOP/s of a register-only loop of multiply-adds on one core; None where it was not measured."""
        value = (self.data.get("ceilings") or {}).get("fma_peak_gflops", {}).get(dtype)
        return None if value is None else float(value)

    def bound(self, shape: str, dtype: str, threads: int, rival: str, arithmetic: str) -> float | None:
        """The largest ratio to a rival that arithmetic of this dtype allows: peak over the rival's useful rate."""
        peak, rate = self.peak(arithmetic), self.useful_rate(shape, dtype, threads, rival)
        return None if peak is None or rate is None else peak * threads / rate

    def memory_mib(self, shape: str, dtype: str, contestant: str) -> float | None:
        """Peak MiB above the input."""
        for row in self.data.get("memory", ()):
            if (row["shape"], row["dtype"], row["contestant"]) == (shape, dtype, contestant):
                return float(row["extra_mib"]) if row["status"] == "measured" else None
        return None

    def many(self, dtype: str, threads: int, contestant: str) -> Spread | None:
        """Wall seconds for all matrices of the BERT-base body."""
        for row in self.data.get("many", ()):
            if (row["dtype"], row["threads"], row["contestant"]) == (dtype, threads, contestant) and row["wall_s"]:
                return spread(row["wall_s"]) if row["status"] == "timed" else None
        return None

    def small_call_us(self, dtype: str, threads: int, contestant: str) -> Spread | None:
        """Microseconds of one small call from Python."""
        for row in self.data.get("small_calls", ()):
            if (row["dtype"], row["threads"], row["contestant"]) == (dtype, threads, contestant) and row["call_ns"]:
                return spread([ns / 1e3 for ns in row["call_ns"]]) if row["status"] == "timed" else None
        return None

    def import_ms(self) -> tuple[float, float] | None:
        """What `import orthofast` adds: difference of the medians of process pairs, and timed by itself after torch."""
        taken = self.data.get("import")
        if not taken:
            return None
        both, alone = spread(taken["both_ms"]).median, spread(taken["torch_ms"]).median
        return both - alone, spread(taken["added_ms"]).median


def load(path: Path) -> Results:
    """A results file.

    Raises:
        ValueError: if it is of another schema, or of a run whose gate failed.
    """
    data = json.loads(path.read_text())
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name} needs schema_version {SCHEMA_VERSION}, got {data.get('schema_version')!r}; run again"
        )
    if not data.get("passed"):
        raise ValueError(f"{path.name} is of a run whose gate failed; it holds no speed to show")
    return Results(data, path.parent.name)


def load_all(folder: Path = RESULTS) -> list[Results]:
    """The results of every machine, in the order of their folders."""
    return [load(path) for path in sorted(folder.glob("*/cpu.json"))]


def dump(data: Mapping[str, Any], per_line: Sequence[str] = PER_LINE) -> str:
    """JSON with one measurement a line, so that a change of results reads well."""
    parts = []
    for key, value in data.items():
        if key in per_line and value:
            lines = ",\n".join("  " + json.dumps(_rounded(row)) for row in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(_rounded(value))}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Seven significant digits: more than any clock here has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value

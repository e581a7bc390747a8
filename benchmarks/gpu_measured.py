"""A GPU run's results file, read back: medians, ratios and memory, always from the raw samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.race import TIMED
from benchmarks.timing import Spread, spread

GPU_SCHEMA_VERSION = 1
SECTIONS = (
    *("ceilings", "checks", "check_runs", "measurements", "defaults", "model", "filters", "gradient", "cold"),
    *("drift", "left_out", "trouble"),
)


@dataclass(frozen=True, slots=True)
class GpuResults:
    """One device's results; ``data`` is the file as it was written. A place is (shape, dtype, side)."""

    data: Mapping[str, Any]

    def rows(self, section: str, **facts: object) -> Iterator[Mapping[str, Any]]:
        """Rows of a section whose fields equal the facts given."""
        for row in self.data.get(section, ()):
            if all(row.get(key) == value for key, value in facts.items()):
                yield row

    def timed(self, section: str, shape: str, dtype: str, side: str, contestant: str) -> Mapping[str, Any] | None:
        """The row of a contestant that was timed and passed the gate."""
        found = self.rows(section, shape=shape, dtype=dtype, side=side, contestant=contestant, status=TIMED)
        return next((row for row in found if row["device_ms"]), None)

    def device_ms(self, section: str, shape: str, dtype: str, side: str, contestant: str) -> Spread | None:
        """Milliseconds on the device of one call."""
        row = self.timed(section, shape, dtype, side, contestant)
        return None if row is None else spread(row["device_ms"])

    def host_us(self, section: str, shape: str, dtype: str, side: str, contestant: str) -> Spread | None:
        """Microseconds until one Python call returns."""
        row = self.timed(section, shape, dtype, side, contestant)
        return None if row is None or not row["host_us"] else spread(row["host_us"])

    def default(self, section: str, shape: str, dtype: str, side: str) -> str | None:
        """Our backend a plain call is served by: the one recorded, else the first in order that was timed there."""
        for row in self.data.get("defaults", ()):
            if section == "measurements" and list(row["place"]) == [shape, dtype, side]:
                return str(row["backend"])
        for name in self.data.get("backends", ()):
            if self.timed(section, shape, dtype, side, name) is not None:
                return str(name)
        return None

    def over(self, section: str, shape: str, dtype: str, side: str, rival: str, suffix: str = "") -> float | None:
        """Our time (the default backend's) over the rival's."""
        name = self.default(section, shape, dtype, side)
        if name is None:
            return None
        own = self.device_ms(section, shape, dtype, side, name + suffix)
        theirs = self.device_ms(section, shape, dtype, side, rival)
        return None if own is None or theirs is None else own.median / theirs.median

    def rate(self, shape: str, dtype: str, side: str) -> float | None:
        """Useful TFLOP/s (n^2 d) of the default backend."""
        name = self.default("measurements", shape, dtype, side)
        row = None if name is None else self.timed("measurements", shape, dtype, side, name)
        return None if row is None else float(row["n"] ** 2 * row["d"] / spread(row["device_ms"]).median / 1e9)

    def copy_gb_per_s(self) -> float | None:
        """Measured bandwidth of a device-to-device copy, bytes read plus bytes written."""
        row = next(self.rows("ceilings", what="copy"), None)
        return None if row is None or not row["gb_per_s"] else spread(row["gb_per_s"]).median

    def cold_s(self, shape: str, dtype: str, side: str, backend: str = "default") -> float | None:
        """Seconds of the first call of a process whose compilers find nothing cached."""
        row = next(self.rows("cold", shape=shape, side=side, dtype=dtype, backend=backend, status=TIMED), None)
        return None if row is None or not row["first_call_s"] else spread(row["first_call_s"]).median


def load_gpu(path: Path) -> GpuResults:
    """A results file.

    Raises:
        ValueError: if it is of another schema, of a rehearsal, of a run that did not pass, or of one without tests.
    """
    data = json.loads(path.read_text())
    if data.get("schema_version") != GPU_SCHEMA_VERSION:
        found = data.get("schema_version")
        raise ValueError(f"{path.name} needs schema_version {GPU_SCHEMA_VERSION}, got {found!r}; run again")
    if data.get("dry") is not False:
        raise ValueError(f"{path.name} is of a dry run: its numbers mean nothing and are not shown")
    if not data.get("passed"):
        raise ValueError(f"{path.name} is of a run that did not pass; it holds no speed to show")
    if not data.get("checks"):
        raise ValueError(f"{path.name} is of a run without the block check; no speed is shown before correctness")
    return GpuResults(data)


def load_all_gpu(folder: Path = RESULTS) -> list[GpuResults]:
    """The results of every device, in the order of their folders."""
    return [load_gpu(path) for path in sorted(folder.glob("*/gpu.json"))]

"""Markdown tables of a GPU run: every promise with what was measured, or "not measured" where nothing was."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu_measured import GpuResults
from benchmarks.gpu_targets import GPU_TARGETS
from benchmarks.race import TIMED
from benchmarks.tables import table
from benchmarks.targets import Finding, Verdict, judge_all
from benchmarks.timing import spread

NOT_MEASURED = "not measured"
UNIT = {"": "", "x": "x"}
NOBODY = GpuResults({})
RACED = (
    ("measurements", "Single matrices"),
    ("model", "A whole model in one call"),
    ("filters", "Small filters"),
    ("gradient", "Value with gradient"),
    ("drift", "Conformal drift"),
)


def short(found: Sequence[GpuResults]) -> str:
    """The goals for a GPU, a column for each device measured; without one every cell says so."""
    verdicts = [judge_all(results, GPU_TARGETS) for results in found or [NOBODY]]
    names = [device_name(results) for results in found] or ["measured"]
    rows = [
        (target.text, _bound(verdicts[0][place]), *(_worst(each[place]) for each in verdicts))
        for place, target in enumerate(GPU_TARGETS)
    ]
    head = "GPU" if found else "GPU (goals for an H200; no run is recorded yet)"
    return f"{head}:\n\n{table(('what', 'goal', *names), rows)}"


def full(found: Sequence[GpuResults]) -> str:
    """Promises place by place, then every contestant with its spread, for every device."""
    parts = [_device(results) for results in found]
    return "\n\n".join(parts) if parts else f"## GPU\n\n### Targets\n\n{_targets(NOBODY)}"


def device_name(results: GpuResults) -> str:
    """The model of the device."""
    return str(results.data["machine"]["model"])


def _device(results: GpuResults) -> str:
    parts = [f"## {device_name(results)}", _provenance(results), "### Targets", _targets(results)]
    copied = results.copy_gb_per_s()
    if copied is not None:
        parts.append(f"A device-to-device copy moved {copied:.0f} GB/s, read plus written.")
    for section, title in RACED:
        if results.data.get(section):
            parts += [f"### {title}", _contestants(results, section)]
    if results.data.get("cold"):
        parts += ["### First call of a process, nothing cached", _cold(results)]
    return "\n\n".join(parts)


def _targets(results: GpuResults) -> str:
    rows = [
        (
            verdict.target.text,
            _bound(verdict),
            _worst(verdict),
            verdict.word,
            "; ".join(f"{' '.join(map(str, f.place))}: {_value(f, verdict)}" for f in verdict.findings),
        )
        for verdict in judge_all(results, GPU_TARGETS)
    ]
    return table(("target", "bound", "worst measured", "verdict", "each place"), rows)


def _bound(verdict: Verdict) -> str:
    target = verdict.target
    return f"{'at least' if target.at_least else 'under'} {target.bound:g}{_unit(target.unit)}"


def _worst(verdict: Verdict) -> str:
    if verdict.worst is None or verdict.word == NOT_MEASURED:
        return NOT_MEASURED
    return f"{verdict.worst:.3g}{_unit(verdict.target.unit)}"


def _value(finding: Finding, verdict: Verdict) -> str:
    return NOT_MEASURED if finding.value is None else f"{finding.value:.3g}{_unit(verdict.target.unit)}"


def _unit(unit: str) -> str:
    return UNIT.get(unit, f" {unit}")


def _provenance(results: GpuResults) -> str:
    data, facts = results.data, results.data["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    changed = " with uncommitted changes" if data["dirty"] else ""
    tests = data.get("checks", ())
    passed = sum(row["outcome"] == "passed" for row in tests)
    skipped = sum(row["outcome"] == "skipped" for row in tests)
    clocks = [
        reading["sm_mhz"]
        for section, _ in RACED
        for row in data.get(section, ())
        for reading in row["telemetry"]
        if reading.get("sm_mhz")
    ]
    clock = f" Clock of the multiprocessors while timing: median {spread(clocks).median:.0f} MHz." if clocks else ""
    return (
        f"Commit `{str(data['commit'])[:12]}`{changed}, {data['date']}. {facts['multiprocessors']} multiprocessors,"
        f" {facts['memory_gib']} GiB, L2 {facts['l2_mib']} MiB, driver {facts['driver']}, power limit"
        f" {facts.get('power_limit_w') or 'unknown'} W. {packages}. Build: {data['build']}."
        f" Tests on the device: {passed} passed, {skipped} skipped.{clock}"
    )


def _contestants(results: GpuResults, section: str) -> str:
    rows: list[tuple[str, ...]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.rows(section):
        where = f"{row['shape']} {row['dtype']} {row['side']}"
        if row["status"] != TIMED:
            reasons.setdefault((row["contestant"], row["reason"]), []).append(where)
            continue
        device, host = spread(row["device_ms"]), spread(row["host_us"])
        memory = "–" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"
        rate = row["n"] ** 2 * row["d"] / device.median / 1e9
        rows.append(
            (
                where,
                f"`{row['contestant']}`",
                f"{device.median:.4g}",
                f"{device.p20:.4g} – {device.p80:.4g}",
                f"{rate:.1f}" if section == "measurements" else "",
                f"{host.median:.0f}",
                memory,
                f"{row['error']:.0e}",
                str(len(row["device_ms"])),
            )
        )
    head = ("vectors", "contestant", "device ms", "p20 – p80", "useful TFLOP/s", "host µs", "MiB", "error", "rounds")
    text = table(head, rows)
    if reasons:
        said = [f"- `{name}`: {reason} ({', '.join(places)})" for (name, reason), places in reasons.items()]
        text += "\n\nNot timed:\n\n" + "\n".join(said)
    return text


def _cold(results: GpuResults) -> str:
    rows = [
        (
            f"{row['shape']} {row['dtype']} {row['side']}",
            f"`{row['backend']}`",
            ", ".join(f"{seconds:.2f}" for seconds in row["first_call_s"]) or row["reason"],
        )
        for row in results.rows("cold")
    ]
    return table(("vectors", "backend", "s, each try"), rows)

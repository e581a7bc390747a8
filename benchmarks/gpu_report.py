"""Plain text of a GPU run: for the terminal while it goes on, and the short table printed last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers import OURS
from benchmarks.race import FAILED, TIMED
from benchmarks.targets import Verdict
from benchmarks.timing import spread

Rows = Sequence[tuple[str, Mapping[str, Any]]]
RACED = ("measurements", "model", "filters", "gradient", "drift")


def failures(data: Mapping[str, Any]) -> list[str]:
    """What of ours did not pass: tests, gates, and processes that ended badly. Rivals may fail."""
    found = [f"test {row['test']}: {row['reason']}" for row in data["checks"] if row["outcome"] == "failed"]
    found += [f"the tests ended with code {row['exit_code']}" for row in data["check_runs"] if row["exit_code"]]
    for section in RACED:
        found += [
            f"{section} {row['shape']} {row['dtype']} {row['side']} {row['contestant']}: {row['reason']}"
            for row in data[section]
            if row["group"] == OURS and row["status"] == FAILED
        ]
    found += [f"block {row['block']}: {row['culprit'] or 'nobody known'}: {row['reason']}" for row in data["trouble"]]
    return found


def heading(data: Mapping[str, Any]) -> str:
    """Device, versions, commit."""
    facts = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    changed = " and uncommitted changes" if data["dirty"] else ""
    return "\n".join(
        (
            f"{facts['model']}, driver {facts['driver'] or 'unknown'}, {facts['multiprocessors']} multiprocessors",
            versions,
            f"commit {data['commit']}{changed}; build: {data['build'] or '–'}; backends {', '.join(data['backends'])}",
        )
    )


def block(name: str, rows: Rows) -> str:
    """One block's rows, a line each; of the tests only those that did not pass."""
    lines = [f"\n--- {name}"]
    tests = [row for section, row in rows if section == "checks"]
    if tests:
        counted = {
            outcome: sum(row["outcome"] == outcome for row in tests) for outcome in ("passed", "failed", "skipped")
        }
        lines.append(", ".join(f"{count} {outcome}" for outcome, count in counted.items()))
        lines += [f"  FAILED {row['test']}: {row['reason'][:160]}" for row in tests if row["outcome"] == "failed"]
    for section, row in rows:
        if section in RACED:
            lines.append(race_line(row))
        elif section == "ceilings":
            lines.append(f"  copy {spread(row['gb_per_s']).median:.0f} GB/s read plus written")
        elif section == "cold":
            taken = ", ".join(f"{seconds:.2f}" for seconds in row["first_call_s"]) or row["reason"]
            lines.append(f"  cold {row['backend']} {row['dtype']} {row['side']}: {taken} s")
        elif section in ("left_out", "trouble", "check_runs") and row.get("reason"):
            lines.append(f"  {section}: {row}")
    return "\n".join(lines)


def race_line(row: Mapping[str, Any]) -> str:
    """One contestant: median, spread, host time, memory, error; or why not."""
    where = f"  {row['shape']} {row['dtype']} {row['side']:<5} {row['contestant']:<22}"
    if row["status"] != TIMED:
        return f"{where} {row['status']}: {row['reason'][:110]}"
    device, host = spread(row["device_ms"]), spread(row["host_us"])
    memory = "" if row["extra_mib"] is None else f" {row['extra_mib']:9.1f} MiB"
    return (
        f"{where} {device.median:10.4f} ms ({device.p20:.4f} – {device.p80:.4f}) host {host.median:7.1f} µs{memory}"
        f" error {row['error']:.0e} x{len(row['device_ms'])}"
    )


def closing(data: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """The short table: every promise with its worst place; before it whatever failed."""
    failed = failures(data)
    lines = [f"\nFAILED: {line[:200]}" for line in failed[:20]]
    lines += [f"... and {len(failed) - 20} more" for _ in range(len(failed) > 20)]
    lines.append("\n=== promises (worst place)" + (" OF A DRY RUN: these numbers mean nothing" if data["dry"] else ""))
    for verdict in verdicts:
        target = verdict.target
        word = "at least" if target.at_least else "under"
        value = "–" if verdict.worst is None else f"{verdict.worst:.3g} {target.unit}"
        lines.append(f"{verdict.word:<12} {value:>10}  {word} {target.bound:g}  {target.text}")
    return "\n".join(lines)

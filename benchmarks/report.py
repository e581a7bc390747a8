"""Plain text for the terminal while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measured import Results
from benchmarks.race import TIMED, Measurement
from benchmarks.targets import Verdict
from benchmarks.timing import spread


def heading(data: Mapping[str, Any]) -> str:
    """Machine, versions, commit and what was unset."""
    facts = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    name = f" ({facts['name']})" if facts["name"] else ""
    lines = [
        f"{facts['model']}{name}, {facts['cores']} cores, {', '.join(facts['flags'])}",
        versions,
        f"commit {data['commit']}{' and uncommitted changes' if data['dirty'] else ''}; load {data['load_before']:.2f}",
    ]
    unset = data["environment"]["unset"]
    if unset:
        lines.append("unset for this run: " + ", ".join(f"{key}={value}" for key, value in unset.items()))
    peaks = data["ceilings"]["fma_peak_gflops"]
    if peaks:
        lines.append("multiply-add peak of one core: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in peaks.items()))
    return "\n".join(lines)


def block(found: Sequence[Measurement]) -> str:
    """All contestants of one case, side by side."""
    first = found[0]
    naive = next((m for m in found if m.contestant == "naive" and m.status == TIMED), None)
    base = spread(naive.wall_s).median if naive is not None else None
    times = f"{'wall ms':>11}{'p20':>11}{'p80':>11}{'cpu/thr ms':>12}"
    lines = [
        f"\n{first.shape} {first.dtype}, {first.threads} thread{'s' if first.threads > 1 else ''}",
        f"  {'':<16}{times}{'naive/it':>10}{'GF/s':>8}{'error':>10}  rounds",
    ]
    for measured in found:
        if measured.status != TIMED:
            lines.append(f"  {measured.contestant:<16}{measured.status}: {measured.reason}")
            continue
        wall, cpu = spread(measured.wall_s), spread(measured.cpu_s)
        rate = measured.n**2 * measured.d / wall.median / 1e9
        ratio = f"{base / wall.median:>9.2f}x" if base is not None else f"{'':>10}"
        error = "" if measured.error is None else f"{measured.error:.1e}"
        lines.append(
            f"  {measured.contestant:<16}{_ms(wall.median)}{_ms(wall.p20)}{_ms(wall.p80)}{_ms(cpu.median, 12)}"
            f"{ratio}{rate:>8.1f}{error:>10}  {len(measured.wall_s)}x{measured.calls}"
        )
    return "\n".join(lines)


def _ms(seconds: float, width: int = 11) -> str:
    return f"{seconds * 1e3:>{width}.4g}"


def small_calls(rows: Sequence[Mapping[str, Any]]) -> str:
    """Microseconds of a small call."""
    lines = []
    for row in rows:
        place = f"{row['shape']} {row['dtype']} {row['threads']} thr {row['contestant']}"
        if row["status"] == TIMED:
            taken = spread([ns / 1e3 for ns in row["call_ns"]])
            lines.append(f"  small call {place:<42} {taken.median:8.1f} us  ({taken.p20:.1f} to {taken.p80:.1f})")
        else:
            lines.append(f"  small call {place:<42} {row['status']}: {row['reason']}")
    return "\n".join(lines)


def many(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds for all matrices of a model."""
    lines = []
    for row in rows:
        place = f"{row['sets']} sets {row['dtype']} {row['threads']} thr {row['contestant']}"
        if row["status"] == TIMED:
            lines.append(f"  many {place:<48} {spread(row['wall_s']).median * 1e3:9.1f} ms")
        else:
            lines.append(f"  many {place:<48} {row['status']}: {row['reason']}")
    return "\n".join(lines)


def memory_line(row: Mapping[str, Any]) -> str:
    """Extra memory of one contestant on one case."""
    place = f"{row['shape']} {row['dtype']} {row['contestant']}"
    if row["status"] == "measured":
        return f"  memory {place:<44} {row['extra_mib']:9.1f} MiB above {row['input_mib']:.1f} of input"
    return f"  memory {place:<44} {row['status']}: {row['reason']}"


def import_line(results: Results) -> str:
    """What the import adds."""
    taken = results.import_ms()
    if taken is None:
        return "  import: not measured"
    loaded = ", ".join(results.data["import"]["also_loaded"]) or "nothing heavy"
    both, alone = f"{taken[0]:.1f} ms (process pairs)", f"{taken[1]:.1f} ms (timed by itself)"
    return f"  import orthofast adds {both}, {alone}; it loads {loaded}"


def targets(verdicts: Sequence[Verdict]) -> str:
    """Every target with its verdict."""
    lines = ["\ntargets"]
    for verdict in verdicts:
        target = verdict.target
        sign = ">=" if target.at_least else "<"
        worst = "-" if verdict.worst is None else f"{verdict.worst:.3g}{target.unit}"
        shapes = ", ".join(dict.fromkeys(place[0] for place in target.places))
        shapes = shapes if len(shapes) < 50 else f"{len(target.places)} places"
        lines.append(
            f"  {verdict.word:<13}{target.text} ({shapes}): {worst}, target {sign} {target.bound:g}{target.unit}"
        )
    return "\n".join(lines)

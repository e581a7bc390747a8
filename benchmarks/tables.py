"""Markdown tables of one machine's results: the short one of the README, and all of them for the manual."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.measured import Results
from benchmarks.targets import Verdict, judge_all

OURS, HIGH, NAIVE, MEDIUM = "native_cpu", "native_cpu@high", "naive", "naive_medium"
SHORT = (
    ("4096x4096", "float32", 1),
    ("4096x4096", "float32", 2),
    ("8192x8192", "float32", 2),
    ("11008x4096", "float32", 2),
    ("3072x768", "float32", 2),
    ("30522x384", "float32", 2),
    ("4096x4096", "bfloat16", 2),
    ("30522x384", "bfloat16", 2),
)
TARGET_MACHINE_PEAK = 240  # GFLOP/s of one core in float32, of the Zen 5 machine the targets were set on


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def short(results: Results) -> str:
    """About eight rows: ratios to naive torch and to its strongest setting, memory of both."""
    rows = []
    for shape, dtype, threads in SHORT:
        if results.wall(shape, dtype, threads, OURS) is None:
            continue
        theirs, ours = results.memory_mib(shape, dtype, NAIVE), results.memory_mib(shape, dtype, OURS)
        rows.append(
            (
                f"{shape} {dtype}",
                str(threads),
                _times(results.ratio(shape, dtype, threads, NAIVE, OURS)),
                _times(results.ratio(shape, dtype, threads, MEDIUM, OURS)),
                _times(results.ratio(shape, dtype, threads, NAIVE, HIGH)),
                f"{_mib(theirs)} / {_mib(ours)}",
            )
        )
    head = (
        "vectors",
        "threads",
        "vs naive torch",
        'vs naive, "medium"',
        '`precision="high"` vs naive',
        "MiB naive / ours",
    )
    facts = results.data["machine"]
    return f"{_machine(results)}:\n\n{table(head, rows)}" if rows else f"{facts['model']}: nothing timed."


def full(results: Results) -> str:
    """Machine, targets, ceilings, every contestant, memory, small calls and many matrices."""
    data = results.data
    lines = [f"## {_machine(results)}", "", _provenance(results), ""]
    lines += ["### Targets", "", targets(judge_all(results)), "", "### Ceilings", "", ceilings(results), ""]
    lines += ["### Every contestant", "", _contestants(results)]
    if data.get("memory"):
        lines += ["", "### Memory", "", _memory(results)]
    if data.get("many") or data.get("small_calls") or data.get("import"):
        lines += ["", "### Small calls, many matrices, import", "", _calls(results)]
    return "\n".join(lines)


def targets(verdicts: Sequence[Verdict]) -> str:
    """Every target with what was measured at its worst place, and what arithmetic allows there."""
    rows = []
    for verdict in verdicts:
        target = verdict.target
        worst = next((f for f in verdict.findings if f.value is not None and f.value == verdict.worst), None)
        allowed = "" if worst is None or worst.limit is None else f"{worst.limit:.2f}{_unit(target.unit)}"
        moonshot = "" if target.moonshot is None else f" (moonshot {target.moonshot:g})"
        bound = f"{'at least' if target.at_least else 'under'} {target.bound:g}{_unit(target.unit)}{moonshot}"
        spots = _spots(verdict)
        value = "–" if verdict.worst is None else f"{verdict.worst:.3g}{_unit(target.unit)}"
        rows.append((target.text, bound, value, allowed, verdict.word, spots))
    return table(
        ("target", "bound", "worst measured", "arithmetic allows there", "verdict", "each place (1 / 2 threads)"), rows
    )


def _spots(verdict: Verdict) -> str:
    """Each place's value; thread counts of one shape and dtype side by side."""
    grouped: dict[str, list[str]] = {}
    for finding in verdict.findings:
        shape, dtype, _ = finding.place
        grouped.setdefault(f"{shape} {dtype}".strip(), []).append(
            "–" if finding.value is None else f"{finding.value:.3g}"
        )
    return "; ".join(f"{place}: {' / '.join(values)}" for place, values in grouped.items())


def ceilings(results: Results) -> str:
    """What this processor can do at best, and so how large a ratio can become; numbers of this run only."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        peak = results.peak(dtype)
        said = [] if peak is None else [f"multiply-add peak of one core {peak:.0f} GFLOP/s (fed from L1)"]
        for threads in (1, 2):
            best = results.product_rate(dtype, threads)
            if best is not None:
                count = f"{threads} thread{'s' if threads > 1 else ''}"
                said.append(f"best stored product, {count}: {best[0]:.0f} GFLOP/s (`{best[1]}`, {best[2]})")
        if said:
            lines.append(f"- {dtype}: {'; '.join(said)}.")
    lines += _roofline(results)
    return "\n".join(lines) or "No product was timed."


def _roofline(results: Results) -> list[str]:
    naive, peak = results.useful_rate("4096x4096", "float32", 1, NAIVE), results.peak("float32")
    if naive is None:
        return []
    text = (
        "Useful work is n² d floating-point operations: a multiply and an add for each entry of each unordered pair, so"
        " the best a fold can do is half the time of a full product at the same rate."
        f" Naive torch at 4096x4096 in float32 on one thread reaches {naive:.0f} useful GFLOP/s."
    )
    if peak is not None:
        text += (
            f" One core of this machine multiplies and adds at most {peak:.0f} GFLOP/s in float32, so no kernel in"
            f" float32 arithmetic can be more than {peak / naive:.2f} times as fast as naive torch there."
        )
    if peak is not None and peak < TARGET_MACHINE_PEAK * 0.8:
        text += (
            f" The targets were set on a Zen 5 machine whose cores reach about {TARGET_MACHINE_PEAK} GFLOP/s with"
            f" AVX-512; this one has {peak / TARGET_MACHINE_PEAK:.2f} of that, and a target above the bound in the"
            " table cannot be met here in that arithmetic. Half the time of the best product is the fair measure across"
            " machines."
        )
    return ["", text]


def _contestants(results: Results) -> str:
    rows: list[tuple[str, ...]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.rows():
        shape, dtype, threads, name = row["shape"], row["dtype"], row["threads"], row["contestant"]
        wall = results.wall(shape, dtype, threads, name)
        if wall is None:
            reasons.setdefault((name, row["reason"]), []).append(f"{shape} {dtype} {threads} thr")
            continue
        rows.append(
            (
                f"{shape} {dtype}",
                str(threads),
                f"`{name}`",
                f"{wall.median * 1e3:.4g}",
                f"{wall.p20 * 1e3:.4g} – {wall.p80 * 1e3:.4g}",
                _times(results.ratio(shape, dtype, threads, NAIVE, name)),
                f"{results.useful_rate(shape, dtype, threads, name):.1f}",
                "" if row["error"] is None else f"{row['error']:.0e}",
                str(len(row["wall_s"])),
            )
        )
    head = ("vectors", "threads", "contestant", "ms", "p20 – p80", "naive / it", "useful GFLOP/s", "error", "rounds")
    text = table(head, rows)
    if reasons:
        text += "\n\nNot timed:\n\n" + "\n".join(
            f"- `{name}`: {reason} ({_places(places)})" for (name, reason), places in reasons.items()
        )
    return text


def _memory(results: Results) -> str:
    names = list(dict.fromkeys(row["contestant"] for row in results.data["memory"]))
    cases = list(dict.fromkeys((row["shape"], row["dtype"]) for row in results.data["memory"]))
    rows = [
        (f"{shape} {dtype}", *(_mib(results.memory_mib(shape, dtype, name)) for name in names))
        for shape, dtype in cases
    ]
    methods = sorted({row["method"] for row in results.data["memory"] if row["status"] == "measured"})
    said = f"Peak MiB above the input, two threads, a fresh process each (read from {', '.join(methods)}):"
    return f"{said}\n\n{table(('vectors', *(f'`{name}`' for name in names)), rows)}"


def _calls(results: Results) -> str:
    rows = []
    for row in results.data.get("small_calls", ()):
        taken = results.small_call_us(row["dtype"], row["threads"], row["contestant"])
        if taken is not None:
            what = f"one {row['shape']} call, {row['dtype']}"
            rows.append((what, str(row["threads"]), f"`{row['contestant']}`", f"{taken.median:.1f} µs", ""))
    for row in results.data.get("many", ()):
        many = results.many(row["dtype"], row["threads"], row["contestant"])
        naive = results.many(row["dtype"], row["threads"], "naive loop")
        if many is not None:
            what = f"{row['sets']} sets of a {row['model']}, {row['dtype']}"
            times = _times(None if naive is None else naive.median / many.median)
            rows.append((what, str(row["threads"]), f"`{row['contestant']}`", f"{many.median * 1e3:.0f} ms", times))
    taken_ms = results.import_ms()
    if taken_ms is not None:
        both = f"{taken_ms[0]:.0f} ms (process pairs), {taken_ms[1]:.0f} ms (timed by itself)"
        rows.append(("`import orthofast` after `import torch`", "", "", both, ""))
    return table(("what", "threads", "contestant", "median", "naive / it"), rows)


def _machine(results: Results) -> str:
    facts = results.data["machine"]
    name = f" ({facts['name']})" if facts.get("name") else ""
    return f"{facts['model']}{name}, {facts['cores']} cores, torch {results.data['versions']['torch']}"


def _provenance(results: Results) -> str:
    data = results.data
    facts = data["machine"]
    unset = ", ".join(f"{key}={value}" for key, value in data["environment"]["unset"].items()) or "nothing"
    kept = ", ".join(f"{key}={value}" for key, value in data["environment"]["set"].items()) or "nothing"
    caches = ", ".join(f"{level} {size}" for level, size in facts["caches"].items())
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    changed = " with uncommitted changes" if data["dirty"] else ""
    return (
        f"Commit `{str(data['commit'])[:12]}`{changed}, {data['date']}. {', '.join(facts['flags'])}; {caches};"
        f" {facts['memory_gib']} GiB{', virtual machine' if facts['virtual'] else ''}. {packages}."
        f" Environment variables of the libraries: unset for the run {unset}; set {kept}."
        f" Load before the run {data['load_before']:.2f}."
    )


def _places(places: Sequence[str]) -> str:
    return ", ".join(places) if len(places) <= 4 else f"{len(places)} places, from {places[0]} to {places[-1]}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _unit(unit: str) -> str:
    return unit if unit in ("", "x") else f" {unit}"

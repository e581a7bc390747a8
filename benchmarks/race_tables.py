"""Markdown tables of the smaller benchmarks: one function for each results file, from its samples only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.tables import table
from benchmarks.timing import spread

Data = Mapping[str, Any]

# what was promised and is not in the files; a test holds them to the benchmarks
MONITOR_FRAC, MONITOR_EVERY = 0.01, 100
RING_RATIO = 0.6
CONDITIONING = {
    ("perceptron", "empirical"): 1.3,
    ("perceptron", "mc"): 1.3,
    ("perceptron", "exact"): 4.5,
    ("convolutions", "empirical"): 1.6,
}
RIDE_FRAC, CONDITIONING_MIB = 0.4, 16.0


def gradient(data: Data) -> str:
    """Value and gradient of PII: medians, share of autograd's time, extra memory."""
    base = {_place(row): _middle(row["wall_s"]) for row in data["measurements"] if row["contestant"] == "autograd"}
    held = {(*_place(row), row["contestant"]): row["extra_mib"] for row in data["memory"]}
    rows = []
    for row in data["measurements"]:
        wall = _middle(row["wall_s"])
        extra = held.get((*_place(row), row["contestant"]))
        over = f"{wall / base[_place(row)]:.3f}" if _place(row) in base else ""
        error = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        rows.append(
            (
                f"{row['shape']} {row['dtype']}", str(row["threads"]), f"`{row['contestant']}`", f"{wall * 1e3:.3g}",
                over, "" if extra is None else f"{extra:.1f}", error,
            )
        )  # fmt: skip
    head = ("vectors", "threads", "contestant", "ms", "of autograd's time", "extra MiB", "error of the gradient")
    return f"{table(head, rows)}\n\n{_bullets(data['verdicts'])}"


def monitor(data: Data) -> str:
    """Training with and without: share of CPU time beyond bare steps."""
    rows, said = [], []
    for model in data["models"]:
        for name, found in model["contestants"].items():
            over = spread([100 * value for value in found["overhead_frac"]])
            same = "yes" if found["same_weights"] else "NO"
            rows.append((model["model"], name, f"{over.median:+.2f} %", f"{over.p20:+.2f} – {over.p80:+.2f}", same))
        own = model["own"]
        share = own["due_over_step"] / MONITOR_EVERY + own["idle_over_step"]
        said.append(
            f"{model['model']}: a step of {model['step_cpu_ms']:.1f} ms; by itself a due step takes"
            f" {100 * own['due_over_step']:.1f} % of one, one that is not due {own['idle_ns']:.0f} ns: every"
            f" {MONITOR_EVERY} steps {100 * share:.3f} % (promised at most {100 * MONITOR_FRAC:g} %:"
            f" {_word(share, MONITOR_FRAC)})."
        )
    head = ("model", "contestant", "beyond bare steps", "p20 – p80", "same weights")
    return f"{table(head, rows)}\n\n{_bullets(said)}"


def ring(data: Data) -> str:
    """Row shards: the half ring over gathering, wall and CPU time."""
    rows = []
    for row in data["rows"]:
        wall, cpu = ({name: _middle(taken) for name, taken in row[kind].items()} for kind in ("wall_s", "cpu_s"))
        judged = row["ranks"] == 2 and not row["gradient"]
        ratio = wall["ring"] / wall["gather"]
        rows.append(
            (
                f"{row['n']}x{row['d']}", "value and gradient" if row["gradient"] else "value", str(row["ranks"]),
                f"{wall['ring'] * 1e3:.1f}", f"{ratio:.2f} ({cpu['ring'] / cpu['gather']:.2f})",
                f"{wall['ring'] / wall['dtensor']:.2f} ({cpu['ring'] / cpu['dtensor']:.2f})",
                _word(ratio, RING_RATIO) if judged else "",
            )
        )  # fmt: skip
    head = ("vectors", "what", "ranks", "ring ms", "over gathering, wall (CPU)", "over the formula on the DTensor")
    return table((*head, f"promised at most {RING_RATIO:g}"), rows)


def spectra(data: Data) -> str:
    """Kronecker quantiles and Fisher spectra: medians, extra memory, our share of each."""
    held = {(row["race"], row["contestant"]): row["extra_mib"] for row in data["memory"]}
    ours = {row["race"]: _middle(row["wall_s"]) for row in data["measurements"] if row["contestant"] == "ours"}
    rows = []
    for row in data["measurements"]:
        wall, extra = _middle(row["wall_s"]), held.get((row["race"], row["contestant"]))
        share = f"{ours[row['race']] / wall:.3f}"
        rows.append(
            (row["race"], row["contestant"], f"{wall * 1e3:.3g}", share, "" if extra is None else f"{extra:.1f}")
        )
    return (
        f"{table(('what', 'contestant', 'ms', 'our time over its', 'extra MiB'), rows)}\n\n{_bullets(data['verdicts'])}"
    )


def conditioning(data: Data) -> str:
    """Factors over a forward and backward pass, what riding on a step costs, memory."""
    rows = []
    for raced in data["passes"]:
        target = CONDITIONING.get((raced["net"], raced["labels"]))
        for name, ratios in raced["ratios"].items():
            over, off = spread(ratios), raced["off"].get(name)
            judged = target is not None and name == "orthofast float32"
            rows.append(
                (
                    raced["net"], raced["labels"], name, f"{over.median:.2f}", f"{over.p20:.2f} – {over.p80:.2f}",
                    "" if off is None else f"{off:.0e}",
                    f"at most {target:g}: {_word(over.median, target)}" if judged and target is not None else "",
                )
            )  # fmt: skip
    head = ("net", "labels", "contestant", "over forward and backward", "p20 – p80", "error of the spectra", "promised")
    said = []
    for ridden in data["rides"]:
        more = {name: _middle(values) for name, values in ridden["more_frac"].items()}
        figures = ", ".join(f"{name} {value:+.2f}" for name, value in more.items())
        judged = f" (promised at most {RIDE_FRAC:g}: {_word(more['float32'], RIDE_FRAC)})"
        said.append(
            f"{ridden['net']}: riding on a step of {ridden['step_cpu_ms']:.1f} ms, over the step: {figures}"
            f"{judged if ridden['net'] == 'perceptron' else ''}."
        )
    for name, mib in data["memory_mib"].items():
        own = f" (promised at most {CONDITIONING_MIB:g}: {_word(mib, CONDITIONING_MIB)})"
        said.append(
            f"convolutions, {name}: peak memory {mib:.1f} MiB beyond plain passes{own * ('orthofast' in name)}."
        )
    return f"{table(head, rows)}\n\n{_bullets(said)}"


def scan(data: Data) -> str:
    """Checkpoints: promises, then each part that was run; the GPU's always."""
    parts = {"verdicts": _promises, "ratio": _ratio, "memory": _memory, "open": _opening}
    blocks = [render(data[name]) for name, render in parts.items() if data.get(name)]
    if data.get("peers"):
        blocks.append(_peers(data))
    return "\n\n".join([*blocks, _gpu(data.get("gpu") or {"status": "not measured", "reason": "the part was not run"})])


def _promises(found: Sequence[Data]) -> str:
    rows = [
        (one["what"], f"{one['bound']:g} {one['unit']}".strip(), f"{one['value']:.3g}", one["verdict"]) for one in found
    ]
    return table(("promise", "at most", "measured", "verdict"), rows)


def _ratio(found: Sequence[Data]) -> str:
    rows = []
    for row in found:
        wall, cpu = ({name: _middle(taken) for name, taken in row[kind].items()} for kind in ("wall_s", "cpu_s"))
        rows.append(
            (
                row["checkpoint"], f"{row['bytes'] / 1e6:.0f}", str(row["matrices"]), str(row["threads"]),
                f"{wall['scan']:.2f}", f"{wall['folds']:.2f}", f"{wall['scan'] / wall['folds']:.3f}",
                f"{cpu['scan'] / cpu['folds']:.3f}",
            )
        )  # fmt: skip
    head = ("checkpoint", "MB", "matrices", "threads", "scan s", "folds alone s", "ratio", "ratio of CPU time")
    return table(head, rows)


def _memory(found: Sequence[Data]) -> str:
    rows = [
        (
            f"{row['gb']:.2f}", str(row["layers"]), f"{row['pairs']} of each matrix" if row["pairs"] else "all",
            f"{row['extra_mib']:.0f}", f"{row['largest_mib']:.0f}",
        )
        for row in found
    ]  # fmt: skip
    return table(("GB", "layers", "pairs", "peak MiB above the imports", "largest tensor MiB"), rows)


def _opening(found: Sequence[Data]) -> str:
    rows = [
        (
            row["what"], str(row["tensors"]), f"{_middle(row['open_s']):.3f}", f"{_middle(row['inspect_s']):.3f}",
            f"{_middle(row['command_s']):.2f}", f"{_middle(row['import_torch_s']):.2f}",
            f"{row['rival']} {row['rival_s'][0]:.1f} s" if "rival" in row else "",
        )
        for row in found
    ]  # fmt: skip
    head = ("headers of", "tensors", "open s", "and inspect s", "`orthofast inspect` s", "`import torch` alone s")
    return table((*head, "another reader"), rows)


def _peers(data: Data) -> str:
    own = {row["task"]: row["wall_s"] for row in data["peers"] if row["tool"].startswith("orthofast") and row["wall_s"]}
    rows = []
    for row in data["peers"]:
        name = f"{row['tool']} {data['versions'].get(row['tool']) or ''}".strip()
        if not row["wall_s"]:
            rows.append((name, row["task"], f"{row['status']}: {row['reason']}", "", "", "", row["computes"]))
            continue
        wall = _middle(row["wall_s"])
        over = f"{wall / _middle(own[row['task']]):.2f}x" if row["task"] in own else ""
        cpu, peak = _middle(row["cpu_s"]), _middle(row["peak_mib"])
        rows.append((name, row["task"], f"{wall:.2f}", over, f"{cpu:.2f}", f"{peak:.0f}", row["computes"]))
    head = ("tool", "task", "s", "over ours", "CPU s", "peak MiB", "computes")
    said = f"Whole processes, import included, on the made checkpoint `{data['peers_model']}`:"
    return f"{said}\n\n{table(head, rows)}"


def _gpu(gpu: Data) -> str:
    if gpu["status"] != "measured":
        return f"On a GPU: {gpu['status']} ({gpu['reason']})."
    rows = [
        (
            kind, f"{_middle(gpu[kind]['scan']):.2f}", f"{_middle(gpu[kind]['read']):.2f}",
            f"{_middle(gpu['copy_s']):.2f}", f"{_middle(gpu['fold_s']):.2f}", f"{gpu['ratio'][kind]:.3f}",
            f"{gpu['whole_s'][kind]:.0f}",
        )
        for kind in ("page cache", "disk")
    ]  # fmt: skip
    head = ("from", "scan s", "reading s", "copying s", "folding s", "over the largest", "80 layers s")
    said = f"{gpu['device']}, {gpu['layers']} layers of Llama-3-70B, {gpu['bytes'] / 1e9:.1f} GB:"
    return f"{said}\n\n{table(head, rows)}"


RENDERERS: dict[str, tuple[str, Callable[[Data], str]]] = {
    "scan.json": ("Scanning checkpoints", scan),
    "gradient.json": ("Value and gradient", gradient),
    "monitor.json": ("Monitoring", monitor),
    "ring.json": ("Row shards on several processes", ring),
    "spectra.json": ("Spectra", spectra),
    "conditioning.json": ("Conditioning", conditioning),
}


def sections(folder: Path = RESULTS) -> list[str]:
    """Each machine's smaller results, machine by machine.

    Raises:
        ValueError: if a file is not what its benchmark writes.
    """
    found = []
    for machine in sorted(path for path in folder.glob("*") if path.is_dir()):
        parts = [
            section(title, render, machine / name)
            for name, (title, render) in RENDERERS.items()
            if (machine / name).exists()
        ]
        if parts:
            found.append("\n\n".join(parts))
    return found


def section(title: str, render: Callable[[Data], str], path: Path) -> str:
    """Heading, where the numbers come from, tables.

    Raises:
        ValueError: if the file is not what its benchmark writes.
    """
    try:
        data: Data = json.loads(path.read_text())
        facts = data["machine"]
        name = f" ({facts['name']})" if facts.get("name") else ""
        changed = " with uncommitted changes" if data["dirty"] else ""
        load = f", load before the run {data['load_before']:.2f}" if "load_before" in data else ""
        source = (
            f"Commit `{str(data['commit'])[:12]}`{changed}, {data['date']}, torch {data['versions']['torch']}{load}."
        )
        return f"## {title}: {facts['model']}{name}, {facts['cores']} cores\n\n{source}.\n\n{render(data)}"
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not what its benchmark writes: {error!r}") from None


def _place(row: Data) -> tuple[str, int]:
    return row["shape"], row["threads"]


def _middle(values: Sequence[float]) -> float:
    return spread(values).median


def _word(value: float, bound: float) -> str:
    return "met" if value <= bound else "not met"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)

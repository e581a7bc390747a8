"""What earlier runs left in a folder, judged anew: its page shows the whole folder, not the last command alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthofast.lab.experiment import Experiment, Settings
from orthofast.lab.registry import REGISTRY, RUNNABLE
from orthofast.lab.runs import Outcome


def with_earlier(outcomes: Sequence[Outcome], settings: Settings, out: Path) -> list[Outcome]:
    """Outcomes of this run, and of earlier ones that lie in the same folder with the same settings.

    Earlier numbers are judged anew. A folder that cannot be read, holds other settings or numbers that no longer fit
    its experiment is left out.

    Args:
        outcomes: of this run.
        settings: of it; earlier results count with the same scale, device and, where they take any, data.
        out: the folder of results.

    Returns:
        All of them, in the order of the registry; experiments it does not know come last.
    """
    here = {one.entry.id for one in outcomes}
    earlier = (_read(entry, settings, out / key) for key, entry in RUNNABLE.items() if key not in here)
    place = {key: number for number, key in enumerate(REGISTRY)}
    both = [*outcomes, *(one for one in earlier if one is not None)]
    return sorted(both, key=lambda one: place.get(one.entry.id, len(place)))


def _read(entry: Experiment, settings: Settings, folder: Path) -> Outcome | None:
    try:
        manifest = _json(folder / "manifest.json")
        raws = list(_json(folder / "raw.json").values())
        made = manifest["settings"]
        names = ("scale", "device", *(("data",) if entry.needs else ()))
        if not raws or any(made[name] != getattr(settings, name) for name in names):
            return None
        return Outcome(entry, entry.verdict(raws), len(raws), folder)
    except Exception:  # noqa: BLE001 - whatever does not fit is left out
        return None


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found

"""Every table and figure of the four papers by its identifier: with an experiment, or with the reason there is none."""

from __future__ import annotations

from collections.abc import Iterable

from orthofast.errors import InputError
from orthofast.lab import (
    absent,
    batchnorm_regularization,
    deep_convolutions,
    deep_layers,
    deep_normalization,
    deep_standardization,
    deep_training,
    independence,
    layer_conditioning,
    modern_blocks,
    representation_limits,
    representations,
)
from orthofast.lab.experiment import Absent, Experiment

ROOMS = (
    independence,
    representations,
    representation_limits,
    deep_layers,
    deep_training,
    deep_convolutions,
    deep_standardization,
    deep_normalization,
    modern_blocks,
    layer_conditioning,
    batchnorm_regularization,
)
S0 = (
    *("T1", "T1b", "T2", "T3", "T4", "T5", "T5b", "F1", "F1b", "F2"),
    *("A1", "A2", "A3", "A4", "M1", "M2", "M3", "X1", "X2", "X3"),
)
S1 = (
    *("F1", "F2a", "F2b", "F3", "T1", "F4a", "F4b", "F5", "F6", "F6b", "F7"),
    *("X1", "X2", "X3", "X4", "X5"),
)
ORDER = (
    *(f"S0-{key}" for key in S0),
    *(f"S1-{key}" for key in S1),
    *(f"S2-{key}" for key in ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "T1", "T1b", "T2", "X1", "X2", "X3")),
    *(f"S3-{key}" for key in ("T1", "F1", "F2", "T2")),
)
RUNNABLE: dict[str, Experiment] = {one.id: one for room in ROOMS for one in room.EXPERIMENTS}
_KNOWN: dict[str, Experiment | Absent] = {**{one.id: one for one in absent.ABSENT}, **RUNNABLE}
REGISTRY: dict[str, Experiment | Absent] = {
    key: _KNOWN[key] for key in (*ORDER, *(key for key in RUNNABLE if key not in ORDER)) if key in _KNOWN
}


def find(wanted: Iterable[str] = ()) -> list[Experiment | Absent]:
    """Entries by identifier, or by the paper's "S1"; all of them for none, in the order of the papers.

    Raises:
        InputError: if one is not known.
    """
    wanted = list(wanted)
    if not wanted:
        return list(REGISTRY.values())
    chosen: set[str] = set()
    for one in wanted:
        matching = {key for key in REGISTRY if one.lower() in (key.lower(), key.split("-")[0].lower())}
        if not matching:
            raise InputError(f"{one!r} is no experiment; `orthofast lab --list` shows them all")
        chosen |= matching
    return [entry for key, entry in REGISTRY.items() if key in chosen]

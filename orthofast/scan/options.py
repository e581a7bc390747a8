"""How a scan runs, apart from what it measures: memory, the way of reading, and what is asked for seldom."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from orthofast.errors import InputError

GIB = 1 << 30
LEAST_BYTES = 1 << 20  # of memory for reading
FASTSAFETENSORS = "fastsafetensors"
ENGINES = ("positional", FASTSAFETENSORS)


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """What most scans leave as it is, kept out of the signature of ``scan_checkpoint``.

    Attributes:
        layers: measure only these rows of the table, such as {"0", "decoder.3"}; None for all.
        preset: "paper" for the layers and sides of Lu et al. 2024, Table 5; None for all.
        detail: also the largest cosine with its pair, and a histogram: 3 % more work at d = 4096, 15 to 30 % at 384.
        host_mem: bytes of the processor's memory that hold stored weights. On the processor a weight must exist to be
            folded: its decoded form, and what of one weight exceeds the bound, come on top.
        gpu_mem: bytes of a GPU's memory for stored and decoded weights; None for three times the largest, at least
            2 GiB and at most four fifths of what is free.
        engine: "positional" (threads with positional reads), or "fastsafetensors" (package of the extra ``fast``).
        journal: a file beside the output that takes down every finished weight; None for none.
        resume: use what the journal has of an earlier scan of the same files with the same settings.
    """

    layers: Collection[str] | None = None
    preset: str | None = None
    detail: bool = False
    host_mem: int = GIB
    gpu_mem: int | None = None
    engine: str = "positional"
    journal: str | os.PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("host_mem", "gpu_mem"):
            value = getattr(self, name)
            if value is None and name == "gpu_mem":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < LEAST_BYTES:
                raise InputError(f"{name} needs a number of bytes, at least {LEAST_BYTES}, got {value!r}")
        if self.engine not in ENGINES:
            raise InputError(f"engine needs one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.resume and self.journal is None:
            raise InputError("resume needs a journal: name the file that the earlier scan wrote")

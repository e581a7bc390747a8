"""A scan on a GPU against the largest of its parts: reading alone, copying alone, folding alone, in the same run.

Llama-3-70B layers without embedding and head, from the page cache and, where the kernel lets the cache be dropped, from
the disk. Rows and columns. What it says of 80 layers is the time of these, scaled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint_shapes import MODELS, tensors, with_layers
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.memory import peak_of
from benchmarks.timing import spread

LAYERS = 20  # 34 GB
WHOLE = 80
READERS, PIECE = 8, 16 << 20
NO_DEVICE = "no CUDA device"


def measure(folder: Path, layers: int = LAYERS, rounds: int = 3) -> dict[str, Any]:
    """All parts and the scan; ``status`` is "not measured" without a device.

    Args:
        folder: where the checkpoint is made, about 1.7 GB a layer: a fast disk, or memory (tmpfs).
        layers: how many.
        rounds: samples of each.
    """
    if not torch.cuda.is_available():
        return {"status": "not measured", "reason": NO_DEVICE}
    from orthofast.scan import scan_checkpoint

    model = with_layers(replace(MODELS["llama-3-70b"], edges=False), layers=layers)
    place = folder / f"llama-3-70b-{layers}"
    if not place.exists():
        write_checkpoint(place, model)
    files = sorted(place.glob("*.safetensors"))
    nbytes = sum(spec.nbytes for spec in tensors(model))
    found: dict[str, Any] = {
        "status": "measured", "device": torch.cuda.get_device_name(), "layers": layers, "bytes": nbytes,
    }  # fmt: skip

    def scan() -> object:
        return scan_checkpoint(place, device="cuda")

    read(files)
    scan()  # kernels are compiled and chosen
    for kind in ("page cache", "disk"):
        times: dict[str, list[float]] = {"read": [], "scan": []}
        for _ in range(rounds):
            for name, taken in times.items():
                if kind == "disk":
                    drop(files)
                taken.append(seconds((lambda: read(files)) if name == "read" else scan))
        found[kind] = times
    found["copy_s"] = [copying(nbytes) for _ in range(rounds)]
    found["fold_s"] = folding(layers, rounds)
    extra, method = peak_of(scan)
    found |= {"host_mib": extra / 2**20, "method": method}
    slowest = {
        kind: max(spread(found[kind]["read"]).median, spread(found["copy_s"]).median, spread(found["fold_s"]).median)
        for kind in ("page cache", "disk")
    }
    found["ratio"] = {kind: spread(found[kind]["scan"]).median / slowest[kind] for kind in slowest}
    found["whole_s"] = {kind: spread(found[kind]["scan"]).median / layers * WHOLE for kind in slowest}
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds until the device is done too."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def read(files: list[Path]) -> None:
    """Every byte once, by as many threads as the scan uses, into buffers that are used again."""

    def one(place: tuple[Path, int]) -> int:
        path, start = place
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [buffer], start)

    places = [(path, start) for path in files for start in range(0, path.stat().st_size, PIECE)]
    with ThreadPoolExecutor(READERS) as pool:
        if sum(pool.map(one, places)) != sum(path.stat().st_size for path in files):
            raise OSError("a file could not be read whole")


def drop(files: list[Path]) -> None:
    """Ask the kernel to forget the files' pages; on tmpfs it cannot."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copying(nbytes: int) -> float:
    """Pinned memory to the device, as many bytes as the checkpoint has."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")

    def all_of_it() -> None:
        for _ in range(nbytes // host.numel()):
            target.copy_(host, non_blocking=True)

    return seconds(all_of_it) * nbytes / (nbytes // host.numel() * host.numel())


def folding(count: int, rounds: int) -> list[float]:
    """Rows and columns of all matrices over weights on the device, one layer after the other from two in memory."""
    from orthofast.kernels import gram_stats_many

    model = with_layers(replace(MODELS["llama-3-70b"], edges=False), layers=1)
    shapes = [spec.shape for spec in tensors(model) if len(spec.shape) == 2]
    layers = [[torch.randn(shape, device="cuda").bfloat16() for shape in shapes] for _ in range(2)]

    def all_of_it() -> None:
        for number in range(count):
            weights = layers[number % 2]
            gram_stats_many([view for weight in weights for view in (weight, weight.T)], want=("abs_sum",))

    all_of_it()
    return [seconds(all_of_it) for _ in range(rounds)]

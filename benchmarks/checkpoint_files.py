"""Safetensors files written block by block: shards, headers, index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.checkpoint_content import Bits
from benchmarks.checkpoint_plants import Planted
from benchmarks.checkpoint_shapes import ITEM_BYTES, Spec

ALIGN = 8  # of the header, so that tensors start aligned
Blocks = Callable[[Spec], Iterable[Bits]]


def shards(specs: Iterable[Spec], limit_bytes: float) -> list[list[Spec]]:
    """Tensors in their order, a new file before the one that would exceed the limit."""
    found: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        if found[-1] and used + spec.nbytes > limit_bytes:
            found.append([])
            used = 0
        found[-1].append(spec)
        used += spec.nbytes
    return found


def in_file_order(specs: Iterable[Spec]) -> list[Spec]:
    """As safetensors writes: wide types first, then by name."""
    return sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name))


def header(specs: Sequence[Spec]) -> bytes:
    """Length and JSON of a file whose tensors follow each other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        place = [at, at + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": place}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, specs: Iterable[Spec], blocks: Blocks | None) -> None:
    """One file; without blocks as large as it should be, with a hole for the tensors."""
    specs = in_file_order(specs)
    start = header(specs)
    with path.open("wb") as file:
        file.write(start)
        if blocks is None:
            file.truncate(len(start) + sum(spec.nbytes for spec in specs))
            return
        for spec in specs:
            for block in blocks(spec):
                file.write(block.data)


def write_shards(folder: Path, specs: Sequence[Spec], blocks: Blocks | None, shard_gb: float) -> None:
    """All files of a model, and their index where there are several."""
    parts = shards(specs, shard_gb * 1e9)
    names = numbered("model", ".safetensors", len(parts))
    for name, part in zip(names, parts, strict=True):
        write_file(folder / name, part, blocks)
    if len(parts) > 1:
        write_index(folder / "model.safetensors.index.json", parts, names)


def numbered(stem: str, suffix: str, count: int) -> list[str]:
    """File names as the hub has them."""
    if count == 1:
        return [f"{stem}{suffix}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]


def write_index(path: Path, parts: Sequence[Sequence[Spec]], names: Sequence[str]) -> None:
    """Which file holds which tensor."""
    weight_map = {spec.name: name for name, part in zip(names, parts, strict=True) for spec in part}
    total = sum(spec.nbytes for part in parts for spec in part)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")


def write_planted(folder: Path, planted: Iterable[Planted]) -> None:
    """What a scan must find; all other matrices are random, so at the isotropic baseline."""
    (folder / "planted.json").write_text(json.dumps([asdict(one) for one in planted], indent=1) + "\n")

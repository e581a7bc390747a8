"""Distributed checkpoints written as safetensors: every rank's file holds its blocks, their origins in its header.

Layout (torch/distributed/checkpoint/hf_storage.py): the metadata entry DCP_SHARDING_INFO of each file is JSON that
gives "saved_offsets" by tensor. The whole shape is stored nowhere: it is as far as the blocks reach.
"""

from __future__ import annotations

from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog, Extent, Fault
from orthofast.scan.readers.chunks import add_joined
from orthofast.scan.readers.files import MAX_NAMED, file_size, json_object, naturals, shown
from orthofast.scan.readers.safetensors_file import read_index, read_metadata

SHARDING = "DCP_SHARDING_INFO"


def is_sharded(file: Path) -> bool:
    """Whether a safetensors file says which blocks it holds."""
    try:
        return SHARDING in read_metadata(file)
    except CheckpointError:
        return False


def add_sharded_safetensors(catalog: Catalog, files: list[Path]) -> None:
    """Put the joined tensors of all ranks' files into a catalog.

    Raises:
        CheckpointError: if no file can be read.
    """
    catalog.format = "dcp"
    blocks: dict[str, dict[tuple[int, ...], Extent]] = {}
    broken: list[str] = []
    for file in files:
        try:
            extents, faults = read_index(file)
            origins = json_object(str(read_metadata(file).get(SHARDING, "{}")).encode(), f"{SHARDING} of {file.name}")
        except CheckpointError as error:
            broken.append(str(error))
            catalog.faults.append(Fault(file.name, str(error), whole_file=True))
            continue
        catalog.files[file] = file_size(file)
        catalog.faults += faults
        for extent in extents:
            info = origins.get(extent.name)
            origin = naturals(info.get("saved_offsets") if isinstance(info, dict) else [0] * len(extent.shape))
            known = blocks.setdefault(extent.name, {})
            if origin is None or len(origin) != len(extent.shape):
                error_text = f"{file.name}: {shown(extent.name)} has no usable offsets"
                catalog.faults.append(Fault(extent.name, error_text, extent.shape))
            elif origin not in known:  # a block that several ranks hold counts once
                known[origin] = extent
    if len(broken) == len(files):
        raise CheckpointError("; ".join(broken[:MAX_NAMED]))
    spoilt = {fault.name for fault in catalog.faults}
    for name, found in blocks.items():
        if name in spoilt or not found:
            continue
        first = next(iter(found.values()))
        same = all(len(e.shape) == len(first.shape) and e.dtype == first.dtype for e in found.values())
        if not same:
            catalog.faults.append(Fault(name, f"{first.file.name}: the blocks of {shown(name)} do not fit together"))
            continue
        reach = zip(*(tuple(o + n for o, n in zip(at, e.shape, strict=True)) for at, e in found.items()), strict=True)
        shape = tuple(max(ends) for ends in reach)
        filled = {origin: extent for origin, extent in found.items() if extent.nbytes or 0 in shape}
        add_joined(catalog, name, first.file.parent.name or "the checkpoint", first.dtype, shape, filled)

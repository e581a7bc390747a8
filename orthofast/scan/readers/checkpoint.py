"""Which files make up a checkpoint: one file, a sharded index, or a folder; joined into one catalog."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog, Fault
from orthofast.scan.readers.safetensors_file import WEIGHT_SUFFIX, file_size, read_index, read_json

INDEX_SUFFIX = ".safetensors.index.json"
CONFIG = "config.json"
CONFIG_LIMIT_BYTES = 10_000_000
# looked for in this order; the first that exists is the checkpoint, so no weight counts twice
PREFERRED = ("model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors")
OTHER_COPIES = ("consolidated",)  # Meta and Mistral ship a second copy of the same weights
UNREADABLE = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".onnx", ".msgpack", ".npz")
MAX_NAMED = 8  # file names spelled out in one sentence


def open_checkpoint(path: str | os.PathLike[str]) -> Catalog:
    """Read the headers of a checkpoint: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder with one.

    A broken shard or tensor becomes a fault of the catalog; the others stay readable.

    Raises:
        CheckpointError: if there is nothing to read; the message names the file.
    """
    root = Path(path)
    catalog = Catalog(root)
    if root.is_dir():
        folder, chosen = root, _chosen(root, catalog)
    else:
        folder, chosen = root.parent, [root]
    if chosen[0].name.endswith(INDEX_SUFFIX):
        _add_sharded(catalog, folder, chosen[0])
    elif chosen[0].suffix in UNREADABLE:
        raise CheckpointError(
            f"{chosen[0].name}: {chosen[0].suffix} files are not read; convert the checkpoint to safetensors"
        )
    else:
        _add_files(catalog, chosen)
    _add_config(catalog, folder)
    if not catalog.extents:
        errors = list(dict.fromkeys(fault.error for fault in catalog.faults))[:MAX_NAMED]
        raise CheckpointError("; ".join(errors) or f"{chosen[0].name} holds no tensors")
    return catalog


def _chosen(folder: Path, catalog: Catalog) -> list[Path]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{folder.name or folder} cannot be listed: {error.strerror}") from None
    for name in PREFERRED:
        if name in names:
            return [folder / name]
    for suffix in (INDEX_SUFFIX, WEIGHT_SUFFIX):
        found = [name for name in names if name.endswith(suffix)]
        found = [name for name in found if not name.startswith(OTHER_COPIES)] or found
        if not found:
            continue
        if suffix == INDEX_SUFFIX and len(found) > 1:
            catalog.notes.append(f"several indexes, {found[0]} was taken, not {_listed(found[1:])}")
            found = found[:1]
        return [folder / name for name in found]
    others = [name for name in names if name.endswith(UNREADABLE)]
    if others:
        raise CheckpointError(
            f"{folder.name} holds no safetensors file, only {_listed(others)}; convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{folder.name or folder} holds no .safetensors file and no {INDEX_SUFFIX[1:]}")


def _add_files(catalog: Catalog, files: list[Path]) -> None:
    for file in files:
        try:
            _add_file(catalog, file)
        except CheckpointError as error:
            if len(files) == 1:
                raise
            catalog.faults.append(Fault(file.name, str(error), whole_file=True))


def _add_file(catalog: Catalog, file: Path) -> None:
    extents, faults = read_index(file)
    known = {extent.name: extent.file.name for extent in catalog.extents}
    for extent in extents:
        if extent.name in known:
            error = f"{file.name} and {known[extent.name]} both hold {extent.name!a}; the first counts"
            faults.append(Fault(extent.name, error, extent.shape))
        else:
            catalog.extents.append(extent)
    catalog.faults.extend(faults)
    catalog.files[file] = file_size(file)


def _add_sharded(catalog: Catalog, folder: Path, index: Path) -> None:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map that names shards")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index.name}: weight_map gives no file name for {ascii(name)[:80]}")
        shards.setdefault(shard, []).append(name)

    outside = [shard for shard in shards if not _inside(shard)]
    inside = [shard for shard in shards if _inside(shard)]
    missing = [shard for shard in inside if not (folder / shard).exists()]
    if missing:  # all of them at once, before any read
        also = f"{len(missing)} of {len(shards)} shards are missing: {_listed(missing)}"
        if len(missing) == len(shards):
            raise CheckpointError(f"{index.name}: {also}")
        catalog.faults += [Fault(name, f"{shard} is missing ({also})") for shard in missing for name in shards[shard]]
    for shard in outside:
        error = f"{index.name}: the shard name {ascii(shard)[:80]} leads outside the folder and was not opened"
        catalog.faults += [Fault(name, error) for name in shards[shard]]
    if len(outside) == len(shards):
        raise CheckpointError(
            f"{index.name}: every shard name leads outside the folder, such as {ascii(outside[0])[:80]}"
        )
    broken: list[str] = []
    for shard in inside:
        if shard in missing:
            continue
        try:
            _add_file(catalog, folder / shard)
        except CheckpointError as error:
            broken.append(str(error))
            catalog.faults += [Fault(name, str(error)) for name in shards[shard]]
    if not catalog.files:
        raise CheckpointError("; ".join(broken[:MAX_NAMED]))
    _compare(catalog, index, weight_map)


def _compare(catalog: Catalog, index: Path, weight_map: dict[str, str]) -> None:
    """The shard headers are believed; where the index says otherwise it is reported."""
    accounted = {extent.name for extent in catalog.extents} | {fault.name for fault in catalog.faults}
    for name, shard in weight_map.items():
        if name not in accounted:
            catalog.faults.append(
                Fault(name, f"{index.name} places {ascii(name)[:80]} in {shard}, which does not hold it")
            )
    extra = [extent.name for extent in catalog.extents if extent.name not in weight_map]
    if extra:
        catalog.notes.append(f"{len(extra)} tensors are in the shards but not in {index.name}")


def _inside(name: str) -> bool:
    """Judged by the words alone: snapshots of the hub are symbolic links, so resolving would mislead."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    unsafe = posix.is_absolute() or bool(windows.drive) or bool(windows.root) or "\0" in name
    return bool(name) and not unsafe and ".." not in (*posix.parts, *windows.parts) and name.endswith(WEIGHT_SUFFIX)


def _add_config(catalog: Catalog, folder: Path) -> None:
    file = folder / CONFIG
    if not file.exists():
        return
    try:
        catalog.config = read_json(file, CONFIG_LIMIT_BYTES)
        catalog.config_digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (CheckpointError, OSError) as error:
        catalog.notes.append(f"the configuration was ignored: {error}")


def _listed(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")

"""Opening a checkpoint of any kind: the one door from a path, a hub name, a module or a state dict to a catalog."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from orthofast.errors import CheckpointError, InputError
from orthofast.scan.catalog import Catalog, Extent, Fault
from orthofast.scan.readers import hub, memory, torch_legacy
from orthofast.scan.readers.consolidated import add_consolidated
from orthofast.scan.readers.dcp import add_dcp
from orthofast.scan.readers.dcp_safetensors import add_sharded_safetensors, is_sharded
from orthofast.scan.readers.files import MAX_NAMED, file_size, first_bytes, inside, is_folder, listed, read_json, shown
from orthofast.scan.readers.folder import (
    ADAPTER_CONFIG,
    CONFIG,
    COPIES,
    DCP,
    OTHER_FORMATS,
    QUANTIZE_CONFIGS,
    SAFETENSORS,
    TORCH,
    WEIGHTS,
    choose,
    is_index,
)
from orthofast.scan.readers.gguf_file import MAGIC, SUFFIX, config_of, read_gguf, split_names
from orthofast.scan.readers.safetensors_file import read_index
from orthofast.scan.readers.state_dicts import model_tensors
from orthofast.scan.readers.torch_file import Stored, is_torch_zip, place, read_torch_file

MAX_LOOKED_INTO = 100  # folders inside a folder without weights
CONFIG_LIMIT_BYTES = 10_000_000
ADAPTER = "adapter_config"  # key of Catalog.config that marks an adapter
COMMIT = re.compile(r"[0-9a-f]{40}")


def open_checkpoint(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor], *, headers_only: bool = False
) -> Catalog:
    """Read the headers of a checkpoint, no tensor.

    A broken shard or tensor becomes a fault of the catalog; the others stay readable. Files are told by their content,
    not by their names. No code of a checkpoint is run.

    Args:
        source: a file (``.safetensors``, a zip of torch, ``.gguf``), an index of shards, a folder with one of them, a
            folder of ``torch.distributed.checkpoint`` or of an adapter (marked by ``config["adapter_config"]``), the
            name of a model on the Hugging Face hub (``ORG/NAME`` or ``ORG/NAME@REVISION``, downloaded into its cache),
            a module, or a state dict.
        headers_only: of a model on the hub fetch the headers alone; its catalog can be planned but not read.

    Raises:
        CheckpointError: if there is nothing to read; the message names the file.
        InputError: if ``source`` is none of these.

    Example:
        >>> catalog = open_checkpoint(nn.Linear(3, 2))
        >>> [(extent.name, extent.dtype, extent.shape) for extent in catalog.extents]
        [('weight', 'F32', (2, 3)), ('bias', 'F32', (2,))]
    """
    if isinstance(source, nn.Module | Mapping):
        return memory.catalog_of(source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"checkpoint needs a path, a hub name, a module or a state dict, got a {type(source).__name__}"
        )
    revision = None
    root = Path(source)
    named = hub.model_name(source)
    if named is not None:
        if headers_only:
            return hub.read_headers(named)
        root, revision = hub.fetch(named)
    catalog = Catalog(root, revision=revision or _commit(root))
    if is_folder(root):
        _add_folder(catalog, root)
    else:
        _add_path(catalog, root)
    if not catalog.extents:
        errors = list(dict.fromkeys(fault.error for fault in catalog.faults))[:MAX_NAMED]
        raise CheckpointError("; ".join(errors) or f"{root.name} holds no tensors")
    return catalog


def _add_folder(catalog: Catalog, folder: Path) -> None:
    names = _listing(folder)
    try:
        choice = choose(names, folder.name or str(folder))
    except CheckpointError as error:
        inner = [name for name in _listing(folder, folders=True)[:MAX_LOOKED_INTO] if _holds_weights(folder / name)]
        if not inner:
            raise
        raise CheckpointError(f"{error}; weights lie in its folders {listed(inner)}: name one of them") from None
    catalog.notes += choice.notes
    files = [folder / name for name in choice.names]
    if choice.kind == "index":
        _add_sharded(catalog, folder, files[0])
    elif choice.kind == "dcp":
        add_dcp(catalog, folder)
    elif choice.kind == "gguf":
        _add_splits(catalog, files[0])
    elif choice.kind == "meta":
        add_consolidated(catalog, folder, files)
    else:
        _add_files(catalog, files)
    _add_config(catalog, folder)
    if choice.kind == "adapter":
        catalog.config = {ADAPTER: read_json(folder / ADAPTER_CONFIG, CONFIG_LIMIT_BYTES), **catalog.config}
    read = {file.name for file in catalog.files} | set(choice.names)
    told = {word.strip(",:;()") for fault in catalog.faults for word in fault.error.split()}  # broken shards
    copies = [name for name in names if name.endswith(WEIGHTS) and name not in read | told]
    copies += [f"{name}/" for name in COPIES if is_folder(folder / name)]
    if copies:
        catalog.notes.append(f"also in the folder and not read: {listed(copies)}")


def _listing(folder: Path, folders: bool = False) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() is folders)
    except OSError as error:
        raise CheckpointError(f"{folder.name or folder} cannot be listed: {error.strerror}") from None


def _holds_weights(folder: Path) -> bool:
    try:
        return any(name.endswith((*WEIGHTS, DCP)) for name in _listing(folder))
    except CheckpointError:
        return False


def _add_path(catalog: Catalog, file: Path) -> None:
    folder = file.parent
    kind = next((name for suffix, name in OTHER_FORMATS.items() if file.name.endswith(suffix)), None)
    if is_index(file.name):
        _add_sharded(catalog, folder, file)
    elif file.name == DCP:
        add_dcp(catalog, folder)
    elif file.name == ADAPTER_CONFIG:
        _add_folder(catalog, folder)
        return
    elif file.suffix == SUFFIX:
        _add_splits(catalog, file)
    elif kind is not None:
        file_size(file)
        raise CheckpointError(f"{file.name}: {kind} files are not read; convert the checkpoint to safetensors")
    else:
        _add_files(catalog, [file])
    _add_config(catalog, folder)


def _add_files(catalog: Catalog, files: list[Path]) -> None:
    if len(files) > 1 and files[0].name.endswith(SAFETENSORS) and any(is_sharded(file) for file in files):
        add_sharded_safetensors(catalog, files)
        return
    for file in files:
        try:
            _add_file(catalog, file)
        except CheckpointError as error:
            if len(files) == 1:
                raise
            catalog.faults.append(Fault(file.name, str(error), whole_file=True))


def _add_file(catalog: Catalog, file: Path, shard_of: Mapping[str, str] | None = None) -> None:
    """Extents and faults of one file of weights, by what it starts with; an index tells which of two copies counts."""
    start = first_bytes(file)
    if start.startswith(MAGIC):
        extents, faults, settings = read_gguf(file)
        catalog.format = "gguf"
        catalog.config = catalog.config or config_of(settings)
    elif is_torch_zip(start):
        extents, faults = _of_torch(catalog, file)
    elif torch_legacy.is_legacy(start):
        catalog.format = "torch"
        memory.add_tensors(catalog, torch_legacy.load(file, "it was written by torch before version 1.6"), file)
        extents, faults = [], []
    elif file.name.endswith(TORCH) and start[8:9] != b"{":
        raise CheckpointError(
            f"{file.name} starts neither as a zip file of torch nor as its older format; "
            "fetch the file again, or convert the checkpoint to safetensors"
        )
    else:
        extents, faults = read_index(file)
    known = {extent.name: extent.file.name for extent in catalog.extents}
    stored: dict[tuple[object, ...], str] = {}
    for extent in extents:
        key = (extent.offset, extent.nbytes, extent.dtype, extent.shape, extent.strides)
        if extent.name in known:
            told = Path((shard_of or {}).get(extent.name, "")).name
            counts = f"that of {told} counts, as the index says" if told else "the first counts"
            error = f"{known[extent.name]} and {file.name} both hold {extent.name!a}; {counts}"
            faults.append(Fault(extent.name, error, extent.shape))
            if told == file.name:
                catalog.extents = [e for e in catalog.extents if e.name != extent.name] + [extent]
                known[extent.name] = file.name
        elif extent.nbytes and stored.setdefault(key, extent.name) != extent.name:
            catalog.tied[extent.name] = stored[key]
        else:
            catalog.extents.append(extent)
            known[extent.name] = file.name
    catalog.faults.extend(faults)
    catalog.files[file] = file_size(file)


def _of_torch(catalog: Catalog, file: Path) -> tuple[list[Extent], list[Fault]]:
    catalog.format = "torch"
    archive = read_torch_file(file)
    if archive.load is not None:
        memory.add_tensors(catalog, torch_legacy.load(file, archive.load, archive.nbytes), file)
        return [], []
    placed = [
        place(name, stored, archive, file)
        for name, stored in model_tensors(archive.found, Stored, catalog.notes)
        if isinstance(stored, Stored)
    ]
    return [p for p in placed if isinstance(p, Extent)], [p for p in placed if isinstance(p, Fault)]


def _add_sharded(catalog: Catalog, folder: Path, index: Path) -> None:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map that names shards")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index.name}: weight_map gives no file name for {ascii(name)[:80]}")
        shards.setdefault(shard, []).append(name)

    outside = [shard for shard in shards if not inside(shard, WEIGHTS)]
    within = [shard for shard in shards if inside(shard, WEIGHTS)]
    missing = [shard for shard in within if not (folder / shard).exists()]
    if missing:  # all of them at once, before any read
        also = f"{len(missing)} of {len(shards)} shards are missing: {listed(missing)}"
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
    for shard in within:
        if shard in missing:
            continue
        try:
            _add_file(catalog, folder / shard, weight_map)
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
        if name not in accounted and name not in catalog.tied:
            catalog.faults.append(
                Fault(name, f"{index.name} places {ascii(name)[:80]} in {shard}, which does not hold it")
            )
    extra = [extent.name for extent in catalog.extents if extent.name not in weight_map]
    if extra:
        catalog.notes.append(f"{len(extra)} tensors are in the shards but not in {index.name}")


def _add_splits(catalog: Catalog, file: Path) -> None:
    """All files of a GGUF model that is split; what is missing is named at once."""
    catalog.format = "gguf"
    names = split_names(file.name)
    there = [name for name in names if (file.parent / name).exists()]
    missing = [name for name in names if name not in there]
    if missing and there:
        error = f"{len(missing)} of {len(names)} files of the model are missing: {listed(missing)}"
        catalog.faults += [Fault(name, error, whole_file=True) for name in missing[:MAX_NAMED]]
    _add_files(catalog, [file.parent / name for name in there] or [file])


def _add_config(catalog: Catalog, folder: Path) -> None:
    file = folder / CONFIG
    if file.exists():
        try:
            catalog.config = {**catalog.config, **read_json(file, CONFIG_LIMIT_BYTES)}
            catalog.config_digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except (CheckpointError, OSError) as error:
            catalog.notes.append(f"the configuration was ignored: {error}")
    catalog.quantization = _quantization(catalog, folder)
    names = {extent.name for extent in catalog.extents} | {fault.name for fault in catalog.faults} | set(catalog.tied)
    heads = any(name.endswith(("lm_head.weight", "output.weight", "embed_out.weight")) for name in names)
    if not heads and (catalog.config.get("tie_word_embeddings") is True or "token_embd.weight" in names):
        catalog.notes.append("the head is tied to the embedding and stored once")


def _quantization(catalog: Catalog, folder: Path) -> Mapping[str, object]:
    """How weights are quantised: inside config.json, or in a file of its own beside it."""
    inner = catalog.config.get("text_config")
    for place_of in (catalog.config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            found = place_of.get(key)
            if isinstance(found, dict) and found:
                return found
    for name, method in QUANTIZE_CONFIGS.items():
        if (folder / name).exists():
            try:
                return {"quant_method": method, **read_json(folder / name, CONFIG_LIMIT_BYTES)}
            except CheckpointError as error:
                catalog.notes.append(f"the configuration was ignored: {shown(str(error))}")
    return {}


def _commit(root: Path) -> str | None:
    """The commit of a snapshot in the cache of the hub, by its path; None elsewhere."""
    for path in (root, root.parent):
        if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name):
            return path.name
    return None

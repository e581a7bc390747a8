"""A folder of torch.distributed.checkpoint as byte extents: each tensor's chunks become pieces of one extent.

Layout (torch/distributed/checkpoint/{metadata,filesystem}.py): ``.metadata`` is a pickle of dataclasses, which torch
itself unpickles without restriction and which is only walked here; ``__R_S.distcp`` holds the chunks, each a torch zip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog, Extent, Fault
from orthofast.scan.readers.chunks import add_joined
from orthofast.scan.readers.files import MAX_AXES, file_size, first_bytes, inside, listed, naturals, shown
from orthofast.scan.readers.pickle_walk import MAX_PICKLE_BYTES, Global, Made, walk
from orthofast.scan.readers.state_dicts import model_tensors
from orthofast.scan.readers.torch_file import PLAIN_OBJECTS, TORCH_NAMES, Stored, place, read_archive

METADATA = ".metadata"
OWN = "torch.distributed.checkpoint."
ALLOWED = frozenset(
    {
        f"{OWN}metadata.{name}"
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {f"{OWN}filesystem._StorageInfo", "torch.Size", "torch.serialization._get_layout", "torch.device"}
    | {f"torch.{name}" for name in ("strided", "contiguous_format", "preserve_format", "complex128")}
    | {f"torch.{name}" for name in TORCH_NAMES}
    | {"builtins.set", "builtins.dict", "builtins.list"}
    | PLAIN_OBJECTS
)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A block of a tensor: where it belongs and where it lies."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    relative_path: str
    offset: int
    length: int


@dataclass(slots=True, eq=False)
class _Tensor:
    """A tensor of the metadata: its chunks, then the extents found for them, by origin."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    chunks: list[_Chunk] = field(default_factory=list)
    placed: dict[tuple[int, ...], Extent] = field(default_factory=dict)
    why: str | None = None


def add_dcp(catalog: Catalog, folder: Path) -> None:
    """Put the tensors of a distributed checkpoint into a catalog.

    Raises:
        CheckpointError: if its metadata cannot be trusted or no file of it is there.
    """
    catalog.format = "dcp"
    file = folder / METADATA
    what = f"{folder.name or folder}/{METADATA}"
    if file_size(file) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{what} holds more than the {MAX_PICKLE_BYTES} bytes metadata may have")
    first_bytes(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {error.strerror}") from None
    build = {"torch.Size": lambda *args: tuple(args[0]) if args else ()}
    found = walk(content, what, refuse=_refusal, build=build)
    state = _state(found)
    if not isinstance(found, Made) or found.path != f"{OWN}metadata.Metadata":
        raise CheckpointError(f"{what} is no metadata of a distributed checkpoint")
    tensors = _model_part(catalog, state)
    _add_chunks(tensors, state.get("storage_data"))
    _refuse_paths(catalog, folder, tensors)
    _place(catalog, folder, tensors)
    for name, tensor in tensors.items():
        where = folder.name or str(folder)
        if tensor.why is not None:
            catalog.faults.append(Fault(name, f"{where}: {shown(name)} {tensor.why}", tensor.shape))
        else:
            add_joined(catalog, name, where, tensor.dtype, tensor.shape, tensor.placed)


def _refusal(path: str) -> str | None:
    if path in ALLOWED:
        return None
    return f"asks for {shown(path)}, which metadata does not need; nothing of it was run, and the folder is not read"


def _state(value: object) -> dict[str, object]:
    """Attributes of a recorded object; empty for anything else."""
    state = value.state if isinstance(value, Made) else None
    if isinstance(state, tuple) and len(state) == 2:
        state = state[1]
    return {k: v for k, v in state.items() if isinstance(k, str)} if isinstance(state, dict) else {}


def _model_part(catalog: Catalog, state: dict[str, object]) -> dict[str, _Tensor]:
    """The model's tensors by name: keys of the saved dictionary tell wrappers and optimizer states."""
    described, planned = state.get("state_dict_metadata"), state.get("planner_data")
    if not isinstance(described, dict):
        raise CheckpointError(f"{METADATA} describes no tensors")
    nested: dict[str, object] = {}
    for fqn, value in described.items():
        if not isinstance(fqn, str) or not isinstance(value, Made) or not value.path.endswith("TensorStorageMetadata"):
            continue
        path = planned.get(fqn) if isinstance(planned, dict) else None
        words = [str(word) for word in path if isinstance(word, str | int)] if isinstance(path, tuple) else [fqn]
        if len(words) < 2:
            nested[fqn] = _described(fqn, value)
            continue
        inner = nested.setdefault(words[0], {})
        if isinstance(inner, dict):
            inner[".".join(words[1:])] = _described(fqn, value)
    found = model_tensors(nested, _Tensor, catalog.notes)
    return {name: tensor for name, tensor in found if isinstance(tensor, _Tensor)}


def _described(fqn: str, value: Made) -> _Tensor:
    state = _state(value)
    properties = state.get("properties")
    inner = properties.state if isinstance(properties, Made) else None
    kind = inner[0] if isinstance(inner, tuple) and inner else inner.get("dtype") if isinstance(inner, dict) else None
    dtype = TORCH_NAMES.get(kind.path.removeprefix("torch.")) if isinstance(kind, Global) else None
    shape = naturals(state.get("size"))
    tensor = _Tensor(fqn, dtype or "", shape or ())
    if shape is None or len(shape) > MAX_AXES:
        tensor.why = "has no usable shape"
    elif dtype is None:
        tensor.why = "has a type that is not read"
    chunks = state.get("chunks")
    for chunk in chunks if isinstance(chunks, list) else []:
        block = _state(chunk)
        origin, sizes = naturals(block.get("offsets")), naturals(block.get("sizes"))
        if sizes is not None and 0 in sizes and 0 not in tensor.shape:
            continue  # a rank that holds nothing
        if origin is None or sizes is None or len(origin) != len(tensor.shape) or len(sizes) != len(origin):
            tensor.why = tensor.why or "has a chunk without usable offsets"
            break
        tensor.chunks.append(_Chunk(origin, sizes, "", 0, 0))
    return tensor


def _add_chunks(tensors: dict[str, _Tensor], storage_data: object) -> None:
    """Give every chunk its place in a file."""
    places: dict[tuple[str, tuple[int, ...] | None], dict[str, object]] = {}
    for index, info in storage_data.items() if isinstance(storage_data, dict) else ():
        key = _state(index)
        fqn, offset = key.get("fqn"), naturals(key.get("offset"))
        if isinstance(fqn, str):
            places[fqn, offset] = _state(info)
    for tensor in tensors.values():
        chunks, tensor.chunks = tensor.chunks, []
        for chunk in chunks:
            info = places.get((tensor.fqn, chunk.origin)) or (
                places.get((tensor.fqn, None)) if len(chunks) == 1 else None
            )
            if info is None:
                tensor.why = tensor.why or f"has no stored bytes for its chunk at {list(chunk.origin)}"
                break
            path, span = info.get("relative_path"), naturals([info.get("offset"), info.get("length")])
            if not isinstance(path, str) or span is None:
                tensor.why = tensor.why or "has a chunk without a usable place"
                break
            if info.get("transform_descriptors"):
                tensor.why = tensor.why or "is stored through an extension such as compression, which is not read"
                break
            tensor.chunks.append(_Chunk(chunk.origin, chunk.shape, path, *span))


def _refuse_paths(catalog: Catalog, folder: Path, tensors: dict[str, _Tensor]) -> None:
    """Faults for all missing files at once and for names that lead outside, before any is opened."""
    paths = sorted({chunk.relative_path for tensor in tensors.values() for chunk in tensor.chunks})
    outside = {path for path in paths if not inside(path, ("",))}
    missing = {path for path in paths if path not in outside and not (folder / path).exists()}
    also = f"{len(missing)} of {len(paths)} files are missing: {listed(sorted(missing))}"
    if paths and len(missing) == len(paths):
        raise CheckpointError(f"{folder.name or folder}: {also}")
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            if chunk.relative_path in outside:
                tensor.why = f"names the file {shown(chunk.relative_path)}, which leads outside; it was not opened"
            elif chunk.relative_path in missing:
                tensor.why = tensor.why or f"needs {chunk.relative_path} ({also})"


def _place(catalog: Catalog, folder: Path, tensors: dict[str, _Tensor]) -> None:
    """Find each chunk's bytes inside its small zip, file by file."""
    by_file: dict[str, list[tuple[_Tensor, _Chunk]]] = {}
    for tensor in tensors.values():
        if tensor.why is None:
            for chunk in tensor.chunks:
                by_file.setdefault(chunk.relative_path, []).append((tensor, chunk))
    for path, wanted in sorted(by_file.items()):
        file = folder / path
        try:
            size = file_size(file)
            catalog.files[file] = size
            with file.open("rb") as handle:
                for tensor, chunk in sorted(wanted, key=lambda pair: pair[1].offset):
                    if chunk.offset + chunk.length > size:
                        tensor.why = f"lies behind the end of {file.name}, which is truncated; fetch the file again"
                        continue
                    try:
                        archive = read_archive(handle, chunk.offset, chunk.length, f"{path} at byte {chunk.offset}")
                    except CheckpointError as error:
                        tensor.why = f"cannot be read: {error}"
                        continue
                    stored = archive.found
                    if archive.load is not None:
                        tensor.why = f"is stored in {file.name} in a way that is not read: {archive.load}"
                    elif not isinstance(stored, Stored) or stored.shape != chunk.shape or stored.dtype != tensor.dtype:
                        tensor.why = f"is not what {file.name} holds at byte {chunk.offset}"
                    else:
                        found = place(tensor.fqn, stored, archive, file, chunk.offset)
                        if isinstance(found, Fault):
                            tensor.why = f"cannot be read: {found.error}"
                        else:
                            tensor.placed[chunk.origin] = found
        except (CheckpointError, OSError) as error:
            for tensor, _ in wanted:
                tensor.why = f"cannot be read: {error}"

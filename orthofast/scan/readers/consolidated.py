"""Meta's consolidated.NN.pth: shards of a model-parallel run, joined as their layers were cut.

Which axis a layer is cut along is what fairscale's layers in meta-llama/llama ``model.py`` say: ColumnParallelLinear
keeps rows, RowParallelLinear columns. The embedding was cut along either axis in different releases: ``dim`` of
params.json tells.
"""

from __future__ import annotations

from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog, Extent, Fault, Piece
from orthofast.scan.readers.files import file_size, read_json, shown
from orthofast.scan.readers.folder import PARAMS
from orthofast.scan.readers.state_dicts import model_tensors
from orthofast.scan.readers.torch_file import Archive, Stored, place, read_torch_file

ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight", "wq.bias", "wk.bias")
COLUMNS = ("wo.weight", "w2.weight")
EMBEDDING = "tok_embeddings.weight"
REPEATED = ("norm.weight", "rope.freqs")


def add_consolidated(catalog: Catalog, folder: Path, files: list[Path]) -> None:
    """Put the joined tensors of all shards into a catalog.

    Raises:
        CheckpointError: if params.json is missing, or the shards are not those of one model.
    """
    catalog.format = "torch"
    if not (folder / PARAMS).exists():
        raise CheckpointError(
            f"{folder.name or folder} holds {len(files)} consolidated shards but no {PARAMS}, "
            "which tells how they are cut"
        )
    dim = read_json(folder / PARAMS).get("dim")
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise CheckpointError(f"{PARAMS} gives no dim, which tells how the shards are cut")
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if [file.name for file in files] != expected:
        raise CheckpointError(
            f"{folder.name or folder}: of the shards {expected[0]} to {files[-1].name} some are missing"
        )
    shards = [_shard(file) for file in files]
    catalog.files |= {file: file_size(file) for file in files}
    names = list(dict.fromkeys(name for tensors, _ in shards for name in tensors))
    for name in names:
        joined = _joined(name, shards, files, dim)
        if isinstance(joined, Fault):
            catalog.faults.append(joined)
        else:
            catalog.extents.append(joined)


def _shard(file: Path) -> tuple[dict[str, Stored], Archive]:
    archive = read_torch_file(file)
    if archive.load is not None:
        raise CheckpointError(f"{file.name} cannot be read where it lies: {archive.load}")
    return {n: t for n, t in model_tensors(archive.found, Stored) if isinstance(t, Stored)}, archive


def _joined(name: str, shards: list[tuple[dict[str, Stored], Archive]], files: list[Path], dim: int) -> Extent | Fault:
    parts: list[Extent] = []
    for (tensors, archive), file in zip(shards, files, strict=True):
        if name not in tensors:
            return Fault(name, f"{file.name} does not hold its part of {shown(name)}")
        placed = place(name, tensors[name], archive, file)
        if isinstance(placed, Fault):
            return placed
        parts.append(placed)
    first = parts[0]
    if name.endswith(REPEATED):
        return first
    axis = _axis(name, first.shape, dim, len(parts))
    if axis is None:
        return Fault(name, f"{first.file.name}: no rule tells how {shown(name)} is cut into shards", first.shape)
    if any(part.strides is not None or part.dtype != first.dtype or part.shape != first.shape for part in parts):
        return Fault(name, f"{first.file.name}: the parts of {shown(name)} do not fit together", first.shape)
    step = first.shape[axis]
    shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))
    pieces = tuple(
        Piece(
            part.file,
            part.offset,
            part.nbytes,
            tuple(k * step if i == axis else 0 for i in range(len(shape))),
            part.shape,
        )
        for k, part in enumerate(parts)
    )
    return Extent(name, first.file, first.offset, sum(p.nbytes for p in pieces), first.dtype, shape, None, pieces)


def _axis(name: str, shape: tuple[int, ...], dim: int, shards: int) -> int | None:
    """The axis the tensor is cut along, where its whole size proves it; None if it does not."""
    if name.endswith(EMBEDDING) and len(shape) == 2:
        return 0 if shape[1] == dim else 1 if shape[1] * shards == dim else None
    if name.endswith(ROWS):
        return 0 if len(shape) == 1 or shape[1] == dim else None
    if name.endswith(COLUMNS) and len(shape) == 2:
        return 1 if shape[0] == dim else None
    return None

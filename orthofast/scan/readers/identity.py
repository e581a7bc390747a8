"""What tells files and tensors apart: a file's size, time and header; tensors whose bytes are the same."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog, Extent

END_BYTES = 4096  # read of each candidate's ends before anything else
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Enough to notice that a file is not the one it was.

    Attributes:
        nbytes: its size.
        mtime_ns: time of its last change.
        header_sha256: digest of all that its header says: names, places, types, shapes.
    """

    nbytes: int
    mtime_ns: int
    header_sha256: str


def file_identities(catalog: Catalog) -> dict[Path, FileIdentity]:
    """The identity of each file of a catalog; no tensor is read.

    Raises:
        CheckpointError: if a file is gone.
    """
    digests = {file: hashlib.sha256() for file in catalog.files}
    for extent in catalog.extents:
        for file, offset, nbytes, origin, shape in _places(extent):
            if file in digests:
                line = (extent.name, offset, nbytes, extent.dtype, extent.shape, extent.strides, origin, shape)
                digests[file].update(repr(line).encode() + b"\n")
    found = {}
    for file, digest in digests.items():
        try:
            status = os.stat(file)
        except OSError as error:
            raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
        found[file] = FileIdentity(status.st_size, status.st_mtime_ns, digest.hexdigest())
    return found


def same_bytes(catalog: Catalog) -> dict[str, str]:
    """Matrices whose stored bytes equal those of an earlier one -> that one's name.

    Candidates share type, shape and size; then their ends are read, and only where these agree all their bytes.
    Vectors, tensors in several pieces or in memory, and what cannot be read are left out.
    """
    groups: dict[tuple[object, ...], list[Extent]] = {}
    for extent in catalog.extents:
        if len(extent.shape) > 1 and extent.nbytes and not extent.pieces and extent.name not in catalog.memory:
            groups.setdefault((extent.dtype, extent.shape, extent.nbytes, extent.strides), []).append(extent)
    for whole in (False, True):
        finer: dict[tuple[object, ...], list[Extent]] = {}
        for key, extents in groups.items():
            for extent in extents if len(extents) > 1 else ():
                digest = _digest(extent, whole)
                if digest is not None:
                    finer.setdefault((*key, digest), []).append(extent)
        groups = finer
    order = {extent.name: i for i, extent in enumerate(catalog.extents)}
    pairs = [(extent.name, extents[0].name) for extents in groups.values() for extent in extents[1:]]
    return dict(sorted(pairs, key=lambda pair: order[pair[0]]))


def _places(extent: Extent) -> list[tuple[Path, int, int, tuple[int, ...], tuple[int, ...]]]:
    if extent.pieces:
        return [(piece.file, piece.offset, piece.nbytes, piece.origin, piece.shape) for piece in extent.pieces]
    return [(extent.file, extent.offset, extent.nbytes, (), extent.shape)]


def _digest(extent: Extent, whole: bool) -> bytes | None:
    """SHA-256 of a tensor's bytes, or of its ends; None if it cannot be read."""
    digest = hashlib.sha256()
    first, last = extent.offset, extent.offset + extent.nbytes
    spans = [(first, last)] if whole else [(first, min(first + END_BYTES, last)), (max(first, last - END_BYTES), last)]
    try:
        with extent.file.open("rb", buffering=0) as handle:
            for start, stop in spans:
                handle.seek(start)
                rest = stop - start
                while rest:
                    block = handle.read(min(BLOCK_BYTES, rest))
                    if not block:
                        return None
                    digest.update(block)
                    rest -= len(block)
    except OSError:
        return None
    return digest.digest()

"""Stored bytes read by position: where the parts of weights lie in one piece of memory, and the reads that fill it.

Files are never mapped: a file that shrinks would end the process, and on network disks a page fault at a time is slow.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import TORCH_DTYPES, Extent, Piece
from orthofast.scan.weights import Weight

READ_BYTES = 16 << 20  # one positional read
ALIGNMENT = 64  # of a part inside the memory: views of any dtype, whole cache lines
# stored types that are no vectors by themselves, but parts of quantised weights; what is not here comes as bytes
STORED = TORCH_DTYPES | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of one weight that lie together in a file.

    Attributes:
        weight: index of the weight in the layout.
        name: of the stored tensor, for sentences.
        file: the file.
        offset: first byte in it.
        nbytes: how many.
        at: first byte in the memory.
    """

    weight: int
    name: str
    file: Path
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the stored parts of some weights lie in one piece of memory.

    Attributes:
        nbytes: size of the memory.
        places: for each weight: role of a part -> its first byte; parts that are in memory already are left out.
        segments: the reads that fill it, in ascending order of ``at``.
    """

    nbytes: int
    places: tuple[dict[str, int], ...]
    segments: tuple[Segment, ...]

    def windows(self, size: int) -> Iterator[tuple[int, int, list[Segment]]]:
        """The memory cut into spans of at most ``size`` bytes, each with the reads inside it: (start, stop, reads)."""
        start, found = 0, list[Segment]()
        for segment in self.segments:
            at, done = segment.at, 0
            while done < segment.nbytes:
                if at + done >= start + size:
                    if found:
                        yield start, found[-1].at + found[-1].nbytes, found
                    start, found = at + done, []
                count = min(segment.nbytes - done, start + size - at - done)
                found.append(replace(segment, offset=segment.offset + done, nbytes=count, at=at + done))
                done += count
        if found:
            yield start, found[-1].at + found[-1].nbytes, found


def lay_out(weights: Sequence[Weight], memory: Collection[str] = ()) -> Layout:
    """Place the parts of weights one behind the other.

    Args:
        weights: in reading order.
        memory: names of tensors that need no reading.
    """
    at = 0
    places: list[dict[str, int]] = []
    segments: list[Segment] = []
    for index, weight in enumerate(weights):
        placed: dict[str, int] = {}
        for role, extent in weight.parts.items():
            if extent.name in memory:
                continue
            at = -(-at // ALIGNMENT) * ALIGNMENT
            placed[role] = at
            for piece, start in _starts(extent):
                segments.append(Segment(index, extent.name, piece.file, piece.offset, piece.nbytes, at + start))
            at += extent.nbytes
        places.append(placed)
    segments.sort(key=lambda segment: segment.at)  # pieces come in any order
    return Layout(at, tuple(places), tuple(segments))


def stored_tensor(memory: Tensor, extent: Extent) -> Tensor:
    """One stored tensor as a view of its bytes; only blocks of columns kept apart are copied together.

    Args:
        memory: the extent's bytes, (nbytes,) uint8, on any device.
        extent: what they are.

    Returns:
        A tensor of the extent's dtype and shape; (nbytes,) uint8 for types that torch has not.

    Raises:
        CheckpointError: if strides lead outside the bytes.
    """
    dtype = STORED.get(extent.dtype)
    if dtype is None:
        return memory
    if extent.pieces and not _is_stack(extent):
        whole = torch.empty(extent.shape, dtype=dtype, device=memory.device)
        for piece, start in _starts(extent):
            place = tuple(slice(o, o + size) for o, size in zip(piece.origin, piece.shape, strict=True))
            whole[place] = memory[start : start + piece.nbytes].view(dtype).view(piece.shape)
        return whole
    flat = memory.view(dtype)
    if extent.strides is not None:
        last = sum((size - 1) * step for size, step in zip(extent.shape, extent.strides, strict=True))
        if 0 not in extent.shape and not 0 <= last < flat.numel():
            raise CheckpointError(f"{extent.file.name}: the strides of {extent.name!a} leave its {extent.nbytes} bytes")
    return flat.view(extent.shape) if extent.strides is None else flat.as_strided(extent.shape, extent.strides)


def scratch_bytes(weight: Weight) -> int:
    """Bytes that putting a weight's pieces together needs beside the stored ones."""
    return sum(extent.nbytes for extent in weight.parts.values() if extent.pieces and not _is_stack(extent))


def _starts(extent: Extent) -> Iterator[tuple[Piece, int]]:
    """Each place an extent lies in, and where its bytes go in the extent's memory."""
    if not extent.pieces:
        yield Piece(extent.file, extent.offset, extent.nbytes, (0,) * len(extent.shape), extent.shape), 0
        return
    stack, at = _is_stack(extent), 0
    for piece in extent.pieces:
        yield piece, piece.origin[0] * (piece.nbytes // max(piece.shape[0], 1)) if stack else at
        at += piece.nbytes


def _is_stack(extent: Extent) -> bool:
    """Whether the pieces are blocks of whole rows, which need no putting together."""
    return bool(extent.shape) and all(
        piece.shape[1:] == extent.shape[1:] and not any(piece.origin[1:]) for piece in extent.pieces
    )


class Files:
    """Open files, shared by reader threads and closed together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[Path, int | CheckpointError] = {}
        self._large: set[int] = set()  # descriptors of files that would fill the page cache
        self._half_memory = _memory_bytes() // 2

    def read(self, segment: Segment, into: memoryview) -> None:
        """Read the bytes of a segment.

        Raises:
            CheckpointError: if the file ends early or cannot be read.
        """
        file, name = segment.file.name, segment.name
        descriptor = self._open(segment.file)
        done = 0
        while done < segment.nbytes:
            try:
                count = os.preadv(descriptor, [into[done : done + READ_BYTES]], segment.offset + done)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read at {name!a}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{file} became shorter while it was read: {name!a} is incomplete")
            done += count
        if descriptor in self._large:  # read once: what others cached is worth more
            os.posix_fadvise(descriptor, segment.offset, segment.nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close every file; nobody may read any more."""
        with self._lock:
            for descriptor in self._opened.values():
                if isinstance(descriptor, int):
                    os.close(descriptor)
            self._opened.clear()

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._opened:
                try:
                    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    self._opened[file] = CheckpointError(f"{file.name} cannot be read: {error.strerror}")
                else:
                    self._opened[file] = descriptor
                    if hasattr(os, "posix_fadvise") and os.fstat(descriptor).st_size > self._half_memory:
                        self._large.add(descriptor)
            found = self._opened[file]
        if isinstance(found, CheckpointError):
            raise found
        return found


def _memory_bytes() -> int:
    """Physical memory; what cannot be asked counts as endless."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62

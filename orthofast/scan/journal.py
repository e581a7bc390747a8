"""What a scan has finished, one line per weight, so that a scan that ended early can go on where it stopped.

A line is written in one piece when a weight's rows are known; whoever kills the process loses the weights under way.
A line is used again when its key agrees: the bytes of the weight lie where they lay in files that did not change, and
what decides the numbers is the same. Python writes a float in the digits that give the same float back.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orthofast.errors import InputError
from orthofast.scan.catalog import Extent
from orthofast.scan.plan import Item, Plan
from orthofast.scan.result import Row

try:
    import fcntl
except ImportError:  # no locks between processes there
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
RANK_SUFFIX = ".rank"  # and its number: the journal of one rank of a team
TUPLES = ("max_pair", "histogram", "tied")  # fields of a row that JSON knows only as lists


class Journal:
    """An append-only file of finished weights.

    Args:
        path: the file; made if it is not there.
        settings: everything that decides the numbers beside the stored bytes: options, versions, instruction set.
        memory: names of tensors that were in memory when the checkpoint was opened.
        resume: use what an earlier scan has finished; without it a file that is there is refused.

    Raises:
        InputError: if it cannot be written, is in use, or is there and ``resume`` is False.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, object],
        *,
        memory: Collection[str] = (),
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        self.finished: dict[str, list[Row]] = {}  # by key
        self._salt, self._memory = _digest(settings), memory
        self._files: dict[Path, str] = {}
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | (0 if resume else os.O_EXCL)
        try:
            self._descriptor = os.open(self.path, flags, 0o644)
        except FileExistsError:
            raise InputError(
                f"the journal {self.path} is there already: go on with it (resume), or remove it to start anew"
            ) from None
        except OSError as error:
            raise InputError(f"the journal {self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._load()
        except BaseException:
            os.close(self._descriptor)
            raise

    def key(self, item: Item) -> str:
        """What a line must agree with: the weight's bytes and matrices, its files, and the settings.

        Raises:
            InputError: if the weight is in memory, where nothing tells whether it changed.
        """
        parts = {role: self._place(extent) for role, extent in item.weight.parts.items()}
        described = {
            "parts": parts,
            "weight": [item.weight.name, list(item.weight.shape), item.weight.coding, repr(item.weight.settings)],
            "matrices": [asdict(matrix) for matrix in item.matrices],
            "settings": self._salt,
        }
        return _digest(described)

    def rows(self, item: Item) -> list[Row] | None:
        """The rows of a weight that is finished, None for one that is not."""
        return self.finished.get(self.key(item))

    def add(self, item: Item, rows: Iterable[Row]) -> None:
        """Write down that a weight is finished.

        Raises:
            InputError: if the line cannot be written.
        """
        document = {"key": self.key(item), "name": item.weight.name, "rows": [asdict(row) for row in rows]}
        self._write(document)

    def read_others(self, path: Path) -> None:
        """Use the journals of an earlier scan that other ranks, or one process alone, wrote beside ``path``."""
        for other in (path, *_of_ranks(path)):
            if other != self.path and other.is_file():
                self._take(other.read_bytes())

    def close(self) -> None:
        """Let others use the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _place(self, extent: Extent) -> list[object]:
        pieces = [[p.file.name, p.offset, p.nbytes, p.origin, p.shape] for p in extent.pieces]
        if extent.name in self._memory and not extent.file.is_file():
            raise InputError(f"a journal needs a checkpoint in files, but {extent.name!a} is a value in memory")
        files = sorted({self._identity(p.file) for p in extent.pieces} or {self._identity(extent.file)})
        return [extent.name, files, extent.offset, extent.nbytes, extent.dtype, extent.shape, extent.strides, pieces]

    def _identity(self, file: Path) -> str:
        """Name, size, time of the last change; of a link those of its target, whose name is a hash on the hub."""
        known = self._files.get(file)
        if known is None:
            try:
                status = file.stat()
            except OSError:
                known = f"{file.name}: absent"
            else:
                known = f"{file.name}: {file.resolve().name}, {status.st_size} bytes, {status.st_mtime_ns} ns"
            self._files[file] = known
        return known

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError:
            raise InputError(f"the journal {self.path} is being written by another scan; wait for it to end") from None
        except OSError:
            pass  # a file system without locks

    def _load(self) -> None:
        content = self.path.read_bytes()
        self._take(content)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the last line was torn: what follows must not be joined to it
            os.ftruncate(self._descriptor, whole)
            content = content[:whole]
        if not content:
            self._write({"orthofast_journal": FORMAT})

    def _take(self, content: bytes) -> None:
        for line in content.split(b"\n")[:-1]:
            entry = _parsed(line)
            if entry is not None and all(row.error is None for row in entry[1]):  # what failed is tried again
                self.finished[entry[0]] = entry[1]

    def _write(self, document: Mapping[str, object]) -> None:
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(None, "no space left")
        except OSError as error:
            raise InputError(
                f"the journal {self.path} cannot be written: {error.strerror}; what it holds can be resumed"
            ) from None


def discard(path: str | os.PathLike[str]) -> None:
    """Remove a journal whose result is written, and those of the ranks of a team beside it."""
    for file in (Path(path), *_of_ranks(Path(path))):
        file.unlink(missing_ok=True)


def _of_ranks(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}{RANK_SUFFIX}*"))


def plan_digest(plan: Plan, settings: Mapping[str, object]) -> str:
    """What the ranks of a team must agree on; not the times of files, which differ between machines."""
    weights = [
        [w.name, w.shape, w.coding, w.nbytes, w.first.offset, repr(w.settings)]
        for w in (item.weight for item in plan.items)
    ]
    return _digest({"weights": weights, "settings": settings})


def row_from(fields: Mapping[str, Any]) -> Row:
    """A row from what ``asdict`` and JSON made of it."""
    values = dict(fields)
    for name in TUPLES:
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return Row(**values)


def _parsed(line: bytes) -> tuple[str, list[Row]] | None:
    """Key and rows of a whole line; None for the first line, and for what was torn or spoilt."""
    try:
        document = json.loads(line)
        return str(document["key"]), [row_from(fields) for fields in document["rows"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _digest(document: object) -> str:
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

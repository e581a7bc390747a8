"""A weight and the stored tensors it is decoded from; the list of stored tensors while they are joined."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import TORCH_DTYPES, Catalog, Extent, Fault

PLAIN = "plain"
FLOAT8 = frozenset(name for name in TORCH_DTYPES if name.startswith("F8"))
FLOATS = frozenset(TORCH_DTYPES)
MAX_DESCRIPTION_BYTES = 1 << 16  # what is read of a tensor that only describes another
# stored name -> the dtype a decoder sees; powers of two stay the exponents they are stored as
PART_DTYPES: dict[str, torch.dtype] = TORCH_DTYPES | {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.int32,
    "I64": torch.int64,
    "F8_E8M0": torch.uint8,
}

Rows = Callable[[int, int], Tensor]  # values of a range of the first axis


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as the model has it, and the extents it is decoded from.

    Attributes:
        name: as the unquantised model would name it, such as "layers.0.q_proj.weight".
        shape: sizes of the decoded weight, in the orientation of the unquantised model.
        coding: how it is stored: "plain", or one of the names in ``decoders.CODINGS``.
        parts: role of the part in the coding -> its extent; a plain weight has the part "weight".
        settings: what the coding needs to know beside the parts, such as the bits of a value.
    """

    name: str
    shape: tuple[int, ...]
    coding: str
    parts: Mapping[str, Extent]
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(extent.nbytes for extent in self.parts.values())

    @property
    def first(self) -> Extent:
        """The largest part: where the weight lies in the reading order."""
        return max(self.parts.values(), key=lambda extent: extent.nbytes)

    def number(self, setting: str) -> int:
        """A setting that is a whole number."""
        value = self.settings[setting]
        assert isinstance(value, int)
        return value

    def numbers(self, setting: str) -> tuple[int, ...]:
        """A setting that is several whole numbers."""
        value = self.settings[setting]
        assert isinstance(value, tuple)
        return value


@dataclass(slots=True)
class Weights:
    """All weights of a checkpoint, and the stored tensors that are none.

    Attributes:
        found: weights that can be decoded.
        skipped: (name, reason) of stored tensors that are no weights or are stored in an unsupported way.
        faults: weights whose parts contradict each other or are missing.
    """

    found: list[Weight] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Stored:
    """The tensors of a catalog that no weight has taken yet; a companion may lie in any file of the checkpoint."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.weights = Weights()
        self.left = {extent.name: extent for extent in catalog.extents}
        self._modules: dict[str, list[str]] = {}
        for name in self.left:
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)
        self._opened: dict[Path, BinaryIO] = {}
        self._broken = {fault.name: fault.error for fault in catalog.faults if not fault.whole_file}

    def ending(self, *suffixes: str) -> Iterator[tuple[str, Extent]]:
        """(name without the suffix, extent) of the tensors left, in the order of the catalog."""
        for name, extent in list(self.left.items()):
            for suffix in suffixes:
                if name.endswith(suffix) and name in self.left:
                    yield name[: len(name) - len(suffix)], extent
                    break

    def first(self, *names: str) -> Extent | None:
        """The first of these tensors that is there."""
        return next((self.left[name] for name in names if name in self.left), None)

    def need(self, *names: str) -> Extent:
        """A tensor that a weight cannot do without: the first of these names that is there.

        Raises:
            CheckpointError: if none is.
        """
        extent = self.first(*names)
        if extent is not None:
            return extent
        known = [self._broken[name] for name in names if name in self._broken]
        raise CheckpointError(": ".join([f"{' or '.join(names)} is missing", *known[:1]]))

    def join(self, name: str, shape: tuple[int, ...] | None, names: Iterable[str], make: Callable[[], Weight]) -> None:
        """Add the weight that ``make`` returns, or the fault it raises; ``names`` are taken in both cases.

        Those of them that are not read with the weight, such as descriptions, are listed as skipped.
        """
        own = [each for each in dict.fromkeys(names) if each in self.left]
        try:
            weight = make()
        except CheckpointError as error:
            self.weights.faults.append(Fault(name, f"{name} cannot be decoded: {error}", shape))
            read = set(own)
        else:
            self.weights.found.append(weight)
            read = {extent.name for extent in weight.parts.values()}
        self.skip((each for each in own if each not in read), f"belongs to {name}, which is decoded without reading it")
        for each in read:
            self.left.pop(each, None)

    def skip(self, names: Iterable[str], reason: str) -> None:
        """List tensors as skipped."""
        for name in list(names):
            if self.left.pop(name, None) is not None:
                self.weights.skipped.append((name, reason))

    def skip_module(self, module: str, reason: str) -> None:
        """List all tensors directly inside a module as skipped."""
        self.skip(self.inside(module), reason)

    def inside(self, module: str) -> list[str]:
        """Names of the tensors left directly inside a module."""
        return [name for name in self._modules.get(module, ()) if name in self.left]

    def content(self, extent: Extent) -> bytes:
        """The bytes of a small tensor that describes another one.

        Raises:
            CheckpointError: if it is large, or cannot be read.
        """
        if extent.nbytes > MAX_DESCRIPTION_BYTES:
            raise CheckpointError(f"{extent.name} holds {extent.nbytes} bytes, too many for a description")
        if extent.name in self.catalog.memory:
            tensor = self.catalog.memory[extent.name].detach().cpu().contiguous()
            return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        if len(extent.pieces) > 1 or extent.strides is not None:
            raise CheckpointError(f"{extent.name} is not stored in one piece")
        offset = extent.pieces[0].offset if extent.pieces else extent.offset
        file = extent.pieces[0].file if extent.pieces else extent.file
        try:
            if file not in self._opened:
                self._opened[file] = file.open("rb")
            content = os.pread(self._opened[file].fileno(), extent.nbytes, offset)
        except OSError as error:
            raise CheckpointError(f"{file.name} cannot be read at {extent.name}: {error.strerror}") from None
        if len(content) != extent.nbytes:
            raise CheckpointError(f"{file.name} ends before {extent.name} does")
        return content

    def close(self) -> None:
        """Close the files that were opened for descriptions."""
        for handle in self._opened.values():
            handle.close()
        self._opened.clear()


def as_stored(part: Tensor, extent: Extent) -> Tensor:
    """A part in the dtype and shape of its extent, whether it comes so or as bytes."""
    dtype = PART_DTYPES.get(extent.dtype, torch.uint8)
    if part.dtype != dtype:
        part = part.reshape(-1).contiguous()
        if part.storage_offset() * part.element_size() % dtype.itemsize:
            part = part.clone()  # a view of wider elements needs their alignment
        part = part.view(dtype)
    return part if extent.dtype not in PART_DTYPES else part.reshape(extent.shape)


def factors(part: Tensor, extent: Extent) -> Tensor:
    """Scales as float32; 8-bit integers are exponents, biased by 127, of which 255 is NaN (OCP MX v1.0, 5.4.1)."""
    if extent.dtype in ("U8", "F8_E8M0"):
        return powers_of_two(part.device)[part.to(torch.int64)]
    return part.to(torch.float32)


def powers_of_two(device: torch.device) -> Tensor:
    """(256,) float32: 2^(i - 127), and NaN for 255."""
    table = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127).to(torch.float32)
    table[255] = math.nan
    return table.to(device)


def expect(extent: Extent, shape: Sequence[int], dtypes: Iterable[str]) -> None:
    """Check a companion against the weight it belongs to.

    Raises:
        CheckpointError: if its shape or dtype is another.
    """
    if extent.shape != tuple(shape):
        raise CheckpointError(f"{extent.name} has shape {list(extent.shape)}, the weight needs {list(shape)}")
    if extent.dtype not in dtypes:
        raise CheckpointError(f"{extent.name} is stored as {extent.dtype}, needed is {' or '.join(sorted(dtypes))}")


def matches(module: str, pattern: str) -> bool:
    """Whether a module is named by an entry of an exclusion list: "re:" and a regex, or whole words between dots.

    >>> matches("model.layers.0.mlp.gate", "mlp.gate"), matches("model.layers.0.mlp.gate_proj", "mlp.gate")
    (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error:
            return False
    words = pattern.strip(".*")
    return bool(words) and f".{words}." in f".{module}."


def is_excluded(module: str, quantization: Mapping[str, object]) -> bool:
    """Whether the configuration leaves a module unquantised."""
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "llm_int8_skip_modules"):
        patterns = quantization.get(key)
        if isinstance(patterns, list) and any(isinstance(p, str) and matches(module, p) for p in patterns):
            return True
    return False

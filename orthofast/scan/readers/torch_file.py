"""A torch zip file (.pt, .bin, .pth) as byte extents: its directory and its pickle are read, no tensor and no code.

Layout (torch/serialization.py, ``_save``): a zip of ``NAME/data.pkl``, a pickle in which each storage is a persistent
id ("storage", type, key, location, elements), and of one stored member ``NAME/data/KEY`` per storage.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import BITS, Extent, Fault
from orthofast.scan.readers.files import MAX_AXES, file_size, naturals, shown
from orthofast.scan.readers.pickle_walk import Global, walk

ZIP_START = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
MAX_PART_BYTES = 64 << 20  # of the zip's directory and of the pickle: tensors lie outside
STORAGE_TYPES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
}
TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
REBUILDS = "torch._utils._rebuild_"
WRAPPED = "torch._tensor._rebuild_from_type_v2"
PLAIN_OBJECTS = frozenset(  # what training programs put beside tensors; each stays a record
    {f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")}
    | {f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
    | {f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {"numpy.dtype", "numpy.ndarray", "numpy._core.numeric._frombuffer", "argparse.Namespace"}
)
HARMLESS = frozenset(
    {f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "bytes", "complex", "slice", "range", "object")}
    | {f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple")}
    | {f"torch.{name}" for name in ("Size", "device", "Tensor", "strided", "contiguous_format", "preserve_format")}
    | {"torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.serialization._get_layout", WRAPPED}
    | {"torch.storage.UntypedStorage", "torch.storage.TypedStorage", "_codecs.encode"}
    | PLAIN_OBJECTS
)
# what zipfile raises on hostile bytes
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, OSError, MemoryError)
HOW_TO_CONVERT = "load it where it was made and save model.state_dict() instead"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of bytes kept outside the pickle: its member's name, and its type if it has one."""

    key: str
    dtype: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor as the pickle describes it; offset and strides count elements of its storage.

    Attributes:
        storage: where its values are; None for a tensor that cannot be read.
        dtype: in the names of safetensors.
        offset: its first element.
        shape, strides: per axis.
        why: for a tensor that cannot be read, the reason.
    """

    storage: Storage | None
    dtype: str = ""
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    why: str = ""


@dataclass(slots=True)
class Archive:
    """One torch zip: what its pickle holds, and where its storages lie.

    Attributes:
        found: plain containers with :class:`Stored` tensors.
        members: storage key -> (first byte, size), counted from the start of the zip.
        load: why its bytes cannot be read where they lie, None where they can.
        nbytes: size of all storages.
    """

    found: object
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    load: str | None = None
    nbytes: int = 0


class Window(io.RawIOBase):
    """A part of an open file as a file of its own, of which nobody reads too much at once."""

    def __init__(self, handle: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position inside the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position inside the part."""
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise OSError("a position before the start")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes."""
        rest = max(0, self._size - self._at)
        count = rest if size is None or size < 0 else min(size, rest)
        if count > MAX_PART_BYTES:
            raise zipfile.BadZipFile(f"a part of {count} bytes, over the limit of {MAX_PART_BYTES}")
        self._handle.seek(self._start + self._at)
        content = self._handle.read(count)
        self._at += len(content)
        return content


def is_torch_zip(start: bytes) -> bool:
    """Whether a file starts as a zip does."""
    return start.startswith(ZIP_START)


def read_archive(handle: BinaryIO, start: int, size: int, what: str) -> Archive:
    """Directory and pickle of a torch zip that lies in an open file from ``start`` on.

    Raises:
        CheckpointError: if it is none, is cut, or needs code to be understood.
    """
    try:
        with zipfile.ZipFile(Window(handle, start, size)) as archive:
            return _archive(archive, handle, start, size, what)
    except BROKEN as error:
        raise CheckpointError(
            f"{what} is truncated or no zip file of torch: {shown(str(error))}; fetch the file again"
        ) from None


def _archive(archive: zipfile.ZipFile, handle: BinaryIO, start: int, size: int, what: str) -> Archive:
    infos = archive.infolist()
    pickles = [info for info in infos if info.filename.split("/")[-1] == "data.pkl"]
    if any(info.filename.split("/")[-1] == "constants.pkl" for info in infos):
        raise CheckpointError(f"{what} is a TorchScript program; {HOW_TO_CONVERT}")
    if len(pickles) != 1:
        raise CheckpointError(f"{what} is a zip file without a data.pkl of torch")
    folder = pickles[0].filename.removesuffix("data.pkl")
    found = walk(
        _content(archive, pickles[0], MAX_PART_BYTES, what), what, refuse=refusal, build=BUILD, persistent=_storage
    )
    order = archive.NameToInfo.get(f"{folder}byteorder")
    result = Archive(found)
    if order is not None and _content(archive, order, 64, what).strip() == b"big":
        result.load = "it was written on a big-endian machine"
    for info in infos:
        if not info.filename.startswith(f"{folder}data/"):
            continue
        key = info.filename.removeprefix(f"{folder}data/")
        result.nbytes += info.file_size
        if info.flag_bits & 1:
            raise CheckpointError(f"{what} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            result.load = "its members are compressed"
            result.members[key] = (0, info.file_size)
            continue
        handle.seek(start + info.header_offset)
        local = handle.read(LOCAL_HEADER_BYTES)
        if len(local) < LOCAL_HEADER_BYTES or not local.startswith(ZIP_START):
            raise CheckpointError(f"{what} is corrupt: no member of the zip starts at byte {info.header_offset}")
        at = info.header_offset + LOCAL_HEADER_BYTES
        at += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if at + info.file_size > size:
            raise CheckpointError(f"{what} is truncated: its member {shown(info.filename)} ends behind the file")
        result.members[key] = (at, info.file_size)
    return result


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int, what: str) -> bytes:
    """A small member, whatever its header claims."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{what} is compressed by a method that torch does not read")
    with archive.open(info) as member:
        content = member.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{what}: {shown(info.filename)} holds more than {limit} bytes")
    return content


def read_torch_file(file: Path) -> Archive:
    """:func:`read_archive` of a whole file."""
    size = file_size(file)
    try:
        with file.open("rb") as handle:
            return read_archive(handle, 0, size, file.name)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None


def refusal(path: str) -> str | None:
    """Why a file that names this class or function is not read; None for what tensors need."""
    if path in HARMLESS or path in BUILD:
        return None
    first, _, word = path.rpartition(".")
    if first == "torch" and (word in TORCH_NAMES or word.endswith("Storage") or _is_type(word)):
        return None
    shown_path = shown(path)
    if path.startswith(("torch.nn.", "torchvision.models.", "transformers.models.", "__main__.", "timm.")):
        return f"is a whole pickled module ({shown_path}), which only its code could rebuild; {HOW_TO_CONVERT}"
    if path.startswith("torch.distributed.tensor"):
        return (
            f"holds sharded tensors ({shown_path}) of one rank; scan the whole checkpoint, or save the full state dict"
        )
    if path.startswith(("torchao.", "bitsandbytes.", "optimum.", "hqq.")):
        return f"is quantised with {path.partition('.')[0]} ({shown_path}), which is not supported"
    return f"asks for {shown_path}, which tensors do not need; nothing of it was run; {HOW_TO_CONVERT}"


def _is_type(word: str) -> bool:
    """Types that name no tensor of ours, but stand in files that weights_only reads: torch.uint4, torch.qint8."""
    return word.lstrip("u").lstrip("q").lstrip("u").startswith(("int", "float", "complex", "per_", "bits"))


def place(name: str, stored: Stored, archive: Archive, file: Path, start: int = 0) -> Extent | Fault:
    """Where a tensor of an archive that begins at ``start`` lies, checked against the bytes that are there."""
    shape = stored.shape

    def fault(why: str) -> Fault:
        return Fault(name, f"{file.name}: {shown(name)} {why}", shape)

    if stored.storage is None or stored.why:
        return fault(stored.why or "has no values")
    if stored.storage.key not in archive.members:
        return fault(f"lies in the storage {shown(stored.storage.key)}, which the file does not hold")
    at, size = archive.members[stored.storage.key]
    width = BITS[stored.dtype] // 8
    count = 1
    for axis in shape:
        count *= axis
    span = 0 if count == 0 else 1 + sum((n - 1) * step for n, step in zip(shape, stored.strides, strict=True))
    if (stored.offset + span) * width > size:
        return fault(f"claims elements up to {stored.offset + span} of a storage of {size} bytes")
    if count > span:
        return fault(f"claims {count} elements where {span} are stored: it is a repeated view")
    strides = None if stored.strides == row_major(shape) else stored.strides
    if strides is not None and all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major(shape), strict=True)):
        strides = None  # the step of an axis of one element says nothing
    return Extent(name, file, start + at + stored.offset * width, span * width, stored.dtype, shape, strides)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor, as torch counts them."""
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _storage(identity: object) -> object:
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError("a persistent id is no storage")
    kind, key = identity[1], identity[2]
    if not isinstance(kind, Global) or not isinstance(key, str):
        raise ValueError("a storage has no type or key")
    word = kind.path.rpartition(".")[2].removesuffix("Storage")
    return Storage(key, STORAGE_TYPES.get(word))


def _tensor(
    storage: object, offset: object, size: object, stride: object, dtype: str | None, metadata: object
) -> Stored:
    if isinstance(size, Global) or not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    shape, strides = naturals(size), naturals(stride)
    first = naturals([offset])
    if shape is None or strides is None or first is None or len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError("a tensor has no usable shape, strides or offset")
    if dtype is None:
        return Stored(None, shape=shape, why="has a type that is not read")
    if metadata:
        return Stored(None, shape=shape, why="is a conjugate or negative view, which is not read")
    return Stored(storage, dtype, first[0], shape, strides)


def _from_storage(storage: object, offset: object, size: object, stride: object, *rest: object) -> Stored:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _tensor(storage, offset, size, stride, dtype, rest[2] if len(rest) > 2 else None)


def _from_untyped(storage: object, offset: object, size: object, stride: object, *rest: object) -> Stored:
    """torch._utils._rebuild_tensor_v3."""
    kind = rest[2] if len(rest) > 2 else None
    dtype = TORCH_NAMES.get(kind.path.removeprefix("torch.")) if isinstance(kind, Global) else None
    return _tensor(storage, offset, size, stride, dtype, rest[3] if len(rest) > 3 else None)


def _first(data: object, *rest: object) -> object:
    return data


def _of_class(function: object, kind: object, args: object, *rest: object) -> object:
    """A tensor of a subclass or with attributes of its own: its values are what the inner call gives."""
    if not isinstance(function, Global) or not isinstance(args, tuple) or function.path == WRAPPED:
        raise ValueError("a tensor is rebuilt by what is no function")
    builder = BUILD.get(function.path)
    return _not_read("is of a class that is not read")() if builder is None else builder(*args)


def _not_read(why: str) -> Callable[..., Stored]:
    return lambda *args: Stored(None, why=why)


BUILD: dict[str, Callable[..., object]] = {
    "torch.Size": lambda *args: tuple(args[0]) if args else (),
    f"{REBUILDS}tensor": _from_storage,
    f"{REBUILDS}tensor_v2": _from_storage,
    f"{REBUILDS}tensor_v3": _from_untyped,
    f"{REBUILDS}parameter": _first,
    f"{REBUILDS}parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
    WRAPPED: _of_class,
    f"{REBUILDS}qtensor": _not_read("is a quantised tensor of torch, which is not read"),
    f"{REBUILDS}sparse_tensor": _not_read("is sparse, which is not read"),
    f"{REBUILDS}meta_tensor_no_storage": _not_read("has no values: it was saved from the meta device"),
    f"{REBUILDS}nested_tensor": _not_read("is a nested tensor, which is not read"),
    f"{REBUILDS}wrapper_subclass": _not_read("is of a class that keeps its values elsewhere"),
    f"{REBUILDS}device_tensor_from_numpy": _not_read("was saved as numpy data of another device, which is not read"),
    f"{REBUILDS}device_tensor_from_cpu_tensor": lambda data, *rest: data,
}

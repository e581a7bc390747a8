"""Images and labels: scikit-learn's digits, or MNIST and CIFAR from a folder the user names; nothing is downloaded.

Standard files only: idx (plain or gzip) for MNIST, the pickled or the binary batches for CIFAR. They are compared with
the MD5 sums their makers publish before anything is read; the binary batches, for which none are published, by size.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from orthofast.errors import InputError, MissingPackageError
from orthofast.lab.experiment import DATA, Settings

DIGITS_TRAIN = 1437  # of 1797; the rest is for testing
MNIST = {  # name -> MD5 of the plain file, and of the one compressed by its makers
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432"),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3"),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c"),
}
CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
BINARY_ROWS = {  # images in each file of the binary version
    "cifar10": {f"{name}.bin": 10_000 for name in CIFAR10},
    "cifar100": {"train.bin": 50_000, "test.bin": 10_000},
}
LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
PIXELS = 3 * 32 * 32
FOLDERS = {
    "mnist": ("", "MNIST/raw", "mnist"),
    "cifar10": ("", "cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("", "cifar-100-python", "cifar-100-binary"),
}
# all that a batch's pickle may name; Python 2 wrote it
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): numpy.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): numpy.ndarray,
    ("numpy", "dtype"): numpy.dtype,
}
IDX_HEADS = {1: 0x0801, 3: 0x0803}  # dimensions -> magic number of unsigned bytes


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A data set, split.

    Attributes:
        name: "digits", "mnist", "cifar10" or "cifar100".
        train: (N, channels, size, size) float32 in [0, 1].
        train_labels: (N,) int64.
        test: (M, channels, size, size).
        test_labels: (M,).
        classes: how many.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def flat(self) -> Images:
        """The same with one row an image: (N, channels * size * size)."""
        return Images(
            self.name, self.train.flatten(1), self.train_labels, self.test.flatten(1), self.test_labels, self.classes
        )

    def standardized(self) -> Images:
        """The same with mean 0 and deviation 1 over all pixels of a channel of the training images."""
        axes = (0, 2, 3)
        mean, std = self.train.mean(axes, keepdim=True), self.train.std(axes, keepdim=True)
        return Images(
            self.name,
            (self.train - mean) / std,
            self.train_labels,
            (self.test - mean) / std,
            self.test_labels,
            self.classes,
        )

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(
            self.name,
            self.train.to(device),
            self.train_labels.to(device),
            self.test.to(device),
            self.test_labels.to(device),
            self.classes,
        )


def load(settings: Settings) -> Images:
    """The data set that the settings name, on their device.

    Raises:
        InputError: if the folder or a file is missing or is another one; the message lists the files expected.
        MissingPackageError: if the digits are wanted and scikit-learn is missing.
    """
    return read(settings.data, settings.data_folder).to(settings.device)


@lru_cache(maxsize=2)
def read(name: str, folder: str | None = None) -> Images:
    """A data set by name; see :func:`load`."""
    if name not in DATA:
        raise InputError(f"data needs one of {', '.join(DATA)}, got {name!r}")
    if name == "digits":
        return _digits()
    if folder is None:
        raise InputError(f"data={name} needs a folder that holds {_expected(name)}; name it with --data-folder")
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{folder} is no folder; data={name} needs one that holds {_expected(name)}")
    reader = _mnist if name == "mnist" else _cifar
    for below in FOLDERS[name]:
        found = reader(name, place / below)
        if found is not None:
            return found
    raise InputError(f"{folder} does not hold the files of {name}: {_expected(name)}")


def _digits() -> Images:
    """The 1797 images of 8 x 8 that scikit-learn brings, in an order drawn once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError("data=digits needs scikit-learn: pip install 'orthofast[lab]'") from None
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    return Images(
        "digits", images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN], images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:], 10
    )


def _mnist(name: str, folder: Path) -> Images | None:
    parts = []
    for stem, (plain, packed) in MNIST.items():
        file = folder / stem
        if file.is_file():
            content = _checked(file, plain)
        elif (file := folder / f"{stem}.gz").is_file():
            content = gzip.decompress(_checked(file, packed))
        else:
            return None
        parts.append(_idx(content, file))
    images, labels, test, test_labels = parts
    return Images(name, _scaled(images[:, None]), labels.long(), _scaled(test[:, None]), test_labels.long(), 10)


def _idx(content: bytes, file: Path) -> Tensor:
    """Unsigned bytes as LeCun's idx format stores them: a magic number, sizes as big-endian integers, values."""
    dimensions = 3 if "idx3" in file.name else 1
    head = numpy.frombuffer(content[: 4 + 4 * dimensions], dtype=">u4").astype(int)
    if len(head) != 1 + dimensions or head[0] != IDX_HEADS[dimensions]:
        raise InputError(f"{file} is no idx file of {dimensions} dimensions with unsigned bytes")
    sizes = tuple(int(size) for size in head[1:])
    values = numpy.frombuffer(content, dtype=numpy.uint8, offset=4 + 4 * dimensions)
    if values.size != numpy.prod(sizes):
        raise InputError(f"{file} needs {numpy.prod(sizes)} values for its sizes {sizes}, got {values.size}")
    return torch.from_numpy(values.reshape(sizes).copy())


def _cifar(name: str, folder: Path) -> Images | None:
    sums = CIFAR10 if name == "cifar10" else CIFAR100
    if all((folder / file).is_file() for file in sums):
        parts = [_pickled(folder / file, total) for file, total in sums.items()]
    elif all((folder / file).is_file() for file in BINARY_ROWS[name]):
        parts = [_binary(folder / file, name, rows) for file, rows in BINARY_ROWS[name].items()]
    else:
        return None
    images, labels = (torch.cat(column) for column in zip(*parts[:-1], strict=True))
    test, test_labels = parts[-1]
    return Images(name, _scaled(images), labels, _scaled(test), test_labels, 10 if name == "cifar10" else 100)


def _pickled(file: Path, total: str) -> tuple[Tensor, Tensor]:
    batch = _Unpickler(io.BytesIO(_checked(file, total)), encoding="bytes").load()
    labels = batch.get(b"labels", batch.get(b"fine_labels")) if isinstance(batch, dict) else None
    data = batch.get(b"data") if isinstance(batch, dict) else None
    if not isinstance(data, numpy.ndarray) or data.dtype != numpy.uint8 or labels is None:
        raise InputError(f"{file} holds no batch of CIFAR: a dictionary with data and labels")
    if data.shape != (len(labels), PIXELS):
        raise InputError(f"{file} needs {len(labels)} rows of {PIXELS} pixels, got {data.shape}")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)


def _binary(file: Path, name: str, rows: int) -> tuple[Tensor, Tensor]:
    """Rows of labels and pixels, a byte each; the last label is the fine one."""
    width = LABEL_BYTES[name] + PIXELS
    content = file.read_bytes()
    if len(content) != rows * width:
        raise InputError(f"{file} needs {rows * width} bytes, got {len(content)}; it is damaged or another file")
    table = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(rows, width)
    first = LABEL_BYTES[name]
    return table[:, first:].reshape(-1, 3, 32, 32), table[:, first - 1].long()


class _Unpickler(pickle.Unpickler):
    """Builds arrays and plain values; nothing else that a pickle names is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise InputError(
                f"a batch of CIFAR names {module}.{name}, which none of its makers' files does; not loaded"
            )
        return ALLOWED[module, name]


def _checked(file: Path, total: str) -> bytes:
    content = file.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != total:
        raise InputError(f"{file} needs the MD5 sum {total}, got {found}; it is damaged or another data set's")
    return content


def _scaled(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255


def _expected(name: str) -> str:
    if name == "mnist":
        return f"{', '.join(MNIST)} (each plain or as .gz)"
    pickled = CIFAR10 if name == "cifar10" else CIFAR100
    return f"{', '.join(pickled)} (pickled), or {', '.join(BINARY_ROWS[name])} (binary)"

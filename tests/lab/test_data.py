"""Data are read as their makers stored them, refused if they are others, and never executed."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from orthofast.errors import InputError
from orthofast.lab import data
from orthofast.lab.experiment import Settings


@pytest.fixture(autouse=True)
def _forget() -> None:
    data.read.cache_clear()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(values: numpy.ndarray[Any, Any]) -> bytes:
    magic = {1: 0x0801, 3: 0x0803}[values.ndim]
    return numpy.array([magic, *values.shape], dtype=">u4").tobytes() + values.astype(numpy.uint8).tobytes()


def mnist_files(count: int = 5) -> dict[str, bytes]:
    rng = numpy.random.default_rng(0)
    files = {}
    for name in data.MNIST:
        shape = (count, 28, 28) if "idx3" in name else (count,)
        files[name] = idx(rng.integers(0, 256 if "idx3" in name else 10, shape))
    return files


def allow_mnist(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], packed: dict[str, bytes]) -> None:
    sums = {name: (md5(content), md5(packed.get(name, b""))) for name, content in files.items()}
    monkeypatch.setattr(data, "MNIST", sums)


def test_digits_are_split_once_and_for_all() -> None:
    found = data.load(Settings())
    assert found.train.shape == (1437, 1, 8, 8)
    assert found.test.shape == (360, 1, 8, 8)
    assert (found.train.min(), found.train.max()) == (0, 1)
    assert sorted(set(found.test_labels.tolist())) == list(range(10))
    assert found.flat().test.shape == (360, 64)
    assert abs(found.standardized().train.mean().item()) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_mnist_plain_or_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, below: str) -> None:
    files = mnist_files()
    small = {name: gzip.compress(content, mtime=0) for name, content in files.items()}
    allow_mnist(monkeypatch, files, small)
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(small[name] if packed else content)
    found = data.load(Settings(data="mnist", data_folder=str(tmp_path)))
    assert found.train.shape == (5, 1, 28, 28)
    assert found.train_labels.tolist() == list(files["train-labels-idx1-ubyte"][8:])
    assert found.test[0, 0, 0, 1].item() == pytest.approx(files["t10k-images-idx3-ubyte"][17] / 255)


def test_other_files_of_the_same_name_are_refused(tmp_path: Path) -> None:
    for name, content in mnist_files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte needs the MD5 sum 6bbc9ace898e44ae57da46a324031adb"):
        data.read("mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("broken", "said"), [(b"\x00\x00\x08\x01", "is no idx file"), (idx(numpy.zeros((2, 3, 4)))[:-1], "needs 24 values")]
)
def test_a_broken_idx_file_is_told(tmp_path: Path, broken: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        data._idx(broken, tmp_path / "train-images-idx3-ubyte")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_absent_files_are_listed(tmp_path: Path, name: str) -> None:
    files = {"mnist": "t10k-labels-idx1-ubyte", "cifar10": "data_batch_5", "cifar100": "train.bin"}
    with pytest.raises(InputError, match=rf"does not hold the files of {name}: .*{files[name]}"):
        data.read(name, str(tmp_path))
    with pytest.raises(InputError, match="--data-folder"):
        data.read(name)
    with pytest.raises(InputError, match="is no folder"):
        data.read(name, str(tmp_path / "no"))


def cifar_batch(labels: list[int], key: bytes) -> bytes:
    """As Python 2 pickled it: protocol 2, byte strings, numpy's old module; opcode by opcode."""
    pixels = numpy.arange(len(labels) * data.PIXELS).astype(numpy.uint8).tobytes()

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def whole(number: int) -> bytes:
        return b"J" + struct.pack("<i", number)

    kind = b"cnumpy\ndtype\n" + text(b"u1") + whole(0) + whole(1) + b"\x87R("
    kind += whole(3) + text(b"|") + b"NNN" + whole(-1) + whole(-1) + whole(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + whole(0) + b"\x85" + text(b"b") + b"\x87R("
    array += whole(1) + whole(len(labels)) + whole(data.PIXELS) + b"\x86" + kind + b"\x89" + text(pixels) + b"tb"
    listed = b"](" + b"".join(map(whole, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + listed + b"u."


def test_pickled_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder, sums, key in (
        ("cifar10", "cifar-10-batches-py", "CIFAR10", b"labels"),
        ("cifar100", "cifar-100-python", "CIFAR100", b"fine_labels"),
    ):
        batch = cifar_batch([3, 1], key)
        names = getattr(data, sums)
        monkeypatch.setattr(data, sums, dict.fromkeys(names, md5(batch)))
        (tmp_path / folder).mkdir()
        for file in names:
            (tmp_path / folder / file).write_bytes(batch)
        found = data.read(name, str(tmp_path))
        assert found.train.shape == (2 * (len(names) - 1), 3, 32, 32)
        assert found.test_labels.tolist() == [3, 1]
        assert found.test[0, 0, 0, 5].item() == pytest.approx(5 / 255)
        assert found.test[0, 1, 0, 0].item() == pytest.approx(1024 % 256 / 255)
        assert found.classes == (10 if name == "cifar10" else 100)


def test_binary_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BINARY_ROWS", {"cifar100": {"train.bin": 2, "test.bin": 1}})
    row = bytes([7, 42]) + bytes(range(256)) * 12
    (tmp_path / "train.bin").write_bytes(row * 2)
    (tmp_path / "test.bin").write_bytes(row)
    found = data.read("cifar100", str(tmp_path))
    assert found.train_labels.tolist() == [42, 42]  # the fine label is the second
    assert torch.equal(found.test[0].flatten() * 255, torch.arange(3072) % 256)
    data.read.cache_clear()
    (tmp_path / "test.bin").write_bytes(row[:-1])
    with pytest.raises(InputError, match="needs 3074 bytes, got 3073"):
        data.read("cifar100", str(tmp_path))


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_hostile_pickle_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = pickle.dumps({"data": Hostile()}, protocol=2)
    assert any(opcode.name == "GLOBAL" for opcode, *_ in pickletools.genops(content))
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(InputError, match=r"names __builtin__\.print"):
        data._pickled(tmp_path / "batch", md5(content))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "held", [[1], {b"data": numpy.zeros((2, 3), numpy.uint8), b"labels": [1, 2]}, {b"labels": [1]}]
)
def test_a_batch_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Any) -> None:
    monkeypatch.setattr(data._Unpickler, "find_class", pickle.Unpickler.find_class)
    stream = io.BytesIO()
    pickle.Pickler(stream, 2).dump(held)
    (tmp_path / "batch").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"holds no batch|needs 2 rows of 3072"):
        data._pickled(tmp_path / "batch", md5(stream.getvalue()))

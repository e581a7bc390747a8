"""Distributed checkpoints: chunks of any cut are found bit for bit; metadata is walked, never unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from orthofast.errors import CheckpointError
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.stored_values import same_bits, stored_values

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of saving in one process

Block = tuple[tuple[int, ...], tuple[int, ...]]


def saved(folder: Path, content: dict[str, Any]) -> Path:
    dcp.save(content, checkpoint_id=folder)
    return folder


def cut(folder: Path, tensors: dict[str, torch.Tensor], blocks: dict[str, list[Block]]) -> Path:
    """A checkpoint as several ranks write it: block by block, dealt over two files."""
    folder.mkdir()
    described, places = {}, {}
    files = [io.BytesIO(), io.BytesIO()]
    for name, tensor in tensors.items():
        chunks = []
        for k, (origin, shape) in enumerate(blocks[name]):
            part = tensor[tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))].clone()
            start = files[k % 2].tell()
            torch.save(part, files[k % 2])
            places[MetadataIndex(name, origin)] = _StorageInfo(
                f"__{k % 2}_0.distcp", start, files[k % 2].tell() - start
            )
            chunks.append(ChunkStorageMetadata(torch.Size(origin), torch.Size(shape)))
        described[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    for k, file in enumerate(files):
        (folder / f"__{k}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=places)))
    return folder


def edited(folder: Path, **changes: Any) -> None:
    """Change the places of all chunks."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.storage_data = {index: replace(info, **changes) for index, info in metadata.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_what_torch_saves_is_read_bit_for_bit(tmp_path: Path) -> None:
    model = {
        "w": torch.randn(5, 3),
        "t": torch.randn(3, 5).t(),
        "half": torch.randn(4, 4).bfloat16(),
        "view": torch.randn(8, 8)[2:5, 1:4],
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "number": torch.tensor(2.5),
        "ids": torch.arange(7),
    }
    folder = saved(tmp_path / "ckpt", {"model": model, "optimizer": {"m": torch.ones(3)}, "step": 7})
    catalog = open_checkpoint(folder)
    assert catalog.format == "dcp"
    assert catalog.faults == []
    found = stored_values(catalog)
    assert found.keys() == model.keys()
    assert [name for name in model if not same_bits(found[name], model[name])] == []
    assert catalog.notes == ["the tensors under 'model' are the model; left out: optimizer"]
    assert set(catalog.files) == {folder / "__0_0.distcp"}
    by_metadata = open_checkpoint(folder / ".metadata")
    assert by_metadata.extents == catalog.extents


def test_a_flat_state_dict_is_read_without_its_optimizer(tmp_path: Path) -> None:
    content = {"layers.0.weight": torch.randn(3, 3), "optimizer.state.layers.0.weight": torch.randn(3, 3)}
    assert stored_values(open_checkpoint(saved(tmp_path / "flat", content))).keys() == {"layers.0.weight"}


CUTS: dict[str, tuple[tuple[int, ...], list[Block]]] = {
    "rows": ((7, 4), [((0, 0), (3, 4)), ((3, 0), (3, 4)), ((6, 0), (1, 4))]),
    "rows out of order": ((6, 4), [((4, 0), (2, 4)), ((0, 0), (4, 4))]),
    "columns": ((4, 6), [((0, 0), (4, 2)), ((0, 2), (4, 4))]),
    "blocks": ((4, 6), [((0, 0), (2, 3)), ((2, 3), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3))]),
    "three axes": ((4, 3, 2), [((0, 0, 0), (2, 3, 2)), ((2, 0, 0), (2, 3, 1)), ((2, 0, 1), (2, 3, 1))]),
    "a chunk listed twice": ((4, 3), [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((2, 0), (2, 3))]),
    "an empty rank": ((3, 4), [((0, 0), (3, 4)), ((3, 0), (0, 4))]),
}


@pytest.mark.parametrize(("shape", "blocks"), CUTS.values(), ids=CUTS.keys())
def test_chunks_of_any_cut_become_one_tensor(shape: tuple[int, ...], blocks: list[Block], tmp_path: Path) -> None:
    tensor = torch.randn(shape)
    catalog = open_checkpoint(cut(tmp_path / "cut", {"w": tensor}, {"w": blocks}))
    assert catalog.faults == []
    assert same_bits(stored_values(catalog)["w"], tensor)


@pytest.mark.parametrize(
    ("blocks", "word"),
    [
        ([((0, 0), (3, 4))], "12 elements for its 16"),
        ([((0, 0), (3, 4)), ((2, 0), (1, 4))], "overlap"),
        ([((0, 0), (2, 3)), ((1, 2), (2, 2)), ((0, 3), (1, 1)), ((2, 0), (1, 1)), ((3, 0), (1, 4))], "overlap"),
    ],
)
def test_chunks_that_do_not_fill_a_tensor_are_a_fault(blocks: list[Block], word: str, tmp_path: Path) -> None:
    good = torch.randn(2, 2)
    whole = {"w": torch.randn(4, 4), "good": good}
    catalog = open_checkpoint(cut(tmp_path / "holes", whole, {"w": blocks, "good": [((0, 0), (2, 2))]}))
    assert [fault.name for fault in catalog.faults] == ["w"]
    assert word in catalog.faults[0].error
    assert same_bits(stored_values(catalog)["good"], good)


def two_files(folder: Path) -> Path:
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(2, 2)}
    return cut(folder, tensors, {"a": [((0, 0), (2, 3)), ((2, 0), (2, 3))], "b": [((0, 0), (2, 2))]})


def test_a_missing_file_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "ckpt")
    (folder / "__1_0.distcp").unlink()
    catalog = open_checkpoint(folder)
    assert [fault.name for fault in catalog.faults] == ["a"]
    assert "1 of 2 files are missing: __1_0.distcp" in catalog.faults[0].error
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"2 of 2 files are missing: __0_0\.distcp, __1_0\.distcp"):
        open_checkpoint(folder)


def test_a_truncated_file_costs_only_its_tensors(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "ckpt")
    os.truncate(folder / "__1_0.distcp", 300)
    catalog = open_checkpoint(folder)
    assert [fault.name for fault in catalog.faults] == ["a"]
    assert "__1_0.distcp, which is truncated" in catalog.faults[0].error


@pytest.mark.parametrize("path", ["../__0_0.distcp", "/etc/passwd", "..\\__0_0.distcp"])
def test_metadata_leading_outside_is_not_followed(path: str, tmp_path: Path) -> None:
    folder = two_files(tmp_path / "ckpt")
    shutil.copy(folder / "__0_0.distcp", tmp_path / "__0_0.distcp")
    edited(folder, relative_path=path)
    with pytest.raises(CheckpointError, match="leads outside; it was not opened"):
        open_checkpoint(folder)


def test_compressed_chunks_are_a_fault(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "ckpt")
    edited(folder, transform_descriptors=["zstd"])
    with pytest.raises(CheckpointError, match="stored through an extension such as compression"):
        open_checkpoint(folder)


def safetensors_shards(folder: Path, tensors: dict[str, torch.Tensor], axis: int) -> None:
    """Files as every rank writes them with HuggingFaceStorageWriter(save_distributed=True)."""
    folder.mkdir()
    for k in range(3):
        parts = {name: tensor.tensor_split(3, axis)[k].contiguous() for name, tensor in tensors.items()}
        starts = {
            name: sum(t.shape[axis] for t in tensor.tensor_split(3, axis)[:k]) for name, tensor in tensors.items()
        }
        info = {name: {"saved_offsets": [starts[name] if i == axis else 0 for i in range(2)]} for name in tensors}
        name = f"shard-{k + 1:05d}-model-00001-of-00001.safetensors"
        save_file(parts, folder / name, {"DCP_SHARDING_INFO": json.dumps(info)})


@pytest.mark.parametrize("axis", [0, 1])
def test_ranks_files_of_safetensors_become_whole_tensors(axis: int, tmp_path: Path) -> None:
    tensors = {"w": torch.randn(7, 5), "small": torch.randn(2, 2)}
    safetensors_shards(tmp_path / "hf", tensors, axis)
    catalog = open_checkpoint(tmp_path / "hf")
    assert (catalog.format, catalog.faults) == ("dcp", [])
    found = stored_values(catalog)
    assert [name for name in tensors if not same_bits(found[name], tensors[name])] == []
    (tmp_path / "hf" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hf: w has chunks of \d+ elements for its 35"):
        open_checkpoint(tmp_path / "hf")


def test_what_torch_saves_as_safetensors_by_rank_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 3), "v": torch.randn(4)}
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "hf"), save_distributed=True))
    assert same_bits(stored_values(open_checkpoint(tmp_path / "hf"))["w"], tensors["w"])


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("place", ["planner_data", "storage_data", "state_dict_metadata"])
def test_code_in_the_metadata_is_never_run(place: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = two_files(tmp_path / "ckpt")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    setattr(metadata, place, {"bomb": Bomb(trace)})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="nothing of it was run") as caught:
        open_checkpoint(folder)
    assert "ckpt/.metadata" in str(caught.value)
    assert not trace.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the bomb is a real one
    assert trace.exists()


def test_code_in_a_chunk_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = two_files(tmp_path / "ckpt")
    buffer = io.BytesIO()
    torch.save(Bomb(trace), buffer)
    (folder / "__0_0.distcp").write_bytes(buffer.getvalue())
    edited(folder, relative_path="__0_0.distcp", offset=0, length=len(buffer.getvalue()))
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        open_checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no sound pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "no metadata of a distributed checkpoint"),
        (pickle.dumps(Metadata({})), "no tensors"),
        (b"\x80\x04\x95" + bytes(8) + b"r\xff\xff\xff\xff.", "no sound pickle"),
    ],
)
def test_broken_metadata_is_one_sentence(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_metadata_never_crash(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    if not folder.exists():
        two_files(folder)
        shutil.copy(folder / ".metadata", tmp_path / "sound")
    content = bytearray((tmp_path / "sound").read_bytes())
    for position, byte in flips:
        content[position % len(content)] = byte
    (folder / ".metadata").write_bytes(bytes(content))
    refusal = ""
    try:
        catalog = open_checkpoint(folder)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return
    stored_values(catalog)

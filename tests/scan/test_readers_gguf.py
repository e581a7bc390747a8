"""GGUF headers: what GGUFWriter writes is found bit for bit, counts are bounded by the file, arrays passed over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthofast.errors import CheckpointError
from orthofast.scan.readers import gguf_file
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.readers.gguf_file import TYPES, read_gguf, split_names
from tests.scan.attacks import GGUF_HEADERS, gguf_array, gguf_head, gguf_tensor
from tests.scan.stored_values import stored_values

GENERATOR = np.random.default_rng(5)


def write(path: Path, tensors: dict[str, np.ndarray], split: tuple[int, int] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(8)
    writer.add_head_count_kv([4, 4])
    writer.add_key_length(16)
    writer.add_feed_forward_length([96, 128])
    writer.add_token_list([f"token {i}" for i in range(300)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_bool("general.flag", True)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain() -> dict[str, np.ndarray]:
    return {
        "token_embd.weight": GENERATOR.normal(size=(10, 64)).astype(np.float32),
        "blk.0.attn_q.weight": GENERATOR.normal(size=(64, 64)).astype(np.float16),
        "blk.0.ffn_up_exps.weight": GENERATOR.normal(size=(3, 96, 64)).astype(np.float32),
        "blk.0.ids": GENERATOR.integers(0, 9, size=(5,)).astype(np.int32),
        "blk.0.wide": GENERATOR.normal(size=(3, 5)),
    }


def test_plain_tensors_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = plain()
    catalog = open_checkpoint(write(tmp_path / "plain.gguf", tensors))
    assert catalog.format == "gguf"
    assert catalog.faults == []
    found = stored_values(catalog)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert torch.equal(found[name], torch.from_numpy(values))
    assert {extent.name: extent.dtype for extent in catalog.extents}["blk.0.attn_q.weight"] == "F16"


def test_the_table_of_types_is_that_of_gguf() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    ours = {number: (name.removeprefix("GGUF_"), block, size) for number, (name, block, size) in TYPES.items()}
    assert theirs.items() <= ours.items()  # older packages know fewer


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_quantised_tensors_are_found_with_the_shape_of_their_values(kind: str, tmp_path: Path) -> None:
    stored_type = getattr(gguf.GGMLQuantizationType, kind)
    values = GENERATOR.normal(size=(6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, stored_type)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    catalog = open_checkpoint(tmp_path / "q.gguf")
    (extent,) = catalog.extents
    assert extent.shape == (6, 64)
    assert extent.dtype == (kind if kind == "BF16" else f"GGUF_{kind}")
    content = extent.file.read_bytes()[extent.offset : extent.offset + extent.nbytes]
    assert content == packed.tobytes()
    again = gguf.quants.dequantize(np.frombuffer(content, np.uint8).reshape(packed.shape), stored_type)
    assert np.array_equal(again, gguf.quants.dequantize(packed, stored_type))


def test_metadata_becomes_a_configuration_and_arrays_are_kept_only_if_short(tmp_path: Path) -> None:
    catalog = open_checkpoint(write(tmp_path / "c.gguf", plain()))
    config = dict(catalog.config)
    settings_found = config.pop("gguf")
    assert config == {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": [96, 128],
    }
    assert isinstance(settings_found, dict)
    assert settings_found["general.flag"] is True
    assert not {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"} & settings_found.keys()
    assert "the head is tied to the embedding and stored once" in catalog.notes


def test_splits_are_one_model_and_missing_ones_are_named(tmp_path: Path) -> None:
    parts = [{"token_embd.weight": np.ones((4, 8), np.float32)}, {"output.weight": np.zeros((4, 8), np.float32)}, {}]
    for i, tensors in enumerate(parts):
        write(tmp_path / f"m-{i + 1:05d}-of-00003.gguf", tensors, (i, 3))
    for source in (tmp_path, tmp_path / "m-00002-of-00003.gguf"):
        catalog = open_checkpoint(source)
        assert [extent.name for extent in catalog.extents] == ["token_embd.weight", "output.weight"]
        assert catalog.faults == []
        assert len(catalog.files) == 3
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    catalog = open_checkpoint(tmp_path)
    assert [extent.name for extent in catalog.extents] == ["token_embd.weight"]
    assert [fault.error for fault in catalog.faults] == ["1 of 3 files of the model are missing: m-00002-of-00003.gguf"]
    assert split_names("m-00004-of-00003.gguf") == ["m-00004-of-00003.gguf"]


@pytest.mark.parametrize(("content", "word"), GGUF_HEADERS.values(), ids=GGUF_HEADERS.keys())
def test_a_hostile_header_is_one_sentence(content: bytes, word: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=word) as caught:
        open_checkpoint(file)
    assert "hostile.gguf" in str(caught.value)


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "twice.gguf"
    file.write_bytes(gguf_head(tensors=2) + gguf_tensor() + gguf_tensor(offset=32) + bytes(128))
    extents, faults, _ = read_gguf(file)
    assert [extent.name for extent in extents] == ["w"]
    assert "names w twice" in faults[0].error


def test_counts_that_only_a_sparse_file_could_hold_stop_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 1 << 20)
    file = tmp_path / "sparse.gguf"
    file.write_bytes(gguf_head(entries=1) + gguf_array(8, 1 << 32))
    os.truncate(file, 1 << 40)
    with pytest.raises(CheckpointError, match="longer than the limit"):
        open_checkpoint(file)


WHOLE: list[bytes] = []


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_flipped_bytes_never_crash(flips: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    if not WHOLE:
        words: dict[str, Any] = plain()
        WHOLE.append(write(tmp_path / "whole.gguf", words).read_bytes())
    content = bytearray(WHOLE[0])
    for position, byte in flips:
        content[position % (len(content) // 2)] = byte
    file = tmp_path / "flipped.gguf"
    file.write_bytes(bytes(content[: len(content) - cut]))
    refusal = ""
    try:
        catalog = open_checkpoint(file)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert file.name in refusal
        assert "\n" not in refusal
        return
    assert all(file.name in fault.error for fault in catalog.faults)
    stored_values(catalog)


def test_tensors_of_the_same_bytes_are_tied_and_overlapping_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "tied.gguf"
    file.write_bytes(gguf_head(tensors=2) + gguf_tensor(name="a") + gguf_tensor(name="b") + bytes(128))
    catalog = open_checkpoint(file)
    assert catalog.tied == {"b": "a"}
    three = [gguf_tensor(name="a"), gguf_tensor(name="b", offset=16), gguf_tensor(name="c", offset=64)]
    file.write_bytes(gguf_head(tensors=3) + b"".join(three) + bytes(192))
    catalog = open_checkpoint(file)
    assert [extent.name for extent in catalog.extents] == ["c"]
    assert all("overlap" in fault.error and "tied.gguf" in fault.error for fault in catalog.faults)

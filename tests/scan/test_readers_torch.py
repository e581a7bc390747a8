"""Files of torch: every tensor is found where it lies, bit for bit; no code of a file runs; broken ones are told."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from orthofast.errors import CheckpointError
from orthofast.scan.catalog import Catalog
from orthofast.scan.readers import torch_legacy
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.attacks import with_pickle
from tests.scan.stored_values import same_bits, stored_values

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
DTYPES += (
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)
DTYPES += ("bool", "complex64")


def sample(dtype: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (6, 40), generator=generator, dtype=torch.uint8)
    if dtype == "bool":
        return (values % 2).bool()
    return values.view(getattr(torch, dtype))


def check(catalog: Catalog, expected: dict[str, torch.Tensor]) -> None:
    """The catalog holds these tensors and no other, bit for bit."""
    assert catalog.faults == []
    found = stored_values(catalog)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same_bits(found[name], tensor.detach())] == []


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_is_read_bit_for_bit(protocol: int, tmp_path: Path) -> None:
    tensors = {name: sample(name, i) for i, name in enumerate(DTYPES)}
    catalog = open_checkpoint(saved(tmp_path / "types.pt", tensors, pickle_protocol=protocol))
    assert catalog.format == "torch"
    check(catalog, tensors)


def test_views_share_storages_and_keep_their_strides(tmp_path: Path) -> None:
    whole = torch.randn(6, 7, 5)
    tensors = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "slice": whole[1:5:2, 3:, 1::3],
        "row": whole[2:3],
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(3, 2)),
        "one": torch.randn(1, 9).t(),
    }
    catalog = open_checkpoint(saved(tmp_path / "views.pth", tensors))
    check(catalog, tensors)
    extents = {extent.name: extent for extent in catalog.extents}
    assert extents["transposed"].strides == (1, 35, 5)
    assert extents["row"].strides is None
    assert extents["one"].strides is None
    assert extents["slice"].nbytes < extents["whole"].nbytes


def test_tied_tensors_are_stored_once_and_named(tmp_path: Path) -> None:
    table = nn.Parameter(torch.randn(8, 4))
    tensors = {"embed.weight": table, "lm_head.weight": table, "again": table.data, "other": table.data.clone()}
    catalog = open_checkpoint(saved(tmp_path / "tied.pt", tensors))
    assert catalog.tied == {"lm_head.weight": "embed.weight", "again": "embed.weight"}
    assert [extent.name for extent in catalog.extents] == ["embed.weight", "other"]
    check(catalog, tensors)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "net"])
def test_the_model_is_found_inside_a_training_checkpoint(key: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, path=tmp_path),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        key: model.state_dict(),
        "rng_state": torch.get_rng_state(),
    }
    catalog = open_checkpoint(saved(tmp_path / "training.ckpt", content))
    check(catalog, dict(model.state_dict()))
    assert any("optimizer" in note and "rng_state" in note for note in catalog.notes)


def test_nested_dictionaries_without_a_wrapper_are_joined_by_dots(tmp_path: Path) -> None:
    a, b, c = torch.ones(2, 2), torch.ones(3), torch.zeros(1)
    content = {"encoder": {"layers": [{"w": a}, {"w": b}]}, "scaler.weight": c, "optimizer": {"w": torch.ones(4)}}
    catalog = open_checkpoint(saved(tmp_path / "nested.pt", content))
    check(catalog, {"encoder.layers.0.w": a, "encoder.layers.1.w": b, "scaler.weight": c})
    assert catalog.notes == ["left out as no part of the model: optimizer"]


def test_a_single_tensor_and_a_list_are_read(tmp_path: Path) -> None:
    a, b = torch.randn(3, 3), torch.randn(2, 5)
    check(open_checkpoint(saved(tmp_path / "one.pt", a)), {"tensor": a})
    check(open_checkpoint(saved(tmp_path / "list.pt", [a, b])), {"0": a, "1": b})


def test_tensors_with_attributes_and_subclasses_of_parameter_keep_their_values(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3, 2))
    weight.label = "kept by torch"  # type: ignore[attr-defined]
    check(open_checkpoint(saved(tmp_path / "attr.pt", {"w": weight})), {"w": weight})


@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning")
def test_what_is_no_dense_tensor_is_a_fault_with_its_reason(tmp_path: Path) -> None:
    content = {
        "good": torch.ones(2, 2),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(5, 5, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        "negative": torch.complex(torch.ones(2), torch.ones(2)).conj().imag,
        "wide": torch.ones(2, dtype=torch.complex128),
    }
    catalog = open_checkpoint(saved(tmp_path / "odd.pt", content))
    assert [extent.name for extent in catalog.extents] == ["good"]
    reasons = {fault.name: fault.error for fault in catalog.faults}
    assert reasons.keys() == content.keys() - {"good"}
    for name, word in {
        "sparse": "sparse",
        "meta": "no values",
        "quantised": "quantised",
        "negative": "negative",
        "wide": "type",
    }.items():
        assert word in reasons[name]
        assert "odd.pt" in reasons[name]


def test_a_repeated_view_is_bounded_by_what_is_stored(tmp_path: Path) -> None:
    bomb = torch.ones(1).expand(1 << 16, 1 << 16)
    catalog = open_checkpoint(saved(tmp_path / "bomb.pt", {"bomb": bomb, "good": torch.ones(2)}))
    assert [fault.name for fault in catalog.faults] == ["bomb"]
    assert "claims 4294967296 elements where 1 are stored" in catalog.faults[0].error
    assert [extent.name for extent in catalog.extents] == ["good"]


def test_shards_with_an_index_are_read_and_missing_ones_named(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(3, 4) for i in range(4)}
    names = list(tensors)
    weight_map = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        part = {name: tensors[name] for name in names[i::3]}
        torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(open_checkpoint(tmp_path), tensors)
    check(open_checkpoint(index), tensors)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    catalog = open_checkpoint(tmp_path)
    assert {fault.name for fault in catalog.faults} == {"layers.1.weight"}
    assert "1 of 3 shards are missing: pytorch_model-00002-of-00003.bin" in catalog.faults[0].error


def test_deflated_members_are_loaded_whole_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.randn(20, 30), "v": torch.zeros(10)}
    tensors["tied"] = tensors["w"]
    file = saved(tmp_path / "deflated.pt", tensors)
    file.write_bytes(deflated(file.read_bytes()))
    catalog = open_checkpoint(file)
    assert catalog.tied == {"tied": "w"}
    assert catalog.memory.keys() == {"w", "v"}
    check(catalog, tensors)
    monkeypatch.setattr(torch_legacy, "LIMIT_BYTES", 2000)
    with pytest.raises(CheckpointError, match=r"deflated\.pt has to be loaded whole .* compressed, and \d+ bytes"):
        open_checkpoint(file)


def test_files_before_torch_1_6_are_loaded_whole_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = OrderedDict(w=torch.randn(20, 30).t(), half=torch.randn(4, 4).half())
    file = saved(tmp_path / "old.bin", {"state_dict": tensors}, _use_new_zipfile_serialization=False)
    catalog = open_checkpoint(file)
    assert catalog.format == "torch"
    check(catalog, dict(tensors))
    monkeypatch.setattr(torch_legacy, "LIMIT_BYTES", 2000)
    with pytest.raises(CheckpointError, match=r"old\.bin has to be loaded whole .* over the limit"):
        open_checkpoint(file)


class Bomb:
    """Leaves a file behind if its pickle is ever run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


class Evaluated(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self.trace)!r}, 'w').close()",))


@pytest.mark.parametrize("kind", [Bomb, Evaluated])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_never_run(kind: type[Bomb], zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"w": torch.ones(2, 2), "bomb": kind(trace)}
    file = saved(tmp_path / "bomb.pt", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing of it was run") as caught:
        open_checkpoint(file)
    assert "bomb.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the bomb is a real one
    assert trace.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_is_refused_with_what_to_do(zipped: bool, tmp_path: Path) -> None:
    file = saved(tmp_path / "whole.pt", nn.Linear(2, 2), _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"whole\.pt is a whole pickled module .*state_dict\(\)"):
        open_checkpoint(file)


def test_a_torchscript_program_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "script.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("script/constants.pkl", b"\x80\x02).")
        archive.writestr("script/data.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match=r"script\.pt is a TorchScript program"):
        open_checkpoint(file)


def test_a_file_is_told_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3, 3)}
    check(open_checkpoint(saved(tmp_path / "odd.safetensors", tensors)), tensors)
    save_file(tensors, tmp_path / "odd.bin")
    check(open_checkpoint(tmp_path / "odd.bin"), tensors)


def a_file(zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(6).view(2, 3).t()}
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def deflated(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return buffer.getvalue()


WHOLE = a_file()
LOADED = {"legacy": a_file(zipped=False), "deflated": deflated(WHOLE)}


def refused_or_sound(file: Path) -> None:
    """One sentence that names the file, or extents inside the file."""
    refusal = ""
    try:
        catalog = open_checkpoint(file)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert file.name in refusal
        assert "\n" not in refusal
        return
    size = file.stat().st_size
    for extent in catalog.extents:
        assert extent.name in catalog.memory or 0 <= extent.offset <= extent.offset + extent.nbytes <= size
    assert all(file.name in fault.error for fault in catalog.faults)
    stored_values(catalog)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(WHOLE)), tail=st.binary(max_size=30))
def test_any_cut_and_any_tail_never_crash(cut: int, tail: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut.pt"
    file.write_bytes(WHOLE[:cut] + tail)
    refused_or_sound(file)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    region=st.sampled_from(["pickle", "directory", "any"]),
)
def test_flipped_bytes_never_crash(flips: list[tuple[int, int]], region: str, tmp_path: Path) -> None:
    content = bytearray(WHOLE)
    start, stop = {
        "pickle": (64, 64 + len(pickle_of(WHOLE))),
        "directory": (WHOLE.index(b"PK\x01\x02"), len(WHOLE)),
        "any": (0, len(WHOLE)),
    }[region]
    for position, byte in flips:
        content[start + position % (stop - start)] = byte
    file = tmp_path / "flipped.pt"
    file.write_bytes(bytes(content))
    refused_or_sound(file)


@pytest.mark.parametrize("kind", LOADED)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 3),
)
def test_flipped_bytes_of_files_that_are_loaded_never_crash(
    kind: str, flips: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    content = bytearray(LOADED[kind])
    for position, byte in flips:
        content[position % len(content)] = byte
    file = tmp_path / "flipped.bin"
    file.write_bytes(bytes(content[: len(content) - 50 * cut]))
    refused_or_sound(file)


def pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("archive/data.pkl")


def test_dictionaries_that_share_dictionaries_cost_no_more_than_their_size(tmp_path: Path) -> None:
    """Twenty levels of ten references each would be 10^20 paths."""
    level: dict[str, object] = {"w": torch.ones(2)}
    for _ in range(20):
        level = {str(i): level for i in range(10)}
    catalog = open_checkpoint(saved(tmp_path / "shared.pt", level))
    assert len(catalog.extents) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"offset": 100}, "claims elements up to"),
        ({"size": (1 << 40, 1 << 40)}, "claims elements up to"),
        ({"size": (-1, 2)}, "no sound pickle"),
        ({"size": (2, 2), "stride": (1,)}, "no sound pickle"),
        ({"stride": (1 << 62, 1)}, "claims elements up to"),
        ({"key": "7"}, "storage 7, which the file does not hold"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_a_fault(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    fields = {"key": "0", "offset": 0, "size": (2, 2), "stride": (2, 1)} | change

    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, fields["key"], "cpu", 4) if obj is storage else None

    class Claimed:
        def __reduce__(self) -> tuple[Any, ...]:
            args = (storage, fields["offset"], fields["size"], fields["stride"], False, OrderedDict())
            return (torch._utils._rebuild_tensor_v2, args)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"claimed": Claimed()})
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(with_pickle(tmp_path / "claims.pt", buffer.getvalue(), {"0": bytes(16)}))


def test_a_directory_as_large_as_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    size = 1 << 40
    end = b"PK\x05\x06" + bytes(4) + (1).to_bytes(2, "little") * 2
    end += (0xFFFFFF00).to_bytes(4, "little") + (0).to_bytes(4, "little") + bytes(2)
    file = tmp_path / "sparse.pt"
    with file.open("wb") as handle:
        handle.write(b"PK\x03\x04")
        handle.truncate(size - len(end))
        handle.seek(0, 2)
        handle.write(end)
    with pytest.raises(CheckpointError, match=r"sparse\.pt is truncated or no zip file of torch: a part of"):
        open_checkpoint(file)

"""What a scan measures equals the definition in float64, for every stored type, layout of files and side."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from orthofast.errors import BackendError, InputError
from orthofast.scan import scan_checkpoint
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write, write_shards

DTYPES = {
    "float64": (torch.float64, 1e-13),
    "float32": (torch.float32, 2e-7),
    "float16": (torch.float16, 2e-7),
    "bfloat16": (torch.bfloat16, 2e-7),
    "float8_e4m3fn": (torch.float8_e4m3fn, 2e-7),
    "float8_e5m2": (torch.float8_e5m2, 2e-7),
    "float8_e4m3fnuz": (torch.float8_e4m3fnuz, 2e-7),
    "float8_e5m2fnuz": (torch.float8_e5m2fnuz, 2e-7),
}


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.values(), ids=DTYPES.keys())
def test_every_stored_type_equals_the_definition(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    weight = torch.randn(37, 53).add(0.2).to(dtype)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    rows = {row.vectors: row for row in scan_checkpoint(tmp_path).rows}
    exact = weight.double().numpy()
    assert rows["rows"].pii == pytest.approx(numpy_pii(exact), abs=tolerance)
    assert rows["cols"].pii == pytest.approx(numpy_pii(exact.T), abs=tolerance)


def test_extents_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = make_tensors(FAMILIES["bert"]) | {"ids": torch.arange(5), "flag": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    catalog = open_checkpoint(tmp_path)
    assert not catalog.faults
    content = (tmp_path / "model.safetensors").read_bytes()
    with safe_open(tmp_path / "model.safetensors", "pt") as library:
        assert {extent.name for extent in catalog.extents} == set(library.keys())
        for extent in catalog.extents:
            stored = library.get_tensor(extent.name)
            assert extent.shape == tuple(stored.shape)
            assert content[extent.offset : extent.offset + extent.nbytes] == stored.numpy().tobytes()


@pytest.mark.parametrize("how", ["index", "folder without index", "index file", "single file"])
def test_shards_give_the_numbers_of_one_file(how: str, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    tensors = make_tensors(family)
    whole = scan_checkpoint(write(tmp_path / "whole", tensors, family.config))
    folder = write_shards(tmp_path / "shards", tensors)
    target = folder
    if how == "folder without index":
        (folder / "model.safetensors.index.json").unlink()
    elif how == "index file":
        target = folder / "model.safetensors.index.json"
    elif how == "single file":
        target = tmp_path / "whole" / "model.safetensors"
    found = scan_checkpoint(target)
    assert [(r.name, r.vectors, r.pii, r.role, r.layer) for r in found.rows] == [
        (r.name, r.vectors, r.pii, r.role, r.layer) for r in whole.rows
    ]
    assert found.skipped == whole.skipped


def test_one_of_several_copies_in_a_folder_is_taken(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    save_file({"b.weight": torch.randn(4, 4)}, tmp_path / "consolidated.safetensors")
    assert {row.name for row in scan_checkpoint(tmp_path).rows} == {"a.weight"}


def test_baseline_and_ratio(tmp_path: Path) -> None:
    save_file({"w": torch.randn(9, 384)}, tmp_path / "model.safetensors")
    for row in scan_checkpoint(tmp_path).rows:
        assert row.d is not None
        assert row.pii is not None
        # E|cos| of isotropic vectors: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))
        expected = math.exp(math.lgamma(row.d / 2) - math.lgamma((row.d + 1) / 2)) / math.sqrt(math.pi)
        assert row.baseline == pytest.approx(expected, rel=1e-12)
        assert row.ratio == pytest.approx(row.pii / expected, rel=1e-12)


def test_one_vector_is_null_without_an_error(tmp_path: Path) -> None:
    save_file({"score.weight": torch.randn(1, 8)}, tmp_path / "model.safetensors")
    rows = {row.vectors: row for row in scan_checkpoint(tmp_path).rows}
    assert (rows["rows"].n, rows["rows"].pii, rows["rows"].ratio, rows["rows"].error) == (1, None, None, None)
    assert rows["cols"].pii == pytest.approx(1.0)


def test_zero_vectors_are_counted_and_left_out(tmp_path: Path) -> None:
    weight = torch.randn(8, 5)
    weight[[1, 6]] = 0
    save_file({"w": weight, "z": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    rows = {(row.name, row.vectors): row for row in scan_checkpoint(tmp_path).rows}
    assert rows["w", "rows"].zero == 2
    assert rows["w", "rows"].pii == pytest.approx(numpy_pii(weight.numpy()), abs=2e-7)
    assert (rows["z", "rows"].zero, rows["z", "rows"].pii, rows["z", "rows"].error) == (3, None, None)


def test_what_cannot_be_measured_is_listed_with_its_reason(tmp_path: Path) -> None:
    tensors = {
        "proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "proj.weight_scale_inv": torch.ones(2, 2),
        "packed.qweight": torch.ones(4, 4, dtype=torch.int32),
        "complex.weight": torch.ones(3, 3, dtype=torch.complex64),
        "empty.weight": torch.ones(0, 4),
        "cube": torch.ones(2, 3, 4),
        "number": torch.tensor(1.0),
        "bn.weight": torch.ones(4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with_matrix = tensors | {"w": torch.randn(3, 3)}
    save_file(with_matrix, tmp_path / "model.safetensors")
    result = scan_checkpoint(tmp_path)
    reasons = {entry.name: entry.reason for entry in result.skipped}
    assert set(reasons) == set(tensors)
    assert {row.name for row in result.rows} == {"w"}
    words = {
        "proj.weight": "proj.weight_scale_inv",
        "packed.qweight": "I32",
        "complex.weight": "C64",
        "empty.weight": "empty",
        "cube": "3-D",
        "number": "single number",
        "bn.weight": "norm scale",
    }
    for name, word in words.items():
        assert word in reasons[name]


def test_selection_by_name(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    write(tmp_path, make_tensors(family), family.config)
    only = scan_checkpoint(tmp_path, include="*attention.self*", exclude=["*key*", "*bias"], vectors="cols")
    assert {row.name.split(".")[-2] for row in only.rows} == {"query", "value"}
    assert {row.vectors for row in only.rows} == {"cols"}
    names = {row.name for row in only.rows} | {entry.name for entry in only.skipped}
    assert names == set(family.tensors)
    with pytest.raises(InputError, match="no tensor"):
        scan_checkpoint(tmp_path, include="nothing*")
    with pytest.raises(InputError, match="vectors needs"):
        scan_checkpoint(tmp_path, vectors="heads")


def test_a_backend_is_obeyed_or_refused(tmp_path: Path) -> None:
    save_file({"w": torch.randn(5, 6)}, tmp_path / "model.safetensors")
    assert scan_checkpoint(tmp_path, backend="reference").provenance["backends"] == ["reference"]
    with pytest.raises(BackendError, match="abacus"):
        scan_checkpoint(tmp_path, backend="abacus")
    with pytest.raises(InputError, match="precision"):
        scan_checkpoint(tmp_path, precision="low")


def test_two_runs_give_the_same_bits(tmp_path: Path) -> None:
    save_file({f"layers.{i}.weight": torch.randn(70, 65 + i) for i in range(5)}, tmp_path / "model.safetensors")
    first, second = (scan_checkpoint(tmp_path) for _ in range(2))
    assert [row.pii for row in first.rows] == [row.pii for row in second.rows]
    assert np.isfinite([row.pii for row in first.rows if row.pii is not None]).all()

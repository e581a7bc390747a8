"""The demo's checkpoint, a real pretrained transformer: its numbers by numpy, its table, the demo command."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from orthofast import cli
from orthofast.commands import demo
from orthofast.scan import ScanResult, scan_checkpoint
from tests.scan.checkpoints import numpy_pii

LEAVES = {
    "attention.self.query": "Query",
    "attention.self.key": "Keys",
    "attention.self.value": "Values",
    "attention.output.dense": "Atten_Output",
    "intermediate.dense": "Linear_1.weight",
    "output.dense": "Linear_2.weight",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        files = importlib.metadata.distribution(demo.PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI owes the package {demo.PACKAGE}: pip install '.[demo]'")
        pytest.skip(f"the package {demo.PACKAGE} is not installed")
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


@pytest.fixture(scope="module")
def result(folder: Path) -> ScanResult:
    return scan_checkpoint(folder, exclude="*word_embeddings*")


def test_every_matrix_of_minilm_is_measured(result: ScanResult, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert not result.failed
    assert {row.name for row in result.rows} | {entry.name for entry in result.skipped} == set(stored)
    matrices = {name for name, array in stored.items() if array.ndim == 2 and array.dtype.kind == "f"}
    assert {row.name for row in result.rows} == matrices - {"embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize(("leaf", "role"), LEAVES.items(), ids=LEAVES.values())
def test_cells_of_minilm_equal_numpy(layer: int, leaf: str, role: str, result: ScanResult, folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[f"encoder.layer.{layer}.{leaf}.weight"]
    for side, vectors in (("rows", weight), ("cols", weight.T)):
        table = result.table5(side)
        assert table.layers == tuple("012345")
        assert table.cells[str(layer), role] == pytest.approx(numpy_pii(vectors), abs=2e-8)


def test_the_demo_prints_a_table_and_writes_a_report(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "Linear_1.weight" in done.stdout
    assert str(tmp_path / "out" / "report.html") in done.stdout + done.stderr
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["provenance"]["checkpoint"] == "all-MiniLM-L6-v2"
    assert len(document["rows"]) == 80
    assert all(row["error"] is None and row["pii"] is not None for row in document["rows"])
    assert "all-MiniLM-L6-v2" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_without_the_package_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-of-orthofast")
    done = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (4, "")
    assert done.stderr == "orthofast: the demo needs the package with its checkpoint: pip install 'orthofast[demo]'\n"
    assert not (tmp_path / "out").exists()

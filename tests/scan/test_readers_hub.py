"""Models of the hub: what is downloaded, what is fetched of headers, what a user without a network reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from orthofast.errors import CheckpointError, MissingPackageError
from orthofast.scan.readers import hub as hub_reader
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.hub_server import COMMIT, Hub, serving
from tests.scan.stored_values import same_bits, stored_values

TENSORS = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(64, 512) for i in range(3)}


def sharded() -> dict[str, bytes]:
    names = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    files = {name: save({key: value}) for name, (key, value) in zip(names, TENSORS.items(), strict=True)}
    weight_map = dict(zip(TENSORS, names, strict=True))
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = b'{"model_type": "llama"}'
    files["pytorch_model.bin"] = b"a second copy"
    files["original/consolidated.00.pth"] = b"a third copy"
    return files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    found.models["org/name"] = sharded()
    with serving(found):
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield found


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("hf://org/name@abc", "org/name", "abc"),
        ("hf://gpt2", "gpt2", None),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(source: str, repo: str, revision: str | None) -> None:
    assert hub_reader.model_name(source) == hub_reader.ModelName(repo, revision)


@pytest.mark.parametrize(
    "source", ["model", "a/b/c", "./org/name", "/org/name", "org/model.safetensors", "tests/absent"]
)
def test_a_path_is_told_from_a_name_of_the_hub(source: str) -> None:
    assert hub_reader.model_name(source) is None
    assert hub_reader.model_name(Path("org/name")) is None


def test_what_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_reader.model_name("org/name") is not None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_reader.model_name("org/name") is None


def test_one_copy_is_downloaded_once_and_its_commit_recorded(hub: Hub) -> None:
    catalog = open_checkpoint("org/name")
    assert catalog.revision == COMMIT
    assert catalog.config == {"model_type": "llama"}
    found = stored_values(catalog)
    assert [name for name, tensor in TENSORS.items() if not same_bits(found[name], tensor)] == []
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert fetched == hub.models["org/name"].keys() - {"pytorch_model.bin", "original/consolidated.00.pth"}
    before = hub.sent_bytes
    assert open_checkpoint("org/name").extents == catalog.extents
    assert hub.sent_bytes - before < 5000


def test_without_a_network_the_cache_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = open_checkpoint("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    again = open_checkpoint("org/name")
    assert again.extents == catalog.extents
    assert again.revision == COMMIT
    assert len(hub.asked) == asked
    (catalog.root / "model-00002-of-00003.safetensors").unlink()
    partial = open_checkpoint("org/name")
    assert "model-00002-of-00003.safetensors" in partial.faults[0].error
    with pytest.raises(CheckpointError, match="other/name is neither a path here nor in the cache, and the hub cannot"):
        open_checkpoint("other/name")


def test_a_model_that_is_not_there_is_one_sentence(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="org/absent is neither a path here nor a model on the hub"):
        open_checkpoint("org/absent")
    with pytest.raises(CheckpointError, match="org/absent is neither a path here nor a model on the hub"):
        open_checkpoint("org/absent", headers_only=True)
    hub.models["org/onnx"] = {"model.onnx": b"x"}
    with pytest.raises(CheckpointError, match=r"org/onnx holds only model\.onnx, and ONNX files are not read"):
        open_checkpoint("org/onnx")


def test_headers_are_fetched_without_the_weights(hub: Hub) -> None:
    catalog = open_checkpoint("org/name", headers_only=True)
    assert catalog.revision == COMMIT
    assert catalog.config == {"model_type": "llama"}
    found = {extent.name: (extent.dtype, extent.shape, extent.nbytes) for extent in catalog.extents}
    assert found == dict.fromkeys(TENSORS, ("F32", (64, 512), 64 * 512 * 4))
    assert "only the headers were fetched from the hub" in catalog.notes
    assert all(span for method, path, span in hub.asked if method == "GET" and path.endswith("of-00003.safetensors"))


def test_a_model_without_safetensors_says_so_when_headers_are_asked(hub: Hub) -> None:
    hub.models["org/pickle"] = {"pytorch_model.bin": b"PK"}
    with pytest.raises(CheckpointError, match="org/pickle has no safetensors on the hub"):
        open_checkpoint("org/pickle", headers_only=True)


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"org/name is no path here; .* pip install 'orthofast\[hub\]'"):
        open_checkpoint("org/name")

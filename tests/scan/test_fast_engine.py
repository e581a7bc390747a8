"""The engine of the package fastsafetensors gives the same rows, and says what it cannot do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from orthofast.errors import InputError, MissingPackageError
from orthofast.scan import ScanOptions, ScanResult, budgets, provenance, scan_checkpoint
from orthofast.scan.fastsafetensors_engine import refuse_others
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.checkpoints import write_shards
from tests.scan.fake_device import FakeDevice

FAST = ScanOptions(engine="fastsafetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {
        f"layers.{i}.weight": torch.randn(20 + i, 30).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(12)
    }
    return write_shards(tmp_path / "model", tensors)


class Loader:
    """What the engine uses of ``ParallelLoader``, by the library of the format."""

    opened: list[dict[str, Any]]
    broken = ""

    def __init__(self, group: None, files: list[str], *, tensor_filter: Any, **named: Any) -> None:
        assert group is None
        self.opened.append(named)
        self.files, self.keep = files, tensor_filter

    def iterate_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - it is no dict
                    if name == self.broken:
                        raise OSError("read of 77 bytes failed\nmore lines")
                    if self.keep(name):
                        yield name, handle.get_tensor(name)

    def close(self) -> None:
        self.opened[-1]["closed"] = True


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> type[Loader]:
    kind = type("Fake", (Loader,), {"opened": []})
    monkeypatch.setitem(sys.modules, "fastsafetensors", SimpleNamespace(ParallelLoader=kind))  # type: ignore[arg-type]
    return kind


def test_the_package_itself_gives_the_same_rows(model: Path) -> None:
    pytest.importorskip("fastsafetensors", reason="the extra 'fast' is not installed", exc_type=ImportError)
    assert scan_checkpoint(model, options=FAST).rows == scan_checkpoint(model).rows


def test_groups_are_read_by_name_and_in_bounds(
    model: Path, loader: type[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scan_checkpoint(model)
    monkeypatch.setattr(budgets, "HOST_GROUP_BYTES", 6000)
    assert scan_checkpoint(model, options=FAST).rows == whole.rows
    assert len(loader.opened) > 3
    for named in loader.opened:
        assert named["closed"]
        assert (named["device"], named["nogds"], named["queue_size"]) == ("cpu", True, -1)
        assert named["max_batch_bytes"] <= 6000 + (1 << 20)


def test_on_a_device_values_are_waited_for(model: Path, loader: type[Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan_checkpoint(model)
    device = FakeDevice()
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    assert scan_checkpoint(model, options=FAST).rows == whole.rows
    assert device.settled == len(loader.opened) > 0
    assert not any(named["nogds"] for named in loader.opened)


def test_a_failing_read_costs_what_had_not_come(model: Path, loader: type[Loader]) -> None:
    loader.broken = "layers.7.weight"
    result = scan_checkpoint(model, vectors="rows", options=FAST)
    failed = {row.name: str(row.error) for row in result.failed}
    assert "layers.7.weight" in failed
    assert len(failed) < 12
    assert all(error.endswith("fastsafetensors: read of 77 bytes failed") for error in failed.values())
    assert all(row.pii is not None for row in result.rows if row.name not in failed)


def test_without_the_package_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastsafetensors", None)
    with pytest.raises(MissingPackageError, match=r"engine 'fastsafetensors' needs .*pip install 'orthofast\[fast\]'"):
        scan_checkpoint(model, options=FAST)


def test_other_formats_are_refused(model: Path, tmp_path: Path) -> None:
    torch.save({"w.weight": torch.randn(4, 4)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"reads safetensors files only, and 'w\.weight' is stored in another way"):
        scan_checkpoint(tmp_path / "model.pt", options=FAST)
    plan = make_plan(open_checkpoint(model))
    refuse_others(plan.items, ())
    with pytest.raises(InputError, match="another way"):
        refuse_others(plan.items, ["layers.3.weight"])
    assert isinstance(scan_checkpoint(model), ScanResult)

"""Scans of adapters through the pipeline: what is read and held, journals, samples, devices, short memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orthofast.kernels import Sample
from orthofast.scan import ScanOptions, adapters_folding, adapters_update, provenance, reading, scan_checkpoint
from orthofast.scan.adapters import open_adapter, with_adapter
from orthofast.scan.adapters_update import Factors, Update, merge
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.adapters import DOWN, QUERY, SHAPES, base_tensors, lora, save_adapter, versions
from tests.scan.checkpoints import write
from tests.scan.fake_device import FakeDevice
from tests.scan.pipeline_parts import shrink


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", base_tensors())


def test_only_one_merged_weight_is_made_beside_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the sum come and go; what stays is the result."""
    monkeypatch.setattr(adapters_update, "CPU_VALUES", 1 << 12)
    weight = torch.randn(128, 256)
    a, b = torch.randn(8, 256), torch.randn(128, 8)
    made: list[tuple[int, int]] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                made.append((found.untyped_storage().data_ptr(), found.untyped_storage().nbytes()))
            return found

    with Sizes():
        merged = merge(weight, Factors(a, b, Update("lora", 0.5, 8)))
    assert torch.allclose(merged, weight + 0.5 * b @ a, atol=1e-4)
    known = {tensor.data_ptr() for tensor in (weight, a, b, merged)}
    assert merged.data_ptr() in dict(made)
    assert max(nbytes for place, nbytes in made if place not in known) <= weight.nbytes // 4


def test_every_byte_is_read_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16))
    plan = with_adapter(make_plan(open_checkpoint(base)), open_adapter(adapter))
    tensors = sum(tensor.nbytes for tensor in base_tensors().values())
    assert plan.nbytes == tensors + 4 * 4 * (24 + 16)
    read: list[int] = []
    plain = reading.Files.read

    def counted(self: reading.Files, segment: reading.Segment, into: memoryview) -> None:
        read.append(segment.nbytes)
        plain(self, segment, into)

    monkeypatch.setattr(reading.Files, "read", counted)
    scan_checkpoint(base, adapter=adapter)
    assert sum(read) == plan.nbytes


def test_equal_weights_with_different_updates_are_not_one(tmp_path: Path) -> None:
    weight = torch.randn(24, 16)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    folder = write(tmp_path / "base", {f"{name}.weight": weight.clone() for name in names})
    result = scan_checkpoint(folder, adapter=save_adapter(tmp_path / "a", lora(names[1], 24, 16)))
    base = versions(result, f"{names[1]}.weight")["base"]
    assert len({row.pii for row in result.rows if row.adapter == "base" and row.vectors == "rows"}) == 1
    assert {len(versions(result, f"{name}.weight")) for name in names} == {1, 3}
    assert versions(result, f"{names[1]}.weight")["merged"].pii != base.pii


def test_a_sample_estimates_all_versions(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(8)
    folder = write(tmp_path / "base", {f"{QUERY}.weight": torch.randn(300, 64, generator=random)})
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 300, 64))
    exact = versions(scan_checkpoint(folder, adapter=adapter), f"{QUERY}.weight")
    sampled = versions(scan_checkpoint(folder, adapter=adapter, sample=Sample(4000, 1)), f"{QUERY}.weight")
    for version, row in sampled.items():
        assert row.standard_error
        assert row.pii == pytest.approx(exact[version].pii, abs=6 * row.standard_error)
    assert sampled["merged"].drift == pytest.approx(exact["merged"].drift, rel=0.15)
    assert sampled["merged"].drift != exact["merged"].drift


def test_a_device_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one whose copies come late, with room for one merged weight at a time."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(6)]
    random = torch.Generator().manual_seed(9)
    folder = write(
        tmp_path / "base", {f"{n}.weight": torch.randn(24 + i, 16, generator=random) for i, n in enumerate(names)}
    )
    given: dict[str, Tensor] = {}
    for i, name in enumerate(names[1:], 1):
        given |= lora(name, 24 + i, 16, seed=i)
    adapter = save_adapter(tmp_path / "a", given)
    whole = scan_checkpoint(folder, adapter=adapter, heads=True)
    shrink(monkeypatch, 4000)
    device = FakeDevice(free=60_000)
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    found = scan_checkpoint(folder, adapter=adapter, heads=True)
    assert found.rows == whole.rows
    assert found.failed == []
    assert device.violations == []
    assert device.ring_bytes <= 60_000


def test_short_memory_is_told_where_it_was_short(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16) | lora(DOWN, 16, 20))
    whole = scan_checkpoint(base, adapter=adapter)
    plain = adapters_folding.merge

    def merged(weight: Tensor, *rest: object) -> Tensor:
        if weight.shape == SHAPES[DOWN]:
            raise MemoryError
        return plain(weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters_folding, "merge", merged)
    found = scan_checkpoint(base, adapter=adapter)
    assert [row.error for row in found.failed] == [adapters_folding.NO_MEMORY] * 2
    assert {(row.name, row.adapter) for row in found.failed} == {(f"{DOWN}.weight", "merged")}
    assert [r for r in found.rows if r.error is None] == [
        r for r in whole.rows if (r.name, r.adapter) != (f"{DOWN}.weight", "merged")
    ]


def test_a_journal_knows_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", lora(QUERY, 24, 16))
    journal = tmp_path / "journal"
    first = scan_checkpoint(base, adapter=adapter, options=ScanOptions(journal=journal))

    def again() -> tuple[list[object], object]:
        result = scan_checkpoint(base, adapter=adapter, options=ScanOptions(journal=journal, resume=True))
        weights = result.provenance["weights"]
        assert isinstance(weights, dict)
        return list(result.rows), weights["measured"]

    assert again() == (list(first.rows), 0)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))  # the factors stay as they are
    rows, measured = again()
    assert measured == 1
    assert rows != first.rows
    save_adapter(adapter, lora(QUERY, 24, 16, seed=9), lora_alpha=9)
    assert again()[1] == 1

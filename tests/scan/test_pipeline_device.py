"""On a device the scan gives the same bits, nothing is read before it is there, and short memory is no crash."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthofast.errors import CheckpointError, InputError
from orthofast.scan import budgets, folding, provenance, scan_checkpoint
from orthofast.scan.budgets import Budget, batches, budget_for
from orthofast.scan.engines import DeviceStaging, Group, PositionalEngine
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.slabs import ClosedError, Ring, Slabs
from tests.scan.fake_device import FakeDevice
from tests.scan.pipeline_parts import MIB, mixed_model, numbers, shrink


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mixed_model(tmp_path / "model")


def shortage(xs: list[torch.Tensor], most: int) -> None:
    if len(xs) > most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")


@pytest.mark.parametrize("most", [3, 1, 0])
def test_short_memory_means_smaller_groups_then_rows_with_an_error(
    most: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scan_checkpoint(model)
    real = folding.gram_stats_many

    def fold(xs: list[torch.Tensor], **arguments: object) -> object:
        shortage(xs, most)
        return real(xs, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(folding, "gram_stats_many", fold)
    device = FakeDevice()
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    found = scan_checkpoint(model)
    assert device.relieved
    if most:
        assert numbers(found) == numbers(whole)
    else:
        assert len(found.failed) == len(found.rows) == 80
        assert "the memory of cpu does not suffice to fold 20 vectors of length 40" in str(found.rows[0].error)


def test_other_errors_of_a_fold_are_not_taken_for_short_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fold(*_: object, **__: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(folding, "gram_stats_many", fold)
    with pytest.raises(RuntimeError, match="illegal"):
        scan_checkpoint(model)


@pytest.mark.parametrize("free", [150_000, 64 * MIB], ids=["a ring for some", "a ring for all"])
@pytest.mark.parametrize("host_mem", [MIB, 64 * MIB])
def test_a_device_gives_the_same_bits_and_nothing_is_read_early(
    host_mem: int, free: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scan_checkpoint(model, heads=True)
    shrink(monkeypatch, 30_000, 4000)
    monkeypatch.setattr(folding, "DEVICE_CALL_FLOPS", 1.0)
    device = FakeDevice(free)
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    found = scan_checkpoint(model, heads=True, options=ScanOptions(host_mem=host_mem, gpu_mem=2 * MIB))
    assert numbers(found) == numbers(whole)
    assert device.violations == []
    plan = make_plan(open_checkpoint(model))
    assert plan.nbytes <= device.copied_bytes <= plan.nbytes + 64 * len(plan.items)
    assert device.most_queued > 1
    assert device.pinned_bytes <= host_mem
    assert device.ring_bytes <= free


def test_slabs_and_ring_are_allocated_once_within_their_bounds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(open_checkpoint(model))
    device = FakeDevice()
    budget = budget_for(plan.items, ScanOptions(host_mem=MIB), device.free)
    assert budget.slab * budget.slabs <= MIB
    monkeypatch.setattr(budgets, "READ_BYTES", 4096)
    budget = Budget(20_000, 50_000, 4096, 2)
    staging = DeviceStaging(device, budget.ring, budget.slabs, budget.slab)
    engine = PositionalEngine(staging, window_bytes=budget.slab, device=device.device)
    held: list[Group] = []
    pauses = 0
    for group in engine.groups(batches(plan.items, budget)):
        if group is None:
            pauses += 1
            _fetched(device, held[0])
            engine.release(held.pop(0))
            continue
        for parts in group.parts:
            assert not isinstance(parts, CheckpointError)
        held.append(group)
    engine.close()
    assert pauses > 3  # the ring was full: the fold had to give memory back first
    assert (device.pinned_bytes, device.ring_bytes) == (2 * 4096, 50_000)
    assert device.violations == []


def _fetched(device: FakeDevice, group: Group) -> None:
    device._reading = [entry for entry in device._reading if not _within(entry[:2], group)]


def _within(span: tuple[int, int], group: Group) -> bool:
    assert group.region is not None
    start = group.region.data_ptr()
    return start <= span[0] and span[1] <= start + len(group.region)


def test_a_weight_larger_than_the_device_is_a_row_with_its_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {entry[:2]: entry for entry in numbers(scan_checkpoint(model))}
    device = FakeDevice(free=16_000)
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    found = scan_checkpoint(model)
    failed = [row for row in found.rows if row.error]
    assert 0 < len(failed) < 80
    assert all("raise gpu_mem" in str(row.error) and str(row.name) in str(row.error) for row in failed)
    assert all(entry == whole[entry[:2]] for entry in numbers(found) if entry[4] is None)
    assert device.ring_bytes <= 16_000


def test_a_device_with_less_than_it_said_gets_a_smaller_ring(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan_checkpoint(model)

    class Taken(FakeDevice):
        most = 90_000

        def memory(self, nbytes: int) -> torch.Tensor:
            shortage([torch.empty(0)] * nbytes, self.most)
            return super().memory(nbytes)

    monkeypatch.setattr(budgets, "LEAST_BYTES", 50_000)
    device = Taken()
    monkeypatch.setattr(provenance, "open_device", lambda _: device)
    assert numbers(scan_checkpoint(model)) == numbers(whole)
    assert device.relieved
    assert 45_000 <= device.ring_bytes <= 90_000
    device.most = 10_000
    with pytest.raises(InputError, match="the memory of cpu is taken: not even 50000 bytes"):
        scan_checkpoint(model)


def test_a_device_that_is_not_there_is_one_sentence(model: Path) -> None:
    for device, words in (("cuda:99", "torch finds"), ("abacus", "'cpu', 'cuda'"), ("meta", "needs 'cpu' or 'cuda'")):
        with pytest.raises(InputError, match=words):
            scan_checkpoint(model, device=device)


def test_a_slab_is_handed_out_again_only_after_its_copy() -> None:
    order: list[str] = []

    class Copied:
        def synchronize(self) -> None:
            order.append("copied")

    slabs = Slabs(1, 8, lambda n: torch.zeros(n, dtype=torch.uint8))
    slab = slabs.take()
    slabs.give(slab, Copied())
    assert order == []
    assert slabs.take() is slab
    assert order == ["copied"]
    waiting = threading.Thread(target=lambda: order.append(_closed(slabs)))
    waiting.start()
    slabs.close()
    waiting.join(10)
    assert order == ["copied", "closed"]


def _closed(slabs: Slabs) -> str:
    try:
        slabs.take()
    except ClosedError:
        return "closed"
    return "open"


@given(st.data())
def test_regions_of_a_ring_never_overlap(data: st.DataObject) -> None:
    ring, size = Ring(100), 100
    held: list[tuple[int, int]] = []
    for _ in range(40):
        nbytes = data.draw(st.integers(1, 60))
        start = ring.reserve(nbytes)
        if start is None:
            assert held  # an empty ring has room
            ring.release()
            held.pop(0)
            continue
        assert start >= 0
        assert start + nbytes <= size
        assert all(start + nbytes <= a or b <= start for a, b in held)
        held.append((start, start + nbytes))

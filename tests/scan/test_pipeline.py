"""The pipeline gives the numbers of whole reads in little memory; on a device nothing is read before it is there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from orthofast.errors import CheckpointError, InputError
from orthofast.scan import folding, reading, scan_checkpoint
from orthofast.scan.budgets import Budget, batches, stored_bytes
from orthofast.scan.catalog import Catalog, Extent, Piece
from orthofast.scan.engines import HostStaging, PositionalEngine
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.reading import lay_out, stored_tensor
from orthofast.scan.result import ScanResult
from orthofast.scan.weights import Weight
from tests.scan.attacks import SPOILT_VALUES, SpoiltValues
from tests.scan.checkpoints import FAMILIES, make_tensors, numpy_pii, write
from tests.scan.pipeline_parts import mixed_model, numbers, shrink


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return mixed_model(tmp_path / "model")


def test_small_groups_give_the_same_bits_and_more_progress(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan_checkpoint(model)
    shrink(monkeypatch, 5000)
    progress: list[tuple[int, int, str]] = []
    found = scan_checkpoint(model, progress=lambda *now: progress.append(now))
    assert numbers(found) == numbers(whole)
    done = [now[0] for now in progress]
    assert len(progress) == 40
    assert done == sorted(set(done))
    assert done[-1] == progress[-1][1] == make_plan(open_checkpoint(model)).nbytes


def test_progress_is_called_from_the_callers_thread(model: Path) -> None:
    threads = set()
    scan_checkpoint(model, progress=lambda *_: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    window=st.integers(1, 400),
)
def test_windows_cover_every_byte_once_and_keep_their_size(sizes: list[int], window: int) -> None:
    weights = [
        Weight(str(i), (n,), "plain", {"weight": Extent(str(i), Path("f"), 7 + 1000 * i, n, "U8", (n,))})
        for i, n in enumerate(sizes)
    ]
    layout = lay_out(weights)
    read: dict[int, tuple[int, int]] = {}  # byte of the memory -> where it comes from
    for start, stop, segments in layout.windows(window):
        assert 0 < stop - start <= window
        for segment in segments:
            assert start <= segment.at
            assert segment.at + segment.nbytes <= stop
            for i in range(segment.nbytes):
                assert segment.at + i not in read
                read[segment.at + i] = segment.weight, segment.offset + i
    expected = {
        place["weight"] + i: (index, 7 + 1000 * index + i)
        for index, place in enumerate(layout.places)
        for i in range(sizes[index])
    }
    assert read == expected


def test_a_stored_tensor_may_have_strides_and_pieces(tmp_path: Path) -> None:
    values = torch.arange(60, dtype=torch.float32)
    file = tmp_path / "storage"
    file.write_bytes(b"head" + values.numpy().tobytes())
    grid = values.view(6, 10)

    def read(extent: Extent) -> torch.Tensor:
        weight = Weight(extent.name, extent.shape, "plain", {"weight": extent})
        layout = lay_out([weight])
        memory = torch.full((layout.nbytes,), 0x5A, dtype=torch.uint8)
        files = reading.Files()
        for segment in layout.segments:
            files.read(segment, memory.numpy().data[segment.at : segment.at + segment.nbytes])
        files.close()
        return stored_tensor(memory, extent)

    def place(origin: tuple[int, int], shape: tuple[int, int], offset: int) -> Piece:
        return Piece(file, 4 + 4 * offset, 4 * shape[0] * shape[1], origin, shape)

    transposed = Extent("t", file, 4, 240, "F32", (10, 6), (1, 10))
    assert torch.equal(read(transposed), grid.T)
    beyond = replace(transposed, strides=(1, 11))
    with pytest.raises(CheckpointError, match="storage: the strides of 't' leave its 240 bytes"):
        read(beyond)
    # rows 3 to 5 are stored before rows 0 to 2
    rows = Extent("r", file, 4, 240, "F32", (6, 10), None, (place((3, 0), (3, 10), 0), place((0, 0), (3, 10), 30)))
    assert torch.equal(read(rows), torch.cat((grid[3:], grid[:3])))
    assert reading.scratch_bytes(Weight("r", (6, 10), "plain", {"weight": rows})) == 0
    columns = Extent("c", file, 4, 240, "F32", (6, 10), None, (place((0, 4), (6, 6), 24), place((0, 0), (6, 4), 0)))
    expected = torch.cat((values[:24].view(6, 4), values[24:].view(6, 6)), 1)
    assert torch.equal(read(columns), expected)
    assert reading.scratch_bytes(Weight("c", (6, 10), "plain", {"weight": columns})) == 240


def test_values_in_memory_need_no_file(tmp_path: Path) -> None:
    weight = torch.randn(12, 9)
    extent = Extent("w.weight", tmp_path, 0, 12 * 9 * 4, "F32", (12, 9))
    catalog = Catalog(tmp_path, [extent], format="memory", memory={"w.weight": weight.T.contiguous().T})
    rows = measure(make_plan(catalog)).rows
    assert [row.pii for row in rows] == [
        pytest.approx(numpy_pii(weight.numpy()), abs=2e-7),
        pytest.approx(numpy_pii(weight.numpy().T), abs=2e-7),
    ]


class Watched(HostStaging):
    """Counts what is held."""

    held = most = reserved = 0

    def reserve(self, nbytes: int) -> torch.Tensor | None:
        region = super().reserve(nbytes)
        if region is not None:
            self.held += len(region)
            self.reserved += 1
            self.most = max(self.most, self.held + sum(map(len, self._kept)))
        return region

    def release(self, region: torch.Tensor) -> None:
        self.held -= len(region)
        super().release(region)


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_memory_stays_within_its_bound_or_the_largest_weight(model: Path, limit: int) -> None:
    plan = make_plan(open_checkpoint(model))
    budget = Budget(min(8000, limit))
    staging = Watched(limit, budget.group)
    engine = PositionalEngine(staging, window_bytes=3000)
    seen = 0
    for group in engine.groups(batches(plan.items, budget)):
        assert group is not None
        seen += len(group.items)
        engine.release(group)
    engine.close()
    assert seen == 40
    assert staging.reserved > 10
    assert staging.held == 0
    assert staging.most <= max(limit, *map(stored_bytes, plan.items))


def test_groups_hold_what_fits_and_single_weights_that_do_not(model: Path) -> None:
    plan = make_plan(open_checkpoint(model))
    found = list(batches(plan.items, Budget(10_000)))
    assert [item for batch in found for item in batch] == plan.items
    assert all(len(batch) == 1 or sum(map(stored_bytes, batch)) <= 10_000 for batch in found)
    assert len(found) < 40


def test_a_failing_read_costs_its_weight_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 6000, 500)
    real = reading.Files.read

    def read(self: reading.Files, segment: reading.Segment, into: memoryview) -> None:
        if segment.name == "layers.17.weight" and segment.nbytes:
            raise CheckpointError("disk.safetensors cannot be read at 'layers.17.weight': Input/output error")
        real(self, segment, into)

    monkeypatch.setattr(reading.Files, "read", read)
    result = scan_checkpoint(model, vectors="rows")
    assert {row.name for row in result.failed} == {"layers.17.weight"}
    assert sum(row.pii is not None for row in result.rows) == 39


@pytest.mark.parametrize("spoilt", SPOILT_VALUES.values(), ids=SPOILT_VALUES.keys())
def test_spoilt_values_are_said_and_cost_nothing_else(spoilt: SpoiltValues, tmp_path: Path) -> None:
    spoilt.write(tmp_path)
    result = scan_checkpoint(tmp_path, vectors="rows")
    rows = {row.name: row for row in result.rows}
    for name, check in spoilt.expected.items():
        assert check(rows[name]), rows[name]
    assert rows["sound.weight"].error is None


def test_copies_are_folded_once_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, layer, other = torch.randn(30, 16), torch.randn(48, 48), torch.randn(48, 48)
    near = layer.clone()
    near[-1, -1] += 1  # behind the first 4 KiB
    tensors = {
        "embed_tokens.weight": embed,
        "layers.0.self_attn.q_proj.weight": layer,
        "layers.1.self_attn.q_proj.weight": layer.clone(),
        "layers.2.self_attn.q_proj.weight": near,
        "layers.3.self_attn.q_proj.weight": other,
        "lm_head.weight": embed.clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folded: list[int] = []
    real = folding.gram_stats_many
    monkeypatch.setattr(folding, "gram_stats_many", lambda xs, **k: folded.append(len(xs)) or real(xs, **k))
    result = scan_checkpoint(tmp_path, vectors="rows")
    assert sum(folded) == 4
    rows = {row.name: row for row in result.rows}
    assert set(rows) == set(tensors)
    assert rows["lm_head.weight"].tied == ("embed_tokens.weight",)
    assert rows["lm_head.weight"].role == "Head"
    assert rows["embed_tokens.weight"].tied == ("lm_head.weight",)
    assert rows["layers.1.self_attn.q_proj.weight"].tied == ("layers.0.self_attn.q_proj.weight",)
    assert rows["layers.1.self_attn.q_proj.weight"].layer == "1"
    assert rows["layers.2.self_attn.q_proj.weight"].tied == ()
    for name, weight in tensors.items():
        assert rows[name].pii == pytest.approx(numpy_pii(weight.numpy()), abs=2e-7)


def test_names_tied_in_the_catalog_stand_in_the_row(tmp_path: Path) -> None:
    save_file({"embed_tokens.weight": torch.randn(30, 16)}, tmp_path / "model.safetensors")
    catalog = open_checkpoint(tmp_path)
    catalog.tied["lm_head.weight"] = "embed_tokens.weight"
    result = measure(make_plan(catalog, vectors="rows"))
    assert [(row.name, row.tied) for row in result.rows] == [("embed_tokens.weight", ("lm_head.weight",))]


def test_heads_are_measured_from_the_same_read(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    config = {**family.config, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    tensors = make_tensors(family)
    rows = scan_checkpoint(write(tmp_path, tensors, config), heads=True).rows
    q, o, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qok")
    heads = {(r.name, r.vectors, r.head): r for r in rows if r.head is not None}
    assert {key[:2] for key in heads if key[0] in (q, k, o)} == {(q, "rows"), (k, "rows"), (o, "cols")}
    assert [head for name, _, head in heads if name == k] == [0, 1]
    for head in range(4):
        own = slice(4 * head, 4 * head + 4)
        assert heads[q, "rows", head].pii == pytest.approx(numpy_pii(tensors[q].numpy()[own]), abs=2e-7)
        assert heads[o, "cols", head].pii == pytest.approx(numpy_pii(tensors[o].numpy()[:, own].T), abs=2e-7)
        assert (heads[q, "rows", head].n, heads[q, "rows", head].d) == (4, 16)
    assert numbers(scan_checkpoint(tmp_path)) == [entry for entry in numbers(ScanResult(rows, [])) if entry[2] is None]


def test_detail_names_the_closest_pair_and_counts_the_cosines(tmp_path: Path) -> None:
    weight = torch.randn(30, 20)
    weight[21] = -2 * weight[4]
    save_file({"w.weight": weight}, tmp_path / "model.safetensors")
    (row,) = scan_checkpoint(tmp_path, vectors="rows", options=ScanOptions(detail=True)).rows
    assert row.max_pair == (4, 21)
    assert row.max_abs == pytest.approx(1.0)
    assert row.histogram is not None
    assert len(row.histogram) == folding.BINS
    assert sum(row.histogram) == 30 * 29 // 2
    (plain,) = scan_checkpoint(tmp_path, vectors="rows").rows
    assert (plain.max_abs, plain.max_pair, plain.histogram) == (None, None, None)
    assert plain.pii == pytest.approx(row.pii, abs=1e-7)


def test_a_sample_has_a_standard_error_and_covers_the_truth(tmp_path: Path) -> None:
    save_file({"w.weight": torch.randn(600, 24), "small.weight": torch.randn(9, 24)}, tmp_path / "model.safetensors")
    exact = {(r.name, r.vectors): r for r in scan_checkpoint(tmp_path).rows}
    first = {(r.name, r.vectors): r for r in scan_checkpoint(tmp_path, sample=20_000).rows}
    again = {(r.name, r.vectors): r for r in scan_checkpoint(tmp_path, sample=20_000).rows}
    row = first["w.weight", "rows"]
    assert row.standard_error is not None
    assert row.pii is not None
    assert 0 < row.standard_error < 0.01
    assert row.pii != exact["w.weight", "rows"].pii
    assert abs(row.pii - exact["w.weight", "rows"].pii) < 5 * row.standard_error  # type: ignore[operator]
    assert row == again["w.weight", "rows"]
    for key in (("small.weight", "rows"), ("w.weight", "cols")):  # no more pairs than asked for: exact
        assert first[key] == exact[key]
        assert first[key].standard_error is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host_mem": 1}, "host_mem needs a number of bytes, at least 1048576, got 1"),
        ({"gpu_mem": 1.5e9}, "gpu_mem needs a number of bytes"),
        ({"engine": "mmap"}, "engine needs one of positional"),
        ({"resume": True}, "resume needs a journal"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: Mapping[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ScanOptions(**options)  # type: ignore[arg-type]


def test_large_files_leave_the_page_cache_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(reading.os, "posix_fadvise", lambda fd, at, n, advice: dropped.append((at, n)))
    scan_checkpoint(model)
    assert dropped == []
    monkeypatch.setattr(reading, "_memory_bytes", lambda: 2000)
    scan_checkpoint(model)
    assert sum(count for _, count in dropped) == make_plan(open_checkpoint(model)).nbytes


def test_heads_that_find_no_memory_are_rows_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    config = {**family.config, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = write(tmp_path / "llama", make_tensors(family), config)
    whole = scan_checkpoint(path, heads=True)
    real = folding.gram_stats_many

    def fold(xs: list[torch.Tensor], **arguments: object) -> object:
        if any(x.dim() == 3 for x in xs):
            raise MemoryError
        return real(xs, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(folding, "gram_stats_many", fold)
    found = scan_checkpoint(path, heads=True)
    places = [[(row.name, row.vectors, row.head, row.n, row.d) for row in result.rows] for result in (found, whole)]
    assert places[0] == places[1]
    assert {row.head is None for row in found.failed} == {False}
    assert [row.pii for row in found.rows if row.head is None] == [row.pii for row in whole.rows if row.head is None]


@pytest.mark.parametrize("renamed", [True, False])
def test_files_that_are_written_while_they_are_read_are_named(renamed: bool, model: Path) -> None:
    file = min(model.glob("*.safetensors"))

    def progress(done: int, _: int, name: str) -> None:
        if done and not renamed:
            with file.open("r+b") as handle:
                handle.seek(-1, 2)
                handle.write(b"\x01")
        elif done:
            other = file.with_suffix(".new")
            other.write_bytes(file.read_bytes())
            other.replace(file)

    assert scan_checkpoint(model).provenance["notes"] == []
    found = scan_checkpoint(model, progress=progress)
    assert found.provenance["notes"] == [f"{file.name} changed while it was read: scan it again"]

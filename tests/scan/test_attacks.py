"""Broken and hostile files: one sentence that names the file, never a crash or a hang, the rest still measured."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from orthofast.errors import CheckpointError
from orthofast.scan import reading, scan_checkpoint
from orthofast.scan.plan import make_plan
from orthofast.scan.provenance import measure
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.attacks import ATTACKS, LFS, NAMES, Attack, data, header, pack, values
from tests.scan.checkpoints import numpy_pii, write_shards


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sound.safetensors"
    file.write_bytes(pack(header()))
    result = scan_checkpoint(file)
    assert not result.failed
    assert {row.name for row in result.rows} == set(NAMES)
    for row in result.rows:
        array = values()[row.name]
        assert row.pii == pytest.approx(numpy_pii(array if row.vectors == "rows" else array.T), abs=2e-7)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_costs_only_what_it_spoils(attack: Attack, tmp_path: Path) -> None:
    file = tmp_path / "spoilt.safetensors"
    file.write_bytes(attack.content)
    if attack.hopeless:
        with pytest.raises(CheckpointError) as caught:
            scan_checkpoint(file)
        sentence = str(caught.value)
        assert attack.word in sentence
        assert "spoilt.safetensors" in sentence
        assert len(sentence) < 2000
        assert "\n" not in sentence
        return
    result = scan_checkpoint(file)
    failed = result.failed
    assert failed
    assert all("spoilt.safetensors" in str(row.error) and attack.word in str(row.error) for row in failed)
    present = {row.name for row in result.rows}
    for name, array in values().items():
        if name not in present:
            continue
        found = {row.vectors: row for row in result.rows if row.name == name}
        if name in attack.lost:
            assert all(row.error and row.pii is None for row in found.values())
        else:
            assert found["rows"].pii == pytest.approx(numpy_pii(array), abs=2e-7)
    assert set(attack.lost) <= present
    json.loads(result.to_json())


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@example(flips=[(7, 0x80)])
@example(flips=[(8, ord("["))])
def test_flipped_header_bytes_never_crash(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(pack(header()))
    end = len(content) - len(data())
    for position, byte in flips:
        content[position % end] = byte
    file = tmp_path / "flipped.safetensors"
    file.write_bytes(bytes(content))
    _refused_or_scanned(file)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 900), tail=st.binary(max_size=12))
def test_any_cut_and_any_tail_never_crash(cut: int, tail: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(pack(header())[:cut] + tail)
    _refused_or_scanned(file)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(
        st.text(max_size=30),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "F6_E2M3", "I64", "C64", "BOOL", "?"]),
                "shape": st.lists(st.integers(-1, 9), max_size=5),
                "data_offsets": st.lists(st.integers(-1, 400), min_size=1, max_size=3),
            }
        ),
        max_size=6,
    )
)
def test_any_entries_never_crash(entries: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "entries.safetensors"
    file.write_bytes(pack(dict(entries)))
    _refused_or_scanned(file)


def _refused_or_scanned(file: Path) -> None:
    try:
        result = scan_checkpoint(file)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert file.name in refusal
        return
    for row in result.rows:
        assert row.error is None or file.name in row.error or "NaN or Inf" in row.error
    json.loads(result.to_json(), parse_constant=pytest.fail)
    result.to_markdown()
    result.to_csv()


def test_half_a_surrogate_in_a_name_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "surrogate.safetensors"
    head = json.dumps(header()).replace("b.weight", "b\\ud800.weight")
    file.write_bytes(pack(head.encode()))
    result = scan_checkpoint(file)
    assert not result.failed
    assert len({row.name for row in result.rows}) == 3
    for suffix in (".json", ".csv", ".md", ".html"):
        result.write(tmp_path / f"out{suffix}")
        assert "ud800" in (tmp_path / f"out{suffix}").read_text("utf-8")


def shard_tensors() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.randn(5, 4) for i in range(6)}


def test_missing_shards_are_all_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    tensors = shard_tensors()
    write_shards(tmp_path, tensors)
    for i in (1, 3):
        (tmp_path / f"model-{i:05d}-of-00003.safetensors").unlink()
    catalog = open_checkpoint(tmp_path)
    assert all(
        "model-00001-of-00003.safetensors" in fault.error and "model-00003-of-00003.safetensors" in fault.error
        for fault in catalog.faults
    )
    result = measure(make_plan(catalog, vectors="rows"))
    assert {row.name for row in result.failed} == {f"layers.{i}.weight" for i in (0, 2, 3, 5)}
    for row in result.rows:
        assert (row.pii is None) == (row.error is not None)


def test_all_shards_missing_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, shard_tensors())
    for i in (1, 2, 3):
        (tmp_path / f"model-{i:05d}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="3 of 3 shards are missing"):
        scan_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "spoil", [LFS, b"", pack(header(), length=1 << 63)], ids=["git-lfs pointer", "empty", "huge header"]
)
def test_a_broken_shard_costs_only_its_tensors(spoil: bytes, tmp_path: Path) -> None:
    tensors = shard_tensors()
    write_shards(tmp_path, tensors)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(spoil)
    result = scan_checkpoint(tmp_path)
    assert {row.name for row in result.failed} == {"layers.1.weight", "layers.4.weight"}
    assert all("model-00002-of-00003.safetensors" in str(row.error) for row in result.failed)
    assert {row.name for row in result.rows if row.pii is not None} == {f"layers.{i}.weight" for i in (0, 2, 3, 5)}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/../../outside.safetensors", "..\\outside.safetensors", "C:\\outside.safetensors"],
)
def test_an_index_leading_outside_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_shards(folder, shard_tensors())
    for path in (
        tmp_path / "outside.safetensors",
        folder / "..\\outside.safetensors",
        folder / "C:\\outside.safetensors",
    ):
        save_file({"secret": torch.ones(3, 3)}, path)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["secret"] = name
    index.write_text(json.dumps(document))
    result = scan_checkpoint(folder)
    assert {row.name for row in result.failed} == {"secret"}
    assert all("outside the folder" in str(row.error) for row in result.failed)
    assert len({row.name for row in result.rows if row.pii is not None}) == 6


def test_an_absolute_shard_name_is_not_followed(tmp_path: Path) -> None:
    save_file({"secret": torch.ones(3, 3)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    document = {"weight_map": {"secret": str(tmp_path / "outside.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        scan_checkpoint(folder)


def test_shards_may_be_symbolic_links(tmp_path: Path) -> None:
    """Snapshots of the hub are links into a folder of blobs."""
    tensors = shard_tensors()
    write_shards(tmp_path / "blobs", tensors)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    result = scan_checkpoint(snapshot)
    assert not result.failed
    assert {row.name for row in result.rows} == set(tensors)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 3}}', "file name"),
        (LFS.decode(), "git lfs"),
    ],
)
def test_a_broken_index_is_refused(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=word) as caught:
        scan_checkpoint(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value)


def test_a_tensor_the_index_promises_but_no_shard_holds_is_a_failure(tmp_path: Path) -> None:
    write_shards(tmp_path, shard_tensors())
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["layers.9.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(document))
    result = scan_checkpoint(tmp_path)
    assert {row.name for row in result.failed} == {"layers.9.weight"}


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    """A memory map would kill the process here."""
    file = tmp_path / "shrinks.safetensors"
    file.write_bytes(pack(header()))
    plan = make_plan(open_checkpoint(file), vectors="rows")
    os.truncate(file, len(pack(header())) - 10)
    result = measure(plan)
    assert {row.name for row in result.failed} == {"c.weight"}
    assert all("became shorter" in str(row.error) and "shrinks.safetensors" in str(row.error) for row in result.failed)


def test_a_file_that_disappears_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "gone.safetensors"
    file.write_bytes(pack(header()))
    plan = make_plan(open_checkpoint(file))
    file.unlink()
    result = measure(plan)
    assert len(result.failed) == 6
    assert all("gone.safetensors" in str(row.error) for row in result.failed)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    answers: list[str] = []

    def scan() -> None:
        try:
            scan_checkpoint(pipe)
        except CheckpointError as error:
            answers.append(str(error))

    thread = threading.Thread(target=scan, daemon=True)
    thread.start()
    thread.join(20)
    assert answers == ["pipe.safetensors is not a regular file"]


@pytest.mark.parametrize(
    ("name", "word"),
    [("absent.safetensors", "No such file"), ("weights.bin", "convert"), ("empty", "no .safetensors file")],
)
def test_nothing_to_read_is_one_sentence(name: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=word) as caught:
        scan_checkpoint(tmp_path / name)
    assert name in str(caught.value)


def test_a_folder_with_only_pickles_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin starts neither.*convert"):
        scan_checkpoint(tmp_path)


def test_failed_reads_leave_no_file_open(tmp_path: Path) -> None:
    file = tmp_path / "sound.safetensors"
    file.write_bytes(pack(header()))
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("needs /proc")
    before = len(list(opened.iterdir()))
    for _ in range(5):
        scan_checkpoint(file)
    assert len(list(opened.iterdir())) == before


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sound.safetensors"
    file.write_bytes(pack(header()))
    whole = scan_checkpoint(file, vectors="rows")
    monkeypatch.setattr(reading, "READ_BYTES", 7)
    assert [row.pii for row in scan_checkpoint(file, vectors="rows").rows] == [row.pii for row in whole.rows]


def test_nan_and_infinity_are_counted_and_reported(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    weight[2, 1], weight[4, 1] = np.nan, np.inf
    save_file({"w": torch.from_numpy(weight), "fine": torch.eye(4) + 1}, tmp_path / "m.safetensors")
    rows = {(r.name, r.vectors): r for r in scan_checkpoint(tmp_path).rows}
    assert (rows["w", "rows"].nonfinite, rows["w", "cols"].nonfinite) == (2, 1)
    assert rows["w", "rows"].pii is None
    assert rows["w", "rows"].error == "2 of 6 vectors hold NaN or Inf"
    assert rows["fine", "rows"].error is None

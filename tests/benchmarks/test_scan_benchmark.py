"""The scan's benchmark: gates that refuse wrong values, promises judged from samples, tools that fail become rows."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import scan, scan_gpu, scan_parts, scan_peers
from benchmarks.checkpoint_shapes import MODELS, with_layers
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.scan_peers import Peer
from orthofast.scan import scan_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("scanned")
    write_checkpoint(made, with_layers(MODELS["llama-small"], layers=1))
    return made


def test_scan_and_folds_alone_are_timed_on_the_same_values(folder):
    found = scan_parts.race(folder, "small", 2)
    assert found["matrices"] == 9
    assert {name: len(values) for name, values in found["wall_s"].items()} == {"folds": 2, "scan": 2}
    assert min(found["wall_s"]["folds"]) > 0
    assert found["bytes"] == 2 * (2 * 512 * 256 + 2 * 256 * 256 + 2 * 64 * 256 + 3 * 768 * 256)


def test_a_scan_with_another_value_is_not_timed(folder, monkeypatch):
    def wrong(path):
        result = scan_checkpoint(path)
        result.rows[3].pii *= 1 + 1e-6
        return result

    monkeypatch.setattr("orthofast.scan.scan_checkpoint", wrong)
    with pytest.raises(ValueError, match="by the folds alone"):
        scan_parts.race(folder, "small", 1)


def test_plain_torch_agrees_with_the_scan_and_a_wrong_value_does_not_pass(folder):
    ours, theirs = scan_checkpoint(folder).to_json(), scan_peers.naive(folder)
    scan_peers.compare(ours, json.dumps(theirs))
    name = next(iter(theirs))
    with pytest.raises(ValueError, match="by plain torch"):
        scan_peers.compare(ours, json.dumps(theirs | {name: theirs[name] * 1.001}))
    with pytest.raises(ValueError, match="18 rows, plain torch 19"):
        scan_peers.compare(ours, json.dumps(theirs | {"other": 0.5}))


def test_a_tool_is_timed_alone_and_one_that_fails_is_a_row_with_its_error(tmp_path):
    say = []
    peers = [
        Peer("works", "scan", [sys.executable, "-S", "-c", "x = bytearray(64 << 20); sum(range(10**6))"], "nothing"),
        Peer("breaks", "scan", [sys.executable, "-S", "-c", "raise SystemExit('no such file')"], "nothing"),
        Peer("absent", "scan", None, "nothing", "not installed"),
    ]
    works, breaks, absent = scan_peers.race(peers, 2, say.append)
    assert works["status"] == "timed"
    assert len(works["wall_s"]) == 2
    assert 64 < works["peak_mib"][0] < 128  # its own memory, not this process's
    assert (breaks["status"], breaks["reason"], breaks["wall_s"]) == ("failed", "exit code 1: no such file", [])
    assert (absent["status"], absent["reason"]) == ("left out", "not installed")
    text = scan_peers.table([works, breaks, absent])
    assert "no such file" in text
    assert "not installed" in text


def test_without_another_environment_the_other_tools_are_rows_with_the_reason(folder):
    found = {peer.name: peer for peer in scan_peers.field(folder, folder, None)}
    assert {name for name, peer in found.items() if peer.command is None} == set(scan_peers.PACKAGES)
    assert found["modeldelta"].reason == "no --peer-python was given"
    assert scan_peers.versions(None) == dict.fromkeys(scan_peers.PACKAGES)


def results():
    return {
        "ratio": [{"checkpoint": "m", "wall_s": {"folds": [1.0, 9.0, 1.0], "scan": [1.09, 1.2, 1.0]},
                   "cpu_s": {"folds": [1.0], "scan": [1.0]}}],
        "memory": [{"gb": 0.5, "pairs": None, "extra_mib": 900.0, "wall_s": 1.0},
                   {"gb": 0.5, "pairs": 9, "extra_mib": 300.0, "wall_s": 1.0},
                   {"gb": 2.0, "pairs": 9, "extra_mib": 360.0, "wall_s": 1.0}],
        "open": [{"what": what, "tensors": 3, "open_s": [0.2], "inspect_s": [0.4], "with_forecast_s": [0.5],
                  "command_s": [1.6], "import_torch_s": [1.2]} for what in ("llama-3-70b", "GGUF, 128256 tokens")],
        "gpu": {"status": "not measured", "reason": "no CUDA device"},
    }  # fmt: skip


def test_promises_are_judged_from_medians():
    data = results()
    data["verdicts"] = scan.verdicts(data)
    assert [(round(one["value"], 3), one["verdict"]) for one in data["verdicts"]] == [
        (1.09, "met"), (1.2, "not met"), (1.6, "not met"), (0.4, "met"), (0.2, "met"),
    ]  # fmt: skip
    text = scan.report(data)
    assert "GPU: not measured (no CUDA device)" in text
    assert "all pairs: 900 MiB" in text


def test_headers_are_opened_and_counted(tmp_path):
    write_checkpoint(tmp_path, MODELS["llama-small"], shard_gb=0.001, hollow=True)
    found = scan_parts.open_times(tmp_path, 1)
    assert found["matrices"] == 3 * 7 + 2
    assert 0 < found["open_s"][0] <= found["inspect_s"][0] <= found["with_forecast_s"][0]


def test_the_peak_of_a_scan_is_its_own(folder):
    found = scan_parts.scan_peak(folder, 200)
    assert found["rows"] == 18
    assert 0 <= found["extra_mib"] < 600


def test_without_a_device_the_gpu_part_says_so_and_reading_alone_takes_in_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert scan_gpu.measure(tmp_path) == {"status": "not measured", "reason": "no CUDA device"}
    file = tmp_path / "x"
    file.write_bytes(bytes(3 * scan_gpu.PIECE // 2))
    scan_gpu.read([file])
    scan_gpu.drop([file])
    monkeypatch.setattr("os.preadv", lambda *a: 1)
    with pytest.raises(OSError, match="read whole"):
        scan_gpu.read([file])

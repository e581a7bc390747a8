"""A forecast counts what a scan would do, from headers and a moment of trial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from orthofast import cli
from orthofast.errors import InputError
from orthofast.scan import forecast as forecasting
from orthofast.scan.catalog import Catalog, Extent
from orthofast.scan.forecast import Forecast, forecast
from orthofast.scan.options import ScanOptions
from orthofast.scan.plan import make_plan
from orthofast.scan.readers.checkpoint import open_checkpoint
from tests.scan.fake_device import FakeDevice


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.randn(60, 40), "b.weight": torch.randn(7, 5).half()}, tmp_path / "model.safetensors")
    return tmp_path


def test_work_and_bytes_are_those_of_the_definition(model: Path) -> None:
    plan = make_plan(open_checkpoint(model))
    found = forecast(plan)
    pairs = {(60, 40): 60 * 59 / 2, (40, 60): 40 * 39 / 2, (7, 5): 21, (5, 7): 10}
    assert found.flops == sum(2 * count * d for (_, d), count in pairs.items())
    assert found.nbytes == 60 * 40 * 4 + 7 * 5 * 2
    assert found.host_bytes == found.nbytes
    assert found.device_bytes == 0
    assert found.seconds == max(found.read_s, found.fold_s) > 0
    assert set(found.to_dict()) == {*Forecast.__slots__, "worth_sampling"}


def test_one_side_or_a_sample_is_less_work(model: Path) -> None:
    whole = forecast(make_plan(open_checkpoint(model)))
    rows = forecast(make_plan(open_checkpoint(model), vectors="rows"))
    assert rows.flops == 60 * 59 * 40 + 7 * 6 * 5
    sampled = forecast(make_plan(open_checkpoint(model)), sample=100)
    assert sampled.flops == 2 * (100 * 40 + 100 * 60 + 21 * 5 + 10 * 7)
    assert sampled.nbytes == whole.nbytes


def test_a_sample_is_offered_where_the_exact_scan_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = [Extent(f"layers.{i}.weight", Path("m"), 0, 2 << 26, "BF16", (1 << 13, 1 << 13)) for i in range(80)]
    catalog = Catalog(Path("m"), extents)  # the file is not there: only its reading is unknown
    monkeypatch.setattr(forecasting, "_fold_rate", lambda *_: 1e11)
    found = forecast(make_plan(catalog))
    assert found.fold_s == pytest.approx(160 * 2**13 * (2**13 - 1) * 2**13 / 1e11)
    assert found.worth_sampling
    assert found.sampled_s == pytest.approx(160 * 2 * forecasting.OFFER_PAIRS * 2**13 / 1e11)
    assert found.read_s == 0
    assert found.host_bytes == 1 << 30
    monkeypatch.setattr(forecasting, "_fold_rate", lambda *_: 1e15)
    assert not forecast(make_plan(catalog)).worth_sampling


def test_a_device_has_its_own_budget(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "open_device", lambda _: FakeDevice())
    found = forecast(make_plan(open_checkpoint(model)), options=ScanOptions(host_mem=1 << 20, gpu_mem=1 << 20))
    assert 0 < found.host_bytes <= 1 << 20
    assert found.nbytes <= found.device_bytes <= 1 << 20
    assert found.seconds > 0


def test_decoding_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "layers.0.q_proj.weight": torch.randn(256, 256).to(torch.float8_e4m3fn),
        "layers.0.q_proj.weight_scale_inv": torch.rand(2, 2),
    }
    save_file(tensors, model / "model.safetensors")
    plan = make_plan(open_checkpoint(model))
    assert [item.weight.coding for item in plan.items] != ["plain"]
    found = forecast(plan)
    assert found.decode_s > 0
    assert found.host_bytes == plan.nbytes + 256 * 256 * 4


def test_arguments_that_cannot_be_used_are_refused(model: Path) -> None:
    plan = make_plan(open_checkpoint(model))
    with pytest.raises(InputError, match="sample needs a positive number"):
        forecast(plan, sample=0)
    with pytest.raises(InputError, match="device"):
        forecast(plan, device="abacus")


def test_inspect_says_what_a_scan_would_cost(model: Path) -> None:
    runner = CliRunner()
    document = json.loads(runner.invoke(cli.app, ["inspect", str(model), "--json"]).stdout)
    assert document["forecast"]["flops"] == forecast(make_plan(open_checkpoint(model))).flops
    assert "a scan here: about" in runner.invoke(cli.app, ["inspect", str(model)]).stdout

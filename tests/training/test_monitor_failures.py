"""What fails inside the monitor is reported, and training goes on; bad arguments get a sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthofast
from orthofast.errors import InputError
from orthofast.training import Monitor
from orthofast.training import monitor as module_under_test
from orthofast.training.measures import MEASURES
from tests.training.small_training import Rows, net, train

ALL = tuple(MEASURES)


@pytest.fixture
def calm() -> Iterator[None]:
    """No warning may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # matrices this small only wait for a second one; restored by the fixture of all tests


def test_a_nan_layer_is_counted_and_the_others_are_measured() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[2, 1] = math.nan
    rows = Rows()
    monitor = Monitor(model, every_n_steps=1, metrics=ALL, worst_k=1, log=rows, overhead=None)
    monitor.step()
    values = rows.rows[0].values
    assert values["orthofast/nonfinite/3"] == 1
    assert math.isnan(float(values["orthofast/pii/3"]))  # among the worst
    assert math.isfinite(float(values["orthofast/pii/mean"]))
    assert values["orthofast/pii/argmax"] in ("0", "5")


def test_a_sink_that_raises_is_reported_once_and_dropped() -> None:
    def broken(values: dict[str, Any], step: int) -> None:
        raise OSError("disk full")

    model, rows = net(), Rows()
    monitor = Monitor(model, every_n_steps=1, log=[broken, rows], overhead=None)
    with pytest.warns(RuntimeWarning, match=r"the sink .*broken raised OSError: disk full; it gets no more") as caught:
        train(model, 3, lambda step: monitor.step())
    assert len(caught) == 1
    assert rows.steps == [1, 2, 3]


def test_a_module_that_leaves_is_reported_and_a_new_one_is_measured() -> None:
    model, rows = net(), Rows()
    monitor = Monitor(model, every_n_steps=1, metrics=("pii", "dying_frac"), worst_k=None, log=rows, overhead=None)
    train(model, 1, lambda step: monitor.step())
    model[5] = nn.Linear(16, 7)
    with pytest.warns(RuntimeWarning, match=r"5\.weight changed hands"):
        train(model, 1, lambda step: monitor.step())
    assert rows.rows[1].values["orthofast/pii/5"] == pytest.approx(orthofast.pii(model[5].weight).item())
    model[5] = nn.Identity()
    with pytest.warns(RuntimeWarning, match=r"5\.weight left the model and no longer is measured; training goes on"):
        train(model, 2, lambda step: monitor.step())
    assert "orthofast/pii/5" not in rows.rows[-1].values
    assert rows.rows[-1].values["orthofast/pii/0"] == pytest.approx(orthofast.pii(model[0].weight).item())
    assert rows.steps == [1, 2, 3, 4]


def test_a_replaced_parameter_is_read_anew(calm: None) -> None:
    model, rows = net(), Rows()
    monitor = Monitor(model, every_n_steps=1, metrics=("pii",), worst_k=None, log=rows, overhead=None)
    model[0].weight.data = torch.eye(24, 12)
    monitor.step()
    assert rows.rows[-1].values["orthofast/pii/0"] == 0
    model[0].weight = nn.Parameter(torch.ones(4, 12))
    monitor.step()
    assert rows.rows[-1].values["orthofast/pii/0"] == pytest.approx(1, abs=1e-6)
    model.to(torch.float64)
    monitor.step()
    assert rows.rows[-1].values["orthofast/pii/3"] == pytest.approx(orthofast.pii(model[3].weight).item(), rel=1e-14)


def test_a_layer_that_cannot_be_measured_any_more_is_a_row_with_its_error() -> None:
    model, rows = net(), Rows()
    monitor = Monitor(model, every_n_steps=1, metrics=("pii",), log=rows, overhead=None)
    model[3].weight = nn.Parameter(torch.ones(3))
    with pytest.warns(
        RuntimeWarning, match=r"3\.weight cannot be measured and is left out of metrics of weights"
    ) as caught:
        monitor.step()
    monitor.step()
    monitor.step()
    assert len(caught) == 1
    assert "needs at least 2 dimensions" in str(rows.rows[0].values["orthofast/error/3"])
    assert "orthofast/error/3" not in rows.rows[1].values
    assert rows.rows[2].values["orthofast/pii/0"] == pytest.approx(orthofast.pii(model[0].weight).item())


def test_a_fold_that_fails_costs_one_layer_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthofast.training import measures

    real = measures.gram_stats

    def many(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    def single(x: Tensor, **kwargs: Any) -> Any:
        if x.shape[1] == 16:
            raise RuntimeError("out of memory")
        return real(x, **kwargs)

    monkeypatch.setattr(measures, "gram_stats_many", many)
    monkeypatch.setattr(measures, "gram_stats", single)
    rows = Rows()
    monitor = Monitor(net(), every_n_steps=1, metrics=("pii",), log=rows, overhead=None)
    with pytest.warns(RuntimeWarning, match=r"3\.weight cannot be measured .* out of memory"):
        monitor.step()
    assert {"orthofast/pii/0", "orthofast/pii/5", "orthofast/error/3"} <= rows.rows[0].values.keys()


def test_a_metric_that_fails_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthofast.training import probe

    def broken(*args: Any) -> Any:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(probe, "largest_singular_values", broken)
    model, rows = net(), Rows()
    monitor = Monitor(model, every_n_steps=1, metrics=("pii", "weight_domination"), log=rows, overhead=None)
    with pytest.warns(
        RuntimeWarning, match="weight_domination failed and is left out from now on: RuntimeError"
    ) as seen:
        train(model, 3, lambda step: monitor.step())
    assert len(seen) == 1
    assert all("orthofast/pii/mean" in row.values for row in rows.rows)


def test_whatever_else_fails_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(vector: Tensor) -> Tensor:
        raise RuntimeError("a cable is loose")

    monkeypatch.setattr(module_under_test, "_sent", broken)
    model = net()
    monitor = Monitor(model, every_n_steps=1, log=[], overhead=None)
    with pytest.warns(RuntimeWarning, match="the monitor stopped at step 1: RuntimeError: a cable is loose") as caught:
        train(model, 3, lambda step: monitor.step())
    assert len(caught) == 1


def test_nothing_is_raised_where_warnings_are_errors(capsys: pytest.CaptureFixture[str], calm: None) -> None:
    def broken(values: dict[str, Any], step: int) -> None:
        raise OSError("disk full")

    Monitor(net(), every_n_steps=1, log=broken, overhead=None).step()
    assert "disk full" in capsys.readouterr().err


def test_gradients_that_are_gone_are_asked_for_in_a_sentence() -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=1, metrics=("weight_domination",), log=[], overhead=None)
    with pytest.warns(RuntimeWarning, match=r"call step\(\) before zero_grad\(\), or observe_gradients\(\)"):
        monitor.step()
    early = Monitor(model, every_n_steps=1, metrics=("weight_domination",), log=[], overhead=None)
    model(torch.randn(4, 12)).sum().backward()
    early.observe_gradients()
    model.zero_grad()
    early.step()
    assert early.latest["orthofast/weight_domination/mean"] > 0


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (nn.Linear(4, 4, device="meta"), {}, "is on the meta device and holds no values"),
        (nn.ReLU(), {}, "model has no layer that can be measured"),
        (torch.ones(3, 3), {}, "model needs a torch.nn.Module, got Tensor"),
        (nn.Linear(4, 4), {"metrics": ("pi",)}, "metrics needs names among pii, .*, got 'pi'"),
        (nn.Linear(4, 4), {"metrics": ()}, "metrics is empty"),
        (nn.Linear(4, 4), {"every_n_steps": 0}, "every_n_steps needs a positive integer, got 0"),
        (nn.Linear(4, 4), {"every_n_steps": True}, "every_n_steps needs a positive integer, got True"),
        (nn.Linear(4, 4), {"overhead": 0}, "overhead needs a positive share"),
        (nn.Linear(4, 4), {"worst_k": -1}, "worst_k needs a number of layers, or None"),
        (nn.Linear(4, 4), {"log": 3}, "log needs a callable"),
        (nn.Linear(4, 4), {"layers": "decoder.*"}, "chooses none of the 1 layers"),
    ],
)
def test_bad_arguments_get_a_sentence(model: Any, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Monitor(model, **given)


def test_without_log_a_line_a_row_is_printed(capsys: pytest.CaptureFixture[str], calm: None) -> None:
    with Monitor(net(), every_n_steps=2, overhead=None) as monitor:
        for _ in range(2):
            monitor.step()
    line = capsys.readouterr().err
    assert line.startswith("orthofast step 2: pii 0.")
    assert "pii_ratio" in line
    assert "(max 0." in line
    assert line.count("\n") == 1


def test_closing_flushes_removes_hooks_and_ends_it() -> None:
    model, rows = net(), Rows()
    with Monitor(model, every_n_steps=2, metrics=ALL, log=rows, overhead=None) as monitor:
        train(model, 3, lambda step: monitor.step())
    assert rows.closed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    monitor.step(100)
    assert rows.steps == [2, 3]  # spectra of step 2 join the next row, or the last one

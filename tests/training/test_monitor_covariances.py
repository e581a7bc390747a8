"""Metrics of covariances in the monitor: right values, their own intervals, a thread that harms nothing, a budget."""

from __future__ import annotations

import threading
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import orthofast.training.monitor as monitoring
from orthofast.errors import InputError
from orthofast.metrics.kronecker import kronecker_condition_number
from orthofast.metrics.spectra import condition_number
from orthofast.training import Monitor
from orthofast.training.measures import COVARIANCES, MEASURES
from orthofast.training.worker import Worker
from tests.training.small_training import Rows, monitored, net, train

COVARIED = tuple(name for name, measure in MEASURES.items() if measure.source == COVARIANCES)


@pytest.fixture(autouse=True)
def _calm() -> None:
    torch.set_num_threads(1)


def covariances(step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every layer on that step of the training, from plain tensors; the step's weights are those before it."""
    model = net()
    train(model, step - 1)
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step))
    entered, left, h = {}, {}, x
    for name, module in model.named_children():
        out = module(h)
        if isinstance(module, nn.Linear):
            entered[name], left[name] = h.detach().double(), out
        h = out
    gradients = torch.autograd.grad(h.square().mean(), list(left.values()))
    return {
        name: (entered[name].T @ entered[name] / 10, 10 * (g.double().T @ g.double()))
        for name, g in zip(left, gradients, strict=True)
    }


def test_values_are_those_of_the_due_step() -> None:
    """They stand in the row after, which says which step they are of."""
    rows, monitor = monitored(net(), 5, metrics=dict.fromkeys((*COVARIED, "last_weight_norm"), 2))
    assert "orthofast/lambda_max_x/mean" not in rows.rows[0].values
    assert monitor._worker.drain()
    monitor.close()
    last = rows.rows[-1]
    assert (last.step, last.values["orthofast/covariance_step"]) == (5, 4)
    spectra = {
        name: [torch.linalg.eigvalsh(matrix).flip(0) for matrix in pair] for name, pair in covariances(4).items()
    }
    for name, (x, g) in spectra.items():
        expected = {
            "lambda_max_x": float(x[0]),
            "lambda_max_g": float(g[0]),
            "lambda_max_F": float(x[0] * g[0]),
            "kappa_x_50": float(condition_number(x, 0.5).value),
            "kappa_g_80": float(condition_number(g, 0.8, tol=1e-6).value),
            "kappa_F_50": float(kronecker_condition_number(x, g, 0.5).value),
        }
        for metric, value in expected.items():
            if name == "5" or not metric.startswith("kappa"):  # ten rows resolve half of its eigenvalues alone
                assert last.values[f"orthofast/{metric}/{name}"] == pytest.approx(value, rel=1e-4), (metric, name)
    keys = [key for key in last.values if key.startswith("orthofast/last_") and key[-1].isdigit()]
    assert {key.rsplit("/", 1)[1] for key in keys} == {"5"}
    assert last.values["orthofast/last_lambda_max_F/5"] == last.values["orthofast/lambda_max_F/5"]
    model = net()
    train(model, 4)
    norm = cast(Tensor, model[5].weight).detach().norm().item()
    assert rows.rows[1].values["orthofast/last_weight_norm/5"] == pytest.approx(norm, rel=1e-6)
    assert "orthofast/last_weight_norm/0" not in rows.rows[1].values


def steps_of(rows: Rows, key: str) -> list[float]:
    found = [row.values[key] for row in rows.rows if key in row.values]
    return [float(value) for value in found]


def watched(steps: int, metrics: Any) -> Rows:
    """Rows of a training that waits for spectra after every step."""
    model, rows = net(), Rows()
    with Monitor(model, every_n_steps=2, metrics=metrics, log=rows, overhead=None) as monitor:
        train(model, steps, lambda step: (monitor.step(), monitor._worker.drain()))
    return rows


def test_metrics_have_intervals_of_their_own() -> None:
    rows = watched(16, {"pii": 4, "max_coherence": 2, "lambda_max_x": 8})
    with_pii = [row.step for row in rows.rows if "orthofast/pii/mean" in row.values]
    assert with_pii == [2, 6, 10, 14]
    assert [row.step for row in rows.rows if "orthofast/max_coherence/mean" in row.values] == list(range(2, 17, 2))
    assert steps_of(rows, "orthofast/covariance_step") == [2, 10]


def test_covariances_are_seldom_unless_asked_for() -> None:
    rows = watched(14, ("pii", "lambda_max_x"))
    assert steps_of(rows, "orthofast/covariance_step") == [2, 12]


def test_between_due_steps_the_model_carries_no_hooks() -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=4, metrics={"lambda_max_x": 4}, log=[], overhead=None)
    carried = []

    def count(step: int) -> None:
        monitor.step()
        carried.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))

    train(model, 8, count)
    # before the first step it is not known whether the model is compiled
    assert carried == [0, 0, 4, 0, 0, 0, 4, 0]
    monitor.close()


def test_only_inputs_are_looked_at_where_only_they_are_asked_for() -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=1, metrics={"kappa_x_50": 1}, log=[], overhead=None)
    assert monitor._probe.tracker is not None
    seen: list[bool] = []
    see = monitor._probe.tracker.see
    monitor._probe.tracker.see = lambda at, x, gradient: (seen.append(gradient), see(at, x, gradient))[1]  # type: ignore[method-assign, func-returns-value]
    train(model, 2, lambda step: monitor.step())
    monitor.close()
    assert set(seen) == {False}


@pytest.mark.filterwarnings("error")
def test_a_failure_in_the_thread_is_told_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(asked: Any, layers: Any) -> Any:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(monitoring, "of_covariances", fails)
    rows = Rows()
    monitor = Monitor(net(), every_n_steps=1, metrics={"pii": 1, "lambda_max_x": 1}, log=rows, overhead=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(monitor._probe.model, 3, lambda step: (monitor.step(), monitor._worker.drain()))
        monitor.close()
    (warning,) = caught
    assert "spectra failed: RuntimeError: no convergence; training goes on" in str(warning.message)
    assert [row.step for row in rows.rows if "orthofast/pii/mean" in row.values] == [1, 2, 3]


def test_what_does_not_fit_into_the_queue_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()

    def slow(asked: Any, layers: Any) -> dict[str, Any]:
        hold.wait(10)
        return {"lambda_max_x": {"0": 1.0}}

    monkeypatch.setattr(monitoring, "of_covariances", slow)
    rows = Rows()
    monitor = Monitor(net(), every_n_steps=1, metrics={"lambda_max_x": 1}, log=rows, overhead=None)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(monitor._probe.model, 6, lambda step: monitor.step())
    hold.set()
    monitor.close()
    # one at work, two waiting; of six
    assert max(steps_of(rows, "orthofast/dropped_spectra")) >= 3
    assert rows.rows[-1].values["orthofast/lambda_max_x/max"] == 1.0


def test_the_thread_hands_back_in_order_and_ends() -> None:
    worker = Worker(waiting=10)
    for step in range(5):
        assert worker.submit(step, lambda step=step: step * step)  # type: ignore[misc]
    assert worker.drain()
    assert [(done.step, done.value) for done in worker.finished()] == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    worker.submit(5, lambda: 1 / 0)
    assert worker.drain()
    (failed,) = worker.finished()
    assert "ZeroDivisionError" in failed.error
    started = threading.active_count()
    worker.close()
    assert threading.active_count() == started - 1
    worker.close()


def test_covariances_that_cost_too_much_are_measured_less_often() -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=1, metrics={"pii": 1, "lambda_max_x": 2}, log=[], overhead=0.02)
    monitor._schedule.training_s, monitor._schedule.due = 1.0, 101  # 10 ms a step
    monitor._heavy_s = 0.004
    monitor._keep_budget(monitoring.Done(3, {}, own_s=0.002))
    # 6 ms against half of 2 % of two steps
    assert monitor._probe.seldom == 30
    monitor._schedule.overhead = None
    monitor._probe.seldom = 1
    monitor._keep_budget(monitoring.Done(3, {}, own_s=1.0))
    assert monitor._probe.seldom == 1
    monitor.close()


def test_bn_rate_is_the_mean_deviation_of_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    rows = Rows()
    with Monitor(model, every_n_steps=2, metrics=("bn_rate",), worst_k=None, log=rows, overhead=None) as monitor:
        train(model, 2, lambda step: monitor.step())
    alpha = model[1].running_var.sqrt().mean().item()  # type: ignore[union-attr, operator]
    assert rows.rows[0].values["orthofast/bn_rate/1"] == pytest.approx(alpha, rel=1e-6)


def test_compiled_models_are_seen_and_late_monitors_say_so() -> None:
    torch._dynamo.reset()
    model, rows = net(), Rows()
    metrics = {"lambda_max_x": 2, "lambda_max_g": 2}
    monitor = Monitor(model, every_n_steps=2, metrics=metrics, worst_k=None, log=rows, overhead=None)
    forward = torch.compile(model, backend="aot_eager")
    train(model, 5, lambda step: monitor.step(), forward=forward)
    monitor.close()
    x, g = covariances(4)["3"]
    assert rows.rows[-1].values["orthofast/lambda_max_x/3"] == pytest.approx(
        float(torch.linalg.eigvalsh(x)[-1]), rel=1e-5
    )
    assert rows.rows[-1].values["orthofast/lambda_max_g/3"] == pytest.approx(
        float(torch.linalg.eigvalsh(g)[-1]), rel=1e-5
    )
    torch._dynamo.reset()
    model = net()
    forward = torch.compile(model, backend="aot_eager")
    train(model, 1, forward=forward)
    late = Monitor(model, every_n_steps=1, metrics={"lambda_max_x": 1}, log=[], overhead=None)
    with pytest.warns(RuntimeWarning, match="attach it before the first compiled call"):
        train(model, 2, lambda step: late.step(), forward=forward)
    late.close()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"pii": 3}, "a multiple of every_n_steps=2"),
        ({"pii": 0}, "steps between measurements of pii"),
        ({}, "is empty"),
    ],
)
def test_bad_intervals_are_refused(metrics: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Monitor(net(), every_n_steps=2, metrics=metrics, log=[])


def test_a_resumed_run_keeps_its_turn() -> None:
    model = net()
    rows, first = monitored(model, 4, metrics={"pii": 4, "max_coherence": 2})
    state = first.state_dict()
    first.close()
    rows = Rows()
    again = Monitor(model, every_n_steps=2, metrics={"pii": 4, "max_coherence": 2}, log=rows, overhead=None)
    again.load_state_dict(state)
    train(model, 4, lambda step: again.step(), start=4)
    assert [row.step for row in rows.rows if "orthofast/pii/mean" in row.values] == [6]
    again.close()

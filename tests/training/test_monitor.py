"""The monitor: right numbers, on the right steps, without a trace in the training, whatever fails."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthofast
from orthofast.metrics import mean_squared_cosine
from orthofast.metrics.drift import conformal_drift
from orthofast.training import Monitor
from orthofast.training import monitor as module_under_test
from orthofast.training.measures import MEASURES
from orthofast.training.rows import Row
from tests.training.small_training import Rows, layers_of, monitored, net, train

WEIGHT_METRICS = ("pii", "pii_ratio", "max_coherence", "mean_squared_cosine", "diagonal_dominance")
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


# the numbers


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_weight_metrics_are_those_of_a_direct_call(metric: str, calm: None) -> None:
    direct: dict[str, Callable[[Tensor], float]] = {
        "pii": lambda w: orthofast.pii(w).item(),
        "pii_ratio": lambda w: orthofast.pii(w).item() / orthofast.isotropic_baseline(w.shape[1]),
        "max_coherence": lambda w: orthofast.max_coherence(w).value.item(),
        "mean_squared_cosine": lambda w: mean_squared_cosine(w).item(),
        "diagonal_dominance": lambda w: orthofast.diagonal_dominance(w).mean.item(),
    }
    model = net()
    rows, _ = monitored(model, 4, metrics=(metric,))
    values = rows.rows[-1].values
    truth = {name: direct[metric](layer.weight.detach()) for name, layer in layers_of(model).items()}
    for name, expected in truth.items():
        assert values[f"orthofast/{metric}/{name}"] == pytest.approx(expected, rel=2e-6)
    assert values[f"orthofast/{metric}/mean"] == pytest.approx(sum(truth.values()) / len(truth), rel=2e-6)
    worst = max(truth, key=lambda name: truth[name])
    assert values[f"orthofast/{metric}/argmax"] == worst
    assert values[f"orthofast/{metric}/max"] == values[f"orthofast/{metric}/{worst}"]


def test_conformal_drift_is_against_the_weights_at_the_start(calm: None) -> None:
    model = net()
    start = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    rows, _ = monitored(model, 4, metrics=("conformal_drift",))
    for name, layer in layers_of(model).items():
        expected = conformal_drift(start[name], layer.weight.detach()).absolute.item()
        assert rows.rows[-1].values[f"orthofast/conformal_drift/{name}"] == pytest.approx(expected, rel=1e-6)
        assert expected > 1e-4
    assert not Monitor(model, log=[])._probe.state_dict()["before"]  # nothing is kept where nobody asks


def test_weight_domination_is_the_ratio_of_largest_singular_values(calm: None) -> None:
    model, truth = net(), {}
    monitor = Monitor(model, every_n_steps=3, metrics=("weight_domination",), worst_k=None, log=[], overhead=None)

    def after(step: int) -> None:
        monitor.step()
        for name, layer in layers_of(model).items():
            assert layer.weight.grad is not None
            sigma = [torch.linalg.matrix_norm(m.detach().double(), 2).item() for m in (layer.weight.grad, layer.weight)]
            truth[name] = sigma[0] / sigma[1]

    train(model, 3, after)
    for name, expected in truth.items():
        assert monitor.latest[f"orthofast/weight_domination/{name}"] == pytest.approx(expected, rel=1e-3)
    assert monitor.latest["orthofast/weight_domination/argmin"] == min(truth, key=lambda name: truth[name])


def test_activation_metrics_are_those_of_the_same_forward(calm: None) -> None:
    model, seen = net(), {}
    handles = [
        m.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.detach().clone()}))
        for name, m in model.named_modules()
    ]
    rows, _ = monitored(model, 2, metrics=("orthogonality_gap", "dying_frac", "full_frac"))
    values = rows.rows[-1].values
    for name in layers_of(model):
        gap = orthofast.orthogonality_gap(seen[name]).item()
        assert values[f"orthofast/orthogonality_gap/{name}"] == pytest.approx(gap, rel=1e-5)
    for name in ("1", "4"):
        fired = (seen[name] > 0).sum(0)
        assert values[f"orthofast/dying_frac/{name}"] == pytest.approx((fired == 0).double().mean().item())
        assert values[f"orthofast/full_frac/{name}"] == pytest.approx((fired == len(seen[name])).double().mean().item())
    assert sum(len(m._forward_hooks) for m in model.modules()) == len(handles)


def test_worst_k_limits_the_layers_that_get_a_key(calm: None) -> None:
    rows, _ = monitored(net(), 2, metrics=("pii",), worst_k=1)
    values = rows.rows[0].values
    layer = values["orthofast/pii/argmax"]
    assert [key for key in values if key.startswith("orthofast/pii/")] == [
        "orthofast/pii/mean", "orthofast/pii/max", "orthofast/pii/argmax", f"orthofast/pii/{layer}",
    ]  # fmt: skip
    none, _ = monitored(net(), 2, metrics=("pii",), worst_k=0)
    assert "orthofast/pii/mean" in none.rows[0].values
    assert f"orthofast/pii/{layer}" not in none.rows[0].values


def test_layers_are_filtered(calm: None) -> None:
    rows, _ = monitored(net(), 2, metrics=("pii",), layers=["0.*", "5.*"])
    assert {key for key in rows.rows[0].values if key[-1].isdigit()} == {"orthofast/pii/0", "orthofast/pii/5"}


# without a trace


def after_training(steps: int, **given: Any) -> list[Tensor]:
    """Weights, buffers and random state after training with dropout, autocast and batch norm; monitored if asked."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3),
        nn.utils.parametrizations.spectral_norm(nn.Linear(24, 16)), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    monitor = Monitor(model, log=[], overhead=None, **given) if given else None
    torch.manual_seed(2)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = model(x)
        return out.float()

    train(model, steps, lambda step: monitor.step() if monitor else None, forward=forward)
    return [*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]


@pytest.mark.parametrize("metrics", [ALL[:3], ALL], ids=["defaults", "all"])
def test_a_monitored_run_computes_the_very_same_weights(metrics: tuple[str, ...], calm: None) -> None:
    plain = after_training(6)
    watched = after_training(6, every_n_steps=2, metrics=metrics)
    assert len(plain) == len(watched)
    for left, right in zip(plain, watched, strict=True):
        assert torch.equal(left, right)


def test_modes_gradients_and_hooks_are_as_they_were(calm: None) -> None:
    model = net(0.5)
    _, monitor = monitored(model, 4, metrics=ALL)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)
    monitor.close()
    assert not model._forward_pre_hooks


def test_a_closed_monitor_lets_go_of_the_model() -> None:
    gc.collect()
    gc.disable()  # nothing but the last reference may be what kept it
    try:
        model = net()
        gone = weakref.ref(model)
        monitor = Monitor(model, every_n_steps=1, metrics=ALL, log=[])
        monitor.close()
        del model, monitor
        assert gone() is None
    finally:
        gc.enable()


def test_hooks_are_there_on_armed_steps_only(calm: None) -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=4, metrics=("dying_frac",), log=[], overhead=None)
    hooked = []
    train(
        model,
        8,
        lambda step: monitor.step(),
        before=lambda step: hooked.append(any(m._forward_hooks for m in model.modules())),
    )
    # step 1 shows whether the model is compiled; 4 and 8 are due
    assert hooked == [True, False, False, True, False, False, False, True]


def test_steps_that_are_not_due_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=5, log=[], overhead=None)
    monitor.step()
    acted: list[int] = []
    monkeypatch.setattr(monitor, "_act", acted.append)
    for _ in range(3):
        monitor.step()
    assert acted == []
    monitor.step()
    assert acted == [5]


def test_a_copy_or_pickle_of_the_model_carries_no_monitor() -> None:
    model = net()
    monitor = Monitor(model, every_n_steps=2, metrics=("dying_frac",), log=[], overhead=None)
    twin = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    train(model, 1, lambda step: monitor.step())
    for other in (twin, thawed):  # a forward of theirs between is none of the monitor's
        other(torch.full((10, 12), -1e3))
    train(model, 1, lambda step: monitor.step(), start=1)
    alone = Monitor(net(), every_n_steps=2, metrics=("dying_frac",), log=[], overhead=None)
    train(alone._probe.model, 2, lambda step: alone.step())
    assert monitor.latest["orthofast/dying_frac/mean"] == alone.latest["orthofast/dying_frac/mean"]


# when


def test_multiples_are_due_and_own_step_numbers_are_followed(calm: None) -> None:
    rows, _ = monitored(net(), 9, every_n_steps=3)
    assert rows.steps == [3, 6, 9]
    rows = Rows()
    monitor = Monitor(net(), every_n_steps=10, log=rows, overhead=None)
    for step in range(17, 42):
        monitor.step(step)
    assert rows.steps == [20, 30, 40]


def test_gradient_accumulation_counts_optimizer_steps(calm: None) -> None:
    model, rows = net(), Rows()
    metrics = ("weight_domination", "dying_frac", "orthogonality_gap")
    monitor = Monitor(model, every_n_steps=2, metrics=metrics, worst_k=None, log=rows, overhead=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fired, first = torch.zeros(24, dtype=torch.long), torch.empty(0)
    for step in range(1, 3):
        for micro in range(3):
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * step + micro))
            if step == 2:
                with torch.no_grad():
                    hidden = nn.functional.linear(x, model[0].weight, model[0].bias)
                fired += (hidden > 0).sum(0)
                first = hidden if micro == 0 else first
            (model(x).square().mean() / 3).backward()
        optimizer.step()
        monitor.step()
        optimizer.zero_grad()
    values = rows.rows[0].values
    assert rows.steps == [2]
    # neurons over all micro-batches, the gap of the first
    assert values["orthofast/dying_frac/1"] == pytest.approx((fired == 0).double().mean().item())
    assert values["orthofast/full_frac/1" if "full_frac" in metrics else "orthofast/dying_frac/1"] is not None
    assert values["orthofast/orthogonality_gap/0"] == pytest.approx(orthofast.orthogonality_gap(first).item(), rel=1e-5)


def test_a_resumed_run_logs_what_an_unbroken_one_does(calm: None) -> None:
    metrics = tuple(name for name in ALL if name != "full_frac")
    whole, _ = monitored(net(), 12, every_n_steps=3, metrics=metrics)
    model, rows = net(), Rows()
    given: dict[str, Any] = {"every_n_steps": 3, "overhead": None, "worst_k": None, "log": rows, "metrics": metrics}
    first = Monitor(model, **given)
    train(model, 7, lambda step: first.step())
    stopped = copy.deepcopy((model.state_dict(), first.state_dict()))
    first.close()
    again = net()
    again.load_state_dict(stopped[0])
    second = Monitor(again, **given)
    second.load_state_dict(stopped[1])
    train(again, 5, lambda step: second.step(), start=7)
    assert rows.steps == whole.steps == [3, 6, 9, 12]
    for left, right in zip(whole.rows, rows.rows, strict=True):
        unlike = {"orthofast/overhead"}
        assert {k: v for k, v in left.values.items() if k not in unlike} == {
            k: v for k, v in right.values.items() if k not in unlike
        }


# numbers that arrive later, as from a device


class Event:
    """Stands in for a CUDA event."""

    def __init__(self) -> None:
        self.done, self.waited = False, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited, self.done = not self.done, True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def test_numbers_on_their_way_are_handed_over_when_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    real = module_under_test.mark

    def marked(device: torch.device) -> Any:
        events.append(Event())
        return type(real(device))(real(device).host_s, events[-1])

    monkeypatch.setattr(module_under_test, "mark", marked)
    rows = Rows()
    monitor = Monitor(net(), every_n_steps=4, log=rows, overhead=None)
    for _ in range(5):
        monitor.step()
    assert rows.steps == []  # step 4 is measured, nobody waits
    events[-1].done = True
    monitor.step()
    assert rows.steps == [4]
    assert not events[-1].waited
    for _ in range(2):
        monitor.step()
    assert rows.steps == [4]
    monitor.flush()
    assert rows.steps == [4, 8]
    assert events[-1].waited
    for _ in range(8):  # 12 never arrives by itself: 16 waits for it
        monitor.step()
    assert rows.steps == [4, 8, 12]
    monitor.close()
    assert rows.steps == [4, 8, 12, 16]


def test_the_console_line_names_errors_and_nan_layers() -> None:
    from orthofast.training.sinks import Console

    stream = io.StringIO()
    Console(stream).write(Row(3, {"orthofast/nonfinite/head": 2.0, "orthofast/error/neck": "gone"}))
    assert stream.getvalue() == "orthofast step 3: head: 2 vectors with NaN or Inf | neck: gone\n"

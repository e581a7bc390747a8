"""Hooks on activations: exact in eager and compiled models, under autocast and checkpointing, or a clear word."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import orthofast
from orthofast.training import Monitor
from orthofast.training.capture import SAMPLES, representation_gap

METRICS = ("orthogonality_gap", "dying_frac", "full_frac")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two layers; the hidden ones may be recomputed in the backward pass."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.relu, self.second = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)
        self.recompute = recompute

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.hidden(x)
        return checkpoint(self.hidden, x, use_reentrant=self.recompute == "reentrant")


def data(step: int) -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()


def steps(
    model: nn.Module, forward: Any, monitor: Monitor, count: int, *, autocast: bool = False, start: int = 0
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(start + 1, start + count + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = forward(data(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        monitor.step()
        optimizer.zero_grad()


def expected(step: int, autocast: bool) -> dict[str, float]:
    """The values of a step of the same run without a monitor, from plain tensors."""
    model = Net()
    steps(model, model, Monitor(model, log=[]), step - 1, autocast=autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        before = model.first(data(step))
        after = torch.relu(before)
        out = model.second(after)
    fired = (after > 0).sum(0)
    return {
        "orthofast/orthogonality_gap/first": orthofast.orthogonality_gap(before).item(),
        "orthofast/orthogonality_gap/second": orthofast.orthogonality_gap(out).item(),
        "orthofast/dying_frac/relu": (fired == 0).double().mean().item(),
        "orthofast/full_frac/relu": (fired == len(after)).double().mean().item(),
    }


@pytest.mark.filterwarnings("ignore:.*(reentrant|requires_grad)", "ignore::DeprecationWarning")  # of torch
@pytest.mark.parametrize(
    ("how", "autocast", "recompute"),
    [
        *(
            (how, autocast, recompute)
            for how in ("eager", "aot_eager")
            for autocast in (False, True)
            for recompute in ("", "reentrant", "nonreentrant")
        ),
        ("inductor", False, "nonreentrant"),
    ],
)
def test_records_are_exact(how: str, autocast: bool, recompute: str) -> None:
    model = Net(recompute)
    monitor = Monitor(model, every_n_steps=2, metrics=METRICS, worst_k=None, log=[], overhead=None)
    counter = CompileCounterWithBackend(how) if how != "eager" else None
    whole = recompute != "reentrant"  # which breaks graphs by itself
    forward = torch.compile(model, backend=counter, fullgraph=whole) if counter else model
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="orthofast")
        # plain torch, whose products autocast would round
        with orthofast.use_backend("reference"):
            steps(model, forward, monitor, 4, autocast=autocast)
    for key, value in expected(4, autocast).items():
        assert monitor.latest[key] == pytest.approx(value, rel=1e-5), key
    assert not any("#" in key for key in monitor.latest)  # recomputed calls are not counted
    if counter and whole:
        assert counter.frame_count == 3  # armed or not, without breaks; and what marks the start of a pass


def test_module_compile_works_too() -> None:
    model = Net()
    monitor = Monitor(model, every_n_steps=2, metrics=METRICS, worst_k=None, log=[], overhead=None)
    model.compile(backend="aot_eager", fullgraph=True)
    steps(model, model, monitor, 2)
    for key, value in expected(2, False).items():
        assert monitor.latest[key] == pytest.approx(value, rel=1e-5), key


def test_a_compiled_model_may_be_handed_in_before_its_first_call() -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    monitor = Monitor(compiled, every_n_steps=2, metrics=METRICS, worst_k=None, log=[], overhead=None)
    steps(model, compiled, monitor, 2)
    assert monitor.latest["orthofast/dying_frac/relu"] == expected(2, False)["orthofast/dying_frac/relu"]


def test_attached_after_the_first_compiled_call_says_the_cure_which_works() -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(data(0)).sum().backward()
    monitor = Monitor(compiled, every_n_steps=2, metrics=("pii", *METRICS), worst_k=None, log=[], overhead=None)
    model.zero_grad()
    with pytest.warns(
        RuntimeWarning, match=r"make the Monitor before that call, or call torch\._dynamo\.reset\(\)"
    ) as seen:
        steps(model, compiled, monitor, 4)
    assert len(seen) == 1
    assert "orthofast/pii/first" in monitor.latest
    assert not any("dying" in key for key in monitor.latest)
    torch._dynamo.reset()
    steps(model, compiled, monitor, 2, start=4)
    assert "orthofast/dying_frac/relu" in monitor.latest


def test_compiling_in_mid_run_is_noticed() -> None:
    model = Net()
    monitor = Monitor(model, every_n_steps=2, metrics=METRICS, worst_k=None, log=[], overhead=None)
    steps(model, model, monitor, 4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(data(0))  # while nothing is armed
    monitor._probe.capture.disarm()
    with pytest.warns(RuntimeWarning, match="torch.compile ignores hooks that join a model after"):
        steps(model, compiled, monitor, 4, start=4)


def test_modules_called_several_times_keep_their_calls_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(6, 5), nn.Linear(5, 7), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.b(self.relu(self.a(x))))

    model = Twice()
    with torch.no_grad():
        model.b.bias.fill_(-100.0)
    monitor = Monitor(model, every_n_steps=1, metrics=("dying_frac",), worst_k=None, log=[], overhead=None)
    for _ in range(2):  # micro-batches of one step
        model(data(1))
    monitor.step()
    assert {key for key in monitor.latest if "relu" in key and "arg" not in key} == {
        "orthofast/dying_frac/relu", "orthofast/dying_frac/relu#2",
    }  # fmt: skip
    assert monitor.latest["orthofast/dying_frac/relu#2"] == 1
    assert monitor.latest["orthofast/dying_frac/relu"] < 1


def test_neurons_of_convolutions_are_channels() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for model, shape in ((flat, (2, 3, 9)), (image, (2, 3, 9, 9))):
        with torch.no_grad():
            model[0].bias.copy_(torch.tensor([-100.0, 0.0, 0.0, 100.0]))
        monitor = Monitor(model, every_n_steps=1, metrics=METRICS, worst_k=None, log=[], overhead=None)
        x = torch.randn(shape)
        out = model[0](x)
        model(x)
        monitor.step()
        assert monitor.latest["orthofast/dying_frac/1"] == 0.25
        assert monitor.latest["orthofast/full_frac/1"] == 0.25
        gap = orthofast.orthogonality_gap(out.detach().flatten(1)).item()
        assert monitor.latest["orthofast/orthogonality_gap/0"] == pytest.approx(gap, rel=1e-5)


def test_without_relu_modules_outputs_of_layers_count_as_what_is_fed_into_one() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, 0.0, 0.0]))
    monitor = Monitor(model, every_n_steps=1, metrics=("dying_frac",), worst_k=None, log=[], overhead=None)
    model(data(1))
    monitor.step()
    assert monitor.latest["orthofast/dying_frac/0"] == 0.25


def test_evaluation_between_steps_is_not_looked_at() -> None:
    model = Net()
    monitor = Monitor(model, every_n_steps=1, metrics=METRICS, worst_k=None, log=[], overhead=None)
    model.eval()
    model(torch.full((3, 6), -1e4))
    model.train()
    model(data(1))
    monitor.step()
    for key, value in expected(1, False).items():
        assert monitor.latest[key] == pytest.approx(value, rel=1e-5), key


def test_trouble_in_a_hook_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthofast.training import capture

    def broken(*given: object) -> object:
        raise RuntimeError("no memory")

    model = Net()
    monitor = Monitor(model, every_n_steps=1, metrics=("pii", *METRICS), log=[], overhead=None)
    monkeypatch.setattr(capture, "firing_counts", broken)
    with pytest.warns(RuntimeWarning, match="orthogonality_gap, dying_frac, full_frac failed .* no memory") as seen:
        steps(model, model, monitor, 3)
    assert len(seen) == 1
    assert "orthofast/pii/mean" in monitor.latest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_gap_is_of_evenly_spaced_rows_and_either_side() -> None:
    x = torch.randn(4 * SAMPLES + 1, 3, 8)  # many positions
    rows = x.reshape(-1, 8)
    step = -(-len(rows) // SAMPLES)
    assert representation_gap(x, False).item() == pytest.approx(
        orthofast.orthogonality_gap(rows[::step]).item(), rel=1e-5
    )
    assert len(rows[::step]) <= SAMPLES
    few = torch.randn(5, 40)
    assert representation_gap(few, False).item() == pytest.approx(orthofast.orthogonality_gap(few).item(), rel=1e-5)
    image = torch.randn(5, 4, 3, 3)
    gap = orthofast.orthogonality_gap(image.flatten(1)).item()
    assert representation_gap(image, True).item() == pytest.approx(gap, rel=1e-5)

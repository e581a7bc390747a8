"""Covariances under compile, autocast, checkpointing and accumulation: exact sums or a clear word, alone and riding."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orthofast.errors import InputError
from orthofast.training.analysis import conditioning
from orthofast.training.factors import Factors
from orthofast.training.report import Report
from orthofast.training.tracker import CovarianceTracker


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Three layers, an activation in place; the hidden part may be recomputed in the backward pass."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.act = nn.Linear(6, 12), nn.ReLU(inplace=True)
        self.second, self.last = nn.Linear(12, 8), nn.Linear(8, 3)
        self.recompute = recompute

    def hidden(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.second(self.act(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            x = checkpoint(self.hidden, x, use_reentrant=self.recompute == "reentrant")
        else:
            x = self.hidden(x)
        return cast(Tensor, self.last(x))


def batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randn(9, 6, generator=made), torch.randint(3, (9,), generator=made)


def truth(steps: list[int], autocast: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of plain tensors, by hand."""
    model = Net()
    found: dict[str, list[Tensor]] = {"first": [], "second": [], "last": []}
    for step in steps:
        x, y = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            a = model.first(x)
            b = model.second(a.relu())
            c = model.last(b.relu())
            loss = functional.cross_entropy(c.float(), y)
        gradients = torch.autograd.grad(loss, (a, b, c))
        for rows, gradient, given in zip(found.values(), gradients, (x, a.relu(), b.relu()), strict=True):
            g, entry = 9 * gradient.double(), given.detach().double()
            rows += [entry.T @ entry / (9 * len(steps)), g.T @ g / (9 * len(steps))]
    return {name: (sum(rows[::2]), sum(rows[1::2])) for name, rows in found.items()}  # type: ignore[misc]


def assert_report(report: Report, steps: list[int], autocast: bool = False, tol: float = 1e-6) -> None:
    for name, pair in truth(steps, autocast).items():
        row: Any = report.layers[name]
        assert not row.error
        for got, matrix in zip((row.spectrum_x, row.spectrum_g), pair, strict=True):
            true = torch.linalg.eigvalsh(matrix).flip(0)
            torch.testing.assert_close(got, true, rtol=0, atol=(5e-3 if autocast else tol) * float(true[0]))


REENTRANT = pytest.mark.filterwarnings("ignore:.*(reentrant|requires_grad)", "ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("how", "autocast", "recompute"),
    [
        ("eager", False, ""),
        ("eager", True, ""),
        ("eager", False, "nonreentrant"),
        ("eager", True, "nonreentrant"),
        ("compiled", False, ""),
        ("module compiled", True, "nonreentrant"),
        ("data parallel", False, ""),
    ],
)
def test_a_pass_of_its_own_is_exact(how: str, autocast: bool, recompute: str) -> None:
    model: Any = Net(recompute)
    if how == "compiled":
        model = torch.compile(model, backend="aot_eager")
        model(batch(0)[0])  # compiled already: hooks would be ignored
    elif how == "module compiled":
        model.compile(backend="aot_eager")
        model(batch(0)[0])
    elif how == "data parallel":
        model = nn.DataParallel(model)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        for labels in ("empirical", "exact"):
            report = conditioning(model, [batch(1), batch(2)], loss=nn.CrossEntropyLoss(), labels=labels)
            if labels == "empirical":
                assert_report(report, [1, 2], autocast)
            assert {name: row.calls for name, row in report.layers.items()} == {"first": 1, "second": 1, "last": 1}
            assert not any(row.error for row in report.layers.values())


@REENTRANT
def test_reentrant_checkpointing_is_refused_with_the_cure() -> None:
    with pytest.raises(InputError, match=r"first runs without gradients.*use_reentrant=False"):
        conditioning(Net("reentrant"), [batch(1)], loss="cross_entropy", labels="empirical")


def test_a_pass_under_no_grad_and_inference_mode_is_one_with_gradients() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        model, data = Net(), [batch(1)]
        with context:
            made_inside = [tuple(part.clone() for part in data[0])]
            reports = [
                conditioning(model, given, loss="cross_entropy", labels="empirical") for given in (data, made_inside)
            ]
        for report in reports:
            assert_report(report, [1])


def train(
    forward: Any,
    steps: list[int],
    *,
    autocast: bool = False,
    pieces: int = 1,
    factor: float = 1.0,
    reentrant: bool = False,
) -> None:
    for step in steps:
        x, y = batch(step)
        x.requires_grad_(reentrant)
        for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True) if pieces > 1 else [(x, y)]:
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = functional.cross_entropy(forward(a).float(), b) * factor
            loss.backward()


@REENTRANT
@pytest.mark.parametrize(
    ("how", "autocast", "recompute"),
    [
        ("eager", False, ""),
        ("eager", True, "nonreentrant"),
        ("eager", False, "reentrant"),
        ("aot_eager", True, ""),
        ("aot_eager", False, "nonreentrant"),
    ],
)
def test_riding_on_steps_is_exact_and_switches_between_two_graphs(how: str, autocast: bool, recompute: str) -> None:
    model = Net(recompute)
    plain = copy.deepcopy(model)
    tracker = CovarianceTracker(model)
    counter = CompileCounterWithBackend(how) if how != "eager" else None
    forward: Any = torch.compile(model, backend=counter, fullgraph=True) if counter else model
    for _ in range(2):
        train(forward, [7], autocast=autocast, reentrant=recompute == "reentrant")
        tracker.reset()
        with tracker:
            train(forward, [1, 2], autocast=autocast, reentrant=recompute == "reentrant")
        assert_report(tracker.report(), [1, 2], autocast)
        assert {row.n for row in tracker.report().layers.values()} == {18}  # none counted twice
    if counter:
        assert counter.frame_count == 3  # armed or not, without breaks; and what marks the start of a pass
    assert tracker.report().n == 18
    assert tracker.report().labels == "empirical"
    # the steps themselves are untouched
    for _ in range(2):
        train(plain, [7, 1, 2], autocast=autocast, reentrant=recompute == "reentrant")
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-5 if how == "inductor" else 0, atol=1e-6 if how == "inductor" else 0
        )


def test_accumulated_and_scaled_steps_are_told_their_scale() -> None:
    model = Net()
    with CovarianceTracker(model, loss_scale=lambda: 1024 / 3) as tracker:
        train(model, [1, 2], pieces=3, factor=1024 / 3)
    assert_report(tracker.report(), [1, 2])
    with CovarianceTracker(model, terms=9, loss_scale=torch.tensor(9.0)) as tracker:
        x, y = batch(1)
        functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert_report(tracker.report(), [1])


def test_passes_without_gradients_are_not_looked_at() -> None:
    model = Net()
    with CovarianceTracker(model) as tracker:
        with torch.no_grad():
            model(batch(7)[0])
        train(model, [1])
        with torch.inference_mode():
            model(batch(7)[0])
        train(model, [2])
    assert tracker.report().n == 18
    assert_report(tracker.report(), [1, 2])


def test_passes_before_one_backward_keep_their_own_rows() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.layer = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(self.embed(x)).mean(1))

    model = Text()
    data = [(torch.randint(9, (n, 3)), torch.randint(4, (n,))) for n in (5, 2)]
    with CovarianceTracker(model, loss_scale=0.5) as tracker:
        losses = [functional.cross_entropy(model(x), y) for x, y in data]
        ((losses[0] + losses[1]) / 2).backward()
    alone = conditioning(model, data, loss="cross_entropy", labels="empirical")
    for name, row in tracker.report().layers.items():
        for side in ("spectrum_x", "spectrum_g"):
            torch.testing.assert_close(getattr(row, side), getattr(alone.layers[name], side), rtol=1e-5, atol=1e-8)


def test_the_past_decays() -> None:
    model = Net()
    tracker = CovarianceTracker(model)
    for step in (1, 2):
        tracker.decay(0.5)
        with tracker:
            train(model, [step])
    got: Any = tracker.report().layers["second"]
    (x1, g1), (x2, g2) = truth([1])["second"], truth([2])["second"]
    for spectrum, matrix in ((got.spectrum_x, (x1 / 2 + x2) / 1.5), (got.spectrum_g, (g1 / 2 + g2) / 1.5)):
        torch.testing.assert_close(spectrum, torch.linalg.eigvalsh(matrix).flip(0), rtol=0, atol=1e-6)


def test_shared_layers_are_counted_by_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed = nn.Embedding(9, 4, padding_idx=0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(self.layer(self.embed(x)).relu_()))

    model, x, y = Twice(), torch.randint(9, (5, 3)), torch.randint(4, (5, 3))
    with CovarianceTracker(model, terms=15) as tracker:
        functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    alone = conditioning(model, [(x, y)], loss="cross_entropy", labels="empirical")
    for name, row in tracker.report().layers.items():
        for side in ("spectrum_x", "spectrum_g"):
            torch.testing.assert_close(getattr(row, side), getattr(alone.layers[name], side), rtol=1e-5, atol=1e-8)


def test_hooks_that_join_late_are_noticed() -> None:
    model = Net()
    forward = torch.compile(model, backend="aot_eager")
    train(forward, [1])
    tracker = CovarianceTracker(model)
    with tracker:
        train(forward, [1])
    with pytest.raises(InputError, match="attach it before the first compiled call"):
        tracker.report()
    torch._dynamo.reset()
    with tracker:
        train(forward, [1])
    assert_report(tracker.report(), [1])


def test_a_tracker_leaves_no_trace() -> None:
    model = Net()
    tracker = CovarianceTracker(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with tracker:
        train(twin, [1])
    with pytest.raises(InputError, match="saw no layer called"):
        tracker.report()
    with tracker:
        model(batch(1)[0])
    with pytest.raises(InputError, match="saw no gradient"):
        tracker.report()
    tracker.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="mask="):
        CovarianceTracker(model, factors=Factors(mask=lambda given: given))


def test_tensor_parallel_layers_are_refused() -> None:
    class Fake(torch.Tensor):
        def full_tensor(self) -> None:
            """What a DTensor has."""

    layer = nn.Linear(3, 3)
    with pytest.raises(InputError, match="tensor parallelism"):
        conditioning(layer, [torch.ones(2, 3).as_subclass(Fake)], loss="mse", labels="mc")

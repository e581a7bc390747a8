"""Our Kronecker factors in the scale of other libraries, against those libraries themselves where installed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from orthofast import metrics
from orthofast.errors import InputError
from orthofast.metrics.scales import CONVENTIONS

Factors = list[tuple[Tensor, Tensor]]
CLASSES, N, BATCH = 5, 12, 4


def linear_net() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, CLASSES, bias=False))
    return model, torch.randn(N, 6)


def conv_net() -> tuple[nn.Sequential, Tensor]:
    conv = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES, bias=False)), torch.randn(N, 2, 8, 8)


NETS = {"linear": linear_net, "convolution": conv_net}
each = pytest.mark.parametrize("net", NETS.values(), ids=list(NETS))


def ours(model: nn.Sequential, images: Tensor, labels: Tensor | None) -> tuple[Factors, list[int]]:
    """A and G in our scale, and positions per loss term; by all labels weighted where none are given."""
    h, entered, left = images, [], []
    for module in model:
        before, h = h, module(h)
        if isinstance(module, nn.Conv2d):
            before = functional.unfold(before, 3, padding=1, stride=2).mT
        if hasattr(module, "weight"):
            entered.append(before.detach())
            left.append(h)
    by_label = [labels] if labels is not None else [torch.full((N,), c) for c in range(CLASSES)]
    found = [
        torch.autograd.grad(functional.cross_entropy(h, y, reduction="sum"), left, retain_graph=True) for y in by_label
    ]
    factors, positions = [], []
    for k, x in enumerate(entered):
        g = torch.stack([of_label[k].flatten(2).mT if of_label[k].dim() > 2 else of_label[k] for of_label in found])
        if labels is None:
            g = metrics.label_gradients(g, h.detach().softmax(1))
        rows, outputs = x.flatten(0, -2).double(), g.flatten(0, -2).double()
        factors.append((rows.T @ rows / len(rows), outputs.T @ outputs / N))
        positions.append(len(rows) // N)
    return factors, positions


def check(theirs: Factors, source: str, mine: Factors, positions: list[int], outputs: int = 1) -> None:
    for (a, g), (x, y), per_term in zip(theirs, mine, positions, strict=True):
        sizes = {"n": N, "positions": per_term, "outputs": outputs}
        for found, truth in zip(metrics.rescale_factors(a, g, source=source, **sizes), (x, y), strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=2e-6 * truth.abs().max().item())
        for found, truth in zip(metrics.rescale_factors(x, y, target=source, **sizes), (a, g), strict=True):
            torch.testing.assert_close(found.float(), truth, rtol=2e-5, atol=2e-6 * truth.abs().max().item())


@pytest.fixture
def quietly() -> Iterator[None]:
    """Other libraries warn on import and of what they are going to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@each
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("exact", [True, False], ids=["expected labels", "true labels"])
@pytest.mark.usefixtures("quietly")
def test_curvlinops(net: Callable[[], tuple[nn.Sequential, Tensor]], reduction: str, exact: bool) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="compared with curvlinops where it is installed")
    model, x = net()
    labels = torch.randint(CLASSES, (N,))
    kfac = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters()),
        list(zip(x.split(BATCH), labels.split(BATCH), strict=True)),
        fisher_type="type-2" if exact else "empirical",
        check_deterministic=False,
        num_data=N,
        num_per_example_loss_terms=1,
    )
    kfac.compute_kronecker_factors()
    theirs = [(kfac._input_covariances[name], kfac._gradient_covariances[name]) for name in kfac._input_covariances]
    mine, positions = ours(model, x, None if exact else labels)
    check(theirs, "curvlinops" if reduction == "mean" else "curvlinops_sum", mine, positions)


@each
@pytest.mark.usefixtures("quietly")
def test_nngeometry(net: Callable[[], tuple[nn.Sequential, Tensor]]) -> None:
    pytest.importorskip("nngeometry", reason="compared with nngeometry where it is installed")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    model, x = net()
    loader = DataLoader(TensorDataset(x, torch.zeros(N)), batch_size=BATCH)
    theirs = [(a, g) for a, g in FIM(model, loader, PMatKFAC).data.values()]
    mine, positions = ours(model, x, None)
    check(theirs, "nngeometry", mine, positions, CLASSES - 1)


@each
@pytest.mark.usefixtures("quietly")
def test_kronfluence(net: Callable[[], tuple[nn.Sequential, Tensor]]) -> None:
    pytest.importorskip("kronfluence", reason="compared with kronfluence where it is installed")
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.module.utils import wrap_tracked_modules
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classification(Task):
        def compute_train_loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    model, x = net()
    labels = torch.randint(CLASSES, (N,))
    mine, positions = ours(model, x, labels)
    task = Classification()
    tracked = wrap_tracked_modules(model, task, FactorArguments(use_empirical_fisher=True))
    loader = DataLoader(TensorDataset(x, labels), batch_size=BATCH)
    _, found = fit_covariance_matrices_with_loader(
        tracked, State(), task, loader, FactorArguments(use_empirical_fisher=True), disable_tqdm=True
    )
    activations, gradients = found["activation_covariance"], found["gradient_covariance"]
    counts = found["num_activation_covariance_processed"]
    assert [int(counts[name]) for name in activations] == [N * per_term for per_term in positions]
    check([(activations[name], gradients[name]) for name in activations], "kronfluence", mine, positions)


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_there_and_back_is_where_it_was(source: str, target: str) -> None:
    a, g = torch.rand(3, 3, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    sizes = {"n": 10, "positions": 6, "outputs": 4}
    there = metrics.rescale_factors(a, g, source=source, target=target, **sizes)
    for found, truth in zip(
        metrics.rescale_factors(*there, source=target, target=source, **sizes), (a, g), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-14, atol=0)
    summed = {"orthofast": 1, "curvlinops": 1, "curvlinops_sum": 10, "nngeometry": 1, "kronfluence": 600}
    scale = (there[0] / a * (there[1] / g)[0, 0])[0, 0].item()
    assert math.isclose(scale, summed[target] / summed[source])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"source": "backpack"}, "source needs one of"),
        ({"target": ""}, "target"),
        ({"n": 0}, "n needs"),
        ({"outputs": 1.5}, "outputs"),
    ],
)
def test_bad_arguments_are_named(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        metrics.rescale_factors(torch.eye(2), torch.eye(2), **options)

"""Kronecker factors as curvlinops, nngeometry and kronfluence compute them, in our scale; skipped without them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthofast.metrics.scales import rescale_factors
from orthofast.training.analysis import conditioning
from orthofast.training.factors import Factors
from orthofast.training.report import Report

CLASSES = 5
# float32 sums against float64 truth: one unit of a product of this many rows; a sum of C passes has more
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-7}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(kind: str, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    if kind == "perceptron":
        return nn.Sequential(
            nn.Linear(12, 10, bias=False),
            nn.ReLU(),
            nn.Linear(10, 8, bias=False),
            nn.ReLU(),
            nn.Linear(8, CLASSES, bias=False),
        ).to(dtype)
    return nn.Sequential(
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, CLASSES, bias=False)
    ).to(dtype)


def batches(kind: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(2)
    shape = (12,) if kind == "perceptron" else (8, 5, 5)
    return [
        (torch.randn(n, *shape, generator=made).to(dtype), torch.randint(CLASSES, (n,), generator=made)) for n in (9, 7)
    ]


def ours(kind: str, dtype: torch.dtype, labels: str) -> Report:
    net = model(kind, dtype)
    return conditioning(net, batches(kind, dtype), loss=nn.CrossEntropyLoss(), labels=labels)


def assert_factors(
    report: Report, theirs: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype, error: float = 0.0
) -> None:
    assert set(theirs) == set(report.layers)
    for name, pair in theirs.items():
        row: Any = report.layers[name]
        for got, matrix in zip((row.spectrum_x, row.spectrum_g), pair, strict=True):
            true = torch.linalg.eigvalsh(matrix.double()).flip(0)
            off = float((got - true).norm() / true.norm())
            # they sum in the model's dtype: of float32, half of the difference is theirs
            assert off <= max(2 * CLOSE[dtype], error), f"{name}: {off:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["perceptron", "convolution"])
def test_curvlinops_computes_the_same(kind: str, labels: str, dtype: torch.dtype) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net, data = model(kind, dtype), batches(kind, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.KFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(net.parameters()),
            data,
            fisher_type={"exact": "type-2", "empirical": "empirical"}[labels],
            check_deterministic=False,
            num_data=16,
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
    theirs = {
        name: (operator._input_covariances[name], operator._gradient_covariances[name])
        for name in operator._input_covariances
    }
    assert_factors(ours(kind, dtype, labels), theirs, dtype)


def test_nngeometry_computes_the_same() -> None:
    """Its input factor is sqrt(C - 1) times ours, its gradient factor as much smaller."""
    pytest.importorskip("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    kind, dtype = "perceptron", torch.float32  # it mixes dtypes of float64 models
    net, data = model(kind, dtype), batches(kind, dtype)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])), batch_size=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = FIM(net, loader, PMatKFAC)
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    theirs = {
        name: rescale_factors(a, g, source="nngeometry", outputs=CLASSES - 1)
        for name, (a, g) in zip(names, found.data.values(), strict=True)
    }
    assert_factors(ours(kind, dtype, "exact"), theirs, dtype, error=1e-6)  # its own, in float32


def test_kronfluence_computes_the_same(tmp_path: Any) -> None:
    """It keeps sums and counts."""
    pytest.importorskip("kronfluence")
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.module.utils import wrap_tracked_modules
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classify(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    kind, dtype = "perceptron", torch.float64
    net, data = model(kind, dtype), batches(kind, dtype)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])), batch_size=8
    )
    arguments = FactorArguments(
        use_empirical_fisher=True,
        activation_covariance_dtype=torch.float64,
        gradient_covariance_dtype=torch.float64,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = wrap_tracked_modules(net, Classify())
        _, found = fit_covariance_matrices_with_loader(
            model=wrapped, state=State(), task=Classify(), loader=loader, factor_args=arguments, disable_tqdm=True
        )
    theirs = {
        name: rescale_factors(a, found["gradient_covariance"][name], source="kronfluence", n=16)
        for name, a in found["activation_covariance"].items()
    }
    assert_factors(ours(kind, dtype, "empirical"), theirs, dtype)


def test_float32_sums_are_as_close_as_theirs() -> None:
    data = batches("perceptron", torch.float32)
    narrow, wide = (
        conditioning(
            model("perceptron", torch.float32), data, loss="cross_entropy", factors=Factors(precision=precision)
        )
        for precision in ("float32", "float64")
    )
    for name, row in wide.layers.items():
        for side in ("spectrum_x", "spectrum_g"):
            true, got = getattr(row, side), getattr(narrow.layers[name], side)
            assert float((got - true).norm() / true.norm()) < 2e-7
            assert not torch.equal(got, true)

"""Ways to get a model's Kronecker factors: ours and those of four packages, and their factors in one scale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Data = list[tuple[Tensor, Tensor]]
Spectra = dict[str, tuple[Tensor, Tensor]]  # by layer: eigenvalues of both factors, largest first
CLASSES = 10


def ours(precision: str) -> Callable[[nn.Module, Data, str], Any]:
    """A pass of conditioning, but for the spectra."""
    from orthofast.training.analysis import collect
    from orthofast.training.factors import Factors

    def run(model: nn.Module, data: Data, labels: str) -> Any:
        return collect(
            model, data, loss=nn.CrossEntropyLoss(), labels=labels, factors=Factors(precision=precision, mc_samples=1)
        )

    return run


def curvlinops_run(model: nn.Module, data: Data, labels: str) -> Any:
    from curvlinops import KFACLinearOperator

    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        fisher_type={"exact": "type-2", "mc": "mc", "empirical": "empirical"}[labels],
        check_deterministic=False,
        num_data=sum(len(x) for x, _ in data),
        num_per_example_loss_terms=1,
    )
    operator.compute_kronecker_factors()
    return operator


def nngeometry_run(model: nn.Module, data: Data, labels: str) -> Any:
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    if labels == "exact":
        return FIM(model, _loader(data), PMatKFAC)
    return FIM_MonteCarlo(model, _loader(data), PMatKFAC)


def backpack_run(model: nn.Module, data: Data, labels: str) -> Any:
    from backpack import backpack, extend
    from backpack.extensions import KFAC, KFLR

    extended, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    extension, name = (KFLR(), "kflr") if labels == "exact" else (KFAC(1), "kfac")
    total: dict[str, list[Tensor]] = {}
    for x, y in data:
        with backpack(extension):
            loss(extended(x), y).backward()
        for key, parameter in extended.named_parameters():
            found = [factor * len(x) for factor in getattr(parameter, name)]
            total[key] = [a + b for a, b in zip(total[key], found, strict=True)] if key in total else found
        extended.zero_grad()
    return total


def kronfluence_run(model: nn.Module, data: Data, labels: str) -> Any:
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.module.utils import wrap_tracked_modules
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Classify(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            out = model(batch[0])
            targets = torch.multinomial(out.detach().softmax(1), 1).flatten() if sample else batch[1]
            return functional.cross_entropy(out, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    wrapped = wrap_tracked_modules(copy.deepcopy(model), Classify())
    arguments = FactorArguments(use_empirical_fisher=labels == "empirical")
    _, found = fit_covariance_matrices_with_loader(
        wrapped, State(), Classify(), _loader(data), arguments, disable_tqdm=True
    )
    return found


def _loader(data: Data) -> Any:
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(data[0][0]))


def spectra_of(name: str, found: Any, model: nn.Module, labels: str, n: int) -> Spectra | None:
    """A contestant's factors in our scale, as eigenvalues; None where it keeps them in another form."""
    from orthofast.metrics.scales import rescale_factors

    names = [key for key, module in model.named_modules() if hasattr(module, "weight")]
    if name.startswith("orthofast"):
        return {key: (layer.x.spectrum(), layer.g.spectrum()) for key, layer in found.items()}
    if name == "curvlinops":
        pairs = {key: (found._input_covariances[key], found._gradient_covariances[key]) for key in names}
    elif name == "nngeometry":
        outputs = CLASSES - 1 if labels == "exact" else 1
        pairs = dict(zip(names, found.data.values(), strict=True))
        if any(isinstance(module, nn.Conv2d) for module in model):
            return None  # positions differ by layer: held against the others in tests
        pairs = {key: rescale_factors(a, g, source="nngeometry", outputs=outputs) for key, (a, g) in pairs.items()}
    elif name == "kronfluence":
        counts = {key: float(value) for key, value in found["num_activation_covariance_processed"].items()}
        pairs = {
            key: (found["activation_covariance"][key] / counts[key], found["gradient_covariance"][key] / n)
            for key in found["activation_covariance"]
        }
    else:
        return None
    return {key: tuple(torch.linalg.eigvalsh(m.double()).flip(0) for m in pair) for key, pair in pairs.items()}  # type: ignore[misc]


@dataclass(slots=True)
class Contestant:
    """One way to get the factors."""

    name: str
    run: Callable[[nn.Module, Data, str], Any]
    labels: tuple[str, ...] = ("empirical", "mc", "exact")
    package: str = ""


def contestants(only: Sequence[str] | None) -> list[Contestant]:
    """Those whose packages are installed."""
    everyone = [
        Contestant("orthofast float32", ours("float32")),
        Contestant("orthofast float64", ours("float64")),
        Contestant("curvlinops", curvlinops_run, package="curvlinops"),
        Contestant("nngeometry", nngeometry_run, ("mc", "exact"), package="nngeometry"),
        Contestant("BackPACK", backpack_run, ("mc", "exact"), package="backpack"),
        Contestant("kronfluence", kronfluence_run, ("empirical", "mc"), package="kronfluence"),
    ]
    return [one for one in everyone if (only is None or one.name in only) and _installed(one.package)]


def _installed(package: str) -> bool:
    return not package or find_spec(package) is not None

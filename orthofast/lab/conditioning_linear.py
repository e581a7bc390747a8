"""Huang et al. 2020 on linear models (Section 2) and on rescaled weights (Theorems 1 and 2): exact statements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthofast.lab.experiment import Experiment, Raw, Settings
from orthofast.lab.figures import Figure, Panel, Series
from orthofast.lab.nets import mlp
from orthofast.lab.verdict import Verdict, above, below, judge, log_slope, near, shown
from orthofast.metrics import largest_stable_step, rescale_weights_check, spectrum, squared_error_hessian

KAPPAS = (1, 3, 10, 30, 100, 300)
EPS = 1e-30  # of batch normalisation; torch takes no 0
ACCURACY = 1e-6  # share of the starting error at which descent stops


def linear_models(settings: Settings) -> Raw:
    """Descent on least squares by the inputs' spectrum; rescaled weights with and without BN."""
    noise = torch.Generator().manual_seed(settings.seed)
    d = 16
    basis = torch.linalg.qr(torch.randn(400, d, dtype=torch.float64, generator=noise)).Q
    target = torch.randn(d, dtype=torch.float64, generator=noise)
    found: Raw = {"kappa": list(KAPPAS), "steps": []}
    for kappa in KAPPAS:
        x = basis * math.sqrt(len(basis)) * torch.logspace(0, -math.log10(kappa) / 2, d, dtype=torch.float64)
        found["steps"].append(_steps(x, target))
        if kappa == KAPPAS[0]:
            found["error_after_one"] = _descend(x, target, _limit(x) / 2, 1)[-1]
        if kappa == 100:
            for name, share in (("below", 0.995), ("above", 1.005)):
                found[name] = _descend(x, target, share * _limit(x), 4000)[-1]
    found["theorems"] = {}
    for name, normalization, normalized in (
        ("1", "none", False),
        ("2", "every", True),
        ("2, no last BN", "hidden", True),
    ):
        torch.manual_seed(settings.seed)
        model = mlp([12, 16, 16, 16, 4], normalization=normalization, init="he", eps=EPS).double()
        inputs = torch.randn(50, 12, dtype=torch.float64, generator=noise)
        upstream = torch.randn(50, 4, dtype=torch.float64, generator=noise)
        off = rescale_weights_check(model, inputs, [2.0, 0.5, 3.0, 0.7], normalized=normalized, upstream=upstream)
        found["theorems"][name] = max(part.max().item() for part in off)
    return found


def _limit(x: Tensor) -> float:
    """Largest stable step for ``|y - w^T x|^2``, by its true Hessian 2 E[x x^T]."""
    of_x, of_y = squared_error_hessian(x, half=False)
    return float(largest_stable_step(spectrum(of_x)[0] * of_y[0, 0]))


def _descend(x: Tensor, target: Tensor, rate: float, steps: int) -> list[float]:
    """Error of w over its start's, after each step."""
    w = torch.zeros_like(target)
    errors = []
    for _ in range(steps):
        w = w - rate * 2 * x.T @ (x @ (w - target)) / len(x)
        errors.append(float((w - target).norm() / target.norm()))
        if errors[-1] < ACCURACY:
            break
    return errors


def _steps(x: Tensor, target: Tensor) -> int:
    return len(_descend(x, target, _limit(x) / 2, 20_000))


def _verdict_linear(raws: Sequence[Raw]) -> Verdict:
    large = [log_slope(KAPPAS[2:], raw["steps"][2:]) for raw in raws]
    of = [raw["theorems"] for raw in raws]
    return judge(
        [
            below("whitened inputs: error after one step", [raw["error_after_one"] for raw in raws], 1e-12, "one step"),
            near("exponent of the steps over kappa", large, 1, 0.15, "kappa bounds the learning time"),
            below("error at 0.995 of 2 / lambda_max", [raw["below"] for raw in raws], 1, "converges"),
            above("error at 1.005 of 2 / lambda_max", [raw["above"] for raw in raws], 1, "diverges"),
            below("Theorem 1: largest relative deviation", [one["1"] for one in of], 1e-10, "exact"),
            below("Theorem 2, BN behind every layer: largest deviation", [one["2"] for one in of], 1e-10, "exact"),
            shown("Theorem 2, no BN behind the last layer", [one["2, no last BN"] for one in of], "exact"),
        ],
        "lambda_max of the true Hessian, 2 E[x x^T]; the paper leaves the 2 out. Theorem 2 needs BN behind the last "
        "layer too.",
    )


def _drawn_linear(raws: Sequence[Raw]) -> Figure:
    series = [
        Series("steps to an error of 10⁻⁶", KAPPAS, [raw["steps"] for raw in raws]),
        Series("κ ln 10⁶", KAPPAS[1:], [[kappa * math.log(1 / ACCURACY) for kappa in KAPPAS[1:]]]),
    ]
    return Figure(
        [
            Panel(
                "condition number of the inputs' covariance",
                "steps of gradient descent",
                series,
                x_log=True,
                y_log=True,
            )
        ],
        "Least squares in 16 dimensions, rate 1 / lambda_max.",
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "S2-X3",
        "Section 2, Theorems 1 and 2: linear models, rescaled weights",
        "Whitened inputs are fitted in one step; kappa bounds the learning time; BN keeps rescaled weights local.",
        linear_models,
        _verdict_linear,
        _drawn_linear,
        size="inputs of given spectra in 16 dimensions.",
    ),
)

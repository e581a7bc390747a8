"""Noise, ridge and the constrained problem of batch norm: Monte Carlo, linear solves, and exact limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics import (
    bn_equivalent_weight,
    constrained_minimum,
    isotropic_noise_penalty,
    noise_penalty,
    rate_from_second_moment,
    ridge_path,
    ridge_shrinkage,
)

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small operations: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=seeded(seed))


def spectrum_of(d: int, seed: int = 1) -> Tensor:
    """A covariance with very different directions."""
    factor = noise_like(d, d, seed=seed) * torch.logspace(-1, 1, d, dtype=DOUBLE)
    return factor @ factor.T / d


def test_noise_on_the_inputs_adds_a_ridge_penalty() -> None:
    w, target = noise_like(6, seed=2), noise_like(6, seed=3)
    x, sigma = noise_like(400_000, 6, seed=4), 0.8
    y = x @ target
    clean = (x @ w - y).square()
    noisy = ((x + sigma * noise_like(400_000, 6, seed=5)) @ w - y).square()
    spread = (noisy - clean).std().item() / math.sqrt(len(x))
    assert (noisy - clean).mean().item() == pytest.approx(sigma**2 * w.square().sum().item(), abs=4 * spread)


def test_with_batch_norm_on_the_noisy_data_the_penalty_is_capped() -> None:
    d, sigma, gamma = 5, 0.7, 1.7
    moment = spectrum_of(d)
    w, target = noise_like(1, d, seed=6), noise_like(d, seed=7)
    x = noise_like(400_000, d, seed=8) @ torch.linalg.cholesky(moment).T
    noise = sigma * noise_like(400_000, d, seed=9)
    noisy_rate = rate_from_second_moment(w, moment + sigma**2 * torch.eye(d, dtype=DOUBLE))
    w_bn = (gamma * w / noisy_rate)[0]  # of the noisy statistics, in both terms
    y = x @ target
    extra = ((x + noise) @ w_bn - y).square() - (x @ w_bn - y).square()
    expected = noise_penalty(w, rate_from_second_moment(w, moment), sigma**2, gamma).item()
    assert extra.mean().item() == pytest.approx(expected, abs=4 * extra.std().item() / math.sqrt(len(x)))
    assert expected == pytest.approx(sigma**2 * w_bn.square().sum().item(), rel=1e-13)
    assert expected < gamma**2


@pytest.mark.parametrize(
    ("noise_variance", "eigenvalue", "gamma", "value"),
    [(0.25, 2.0, 1.744, 0.338), (1e4, 1.0, 1.3, 1.68983), (1e-4, 1.0, 1.3, 1.68983e-4)],
)
def test_equal_eigenvalues_leave_no_weight_in_it(
    noise_variance: float, eigenvalue: float, gamma: float, value: float
) -> None:
    closed = isotropic_noise_penalty(noise_variance, eigenvalue, gamma)
    assert closed.item() == pytest.approx(noise_variance * gamma**2 / (eigenvalue + noise_variance), rel=1e-15)
    assert closed.item() == pytest.approx(value, rel=2e-3)
    w = noise_like(4, 9)
    rate = rate_from_second_moment(w, eigenvalue * torch.eye(9, dtype=DOUBLE))
    torch.testing.assert_close(noise_penalty(w, rate, noise_variance, gamma), closed.expand(4), rtol=1e-14, atol=0)


def test_the_limits_are_gamma_squared_and_the_inverse_of_the_signal() -> None:
    assert isotropic_noise_penalty(1e12, 1.0, 3.0).item() == pytest.approx(9, rel=1e-11)
    for noise in (1e-6, 1e-9):  # proportional to the noise, which the text leaves out
        assert isotropic_noise_penalty(noise, 4.0, 3.0).item() == pytest.approx(noise * 9 / 4, rel=1e-6)
    snr = torch.tensor([100.0, 10.0, 1.0, 0.5])
    torch.testing.assert_close(isotropic_noise_penalty(1 / snr, 1.0), 1 / (1 + snr.double()))
    assert noise_penalty(torch.zeros(1, 3), torch.zeros(1), 0.5).item() == 0


def test_the_ridge_path_solves_the_ridge_problem() -> None:
    d, alphas = 6, torch.tensor([0.0, 0.3, 4.0], dtype=DOUBLE)
    hessian, w = spectrum_of(d), noise_like(3, d, seed=10)
    path = ridge_path(w, hessian, alphas)
    assert path.shape == (3, 3, d)
    for found, alpha in zip(path, alphas, strict=True):
        solved = torch.linalg.solve(hessian + alpha * torch.eye(d, dtype=DOUBLE), hessian @ w.T).T
        torch.testing.assert_close(found, solved, rtol=1e-9, atol=1e-10)  # the solve's own rounding
    lengths = path.norm(dim=2)
    assert (lengths[1:] < lengths[:-1]).all()
    values, directions = torch.linalg.eigh(hessian)
    shares = ridge_shrinkage(values, alphas)
    torch.testing.assert_close((path @ directions) / (w @ directions), shares[:, None].expand(3, 3, d))
    assert (shares[1, 1:] >= shares[1, :-1]).all()  # dominant directions are kept longest
    assert ridge_shrinkage(torch.zeros(2), torch.zeros(1)).tolist() == [[1, 1]]


def test_the_constrained_minimum_is_w_over_its_square_and_nothing_is_shorter() -> None:
    w, rate = noise_like(4, 5, seed=11), noise_like(4, seed=12).abs()
    minimum, multiplier = constrained_minimum(w, rate)
    torch.testing.assert_close((minimum * w).sum(1), torch.ones(4, dtype=DOUBLE))
    for trial in range(20):
        away = noise_like(4, 5, seed=20 + trial)
        away -= (away * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        assert ((minimum + 0.1 * away).norm(dim=1) > minimum.norm(dim=1)).all()
    # stationary: 2 alpha v = multiplier w, the 2 of which Eq. 10 drops
    torch.testing.assert_close(2 * rate[:, None] * minimum, multiplier[:, None] * w)
    assert constrained_minimum(torch.zeros(1, 3), torch.ones(1)).weight.isnan().all()


def test_batch_norm_meets_the_constraint_for_one_gamma_only() -> None:
    layer, bn = nn.Linear(5, 3).double(), nn.BatchNorm1d(3, eps=1e-300).double()
    with torch.no_grad():
        bn.running_var.uniform_(0.5, 2)
        squared = layer.weight.square().sum(1)
        bn.weight.copy_(bn.running_var.sqrt() / squared)
    expected = constrained_minimum(layer.weight, bn.running_var.sqrt()).weight
    torch.testing.assert_close(bn_equivalent_weight(layer, bn), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_penalty(torch.ones(1, 2), torch.ones(1), -1.0), "noise_variance needs finite values"),
        (lambda: noise_penalty(torch.ones(2, 2), torch.ones(3), 1.0), r"got \(2, 2\) and \(3,\)"),
        (lambda: constrained_minimum(torch.ones(2), torch.ones(2)), r"got \(2,\) and \(2,\)"),
        (lambda: isotropic_noise_penalty(1.0, math.nan), "eigenvalue needs finite values of at least 0"),
        (lambda: ridge_shrinkage(torch.tensor([-1.0]), torch.ones(1)), "eigenvalues needs finite values"),
        (lambda: ridge_path(torch.ones(1, 2), torch.eye(3), torch.ones(1)), r"curvature needs shape \(2, 2\)"),
        (lambda: rate_from_second_moment(torch.ones(1, 2), torch.eye(3)), r"second_moment needs shape \(2, 2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_no_noise_costs_nothing_even_without_data() -> None:
    assert isotropic_noise_penalty(0.0, 0.0, 2.0).item() == 0
    assert noise_penalty(torch.ones(1, 2), torch.zeros(1), 0.0).item() == 0

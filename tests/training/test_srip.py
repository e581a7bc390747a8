"""SRIP: its value and gradient once the power iteration has converged, and the vectors it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orthofast.training.srip import SRIP
from tests.training.test_losses import SHAPES, assert_close, spectral, truth


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_srip_converges_to_the_spectral_norm_and_its_gradient(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    penalty = SRIP(layer, steps=3000, weight=2, generator=torch.Generator().manual_seed(5))
    true_value, true_gradient = truth(spectral, layer.weight)
    value = penalty()
    value.backward()
    assert_close(value.detach(), 2 * true_value, 1e-12)
    assert_close(layer.weight.grad, 2 * true_gradient, 1e-6)
    layer.weight.grad = None
    assert_close(penalty.add_grad_(), 2 * true_value, 1e-12)
    assert_close(layer.weight.grad, 2 * true_gradient, 1e-6)


def test_srip_sees_an_eigenvalue_below_one_as_far_as_one_above() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.5**0.5, 0.5**0.5])))  # X X^T - I has eigenvalues 0.5 and -0.5
    assert SRIP(layer)().item() == pytest.approx(0.5, rel=1e-6)


def test_srip_keeps_its_vectors_from_call_to_call_in_training_mode_only() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(30, 20), nn.Linear(20, 4))
    penalty = SRIP(net)
    true_value = sum(truth(spectral, layer.weight)[0] for layer in net)
    started = copy.deepcopy(penalty.state_dict())
    assert {tuple(vector.shape) for vector in started.values()} == {(20,), (4,)}
    assert not list(penalty.parameters())
    penalty.eval()
    first = penalty()
    assert torch.equal(penalty(), first)
    assert all(torch.equal(vector, started[name]) for name, vector in penalty.state_dict().items())
    penalty.train()
    values = [penalty().item() for _ in range(200)]
    assert first.item() < values[0] < values[-1]
    assert values[-1] == pytest.approx(true_value.item(), rel=1e-5)
    resumed = SRIP(net)
    resumed.load_state_dict(penalty.state_dict())
    assert resumed().item() == penalty().item()


def test_srip_may_be_called_twice_before_one_backward_and_with_a_frozen_layer() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    penalty = SRIP(net)
    (penalty() + penalty()).backward()
    net[0].weight.requires_grad_(False)
    net[1].weight.grad = None
    net[0].weight.grad = None
    penalty.add_grad_()
    assert net[0].weight.grad is None
    assert net[1].weight.grad is not None


def test_an_exact_isometry_has_no_slope() -> None:
    layer = nn.Linear(3, 3, bias=False)
    nn.init.eye_(layer.weight)
    penalty = SRIP(layer)
    assert penalty.add_grad_() == 0
    assert not layer.weight.grad.any()

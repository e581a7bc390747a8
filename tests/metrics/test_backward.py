"""Normalisation and skips in the backward pass: closed forms against autograd, and what projections promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics import normalization_gradient, residual_gradient

DOUBLE = torch.float64


def by_autograd(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(module(x), x, gradient)
    return found


CASES = {
    "batch": (nn.BatchNorm1d(5), (32, 5), 0, (5,)),
    "images": (nn.BatchNorm2d(4), (6, 4, 5, 3), (0, 2, 3), (4, 1, 1)),
    "layer": (nn.LayerNorm(9), (8, 9), -1, (9,)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eps", [1e-300, 1e-5, 0.5])
def test_the_closed_form_is_what_autograd_computes(case: str, eps: float) -> None:
    norm, shape, dims, fits = CASES[case]
    norm = norm.double().train()
    norm.eps = eps
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x, gradient = torch.randn(2, *shape, dtype=DOUBLE) * 3 + 1
    got = normalization_gradient(gradient, x, dims=dims, eps=eps, scale=norm.weight.view(fits))
    torch.testing.assert_close(got, by_autograd(norm, x, gradient), rtol=1e-12, atol=1e-13)


def test_it_is_two_projections_that_commute() -> None:
    n = 40
    x, gradient = torch.randn(2, n, 1, dtype=DOUBLE) * 2 + 5
    sigma = x.std(0, correction=0)
    y = (x - x.mean(0)) / sigma
    assert (y * y).sum().item() == pytest.approx(n, rel=1e-14)
    flat = torch.eye(n, dtype=DOUBLE) - 1 / n
    along = torch.eye(n, dtype=DOUBLE) - y @ y.T / n
    for projection in (flat, along):
        torch.testing.assert_close(projection @ projection, projection, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(flat @ along, along @ flat, rtol=1e-12, atol=1e-14)
    got = normalization_gradient(gradient, x)
    torch.testing.assert_close(got, flat @ along @ gradient / sigma, rtol=0, atol=4e-15)
    assert got.mean().abs().item() < 1e-15
    assert (got * x).sum().abs().item() < 1e-12
    assert got.norm() <= gradient.norm() / sigma


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, nn.functional.gelu], ids=lambda f: f.__name__)
def test_a_skip_adds_an_identity(activation: object) -> None:
    layer = nn.Linear(6, 6).double()
    x, upstream = torch.randn(2, 9, 6, dtype=DOUBLE)
    z = layer(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(activation(z).sum(), z)  # type: ignore[operator]

    class Block(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h + activation(layer(h))  # type: ignore[operator, no-any-return]

    got = residual_gradient(upstream, layer.weight, slope)
    torch.testing.assert_close(got, by_autograd(Block(), x, upstream), rtol=1e-13, atol=1e-14)
    # read as it is printed, (1 + f') o (W u), it is off by far more than rounding
    assert ((1 + slope) * (upstream @ layer.weight) - got).abs().max() > 0.5


def test_a_normalised_residual_layer_is_the_two_in_turn() -> None:
    layer = nn.Linear(5, 5).double()
    norm = nn.BatchNorm1d(5, eps=1e-300).double()
    x, upstream = torch.randn(2, 12, 5, dtype=DOUBLE)

    class NormRes(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return norm(h + torch.tanh(layer(h)))  # type: ignore[no-any-return]

    z = layer(x).detach()
    through_norm = normalization_gradient(upstream, x + torch.tanh(z))
    got = residual_gradient(through_norm, layer.weight, 1 - torch.tanh(z).square())
    torch.testing.assert_close(got, by_autograd(NormRes(), x, upstream), rtol=1e-11, atol=1e-13)


def test_weight_gradients_of_a_sample_are_outer_products() -> None:
    layer = nn.Linear(4, 3).double()
    x = torch.randn(4, dtype=DOUBLE)
    delta = torch.randn(3, dtype=DOUBLE)
    (gradient,) = torch.autograd.grad(layer(x), layer.weight, delta)
    torch.testing.assert_close(gradient, torch.outer(delta, x))  # column i is x_i delta, row i is delta_i x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalization_gradient(torch.ones(3, 2), torch.ones(2, 3)), r"gradient needs the shape of x"),
        (lambda: residual_gradient(torch.ones(3, 2), torch.ones(2, 3), torch.ones(3, 2)), r"weight needs shape"),
        (lambda: residual_gradient(torch.ones(3, 2), torch.eye(2), torch.ones(2)), "slope needs the shape of gradient"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]

"""Hessians, rescaled weights and the spectra of layers' inputs: the exact claims of Huang et al. 2020."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast import metrics
from orthofast.errors import InputError


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("half", [True, False])
def test_hessian_of_squared_errors(outputs: int, half: bool) -> None:
    x, y = doubles(9, 4), doubles(9, outputs)

    def loss(weight: Tensor) -> Tensor:
        return (y - x @ weight.T).square().sum(1).mean() / (2 if half else 1)

    truth = torch.autograd.functional.hessian(loss, doubles(outputs, 4)).reshape(4 * outputs, 4 * outputs)
    first, second = metrics.squared_error_hessian(x, outputs, half=half)
    torch.testing.assert_close(torch.kron(second, first), truth, rtol=1e-12, atol=1e-13)


def test_hessian_of_the_cross_entropy_at_zero() -> None:
    x, labels = doubles(9, 4), torch.randint(5, (9,))

    def loss(weight: Tensor) -> Tensor:
        return functional.cross_entropy(x @ weight.T, labels)

    truth = torch.autograd.functional.hessian(loss, torch.zeros(5, 4, dtype=torch.float64)).reshape(20, 20)
    first, second = metrics.softmax_hessian(x, 5)
    torch.testing.assert_close(torch.kron(second, first), truth, rtol=1e-12, atol=1e-15)
    expected = torch.tensor([0.2] * 4 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(metrics.spectrum(second), expected, rtol=1e-12, atol=1e-15)
    both = metrics.kronecker_spectrum(metrics.spectrum(first), expected)
    torch.testing.assert_close(both, torch.linalg.eigvalsh(truth).flip(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("share", "falls"), [(0.995, True), (1.005, False)], ids=["below", "above"])
def test_gradient_descent_is_stable_up_to_twice_over_lambda_max(share: float, falls: bool) -> None:
    x = doubles(50, 6)
    y = x @ doubles(6)
    covariance, factor = metrics.squared_error_hessian(x, half=False)
    step = share * metrics.largest_stable_step(metrics.lambda_max(torch.kron(factor, covariance)))
    w = torch.zeros(6, dtype=torch.float64)
    start = (y - x @ w).square().mean()
    for _ in range(3000):
        w = w - step * (2 / 50) * x.T @ (x @ w - y)
    end = (y - x @ w).square().mean()
    assert bool(end < 1e-6 * start) if falls else bool(end > 1e6 * start)


def test_whitened_inputs_are_solved_in_one_step() -> None:
    x = doubles(40, 5)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 40)).T
    found = metrics.covariance_spectrum(white)
    assert metrics.condition_number(found).value.item() == pytest.approx(1, abs=1e-12)
    truth = doubles(5)
    gradient = white.T @ (white @ torch.zeros(5, dtype=torch.float64) - white @ truth) / 40
    torch.testing.assert_close(-gradient / found[0], truth, rtol=1e-12, atol=1e-13)


def test_back_propagation_is_a_step_on_every_layers_own_problem() -> None:
    first, second = doubles(6, 4).requires_grad_(), doubles(3, 6).requires_grad_()
    x, labels = doubles(8, 4), torch.randint(3, (8,))
    h1 = x @ first.T
    x1 = torch.relu(h1)
    h2 = x1 @ second.T
    loss = functional.cross_entropy(h2, labels, reduction="sum")
    g1, g2, w1, w2 = torch.autograd.grad(loss, [h1, h2, first, second])
    for weight, inputs, by_output, by_weight in ((first, x, g1, w1), (second, x1, g2, w2)):
        found = metrics.proximal_gradient(weight.detach(), inputs.detach(), by_output)
        torch.testing.assert_close(found, by_weight, rtol=1e-12, atol=1e-13)


def relu_net(depth: int, normalized: bool = False, last: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(depth):
        layers.append(nn.Linear(7, 7, bias=False))
        if normalized and (k < depth - 1 or last):
            layers.append(nn.BatchNorm1d(7, eps=1e-300))
        if k < depth - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).double()


FACTORS = [2.0, 0.5, 3.0, 1.7]


@pytest.mark.parametrize("normalized", [False, True], ids=["Theorem 1", "Theorem 2"])
def test_rescaled_weights_act_as_the_theorem_says(normalized: bool) -> None:
    model, x = relu_net(4, normalized), doubles(30, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check = metrics.rescale_weights_check(model, x, FACTORS, normalized=normalized, upstream=doubles(30, 7))
    assert all(bool((part < 1e-10).all()) for part in check)
    other = metrics.rescale_weights_check(model, x, FACTORS, normalized=not normalized, upstream=doubles(30, 7))
    assert all(part.max() > 0.1 for part in other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_theorem_2_needs_batch_normalisation_behind_the_last_layer() -> None:
    model, x = relu_net(4, normalized=True, last=False), doubles(30, 7)
    upstream = doubles(30, 7)
    assert (
        metrics.rescale_weights_check(model, x, FACTORS, normalized=True, upstream=upstream).weight_gradients[0] > 0.1
    )
    unscaled = metrics.rescale_weights_check(model, x, [*FACTORS[:3], 1.0], normalized=True, upstream=upstream)
    assert all(bool((part < 1e-10).all()) for part in unscaled)


def test_ratios_by_hand_and_with_a_scaled_derivative_of_the_output() -> None:
    ratios = metrics.rescaling_ratios([2.0, 3.0, 5.0], upstream=10.0)
    assert ratios.activations.tolist() == [2, 6, 30]
    assert ratios.output_gradients.tolist() == [150, 50, 10]
    torch.testing.assert_close(ratios.weight_gradients, torch.tensor([150.0, 100.0, 60.0], dtype=torch.float64))
    normalized = metrics.rescaling_ratios([2.0, 4.0], normalized=True, upstream=3.0)
    assert [part.tolist() for part in normalized] == [[1, 1], [1.5, 0.75], [1.5, 0.75]]


def test_under_batch_normalisation_a_row_of_weights_is_orthogonal_to_its_gradient() -> None:
    model, x = relu_net(3, normalized=True), doubles(30, 7)
    (model(x) * doubles(30, 7)).sum().backward()
    for layer in model:
        if isinstance(layer, nn.Linear):
            along = (layer.weight * layer.weight.grad).sum(1).abs()
            assert bool((along < 1e-13 * layer.weight.norm() * layer.weight.grad.norm()).all())


def test_features_that_are_not_centred_have_one_eigenvalue_the_size_of_their_mean() -> None:
    x = (4 + doubles(1024, 64)).abs()
    largest = metrics.lambda_max(x.T @ x / 1024).item()
    mean_sq = x.mean(0).square().sum().item()
    assert mean_sq <= largest <= 1.02 * mean_sq
    normalized = functional.batch_norm(x, None, None, training=True, eps=1e-300)
    found = metrics.covariance_spectrum(normalized)
    assert found.sum().item() == pytest.approx(64, rel=1e-12)  # one per feature
    assert found[0].item() == pytest.approx((1 + math.sqrt(64 / 1024)) ** 2, rel=0.1)


def test_lambda_max_of_a_residual_relu_stack_grows_with_its_depth_and_not_behind_batch_normalisation() -> None:
    width, found = 64, {}
    x = doubles(512, width)
    for block in range(1, 201):
        branch = functional.batch_norm(x @ doubles(width, width), None, None, training=True)
        x = torch.relu(x + branch)
        if block in (9, 38, 200):
            found[block] = metrics.lambda_max(x.T @ x / 512).item() / block
            behind = functional.batch_norm(x, None, None, training=True)
            assert metrics.lambda_max(behind.T @ behind / 512).item() < 20
    per_block = width * 2 / math.pi
    assert 0.6 * per_block < found[9] < found[200] < 1.25 * per_block
    assert found[200] == pytest.approx(per_block, rel=0.15)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.squared_error_hessian(torch.ones(3)), "x needs"),
        (lambda: metrics.squared_error_hessian(torch.ones(0, 3)), "x needs"),
        (lambda: metrics.squared_error_hessian(torch.ones(2, 3), 0), "outputs"),
        (lambda: metrics.softmax_hessian(torch.ones(2, 3), 1), "classes"),
        (lambda: metrics.proximal_gradient(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 2)), "weight, inputs"),
        (lambda: metrics.rescaling_ratios([]), "factors"),
        (lambda: metrics.rescaling_ratios([1.0, -1.0]), "factors"),
        (lambda: metrics.rescale_weights_check(nn.Linear(2, 2), torch.ones(1, 2), [1.0]), "1 biases"),
        (lambda: metrics.rescale_weights_check(relu_net(2), torch.ones(1, 7), [1.0]), "2 layers"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()

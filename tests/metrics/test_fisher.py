"""Fisher spectra by the dual against per-sample gradients written out, for vectors, sequences, images and labels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional

from orthofast import metrics
from orthofast.errors import InputError
from orthofast.metrics import fisher

Layer = tuple[Tensor, Tensor]


def written_out(x: Tensor, g: Tensor) -> Tensor:
    """(C N, d_out * d_in) float64: every per-sample gradient of the weight."""
    g = g.unsqueeze(0) if g.dim() == x.dim() else g
    x, g = x.double().reshape(len(x), -1, x.shape[-1]), g.double().reshape(*g.shape[:2], -1, g.shape[-1])
    return torch.einsum("cnto,nti->cnoi", g, x).flatten(0, 1).flatten(1)


def nonzero_spectrum(gradients: Tensor, n: int) -> np.ndarray:
    return np.linalg.svd(gradients.numpy(), compute_uv=False) ** 2 / n


def draw(n: int, positions: tuple[int, ...], d_in: int, d_out: int, labels: int | None = None) -> Layer:
    front = (n,) if labels is None else (labels, n)
    return torch.randn(n, *positions, d_in), torch.randn(*front, *positions, d_out)


CASES = {
    "vectors": draw(9, (), 5, 4),
    "more samples than parameters": draw(40, (), 3, 2),
    "sequences": draw(7, (6,), 5, 4),
    "long and thin": draw(11, (2,), 30, 20),
    "images": draw(5, (3, 4), 6, 3),
    "labels": draw(6, (), 5, 4, labels=3),
    "labels of sequences": draw(5, (2,), 20, 30, labels=3),
    "labels, many": draw(30, (2,), 3, 4, labels=3),
    "float64": tuple(part.double() for part in draw(6, (4,), 7, 5)),
    "bfloat16": tuple(part.bfloat16() for part in draw(6, (4,), 7, 5)),
}
each = pytest.mark.parametrize("layer", CASES.values(), ids=list(CASES))


@each
def test_the_gram_is_that_of_the_gradients(layer: Layer) -> None:
    gradients = written_out(*layer)
    expected = gradients @ gradients.T
    torch.testing.assert_close(metrics.gradient_gram(*layer), expected, rtol=1e-12, atol=1e-12 * expected.max().item())


@each
@pytest.mark.parametrize("block", [1, 60, 1 << 20], ids=["least", "small", "whole"])
@pytest.mark.parametrize("way", [fisher._gram_of_pairs, fisher._gram_of_gradients], ids=["pairs", "gradients"])
def test_both_ways_agree_for_any_size_of_blocks(layer: Layer, way, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "BLOCK", block)
    gradients = written_out(*layer)
    expected = gradients @ gradients.T
    found = way(*fisher._ready(*layer))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.max().item())


@each
def test_the_spectrum_is_exact_from_either_side(layer: Layer) -> None:
    gradients = written_out(*layer)
    expected = nonzero_spectrum(gradients, len(layer[0]))
    found = metrics.sub_fisher_spectrum(*layer)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13 * expected[0])


def network(widths: tuple[int, ...] = (6, 5, 5, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=False), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def recorded(
    model: nn.Sequential, x: Tensor, labels: Tensor, reduction: str = "sum"
) -> tuple[list[Layer], list[Tensor]]:
    """(x, g) of every linear layer and the weights' gradients."""
    inputs, outputs = [], []
    h = x
    for module in model:
        before, h = h, module(h)
        if isinstance(module, nn.Linear):
            inputs.append(before.detach())
            outputs.append(h)
    loss = functional.cross_entropy(h, labels, reduction=reduction)
    weights = list(model.parameters())
    found = torch.autograd.grad(loss, [*outputs, *weights])
    return list(zip(inputs, found[: len(outputs)], strict=True)), list(found[len(outputs) :])


def per_sample_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """(N, P) by one backward pass per sample."""
    rows = []
    for sample, label in zip(x, labels, strict=True):
        loss = functional.cross_entropy(model(sample[None]), label[None])
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_second_moment_of_a_network_in_parts_and_as_a_whole() -> None:
    model, x, labels = network(), torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    layers, _ = recorded(model, x, labels)
    gradients = per_sample_gradients(model, x, labels)
    sizes = [weight.numel() for weight in model.parameters()]
    for layer, part in zip(layers, gradients.split(sizes, 1), strict=True):
        expected = nonzero_spectrum(part, 20)
        np.testing.assert_allclose(metrics.sub_fisher_spectrum(*layer).numpy(), expected, rtol=1e-9, atol=1e-14)
    whole = metrics.fisher_spectrum(layers)
    assert whole.shape == (20,)
    np.testing.assert_allclose(whole.numpy(), nonzero_spectrum(gradients, 20), rtol=1e-9, atol=1e-14)


def test_the_whole_fisher_from_the_side_of_the_parameters() -> None:
    model, x, labels = network((3, 2, 2)), torch.randn(50, 3, dtype=torch.float64), torch.randint(2, (50,))
    layers, _ = recorded(model, x, labels)
    found = metrics.fisher_spectrum(layers)
    assert found.shape == (10,)
    expected = nonzero_spectrum(per_sample_gradients(model, x, labels), 50)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("n", [4, 60], ids=["dual", "parameters"])
def test_the_fisher_of_the_model_takes_the_expectation_over_labels(n: int) -> None:
    model, x = network((5, 4, 3)), torch.randn(n, 5, dtype=torch.float64)
    probabilities = model(x).softmax(1).detach()
    by_label = [recorded(model, x, torch.full((n,), c)) for c in range(3)]
    layers = []
    for k in range(2):
        stacked = torch.stack([layers_of_label[k][1] for layers_of_label, _ in by_label])
        layers.append((by_label[0][0][k][0], metrics.label_gradients(stacked, probabilities)))
    expected = sum(
        (probabilities[:, c, None] * g).T @ g / n
        for c in range(3)
        for g in [per_sample_gradients(model, x, torch.full((n,), c))]
    )
    truth = torch.linalg.eigvalsh(expected).flip(0)
    found = metrics.fisher_spectrum(layers)
    shared = min(len(found), len(truth))
    torch.testing.assert_close(found[:shared], truth[:shared], rtol=1e-9, atol=1e-15)
    assert not bool((truth[shared:].abs() > 1e-14).any())
    # the Hessian of the loss by the outputs is the labels' covariance: the last layer's block is a Gauss-Newton matrix
    curvature = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    h = layers[1][0]
    block = torch.einsum("nab,ni,nj->aibj", curvature, h, h).reshape(12, 12) / n
    last = metrics.sub_fisher_spectrum(*layers[1])
    torch.testing.assert_close(last[:8], torch.linalg.eigvalsh(block).flip(0)[:8], rtol=1e-9, atol=1e-15)


def test_a_convolution_is_its_patches() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False).double()
    head = nn.Linear(3, 4).double()
    images, labels = torch.randn(6, 2, 7, 7, dtype=torch.float64), torch.randint(4, (6,))
    out = conv(images)
    loss = functional.cross_entropy(head(out.tanh().mean((2, 3))), labels, reduction="sum")
    (by_output,) = torch.autograd.grad(loss, out)
    patches = functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2)
    found = metrics.sub_fisher_spectrum(patches, by_output.flatten(2).transpose(1, 2))
    rows = []
    for n in range(6):
        one = functional.cross_entropy(head(conv(images[n : n + 1]).tanh().mean((2, 3))), labels[n : n + 1])
        rows.append(torch.autograd.grad(one, conv.weight)[0].flatten())
    np.testing.assert_allclose(found.numpy(), nonzero_spectrum(torch.stack(rows), 6), rtol=1e-9, atol=1e-16)


def test_a_column_of_ones_adds_the_bias() -> None:
    x, g = CASES["sequences"]
    with_bias = torch.cat([written_out(x, g), g.double().sum(1)], 1)
    found = metrics.sub_fisher_spectrum(torch.cat([x, torch.ones_like(x[..., :1])], -1), g)
    np.testing.assert_allclose(found.numpy(), nonzero_spectrum(with_bias, 7), rtol=1e-9)


@each
def test_kronecker_factors_are_the_uncentred_covariances(layer: Layer) -> None:
    x, g = (part.double() for part in layer)
    rows, outputs = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    a = np.linalg.eigvalsh((rows.T @ rows / len(rows)).numpy())[::-1]
    b = np.linalg.eigvalsh((outputs.T @ outputs / len(x)).numpy())[::-1]
    found = metrics.kronecker_factor_spectra(*layer)
    for one, other in zip(found, (a, b), strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-9, atol=1e-13 * other[0])


def test_gradients_of_the_mean_loss_times_n_are_those_of_each_sample() -> None:
    model, x, labels = network(), torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    each_own, _ = recorded(model, x, labels)
    of_mean, weights = recorded(model, x, labels, "mean")
    for (inputs, g), (_, small), weight in zip(each_own, of_mean, weights, strict=True):
        torch.testing.assert_close(20 * small.T @ small, g.T @ g / 20, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(small.T @ inputs, weight, rtol=1e-10, atol=1e-15)


def test_independent_inputs_and_gradients_have_the_spectrum_of_the_kronecker_product() -> None:
    x, g = torch.randn(20000, 4, dtype=torch.float64), torch.randn(20000, 3, dtype=torch.float64)
    x, g = x * torch.tensor([3.0, 2.0, 1.0, 0.5]).double(), g * torch.tensor([2.0, 1.0, 0.3]).double()
    exact = metrics.sub_fisher_spectrum(x, g)
    approximate = metrics.kronecker_spectrum(*metrics.kronecker_factor_spectra(x, g))
    torch.testing.assert_close(exact, approximate, rtol=0.1, atol=0)


def test_linear_operators_are_the_matrices_they_stand_for() -> None:
    model, x, labels = network(), torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    layers, _ = recorded(model, x, labels)
    gradients = per_sample_gradients(model, x, labels)
    operator = metrics.fisher_linear_operator(layers)
    assert operator.shape == (70, 70)
    np.testing.assert_allclose(operator @ np.eye(70), (gradients.T @ gradients / 20).numpy(), atol=1e-15)
    largest = eigsh(operator, k=3, which="LA", v0=np.ones(70), return_eigenvectors=False)[::-1]
    np.testing.assert_allclose(largest, metrics.fisher_spectrum(layers)[:3].numpy(), rtol=1e-9)
    sequences = metrics.fisher_linear_operator([CASES["labels of sequences"]])
    dense = written_out(*CASES["labels of sequences"]).numpy()
    v = np.arange(600.0)
    np.testing.assert_allclose(sequences @ v, dense.T @ (dense @ v) / 5, rtol=1e-12)
    a, b = (m @ m.T for m in (torch.randn(3, 3), torch.randn(2, 2)))
    np.testing.assert_allclose(
        metrics.as_linear_operator(a, b) @ np.eye(6), torch.kron(b, a).numpy(), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(metrics.as_linear_operator(a) @ np.eye(3), a.numpy())


def test_kappa_of_the_block_counts_its_zero_eigenvalues() -> None:
    x, g = draw(9, (), 5, 4)
    found = metrics.sub_fisher_spectrum(x, g)
    dense = written_out(x, g)
    whole = torch.linalg.eigvalsh(dense.T @ dense / 9)
    for p in (0.25, 0.45, 0.5, 1.0):
        kappa = metrics.condition_number(found, p, dimension=20, tol=1e-10)
        expected = metrics.condition_number(whole, p, tol=1e-10)
        assert kappa.value.item() == pytest.approx(expected.value.item(), rel=1e-8)
        assert kappa[1:] == expected[1:]


def test_a_gradient_that_is_no_number_leaves_nan() -> None:
    x, g = draw(9, (), 5, 4)
    g[3, 1] = math.nan
    assert bool(metrics.sub_fisher_spectrum(x, g).isnan().all())
    assert bool(metrics.kronecker_factor_spectra(x, g)[1].isnan().all())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.sub_fisher_spectrum(torch.ones(3, 2), torch.ones(4, 2)), "same samples"),
        (lambda: metrics.sub_fisher_spectrum(torch.ones(3, 2, 2), torch.ones(3, 3, 2)), "same samples"),
        (lambda: metrics.sub_fisher_spectrum(torch.ones(0, 2), torch.ones(0, 2)), "none empty"),
        (lambda: metrics.sub_fisher_spectrum(torch.ones(3), torch.ones(3)), "same samples"),
        (lambda: metrics.sub_fisher_spectrum(torch.ones(3, 2).int(), torch.ones(3, 2)), "x needs"),
        (lambda: metrics.fisher_spectrum([]), "at least one"),
        (lambda: metrics.fisher_spectrum([draw(3, (), 2, 2), draw(4, (), 2, 2)]), "same samples and labels"),
        (lambda: metrics.label_gradients(torch.ones(2, 3, 4), torch.ones(2, 3)), "probabilities"),
        (lambda: metrics.as_linear_operator(torch.ones(2, 3)), "covariance"),
        (lambda: metrics.as_linear_operator(torch.ones(2, 2), torch.ones(2, 3)), "other"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()

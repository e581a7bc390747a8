"""Batch norm's equivalent weights and rates: torch's own fusion, buffers against data, laws of Tables I and II."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from orthofast.errors import InputError
from orthofast.metrics import bn_equivalent_weight, bn_rate, effective_norms, rate_from_second_moment
from orthofast.metrics.batchnorm import merge_moments, moments_of, variance_from

DOUBLE = torch.float64
TINY = 1e-300  # torch refuses eps = 0 in training

# layer, its batch norm, its input
PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(7, 5), nn.BatchNorm1d(5), torch.randn(40, 7)),
    "linear-no-bias": lambda: (nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5), torch.randn(40, 7)),
    "conv1d": lambda: (nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), torch.randn(8, 3, 11)),
    "conv2d": lambda: (nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), torch.randn(8, 3, 9, 7)),
    "conv2d-groups": lambda: (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), torch.randn(8, 4, 6, 6)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), torch.randn(4, 2, 4, 5, 4)),
    "transposed": lambda: (nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), torch.randn(6, 3, 4, 4)),
}
all_pairs = pytest.mark.parametrize("kind", PAIRS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small operations: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


def trained_pair(kind: str, momentum: float = 1.0) -> tuple[nn.Module, nn.Module, Tensor]:
    """The pair in eval mode in float64, its buffers those of one batch of shifted data, its gamma and beta random."""
    layer, bn, x = (part.double() for part in PAIRS[kind]())
    bn.eps, bn.momentum = TINY, momentum
    x = x * 3 + 0.7
    with torch.no_grad():
        bn.weight.uniform_(-2, 2)
        bn.bias.normal_()
        bn.train()(layer(x))
    return layer.eval(), bn.eval(), x


def through_weight_alone(layer: nn.Module, x: Tensor) -> Tensor:
    """w^T x of every neuron at every sample and position, (out, values)."""
    with torch.no_grad():
        z = layer(x)
        if isinstance(layer, nn.Linear):
            return (x @ layer.weight.T).T
        bias = layer.bias.view(-1, *[1] * (z.dim() - 2)) if layer.bias is not None else 0
        return (z - bias).movedim(1, 0).flatten(1)


@all_pairs
@pytest.mark.parametrize("eps", [TINY, 1e-5, 0.3])
def test_the_equivalent_weight_is_that_of_torch_s_fusion(kind: str, eps: float) -> None:
    layer, bn, _ = trained_pair(kind)
    bn.eps = eps
    if isinstance(layer, nn.Linear):
        fused = fuse_linear_bn_eval(layer, bn)
    else:
        fused = fuse_conv_bn_eval(layer, bn, transpose=kind == "transposed")
    got = bn_equivalent_weight(layer, bn)
    assert got.dtype == DOUBLE
    assert not got.requires_grad
    torch.testing.assert_close(got, fused.weight.detach(), rtol=1e-14, atol=1e-16)


@all_pairs
def test_what_fusion_says_is_what_the_two_compute(kind: str) -> None:
    layer, bn, x = trained_pair(kind)
    with torch.no_grad():
        out = bn(layer(x))
        zero = bn(layer(torch.zeros_like(x)))
        state = {"weight": bn_equivalent_weight(layer, bn)}
        if layer.bias is not None:
            state["bias"] = torch.zeros_like(layer.bias)
        torch.testing.assert_close(torch.func.functional_call(layer, state, x), out - zero, rtol=1e-11, atol=1e-11)


@all_pairs
def test_the_rate_is_the_mean_square_of_the_weight_s_outputs(kind: str) -> None:
    layer, _, x = trained_pair(kind)
    z = through_weight_alone(layer, x)
    second = z.square().mean(1)
    variance = z.var(1, correction=0)
    for power, exponent in (("std", 0.5), ("var", 1.0)):
        got = {center: bn_rate(layer, x=x, power=power, center=center) for center in (False, True)}
        torch.testing.assert_close(got[False], second**exponent, rtol=1e-12, atol=0)
        torch.testing.assert_close(got[True], variance**exponent, rtol=1e-12, atol=0)


def test_the_rate_of_a_linear_layer_is_the_quadratic_form() -> None:
    layer, _, x = trained_pair("linear")
    moment = x.T @ x / len(x)
    from_moment = rate_from_second_moment(layer.weight, moment)
    torch.testing.assert_close(bn_rate(layer, x=x, center=False), from_moment, rtol=7e-15, atol=0)
    values, directions = torch.linalg.eigh(moment)
    coordinates = layer.weight.detach() @ directions  # c = Q^T w, not the elements of w
    torch.testing.assert_close((values * coordinates.square()).sum(1).sqrt(), from_moment, rtol=1e-13, atol=0)
    assert ((values * layer.weight.detach().square()).sum(1).sqrt() - from_moment).abs().max() > 0.1
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(
        bn_rate(layer, x=x), rate_from_second_moment(layer.weight, covariance), rtol=1e-13, atol=0
    )


@all_pairs
@pytest.mark.parametrize("center", [False, True])
def test_buffers_alone_give_what_the_data_gave(kind: str, center: bool) -> None:
    layer, bn, x = trained_pair(kind)
    samples = through_weight_alone(layer, x).shape[1]
    from_data = bn_rate(layer, x=x, center=center)
    torch.testing.assert_close(bn_rate(layer, bn, center=center, samples=samples), from_data, rtol=6e-13, atol=0)
    unbiased = bn_rate(layer, bn, power="var", center=True)
    torch.testing.assert_close(unbiased, bn.running_var, rtol=1e-15, atol=0)
    torch.testing.assert_close(
        bn_equivalent_weight(layer, bn, center=center, samples=samples),
        bn_equivalent_weight(layer, bn, x, center=center),
        rtol=1e-12,
        atol=1e-15,
    )


@all_pairs
@pytest.mark.parametrize("power", ["std", "var"])
def test_scale_of_data_and_of_weights(kind: str, power: str) -> None:
    layer, bn, x = trained_pair(kind)
    c, exponent = 5.0, 2 if power == "var" else 1
    options = {"power": power, "center": False}
    rate, weight = bn_rate(layer, x=x, **options), bn_equivalent_weight(layer, bn, x, **options)
    norms = effective_norms(layer, weight)
    torch.testing.assert_close(bn_rate(layer, x=c * x, **options), c**exponent * rate, rtol=1e-12, atol=0)
    scaled = effective_norms(layer, bn_equivalent_weight(layer, bn, c * x, **options))
    for before, after in zip(norms, scaled, strict=True):
        torch.testing.assert_close(after, before / c**exponent, rtol=1e-12, atol=0)
    with torch.no_grad():
        layer.weight.mul_(c)
    grown = bn_equivalent_weight(layer, bn, x, **options)
    torch.testing.assert_close(grown, weight / c ** (exponent - 1), rtol=1e-14, atol=1e-16)


def test_norms_are_per_neuron_wherever_the_layer_keeps_its_outputs() -> None:
    linear = nn.Linear(4, 3)
    norms = effective_norms(linear, torch.arange(12.0).view(3, 4))
    assert norms.l1.tolist() == [6, 22, 38]
    assert norms.l2.tolist() == pytest.approx([math.sqrt(14), math.sqrt(126), math.sqrt(366)])
    transposed = nn.ConvTranspose1d(4, 6, 2, groups=2)
    bn = nn.BatchNorm1d(6)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    found = effective_norms(transposed, bn_equivalent_weight(transposed, bn))
    assert found.l1[0] > 0
    assert found.l2[1:].tolist() == [0] * 5
    # what feeds output 0 of group 0: inputs 0 and 1
    expected = transposed.weight.detach()[:2, 0].double().abs().sum() / math.sqrt(1 + bn.eps)
    assert found.l1[0].item() == pytest.approx(expected.item(), rel=1e-12)


def train(scale: float) -> tuple[nn.Sequential, Tensor]:
    """A small net with batch norm after every dense layer, trained on data times ``scale``."""
    torch.manual_seed(3)
    data = torch.rand(96, 16, dtype=DOUBLE)
    labels = data[:, :3].argmax(1)
    net = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3), nn.BatchNorm1d(3)).double()
    for module in net:
        if isinstance(module, nn.BatchNorm1d):
            module.eps = TINY
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data * scale), labels).backward()
        optimizer.step()
    return net, data * scale


def slope(scales: list[float], values: list[float]) -> float:
    x, y = torch.tensor(scales, dtype=DOUBLE).log(), torch.tensor(values, dtype=DOUBLE).log()
    return ((x - x.mean()) * (y - y.mean()) / (x - x.mean()).square().sum()).sum().item()


def test_table_1_weights_do_not_see_the_data_s_scale_and_rates_and_norms_are_its_powers() -> None:
    scales = [1.0, 2.0, 4.0, 6.0]
    raw, found = [], {(power, what): [] for power in ("std", "var") for what in ("rate", "l1", "l2")}
    for scale in scales:
        net, data = train(scale)
        raw.append(net[0].weight.norm().item())
        for power in ("std", "var"):
            norms = effective_norms(net[0], bn_equivalent_weight(net[0], net[1], data, power=power))
            found[power, "rate"].append(bn_rate(net[0], x=data, power=power).mean().item())
            found[power, "l1"].append(norms.l1.mean().item())
            found[power, "l2"].append(norms.l2.mean().item())
    assert raw == pytest.approx([raw[0]] * 4, rel=1e-9)
    expected = {"std": (1, -1, -1), "var": (2, -2, -2)}
    for power, slopes in expected.items():
        got = [slope(scales, found[power, what]) for what in ("rate", "l1", "l2")]
        assert got == pytest.approx(slopes, abs=1e-8)
    # the printed table: its rate is the variance and its vector is divided by that, not by the root of Eq. 12
    amplitudes = [2.0, 3.0, 4.0, 5.0, 6.0]
    printed = {
        "rate": [0.92, 2.2, 3.9, 5.9, 8.3],
        "l1": [0.7210, 0.3003, 0.1717, 0.1096, 0.0793],
        "l2": [0.0322, 0.0134, 0.0077, 0.0049, 0.0035],
    }
    assert [slope(amplitudes, values) for values in printed.values()] == pytest.approx(expected["var"], abs=0.03)


def test_table_2_norms_fall_with_the_signal_to_noise_ratio() -> None:
    torch.manual_seed(5)
    clean = torch.rand(4000, 12, dtype=DOUBLE)
    layer, bn = nn.Linear(12, 20).double(), nn.BatchNorm1d(20).double()
    found = []
    for snr in (100, 10, 1, 0.5):
        noise = torch.randn_like(clean) * math.sqrt(clean.square().mean().item() / snr)
        found.append(effective_norms(layer, bn_equivalent_weight(layer, bn, clean + noise)).l2.mean().item())
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.5 * found[0]


def test_records_of_parts_are_the_record_of_the_whole_without_cancellation() -> None:
    layer = nn.Linear(6, 4).double()
    x = torch.randn(300, 6, dtype=DOUBLE) + 1e6  # a mean far above the deviation
    whole = moments_of(layer, x)
    merged = merge_moments([moments_of(layer, part) for part in x.split([7, 1, 200, 92])])
    assert merged.count == whole.count == 300
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.squares, whole.squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance_from(merged), (x @ layer.weight.T).var(0, correction=0), rtol=1e-6, atol=0)


def test_a_neuron_without_variance_is_held_by_eps_alone() -> None:
    layer, bn = nn.Linear(3, 2), nn.BatchNorm1d(2)
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.ones(5, 3)
    assert bn_rate(layer, x=x).tolist() == pytest.approx([0, 0], abs=1e-7)
    assert bn_rate(layer, x=x, center=False)[0] > 0
    torch.testing.assert_close(
        bn_equivalent_weight(layer, bn, x), layer.weight.detach().double() / math.sqrt(bn.eps), rtol=1e-3, atol=0
    )


def test_a_batch_norm_without_an_affine_part_has_gamma_1() -> None:
    layer, bn = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)
    torch.testing.assert_close(bn_equivalent_weight(layer, bn), layer.weight.detach().double() / math.sqrt(1 + bn.eps))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b, x: bn_rate(nn.ReLU(), x=x), "layer needs a Linear, Conv1d to 3d or .*, got ReLU"),
        (lambda a, b, x: bn_rate(a), "bn_rate needs x, inputs of the layer, or bn"),
        (lambda a, b, x: bn_rate(a, x=torch.ones(4, 7)), r"x needs inputs of the layer, .* \(2, 3\), got .* \(4, 7\)"),
        (lambda a, b, x: bn_rate(a, x=[1.0]), "x needs inputs of the layer, .* got list"),
        (lambda a, b, x: bn_rate(a, b, power="l2"), "power needs one of std, var, got 'l2'"),
        (lambda a, b, x: bn_rate(a, b, samples=1), "samples needs an integer of at least 2"),
        (lambda a, b, x: bn_rate(a, nn.LayerNorm(2)), "bn needs a BatchNorm1d to 3d or a SyncBatchNorm, got LayerNorm"),
        (lambda a, b, x: bn_equivalent_weight(a, nn.BatchNorm1d(3)), "bn needs the 2 features the layer gives, got 3"),
        (
            lambda a, b, x: bn_equivalent_weight(a, nn.BatchNorm1d(2, track_running_stats=False)),
            "bn keeps no running statistics",
        ),
        (lambda a, b, x: effective_norms(a, torch.ones(3, 3)), r"weight needs the layer's shape \(2, 3\)"),
        (lambda a, b, x: merge_moments([]), "merge_moments needs at least one record"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(call: Callable[..., object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(nn.Linear(3, 2), nn.BatchNorm1d(2), torch.randn(4, 3))

"""Gaps of a real network over a loader: exact values, what the paper claims of depth, and a model left as it was."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics import gap_bounds, orthogonality_gap, samples_with_gap, singular_value_gap
from orthofast.training import orthogonalize_, representation_gaps
from orthofast.training.init import orthogonal_for_

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small decompositions: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


def batches_of(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stack(depth: int, width: int, norm: bool) -> nn.Sequential:
    """Blocks of the public code of Daneshmand et al. 2021: activation, linear layer, batch norm."""
    torch.manual_seed(1)
    parts: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.xavier_normal_(linear.weight, gain=math.sqrt(2))
        parts += [nn.ReLU(), linear] + ([nn.BatchNorm1d(width)] if norm else [])
    return nn.Sequential(*parts)


class Net(nn.Module):
    """An image model whose parts are called in different ways; one is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 4 * 4, 5)
        self.scalar = nn.Flatten(0)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.drop(self.norm(self.conv(x) * scale))
        self.scalar(x)
        return self.head(x.flatten(1))


def test_values_are_the_measure_s_of_flattened_outputs_batch_by_batch() -> None:
    model, data = Net().eval(), batches_of(3, 6, 3, 6, 6)
    report = representation_gaps(model, data)
    assert list(report.layers) == ["(input)", "conv", "norm", "drop", "head"]
    outputs: dict[str, Callable[[Tensor], Tensor]] = {
        "(input)": lambda x: x,
        "conv": model.conv,
        "norm": lambda x: model.norm(model.conv(x)),
        "head": model,
    }
    with torch.no_grad():
        for name, function in outputs.items():
            values = [orthogonality_gap(function(x).flatten(1)).item() for x in data]
            layer = report.layers[name]
            assert layer.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
            assert layer.std == pytest.approx(statistics.pstdev(values), rel=1e-9)
            assert (layer.batches, layer.nonfinite, layer.n) == (3, 0, 6)
    assert report.layers["conv"].d == 4 * 4 * 4
    assert (report.layers["head"].low, report.layers["head"].high) == gap_bounds(6, 5)
    assert dict(report.skipped) == {
        "scalar": "gives no floating-point tensor with samples and features",
        "unused": "was never called as a module",
    }


def test_the_singular_value_gap_of_the_logits_is_that_of_the_public_code() -> None:
    model, data = Net().eval(), batches_of(2, 20, 3, 6, 6)
    report = representation_gaps(model, data, select="head", metric="singular_value_gap")
    with torch.no_grad():
        expected = statistics.fmean(singular_value_gap(model(x)).item() for x in data)
    assert report.layers["head"].mean == pytest.approx(expected, rel=1e-12)
    assert list(report.layers) == ["head"]
    assert report.layers["head"].high == pytest.approx(math.sqrt(2 - 2 / math.sqrt(5)))


def test_positions_are_samples_where_that_is_asked_for() -> None:
    (images,), model = batches_of(1, 5, 3, 6, 6), Net().eval()
    report = representation_gaps(model, [images], positions=True)
    with torch.no_grad():
        maps = model.conv(images)
        pixels = maps.permute(0, 2, 3, 1).reshape(-1, 4)
    assert report.layers["conv"].mean == pytest.approx(orthogonality_gap(pixels).item(), rel=1e-12)
    assert (report.layers["conv"].n, report.layers["conv"].d) == (5 * 16, 4)
    tokens = nn.Sequential(nn.Linear(6, 8))
    (x,) = batches_of(1, 2, 7, 6)
    flat, each = (representation_gaps(tokens, [x], positions=positions).layers["0"] for positions in (False, True))
    assert (flat.n, flat.d, each.n, each.d) == (2, 56, 14, 8)


def test_batch_norm_makes_the_gap_fall_with_depth_and_without_it_the_gap_rises() -> None:
    generator = torch.Generator().manual_seed(3)
    data = [samples_with_gap(8, 64, 0.55, generator=generator).float() for _ in range(12)]

    def by_depth(norm: bool) -> list[float]:
        last = nn.BatchNorm1d if norm else nn.Linear
        report = representation_gaps(stack(24, 64, norm), data, select=["(input)", last], training=True)
        return [layer.mean for layer in report.layers.values()]

    normed, plain = by_depth(True), by_depth(False)
    assert normed[0] == plain[0] == pytest.approx(0.55, abs=1e-6)
    assert len(normed) == len(plain) == 25
    assert normed[5] < 0.6 * normed[1] or normed[5] < 0.3
    assert max(normed[6:]) - min(normed[6:]) < 0.05
    assert plain[24] > 0.88 > plain[10] > plain[3]
    assert plain[24] < gap_bounds(8, 64).high
    assert normed[24] < 0.35 * plain[24]


def test_running_statistics_are_not_the_batch_s() -> None:
    data = batches_of(2, 8, 16)
    model = stack(3, 16, norm=True)
    trained = representation_gaps(model, data, training=True)
    assert trained.layers["8"].mean != pytest.approx(representation_gaps(model, data, training=False).layers["8"].mean)
    assert trained.layers == representation_gaps(model.train(), data).layers


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Net()
    model.norm.eval()  # a mixture of modes
    if fails:
        model.head = nn.Linear(3, 3)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            representation_gaps(model, batches_of(2, 4, 3, 6, 6), training=True)
    else:
        representation_gaps(model, batches_of(2, 4, 3, 6, 6), training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_computed_stay_what_they_were() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5)).eval()
    before = copy.deepcopy(model.state_dict())
    data = batches_of(3, 4, 6)
    report = representation_gaps(model, data, training=True)
    assert list(report.layers) == ["(input)", "0", "1"]
    assert report.layers["0"] == representation_gaps(model, data, training=False).layers["0"]  # no power iteration
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_of_another_size_and_broken_ones_are_counted_not_averaged() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    data = [*batches_of(3, 8, 6), torch.full((8, 6), math.nan), *batches_of(1, 5, 6)]
    report = representation_gaps(model, data)
    assert (report.batches, report.uneven) == (5, 1)
    assert "left out: 1 batches of another size" in str(report)
    assert (report.layers["0"].batches, report.layers["0"].nonfinite) == (3, 1)
    assert report.layers["0"].mean == representation_gaps(model, data[:3]).layers["0"].mean
    assert representation_gaps(model, data, batches=2).batches == 2
    nothing = representation_gaps(model, data[3:4]).layers["0"]
    assert math.isnan(nothing.mean)
    assert nothing.nonfinite == 1


def test_calls_of_one_module_are_kept_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model, (x,) = Twice(), batches_of(1, 7, 5)
    found = representation_gaps(model, [x, x]).layers
    assert list(found) == ["(input)", "layer", "layer#2"]
    with torch.no_grad():
        assert found["layer#2"].mean == pytest.approx(orthogonality_gap(model(x)).item(), rel=1e-12)


def test_any_form_of_a_batch_is_taken() -> None:
    model, (x,) = Net().eval(), batches_of(1, 4, 3, 6, 6)
    labels = torch.zeros(4, dtype=torch.int64)
    expected = representation_gaps(model, [x]).layers["head"].mean
    forms: tuple[tuple[Any, Any], ...] = (
        ((x, labels), None),
        ([x], None),
        ({"x": x}, None),
        ({"x": x, "scale": 1.0}, None),
        ((labels, x), lambda batch: batch[1]),
    )
    for batch, inputs in forms:
        assert representation_gaps(model, [batch], inputs=inputs).layers["head"].mean == expected
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=2)
    assert representation_gaps(model, loader).batches == 2


def test_shells_of_compilation_and_parallelism_are_looked_through() -> None:
    model, data = Net().eval(), batches_of(1, 4, 3, 6, 6)
    expected = representation_gaps(model, data).layers
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    assert representation_gaps(compiled, data).layers == expected
    assert representation_gaps(nn.DataParallel(model), data).layers == expected
    model.conv.compile(backend="eager")
    assert representation_gaps(model, data).layers == expected
    torch._dynamo.reset()


def test_containers_can_be_chosen_and_the_report_prints_and_is_plain_data() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3))
    data = batches_of(2, 5, 6)
    report = representation_gaps(model, data, select=["0", "(input)"])
    assert list(report.layers) == ["(input)", "0"]
    assert report.layers["0"].mean == representation_gaps(model, data).layers["0.1"].mean
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "mean", "std", "low", "high", "samples"]
    assert lines[2].split()[0] == "0"
    assert lines[2].endswith("5 x 8")
    assert "mean of 2 batches" in lines[-1]
    again = json.loads(json.dumps(report.to_dict()))
    assert again["layers"]["0"]["mean"] == report.layers["0"].mean
    assert again["metric"] == "orthogonality_gap"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: representation_gaps(m, d, metric="pii"), "metric needs one of orthogonality_gap, singular"),
        (lambda m, d: representation_gaps(m, d, select="nothing"), "select='nothing' chooses none of the model's"),
        (lambda m, d: representation_gaps(m, d, select="unused"), "model called none of the 1 modules that are chosen"),
        (lambda m, d: representation_gaps(m, d[0]), "loader needs an iterable of batches, got Tensor; put one batch"),
        (lambda m, d: representation_gaps(m, []), "loader gives no batch"),
        (lambda m, d: representation_gaps(m, d, batches=0), "batches needs a positive integer, or None"),
        (lambda m, d: representation_gaps("net", d), "model needs a torch.nn.Module, got str"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(call: Callable[..., object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(Net(), batches_of(1, 4, 3, 6, 6))


def test_a_batch_of_one_sample_has_no_gap_and_says_so() -> None:
    report = representation_gaps(nn.Sequential(nn.Linear(4, 4)), batches_of(1, 1, 4))
    assert not report.layers
    assert dict(report.skipped)["0"] == "gives 1 sample of length 4, and a gap needs two samples"
    assert "not measured: 0 gives 1 sample of length 4" in str(report)


# iterative orthogonalisation, seen through the gaps it makes


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_an_orthogonal_rotation_lowers_every_gap_and_the_slice_does_not(power: float) -> None:
    generator = torch.Generator().manual_seed(4)
    raised = {"haar": 0, "paper": 0}
    for _ in range(30):
        d = int(torch.randint(4, 24, (), generator=generator))
        h = torch.randn(3 * d, d, dtype=DOUBLE, generator=generator)  # samples, a row each
        before = orthogonality_gap(h).item()
        for rotation in raised:
            weight = orthogonal_for_(
                torch.empty(d, d, dtype=DOUBLE), h, power=power, rotation=rotation, generator=generator
            )
            after = orthogonality_gap(h @ weight.T).item()
            raised[rotation] += after > before
            if power == 1 and rotation == "haar":
                assert after == pytest.approx(gap_bounds(3 * d, d).low, abs=1e-9)
    assert raised["haar"] == 0
    assert raised["paper"] >= 8


def test_iterative_orthogonalisation_keeps_the_gaps_of_a_deep_network_low() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(5)
        layers: list[nn.Module] = [nn.Linear(20, 32)]
        for _ in range(28):
            layers += [nn.ReLU(), nn.Linear(32, 32)]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
                nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 10)).double()

    batch = torch.randn(96, 20, dtype=DOUBLE)
    plain = representation_gaps(network(), [batch], select=nn.Linear).layers
    made = network()
    written = orthogonalize_(made, batch)
    found = representation_gaps(made, [batch], select=nn.Linear).layers
    assert len(written) == 28
    for path in (name.removesuffix(".weight") for name in written[6:]):
        assert found[path].mean < plain[path].mean - 0.1
    deepest = written[-1].removesuffix(".weight")
    assert plain[deepest].mean > 0.85
    assert found[deepest].mean < 0.45
    fresh = representation_gaps(made, [torch.randn(96, 20, dtype=DOUBLE)], select=nn.Linear).layers
    assert fresh[deepest].mean < plain[deepest].mean - 0.1  # samples it was not made from


def test_convolutions_are_orthogonalised_over_the_patches_they_see() -> None:
    torch.manual_seed(6)
    parts: list[nn.Module] = [nn.Conv2d(2, 6, 3, padding=1)]
    for _ in range(10):
        parts += [nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)]
    parts += [nn.ReLU(), nn.Conv2d(6, 3, 3)]
    model = nn.Sequential(*parts).double()
    images = torch.randn(12, 2, 6, 6, dtype=DOUBLE)
    before = representation_gaps(model, [images], select=nn.Conv2d, positions=True).layers
    written = orthogonalize_(model, images, rotation="haar", power=1.0)
    after = representation_gaps(model, [images], select=nn.Conv2d, positions=True).layers
    assert len(written) == 10
    for path in (name.removesuffix(".weight") for name in written):
        # channels of equal singular values: the least gap n pixels in 6 channels can have
        assert after[path].mean == pytest.approx(after[path].low, abs=1e-6)
        assert after[path].mean < before[path].mean

"""Every batch norm with the layer before it: pairs by tracing and by running, rates by data and by buffers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orthofast.errors import InputError
from orthofast.metrics import bn_equivalent_weight, bn_rate, effective_norms
from orthofast.training import bn_regularization
from orthofast.training.batchnorms import Pair, bn_pairs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small operations: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


class Block(nn.Module):
    """Names in another order than the calls, and an activation between one layer and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_b, self.bn_a, self.late = nn.BatchNorm2d(6), nn.BatchNorm2d(4), nn.BatchNorm1d(5)
        self.b, self.a = nn.Conv2d(4, 6, 3), nn.Conv2d(3, 4, 3)
        self.plain, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        x = self.bn_b(self.b(x)).mean((2, 3))
        x = self.late(torch.relu(self.plain(x)))
        return self.head(x)


class Branching(Block):
    """A model no tracer can follow: its path depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        return super().forward(x)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) + 0.4


PAIRS = [Pair("a", "bn_a"), Pair("b", "bn_b")]


def test_pairs_follow_the_calls_not_the_names_whichever_way_they_are_found() -> None:
    model = Block().eval()
    assert bn_pairs(model) == PAIRS
    for report in (bn_regularization(model), bn_regularization(model, [images(4)])):
        assert [(name, row.bn) for name, row in report.layers.items()] == PAIRS
        assert dict(report.unpaired) == {
            "late": "takes the output of no Linear or convolution as it is",
            "plain": "gives its output to no batch norm",
            "head": "gives its output to no batch norm",
        }


def test_data_decides_where_a_tracer_cannot() -> None:
    model = Branching().eval()
    with pytest.raises(
        InputError, match=r"model cannot be traced without data .* pass a loader, such as a list of one"
    ):
        bn_regularization(model)
    assert list(bn_regularization(model, [images(4)]).layers) == ["a", "b"]


def test_in_place_activations_break_a_pair() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)).eval()
    for loader in (None, [torch.randn(5, 3)]):
        with pytest.raises(InputError, match="no Linear or convolution whose output a batch norm takes as it is"):
            bn_regularization(model, loader)


@pytest.mark.parametrize("center", [True, False])
def test_rates_over_a_loader_are_those_of_all_its_data(center: bool) -> None:
    model = Block().double().eval()
    data = [images(count, seed).double() for seed, count in enumerate((5, 2, 9))]
    report = bn_regularization(model, [(x, 0) for x in data], center=center)
    x = torch.cat(data)
    with torch.no_grad():
        hidden = torch.relu(model.bn_a(model.a(x)))
    for name, bn, given in (("a", model.bn_a, x), ("b", model.bn_b, hidden)):
        row, layer = report.layers[name], getattr(model, name)
        torch.testing.assert_close(row.rate, bn_rate(layer, x=given, center=center), rtol=1e-12, atol=0)
        for power in ("std", "var"):
            weight = bn_equivalent_weight(layer, bn, given, power=power, center=center)
            for got, expected in zip(row.norms[power], effective_norms(layer, weight), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(row.raw.l1, layer.weight.detach().flatten(1).abs().sum(1))
    assert report.layers["a"].samples == 16 * 25
    assert report.layers["b"].samples == 16 * 9


def test_running_statistics_alone_give_the_fused_weights() -> None:
    model = Block().double()
    for step in range(5):
        model(images(8, step).double())
    model.eval()
    report = bn_regularization(model)
    for name, bn in (("a", model.bn_a), ("b", model.bn_b)):
        row = report.layers[name]
        fused = fuse_conv_bn_eval(getattr(model, name), bn).weight.detach()
        torch.testing.assert_close(row.norms["std"].l2, fused.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
        torch.testing.assert_close(row.rate.square(), bn.running_var, rtol=1e-12, atol=0)
        assert row.samples is None
    corrected = bn_regularization(model, samples=200).layers["a"]
    torch.testing.assert_close(corrected.rate.square(), model.bn_a.running_var * 199 / 200, rtol=1e-12, atol=0)


def test_one_batch_in_training_mode_agrees_with_the_buffers_it_leaves() -> None:
    model, x = Block().double().train(), images(6).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    from_data = bn_regularization(model, [x]).layers["b"].rate
    model(x)
    samples = 6 * 9
    torch.testing.assert_close(bn_regularization(model, samples=samples).layers["b"].rate, from_data, rtol=1e-9, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = Block().train()
    before = copy.deepcopy(model.state_dict())
    bn_regularization(model, [images(4)], training=True)
    bn_regularization(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


class Shared(nn.Module):
    """One batch norm for two layers, as in the public code of Lu et al. 2024, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.other = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.second(self.bn(self.first(x))))
        return self.other(self.first(x))


def test_shared_norms_need_data_and_shared_layers_are_rows_of_their_own() -> None:
    model = Shared().eval()
    alone = bn_regularization(model)
    assert list(alone.layers) == ["first", "second", "first -> other"]
    assert "bn follows 2 layers, and its running statistics mix them; pass a loader" in alone.layers["first"].error
    assert alone.layers["first"].means() == {}
    assert alone.layers["first -> other"].error == ""
    seen = bn_regularization(model, [torch.randn(50, 4)])
    assert [row.error for row in seen.layers.values()] == ["", "", ""]
    assert not torch.equal(seen.layers["first"].rate, seen.layers["first -> other"].rate)


def test_a_norm_without_running_statistics_is_a_row_with_its_error() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3), nn.BatchNorm1d(3)
    ).eval()
    report = bn_regularization(model)
    assert "bn keeps no running statistics" in report.layers["0"].error
    assert report.layers["2"].error == ""
    assert bn_regularization(model, [torch.randn(9, 4)]).layers["0"].error == ""


def test_wrapped_and_lettered_layers_of_every_kind_are_found() -> None:
    kinds: list[tuple[nn.Module, nn.Module, Tensor]] = [
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), torch.randn(3, 2, 8)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), torch.randn(3, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), torch.randn(3, 2, 4, 4)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)),
    ]
    for layer, bn, x in kinds:
        model = torch.compile(nn.Sequential(layer, bn).eval(), backend="eager")
        for loader in (None, [x]):
            (row,) = bn_regularization(model, loader).layers.values()
            assert row.rate.shape == (4,)
            assert row.norms["var"].l2.isfinite().all()


def test_the_report_prints_and_is_plain_data() -> None:
    report = bn_regularization(Block().eval(), [images(4)])
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "neurons", "rate_std", "rate_var", "l1_std", "l2_std", "l1_var", "l2_var"]
    assert lines[1].split()[:2] == ["a", "4"]
    assert "layers and batch norms without a partner: 3" in lines[-1]
    row = json.loads(json.dumps(report.to_dict()))["layers"]["a"]
    assert row["bn"] == "bn_a"
    assert row["l2_std"] == pytest.approx(report.layers["a"].norms["std"].l2.mean().item())
    assert row["rate_var"] == pytest.approx(report.layers["a"].rate.square().mean().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn_regularization(nn.Sequential(nn.Linear(2, 2))), "no Linear or convolution whose output"),
        (lambda: bn_regularization(nn.Sequential(nn.Linear(2, 2)), []), "loader gives no batch"),
        (lambda: bn_regularization(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), samples=0), "samples needs"),
        (lambda: bn_regularization("net"), "model needs a torch.nn.Module, got str"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

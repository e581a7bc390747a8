"""Huang et al. 2020 in the lab: verdicts that must hold and must fail, small networks, one run from end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from orthofast.lab import (
    conditioning_epochs,
    conditioning_fisher,
    conditioning_layers,
    conditioning_linear,
    conditioning_residual,
)
from orthofast.lab.data import Images
from orthofast.lab.experiment import Settings
from orthofast.lab.layer_conditioning import EXPERIMENTS
from orthofast.lab.registry import REGISTRY
from orthofast.lab.runs import plain, run_all
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED
from orthofast.metrics import fisher_spectrum

FOUND = {one.id: one for one in EXPERIMENTS}
SHARES_F, SHARES = conditioning_fisher.SHARES_F, conditioning_fisher.SHARES


def _fisher(lambda_full, kappa):
    rising = [kappa * (place + 1) for place in range(3)]
    return {
        "lambda_full": lambda_full,
        "kappa_full": rising,
        "lambda": [lambda_full / 8] * 8,
        "kappa": {"3": rising, "6": rising},
    }


FIGURE1 = {
    "layer": list(range(1, 9)),
    "share_full": list(SHARES_F),
    "share": list(SHARES),
    "Plain": _fisher(1e-5, 1e4),
    "BN": _fisher(1.0, 50.0),
}
CELL = {
    "parameters": 576,
    "lambda_exact": 2.0,
    "lambda_kronecker": 1.6,
    "kappa_exact": [10.0, 100.0, 1e4],
    "kappa_mixed": [9.0, 80.0, 9e3],
    "kappa_kronecker": [8.0, 40.0, 900.0],
}
FIGURE2 = {"share": list(SHARES), "images": 60_000, **{kind: dict.fromkeys("368", CELL) for kind in ("Plain", "BN")}}
SHAPES = [f"{depth} x {width}" for depth, width in conditioning_fisher.SHAPES]
SUPPLEMENT = {
    "shape": SHAPES,
    "Plain": [{"lambda": 1e-5, "kappa": 1e4}] * len(SHAPES),
    "BN": [{"lambda": 1.0, "kappa": 30.0}] * len(SHAPES),
}


def _magnitudes(per_layer):
    values = [per_layer**layer for layer in range(20)]
    return {"lambda_x": values, "lambda_g": values[::-1], "trace_g": values[::-1]}


def _trained(per_layer):
    return {"start": _magnitudes(per_layer), "end": _magnitudes(per_layer), "loss": {"0.5": 1.0}}


FIGURE3 = {
    "layer": list(range(1, 21)),
    "Plain, random": _trained(1 / 6),
    "BN, random": _trained(1.05),
    "Plain, He": _trained(0.97),
    "BN, He": _trained(1.05),
}
RISING, NONE = list(range(0, 38, 2)), [0] * 19
FIGURE5 = {
    "layer": list(range(1, 21)),
    **{
        f"{net}, {init}": {"kappa_x": [kappa] * 20, "kappa_g": [kappa] * 19, "dead": neurons, "full": neurons}
        for net, kappa, neurons in (("Plain", 1e6, RISING), ("BN", 100.0, NONE))
        for init in ("random", "He")
    },
}
FIGURE4 = {
    "step": [0, 1, 2],
    "loss": {mask: [2.3, 1.0, 0.01 * (1 + mask.count("0"))] for mask in conditioning_layers.MASKS},
}


def _last(blocks, stuck):
    peak = 40.0 * blocks
    return {
        "lambda_x": [peak, peak * 10, peak],
        "lambda_w": [peak, peak, 1.0],
        "norm": [1.0, 2.0, 1.0 + blocks],
        "domination": [5.0, 1.0, 1e-5],
        "loss": [3.0, 10.0 * blocks, 2.2],
        "highest": 10.0 * blocks,
        "late": 2.2 if stuck else 0.1,
    }


BLOCKS = list(conditioning_residual.BLOCKS)
FIGURE6 = {
    "blocks": BLOCKS,
    "classes": 10,
    "mark": [1, 2, 3],
    "runs": [_last(blocks, blocks == 200) for blocks in BLOCKS],
}
STABLE = _last(200, False) | {"lambda_x": [10.0, 16.0, 12.0], "highest": 3.1, "domination": [1.0, 0.5, 0.1]}
FIGURE7 = {"classes": 10, "mark": [1, 2, 3], "runs": [_last(200, True), STABLE]}


def _epochs(level, last):
    return {"loss": [2.0, 1.0, level, level, level, level / 2, last, last], "error": 5.0}


FIGURE8 = {
    "blocks": [9, 18, 38],
    "epoch": list(range(1, 9)),
    "ResNet": [_epochs(0.1, 0.02), _epochs(0.4, 0.1), _epochs(2.0, 1.2)],
    "LastBN": [_epochs(0.08, 0.01), _epochs(0.09, 0.01), _epochs(0.085, 0.01)],
}
LINEAR = {
    "kappa": list(conditioning_linear.KAPPAS),
    "steps": [14 * kappa for kappa in conditioning_linear.KAPPAS],
    "error_after_one": 1e-15,
    "below": 1e-3,
    "above": 1e9,
    "theorems": {"1": 1e-15, "2": 1e-15, "2, no last BN": 0.3},
}
GOOD = {
    "S2-F1": FIGURE1,
    "S2-F2": FIGURE2,
    "S2-X2": SUPPLEMENT,
    "S2-F3": FIGURE3,
    "S2-F4": FIGURE4,
    "S2-F5": FIGURE5,
    "S2-F6": FIGURE6,
    "S2-F7": FIGURE7,
    "S2-F8": FIGURE8,
    "S2-X3": LINEAR,
}


def changed(raw, path, value):
    """A copy with one number replaced."""
    copied = copy.deepcopy(raw)
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


@pytest.mark.parametrize("key", GOOD)
def test_numbers_as_the_paper_has_them_reproduce_and_are_drawn(key):
    raw = plain(GOOD[key])
    verdict = FOUND[key].verdict([raw, raw])
    assert verdict.status == REPRODUCED, [check.what for check in verdict.checks if check.holds is False]
    figure = FOUND[key].figure([raw, raw])
    assert all(len(run) == len(one.x) for panel in figure.panels for one in panel.series for run in one.runs)


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("S2-F1", ("BN", "lambda_full"), 9e-4),  # 90 times
        ("S2-F1", ("BN", "kappa_full", 1), 3e4),
        ("S2-F1", ("BN", "lambda", 5), 1e-6),
        ("S2-F1", ("Plain", "kappa", "3", 2), 10.0),
        ("S2-F1", ("Plain", "lambda_full"), None),
        ("S2-F2", ("BN", "6", "lambda_kronecker"), 4.1),
        ("S2-F2", ("Plain", "3", "kappa_mixed", 1), 33.0),
        ("S2-F2", ("Plain", "3", "kappa_kronecker", 1), 33.0),
        ("S2-F2", ("BN", "6", "kappa_kronecker", 0), 31.0),
        ("S2-X2", ("BN", 2, "lambda"), 9e-6),
        ("S2-X2", ("Plain", 4, "kappa"), 20.0),
        ("S2-F3", ("Plain, random"), _trained(0.9)),
        ("S2-F3", ("BN, He", "start", "lambda_g", 1), 1e4),
        ("S2-F3", ("BN, He", "start", "lambda_g", 1), None),
        ("S2-F3", ("Plain, random", "start", "lambda_x", 18), None),
        ("S2-F3", ("Plain, He", "start"), _magnitudes(1 / 6)),
        ("S2-F4", ("loss", "00001", 2), 1.2),  # hardly falls
        ("S2-F4", ("loss", "11101", 2), 0.009),  # ends better
        ("S2-F4", ("loss", "11110", 2), None),
        ("S2-F5", ("BN, random", "dead", 7), 1),
        ("S2-F5", ("BN, He", "full", 7), None),
        ("S2-F5", ("Plain, He", "full"), RISING[::-1]),
        ("S2-F5", ("BN, He", "kappa_x"), [1e7] * 20),
        ("S2-F5", ("BN, random", "kappa_g"), [None] * 19),
        ("S2-F6", ("runs", 1, "highest"), 1.0),
        ("S2-F6", ("runs", 3, "lambda_x"), [300.0, 9000.0, 10.0]),  # less than of 38 blocks
        ("S2-F6", ("runs", 3, "lambda_x", 2), 8e4),  # no collapse
        ("S2-F6", ("runs", 3, "late"), 0.5),
        ("S2-F6", ("classes",), 100),
        ("S2-F6", ("runs", 2, "norm", 2), 2.0),
        ("S2-F6", ("runs", 3, "domination", 2), 0.5),
        ("S2-F7", ("runs", 1, "highest"), 30.0),
        ("S2-F7", ("runs", 1, "lambda_x", 1), 9e4),
        ("S2-F7", ("runs", 1, "late"), 2.3),
        ("S2-F7", ("runs", 0, "highest"), 3.0),
        ("S2-F7", ("runs", 1, "domination", 2), 1e-5),
        ("S2-F7", ("runs", 0, "domination", 2), 0.5),
        ("S2-F8", ("ResNet", 2), _epochs(0.2, 1.2)),
        ("S2-F8", ("LastBN", 2), _epochs(1.5, 0.01)),
        ("S2-F8", ("LastBN", 0, "loss", 7), 0.03),
        ("S2-F8", ("LastBN", 0, "loss", 3), None),
        ("S2-X3", ("error_after_one",), 1e-3),
        ("S2-X3", ("steps",), [10] * 6),
        ("S2-X3", ("above",), 0.5),
        ("S2-X3", ("theorems", "2"), 0.1),
    ],
)
def test_numbers_against_a_claim_do_not_reproduce(key, path, value):
    path = path if isinstance(path, tuple) else (path,)
    raw = plain(GOOD[key])
    against = changed(raw, path, value)
    assert FOUND[key].verdict([against]).status == NOT_REPRODUCED
    assert FOUND[key].verdict([raw, against]).status == NOT_REPRODUCED, "one seed against it is enough"


def test_a_gradient_of_zero_is_the_utmost_of_domination():
    dead = changed(plain(FIGURE7), ("runs", 0, "domination", 2), 0.0)
    assert FOUND["S2-F7"].verdict([dead]).status == REPRODUCED


def test_every_table_and_figure_has_its_entry():
    entries = {key for key in REGISTRY if key.startswith("S2-")}
    assert entries == {f"S2-{key}" for key in ("T1", "T1b", "T2", "X1")} | set(GOOD)
    assert set(FOUND) == {f"S2-{key}" for key in ("T1", "T1b", "T2")} | set(GOOD)


def test_gradient_rows_make_the_weights_gradients_and_the_fisher_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)).double()
    inputs, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    rows = conditioning_fisher.gradient_rows(model, inputs, labels)
    loss = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
    for (x, g), expected in zip(rows, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(g.T @ x, expected, atol=1e-12)
    each = []
    for one, label in zip(inputs, labels, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), label[None])
        each.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))]))
    jacobian = torch.stack(each)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T / 7).flip(0)
    assert torch.allclose(fisher_spectrum(rows)[:7], expected, atol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def test_mnist_is_cropped_and_halved(monkeypatch):
    pictures = torch.zeros(2, 1, 28, 28)
    pictures[0, 0, :2], pictures[1, 0, 2:4, 2:4] = 1, 1  # an edge that is cut off, a corner that is left
    labels = torch.tensor([0, 1])
    data = Images("mnist", pictures, labels, pictures, labels, 10)
    monkeypatch.setattr(conditioning_fisher, "load", lambda settings: data)
    found = conditioning_fisher.images(Settings())
    assert found.train.shape == (2, 144)
    assert found.train[0].sum() == 0
    assert found.test[1, 0] == 1
    assert found.train[1].sum() == 1


def test_colour_images_are_grey_and_of_the_same_size(monkeypatch):
    pictures = torch.zeros(2, 3, 32, 32)
    pictures[0, 1], pictures[1, :, :, 16:] = 0.6, 1
    labels = torch.tensor([0, 1])
    data = Images("cifar10", pictures, labels, pictures, labels, 10)
    monkeypatch.setattr(conditioning_fisher, "load", lambda settings: data)
    found = conditioning_fisher.images(Settings())
    assert torch.allclose(found.train[0], torch.full((144,), 0.2))
    assert torch.allclose(found.test[1].view(12, 12), torch.tensor([0.0] * 6 + [1.0] * 6).expand(12, 12))


def test_a_layer_without_numbers_leaves_nan():
    labels = torch.arange(24) % 10
    data = Images("digits", torch.rand(24, 16), labels, torch.rand(4, 16), labels[:4], 10)
    model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.ReLU(), nn.Linear(4, 10, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    found = conditioning_layers.by_layer(model, data, 24)
    assert all(math.isnan(value) for name in ("lambda_g", "trace_g", "kappa_g") for value in found[name])


def test_frozen_layers_stay_and_the_others_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    model[0].weight.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = conditioning_layers.descended(model, torch.randn(9, 6), torch.randint(3, (9,)), 0.5, 4)
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[1])


def test_residual_networks_count_their_blocks_and_last_bn_keeps_scale():
    data = _noise_images()
    for net, extra in (("ResNet", 0), ("LastBN", 1)):
        model, last = conditioning_residual.network(data, 5, net, 0, "small")
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
        assert len(norms) == 1 + 2 * 5 + extra
        assert last.out_features == 10
    colour = Images("cifar10", torch.rand(4, 3, 32, 32), torch.zeros(4).long(), torch.rand(1, 3, 32, 32), None, 10)
    model, last = conditioning_residual.network(colour, 1, "LastBN", 0, "paper")
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 7
    assert last.in_features == 64


def test_a_watched_run_tells_the_last_layers_numbers(monkeypatch):
    monkeypatch.setattr(conditioning_residual, "BATCH", 32)
    data = _noise_images()
    run = conditioning_residual.watched(Settings(), data, 2, "ResNet", 3, marks=[0, 2])
    assert len(run["loss"]) == 3
    assert all(len(run[key]) == 2 for key in ("lambda_x", "lambda_w", "norm", "domination"))
    _, last = conditioning_residual.network(data, 2, "ResNet", 0, "small")
    assert run["norm"][0] == pytest.approx(last.weight.norm().item())
    assert 0 <= run["error"] <= 100
    slower = conditioning_residual.watched(Settings(), data, 2, "ResNet", 3, marks=[], cuts=True)
    assert slower["loss"][0] == run["loss"][0]
    assert slower["loss"][2] != run["loss"][2]


def test_a_run_that_diverges_gives_numbers_that_hold_nothing(monkeypatch):
    monkeypatch.setattr(conditioning_residual, "BATCH", 32)
    monkeypatch.setattr(conditioning_residual, "RATE", 1e30)
    run = conditioning_residual.watched(Settings(), _noise_images(), 1, "ResNet", 6, marks=[0, 5])
    assert math.isnan(run["loss"][-1])
    assert math.isnan(run["lambda_x"][-1])
    assert len(run["loss"]) == 6


def test_crops_and_flips_take_pixels_of_their_own_image():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 32, 32) + torch.linspace(0, 0.5, 32)
    found = conditioning_residual.augmented(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert torch.equal(found.floor(), images.floor())
    steps = found[:, 0, 16].diff(dim=1).sign()[:, 8:24]  # away from the reflected edge
    assert all(len(set(row.tolist())) == 1 for row in steps)
    assert len(set(steps[:, 0].tolist())) == 2


def test_linear_models_end_to_end(tmp_path):
    (outcome,) = run_all([FOUND["S2-X3"]], Settings(), tmp_path, seeds=1)
    assert outcome.verdict.status == REPRODUCED
    names = {file.name for file in (tmp_path / "S2-X3").iterdir()}
    assert {"figure.png", "figure.svg", "manifest.json", "raw.csv", "raw.json", "verdict.json"} <= names


def test_networks_of_a_tiny_size_give_numbers_that_can_be_judged_and_drawn(monkeypatch):
    monkeypatch.setattr(conditioning_residual, "BLOCKS", (1, 2))
    monkeypatch.setattr(conditioning_residual, "STEPS", {"small": 12})
    monkeypatch.setattr(conditioning_epochs, "TRAINED", {"small": (1, 2)})
    monkeypatch.setattr(conditioning_epochs, "EPOCHS", {"small": 4})
    monkeypatch.setitem(conditioning_fisher.ROWS, "small", 120)
    monkeypatch.setattr(conditioning_fisher, "SHARES_F", (0.005, 0.01, 0.02))
    monkeypatch.setattr(conditioning_layers, "WIDTH", 12)
    monkeypatch.setattr(conditioning_layers, "TRAINING", {"small": (2, 60, 120)})
    monkeypatch.setattr(conditioning_layers, "FREEZING", {"small": (12, 3, 60, 0.5)})
    for key in GOOD:
        if key == "S2-X3":
            continue
        raw = plain(FOUND[key].run(Settings()))
        assert FOUND[key].verdict([raw]).status in (REPRODUCED, NOT_REPRODUCED), key
        panels = FOUND[key].figure([raw]).panels
        known = [value for panel in panels for one in panel.series for run in one.runs for value in run]
        assert all(isinstance(value, float | int) for value in known), key


def _noise_images():
    torch.manual_seed(0)
    labels = torch.arange(64) % 10
    return Images("digits", torch.randn(64, 1, 8, 8), labels, torch.randn(8, 1, 8, 8), labels[:8], 10)

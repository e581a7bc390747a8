"""Every experiment on every data set it names, at both scales: run with sizes cut down, judged and drawn.

What is cut are the tables of sizes; which of them a scale picks, what shapes a data set has and how its channels,
sides and classes are used stay as they are. Images are noise of the right shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from orthofast.lab import data as data_files
from orthofast.lab import deep_convolutions, fitting
from orthofast.lab.data import Images
from orthofast.lab.drawing import declaration
from orthofast.lab.experiment import SCALES, Experiment, Settings
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.runs import plain
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
TRAIN, TEST = 48, 12


def both(value: Any) -> dict[str, Any]:
    """The same at both scales."""
    return dict.fromkeys(SCALES, value)


# module -> name -> value
CUTS: dict[str, dict[str, Any]] = {
    "representations": {
        "RUNS": 2,
        "WIDTHS_2B": (8, 16),
        "SAMPLES_3": (4, 8),
        "RUNS_3": {"small": 1, "paper": 2},
        "LAYERS_3": {"small": 4, "paper": 6},
    },
    "representation_limits": {"RUNS": 2, "WIDTHS_G": (8, 16), "LAYERS_G": {"small": (2, 4), "paper": (3, 5)}},
    "deep_layers": {"SIZES_6": {"small": (10, 4, 1), "paper": (12, 4, 2)}},
    "deep_training": {
        "NETWORKS": 1,
        "SIZES": {"small": (12, 3, 24, 0.01), "paper": (14, 3, 24, 0.01)},
        "SIZES_4B": {"small": (12, 3, 24, 0.01), "paper": (14, 3, 24, 0.01)},
        "DEPTH_4B": 4,
        "DEPTHS": {"small": (3, 4), "paper": (3, 4, 5)},
    },
    "deep_convolutions": {
        "LAST": 1,
        "EXTRA": {"small": (1, 2), "paper": (2, 3)},
        "SIZES": {"small": (2, 8, "momentum", 0.003, 32), "paper": (2, 8, "sgd", 0.001, TRAIN)},
        "NARROW": 4,
        "CHANNELS": (4, 6, 8),
        "HIDDEN": 16,
    },
    "conditioning_fisher": {
        "ROWS": {"small": 32, "paper": 40},
        "SHARES_F": (0.001, 0.002, 0.005),
        "SHAPES": ((4, 24), (8, 24), (8, 30)),
    },
    "conditioning_layers": {
        "WIDTH": 3,
        "RATES": (0.1,),
        "TRAINING": {"small": (1, 24, 32), "paper": (1, TRAIN, TRAIN)},
        "FREEZING": {"small": (8, 2, 24, 0.5), "paper": (12, 2, TRAIN, 0.5)},
    },
    "conditioning_residual": {"WIDTH": 8, "BLOCKS": (1, 2), "BATCH": 8, "STEPS": {"small": 3, "paper": 4}},
    "conditioning_epochs": {"BATCH": 24, "EPOCHS": both(4), "TRAINED": both((1,))},
    "batchnorm_regularization": {"HIDDEN": 12, "STEPS": {"small": 2, "paper": 3}, "BATCH": 16},
    "independence_beyond": {"MOST": 12, "BATCH": 16, "WIDTHS": {"small": (8, 12), "paper": (12, 16)}},
    "deep_standardization": {
        "SIZES": {"small": (12, 3, 24, 0.01), "paper": (14, 3, 24, 0.01)},
        "DEPTHS": {"small": (3, 4), "paper": (3, 4, 5)},
    },
    "deep_normalization": {
        "LINEAR": {"small": (8, 1, 1), "paper": (10, 1, 2)},
        "RECTIFIED": {"small": (8, 1, 1), "paper": (10, 1, 2)},
        "TRAINED": {"small": (4, 8, 2, 24, 0.01), "paper": (5, 10, 2, 24, 0.01)},
    },
    "modern_blocks": {
        "TRANSFORMERS": {"small": (2, 12, 2, 1, 1), "paper": (3, 12, 3, 1, 1)},
        "FITTED": {"small": (2, 12, 2, 2, 8, 1e-3), "paper": (3, 12, 3, 2, 8, 3e-4)},
    },
}


@cache
def noise(name: str, folder: str | None = None) -> Images:
    """As :func:`orthofast.lab.data.read` gives it, of few images."""
    generator = torch.Generator().manual_seed(len(name))
    classes = 100 if name == "cifar100" else 10
    train, test = (torch.rand(count, *SHAPES[name], generator=generator) for count in (TRAIN, TEST))
    return Images(name, train, torch.arange(TRAIN) % classes, test, torch.arange(TEST) % classes, classes)


def fewer(run: Callable[..., Any], **sizes: int) -> Callable[..., Any]:
    """The same with sizes of ours in place of what it is called with."""
    return lambda *given, **named: run(*given, **named | sizes)


def narrower(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same with an eighth of the channels."""
    return lambda *given, **named: run(*given, **named | {"widths": tuple(width // 8 for width in named["widths"])})


def _module(name: str) -> ModuleType | None:
    return sys.modules.get(f"orthofast.lab.{name}")  # the registry has loaded them all


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise for images, sizes cut down, one thread."""
    monkeypatch.setattr(data_files, "read", noise)
    for name, cuts in CUTS.items():
        module = _module(name)
        for constant, value in cuts.items() if module is not None else ():
            assert hasattr(module, constant), f"{name} has no {constant} any more"
            monkeypatch.setattr(module, constant, value)
    independence = [module for name, module in sys.modules.items() if name.startswith("orthofast.lab.independence")]
    for module in independence:
        if getattr(module, "fit", None) is fitting.fit:
            monkeypatch.setattr(module, "fit", fewer(fitting.fit, steps=1, batch=4))
        for name, cut in (
            ("train_residual", narrower),
            ("train_convnet", narrower),
            ("digit_pairs", lambda run: lambda data, train, test: run(data, 24, 8)),
            ("until_loss", lambda run: fewer(run, width=16)),
            ("fine_tuned", lambda run: fewer(run, width=8, inner=16, steps=2, tuning=2)),
            ("random_updates", lambda run: lambda n, rank, seed: run(32, rank, seed)),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, cut(getattr(module, name)))
    transformer = _module("independence_transformer")
    assert transformer is not None
    shorter = fewer(transformer.train_arm, width=16, inner=32, heads=2, steps=2, batch=2)  # blocks stay
    monkeypatch.setattr(transformer, "train_arm", shorter)
    tables = _module("conditioning_tables")
    if tables is not None:
        monkeypatch.setattr(tables, "BATCH", 24)
        monkeypatch.setattr(tables, "PAIRS", (TRAIN, TEST))
        for name in ("TABLE1", "TABLE1B", "TABLE2"):
            table = replace(getattr(tables, name), blocks=both((1,)), epochs=both(1))
            monkeypatch.setattr(tables, name, table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WITHOUT_DATA = [one for one in RUNNABLE.values() if not one.needs and one.id != "S0-T5"]  # takes a checkpoint
CASES = [
    *((one, name, scale) for one in RUNNABLE.values() for name in one.needs for scale in SCALES),
    *((one, "digits", scale) for one in WITHOUT_DATA for scale in SCALES),
]


@pytest.mark.parametrize(
    ("experiment", "name", "scale"), CASES, ids=[f"{one.id}-{name}-{scale}" for one, name, scale in CASES]
)
@pytest.mark.usefixtures("tiny")
def test_an_experiment_runs_on_its_data_at_its_scales(experiment: Experiment, name: str, scale: str) -> None:
    if experiment.id == "S0-M2":
        pytest.importorskip("peft")
    raw = json.loads(json.dumps(plain(experiment.run(Settings(scale=scale, data=name, data_folder="anywhere")))))
    verdict = experiment.verdict([raw, raw])
    assert verdict.status in (REPRODUCED, NOT_REPRODUCED)
    assert any(check.measured is not None for check in verdict.checks)
    json.dumps(declaration(experiment.figure([raw, raw]), experiment.title, 2))


@pytest.mark.parametrize("experiment", [one for one in RUNNABLE.values() if one.id != "S0-T5"], ids=lambda one: one.id)
@pytest.mark.usefixtures("tiny")
def test_networks_that_diverge_are_measured_and_reproduce_nothing(experiment: Experiment) -> None:
    if experiment.id == "S0-M2":
        pytest.importorskip("peft")
    steps = []

    def lost(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append(optimizer)
        with torch.no_grad():
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                parameter.fill_(torch.nan)

    hook = register_optimizer_step_post_hook(lost)
    try:
        raw = json.loads(json.dumps(plain(experiment.run(Settings(data="digits")))))
    finally:
        hook.remove()
    verdict = experiment.verdict([raw, raw])
    assert verdict.status == NOT_REPRODUCED or not steps
    json.dumps(declaration(experiment.figure([raw, raw]), experiment.title, 2))


def test_the_network_of_appendix_i_has_the_papers_sizes() -> None:
    for side in (28, 32):
        images = torch.empty(2, 3, side, side, device="meta")
        labels = torch.empty(2, dtype=torch.int64, device="meta")
        model = deep_convolutions.like_alexnet(Images("any", images, labels, images, labels, 10), 15)
        assert model(images).shape == (2, 10)
        convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        assert [layer.out_channels for layer in convolutions] == [64, 192, 192, 256] + [256] * 16
        assert [layer.in_features for layer in model if isinstance(layer, nn.Linear)] == [1024, 4096, 4096]
        assert len(deep_convolutions.same_channels(model)) == 1 + 16
    maps = torch.rand(2, 3, 4, 4)
    assert torch.equal(nn.AdaptiveMaxPool2d(2)(maps), nn.MaxPool2d(2)(maps))

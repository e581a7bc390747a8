"""Gaps under today's normalisations: verdicts that must hold and must fail, runs that repeat and are drawn."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthofast import orthogonality_gap
from orthofast.lab import deep_normalization, deep_standardization, deep_training, modern_blocks
from orthofast.lab.data import Images
from orthofast.lab.deep_normalization import DEPTH, UNIT
from orthofast.lab.deep_standardization import ARMS, CLIPPED, ORTHOGONAL, STANDARDIZED
from orthofast.lab.drawing import pictures
from orthofast.lab.experiment import Experiment, Settings
from orthofast.lab.modern_nets import (
    NORMALIZATIONS,
    RELU_GAIN,
    StandardizedLinear,
)
from orthofast.lab.registry import REGISTRY
from orthofast.lab.runs import plain
from orthofast.lab.verdict import NOT_REPRODUCED, REPRODUCED

Raw = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the runs of the lab have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


# verdicts


def normalizations() -> Raw:
    def rising(end: float, count: int = DEPTH) -> list[float]:
        return [0.45 + (end - 0.45) * layer / (count - 1) for layer in range(count)]

    per_sample = {"LayerNorm": 0.9, "RMSNorm": 0.9, "none": 0.91, UNIT: 0.9}
    linear = {kind: rising(0.8, 8) for kind in per_sample} | {"batch norm": [0.25] + [0.23] * 7}
    relu = {kind: rising(end) for kind, end in per_sample.items()} | {"batch norm": [0.25] + [0.2] * (DEPTH - 1)}
    ends = {"LayerNorm": 0.67, "RMSNorm": 0.67, "none": 0.86, UNIT: 0.85}
    residual = {kind: rising(end) for kind, end in ends.items()} | {"batch norm": [0.26] * DEPTH}
    layers = list(range(1, DEPTH + 1))
    return {
        "cap": 0.935,
        "stationary": 0.23,
        "input": 0.44,
        "linear": {"layer": [2**power for power in range(8)], **linear},
        "relu": {"layer": layers, "wide": rising(0.9), **relu},
        "residual": {"layer": layers, "wide": rising(0.66), **residual},
        "trained": {kind: {"start": [0.5, 0.9], "end": [0.5, 0.6], "loss": 0.3} for kind in NORMALIZATIONS},
    }


def blocks() -> Raw:
    images = {"ReLU, pre-norm": 0.8, "ReLU, post-norm": 0.87, "SwiGLU, pre-norm": 0.6, "SwiGLU, post-norm": 0.1}
    tokens = {"ReLU, pre-norm": 0.86, "ReLU, post-norm": 0.935, "SwiGLU, pre-norm": 0.68, "SwiGLU, post-norm": 0.9}
    measured = {
        "images": {name: [0.74, end] for name, end in images.items()},
        "tokens": {name: [0.57, end] for name, end in tokens.items()},
    }
    return {
        "block": [0, 1],
        "cap": {"images": 0.9354, "tokens": 0.9354},
        "independent": 0.07,
        **measured,
        "wide images": copy.deepcopy(measured["images"]),
        "wide tokens": copy.deepcopy(measured["tokens"]),
        "trained": {kind: {"start": [0.7], "end": [0.4], "loss": 0.3, "accuracy": 0.9} for kind in ("ReLU", "SwiGLU")},
    }


def starts() -> Raw:
    def rows(hidden: float, growth: float, losses: list[float | None]) -> list[Raw]:
        return [{"gap": 0.5, "hidden_gap": hidden, "growth": growth, "loss": loss} for loss in losses]

    return {
        "depth": [15, 30, 60],
        "guessing": math.log(10),
        "Xavier": rows(0.98, 1.0, [0.3, 1.0, 2.0]),
        ORTHOGONAL: rows(0.02, 0.9, [0.2, 0.2, 0.3]),
        STANDARDIZED: rows(0.4, 1.45, [0.05, None, None]),
        CLIPPED: rows(0.4, 1.45, [0.05, 1.9, 40.0]),
    }


FOUND: dict[str, Experiment] = {
    one.id: one for room in (deep_normalization, modern_blocks, deep_standardization) for one in room.EXPERIMENTS
}
GOOD = {"S1-X4": normalizations, "S1-X5": blocks, "S1-X1": starts}
WRONG: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("S1-X4", ("stationary",), 0.3),
    ("S1-X4", ("linear", "RMSNorm", 3), 0.5),
    ("S1-X4", ("linear", "LayerNorm", -1), 0.3),
    ("S1-X4", ("linear", "none", -1), None),
    ("S1-X4", ("linear", "batch norm", -1), None),
    ("S1-X4", ("relu", "batch norm", -1), 0.5),
    ("S1-X4", ("relu", "batch norm", -2), 0.3),
    ("S1-X4", ("relu", "RMSNorm", 7), 0.9),
    ("S1-X4", ("relu", "LayerNorm", -1), 0.1),
    ("S1-X4", ("relu", "wide", -1), 0.8),
    ("S1-X4", ("residual", "batch norm", -1), 0.6),
    ("S1-X4", ("residual", "wide", -1), 0.5),
    ("S1-X4", ("residual", "LayerNorm", -1), 0.95),
    ("S1-X4", ("residual", UNIT, -1), 0.6),
    ("S1-X4", ("trained", "RMSNorm", "end", -1), 0.95),
    ("S1-X4", ("trained", "none", "end", -1), None),
    ("S1-X5", ("images", "ReLU, pre-norm", 0), 0.85),
    ("S1-X5", ("images", "ReLU, post-norm", -1), 0.7),
    ("S1-X5", ("images", "SwiGLU, pre-norm", -1), 0.8),
    ("S1-X5", ("images", "SwiGLU, post-norm", -1), 0.8),
    ("S1-X5", ("wide images", "ReLU, pre-norm", -1), 0.7),
    ("S1-X5", ("wide tokens", "SwiGLU, post-norm", -1), None),
    ("S1-X5", ("tokens", "ReLU, post-norm", -1), 0.9),
    ("S1-X5", ("tokens", "SwiGLU, pre-norm", -1), 0.95),
    ("S1-X5", ("trained", "ReLU", "end", -1), 0.8),
    ("S1-X1", (ORTHOGONAL, -1, "loss"), 1.3),
    ("S1-X1", (ORTHOGONAL, -1, "loss"), None),
    ("S1-X1", ("Xavier", -1, "loss"), 0.9),
    ("S1-X1", (STANDARDIZED, -1, "hidden_gap"), 0.99),
    ("S1-X1", (STANDARDIZED, -1, "growth"), 0.99),
]


@pytest.mark.parametrize(("key", "place", "value"), WRONG, ids=str)
def test_verdicts_tell_numbers_that_hold_from_those_that_do_not(
    key: str, place: tuple[str | int, ...], value: Any
) -> None:
    verdict, right, wrong = FOUND[key].verdict, GOOD[key](), GOOD[key]()
    held = verdict([right, right])
    assert held.status == REPRODUCED, [check for check in held.checks if check.holds is False]
    inner: Any = wrong
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    assert verdict([wrong, wrong]).status == NOT_REPRODUCED
    assert verdict([right, wrong]).status == NOT_REPRODUCED, "one seed is enough"


def test_what_is_only_shown_decides_nothing() -> None:
    raw = starts()
    raw[CLIPPED][0]["loss"], raw[STANDARDIZED][0]["loss"] = None, 9.0
    assert FOUND["S1-X1"].verdict([raw]).status == REPRODUCED
    gated = blocks()
    gated["wide images"]["SwiGLU, post-norm"] = [0.74, 0.0]
    assert FOUND["S1-X5"].verdict([gated]).status == REPRODUCED


# runs


def images(settings: Settings) -> Images:
    """Three classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels: Tensor = torch.arange(120) % 3
    shown = torch.rand(120, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return Images("three", shown[20:], labels[20:], shown[:20], labels[:20], 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, a few steps, no files."""
    for room in (deep_normalization, modern_blocks, deep_standardization):
        monkeypatch.setattr(room, "load", images)
    monkeypatch.setattr(deep_normalization, "LINEAR", {"small": (16, 1, 1)})
    monkeypatch.setattr(deep_normalization, "RECTIFIED", {"small": (12, 1, 1)})
    monkeypatch.setattr(deep_normalization, "TRAINED", {"small": (3, 12, 2, 10, 0.01)})
    monkeypatch.setattr(modern_blocks, "TRANSFORMERS", {"small": (2, 16, 2, 1, 1)})
    monkeypatch.setattr(modern_blocks, "FITTED", {"small": (2, 16, 2, 2, 10, 1e-3)})
    monkeypatch.setattr(deep_standardization, "SIZES", {"small": (12, 3, 10, 0.01)})
    monkeypatch.setattr(deep_standardization, "DEPTHS", {"small": (3, 5)})


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.usefixtures("quick")
def test_an_experiment_repeats_by_seed_is_judged_and_drawn(key: str) -> None:
    experiment = FOUND[key]
    raw, again, other = (json.loads(json.dumps(plain(experiment.run(Settings(seed=seed))))) for seed in (0, 0, 1))
    assert raw == again
    assert raw != other
    assert raw.keys() == GOOD[key]().keys(), "the numbers that verdicts are tested with have this shape"
    checks = experiment.verdict([raw, other]).checks
    assert all(check.measured is None or math.isfinite(check.measured) for check in checks)
    drawn = pictures(experiment.figure([raw, other]), experiment.title, 2)
    assert bytes(drawn["figure.png"][:4]) == b"\x89PNG"  # type: ignore[arg-type]
    assert REGISTRY[key] is experiment


def test_arms_differ_as_they_are_named() -> None:
    data = images(Settings()).flat()
    nets = {arm: deep_standardization.started(data, 4, 12, arm, 0) for arm in ARMS}
    assert [type(layer) for layer in nets[STANDARDIZED]] == [StandardizedLinear, nn.ReLU] * 3 + [nn.Linear]
    assert all(
        torch.equal(one, two)
        for one, two in zip(nets[STANDARDIZED].parameters(), nets[CLIPPED].parameters(), strict=True)
    )
    scales = [layer.scale for layer in nets[STANDARDIZED] if isinstance(layer, StandardizedLinear)]
    assert scales == [1.0, RELU_GAIN, RELU_GAIN]
    xavier = deep_training.perceptron(data, 4, 12)
    assert [type(layer) for layer in nets["Xavier"]] == [type(layer) for layer in xavier]
    with torch.no_grad():
        x = data.train[:40]
        hidden = {arm: float(orthogonality_gap(nets[arm][:-1](x))) for arm in ("Xavier", ORTHOGONAL)}
    assert hidden[ORTHOGONAL] < hidden["Xavier"]

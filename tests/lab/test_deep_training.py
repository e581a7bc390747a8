"""Daneshmand et al. 2021, Figure 4b: gaps start before the first update, and a run that diverges holds nothing."""

from __future__ import annotations

import math

import pytest
import torch

from orthofast.lab import deep_training
from orthofast.lab.data import Images
from orthofast.lab.deep_training import figure4b, logit_gap, perceptron
from orthofast.lab.experiment import Settings
from orthofast.lab.registry import RUNNABLE
from orthofast.lab.runs import plain
from orthofast.lab.verdict import NOT_REPRODUCED


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Noise whose classes differ in one half, 20 steps on a small network."""
    labels = torch.arange(60) % 10
    pictures = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures[labels < 5, :, :2] += 1
    data = Images("halves", pictures, labels, pictures, labels, 10)
    monkeypatch.setattr(deep_training, "load", lambda settings: data)
    monkeypatch.setattr(deep_training, "DEPTH_4B", 4)
    return data


def test_gaps_are_traced_from_before_the_first_update(halves: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_training, "SIZES_4B", {"small": (12, 20, 30, 0.1)})
    found = figure4b(Settings(seed=3))
    assert found["step"] == [0, *range(2, 21, 2)]
    assert len(found["gap"]) == len(found["hidden_gap"]) == len(found["loss"]) == 11
    data = halves.standardized().flat()
    torch.manual_seed(3)
    start = perceptron(data, 4, 12)
    assert found["gap"][0] == logit_gap(start, data, 30, 3)
    assert found["gap"][0] != found["gap"][1]
    assert plain(found) == plain(figure4b(Settings(seed=3)))


@pytest.mark.usefixtures("halves")
def test_a_run_that_diverges_is_not_judged_by_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_training, "SIZES_4B", {"small": (12, 40, 30, 1e12)})
    found = figure4b(Settings())
    assert found["step"][-1] == 40
    assert all(math.isnan(found[key][-1]) for key in ("gap", "hidden_gap", "loss"))
    raw = plain(found)
    verdict = RUNNABLE["S1-F4b"].verdict([raw])
    assert verdict.status == NOT_REPRODUCED
    assert [check.holds for check in verdict.checks[:3]] == [False] * 3

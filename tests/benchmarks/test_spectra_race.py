"""The race of spectra: no time without agreement, verdicts from medians, data fresh and of the right kind."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import spectra
from benchmarks.spectra import OURS, Race


def race(**changed) -> Race:
    facts = {
        "name": "small",
        "draw": spectra.factors(30, 20),
        "contestants": spectra.KRONECKER,
        "rival": "partition",
        "time_target": 0.5,
        "memory_target": 0.5,
        "agree": 0.0,
    }
    return Race(**(facts | changed))


@pytest.mark.parametrize(
    "small",
    [race(), race(draw=spectra.network([6, 5, 4], 12), contestants=spectra.FISHER, rival="svd", agree=1e-9)],
    ids=["kronecker", "fisher"],
)
def test_contestants_agree_and_are_timed(small: Race) -> None:
    rows = spectra.run(small, 2)
    assert [row["contestant"] for row in rows] == list(small.contestants)
    assert all(len(row["wall_s"]) == len(row["cpu_s"]) == 2 for row in rows)
    assert small.name in spectra.table(rows, [])


@pytest.mark.parametrize(
    "wrong", [lambda pair: [2 * x for x in spectra.quantiles(pair)], lambda pair: [torch.ones(3)] * 4]
)
def test_a_wrong_contestant_is_not_timed(wrong) -> None:
    with pytest.raises(ValueError, match="small"):
        spectra.run(race(contestants=spectra.KRONECKER | {"wrong": wrong}), 1)


def test_verdicts_compare_medians_with_the_targets() -> None:
    times = [
        {"race": "small", "contestant": OURS, "wall_s": [1.0, 9.0, 2.0]},
        {"race": "small", "contestant": "partition", "wall_s": [4.0, 5.0, 3.0]},
    ]
    memory = [
        {"race": "small", "contestant": OURS, "extra_mib": 6.0},
        {"race": "small", "contestant": "partition", "extra_mib": 10.0},
    ]
    of_time, of_memory = spectra.verdicts(race(), times, memory)
    assert of_time.endswith("0.500, promised at most 0.5: met")
    assert of_memory.endswith("0.600, promised at most 0.5: not met")
    assert spectra.verdicts(race(time_target=math.inf, memory_target=None), times, memory) == []


def test_drawn_gradients_are_those_of_the_samples_own_losses() -> None:
    layers = spectra.network([6, 5, 4], 12)(0)
    assert [(tuple(x.shape), tuple(g.shape)) for x, g in layers] == [((12, 6), (12, 5)), ((12, 5), (12, 4))]
    torch.testing.assert_close(layers[1][1].sum(1), torch.zeros(12), rtol=0, atol=1e-6)  # softmax less one-hot
    again = spectra.network([6, 5, 4], 12)(0)
    assert torch.equal(layers[0][1], again[0][1])

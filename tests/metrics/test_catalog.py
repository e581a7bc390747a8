"""The table of metrics agrees with the functions it lists."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from orthofast import metrics
from orthofast.kernels import gram_stats
from orthofast.kernels.drift import drift_stats
from orthofast.metrics.catalog import METRICS, Metric

listed = pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
WEIGHTS = {
    "random": torch.randn(30, 8, generator=torch.Generator().manual_seed(0)),
    "wide": torch.randn(5, 60, generator=torch.Generator().manual_seed(1)).double(),
    "parallel": torch.ones(6, 4),
    "orthogonal": torch.eye(7),
}


def measured(metric: Metric, weight: torch.Tensor) -> Any:
    """A metric of two versions compares the weight with orthonormal vectors."""
    return metric.function(weight) if metric.versions == 1 else metric.function(orthonormal(weight), weight)


def orthonormal(weight: torch.Tensor) -> torch.Tensor:
    return torch.eye(*weight.shape, dtype=weight.dtype)


def _parts(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_every_public_measurement_of_one_weight_by_its_pairs_is_listed() -> None:
    files = {metric.function.__module__ for metric in METRICS.values()}
    functions = {name for name in metrics.__all__ if getattr(getattr(metrics, name), "__module__", "") in files}
    functions = {name for name in functions if inspect.isfunction(getattr(metrics, name))}
    assert functions - {"isotropic_baseline", "welch_bound"} == set(METRICS)
    assert len(files) >= 3


@listed
def test_the_fields_it_lists_are_those_its_formula_needs(metric: Metric) -> None:
    weight = WEIGHTS["random"].double()
    if metric.versions == 2:
        source: Any = drift_stats(orthonormal(weight), weight)
    elif metric.want:
        bins = {"bins": 64} if "hist" in metric.want else {}
        source = gram_stats(weight, normalize=metric.normalize, want=metric.want, **bins)
    else:
        source = torch.linalg.svdvals(weight).unsqueeze(0)
    for part, other in zip(_parts(metric.formula(source)), _parts(measured(metric, weight)), strict=True):
        torch.testing.assert_close(part.reshape(other.shape), other, rtol=1e-12, atol=1e-12)


@listed
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))
def test_values_lie_in_the_range_it_lists(metric: Metric, weight: torch.Tensor) -> None:
    first = _parts(measured(metric, weight))[0]
    assert bool((first >= metric.low).all())
    assert bool((first <= metric.high).all())


@listed
def test_lower_is_better_means_lower_for_orthogonal_than_for_parallel_vectors(metric: Metric) -> None:
    assert metric.better in ("lower", "neither")
    if metric.better == "lower":
        orthogonal, parallel = (_parts(measured(metric, WEIGHTS[name]))[0] for name in ("orthogonal", "parallel"))
        assert orthogonal.item() < 1e-12
        assert parallel.item() > 0.9


@listed
def test_its_docstring_names_range_and_source(metric: Metric) -> None:
    text = inspect.getdoc(metric.function) or ""
    author, year = (
        metric.paper.split(" ")[0],
        next(word for word in metric.paper.replace(",", "").split() if word.isdigit()),
    )
    assert metric.function.__name__ == metric.name
    assert f"{author} " in text
    assert year in text
    assert ">>> " in text
    if metric.better == "lower":
        assert "Range [0," in text


@listed
def test_it_takes_at_most_six_parameters_keyword_only_after_the_weight(metric: Metric) -> None:
    parameters = list(inspect.signature(metric.function).parameters.values())
    names, others = [p.name for p in parameters[: metric.versions]], parameters[metric.versions :]
    assert names == (["weight"] if metric.versions == 1 else ["before", "after"])
    assert len(others) <= 6
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)

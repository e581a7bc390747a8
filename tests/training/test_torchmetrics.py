"""The torchmetrics classes: values of the functions, over batches, merged, and over two processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import orthofast
from orthofast.errors import InputError
from orthofast.metrics import mean_squared_cosine
from orthofast.training.torchmetrics import (
    DyingNeurons,
    FullNeurons,
    MaxCoherence,
    MeanAbsCosine,
    MeanSquaredCosine,
    OrthogonalityGap,
)

OF_VECTORS = {
    MeanAbsCosine: orthofast.pii,
    MeanSquaredCosine: mean_squared_cosine,
    MaxCoherence: lambda x: orthofast.max_coherence(x).value,
    OrthogonalityGap: orthofast.orthogonality_gap,
}
MADE: dict[str, Any] = {kind.__name__: kind for kind in OF_VECTORS} | {
    "DyingNeurons": lambda **given: DyingNeurons(6, **given),
    "FullNeurons": lambda **given: FullNeurons(6, **given),
}


def batches(count: int = 3) -> list[Tensor]:
    shift = torch.linspace(-2, 2, 6)  # some neurons fire for none, some for all
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) + shift for seed in range(count)]


@pytest.mark.parametrize("kind", OF_VECTORS, ids=lambda kind: kind.__name__)
def test_one_update_gives_the_function_s_value(kind: type[Metric]) -> None:
    x = batches(1)[0]
    metric = kind()
    metric.update(x)
    assert metric.compute().item() == pytest.approx(OF_VECTORS[kind](x).item(), rel=1e-6)


def test_vectors_may_be_columns() -> None:
    x = torch.randn(5, 9)
    metric = MeanAbsCosine(vectors="cols")
    metric.update(x)
    assert metric.compute().item() == pytest.approx(orthofast.pii(x, vectors="cols").item(), rel=1e-6)


def test_updates_add_up_as_documented() -> None:
    few, many = torch.randn(3, 6), torch.randn(9, 6)
    mean, gap, most = MeanAbsCosine(), OrthogonalityGap(), MaxCoherence()
    for metric in (mean, gap, most):
        metric.update(few)
        metric.update(many)
    pooled = (3 * orthofast.pii(few) + 36 * orthofast.pii(many)) / 39
    assert mean.compute().item() == pytest.approx(pooled.item(), rel=1e-6)
    gaps = [orthofast.orthogonality_gap(x).item() for x in (few, many)]
    assert gap.compute().item() == pytest.approx(sum(gaps) / 2)
    coherence = [orthofast.max_coherence(x).value.item() for x in (few, many)]
    assert most.compute().item() == pytest.approx(max(coherence))


def test_neurons_are_counted_over_all_updates() -> None:
    dying, full = DyingNeurons(3), FullNeurons(3)
    for x in (torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])):
        dying.update(x)
        full.update(x)
    assert dying.compute().item() == pytest.approx(1 / 3)
    assert full.compute().item() == pytest.approx(1 / 3)
    image = DyingNeurons(2, dim=1)
    image.update(torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])[None])
    assert image.compute().item() == 0.5
    with pytest.raises(InputError, match="activations needs 3 neurons along dim -1"):
        dying.update(torch.ones(2, 4))
    with pytest.raises(InputError, match="num_neurons needs a positive integer"):
        DyingNeurons(0)


@pytest.mark.parametrize("name", MADE)
def test_merging_two_halves_gives_the_whole(name: str) -> None:
    left, right, whole = (MADE[name]() for _ in range(3))
    for index, x in enumerate(batches(4)):
        (left if index % 2 else right).update(x)
        whole.update(x)
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


@pytest.mark.parametrize("name", MADE)
def test_reset_and_forward_follow_the_host(name: str) -> None:
    metric = MADE[name]()
    first = metric(batches(1)[0])
    assert first.item() == pytest.approx(metric.compute().item())
    metric.reset()
    metric.update(batches(2)[1])
    fresh = MADE[name]()
    fresh.update(batches(2)[1])
    assert torch.equal(metric.compute(), fresh.compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", MADE)
def test_without_updates_it_is_nan(name: str) -> None:
    assert math.isnan(MADE[name]().compute().item())


def test_nan_in_nan_out() -> None:
    for kind in OF_VECTORS:
        metric = kind()
        metric.update(torch.full((4, 3), math.nan))
        assert math.isnan(metric.compute().item())


def test_collections_and_state_dicts_work() -> None:
    collection = MetricCollection([MeanAbsCosine(), MaxCoherence(), OrthogonalityGap()], prefix="train/")
    values = collection(batches(1)[0])
    assert set(values) == {"train/MeanAbsCosine", "train/MaxCoherence", "train/OrthogonalityGap"}
    metric = MeanAbsCosine()
    metric.persistent(True)
    metric.update(batches(1)[0])
    again = MeanAbsCosine()
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    again._update_count = 1
    assert torch.equal(again.compute(), metric.compute())


@pytest.mark.parametrize("name", MADE)
def test_processes_are_reduced_as_declared(name: str) -> None:
    """Two processes' states, gathered the way torchmetrics hands them over."""
    other, whole = MADE[name](), MADE[name]()

    def gathered(value: Tensor, group: Any = None) -> list[Tensor]:
        (field,) = [key for key in metric._defaults if getattr(metric, key) is value]
        return [value, getattr(other, field)]

    metric = MADE[name](dist_sync_fn=gathered, distributed_available_fn=lambda: True)
    for part, x in zip((metric, other), batches(2), strict=True):
        part.update(x)
        whole.update(x)
    assert metric.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)

"""Few, zero, empty, NaN and infinite vectors, and what kind of tensor comes back."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from orthofast.errors import BackendError, InputError
from orthofast.kernels import Sample, gram_stats
from orthofast.metrics import (
    cosine_histogram,
    diagonal_dominance,
    max_coherence,
    mean_squared_cosine,
    orthogonality_gap,
    pii,
    singular_value_gap,
)
from orthofast.metrics.coherence import (
    cosine_histogram_from,
    max_coherence_from,
    mean_squared_cosine_from,
    pii_from,
)

COHERENCE = (pii, mean_squared_cosine)
ALL = (pii, mean_squared_cosine, max_coherence, cosine_histogram, orthogonality_gap, diagonal_dominance)
by_name = pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 5), (1, 0), (7, 0)], ids=str)
def test_fewer_than_two_vectors_of_positive_length_give_nan(shape: tuple[int, int], measure: Any) -> None:
    weight = torch.ones(shape)
    for metric in COHERENCE:
        got = measure(metric, weight)
        assert got.shape == ()
        assert math.isnan(got.item())
    value, pair = measure(max_coherence, weight)
    assert math.isnan(value.item())
    assert pair.tolist() == [-1, -1]
    assert measure(cosine_histogram, weight, bins=4).counts.tolist() == [0, 0, 0, 0]
    assert all(math.isnan(part.item()) for part in measure(diagonal_dominance, weight))


def test_zero_vectors_are_left_out_of_the_pairs(measure: Any) -> None:
    rows = torch.randn(20, 6)
    holed = torch.zeros(24, 6)
    holed[2:22] = rows
    for metric in COHERENCE:
        assert measure(metric, holed).item() == pytest.approx(measure(metric, rows).item(), abs=1e-7)
    value, pair = measure(max_coherence, rows)
    shifted = measure(max_coherence, holed)
    assert shifted.value.item() == pytest.approx(value.item(), abs=1e-7)
    assert shifted.pair.tolist() == [i + 2 for i in pair.tolist()]
    assert measure(cosine_histogram, holed, bins=3).counts.sum().item() == 190
    for part, other in zip(measure(diagonal_dominance, holed), measure(diagonal_dominance, rows), strict=True):
        assert part.item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize("zero", [3, 4])
def test_a_pair_needs_two_vectors_that_are_not_zero(zero: int, measure: Any) -> None:
    rows = torch.ones(4, 3)
    rows[:zero] = 0
    assert math.isnan(measure(pii, rows).item())
    assert math.isnan(measure(diagonal_dominance, rows).mean.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_infinity_give_nan_in_their_head_alone(bad: float, measure: Any) -> None:
    weight = torch.randn(12, 5)
    weight[5, 2] = bad

    def by_heads(metric: Any, **options: Any) -> Any:
        return measure(metric, weight, vectors="heads", heads=3, **options)

    for metric in (*COHERENCE, orthogonality_gap):
        assert by_heads(metric).isnan().tolist() == [False, True, False]
    value, pair = by_heads(max_coherence)
    assert value.isnan().tolist() == [False, True, False]
    assert pair[1].tolist() == [-1, -1]
    assert by_heads(cosine_histogram, bins=2).counts.sum(1).tolist() == [6, 0, 6]
    for part in by_heads(diagonal_dominance):
        assert part.isnan().tolist() == [False, True, False]


def test_lengths_at_the_ends_of_float32_do_not_matter(measure: Any) -> None:
    rows = torch.randn(9, 40)
    scaled = rows * torch.logspace(-36, 36, 9).unsqueeze(1)
    assert measure(pii, scaled).item() == pytest.approx(measure(pii, rows).item(), abs=3e-7)


@by_name
def test_a_parameter_is_left_as_it_was_and_only_means_over_pairs_carry_a_graph(metric: Any) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    before = weight.detach().clone()
    found = metric(weight)
    for part in found if isinstance(found, tuple) else (found,):
        assert part.requires_grad == (metric in COHERENCE)
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.equal(weight.detach(), before)
    assert not singular_value_gap(weight).requires_grad


@by_name
def test_numpy_arrays_give_what_tensors_give(metric: Any) -> None:
    array = np.random.default_rng(0).standard_normal((14, 9)).astype(np.float32)
    array.flags.writeable = False
    variants = (array, array.astype(">f4"), np.flip(array)[::-1, ::-1], np.asfortranarray(array))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [metric(variant) for variant in variants]
    expected = metric(torch.tensor(array))
    for got in results:
        for part, other in zip(_parts(got), _parts(expected), strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-6)


def _parts(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@by_name
def test_the_results_are_float64_or_counts(metric: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        for part in _parts(metric(torch.randn(5, 3).to(dtype))):
            assert part.dtype in (torch.float64, torch.int64)
            assert part.device.type == "cpu"


@by_name
def test_bad_weights_are_refused_by_every_metric(metric: Any) -> None:
    for weight in ([[1.0, 2.0]], torch.ones(3), torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2, device="meta")):
        with pytest.raises(InputError, match=r"^weight "):
            metric(weight)
    with pytest.raises(InputError, match=r"^vectors needs one of rows, cols, heads, filters, center_tap, got 'row'"):
        metric(torch.ones(2, 2), vectors="row")
    with pytest.raises(BackendError, match=r"^backend needs one of .*, got 'abacus'"):
        metric(torch.ones(2, 2), backend="abacus")


@pytest.mark.parametrize("bins", [0, -1, 2.0, True, None, "8"], ids=repr)
def test_bins_that_are_no_count_are_refused(bins: object) -> None:
    with pytest.raises(InputError, match=r"^bins needs a positive integer"):
        cosine_histogram(torch.ones(2, 2), bins=bins)  # type: ignore[arg-type]


def test_formulas_name_the_field_a_record_lacks() -> None:
    record = gram_stats(torch.ones(3, 2), want=["sum"])
    with pytest.raises(InputError, match="pii needs a record folded with want='abs_sum', got one without"):
        pii_from(record)
    with pytest.raises(InputError, match="cosine_histogram needs a record folded with want='hist'"):
        cosine_histogram_from(record)


def test_a_sample_estimates_and_a_seed_repeats_it(measure: Any) -> None:
    weight = torch.randn(400, 12)
    exact = measure(pii, weight).item()
    first = measure(pii, weight, sample=Sample(20_000, seed=1)).item()
    again = measure(pii, weight, sample=Sample(20_000, seed=1)).item()
    assert first == again
    assert first != exact
    assert first == pytest.approx(exact, abs=0.01)  # sd of one |cos| is 0.17
    assert measure(mean_squared_cosine, weight, sample=20_000).item() == pytest.approx(1 / 12, abs=0.01)
    counts = measure(cosine_histogram, weight, bins=10, sample=20_000).counts
    assert 20_000 <= counts.sum().item() < 25_000


def test_a_sample_of_all_pairs_is_exact(measure: Any) -> None:
    weight = torch.randn(20, 12)
    assert measure(pii, weight, sample=190).item() == measure(pii, weight).item()


def test_sums_a_rounding_over_the_number_of_pairs_are_cut_to_one() -> None:
    record = gram_stats(torch.ones(3, 2, dtype=torch.float64), want=["abs_sum", "sq_sum", "abs_max"])
    above = torch.tensor([3 + 4e-16 * 3], dtype=torch.float64)
    assert above.item() > 3
    record.abs_sum, record.sq_sum, record.abs_max = above, above, above / 3
    assert pii_from(record).item() == 1
    assert mean_squared_cosine_from(record).item() == 1
    assert max_coherence_from(record).value.item() == 1

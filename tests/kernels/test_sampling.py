"""A sampled fold estimates the whole: unbiased, with an honest standard error, the same for the same seed.

What is drawn does not depend on the backend, and a test holds it to that: so statistics over many seeds are taken
once, on the fastest backend.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.kernels import Sample, gram_stats
from orthofast.records import GramStats
from tests.kernels.cases import ALL, gaussian, same_bits, truth_of
from tests.kernels.conftest import Fold

SEEDS = 200
SCALARS = tuple(name for name in ALL if name != "row_abs")


def clustered(n: int, d: int, clusters: int, spread: float) -> Tensor:
    """Vectors near a few centres: most pairs are nearly orthogonal, a few nearly parallel."""
    centres = gaussian((clusters, d), 7)
    return centres[torch.arange(n) % clusters] + spread * gaussian((n, d), 8)


def with_zeros(n: int, d: int) -> Tensor:
    x = gaussian((n, d), 3)
    x[::5] = 0
    return x


DATA = {
    "gaussian": lambda: gaussian((150, 24), 0),
    "clusters-2": lambda: clustered(150, 24, 2, 0.1),
    "clusters-10": lambda: clustered(150, 24, 10, 0.3),
    "one-duplicated": lambda: torch.cat([gaussian((120, 24), 1), gaussian((1, 24), 2).expand(30, 24)]),
    "zero-vectors": lambda: with_zeros(150, 24),
}


def mean_abs(record: GramStats) -> Tensor:
    assert record.abs_sum is not None
    return record.abs_sum / record.pairs


def errors_and_spread(x: Tensor, y: Tensor | None, pairs: int) -> tuple[Tensor, Tensor]:
    """Per seed: estimate minus truth, and the standard error it came with."""
    records = [gram_stats(x, y, sample=Sample(pairs, seed)) for seed in range(SEEDS)]
    truth = truth_of(x.unsqueeze(0), None if y is None else y.unsqueeze(0))[0]
    errors = torch.cat([mean_abs(record) for record in records]) - truth.abs_sum / truth.pairs
    return errors, torch.cat([record.standard_error for record in records if record.standard_error is not None])


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("pairs", [300, 1500])
def test_estimate_is_unbiased_and_its_standard_error_honest(name: str, pairs: int) -> None:
    errors, reported = errors_and_spread(DATA[name](), None, pairs)
    assert len(errors) == len(reported) == SEEDS
    spread = errors.std().item()
    assert spread > 0
    assert abs(errors.mean().item()) < 4 * spread / SEEDS**0.5
    # a round draws every vector once, which steadies the mean: then the standard error errs on the safe side
    inside = (errors.abs() < 1.96 * reported).double().mean().item()
    assert inside >= 0.88
    assert 0.85 < reported.square().mean().sqrt().item() / spread < 2


@pytest.mark.parametrize("clusters", [0, 10])
def test_standard_error_is_exact_where_few_vectors_are_drawn(clusters: int) -> None:
    x = clustered(1500, 24, clusters, 0.3) if clusters else gaussian((1500, 24), 0)
    errors, reported = errors_and_spread(x, None, 300)
    # 95 % of normal errors lie within 1.96; 200 seeds of 32 groups allow these bounds
    assert 0.89 <= (errors.abs() < 1.96 * reported).double().mean().item() <= 0.99
    assert 0.8 < reported.square().mean().sqrt().item() / errors.std().item() < 1.25


def test_cross_estimate_is_unbiased_and_its_standard_error_honest() -> None:
    errors, reported = errors_and_spread(gaussian((150, 24), 0), clustered(90, 24, 5, 0.2), 1000)
    assert abs(errors.mean().item()) < 4 * errors.std().item() / SEEDS**0.5
    assert (errors.abs() < 1.96 * reported).double().mean().item() >= 0.88


def test_other_sums_are_unbiased() -> None:
    x = clustered(150, 24, 10, 0.3)
    truth = truth_of(x.unsqueeze(0))[0]
    records = [gram_stats(x, want=("sq_sum", "sum"), bins=4, sample=Sample(600, seed)) for seed in range(60)]
    for name in ("sq_sum", "sum"):
        means = torch.cat([getattr(record, name) / record.pairs for record in records])
        expected = getattr(truth, name) / truth.pairs
        assert abs(means.mean().item() - expected) < 4 * means.std().item() / 60**0.5, name
    shares = torch.cat([record.hist / record.pairs for record in records if record.hist is not None])
    expected = torch.histc(torch.from_numpy(truth.cosines), 4, -1, 1) / truth.pairs
    assert bool(((shares.mean(0) - expected).abs() < 4 * shares.std(0) / 60**0.5 + 1e-12).all())


@pytest.mark.parametrize("name", DATA)
def test_every_backend_draws_the_same_pairs(fold: Fold, name: str) -> None:
    x, y = DATA[name](), gaussian((90, 24), 5)
    for other in (None, y):
        got, expected = (
            call(x, other, want=SCALARS, bins=2, sample=Sample(400, 11))
            for call in (fold, partial(gram_stats, backend="reference"))
        )
        assert got.pairs.item() == expected.pairs.item()
        for field in (*SCALARS, "standard_error"):
            left, right = getattr(got, field), getattr(expected, field)
            assert torch.allclose(left, right, rtol=1e-5, atol=1e-5), field
        assert got.argmax is not None
        assert expected.argmax is not None
        assert name == "one-duplicated" or torch.equal(got.argmax, expected.argmax)


def test_more_pairs_give_a_smaller_error(fold: Fold) -> None:
    x = gaussian((400, 24), 0)
    few, many = (fold(x, sample=pairs).standard_error for pairs in (500, 50_000))
    assert few is not None
    assert many is not None
    assert 3 < (few / many).item() < 20  # pairs that share vectors tell less than a hundred times as many


@pytest.mark.parametrize("pairs", [1, 40, 2000])
def test_about_as_many_pairs_are_drawn_as_asked(fold: Fold, pairs: int) -> None:
    drawn = fold(gaussian((200, 9), 0), sample=pairs).pairs.item()
    assert pairs <= drawn <= max(64, 2 * pairs)
    assert drawn < 200 * 199 // 2


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(fold: Fold) -> None:
    x = gaussian((2, 200, 9), 0)
    options = {"want": SCALARS, "bins": 8}
    first = fold(x, sample=Sample(500, 3), **options)
    torch.manual_seed(99)
    assert same_bits(first, fold(x, sample=Sample(500, 3), **options))
    assert not same_bits(first, fold(x, sample=Sample(500, 4), **options))
    assert same_bits(fold(x, sample=500, **options), fold(x, sample=Sample(500, 0), **options))


@pytest.mark.parametrize("pairs", [190, 191, 10**9])
def test_sample_of_all_pairs_is_exact(fold: Fold, pairs: int) -> None:
    x = gaussian((2, 20, 9), 0)
    got = fold(x, want=ALL[:4], bins=8, sample=pairs)
    assert got.standard_error is not None
    assert got.standard_error.tolist() == [0.0, 0.0]
    got.standard_error = None
    assert same_bits(got, fold(x, want=ALL[:4], bins=8))


def test_norms_and_counts_are_of_all_vectors(fold: Fold) -> None:
    x = gaussian((2, 200, 9), 0)
    x[0, 17] = 0
    got, whole = fold(x, sample=64), fold(x, want=())
    assert got.norm_sq is not None
    assert whole.norm_sq is not None
    assert torch.equal(got.norm_sq, whole.norm_sq)
    assert got.zero.tolist() == [1, 0]


def test_sampled_maximum_names_a_true_pair(fold: Fold) -> None:
    x, y = gaussian((1, 200, 9), 0), gaussian((1, 120, 9), 1)
    for other in (None, y):
        truth = truth_of(x, other)[0]
        got = fold(x, other, want="abs_max", sample=2000)
        assert got.argmax is not None
        assert got.abs_max is not None
        index = (truth.indices == got.argmax[0].numpy()).all(1)
        assert index.sum() == 1
        assert abs(got.abs_max.item() - abs(truth.cosines[index][0])) < 1e-6
        assert 0.5 * truth.abs_max < got.abs_max.item() <= truth.abs_max + 1e-6


def test_bad_values_poison_the_estimate_even_when_not_drawn(fold: Fold) -> None:
    x = gaussian((2, 400, 9), 0)
    x[1, 399, 0] = float("nan")
    got = fold(x, want=SCALARS, sample=40)
    assert got.nonfinite.tolist() == [0, 1]
    assert got.abs_sum is not None
    assert got.abs_sum.isnan().tolist() == [False, True]


def test_all_vectors_zero_gives_no_pairs(fold: Fold) -> None:
    got = fold(torch.zeros(200, 9), want=SCALARS, sample=500)
    assert (got.pairs.item(), got.zero.item()) == (0, 200)
    assert got.abs_sum is not None
    assert got.abs_sum.item() == 0
    assert got.abs_max is not None
    assert got.abs_max.isnan().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_other_dtypes_are_sampled_alike(fold: Fold, dtype: torch.dtype) -> None:
    x = gaussian((200, 24), 0, torch.float8_e4m3fn).double().to(dtype)
    same = fold(x.double().float(), sample=500)
    assert torch.allclose(mean_abs(fold(x, sample=500)), mean_abs(same), rtol=1e-6)


def test_raw_dot_products_are_sampled(fold: Fold) -> None:
    x = gaussian((200, 24), 0)
    truth = truth_of(x.unsqueeze(0), normalize=False)[0]
    got = fold(x, normalize=False, sample=5000)
    assert got.standard_error is not None
    error = abs(mean_abs(got).item() - truth.abs_sum / truth.pairs)
    assert error < 4 * got.standard_error.item()


@pytest.mark.parametrize("sample", [0, -1, 1.5, True, "all", Sample(0), Sample(2.5)], ids=repr)  # type: ignore[arg-type]
def test_refuses_a_sample_that_is_no_positive_count(fold: Fold, sample: object) -> None:
    with pytest.raises(InputError, match=r"sample needs a positive number of pairs .* got"):
        fold(gaussian((20, 9), 0), sample=sample)


def test_refuses_per_vector_sums(fold: Fold) -> None:
    with pytest.raises(InputError, match="sample cannot be combined with want='row_abs'"):
        fold(gaussian((20, 9), 0), want="row_abs", sample=10)

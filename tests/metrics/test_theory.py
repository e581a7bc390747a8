"""Closed forms of Daneshmand et al. 2021: values worked out apart from the code, and what chains do beside them."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics import (
    bn_chain,
    chain_trace,
    corollary3_bound,
    diagonal_start,
    gap_bounds,
    gap_contraction,
    gaussian_w2_squared,
    nearly_parallel_start,
    orthogonality_gap,
    samples_with_gap,
    singular_value_gap,
    stationary_gap,
    theorem1_bound,
)
from tests.metrics.arrangements import rotation

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small decompositions: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_samples(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=DOUBLE, generator=seeded(seed))


@pytest.mark.parametrize(("n", "d"), [(1, 5), (4, 32), (9, 9), (30, 7), (192, 64), (5, 1)])
def test_gaps_lie_within_the_bounds_which_are_attained(n: int, d: int) -> None:
    low, high = gap_bounds(n, d)
    assert low - 1e-14 <= orthogonality_gap(gaussian_samples(n, d)).item() <= high + 1e-14
    assert orthogonality_gap(torch.ones(n, d)).item() == pytest.approx(high, abs=1e-15)
    basis = rotation(max(n, d))[:n, :d] if n <= d else rotation(n)[:, :d]  # orthonormal rows, or columns
    assert orthogonality_gap(basis).item() == pytest.approx(low, abs=1e-14)


def test_the_bounds_have_their_known_values() -> None:
    assert gap_bounds(192, 64).low == pytest.approx(0.10206, abs=5e-6)
    assert math.log(gap_bounds(4, 32).high) == pytest.approx(-0.1438, abs=5e-5)
    assert gap_bounds(1, 3) == (0, 0)


# n, d: what the chain gives (root mean square over deep layers), and the closed form
STATIONARY = {
    (2, 16): (0.212, 0.204),
    (2, 64): (0.101, 0.102),
    (2, 256): (0.052, 0.051),
    (4, 16): (0.298, 0.291),
    (4, 64): (0.143, 0.145),
    (4, 256): (0.069, 0.073),
    (8, 64): (0.202, 0.195),
    (8, 256): (0.098, 0.097),
}


@pytest.mark.parametrize(("n", "d"), STATIONARY, ids=str)
def test_deep_chains_settle_at_the_stationary_level(n: int, d: int) -> None:
    known, closed = STATIONARY[n, d]
    assert stationary_gap(n, d) == pytest.approx(closed, abs=7e-4)
    start = gaussian_samples(n, d).expand(24, n, d)
    deep = chain_trace(islice(bn_chain(start, 90, generator=seeded(1)), 40, None)).gap
    level = deep.square().mean().sqrt().item()
    assert level == pytest.approx(known, rel=0.06)
    assert level == pytest.approx(stationary_gap(n, d), rel=0.06 if d >= 8 * n else 0.1)


@pytest.mark.parametrize(("n", "d"), [(3, 64), (8, 256)])
def test_centred_chains_settle_at_the_level_of_one_sample_fewer(n: int, d: int) -> None:
    start = gaussian_samples(n, d).expand(16, n, d)
    deep = chain_trace(islice(bn_chain(start, 90, center=True, generator=seeded(2)), 40, None)).gap
    assert deep.square().mean().sqrt().item() == pytest.approx(stationary_gap(n, d, center=True), rel=0.02)
    assert deep.min().item() > math.sqrt(1 / (n - 1) - 1 / n) - 1e-12  # centred samples never become orthogonal


def test_a_small_deviation_shrinks_by_the_contraction_factor() -> None:
    n, d = 6, 1 << 17
    deviation = torch.diag(torch.tensor([0.05, -0.05, 0.02, -0.02, 0, 0], dtype=DOUBLE))
    gram = torch.eye(n, dtype=DOUBLE) / n + deviation
    rows = torch.randn(d, n, dtype=DOUBLE, generator=seeded(3)) @ torch.linalg.cholesky(gram).T  # of W H
    unit = rows / rows.norm(dim=1, keepdim=True)
    after = unit.T @ unit / d - torch.eye(n, dtype=DOUBLE) / n
    factor = (after * deviation).sum() / deviation.square().sum()
    assert factor.item() == pytest.approx(gap_contraction(n), abs=0.02)
    assert gap_contraction(n) == 6 / 8


@pytest.mark.parametrize(("n", "d", "known"), [(2, 512, 0.401), (2, 64, 1.31), (4, 256, 1.82)], ids=str)
def test_theorem_1_holds(n: int, d: int, known: float) -> None:
    start = gaussian_samples(n, d).expand(20, n, d)
    found = chain_trace(bn_chain(start, 60, generator=seeded(4)))
    alpha = found.min_singular.min().item()
    for layers in (1, 5, 20, 59):
        assert found.gap[:, layers].mean().item() <= theorem1_bound(alpha, layers, n, d)
    # with the alpha of other draws, so only near the known value
    assert theorem1_bound(alpha, 10**6, n, d) == pytest.approx(known, rel=0.35)
    assert found.gap[:, 40:].mean().item() < known / 4


def test_theorem_1_says_nothing_from_a_diagonal_start_and_still_holds() -> None:
    n, d = 4, 256
    found = chain_trace(bn_chain(diagonal_start(n, d).expand(20, n, d), 50, generator=seeded(5)))
    alpha = found.min_singular.min().item()
    assert theorem1_bound(alpha, 49, n, d) > gap_bounds(n, d).high
    assert found.gap[:, 49].mean().item() <= theorem1_bound(alpha, 49, n, d)


def test_the_bounds_have_their_closed_forms_and_thresholds() -> None:
    assert theorem1_bound(0.5, 3, 4, 256) == pytest.approx(2 * (2 / 3) ** 3 + 12 / (0.5 * 16), rel=1e-14)
    assert corollary3_bound(0.5, 3, 4, 256) == pytest.approx(16 * (2 / 3) ** 3 + 96 / (0.5 * 16), rel=1e-14)
    for n, threshold in ((2, 144), (4, 768), (8, 5267), (16, 39322), (32, 304426)):
        cap = gap_bounds(n, n).high
        assert theorem1_bound(n**-0.5, 10**6, n, threshold + 1) < cap
        assert theorem1_bound(n**-0.5, 10**6, n, threshold - 1) > cap
    trivial = 2 * (1 - 1 / math.sqrt(2))
    assert corollary3_bound(2**-0.5, 10**6, 2, 3400) < trivial < corollary3_bound(2**-0.5, 10**6, 2, 3300)


@pytest.mark.parametrize("d", [32, 512])
def test_the_distance_to_a_gaussian_is_below_the_lemma_and_near_its_known_values(d: int) -> None:
    n = 4
    start = diagonal_start(n, d).expand(64, n, d)
    deep = list(islice(bn_chain(start, 50, generator=seeded(6)), 40, None))
    gaps, distances = [], []
    for h in torch.cat(deep):
        gap, distance = orthogonality_gap(h).item(), gaussian_w2_squared(h).item()
        assert distance <= n * gap**2 <= 2 * n * gap
        gaps.append(gap)
        distances.append(distance)
    quarter = 4 * torch.tensor(gaps, dtype=DOUBLE).square().mean().item() / 4  # n V^2 / 4, for small gaps
    mean = sum(distances) / len(distances)
    assert mean == pytest.approx(quarter, rel=0.2 if d == 32 else 0.02)
    if d == 512:  # one draw of a narrow chain says less
        assert mean == pytest.approx(0.00274, rel=0.12)
        assert 2 * n * sum(gaps) / len(gaps) == pytest.approx(0.419, rel=0.12)


def test_the_distance_of_rank_one_is_the_largest() -> None:
    h = nearly_parallel_start(4, 32, tilt=0)
    assert gaussian_w2_squared(h).item() == pytest.approx(1, abs=1e-14)
    assert 4 * orthogonality_gap(h).item() ** 2 == pytest.approx(3, abs=1e-13)
    assert 8 * orthogonality_gap(h).item() == pytest.approx(6.93, abs=2e-3)


def test_the_distance_is_what_the_optimal_coupling_gives() -> None:
    n, d = 5, 24
    h = gaussian_samples(n, d, 7)
    h = h / h.norm()
    u, s, vh = torch.linalg.svd(h.T, full_matrices=False)  # the paper's H
    noise = torch.randn(4000, d, d, dtype=DOUBLE, generator=seeded(8)) / math.sqrt(d)
    pushed = noise @ u  # W U, Gaussian, shared by both
    apart = (pushed * s @ vh - pushed @ vh / math.sqrt(n)).square().sum((1, 2))
    exact = gaussian_w2_squared(h).item()
    assert apart.mean().item() == pytest.approx(exact, abs=4 * apart.std().item() / math.sqrt(len(apart)))
    # no coupling does better than the distance of the two Gaussians: another one
    other = (noise @ h.T - noise[:, :, :n] / math.sqrt(n)).square().sum((1, 2))
    assert other.mean().item() > exact


@pytest.mark.parametrize(("n", "d"), [(4, 9), (9, 4), (6, 6)])
def test_the_distance_is_its_closed_form_on_both_sides_at_any_scale(n: int, d: int) -> None:
    h = gaussian_samples(n, d)
    s = torch.linalg.svdvals(h / h.norm())
    closed = (2 * (1 - s.sum() / math.sqrt(n))).item()
    for scale in (1.0, 1e-150, 1e150):
        assert gaussian_w2_squared(h * scale).item() == pytest.approx(closed, rel=1e-12)
    assert gaussian_w2_squared(h.T, vectors="cols").item() == pytest.approx(closed, rel=1e-12)
    if n <= d:
        assert singular_value_gap(h).square().item() == pytest.approx(closed, rel=1e-10)


def test_a_small_distance_keeps_its_digits() -> None:
    # singular values 1 + e, 1 - e and 1: 2 e^2 / 4 + O(e^4) over 4, where 2 (1 - sum) would leave none
    for e in (1e-5, 1e-9):
        s = torch.tensor([1 + e, 1 - e, 1, 1], dtype=DOUBLE)
        h = rotation(4)[:4] * s @ rotation(4, seed=1)
        assert gaussian_w2_squared(h.T).item() == pytest.approx(e**2 / 2, rel=1e-5 if e > 1e-8 else 1e-3)


@pytest.mark.parametrize("matrix", [torch.zeros(3, 4), torch.ones(0, 4), torch.ones(4, 0)], ids=str)
def test_nothing_has_no_distance(matrix: Tensor) -> None:
    assert math.isnan(gaussian_w2_squared(matrix).item())


def test_one_bad_head_spares_the_others() -> None:
    x = torch.eye(4)
    x[0, 0] = math.inf
    first, second = gaussian_w2_squared(x, vectors="heads", heads=2).tolist()
    assert math.isnan(first)
    assert second == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("n", "d"), [(8, 40), (40, 8), (12, 12), (2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_samples_have_the_gap_that_was_asked_for(n: int, d: int, share: float) -> None:
    low, high = gap_bounds(n, d)
    gap = low + share * (high - low)
    h = samples_with_gap(n, d, gap, generator=seeded(9))
    assert h.shape == (n, d)
    assert h.norm().item() == pytest.approx(1, rel=1e-12)
    assert orthogonality_gap(h).item() == pytest.approx(gap, abs=1e-12)
    assert torch.equal(h, samples_with_gap(n, d, gap, generator=seeded(9)))


def test_samples_of_the_public_code_scale_one_coordinate() -> None:
    n, d = 4000, 10
    spread = samples_with_gap(n, d, 0.4, exact=False, generator=seeded(10)).norm(dim=0)
    first, *others = sorted(spread.tolist(), reverse=True)
    assert first / others[0] == pytest.approx((0.1 + 0.4) / (0.1 - 0.4 / 9), rel=0.05)
    gaps = [
        orthogonality_gap(samples_with_gap(30, d, g, exact=False, generator=seeded(11))).item()
        for g in (0.0, 0.3, 0.6, 0.9)
    ]
    assert gaps == sorted(gaps)
    assert gaps[-1] == pytest.approx(gap_bounds(30, d).high, abs=1e-12)  # the other coordinates are 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gap_bounds(0, 3), "n needs a positive integer, got 0"),
        (lambda: gap_bounds(3, True), "d needs a positive integer, got True"),
        (lambda: stationary_gap(1, 4, center=True), "at least 2 samples with center=True"),
        (lambda: theorem1_bound(0.8, 3, 4, 64), r"alpha needs a number in \(0, 1 / sqrt\(n\)\], here up to 0.5"),
        (lambda: theorem1_bound(0.3, -1, 4, 64), "layers needs an integer of at least 0"),
        (lambda: corollary3_bound(0.3, 2, 4, 3), "d needs a width of at least the 4 samples, got 3"),
        (lambda: samples_with_gap(4, 9, 0.9), "gap needs a number from 0 to 0.866025"),
        (lambda: samples_with_gap(9, 4, 0.1), "gap needs a number from 0.372678"),
        (lambda: samples_with_gap(9, 4, 0.8, exact=False), "from 0 to 1 - 1 / d = 0.75"),
    ],
)  # fmt: skip
def test_what_is_outside_its_range_is_refused_in_one_sentence(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]

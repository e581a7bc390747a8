"""Random networks: laws that hold exactly, the published figures at small size, and two ways to draw the same law."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.metrics import (
    bn_chain,
    chain_trace,
    diagonal_start,
    gram_fluctuation,
    isotropic_baseline,
    nearly_parallel_start,
    orthogonality_gap,
    pii,
    samples_with_gap,
    vanilla_chain,
    whitened,
)
from orthofast.metrics.chains import batch_normalized

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Many small decompositions: threads would wait for each other more than they work."""
    torch.set_num_threads(1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_samples(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=seeded(0))


@pytest.mark.parametrize(("n", "d"), [(4, 32), (3, 3), (9, 5), (1, 8)])
@pytest.mark.parametrize("draw_weights", [False, True])
def test_states_have_norm_1_and_features_of_equal_length(n: int, d: int, draw_weights: bool) -> None:
    for h in bn_chain(gaussian_samples(n, d), 5, draw_weights=draw_weights, generator=seeded(1)):
        assert h.shape == (n, d)
        assert h.norm().item() == pytest.approx(1, abs=1e-14)
        torch.testing.assert_close(h.norm(dim=0), torch.full((d,), d**-0.5, dtype=DOUBLE), rtol=1e-13, atol=0)


def test_centred_normalisation_is_torch_s_batch_norm_up_to_scale() -> None:
    h = gaussian_samples(12, 7) + 3
    norm = nn.BatchNorm1d(7, eps=1e-300, affine=False, dtype=DOUBLE)
    expected = norm(h) / math.sqrt(12 * 7)  # torch's features have length sqrt(n)
    torch.testing.assert_close(batch_normalized(h, center=True), expected, rtol=1e-12, atol=1e-15)
    plain = h / h.norm(dim=0) / math.sqrt(7)
    torch.testing.assert_close(batch_normalized(h), plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(batch_normalized(h * 1e-200), plain, rtol=1e-13, atol=0)
    h[:, 2] = 0
    assert batch_normalized(h)[:, 2].tolist() == [0] * 12


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["linear", "tanh"])
def test_both_ways_of_drawing_a_layer_have_the_same_law(center: bool, activation: Callable[[Tensor], Tensor]) -> None:
    start = gaussian_samples(3, 10).expand(6000, 3, 10)
    products = []
    for draw_weights in (False, True):
        options = {"center": center, "activation": activation, "feature_norm": 2.0, "draw_weights": draw_weights}
        *_, h = bn_chain(start, 2, generator=seeded(5 + draw_weights), **options)
        products.append((h @ h.mT).flatten(1))
    first, second = products
    for one, other in ((first, second), (first.square(), second.square())):
        error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4.5 * error + 1e-12).all()


def test_figure_1_batch_norm_parts_samples_and_vanilla_layers_align_them() -> None:
    runs = 100
    close = nearly_parallel_start(2, 32).expand(runs, 2, 32)
    parted = chain_trace(bn_chain(close, 50, generator=seeded(2))).pii.mean(0)
    known = {2: 0.991, 4: 0.654, 6: 0.224, 9: 0.149}  # state: mean |cos| over other runs
    assert pii(close[0]).item() > 0.999
    assert parted[1].item() == pytest.approx(known[2], abs=0.02)
    assert 0.4 < parted[3].item() < 0.85
    assert parted[20:].mean().item() == pytest.approx(0.114, abs=0.01)
    assert parted[20:].mean().item() < isotropic_baseline(32)
    apart = torch.eye(2, 32, dtype=DOUBLE).expand(runs, 2, 32)
    aligned = chain_trace(vanilla_chain(apart, 200, generator=seeded(3)))
    assert aligned.pii[:, 0].mean().item() == pytest.approx(isotropic_baseline(32), abs=0.06)
    assert aligned.pii[:, 49].mean().item() == pytest.approx(0.68, abs=0.12)
    assert aligned.pii[:, 199].median().item() > 0.97
    assert aligned.gap[:, 199].median().item() > 0.97 * math.sqrt(1 / 2)


@pytest.mark.parametrize(("d", "plateau"), [(32, -1.624), (512, -2.985)])
def test_figure_2a_the_gap_falls_exponentially_to_a_plateau(d: int, plateau: float) -> None:
    start = diagonal_start(4, d).expand(20, 4, d)
    log_gap = chain_trace(bn_chain(start, 50, generator=seeded(4))).gap.log().mean(0)
    assert log_gap[0].item() == pytest.approx(math.log(math.sqrt(3 / 4)), abs=1e-4)
    slope = (log_gap[11] - log_gap[4]).item() / 7
    assert -0.35 < slope < -0.07
    assert log_gap[30:].mean().item() == pytest.approx(plateau, abs=0.06)


def test_figure_2b_the_plateau_falls_with_the_root_of_the_width() -> None:
    known = {16: 0.2947, 32: 0.2016, 64: 0.1415, 128: 0.0992, 256: 0.0698}
    levels = {
        d: chain_trace(
            islice(bn_chain(diagonal_start(4, d, rest=0.1).expand(12, 4, d), 110, generator=seeded(6)), 30, None)
        )
        .gap.mean()
        .item()
        for d in known
    }
    for d, value in known.items():
        assert levels[d] == pytest.approx(value, rel=0.06)
    widths = torch.tensor(list(levels), dtype=DOUBLE).log()
    logs = torch.tensor(list(levels.values()), dtype=DOUBLE).log()
    slope = ((widths - widths.mean()) * (logs - logs.mean())).sum() / (widths - widths.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.518, abs=0.04)


def test_assumption_a1_holds_in_wide_chains_and_fails_in_narrow_ones() -> None:
    def holds(n: int, d: int) -> bool:
        start = torch.randn(3, n, d, dtype=DOUBLE, generator=seeded(7))
        alpha = chain_trace([start]).min_singular[:, 0]
        found = chain_trace(bn_chain(start, 150, generator=seeded(8))).min_singular
        assert (found <= n**-0.5 + 1e-12).all()
        return bool((found >= 0.1 * alpha[:, None]).all())

    assert holds(16, 256)
    assert not holds(16, 20)


def test_a_start_of_rank_one_stays_of_rank_one() -> None:
    found = chain_trace(bn_chain(nearly_parallel_start(4, 16, tilt=0), 8, generator=seeded(9)))
    torch.testing.assert_close(found.gap, torch.full((8,), math.sqrt(3 / 4), dtype=DOUBLE), rtol=1e-9, atol=0)
    assert found.gap[0].log().item() == pytest.approx(-0.1438, abs=5e-5)
    assert found.min_singular.max().item() < 1e-9
    assert found.pii.min().item() > 1 - 1e-9


def test_states_of_many_layers_stay_in_range_without_normalisation() -> None:
    *_, last = vanilla_chain(gaussian_samples(2, 40), 1500, activation=torch.relu, generator=seeded(10))
    assert last.norm().item() == pytest.approx(1, abs=1e-14)
    assert orthogonality_gap(last).item() == pytest.approx(math.sqrt(1 / 2), abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "slope", "off_diagonal"),
    [(lambda h: torch.tanh(h) + 1, -0.43, 0.80), (torch.relu, -0.55, 0.30), (torch.tanh, -0.53, 0.0), (None, -0.5, 0)],
    ids=["tanh+1", "relu", "tanh", "linear"],
)
def test_non_linear_chains_settle_at_a_fixed_angle(
    activation: Callable[[Tensor], Tensor], slope: float, off_diagonal: float
) -> None:
    found = {}
    for d in (32, 512):
        start = gaussian_samples(4, d).expand(8, 4, d)
        chain = bn_chain(start, 160, activation=activation, generator=seeded(11))
        found[d] = gram_fluctuation(islice(chain, 40, None))
    ratio = found[512].distance.mean().item() / found[32].distance.mean().item()
    assert math.log(ratio) / math.log(16) == pytest.approx(slope, abs=0.12)
    mean = found[512].mean.mean(0) * 4
    assert mean.diagonal().tolist() == pytest.approx([1] * 4, abs=0.05)
    assert mean[0, 1].item() == pytest.approx(off_diagonal, abs=0.05)


def test_a_network_whose_neurons_are_all_dead_has_no_gap() -> None:
    *_, last = vanilla_chain(gaussian_samples(2, 1), 60, activation=torch.relu, generator=seeded(10))
    assert last.tolist() == [[0], [0]]
    assert math.isnan(chain_trace([last]).gap.item())


def test_traces_take_any_states_and_agree_with_the_measures() -> None:
    states = [gaussian_samples(5, 9), 3 * gaussian_samples(5, 2)]  # layers of a network: of any widths
    found = chain_trace(states)
    assert found.gap.shape == found.pii.shape == (2,)
    for index, h in enumerate(states):
        assert found.gap[index].item() == pytest.approx(orthogonality_gap(h).item(), rel=1e-12)
        assert found.pii[index].item() == pytest.approx(pii(h).item(), rel=1e-12)
        s = torch.linalg.svdvals(h / h.norm())
        assert found.min_singular[index].item() == pytest.approx(s[-1].item(), rel=1e-12)
    assert chain_trace([gaussian_samples(6, 5, 9)]).gap.shape == (6, 1)


def test_runs_of_one_call_are_independent_and_repeatable() -> None:
    start = gaussian_samples(3, 8).expand(2, 3, 8)
    first, again = (chain_trace(bn_chain(start, 4, generator=seeded(12))).gap for _ in range(2))
    assert torch.equal(first, again)
    assert (first[0] != first[1]).all()


@pytest.mark.parametrize(("n", "d"), [(5, 20), (20, 5), (6, 6)])
def test_whitening_makes_what_batch_norm_approximates(n: int, d: int) -> None:
    h = gaussian_samples(n, d)
    made = whitened(h)
    s = torch.linalg.svdvals(made)
    torch.testing.assert_close(s, torch.full_like(s, min(n, d) ** -0.5), rtol=1e-12, atol=0)
    assert orthogonality_gap(made).item() == pytest.approx(math.sqrt(max(0, 1 / d - 1 / n)), abs=1e-13)
    if n < d:  # (H H^T)^(-1/2) H by its definition, on the range of H H^T
        energies, directions = torch.linalg.eigh(h.T @ h)
        kept = energies > 1e-9
        power = torch.where(kept, energies, 1.0) ** -0.5 * kept
        torch.testing.assert_close(made, h @ directions * power @ directions.T / math.sqrt(n), rtol=1e-9, atol=1e-12)
    flat = whitened(gaussian_samples(n, 2) @ gaussian_samples(2, d))  # rank 2: the rest is rounding, not signal
    assert torch.linalg.svdvals(flat).tolist()[:2] == pytest.approx([2**-0.5] * 2, rel=1e-12)
    assert torch.linalg.svdvals(flat)[2:].max().item() < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn_chain(torch.ones(3), 2), r"start needs shape \(n, d\) or \(runs, n, d\)"),
        (lambda: bn_chain(torch.zeros(3, 4), 2), "start needs finite values, not all 0"),
        (lambda: bn_chain(torch.ones(0, 4), 2), "start needs finite values, not all 0"),
        (lambda: bn_chain(torch.ones(3, 4), 0), "layers needs a positive integer, got 0"),
        (lambda: bn_chain(torch.ones(3, 4), 2, feature_norm=0), "feature_norm needs a positive number"),
        (lambda: bn_chain(torch.ones(3, 4, dtype=torch.int32), 2), "start needs a floating-point dtype"),
        (lambda: vanilla_chain(torch.ones(3, 4), 2, activation=torch.tanh), r"activation needs f\(2 h\) = 2 f\(h\)"),
        (lambda: chain_trace([]), "states needs at least one state"),
        (lambda: chain_trace([torch.ones(3)]), r"states\[0\] needs shape"),
        (lambda: chain_trace([torch.ones(2, 3), torch.ones(1, 2, 3)]), r"states\[1\] needs runs \(\) as the first"),
        (lambda: gram_fluctuation([]), "states needs at least one state"),
        (lambda: whitened(torch.ones(3, 4, dtype=torch.int64)), r"h needs a floating-point tensor \(..., n, d\)"),
        (lambda: samples_with_gap(4, 8, "small"), "gap needs a number, got 'small'"),  # type: ignore[arg-type]
        (lambda: diagonal_start(5, 4), "n needs at most d = 4 samples"),
        (lambda: nearly_parallel_start(5, 4), "n needs at most d = 4 samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_at_the_call(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

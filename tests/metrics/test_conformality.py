"""What one step of an optimiser, a translation and a low-rank update do to the angles between a weight's vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthofast.metrics import conformal_drift, isotropic_baseline, pii

DOUBLE = torch.float64


def after_one_step(optimizer: type[torch.optim.Optimizer], lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight before, its gradient, and the weight after one step."""
    layer = nn.Linear(7, 5, bias=False).double()
    before = layer.weight.detach().clone()
    layer(torch.randn(9, 7, dtype=DOUBLE)).square().mean().backward()
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.clone()
    optimizer(layer.parameters(), lr=lr).step()
    return before, gradient, layer.weight.detach()


def differences(rows: Tensor) -> Tensor:
    return rows[:, None] - rows[None]


def test_a_step_of_sgd_moves_differences_by_the_rate_times_those_of_the_gradients() -> None:
    before, gradient, after = after_one_step(torch.optim.SGD, 0.3)
    moved = (differences(after) - differences(before)).norm(dim=2)
    torch.testing.assert_close(moved, 0.3 * differences(gradient).norm(dim=2), rtol=1e-12, atol=1e-15)


def test_the_first_step_of_adam_has_one_length_in_every_coordinate() -> None:
    before, gradient, after = after_one_step(torch.optim.Adam, 1e-3)
    torch.testing.assert_close(after - before, -1e-3 * gradient.sign(), rtol=1e-4, atol=0)


def test_a_common_translation_does_not_keep_an_angle() -> None:
    before = torch.eye(2, dtype=DOUBLE)
    after = before + 1  # of equal gradients, whatever the optimiser
    assert conformal_drift(before, after).signed.item() == pytest.approx(0.8, abs=1e-15)
    scaled = conformal_drift(before + 1, 3 * (before + 1))
    assert scaled.absolute.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("rank", "level"), [(4, 0.4246), (8, 0.2909)])
def test_a_low_rank_update_alone_has_the_baseline_of_its_rank(rank: int, level: float) -> None:
    update = torch.randn(512, rank, dtype=DOUBLE) @ torch.randn(rank, 512, dtype=DOUBLE)
    assert isotropic_baseline(rank) == pytest.approx(level, abs=2e-4)
    for vectors in ("rows", "cols"):
        assert pii(update, vectors=vectors).item() == pytest.approx(level, abs=0.012)


def test_a_merged_adapter_keeps_the_index_because_it_is_small() -> None:
    weight = torch.randn(512, 512, dtype=DOUBLE)
    update = torch.randn(512, 8, dtype=DOUBLE) @ torch.randn(8, 512, dtype=DOUBLE)
    update *= weight.norm() / update.norm()
    start = pii(weight).item()
    known = {0.01: 0.03526, 0.03: 0.03526, 0.1: 0.03535, 0.3: 0.0418, 1.0: 0.138}
    for share, value in known.items():
        assert pii(weight + share * update).item() == pytest.approx(value, rel=0.04)
    assert pii(weight + 0.03 * update).item() == pytest.approx(start, rel=2e-3)

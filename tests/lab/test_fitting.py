"""The plain training loop: optimisers by name with torch's own settings, seeded batches, a loss that is lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from orthofast.errors import InputError
from orthofast.lab.data import Images
from orthofast.lab.fitting import accuracy, batches, fit, optimizer_for


def halves(count: int = 40) -> Images:
    labels = torch.arange(count) % 2
    inputs = torch.stack([labels.float(), 1 - labels.float()], 1)
    return Images("halves", inputs, labels, inputs, labels, 2)


@pytest.mark.parametrize(
    ("name", "momentum", "decay"),
    [("sgd", 0, 0), ("momentum", 0.9, 0), ("adam", None, 0), ("adamw", None, 0.01), ("rmsprop", 0, 0)],
)
def test_an_optimizer_has_torchs_own_settings(name: str, momentum: float | None, decay: float) -> None:
    (group,) = optimizer_for(nn.Linear(2, 2), name, 0.3).param_groups
    assert group["lr"] == 0.3
    assert group["weight_decay"] == decay
    assert group.get("momentum") == momentum
    (group,) = optimizer_for(nn.Linear(2, 2), name, 0.3, weight_decay=0.5).param_groups
    assert group["weight_decay"] == 0.5


def test_adamw_is_not_adam() -> None:
    ends = []
    for name in ("adam", "adamw"):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        fit(model, halves(), optimizer_for(model, name, 0.01), steps=20, batch=10, seed=0)
        ends.append(model.weight.detach().clone())
    assert 1e-5 < (ends[0] - ends[1]).abs().max() < 0.05


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer needs one of sgd, momentum, adam, adamw, rmsprop, got 'lion'"):
        optimizer_for(nn.Linear(2, 2), "lion", 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = optimizer_for(model, "adam", 0.1).param_groups
    assert [tuple(one.shape) for one in group["params"]] == [(2, 2)]


def test_an_epoch_gives_every_image_once_and_the_next_in_another_order() -> None:
    data = halves(20)
    data.train[:, 0] = torch.arange(20)
    drawn = [inputs[:, 0].tolist() for inputs, _ in batches(data, 10, 4, seed=3)]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(20))
    assert drawn[:2] != drawn[2:]
    assert drawn == [inputs[:, 0].tolist() for inputs, _ in batches(data, 10, 4, seed=3)]
    with pytest.raises(InputError, match="batches need at most the 20 training images, got a size of 21"):
        next(batches(data, 21, 1, seed=0))


def test_training_learns_and_stops_where_the_loss_is_lost() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    losses = fit(model, halves(), optimizer_for(model, "sgd", 1.0), steps=30, batch=10, seed=0)
    assert losses[-1] < 0.1 < losses[0]
    assert accuracy(model, halves()) == 1
    with torch.no_grad():
        model.weight.fill_(math.inf)
    lost = fit(model, halves(), optimizer_for(model, "sgd", 1.0), steps=5, batch=10, seed=0)
    assert len(lost) == 5
    assert all(map(math.isnan, lost))


def test_accuracy_sees_some_images_at_a_time_unless_they_share_statistics() -> None:
    sizes: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return x.flip(1) * torch.arange(1, len(x) + 1)[:, None]

    data = halves(1100)
    assert accuracy(Counted(), data) == 1
    assert sizes == [500, 500, 100]
    sizes.clear()
    assert accuracy(Counted(), data, batch_statistics=True) == 1
    assert sizes == [1100]

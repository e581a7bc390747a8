"""Networks trained by a plain loop: seeded batches, optimisers by name, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orthofast.errors import InputError
from orthofast.lab.data import Images

TESTED = 500  # images at a time, which bounds what a deep network keeps
KINDS: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def optimizer_for(
    model: nn.Module, name: str, rate: float, *, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """An optimiser by name: "sgd", "momentum" (0.9), "adam", "adamw" or "rmsprop".

    Args:
        model: whose trainable parameters it has.
        name: of the optimiser.
        rate: its learning rate.
        weight_decay: None takes torch's own, which is 0.01 of AdamW (with 0 it is Adam) and 0 of the others.

    Raises:
        InputError: if the name is not known.
    """
    if name not in KINDS:
        raise InputError(f"optimizer needs one of {', '.join(KINDS)}, got {name!r}")
    kind, more = KINDS[name]
    if weight_decay is not None:
        more = more | {"weight_decay": weight_decay}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: torch.optim.Optimizer = kind(parameters, lr=rate, **more)
    return made


def batches(data: Images, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many (inputs, labels): every epoch in a new order, its last batch dropped if it is smaller.

    Raises:
        InputError: if a batch is larger than the training set.
    """
    count = len(data.train)
    if size > count:
        raise InputError(f"batches need at most the {count} training images, got a size of {size}")
    generator = torch.Generator().manual_seed(seed)
    given = 0
    while given < steps:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            if given == steps:
                return
            rows = order[start : start + size].to(data.train.device)
            given += 1
            yield data.train[rows], data.train_labels[rows]


def fit(
    model: nn.Module,
    data: Images,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    after: Callable[[int, float, Tensor], None] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> list[float]:
    """Train by cross-entropy, in train mode.

    Args:
        model: trained in place.
        data: whose training images are used.
        optimizer: of its parameters.
        steps: updates.
        batch: images of one.
        seed: of their order.
        after: called after each update with (steps done, loss before it, outputs before it).
        penalty: added to the loss.

    Returns:
        The loss before each update; NaN from where it was not finite, when training stops.
    """
    model.train()
    losses: list[float] = []
    for step, (inputs, labels) in enumerate(batches(data, batch, steps, seed), start=1):
        optimizer.zero_grad(set_to_none=True)
        outputs = model(inputs)
        loss = functional.cross_entropy(outputs, labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses + [math.nan] * (steps - step)
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
        if after is not None:
            after(step, losses[-1], outputs.detach())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, *, batch_statistics: bool = False) -> float:
    """Fraction of the test images whose class is found.

    Args:
        model: its mode is left as it was.
        data: whose test images are used.
        batch_statistics: keep batch norms in train mode, as code without ``eval()`` does, all images in one batch;
            running statistics change.
    """
    before = model.training
    model.train(batch_statistics)
    parts = [data.test] if batch_statistics else data.test.split(TESTED)
    found = torch.cat([model(part).argmax(1) for part in parts])
    model.train(before)
    return float((found == data.test_labels).double().mean().item())

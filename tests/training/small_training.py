"""A small training, monitored: what the monitor's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orthofast.training import Monitor
from orthofast.training.rows import Row


class Rows:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed = False

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True

    @property
    def steps(self) -> list[int]:
        return [row.step for row in self.rows]


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def train(
    model: nn.Module,
    steps: int,
    after: Callable[[int], object] = lambda step: None,
    *,
    before: Callable[[int], object] = lambda step: None,
    start: int = 0,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Plain SGD; the data of a step depend on its number alone."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(start + 1, start + steps + 1):
        before(step)
        x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step))
        (forward or model)(x).square().mean().backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def monitored(model: nn.Module, steps: int, **given: Any) -> tuple[Rows, Monitor]:
    rows = Rows()
    given = {"every_n_steps": 2, "overhead": None, "worst_k": None, "log": rows, **given}
    monitor = Monitor(model, **given)
    train(model, steps, lambda step: monitor.step())
    return rows, monitor


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

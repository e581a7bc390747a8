"""What every rank claims about covariances of models trained on several ranks: those of all rows in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from orthofast.errors import InputError
from orthofast.training.analysis import conditioning
from orthofast.training.covariance import SecondMoment, TriangularFactor, merge_over_ranks
from orthofast.training.factors import Factors
from orthofast.training.report import Report
from orthofast.training.tracker import CovarianceTracker
from tests.distributed.claims import line

ROWS = 6  # of each rank and batch


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).double()


def all_batches() -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(2)
    n = ROWS * dist.get_world_size()
    return [
        (torch.randn(n, 10, generator=made, dtype=torch.float64), torch.randint(4, (n,), generator=made))
        for _ in range(2)
    ]


def my_part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rows = slice(ROWS * dist.get_rank(), ROWS * (dist.get_rank() + 1))
    return batch[0][rows], batch[1][rows]


def wrapped(kind: str) -> nn.Module:
    model = network()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=line())
    return model


def assert_same(got: Report, true: Report) -> None:
    assert got.n == true.n
    for name, row in true.layers.items():
        other: Any = got.layers[name]
        assert (other.n, other.terms, other.resolved_rank_x) == (row.n, row.terms, row.resolved_rank_x)
        for side in ("spectrum_x", "spectrum_g"):
            torch.testing.assert_close(getattr(other, side), getattr(row, side), rtol=1e-9, atol=1e-14)


def a_pass_over_all_ranks_is_that_of_one_process(kind: str, labels: str) -> list[list[float]]:
    """And a training step goes on afterwards as if nothing had been."""
    data = all_batches()
    true = conditioning(network(), data, loss="cross_entropy", labels=labels)
    model = wrapped(kind)
    got = conditioning(model, [my_part(batch) for batch in data], loss="cross_entropy", labels=labels)
    assert_same(got, true)
    assert [row.dead for row in got.layers.values()] == [row.dead for row in true.layers.values()]
    assert [row.full for row in got.layers.values()] == [row.full for row in true.layers.values()]
    if kind == "ddp":
        assert got.layers["0"].weight_domination is not None
    for batch in data:
        functional.cross_entropy(model(my_part(batch)[0]), my_part(batch)[1]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [[row.lambda_max_x, row.lambda_max_g, row.kappa_F[0.5]] for row in got.layers.values()]


def a_ride_over_all_ranks_is_that_of_one_process(kind: str) -> list[list[float]]:
    """Read twice, with a step in between: reading adds nothing up for good."""
    data = all_batches()
    model = wrapped(kind)
    alone = network()
    reports = []
    for tracked, batches in ((alone, data), (model, [my_part(batch) for batch in data])):
        tracker = CovarianceTracker(tracked, factors=Factors(method="gram"))
        for x, y in batches:
            with tracker:
                functional.cross_entropy(tracked(x), y).backward()
            reports.append(tracker.report())
        tracker.close()
    first, second = reports[:2], reports[2:]
    for got, true in zip(second, first, strict=True):
        assert_same(got, true)
    return [[row.lambda_max_x, row.lambda_max_g] for row in second[1].layers.values()]


def moments_are_joined_in_the_order_of_ranks(method: str) -> list[float]:
    made = torch.Generator().manual_seed(3)
    parts = [torch.randn(4 + rank, 5, generator=made, dtype=torch.float64) for rank in range(dist.get_world_size())]
    kind = TriangularFactor if method == "qr" else SecondMoment
    mine, empty, whole = kind(5), kind(3), kind(5)
    mine.update(parts[dist.get_rank()])
    for rows in parts:
        whole.update(rows)
    merge_over_ranks([mine, empty])
    assert (mine.n, mine.count) == (whole.n, whole.count)
    torch.testing.assert_close(mine.compute(), whole.compute(), rtol=1e-12, atol=1e-14)
    assert empty.n == 0
    found: list[float] = mine.compute().flatten().tolist()
    return found


def tensor_parallel_layers_are_refused() -> str:
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 6))
    parallelize_module(model, line(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    try:
        conditioning(model, [torch.randn(5, 10)], loss="mse", labels="mc")
    except InputError as error:
        return str(error)
    return "nothing"

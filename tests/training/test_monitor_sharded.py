"""A model sharded over processes logs the numbers of one process, on rank 0, on the same steps everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from orthofast.training import Monitor
from orthofast.training.measures import MEASURES
from tests.distributed.ranks import Ranks

METRICS = tuple(MEASURES)
Rows = list[tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 2))  # of 2 rows, the third rank has none


def logged(model: nn.Module, data: Tensor, **given: Any) -> tuple[Rows, Monitor]:
    rows: Rows = []
    settings = {"every_n_steps": 2, "metrics": METRICS, "worst_k": None, "overhead": None, **given}
    monitor = Monitor(model, log=lambda values, step: rows.append((step, values)), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="orthofast")
        for _ in range(5):
            model(data).square().mean().backward()
            optimizer.step()
            monitor.step()
            optimizer.zero_grad()
    monitor.close()
    return rows, monitor


def sharded_numbers_are_those_of_one_process() -> list[int]:
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))  # the same on every rank
    alone, _ = logged(network(), data)
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    shared, _ = logged(model, data)
    if dist.get_rank() == 0:
        assert [step for step, _ in shared] == [2, 4]
        for (_, one), (_, many) in zip(alone, shared, strict=True):
            assert one.keys() == many.keys()
            for key, value in one.items():
                if "overhead" not in key:
                    assert many[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    return [step for step, _ in shared]


def all_stretch_alike() -> int:
    """Only the last rank measures dearly; all must be due on the same steps, or they would wait for each other."""
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    monitor = Monitor(model, every_n_steps=2, metrics=("pii",), log=[], overhead=0.5)
    dear = dist.get_rank() == dist.get_world_size() - 1
    schedule, due = monitor._schedule, []
    schedule.settle = lambda own_s, training_s, steps: 8 if dear else 2  # type: ignore[method-assign]
    for step in range(1, 40):
        last = schedule.state_dict()["last"]
        monitor.step(step)
        if schedule.state_dict()["last"] != last:
            due.append(step)
    assert due[-1] - due[-2] == 8, due
    return hash(tuple(due))


def test_numbers_of_shards_are_those_of_one_process_and_rank_0_logs(ranks: Ranks) -> None:
    assert ranks(sharded_numbers_are_those_of_one_process) == [[2, 4], [], []]


def test_all_processes_stretch_to_the_longest_interval_any_wants(ranks: Ranks) -> None:
    assert len(set(ranks(all_stretch_alike))) == 1

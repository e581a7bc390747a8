"""FSDP2 with PII as a penalty: run with `torchrun --nproc-per-node 2 docs/examples/sharded_training.py`.

Each rank holds a share of every weight and of every batch. The last line compares with one process that holds all.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import orthofast

STEPS, STRENGTH = 5, 1.0


def spread(model: nn.Sequential) -> Tensor:
    """PII of the rows of both weights; every rank makes this call, and every rank gets the same number."""
    return orthofast.pii(model[0].weight) + orthofast.pii(model[2].weight)


def train(model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The penalty before each step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    seen = []
    for inputs, targets in batches:
        penalty = spread(model)
        loss = functional.mse_loss(model(inputs), targets) + STRENGTH * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(penalty.item())
    return seen


def main() -> None:
    """Train sharded, then alone, and print what both saw."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks,))

    torch.manual_seed(0)  # the same model and data on every rank
    model = nn.Sequential(nn.Linear(64, 257), nn.GELU(), nn.Linear(257, 32)).to(device)
    alone = copy.deepcopy(model)
    batches = [
        (torch.randn(8 * ranks, 64, device=device), torch.randn(8 * ranks, 32, device=device)) for _ in range(STEPS)
    ]
    mine = slice(8 * rank, 8 * rank + 8)

    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    sharded = train(model, [(inputs[mine], targets[mine]) for inputs, targets in batches])
    single = train(alone, batches)
    apart = max(abs(a - b) for a, b in zip(sharded, single, strict=True))
    if rank == 0:
        print(f"ranks: {ranks}   PII of both layers by step: {' '.join(f'{value:.5f}' for value in sharded)}")  # noqa: T201
        print(f"largest difference from one process: {apart:.1e}")  # noqa: T201
    dist.barrier()  # a rank that leaves early breaks off what another still receives
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

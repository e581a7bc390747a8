"""What every rank claims about models that are trained on several ranks, and about calls that go wrong."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import orthofast
from orthofast.distributed import merge_over_ranks
from orthofast.errors import BackendError, InputError
from orthofast.kernels import gram_stats, gram_stats_many
from tests.distributed.claims import EVERYTHING, ROUNDING, assert_plain, assert_same_record, line, matrix, split

STEPS, RATE, STRENGTH = 3, 0.5, 2.0


def network(hidden: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, 7)).double()


def penalty(model: nn.Sequential) -> Tensor:
    first, last = cast(Tensor, model[0].weight), cast(Tensor, model[2].weight)
    return orthofast.pii(first) + orthofast.pii(last, vectors="cols")


def trained(model: nn.Sequential, inputs: Tensor, targets: Tensor) -> list[float]:
    """A few steps of gradient descent; the penalty before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    seen = []
    for _ in range(STEPS):
        spread = penalty(model)
        loss = functional.mse_loss(model(inputs), targets) + STRENGTH * spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(spread.item())
    return seen


def sharded_training_is_that_of_one_process(kind: str) -> list[float]:
    """FSDP2 over all ranks, tensor parallel over all, or both on a mesh of two by two."""
    torch.manual_seed(2)
    batch = 4 * dist.get_world_size()
    inputs, targets = torch.randn(batch, 10).double(), torch.randn(batch, 7).double()
    hidden = 24 if "tensor" in kind else 23  # tensor parallel layers of torch need an even split
    alone, model = network(hidden), network(hidden)
    one = trained(alone, inputs, targets)
    if kind == "fsdp":
        mesh, part = line(), slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    elif kind == "tensor parallel":
        mesh, part = line(), slice(None)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "tensor"))
        half = batch // 2
        part = slice(half * (dist.get_rank() // 2), half * (dist.get_rank() // 2) + half)
    if "tensor" in kind:
        along = mesh["tensor"] if kind == "fsdp and tensor parallel" else mesh
        parallelize_module(model, along, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if kind != "tensor parallel":
        over = mesh["shards"] if kind == "fsdp and tensor parallel" else mesh
        # parameters stay sharded between calls, also those of the root
        fully_shard(model, mesh=over, reshard_after_forward=True)
    several = trained(model, inputs[part], targets[part])
    torch.testing.assert_close(torch.tensor(several), torch.tensor(one), rtol=1e-12, atol=0)
    for got, true in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.detach().full_tensor(), true.detach(), rtol=ROUNDING, atol=1e-12)
    return several


def every_mesh_measures_alike() -> None:
    """Four ranks as two by two, with every pair of placements; ranks in any order."""
    weight = matrix(21, 10)
    one, leaf = gram_stats(weight, want=EVERYTHING, bins=4), weight.clone().requires_grad_()
    orthofast.pii(leaf).backward()
    rank_order = init_device_mesh("cpu", (2, 2))
    mixed_order = DeviceMesh("cpu", [[3, 0], [1, 2]])
    kinds = (Shard(0), Shard(1), Replicate())
    for mesh in (rank_order, mixed_order):
        for placements in [(a, b) for a in kinds for b in kinds]:
            # split locally: torch scatters and gathers as if ranks were in order
            shards = distribute_tensor(weight, mesh, placements, src_data_rank=None).requires_grad_()
            assert_same_record(gram_stats(shards, want=EVERYTHING, bins=4), one)
            orthofast.pii(shards).backward()
            grad = shards.grad
            assert isinstance(grad, DTensor)
            assert grad.placements == placements
            true = distribute_tensor(cast(Tensor, leaf.grad), mesh, placements, src_data_rank=None)
            torch.testing.assert_close(grad.to_local(), true.to_local(), rtol=0, atol=1e-14)


def pending_sums_are_added_up() -> None:
    weight, ranks = matrix(11, 5), dist.get_world_size()
    shards = DTensor.from_local(weight * (dist.get_rank() + 1), line(), [Partial()])
    assert_same_record(
        gram_stats(shards, want=EVERYTHING), gram_stats(weight * (ranks * (ranks + 1) // 2), want=EVERYTHING)
    )


def lists_mix_sharded_and_whole_matrices() -> None:
    weights = [matrix(9, 4), matrix(12, 5)]
    got = gram_stats_many([split(weights[0], "rows"), weights[1]], want=EVERYTHING)
    for record, weight in zip(got, weights, strict=True):
        assert_same_record(record, gram_stats(weight, want=EVERYTHING))


def records_of_ranks_are_joined(nan: bool) -> list[list[float]]:
    """Two matrices per rank, other ones on each; the last rank has no data for the second."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def data(of: int) -> list[Tensor]:
        first, second = matrix(6 + of, 4), matrix(9, 3 + of)[: 0 if of == ranks - 1 else 9]
        if nan and of == 1:
            first[0, 0] = float("nan")
        return [first, second]

    want = ("abs_sum", "sq_sum", "sum", "abs_max")
    mine = [gram_stats(x, want=want, bins=5) for x in data(rank)]
    joined = merge_over_ranks(mine)
    for index, record in enumerate(joined):
        each = [gram_stats(data(of)[index], want=want, bins=5) for of in range(ranks)]
        assert_plain(record.pairs, cast(Tensor, record.abs_sum))
        assert torch.equal(record.pairs, sum(r.pairs for r in each))
        assert record.argmax is None
        assert record.norm_sq is None
        total = sum(cast(Tensor, r.abs_sum) for r in each)
        torch.testing.assert_close(record.abs_sum, total, rtol=1e-12, atol=0, equal_nan=True)
        if nan and index == 0:
            assert int(cast(Tensor, record.hist).sum()) == 0
        else:
            assert torch.equal(cast(Tensor, record.hist), sum(cast(Tensor, r.hist) for r in each))
            largest = torch.stack([cast(Tensor, r.abs_max) for r in each]).nan_to_num(0).amax(0)
            assert torch.equal(cast(Tensor, record.abs_max), largest)
    return [cast(Tensor, record.abs_sum).nan_to_num(-1).tolist() for record in joined]


def bad_calls_are_refused() -> list[str]:
    """Each before anything is sent: the next call still finds all ranks in step."""
    shards, said = split(matrix(8, 6), "rows"), []
    wrong = DTensor.from_local(
        torch.ones(dist.get_rank() + 5, 6), line(), [Shard(0)], run_check=False, shape=(8, 6), stride=(6, 1)
    )
    calls = [
        lambda: gram_stats(shards, shards),
        lambda: gram_stats(torch.ones(8, 6), shards),
        lambda: orthofast.pii(shards, sample=10),
        lambda: orthofast.pii(shards.detach().requires_grad_(), sample=10),
        lambda: gram_stats(shards, want="everything"),
        lambda: orthofast.pii(shards, precision="exact"),
        lambda: orthofast.pii(shards, backend="none"),
        lambda: orthofast.pii(split(matrix(9, 6), "rows"), vectors="heads", heads=3),
        lambda: orthofast.pii(wrong),
        lambda: gram_stats(
            shards.view(2, 4, 3, 2) if dist.get_world_size() == 2 else split(torch.ones(2, 2, 2, 2), "columns")
        ),
        lambda: merge_over_ranks([]),
        lambda: merge_over_ranks([gram_stats(torch.randn(40, 3), sample=20)]),
    ]
    for call in calls:
        try:
            call()
        except (InputError, BackendError) as error:
            said.append(str(error))
        else:
            said.append("nothing")
    orthofast.pii(shards)
    return said


def a_missing_rank_is_named(gradient: bool) -> str:
    """The last rank makes no call; the others wait for two seconds, not for ever."""
    ranks = list(range(dist.get_world_size()))
    group = dist.new_group(ranks, timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    shards = distribute_tensor(matrix(30, 6), mesh, [Shard(0)]).requires_grad_(gradient)
    said = "was not there"
    if dist.get_rank() != ranks[-1]:
        try:
            orthofast.pii(shards)
            said = "nothing"
        except BackendError as error:
            said = str(error)
    dist.barrier()
    return said

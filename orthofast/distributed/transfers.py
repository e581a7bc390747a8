"""Messages between the ranks that share a matrix; one that fails becomes a sentence with its rank and phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from orthofast.errors import BackendError

_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Errors of the process group inside the block name this rank and what it was doing.

    Raises:
        BackendError: where torch.distributed gave up, at its timeout or because another rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, BackendError):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise BackendError(
            f"rank {dist.get_rank()} gave up while {what}: {reason}; another rank failed, left or made another call"
        ) from error


class Pending:
    """Messages under way; what was sent is kept alive until they have arrived."""

    def __init__(self, works: Sequence[dist.Work], sent: Sequence[Tensor], received: list[Tensor], what: str) -> None:
        self.works, self.sent, self.received, self.what = works, sent, received, what

    def wait(self) -> list[Tensor]:
        """The received tensors; on a GPU the current stream waits, not the host."""
        with phase(self.what):
            for work in self.works:
                work.wait()
        self.sent = ()
        return self.received


@dataclass(frozen=True)
class Circle:
    """The ranks among which something is split, in the order of its parts.

    Attributes:
        group: their process group; None for a rank alone.
        ranks: global ranks in order.
        place: where this rank stands among them.
    """

    group: Any
    ranks: tuple[int, ...]
    place: int

    def __len__(self) -> int:
        return len(self.ranks)

    def exchange(self, tensors: Sequence[Tensor], step: int, what: str) -> Pending:
        """Start sending contiguous tensors ``step`` places on, and receiving their like from ``step`` places back."""
        to, source = (self.ranks[(self.place + by) % len(self)] for by in (step, -step))
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = []
        for sent, space in zip(tensors, received, strict=True):
            operations.append(dist.P2POp(dist.isend, _bytes(sent), to, self.group))
            operations.append(dist.P2POp(dist.irecv, _bytes(space), source, self.group))
        what = f"{what} (sending to rank {to}, receiving from rank {source})"
        with phase(what):
            return Pending(dist.batch_isend_irecv(operations), tensors, received, what)

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """Stack one tensor of each rank, in order: (ranks, *shape)."""
        if len(self) == 1:
            return tensor.unsqueeze(0)
        found = tensor.new_empty((len(self), *tensor.shape))
        with phase(what):
            dist.all_gather([_bytes(found[i]) for i in self._slots()], _bytes(tensor.contiguous()), group=self.group)
        return found

    def total(self, tensor: Tensor, what: str) -> Tensor:
        """Sum over the ranks, in place."""
        if len(self) > 1:
            with phase(what):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def scatter_sums(self, tensor: Tensor, what: str) -> Tensor:
        """(ranks, ...) on each rank; their sum over ranks, of which each keeps the part at its place."""
        if len(self) == 1:
            return tensor[0]
        kept = torch.empty_like(tensor[0])
        with phase(what):
            dist.reduce_scatter(kept, [tensor[i] for i in self._slots()], group=self.group)
        return kept

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], what: str) -> list[Tensor]:
        """Hand one part to each rank and receive one of each, of these shapes (all-to-all)."""
        if len(self) == 1:
            return list(parts)
        order = self._slots()
        sent = torch.cat([_bytes(parts[i]).flatten() for i in order])
        sizes = [torch.Size(shapes[i]).numel() for i in order]
        space = sent.new_empty(sum(sizes))
        with phase(what):
            dist.all_to_all_single(space, sent, sizes, [parts[i].numel() for i in order], group=self.group)
        found = dict(zip(order, space.view(parts[0].dtype).split(sizes), strict=True))
        return [found[i].view(shapes[i]) for i in range(len(self))]

    def _slots(self) -> list[int]:
        """Of each number in the group: its place in ``ranks``, for a mesh may name its ranks in any order."""
        return [self.ranks.index(rank) for rank in dist.get_process_group_ranks(self.group)]


def circle(mesh: DeviceMesh, dims: Sequence[int]) -> Circle:
    """The ranks that differ from this one along ``dims`` of the mesh only, the last of them running fastest."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if not dims:
        return Circle(None, (dist.get_rank(),), 0)
    index = tuple(slice(None) if dim in dims else at for dim, at in enumerate(coordinate))
    ascending = sorted(dims)
    ranks = tuple(mesh.mesh[index].permute([ascending.index(dim) for dim in dims]).flatten().tolist())
    group = mesh.get_group(dims[0]) if len(dims) == 1 else _joint_group(ranks)
    return Circle(group, ranks, ranks.index(dist.get_rank()))


def world(group: Any = None) -> Circle:
    """All ranks of a process group, in its own order."""
    group = dist.group.WORLD if group is None else group
    ranks = tuple(dist.get_process_group_ranks(group))
    return Circle(group, ranks, ranks.index(dist.get_rank()))


def _joint_group(ranks: tuple[int, ...]) -> Any:
    """A process group over several mesh dimensions, made once."""
    known = _groups.setdefault(dist.group.WORLD, {})
    if ranks not in known:
        with phase("making a process group of several mesh dimensions"):
            known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return known[ranks]


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory; float8 as bytes, which every process group can carry."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor

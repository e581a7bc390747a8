"""Sharded matrices: DTensors at the fold's door, and records of all ranks joined into one.

A DTensor goes wherever a tensor goes: ``orthofast.pii(layer.weight)`` of an FSDP2 or tensor-parallel layer measures the
whole matrix, with the same result on every rank. All ranks of its mesh make the same call.
"""

from __future__ import annotations

from torch.distributed.tensor import DTensor

from orthofast.distributed.gathering import merge_over_ranks
from orthofast.distributed.sharded import gram_stats, pair_mean
from orthofast.kernels.doors import Handler, register

__all__ = ["merge_over_ranks"]

register(DTensor, Handler(gram_stats, pair_mean))

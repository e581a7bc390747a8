"""Factors of a model's stacked experts, brought to the weights of a base that stores its experts one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from orthofast.scan.adapters_config import AdapterConfig
from orthofast.scan.adapters_update import LORA, A, B, Update
from orthofast.scan.catalog import Extent
from orthofast.scan.plan import Item, natural
from orthofast.scan.roles import Roles

ORDER = ("Linear_1.gate", "Linear_1.weight", "Linear_2.weight")  # in which models make a block's parameters

Change = tuple[Item, Mapping[str, Extent], Update]


@dataclass(slots=True)
class Factored:
    """The factors of one module.

    Attributes:
        path: of the module in the model.
        depth: wrappers around it: 0 for the outermost of several adapted parameters of one module.
        embedding: whether they are those of an embedding, which is stored as (inputs, outputs).
        parts: role -> extent.
    """

    path: str
    depth: int
    embedding: bool = False
    parts: dict[str, Extent] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of a tensor that tells where it is."""
        return next(iter(self.parts.values())).name


def by_role(item: Item) -> tuple[int, tuple[tuple[int, int, str], ...]]:
    """Gate, up, down: the order in which models make the parameters of a block, the innermost wrapper's first."""
    role = item.matrices[0].role
    return ORDER.index(role) if role in ORDER else len(ORDER), natural(item.weight.name)


def experts_one_by_one(
    path: str, group: Sequence[Factored], config: AdapterConfig, items: Iterable[Item], roles: Roles
) -> list[Change]:
    """What each expert's weight gets of the factors of a module that holds all experts; empty where they do not fit.

    Transformers stacks and fuses experts in memory (``experts.gate_up_proj``: (E, 2 I, H), gate before up) that
    Mixtral, Qwen and their kin store apart.

    Args:
        path: of the module.
        group: its factors, one for each parameter.
        config: names the parameters.
        items: weights of the base.
        roles: tell what the parameters are.
    """
    ends = {end.rpartition(".")[2]: end for end in config.parameters}
    leaves = [leaf for leaf, end in ends.items() if f".{path}.{leaf}".endswith(f".{end}")]
    if len(leaves) != len(group):
        return []
    apart: dict[tuple[str | None, str], dict[int, Item]] = {}
    for item in items:
        matrix = item.matrices[0]
        if matrix.expert is not None and not matrix.stack and len(item.matrices) == 1:
            apart.setdefault((matrix.layer, matrix.role), {})[matrix.expert] = item
    for order in permutations(group):  # shapes decide: what is fused is no smaller than what is not
        found = [
            _mapped(f"{path}.{leaf}", update, config, apart, roles) for leaf, update in zip(leaves, order, strict=True)
        ]
        if all(found):
            return [change for changes in found for change in changes]
    return []


def _mapped(
    name: str,
    update: Factored,
    config: AdapterConfig,
    apart: Mapping[tuple[str | None, str], Mapping[int, Item]],
    roles: Roles,
) -> list[Change]:
    """The changes that one parameter's factors make; empty where shapes or names do not fit."""
    if A not in update.parts or B not in update.parts:
        return []
    (first, *inward), (out, *second) = update.parts[A].shape, update.parts[B].shape
    rank = config.rank_of(name)
    count = first // rank
    if len(inward) != 1 or second != [first] or first != count * rank or not count:
        return []
    reading = roles.read(name, (count, out, inward[0]))
    if reading.transposed or any(part.repeats != 1 for part in reading.parts):
        return []
    places = [(part.role, part.start, part.stop) for part in reading.parts] or [(reading.role, 0, out)]
    changes: list[Change] = []
    for role, start, stop in places:
        known = apart.get((reading.layer, role), {})
        if sorted(known) != list(range(count)):
            return []
        for expert, item in sorted(known.items()):
            if item.weight.shape != (stop - start, inward[0]) or item.matrices[0].transposed:
                return []
            scale, merges = config.scale_of(name), config.refusal is None
            change = Update(LORA, scale, rank, False, count, merges, expert, (start, stop))
            changes.append((item, {**update.parts, A: _part(update.parts[A], expert, count)}, change))
    return changes


def _part(extent: Extent, expert: int, count: int) -> Extent:
    """The rows of one expert, which lie together; the whole where they do not, or are in memory."""
    if extent.strides is not None or extent.pieces or not extent.offset:
        return extent
    nbytes = extent.nbytes // count
    shape = (extent.shape[0] // count, extent.shape[1])
    return replace(extent, offset=extent.offset + expert * nbytes, nbytes=nbytes, shape=shape)

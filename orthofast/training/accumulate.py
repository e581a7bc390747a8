"""A penalty over many layers: layers of one shape handled together, values summed, gradients added to ``.grad``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.training.layers import Layer
from orthofast.training.penalties import Penalty

STACK_BYTES = 64 << 20  # of layers copied side by side at a time


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A layer and its penalty.

    Attributes:
        layer: which vectors.
        penalty: on (b, n, d) vectors; on the parameter as it is stored, with a value (), where ``stored``.
        stored: whether the penalty needs more than the vectors.
    """

    layer: Layer
    penalty: Penalty
    stored: bool = False


class Made(NamedTuple):
    """What one group of layers gave: its values, and gradients in the shape the penalty took."""

    group: list[Term]
    value: Tensor
    gradient: Tensor


def total(terms: Sequence[Term], weight: float) -> Tensor:
    """``weight`` times the sum of the penalties, (), differentiable."""
    return add_up([group[0].penalty.value(vectors) for group, vectors in groups(terms)], weight)


def add_grad_(terms: Sequence[Term], weight: float) -> Tensor:
    """Add ``weight`` times the gradients to ``.grad`` of the parameters, and return ``weight`` times the sum, detached.

    Raises:
        InputError: if no parameter needs a gradient, or one cannot hold it.
    """
    with torch.no_grad():
        made = [Made(group, *group[0].penalty.gradient(vectors)) for group, vectors in groups(trained(terms))]
        return add_made_(made, weight)


def groups(terms: Sequence[Term]) -> Iterator[tuple[list[Term], Tensor]]:
    """Layers of one penalty, shape, dtype and device, and their vectors (b, n, d); one layer alone is not copied."""
    waiting: dict[object, list[tuple[Term, Tensor]]] = {}
    for term in terms:
        if term.stored:
            yield [term], term.layer.parameter
            continue
        vectors = term.layer.vectors()
        # only plain tensors are stacked: a subclass may live on several devices
        alike = type(vectors) is Tensor or type(vectors) is torch.nn.Parameter
        key: object = (id(term.penalty), vectors.shape, vectors.dtype, vectors.device) if alike else id(term)
        waiting.setdefault(key, []).append((term, vectors))
    for members in waiting.values():
        size = max(1, members[0][1].numel() * members[0][1].element_size())
        step = max(1, STACK_BYTES // size)
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            vectors = chosen[0][1] if len(chosen) == 1 else torch.cat([each for _, each in chosen])
            yield [term for term, _ in chosen], vectors


def trained(terms: Sequence[Term]) -> list[Term]:
    """Those whose parameter takes a gradient.

    Raises:
        InputError: if there is none.
    """
    kept = [term for term in terms if _takes_gradient(term.layer)]
    if not kept:
        raise InputError(f"none of the {len(terms)} layers requires a gradient; unfreeze one, or leave the penalty out")
    return kept


def add_made_(made: Sequence[Made], weight: float) -> Tensor:
    """Add gradients where they belong, all parameters of a device and dtype at once; ``weight`` times the values."""
    places: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for group, _, gradient in made:
        for index, term in enumerate(group):
            layer = term.layer
            target = layer.rows_of(_grad_of(layer))
            into, added = places.setdefault((target.device, target.dtype), ([], []))
            into.append(target)
            added.append(gradient if term.stored else layer.as_stored(gradient[index]))
    for into, added in places.values():
        torch._foreach_add_(into, added, alpha=weight)
    return add_up([value for _, value, _ in made], weight)


def add_up(values: Sequence[Tensor], weight: float) -> Tensor:
    """``weight`` times the sum of all values, in their order, on the first one's device."""
    whole = values[0].sum()
    for value in values[1:]:
        whole = whole + value.sum().to(whole.device)
    return whole * weight


def _takes_gradient(layer: Layer) -> bool:
    module = layer.module
    computed = module is not None and module._parameters.get(layer.part.attribute) is None
    parameter = layer.parameter
    if not computed and not parameter.requires_grad:
        return False
    if computed or not parameter.is_leaf:
        raise InputError(
            f"{layer.name} is computed from other tensors and has no .grad; add the penalty to the loss instead"
        )
    if parameter.grad is not None and parameter.grad.layout is not torch.strided:
        raise InputError(
            f"{layer.name} has a gradient of layout {parameter.grad.layout}, which a penalty on all rows would fill; "
            "make the embedding with sparse=False, or leave it out with select="
        )
    return True


def _grad_of(layer: Layer) -> Tensor:
    parameter = layer.parameter
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad

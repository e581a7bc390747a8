"""Which parameters of a model hold vectors to compare, in which orientation: the one table training shares.

======================  ==========================  =======================================================
module                  parameter                   one vector is
======================  ==========================  =======================================================
Linear, Bilinear        weight                      what feeds one output: a row
Conv1d, 2d, 3d          weight                      one filter, flattened
ConvTranspose1d to 3d   weight (groups = 1)         one filter: torch stores (in, out, *kernel), so a column
Embedding(Bag)          weight                      one token: a row
MultiheadAttention      in_proj_weight, or q, k, v  a row, compared within q, within k and within v only
RNN, GRU, LSTM          weight_ih, hh, hr           a row, compared within each gate only
transformers' Conv1D    weight                      what feeds one output: stored (in, out), so a column
======================  ==========================  =======================================================

Subclasses follow their parents. A type of your own joins the table with ``RULES[MyLayer] = rule``, where
``rule(module)`` lists its :class:`Part` entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orthofast.errors import InputError
from orthofast.views import as_vectors

Choice: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module | None], bool]"
Select: TypeAlias = "Choice | Sequence[Choice] | None"
Source: TypeAlias = "nn.Module | Iterable[nn.Module | Tensor | tuple[str, Tensor]]"

# what torch.compile, activation checkpointing and FSDP put between the names of modules
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n"), "RNN": ("",)}
SHOWN = 5  # names in an error


class Part(NamedTuple):
    """One set of vectors a module holds.

    Attributes:
        attribute: of the module, such as "weight".
        vectors: "rows" or "cols", see :func:`orthofast.views.as_vectors`.
        label: what tells parts of one parameter from each other, such as "q"; empty for the whole.
        blocks: into how many equal blocks of rows the parameter falls.
        block: which of them this part is.
    """

    attribute: str
    vectors: str = "rows"
    label: str = ""
    blocks: int = 1
    block: int = 0


Rule: TypeAlias = "Callable[[nn.Module], list[Part]]"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One set of vectors of a model, read anew from its module each time.

    Attributes:
        name: of the parameter within the model, with the part in brackets: "encoder.attn.in_proj_weight[q]".
        module: that owns the parameter; None for a tensor given by itself.
        part: which parameter, which rows of it and in which orientation.
        tensor: the parameter given by itself.
    """

    name: str
    module: nn.Module | None
    part: Part
    tensor: Tensor | None = None

    @classmethod
    def of_tensor(cls, tensor: Tensor, name: str = "weight") -> Layer:
        """A tensor given by itself: rows, or flattened filters."""
        return cls(name, None, Part("weight"), tensor)

    @property
    def parameter(self) -> Tensor:
        """The whole parameter as its module holds it now; of a parametrised module, as it computes it."""
        if self.module is None:
            assert self.tensor is not None
            return self.tensor
        value: Tensor = getattr(self.module, self.part.attribute)
        return value

    def vectors(self, parameter: Tensor | None = None) -> Tensor:
        """(1, n, d): a view of the parameter wherever strides can say it, differentiable.

        Args:
            parameter: take the same part of this tensor instead, such as the parameter's gradient or an older copy.
        """
        return as_vectors(self.rows_of(self.parameter if parameter is None else parameter), self.part.vectors)

    def rows_of(self, parameter: Tensor) -> Tensor:
        """The rows of the parameter, or of a tensor of its shape, that this part is: a view."""
        if self.part.blocks == 1:
            return parameter
        size = len(parameter) // self.part.blocks
        return parameter.narrow(0, self.part.block * size, size)

    def as_stored(self, vectors: Tensor) -> Tensor:
        """(n, d) values, one per entry of the vectors, in the shape and order of :meth:`rows_of`."""
        shape = self.rows_of(self.parameter).shape
        if self.part.vectors == "cols":
            return vectors.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        return vectors.reshape(shape)


class Skipped(NamedTuple):
    """A matrix that is not measured, and the reason in one sentence."""

    name: str
    reason: str


class Layers(NamedTuple):
    """What :func:`find_layers` found and what it left out, each in the model's order."""

    found: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]


def _whole(vectors: str) -> Rule:
    return lambda module: [Part("weight", vectors)]


def _attention(module: nn.Module) -> list[Part]:
    if getattr(module, "in_proj_weight", None) is not None:
        return [Part("in_proj_weight", "rows", label, 3, block) for block, label in enumerate("qkv")]
    return [Part(f"{label}_proj_weight") for label in "qkv"]


def _recurrent(module: nn.Module) -> list[Part]:
    gates = GATES.get(str(module.mode), ("",))  # mode is "RNN_TANH" or "RNN_RELU" for the plain kind
    parts = []
    for name, _ in module.named_parameters(recurse=False):
        if name.startswith("weight_hr"):  # the projection of an LSTM has no gates
            parts.append(Part(name))
        elif name.startswith("weight_"):
            parts += [Part(name, "rows", gate, len(gates), block) for block, gate in enumerate(gates)]
    return parts


# a type, or its full name where importing its package is not ours to do
RULES: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: _whole("rows"),
    nn.Bilinear: _whole("rows"),
    nn.Conv1d: _whole("rows"),
    nn.Conv2d: _whole("rows"),
    nn.Conv3d: _whole("rows"),
    nn.ConvTranspose1d: _whole("cols"),
    nn.ConvTranspose2d: _whole("cols"),
    nn.ConvTranspose3d: _whole("cols"),
    nn.Embedding: _whole("rows"),
    nn.EmbeddingBag: _whole("rows"),
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    "transformers.pytorch_utils.Conv1D": _whole("cols"),
}


def find_layers(source: Source, select: Select = None) -> Layers:
    """The sets of vectors a model holds, by the table above, each parameter once.

    Args:
        source: a model; or an iterable of modules, tensors (2-D: rows; wider: filters) and (name, tensor) pairs,
            such as ``model.named_parameters()``. Tensors of fewer than two dimensions are passed over.
        select: which of them. A glob over the name of the parameter or its module ("encoder.*"), a compiled regular
            expression searched in either, a module type, a ``callable(name, module) -> bool``, or a list of these of
            which one must hold. None: all.

    Returns:
        :class:`Layers`. ``skipped`` lists with a reason every selected matrix that is not measured: module types
        without a rule, parameters tied to one that is found, fewer than two vectors, no floating-point values.

    Raises:
        InputError: if the source is neither, or ``select`` chooses nothing of it.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 1))
    >>> found, skipped = find_layers(model)
    >>> [(layer.name, tuple(layer.vectors().shape)) for layer in found]
    [('0.weight', (1, 8, 27))]
    >>> skipped[0]
    Skipped(name='3.weight', reason='holds 1 vector, and a pair needs two')
    """
    choices = _choices(select)
    found: list[Layer] = []
    skipped: list[Skipped] = []
    owners: dict[object, str] = {}  # of parameters found so far
    offered: list[str] = []
    for layer, unknown in _candidates(source):
        offered.append(layer.name)
        if choices and not any(_holds(choice, layer) for choice in choices):
            continue
        reason = unknown or _unfit(layer) or _tied(layer, owners)
        if reason:
            skipped.append(Skipped(layer.name, reason))
        else:
            found.append(layer)
    if choices and not found and not skipped:
        some = ", ".join(offered[:SHOWN]) + (", ..." if len(offered) > SHOWN else "")
        raise InputError(f"select={select!r} chooses none of the {len(offered)} layers; there are {some or 'none'}")
    return Layers(tuple(found), tuple(skipped))


def selector(select: Select) -> Callable[[str, nn.Module], bool]:
    """Whether a module's weight is chosen, by its module's path and type; as :func:`find_layers` chooses."""
    choices = _choices(select)

    def chosen(path: str, module: nn.Module) -> bool:
        layer = Layer(f"{path}.weight" if path else "weight", module, Part("weight"))
        return not choices or any(_holds(choice, layer) for choice in choices)

    return chosen


def _choices(select: Select) -> tuple[Choice, ...]:
    if select is None:
        return ()
    choices = tuple(select) if isinstance(select, Iterable) and not isinstance(select, str) else (select,)
    for choice in choices:
        if not isinstance(choice, str | re.Pattern) and not callable(choice):
            raise InputError(
                "select needs globs, compiled regular expressions, module types or callables, "
                f"got {type(choice).__name__}; write the names as strings"
            )
    if not choices:
        raise InputError("select is an empty list, which chooses nothing; pass None for all layers")
    return choices


def _holds(choice: Choice, layer: Layer) -> bool:
    bare = _bare(layer.name)
    names = (layer.name, bare, bare.rpartition(".")[0])
    if isinstance(choice, str):
        return any(fnmatchcase(name, choice) for name in names)
    if isinstance(choice, re.Pattern):
        return any(choice.search(name) for name in names)
    if isinstance(choice, type):
        return isinstance(layer.module, choice)
    return bool(choice(layer.name, layer.module))


def _bare(name: str) -> str:
    """The parameter's name without the part in brackets."""
    return name.partition("[")[0]


def _candidates(source: Source) -> Iterator[tuple[Layer, str]]:
    """Every matrix in order, with the reason why the table has no place for it, or an empty string."""
    if isinstance(source, nn.Module):
        yield from _of_model(source, "")
        return
    if isinstance(source, Tensor) or not isinstance(source, Iterable):
        raise InputError(
            f"source needs a model, or an iterable of modules and tensors, got {type(source).__name__}; "
            "put a tensor in a list"
        )
    for index, entry in enumerate(source):
        name, value = entry if isinstance(entry, tuple) and len(entry) == 2 else (str(index), entry)
        if isinstance(value, nn.Module):
            yield from _of_model(value, name)
        elif not isinstance(value, Tensor):
            raise InputError(f"source[{index}] needs a module or a tensor, got {type(value).__name__}")
        elif is_lazy(value) or value.dim() >= 2:
            yield Layer.of_tensor(value, name), ""


def _of_model(model: nn.Module, prefix: str) -> Iterator[tuple[Layer, str]]:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    for path, module in model.named_modules():
        words = [word for word in (prefix, *path.split(".")) if word and word not in WRAPPERS]
        if "parametrizations" not in words:  # what a parametrised module computes its weight from
            yield from _of_module(module, ".".join(words))


def _of_module(module: nn.Module, path: str) -> Iterator[tuple[Layer, str]]:
    parts = _rule_of(module)(module)
    for part in parts:
        name = ".".join(filter(None, (path, part.attribute))) + (f"[{part.label}]" if part.label else "")
        reason = ""
        if not isinstance(getattr(module, part.attribute, None), Tensor):
            reason = f"is no tensor of {type(module).__name__}"
        elif part.vectors == "cols" and getattr(module, "groups", 1) != 1:
            reason = "is a grouped transposed convolution, whose columns mix filters of several groups"
        yield Layer(name, module, part), reason
    known = {part.attribute for part in parts}
    for attribute, parameter in module.named_parameters(recurse=False):
        if attribute not in known and (is_lazy(parameter) or parameter.dim() >= 2):
            name = ".".join(filter(None, (path, attribute)))
            yield Layer(name, module, Part(attribute)), f"belongs to a {type(module).__name__}, which has no rule"


def _rule_of(module: nn.Module) -> Rule:
    for kind in type(module).__mro__:
        rule = RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None:
            return rule
    return lambda module: []


def _tied(layer: Layer, owners: dict[object, str]) -> str:
    """Names the layer that has this parameter already, or an empty string after noting it in ``owners``."""
    name, attribute = _bare(layer.name), layer.part.attribute
    stored = layer.tensor if layer.module is None else layer.module._parameters.get(attribute)
    key: object = (id(layer.module), attribute) if stored is None else id(stored)  # a computed weight has no identity
    owner = owners.setdefault(key, name)
    return "" if owner == name else f"is the same parameter as {owner}, which is measured"


@torch.no_grad()
def _unfit(layer: Layer) -> str:
    """Why its values cannot be measured, or an empty string."""
    parameter = layer.parameter
    if is_lazy(parameter):
        return "is lazy and has no shape yet; run the model once on data first"
    if not parameter.dtype.is_floating_point:
        return f"holds {parameter.dtype}, no floating-point values"
    if parameter.device.type == "meta":
        return "is on the meta device and holds no values"
    if parameter.layout is not torch.strided:
        return f"is stored as {parameter.layout}, not dense"
    if parameter.dim() < 2:
        return f"has {parameter.dim()} dimension{'' if parameter.dim() == 1 else 's'} and so no vectors to compare"
    if layer.part.blocks > 1 and len(parameter) % layer.part.blocks:
        return f"has {len(parameter)} rows, which do not fall into {layer.part.blocks} equal blocks"
    count: Any = parameter.shape[1 if layer.part.vectors == "cols" else 0] // layer.part.blocks
    if count < 2:
        return f"holds {count} vector{'' if count == 1 else 's'}, and a pair needs two"
    return ""

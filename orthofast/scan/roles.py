"""What a tensor's name says: its role, its layer and its orientation; the rules themselves are data (families.json).

Roles are the columns of Lu et al. 2024, Table 5, and a few more. Two stages: the context (attention, feed-forward,
inside a layer, outside), then the last word of the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TABLE5 = ("Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight")
ROLES = (*TABLE5, "Linear_1.gate", "QKV", "Embedding", "Head", "Conv", "Other")
STAGE = re.compile(r"layer\d+")  # ResNet: layer1.0, layer1.1, ...
THIRDS = (("query", "Query"), ("key", "Keys"), ("value", "Values"))


@dataclass(frozen=True, slots=True)
class Part:
    """A block of output rows inside a fused matrix.

    Attributes:
        label: what is appended to the tensor's name.
        role: the role of the block.
        start, stop: rows of the (out, in) matrix.
    """

    label: str
    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How one tensor is to be read.

    Attributes:
        role: one of :data:`ROLES`; empty when skipped.
        layer: the row of the table it belongs to, such as "0", "decoder.3" or "decoder.3.cross"; None outside layers.
        transposed: whether it is stored as (in, out).
        parts: blocks of a fused matrix; empty for a plain one.
        skip: why the name alone rules it out, or None.
    """

    role: str
    layer: str | None = None
    transposed: bool = False
    parts: tuple[Part, ...] = ()
    skip: str | None = None


class Roles:
    """The rules of families.json, applied to one checkpoint.

    Args:
        names: all tensor names, with their shapes; the layers' numbering is judged from them together.
        config: the model's configuration; empty without one.
    """

    def __init__(self, names: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> None:
        self._rules = _rules()
        self._config = config
        self._model_type = str(config.get("model_type", ""))
        self._conv1d = self._stores_in_out(names)
        self._lists = {found[0] for found in (self._layer_list(self._segments(name)) for name in names) if found}

    def read(self, name: str, shape: tuple[int, ...]) -> Reading:
        """Role, layer, orientation and parts of one tensor."""
        for pattern, reason in self._rules.skip:
            if pattern.search(name):
                return Reading("", skip=reason)
        segments = self._segments(name)
        found = self._layer_list(segments)
        inside = segments[found[1] + 1 :] if found else []
        context = self._context(inside or segments)
        layer = self._label(found, segments, context)
        rule = self._rule(segments, context, bool(inside))
        role, split = (rule["role"], rule.get("split")) if rule else ("Other", None)
        if role == "Other" and _is_convolution(shape, name):
            return Reading("Conv", layer)
        transposed = self._conv1d and bool(inside) and segments[-1] in ("c_attn", "c_proj", "c_fc", "q_attn")
        if len(shape) != 2 or split is None:
            return Reading(role, layer, transposed)
        out, inward = shape[::-1] if transposed else shape
        return Reading(role, layer, transposed, self._parts(split, out, inward))

    def _segments(self, name: str) -> list[str]:
        """The words of a name, without what wrappers add."""
        return [word for word in name.removesuffix(".weight").split(".") if word not in self._rules.wrappers]

    def _stores_in_out(self, names: Mapping[str, tuple[int, ...]]) -> bool:
        """Conv1D keeps (in, out): a fused (d, 3d) c_attn tells, square ones cannot; else the model's type decides."""
        for name, shape in names.items():
            if name.endswith("attn.c_attn.weight") and len(shape) == 2 and shape[0] != shape[1]:
                return shape[1] == 3 * shape[0]
        return self._model_type in self._rules.conv1d

    def _layer_list(self, segments: list[str]) -> tuple[tuple[str, ...], int] | None:
        """The path up to the list of layers, and the position of the number."""
        for position in range(1, len(segments)):
            parent = segments[position - 1]
            if segments[position].isdecimal() and (parent in self._rules.layer_lists or STAGE.fullmatch(parent)):
                return tuple(segments[:position]), position
        return None

    def _label(self, found: tuple[tuple[str, ...], int] | None, segments: list[str], context: str) -> str | None:
        if found is None:  # modules such as fc1 are their own layer, unless the model numbers its layers
            return ".".join(segments) if all(STAGE.fullmatch(parents[-1]) for parents in self._lists) else None
        parents, position = found
        number = segments[position]
        if STAGE.fullmatch(parents[-1]):
            number = f"{parents[-1]}.{number}"
        stacks = {_stack(other, self._rules.stacks) for other in self._lists}
        stack = _stack(parents, self._rules.stacks)
        label = f"{stack}.{number}" if stack and len(stacks) > 1 else number
        return f"{label}.cross" if context == "cross" else label

    def _context(self, segments: list[str]) -> str:
        """The nearest ancestor named like attention or like a feed-forward block; cross attention at any height."""
        found = ""
        for segment in segments[:-1]:
            for context, pattern in self._rules.contexts:
                if pattern.fullmatch(segment):
                    found = "cross" if found == "cross" and context == "attention" else context
                    break
        return found

    def _rule(self, segments: list[str], context: str, inside: bool) -> dict[str, Any] | None:
        path = ".".join(segments)
        contexts = {"attention" if context == "cross" else context or ("layer" if inside else "")}
        if not inside:
            contexts.add("outside")
        for rule in (*self._rules.overrides, *self._rules.leaves):
            if rule.get("model_type", self._model_type) != self._model_type:
                continue
            if "path" in rule:
                if re.search(rule["path"], path) and (inside or not rule.get("in_layer")):
                    return rule
            elif rule["context"] in contexts and re.fullmatch(rule["leaf"], segments[-1]):
                return rule
        return None

    def _parts(self, split: str, out: int, inward: int) -> tuple[Part, ...]:
        """Blocks of rows; none where the cut is not certain, for a wrong cut is worse than one matrix of role QKV."""
        if split == "gate_up":
            halves = (("gate", "Linear_1.gate"), ("up", "Linear_1.weight"))
            return _cut((0, out // 2, out), halves) if out % 2 == 0 else ()
        if split == "thirds":
            if out == 3 * inward:
                return _cut((0, inward, 2 * inward, out), THIRDS)
            return _cut((0, inward, out), THIRDS[1:]) if out == 2 * inward else ()
        heads = _natural(self._config.get("num_attention_heads") or self._config.get("n_head"))
        groups = _natural(self._config.get("num_key_value_heads")) or heads
        if split == "multi_query":
            groups = 1 if self._config.get("multi_query", True) else 0
        if not heads or not groups or out % (heads + 2 * groups):
            return ()
        size = out // (heads + 2 * groups)
        return _cut((0, heads * size, (heads + groups) * size, out), THIRDS)


@dataclass(frozen=True, slots=True)
class _Rules:
    skip: tuple[tuple[re.Pattern[str], str], ...]
    contexts: tuple[tuple[str, re.Pattern[str]], ...]
    overrides: tuple[dict[str, Any], ...]
    leaves: tuple[dict[str, Any], ...]
    conv1d: frozenset[str]
    stacks: frozenset[str]
    layer_lists: frozenset[str]
    wrappers: frozenset[str]


@cache
def _rules() -> _Rules:
    data = json.loads(files("orthofast.scan").joinpath("families.json").read_text("utf-8"))
    return _Rules(
        skip=tuple((re.compile(rule["path"]), rule["reason"]) for rule in data["skip"]),
        contexts=tuple((rule["context"], re.compile(rule["segment"])) for rule in data["contexts"]),
        overrides=tuple(data["overrides"]),
        leaves=tuple(data["leaves"]),
        conv1d=frozenset(data["conv1d_model_types"]),
        stacks=frozenset(data["two_stacks"]),
        layer_lists=frozenset(data["layer_lists"]),
        wrappers=frozenset(data["wrappers"]),
    )


def _cut(bounds: tuple[int, ...], roles: tuple[tuple[str, str], ...]) -> tuple[Part, ...]:
    spans = zip(roles, bounds[:-1], bounds[1:], strict=True)
    return tuple(Part(label, role, start, stop) for (label, role), start, stop in spans)


def _stack(parents: Iterable[str], stacks: frozenset[str]) -> str:
    """The outermost word of the path that names one of several towers; empty without one."""
    return next((segment for segment in parents if segment in stacks), "")


def _is_convolution(shape: tuple[int, ...], name: str) -> bool:
    """Four and five axes are kernels; three may be stacked experts, so there the name decides."""
    return len(shape) in (4, 5) or (len(shape) == 3 and re.search(r"conv|patch|stem|downsample", name) is not None)


def _natural(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

"""What a tensor's name says: its role, its layer and its orientation; the rules themselves are data (families.json).

Roles are the columns of Lu et al. 2024, Table 5, and a few more. Two stages: the context (attention, feed-forward,
inside a layer, outside), then the last word of the name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orthofast.scan.heads import HIDDEN, Heads, heads_of, natural, tower_of, varies, with_latent_sizes
from orthofast.scan.rules import Rule, Rules, context_of, load_rules
from orthofast.scan.splits import Fused, Part, parts_of

TABLE5 = ("Query", "Keys", "Values", "Atten_Output", "Linear_1.weight", "Linear_2.weight")
ROLES = (
    *TABLE5,
    "Linear_1.gate",
    "QKV",
    "KV",
    "Query.latent",
    "KV.latent",
    "Keys.rope",
    "Attention.gate",
    "Router",
    "Mixer",
    "Embedding",
    "Head",
    "Conv",
    "Conv.depthwise",
    "Other",
)
STAGE = re.compile(r"(layer|block)\d+")  # ResNet, PVT: layer1.0, layer1.1, ...
NUMBERED = re.compile(r"((?:^|\.)\w*(?:layer|block)s?)_(\d+)(?=\.)")  # torchvision: encoder_layer_0
CONVOLUTION = re.compile(r"conv|patch|stem|downsample|depthwise|dw")
DEPTHWISE = re.compile(r"depthwise|sconv|dw_?conv|conv_?dw|conv_depth|conv1d|conv2d_dw")
LONGEST_NAME = 1000  # characters; foreign names hold what they like, and patterns take their time
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
TOKENS = re.compile(r"(embed_tokens|wte|word_embeddings|tok_embeddings|token_embd)\.weight$")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts", "num_routed_experts")
LINEAR = frozenset(("Linear_1.weight", "Linear_1.gate", "Linear_2.weight", "Query", "Atten_Output", "Router"))


@dataclass(frozen=True, slots=True)
class Reading:
    """How one tensor is to be read.

    Attributes:
        role: one of :data:`ROLES`; empty when skipped.
        layer: the row of the table it belongs to, such as "0", "decoder.3" or "decoder.3.cross"; None outside layers.
        transposed: whether it is stored as (in, out).
        parts: parts of a fused matrix; empty for a plain one.
        skip: why the name alone rules it out, or None.
        expert: index of the expert whose matrix this is; None elsewhere.
        stack: how many experts lie one behind the other on the first axis; 0 where none do.
        axes: of a matrix stored with three axes, which are outputs and which inputs, such as "ioo"; else empty.
        heads: attention heads of an unfused matrix, 0 where that is not known.
        head_axis: "rows" where a head owns rows of the (out, in) matrix, "cols" where it owns columns.
        known: whether a rule was found; False for a name no rule describes.
    """

    role: str
    layer: str | None = None
    transposed: bool = False
    parts: tuple[Part, ...] = ()
    skip: str | None = None
    expert: int | None = None
    stack: int = 0
    axes: str = ""
    heads: int = 0
    head_axis: str = "rows"
    known: bool = True


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a name lies: its words, the position of its layer's number and of its expert's."""

    segments: tuple[str, ...]
    number: int = -1
    inner: int = -1
    expert: int = -1

    @property
    def parents(self) -> tuple[str, ...]:
        return self.segments[: self.number] if self.number > 0 else ()

    @property
    def inside(self) -> tuple[str, ...]:
        return self.segments[max(self.number, self.inner) + 1 :] if self.number > 0 else ()


class Roles:
    """The rules of families.json, applied to one checkpoint.

    Args:
        names: all tensor names, with their shapes; the layers' numbering is judged from them together.
        config: the model's configuration; empty without one.
    """

    def __init__(self, names: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> None:
        self._rules = load_rules()
        self._config = config = with_latent_sizes(config)
        self._names = names
        self._patterns: set[str] = set()  # names with # for numbers, once a rule asks
        self._conv1d = self._stores_in_out(names)
        places = (self._place(name) for name in names if len(name) <= LONGEST_NAME)
        lists = {place.parents for place in places if place.parents}
        self._stages_only = all(STAGE.fullmatch(parents[-1]) for parents in lists)
        self._stacks = _stack_labels(lists, self._rules)
        tower = tower_of(config, ())
        self._layers = natural(tower, ("num_hidden_layers", "n_layer", "num_layers"))
        self._predicting = natural(tower, ("num_nextn_predict_layers", "num_mtp_layers"))
        self._varies = varies(tower)
        self._width = next((shape[1] for name, shape in names.items() if TOKENS.search(name) and len(shape) == 2), 0)
        self._read: dict[tuple[object, ...], Reading] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> Reading:
        """Role, layer, orientation and parts of one tensor."""
        if len(name) > LONGEST_NAME:
            return Reading("Other", known=False)
        place = self._place(name)
        found = self._pattern(name, place, shape)
        if found.skip is not None:
            return found
        layer = self._label(place, found.layer == "cross")
        expert = int(place.segments[place.expert]) if place.expert > 0 else None
        return replace(found, layer=layer, expert=expert)

    def _place(self, name: str) -> _Place:
        rules = self._rules
        plain = name.removesuffix(".weight")
        if "_" in plain:
            plain = NUMBERED.sub(r"\1.\2", plain)
        segments = tuple(word for word in plain.split(".") if word not in rules.wrappers)
        if segments[-1:] == ("linear",) and segments[-2:-1] and segments[-2].endswith("_proj"):
            segments = segments[:-1]  # a module around the projection
        number = inner = expert = -1
        for i in range(1, len(segments)):
            if not segments[i].isdecimal():
                continue
            parent = segments[i - 1]
            if number < 0:
                if rules.layer_list(parent):
                    number = i
            elif expert < 0 and rules.experts(parent):
                expert = i
            elif inner < 0 and expert < 0 and i <= number + 3 and self._nests(segments, number, i):
                inner = i
        return _Place(segments, number, inner, expert)

    def _nests(self, segments: Sequence[str], number: int, i: int) -> bool:
        """Whether a second number counts layers within a stage; T5's block.0.layer.1 counts the parts of one layer."""
        outer = segments[number - 1]
        if i == number + 1:  # block.0.1
            return True
        between = segments[number + 1 : i - 1]
        if outer == "block" or any(context_of(word, self._rules) for word in between):
            return False
        return self._rules.inner_list(segments[i - 1])

    def _pattern(self, name: str, place: _Place, shape: tuple[int, ...]) -> Reading:
        """The reading of all names that differ in the numbers of layer and expert alone."""
        words = list(place.segments)
        first = place.number > 0 and words[place.number] == "0"
        for position in (place.number, place.inner, place.expert):
            if position > 0 and not (self._varies and position == place.number):
                words[position] = "#"
        key = (*words, name.endswith(".weight"), first, shape)
        if key not in self._read:
            self._read[key] = self._judge(name, place, shape)
        return self._read[key]

    def _judge(self, name: str, place: _Place, shape: tuple[int, ...]) -> Reading:
        """Everything about a name but its numbers; ``layer`` is "cross" in cross attention, else None."""
        for least, pattern, reason in self._rules.skip:
            if len(shape) >= least and pattern.search(name):
                return Reading("", skip=reason)
        segments, inside = place.segments, place.inside
        context = self._context(inside or segments)
        tower = tower_of(self._config, segments)
        types = {str(part.get("model_type", "")) for part in (tower, self._config)}
        rule = self._rule(place, context, types, name)
        cross = "cross" if context == "cross" else None
        role = rule.role if rule else "Other"
        flat = role == "Other" or role in LINEAR or role == "Mixer"
        if flat and _is_convolution(shape, ".".join(segments), role):
            return Reading(_convolution(shape, name, place), cross)
        if rule is None or len(shape) < 2:
            return Reading(role, cross, known=rule is not None)
        stack = self._stack(rule, shape, place, context, tower)
        if stack < 0:
            return Reading("", skip="experts on one axis, and the configuration does not tell how many")
        axes = rule.axes if len(shape) == len(rule.axes) else ""
        rows, inward = _matrix_sizes(shape, stack, axes)
        two_axes = len(shape) == 2 or stack > 0
        transposed = two_axes and self._transposed(rule, place, rows, inward, stack, tower)
        if transposed:
            rows, inward = inward, rows
        layer = int(segments[place.number]) if place.number > 0 else None
        heads = Heads() if stack else heads_of(tower, segments, layer)
        split = rule.split if any(types) or not stack or rule.model_type else None  # unnamed: gpt-oss alternates rows
        parts = parts_of(split, Fused(rows, inward, heads, tower)) if split else ()
        axis = "cols" if role == "Atten_Output" else "rows"
        count = heads.columns(inward) if axis == "cols" else heads.rows(role, rows)
        if axes and role != "Other":
            count = shape[axes.index("i" if axis == "cols" else "o")]
        return Reading(role, cross, transposed, parts, None, None, stack, axes, count, axis)

    def _stack(
        self, rule: Rule, shape: tuple[int, ...], place: _Place, context: str, tower: Mapping[str, object]
    ) -> int:
        """Experts on the first axis: an axis of their own, or rows one behind the other; -1 if that cannot be told."""
        if rule.flat and len(shape) == 2:
            inner = tower.get("ffn_config")
            count = natural(tower, EXPERT_COUNTS) or (
                natural(inner, EXPERT_COUNTS) if isinstance(inner, Mapping) else 0
            )
            return count if count and shape[0] % count == 0 else -1
        if len(shape) != 3 or rule.axes or place.expert > 0 or shape[-1] == 1:
            return 0
        words = place.segments
        named = context == "mlp" or words[-1].endswith(("_exps", "_chexps")) or any(map(self._rules.experts, words))
        return shape[0] if named and rule.role in LINEAR else 0

    def _transposed(
        self, rule: Rule, place: _Place, rows: int, inward: int, stack: int, tower: Mapping[str, object]
    ) -> bool:
        """Whether (in, out) is stored; of stacked experts the known width tells, where only one side has it."""
        if self._conv1d and place.number > 0 and place.segments[-1] in self._rules.conv1d_leaves:
            return True
        hidden = natural(tower, HIDDEN) or self._width
        if stack and not rule.flat and (rows == hidden) != (inward == hidden):
            return (rows == hidden) != (rule.role == "Linear_2.weight")
        return rule.stored == "in_out"

    def _stores_in_out(self, names: Mapping[str, tuple[int, ...]]) -> bool:
        """Conv1D keeps (in, out): a fused (d, 3d) c_attn tells, square ones cannot; else the model's type decides."""
        for name, shape in names.items():
            if name.endswith("attn.c_attn.weight") and len(shape) == 2 and shape[0] != shape[1]:
                return shape[1] == 3 * shape[0]
        tower = tower_of(self._config, ())
        return any(part.get("model_type") in self._rules.conv1d for part in (self._config, tower))

    def _label(self, place: _Place, cross: bool) -> str | None:
        segments = place.segments
        if place.number < 0:  # modules such as fc1 are their own layer, unless the model numbers its layers
            return ".".join(segments) if self._stages_only else None
        number, stack = segments[place.number], self._stacks.get(place.parents, "")
        if STAGE.fullmatch(segments[place.number - 1]):
            number = f"{segments[place.number - 1]}.{number}"
        elif self._predicting and not stack and place.inner < 0 and int(number) >= self._layers > 0:
            number = f"mtp.{int(number) - self._layers}"
        if place.inner > 0:
            number = f"{number}.{segments[place.inner]}"
        label = f"{stack}.{number}" if stack else number
        return f"{label}.cross" if cross else label

    def _context(self, segments: Sequence[str]) -> str:
        """The nearest ancestor that tells a context; cross attention at any height."""
        found = ""
        for segment in segments[:-1]:
            context = context_of(segment, self._rules)
            if context and not (found == "cross" and context == "attention"):
                found = context
        return "cross" if segments[-1].startswith("cross_attn") else found

    def _rule(self, place: _Place, context: str, types: set[str], name: str) -> Rule | None:
        segments, inside = place.segments, place.number > 0
        path = ".".join(segments)
        contexts = {"attention", "cross"} if context == "cross" else {context or ("layer" if inside else "outside")}
        for rule in self._rules.rules:
            if rule.path is not None:
                if (rule.in_layer and not inside) or not rule.path.search(path):
                    continue
            elif not (rule.contexts & contexts and rule.leaf.fullmatch(segments[-1])):
                continue
            if rule.model_type and not any(map(rule.model_type.fullmatch, types)):
                continue
            if rule.beside and not self._has(name, segments[-1], rule.beside):
                continue
            if any(self._has(name, segments[-1], other) for other in rule.lone):
                continue
            return rule
        return None

    def _has(self, name: str, leaf: str, other: str) -> bool:
        """Whether the checkpoint has a tensor of the same name but for its last word, whatever the numbers."""
        if not self._patterns:
            self._patterns.update(NUMBERS.sub("#", known) for known in self._names if len(known) <= LONGEST_NAME)
        start, _, end = name.rpartition(leaf)
        return NUMBERS.sub("#", start) + other + end in self._patterns


def _stack_labels(lists: Iterable[tuple[str, ...]], rules: Rules) -> dict[tuple[str, ...], str]:
    """What stands before a layer's number where several lists of layers would count alike."""
    lists = sorted(lists)
    named = {parents: next((word for word in parents if word in rules.stacks), "") for parents in lists}
    if len(set(named.values())) == 1 and len(lists) > 0:
        named = dict.fromkeys(lists, "")
    labels: dict[tuple[str, ...], str] = {}
    for stack in set(named.values()):
        alike = [parents for parents in lists if named[parents] == stack and not STAGE.fullmatch(parents[-1])]
        for parents in alike:
            own = [word for word in parents if any(word not in other for other in alike)] if len(alike) > 1 else []
            words = [stack, *(word for word in own if word != stack and word not in rules.nameless)]
            labels[parents] = ".".join(word for word in words if word)
    taken = list(labels.values())
    return {parents: label if taken.count(label) == 1 else ".".join(parents) for parents, label in labels.items()}


def _matrix_sizes(shape: tuple[int, ...], stack: int, axes: str) -> tuple[int, int]:
    """(rows, columns) of one stored matrix."""
    if stack:
        return (shape[1], shape[2]) if len(shape) == 3 else (shape[0] // stack, shape[1])
    if axes:
        out = math.prod(size for size, axis in zip(shape, axes, strict=True) if axis == "o")
        return out, math.prod(shape) // max(out, 1)
    return shape[0], math.prod(shape[1:])


def _is_convolution(shape: tuple[int, ...], name: str, role: str) -> bool:
    """Four and five axes are kernels; three may be stacked experts, so there the name decides; 1 x 1 is a matrix."""
    if len(shape) in (4, 5):
        return role == "Other" or any(size > 1 for size in shape[2:])
    return len(shape) == 3 and CONVOLUTION.search(name) is not None and (role == "Other" or shape[-1] > 1)


def _convolution(shape: tuple[int, ...], name: str, place: _Place) -> str:
    """A filter over one channel is depthwise, unless it may be the first of a network on one-channel images."""
    if shape[1] != 1:
        return "Conv"
    later = place.number > 0 and place.segments[place.number] != "0"
    return "Conv.depthwise" if later or DEPTHWISE.search(name) else "Conv"

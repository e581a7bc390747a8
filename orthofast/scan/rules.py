"""The rules of the model families (families.json) as compiled patterns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


class WordTest:
    """Whether a word matches a pattern as a whole, remembered."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._known: dict[str, bool] = {}

    def __call__(self, word: str) -> bool:
        """Whether it matches."""
        if word not in self._known:
            self._known[word] = self._pattern.fullmatch(word) is not None
        return self._known[word]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of families.json: either a path searched to the end of the name, or a context and a last word.

    Attributes:
        role: of ``roles.ROLES``.
        path: searched in the whole name; None for a rule of context and last word.
        contexts: where the last word means this.
        leaf: the last word.
        model_type: the families it holds for; None for all.
        split: layout of the rows, a name in ``splits.LAYOUTS``; None for one matrix.
        stored: "in_out" where the matrix is stored the other way round.
        beside: another last word that must stand beside this name.
        lone: last words none of which may stand beside this name, such as "w3|v1".
        in_layer: whether it holds inside layers alone.
        axes: for three stored axes, which are outputs and which inputs, such as "ioo".
        flat: whether experts lie behind each other on the first of two axes.
    """

    role: str
    path: re.Pattern[str] | None
    contexts: frozenset[str]
    leaf: re.Pattern[str]
    model_type: re.Pattern[str] | None
    split: str | None
    stored: str | None
    beside: str | None
    lone: tuple[str, ...]
    in_layer: bool
    axes: str
    flat: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything families.json says."""

    skip: tuple[tuple[int, re.Pattern[str], str], ...]
    contexts: tuple[tuple[str, re.Pattern[str]], ...]
    rules: tuple[Rule, ...]
    conv1d: frozenset[str]
    conv1d_leaves: frozenset[str]
    stacks: frozenset[str]
    nameless: frozenset[str]
    wrappers: frozenset[str]
    layer_list: WordTest
    inner_list: WordTest
    experts: WordTest


@cache
def load_rules() -> Rules:
    """The rules, read and compiled once."""
    data = json.loads(files("orthofast.scan").joinpath("families.json").read_text("utf-8"))
    return Rules(
        skip=tuple((rule.get("axes", 0), re.compile(rule["path"]), rule["reason"]) for rule in data["skip"]),
        contexts=tuple((rule["context"], re.compile(rule["segment"])) for rule in data["contexts"]),
        rules=tuple(_compiled(rule) for rule in data["rules"]),
        conv1d=frozenset(data["conv1d_model_types"]),
        conv1d_leaves=frozenset(data["conv1d_leaves"]),
        stacks=frozenset(data["stacks"]),
        nameless=frozenset(data["nameless"]),
        wrappers=frozenset(data["wrappers"]),
        layer_list=WordTest(data["layer_lists"]),
        inner_list=WordTest(data["inner_lists"]),
        experts=WordTest(data["experts"]),
    )


def _compiled(rule: Mapping[str, Any]) -> Rule:
    """One rule; a path is searched from a dot or the start to the end of the name."""
    return Rule(
        role=rule["role"],
        path=re.compile(rf"(?:^|\.)(?:{rule['path']})$") if "path" in rule else None,
        contexts=frozenset(rule.get("context", "").split("|")),
        leaf=re.compile(rule.get("leaf", "")),
        model_type=re.compile(rule["model_type"]) if "model_type" in rule else None,
        split=rule.get("split"),
        stored=rule.get("stored"),
        beside=rule.get("beside"),
        lone=tuple(rule["lone"].split("|")) if "lone" in rule else (),
        in_layer=bool(rule.get("in_layer")),
        axes=rule.get("axes", ""),
        flat=bool(rule.get("flat")),
    )


def context_of(segment: str, rules: Rules) -> str:
    """What a word of a name says of everything below it; empty where it says nothing."""
    return next((context for context, pattern in rules.contexts if pattern.fullmatch(segment)), "")

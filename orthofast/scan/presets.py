"""Which layers, and rows or columns per role, published tables were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthofast.errors import InputError
from orthofast.scan.heads import tower_of

PRESETS = ("paper",)
ATTENTION = ("Query", "Keys", "Values")
OTHERS = ("Atten_Output", "Linear_1.weight", "Linear_1.gate", "Linear_2.weight")


@dataclass(frozen=True, slots=True)
class Preset:
    """The choices of a published table.

    Attributes:
        layers: labels of the layers it shows, whichever of them a model has.
        sides: role -> "rows" or "cols" or both; a role that is not named is not in the table.
    """

    layers: tuple[str, ...]
    sides: Mapping[str, tuple[str, ...]]


def preset(name: str, config: Mapping[str, object]) -> Preset:
    """The choices of a published table for a model with this configuration.

    "paper" is Table 5 of Lu et al. 2024 as its scripts computed it. ``PLM.py`` looks at layer 0 of BERT, RoBERTa, GPT-2
    and both stacks of T5: columns of the queries, keys and values, rows of the rest. ``qwen_lora.py`` looks at layer 8
    of Qwen-7B: both sides of queries, keys and values, columns of the rest. No script was published for LLaMA; its
    numbers fit the first.

    Raises:
        InputError: if there is no such preset.

    >>> preset("paper", {"model_type": "roberta"}).sides["Query"]
    ('cols',)
    >>> preset("paper", {"model_type": "qwen"}).layers
    ('8',)
    """
    if name not in PRESETS:
        raise InputError(f"preset needs one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    types = (config.get("model_type"), tower_of(config, ()).get("model_type"))
    if "qwen" in types:
        both, columns = ("rows", "cols"), ("cols",)
        return Preset(("8",), dict.fromkeys(ATTENTION, both) | dict.fromkeys(OTHERS, columns))
    sides = dict.fromkeys(ATTENTION, ("cols",)) | dict.fromkeys(OTHERS, ("rows",))
    return Preset(("0", "encoder.0", "decoder.0"), sides)

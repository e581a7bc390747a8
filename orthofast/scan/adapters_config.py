"""What adapter_config.json of PEFT says: rank and scale of each module, and what cannot be merged, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from orthofast.errors import CheckpointError

# initialisations that take something out of the base: the published base is not the one that was trained on
ALTERED = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# entries of the configuration that make the product B A something else than the update of a weight
UNSUPPORTED = {
    "layer_replication": "layer_replication, which builds another stack of layers",
    "use_qalora": "QALoRA, whose inputs are averaged in groups",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "kasa_config": "KaSA, which cuts the base's singular values and puts others between the factors",
    "monteclora_config": "MonteCLoRA, which draws its factors at random",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only, so that no merged weight exists",
}
SUPPORTED = "LoRA, rsLoRA, DoRA and what starts as they do are read"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The entries that decide an update.

    Attributes:
        name: of the adapter, for sentences.
        rank: of modules that no pattern names.
        alpha: of modules that no pattern names.
        ranks: (pattern, rank), the first that fits counts.
        alphas: (pattern, alpha), likewise.
        root: whether the product is divided by sqrt(rank) and not by the rank (rsLoRA).
        transposed: whether weights were said to be stored as (in, out).
        parameters: ends of the names of parameters that are adapted without a module.
        altered: the initialisation that changed the base, None for one that did not.
    """

    name: str
    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    root: bool
    transposed: bool
    parameters: tuple[str, ...]
    altered: str | None

    def rank_of(self, module: str) -> int:
        """Rank of the factors of a module, by its path in the model."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(module)
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    @property
    def refusal(self) -> str | None:
        """Why merged weights are not measured; None where they are."""
        if self.altered is None:
            return None
        return (
            f"{self.name} was initialised by {self.altered}, which took a part out of the base before training: base "
            "plus update is no model that was trained, so the update alone is measured; convert the adapter to plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion) to measure the merged weights"
        )


def read_config(found: Mapping[str, object], name: str) -> AdapterConfig:
    """Check the entries of adapter_config.json.

    Args:
        found: the JSON object.
        name: of the adapter, for sentences.

    Raises:
        CheckpointError: if the adapter is of another kind, or an entry cannot be used; the message names it.

    >>> config = read_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"k_proj": 2}}, "mine")
    >>> config.scale_of("model.layers.0.self_attn.q_proj"), config.scale_of("model.layers.0.self_attn.k_proj")
    (2.0, 8.0)
    """
    kind = found.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        said = f"of the type {kind}" if isinstance(kind, str) else "without a peft_type"
        raise CheckpointError(f"the adapter {name} is {said}, which is not merged here: {SUPPORTED}")
    for entry, what in UNSUPPORTED.items():
        if found.get(entry) not in (None, False, [], {}):
            raise CheckpointError(f"the adapter {name} uses {what}: {SUPPORTED}")
    started = found.get("init_lora_weights")
    altered = None
    if isinstance(started, str):
        altered = next((label for start, label in ALTERED.items() if started.lower().startswith(start)), None)
    parameters = found.get("target_parameters")
    return AdapterConfig(
        name,
        _rank(found.get("r", 8), "r", name),
        _alpha(found.get("lora_alpha", 8), "lora_alpha", name),
        tuple((key, _rank(rank, "rank_pattern", name)) for key, rank in _patterns(found, "rank_pattern", name)),
        tuple((key, _alpha(alpha, "alpha_pattern", name)) for key, alpha in _patterns(found, "alpha_pattern", name)),
        found.get("use_rslora") is True,
        found.get("fan_in_fan_out") is True,
        tuple(p for p in parameters if isinstance(p, str)) if isinstance(parameters, list) else (),
        altered,
    )


def _rank(value: object, entry: str, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the adapter {name} gives {entry} the value {value!r:.40}; a rank is a positive integer")
    return value


def _alpha(value: object, entry: str, name: str) -> float:
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise CheckpointError(f"the adapter {name} gives {entry} the value {value!r:.40}; it needs a finite number")
    return found


def _patterns(found: Mapping[str, object], entry: str, name: str) -> list[tuple[re.Pattern[str], object]]:
    """As PEFT reads them: a regex that must match the end of the path, after any dotted words."""
    given = found.get(entry) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"the adapter {name} needs an object of patterns as {entry}, got {type(given).__name__}")
    patterns = []
    for key, value in given.items():
        try:
            patterns.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            raise CheckpointError(f"the adapter {name} has no regex in {entry}: {key!r:.60}: {error}") from None
    return patterns

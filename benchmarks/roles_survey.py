"""How many names of all model families in transformers the rules of orthofast.scan.roles know: counts, and the misses.

Every configuration class is built with its defaults on the meta device, its names are turned back into those on disk,
and each matrix inside a layer is read. That counts "some role", not "the right role". Where a family's names in memory
are others than on disk, both must give the same number of values under each role: two sets of names check each other.

    python -m benchmarks.roles_survey [FAMILY ...]
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import configuration_auto, modeling_auto

from orthofast.scan.matrices import holds_matrices, matrices_of
from orthofast.scan.roles import Roles

HEADS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Names:
    """Shapes by name, on disk and in memory, and the configuration of one family with its default sizes."""

    disk: dict[str, tuple[int, ...]]
    memory: dict[str, tuple[int, ...]]
    config: dict[str, object]


def names_of(family: str) -> Names:
    """Build a family's model on the meta device."""
    config = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[family])()
    class_names = next(table[family] for table in HEADS if family in table)
    model_class = getattr(transformers, class_names if isinstance(class_names, str) else class_names[0])
    with torch.device("meta"):
        model = model_class(config)
    state = stored = model.state_dict()
    try:
        stored = revert_weight_conversion(model, state)
    except Exception as error:  # noqa: BLE001 - names in memory are names that are saved, too
        print(f"# {family}: names as in memory ({type(error).__name__})", file=sys.stderr)
    disk, memory = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (stored, state))
    return Names(disk, memory, json.loads(config.to_json_string(use_diff=False)))


def values_per_role(shapes: dict[str, tuple[int, ...]], config: dict[str, object]) -> Counter[str]:
    """How many values are read under each role."""
    roles = Roles(shapes, config)
    found: Counter[str] = Counter()
    for name, shape in shapes.items():
        reading = roles.read(name, shape)
        if len(shape) >= 2 and reading.skip is None and holds_matrices(shape, reading):
            for matrix in matrices_of(name, shape, reading):
                found[matrix.role] += matrix.out * matrix.inward
    return found


def misses(shapes: dict[str, tuple[int, ...]], config: dict[str, object]) -> Iterator[tuple[str, bool]]:
    """(name with its numbers as #, whether a role was found) for each matrix inside a layer."""
    roles = Roles(shapes, config)
    for name, shape in shapes.items():
        if len(shape) < 2 or 1 in (len(shape) - shape.count(1), shape[0] if len(shape) == 2 else 0):
            continue
        reading = roles.read(name, shape)
        if reading.skip is not None or reading.layer is None:
            continue
        read = reading.known and (holds_matrices(shape, reading) or len(shape) != 3)
        yield re.sub(r"(?<=\.)\d+(?=\.)", "#", name), read


def main(families: list[str]) -> None:
    """Print one line per family with misses, then the counts."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    complete = built = matrices = unknown = renamed = alike = 0
    for family in families or sorted(configuration_auto.CONFIG_MAPPING_NAMES):
        try:
            names = names_of(family)
        except Exception as error:  # noqa: BLE001 - no default sizes, or packages that are not installed
            print(f"- {family}: not built ({type(error).__name__})")
            continue
        built += 1
        found = list(misses(names.disk, names.config))
        matrices += len(found)
        wrong = Counter(name for name, read in found if not read)
        unknown += wrong.total()
        complete += not wrong
        if wrong:
            print(
                f"{family}: {wrong.total()} of {len(found)}: " + ", ".join(f"{n} x{c}" for n, c in wrong.most_common(6))
            )
        if names.disk != names.memory:
            disk, memory = (values_per_role(shapes, names.config) for shapes in (names.disk, names.memory))
            renamed += 1
            alike += disk == memory
            if disk != memory:
                differ = sorted(role for role in disk | memory if disk[role] != memory[role])
                print(f"{family}: other values on disk than in memory under {', '.join(differ)}")
    print(f"{complete} of {built} families complete; {unknown} of {matrices} matrices inside layers without a role")
    print(f"{alike} of {renamed} families with other names on disk have the same values under each role")


if __name__ == "__main__":
    main(sys.argv[1:])

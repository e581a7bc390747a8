"""What a checkpoint holds, from its headers alone: roles, shapes, stored types, what no rule describes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from orthofast.scan.document import finite
from orthofast.scan.page_data import reasons
from orthofast.scan.plan import Item, Plan, layer_order
from orthofast.scan.result import Skipped
from orthofast.scan.tables import roles_in
from orthofast.scan.weights import PLAIN

SCHEMA_VERSION = 1
SHAPES = 4  # of a role that are named


@dataclass(slots=True)
class RoleFound:
    """The matrices of one role.

    Attributes:
        role: one of ``roles.ROLES``.
        matrices: how many.
        layers: in how many layers.
        experts: how many of them belong to an expert.
        shapes: (out, in) -> how many have it, the most frequent first.
        dtypes: how they are stored.
        heads: attention heads of each matrix, 0 where that is not known.
    """

    role: str
    matrices: int
    layers: int
    experts: int
    shapes: dict[tuple[int, int], int]
    dtypes: tuple[str, ...]
    heads: int


@dataclass(slots=True)
class Inspection:
    """Everything the headers tell.

    Attributes:
        checkpoint: its name.
        format: "safetensors", "gguf" and so on.
        model_type: of the configuration, None without one.
        quantization: the method's name, None where nothing is quantised.
        files: weight files and their sizes in bytes.
        layers: rows of the table, in their order.
        roles: what was found of each role.
        unmapped: (name with a star for numbers, shape, how many) of matrices no rule describes: role "Other".
        skipped: (name with a star for numbers, reason, how many).
        failed: (name, sentence) of what cannot be read.
        tied: other name -> the stored tensor's name.
        nbytes: bytes a scan would read.
        forecast: what a scan would cost, by name; empty where that is not known.
        notes: remarks.
    """

    checkpoint: str
    format: str
    model_type: str | None
    quantization: str | None
    files: dict[str, int]
    layers: tuple[str, ...]
    roles: list[RoleFound]
    unmapped: list[tuple[str, tuple[int, int], int]]
    skipped: list[tuple[str, str, int]]
    failed: list[tuple[str, str]]
    tied: dict[str, str]
    nbytes: int
    forecast: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The JSON document as Python objects."""
        document = asdict(self)
        for found, role in zip(document["roles"], self.roles, strict=True):
            found["shapes"] = [{"shape": list(shape), "count": count} for shape, count in role.shapes.items()]
        names: dict[str, tuple[str, ...]] = {"unmapped": ("name", "shape", "count"), "failed": ("name", "error")}
        names["skipped"] = ("name", "reason", "count")
        for key, fields in names.items():
            document[key] = [dict(zip(fields, entry, strict=True)) for entry in document[key]]
        document["files"] = [{"name": name, "nbytes": nbytes} for name, nbytes in self.files.items()]
        result: dict[str, object] = finite({"schema_version": SCHEMA_VERSION, "kind": "inspection", **document})
        return result

    def to_json(self) -> str:
        """The inspection as one JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def inspect_plan(plan: Plan) -> Inspection:
    """What a plan's headers tell; no tensor is read."""
    catalog = plan.catalog
    groups: dict[str, list[tuple[Item, int]]] = {}
    layers: dict[str, None] = {}
    others: list[Skipped] = []
    for item in plan.items:
        for index, matrix in enumerate(item.matrices):
            groups.setdefault(matrix.role, []).append((item, index))
            if matrix.layer is not None:
                layers[matrix.layer] = None
            if matrix.role == "Other":
                others.append(Skipped(matrix.name, f"{matrix.out}x{matrix.inward}"))
    method = catalog.quantization.get("quant_method")
    model_type = catalog.config.get("model_type")
    return Inspection(
        catalog.root.absolute().name or str(catalog.root),
        catalog.format,
        model_type if isinstance(model_type, str) else None,
        str(method) if method else None,
        {file.name: size for file, size in catalog.files.items()},
        ordered_layers(layers),
        [_role(role, groups[role]) for role in roles_in(groups)],
        [(name, _shape(size), count) for name, size, count in reasons(others)],
        reasons(Skipped(name, reason) for name, reason in plan.skipped),
        [(fault.name, fault.error) for fault, _ in plan.faults],
        dict(catalog.tied),
        plan.nbytes,
        {},
        list(catalog.notes),
    )


def ordered_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """Rows of the table from top to bottom."""
    return tuple(sorted(layers, key=layer_order))


def _role(role: str, found: list[tuple[Item, int]]) -> RoleFound:
    shapes: dict[tuple[int, int], int] = {}
    layers: set[str | None] = set()
    dtypes: dict[str, None] = {}
    experts = heads = 0
    for item, index in found:
        matrix = item.matrices[index]
        shapes[matrix.out, matrix.inward] = shapes.get((matrix.out, matrix.inward), 0) + 1
        layers.add(matrix.layer)
        experts += matrix.expert is not None
        heads = max(heads, matrix.heads)
        dtypes[_stored_as(item)] = None
    ordered = dict(sorted(shapes.items(), key=lambda entry: -entry[1]))
    return RoleFound(role, len(found), len(layers - {None}), experts, ordered, tuple(dtypes), heads)


def _stored_as(item: Item) -> str:
    """The stored type; of a quantised weight with its coding."""
    weight = item.weight
    return weight.first.dtype if weight.coding == PLAIN else f"{weight.coding} ({weight.first.dtype})"


def _shape(text: str) -> tuple[int, int]:
    out, _, inward = text.partition("x")
    return int(out), int(inward)

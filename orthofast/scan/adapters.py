"""LoRA adapters as PEFT saves them, scanned with their base: which base weight each update belongs to."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

from orthofast.errors import CheckpointError, InputError
from orthofast.scan.adapters_config import AdapterConfig, read_config
from orthofast.scan.adapters_experts import Factored, by_role, experts_one_by_one
from orthofast.scan.adapters_names import Names
from orthofast.scan.adapters_update import ADDED, LORA, MAGNITUDE, REPLACED, REPLACEMENT, UPDATE, A, B, Update
from orthofast.scan.catalog import TORCH_DTYPES, Catalog, Extent, Fault
from orthofast.scan.matrices import matrices_of
from orthofast.scan.plan import Item, Plan, natural, unmeasurable
from orthofast.scan.readers import hub
from orthofast.scan.readers.checkpoint import CONFIG_LIMIT_BYTES, open_checkpoint
from orthofast.scan.readers.files import is_folder, listed, read_json
from orthofast.scan.readers.folder import ADAPTER_CONFIG, ADAPTERS
from orthofast.scan.roles import Reading, Roles
from orthofast.scan.weights import PLAIN, Weight

START = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.")
PART = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?!bias$)[^.]+)?(?:\.weight)?")
KINDS = {"lora_A": A, "lora_B": B, "lora_embedding_A": A, "lora_embedding_B": B, "lora_magnitude_vector": MAGNITUDE}
SAVED = re.compile(r"\.(modules_to_save(\.[^.]+(?=\.))?|base_layer)(?=\.)")
INDEXES = tuple(f"{name}.index.json" for name in ADAPTERS)


@dataclass(slots=True)
class Adapter:
    """An adapter's files, sorted; no tensor has been read.

    Attributes:
        config: what decides the updates.
        catalog: the index of its files.
        digest: SHA-256 of its configuration.
        updates: the factors, by module and depth.
        whole: name in the model -> weight that takes the place of the base's.
        skipped: (name, reason) of tensors that change no matrix.
        faults: what cannot be used.
    """

    config: AdapterConfig
    catalog: Catalog
    digest: str
    dora: bool = False
    updates: dict[tuple[str, int], Factored] = field(default_factory=dict)
    whole: dict[str, Extent] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def open_adapter(source: str | os.PathLike[str]) -> Adapter:
    """Read the configuration and the headers of an adapter.

    Args:
        source: the folder with ``adapter_config.json``, one of its files, or a name on the Hugging Face hub.

    Raises:
        CheckpointError: if it cannot be read, or is of a kind that is not merged; the message names the kind.
        InputError: if ``source`` is no path and no name.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"adapter needs a path or a hub name, got a {type(source).__name__}")
    named = hub.model_name(source)
    folder = hub.fetch(named)[0] if named is not None else Path(source)
    if not is_folder(folder) and folder.exists():
        folder = folder.parent
    folder = _inner(folder)
    settings = read_json(folder / ADAPTER_CONFIG, CONFIG_LIMIT_BYTES)
    config = read_config(settings, folder.absolute().name if named is None else named.repo)
    catalog = open_checkpoint(
        next((folder / name for name in (*INDEXES, *ADAPTERS) if (folder / name).exists()), folder)
    )
    digest = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes()).hexdigest()
    adapter = Adapter(config, catalog, digest, settings.get("use_dora") is True)
    for extent in catalog.extents:
        _sort(adapter, extent)
    for fault in catalog.faults:
        adapter.faults.append(fault)
        part = PART.fullmatch(START.sub("", fault.name))
        if part is not None:  # the other half alone would be one more fault
            adapter.updates.pop(_place(part[1]), None)
    return adapter


def with_adapter(plan: Plan, adapter: Adapter) -> Plan:
    """The plan of a base with its adapter: each weight with what changes it.

    Parts of the adapter that fit no weight become rows with the reason.

    Raises:
        CheckpointError: if nothing of the adapter belongs to the base.
    """
    return _Joining(plan, adapter).plan()


def _inner(folder: Path) -> Path:
    """The folder with the configuration: an adapter with a name of its own is saved one level down."""
    if (folder / ADAPTER_CONFIG).exists() or not is_folder(folder):
        return folder
    inner = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if not inner:
        raise CheckpointError(f"{folder.name or folder} holds no {ADAPTER_CONFIG}: it is no adapter of PEFT")
    if len(inner) > 1:
        raise CheckpointError(f"{folder.name} holds several adapters, {listed([p.name for p in inner])}: name one")
    return inner[0]


def _place(module: str) -> tuple[str, int]:
    words = module.split(".")
    return ".".join(word for word in words if word != "base_layer"), words.count("base_layer")


def _sort(adapter: Adapter, extent: Extent) -> None:
    name = START.sub("", extent.name)
    part = PART.fullmatch(name)
    if part is not None:
        place = _place(part[1])
        update = adapter.updates.setdefault(place, Factored(*place, "embedding" in part[2]))
        if KINDS[part[2]] in update.parts:
            adapter.faults.append(
                Fault(extent.name, f"{extent.file.name} holds two {part[2]} of {place[0]}", extent.shape)
            )
        update.parts.setdefault(KINDS[part[2]], extent)
    elif "original_module." in name:
        adapter.skipped.append((extent.name, "the base's own weight, saved again"))
    elif (".lora_" in name and name.endswith(".bias")) or len(extent.shape) < 2:
        adapter.skipped.append((extent.name, f"of the adapter, of shape {list(extent.shape)}: it changes no matrix"))
    elif ".lora_" in name or "trainable_tokens" in name:
        reason = "is a part that LoRA itself has not, and is not merged"
        adapter.faults.append(Fault(extent.name, f"{extent.file.name}: {extent.name!a} {reason}", extent.shape))
    else:
        adapter.whole[SAVED.sub("", name)] = extent


class _Joining:
    """A plan while an adapter is joined to it."""

    def __init__(self, plan: Plan, adapter: Adapter) -> None:
        self._plan, self._adapter, self._config = plan, adapter, adapter.config
        self._items = {item.weight.name: item for item in plan.items}
        known = [*self._items, *(name for name, _ in plan.skipped), *(fault.name for fault, _ in plan.faults)]
        self._names = Names(known, plan.catalog.tied)
        shapes = {extent.name: extent.shape for extent in plan.catalog.extents}
        shapes |= {name: item.weight.shape for name, item in self._items.items()}
        self._roles = Roles(
            shapes | {name: extent.shape for name, extent in adapter.whole.items()}, plan.catalog.config
        )
        self._stored = {extent.name for extent in plan.catalog.extents} | set(plan.catalog.memory)
        self._added: list[Item] = []
        self._unmerged = [(fault, self._reading(fault)) for fault in adapter.faults]
        self._counts = {LORA: 0, REPLACED: 0, ADDED: 0}
        self._matched = 0

    def plan(self) -> Plan:
        updates: dict[str, list[Factored]] = {}
        for (path, _), update in sorted(self._adapter.updates.items(), key=lambda entry: natural(entry[0][0])):
            updates.setdefault(path, []).append(update)
        for path, group in updates.items():
            self._join(path, group)
        for name, extent in self._adapter.whole.items():
            self._replace(name, extent)
        if not self._matched:
            raise CheckpointError(self._foreign([*updates, *self._adapter.whole]))
        plan, catalog = self._plan, self._adapter.catalog
        refusal = self._config.refusal
        notes = [*plan.catalog.notes, *catalog.notes, *([refusal] if refusal else [])]
        joined = replace(
            plan.catalog,
            memory=plan.catalog.memory | {self._own(name): value for name, value in catalog.memory.items()},
            files=plan.catalog.files | catalog.files,
            notes=notes,
        )
        items = [self._items[item.weight.name] for item in plan.items]
        skipped = sorted([*plan.skipped, *self._adapter.skipped], key=lambda pair: natural(pair[0]))
        return replace(
            plan,
            catalog=joined,
            items=items + self._added,
            skipped=skipped,
            adapter=self._facts(),
            unmerged=self._unmerged,
        )

    def _foreign(self, names: list[str]) -> str:
        """One sentence on an adapter of which nothing fits."""
        name = self._config.name
        if names:
            some = f"such as {names[0]!a}"
            return f"the adapter {name} does not belong to this base: of its {len(names)} modules none is there, {some}"
        broken = list(dict.fromkeys(fault.error for fault in self._adapter.faults))
        return f"the adapter {name} holds no update" + (f": {broken[0]}" if broken else "")

    def _facts(self) -> dict[str, object]:
        config = self._config
        return {
            "name": config.name,
            "revision": self._adapter.catalog.revision,
            "config_sha256": self._adapter.digest,
            "rank": config.rank,
            "alpha": config.alpha,
            "rslora": config.root,
            "dora": self._adapter.dora,
            "initialised_by": config.altered,
            "updates": self._counts[LORA],
            "replaced": self._counts[REPLACED],
            "added": self._counts[ADDED],
        }

    def _join(self, path: str, group: list[Factored]) -> None:
        """Give each set of factors of a module its weight."""
        found = self._names.module(path)
        if len(group) == 1 and found:
            self._attach(found, path, group)
            return
        found = self._names.parameters(path, self._config.parameters)
        if len(found) == len(group):
            self._attach(found, path, group)
            return
        changes = experts_one_by_one(path, group, self._config, self._items.values(), self._roles)
        if not changes:
            for update in group:
                self._fail(update, self._names.why_not(path))
            return
        self._matched += 1
        for item, parts, change in changes:
            self._items[item.weight.name] = self._with(item, parts, change)
        self._counts[LORA] += len(changes)

    def _attach(self, names: list[str], path: str, group: list[Factored]) -> None:
        self._matched += 1
        if len(names) > 1 and len(group) == 1:
            self._fail(group[0], f"{path} fits {listed(names)} of the base")
            return
        items = [self._items.get(name) for name in names]
        if any(item is None for item in items):
            return  # not selected, or a row with its own error
        known = sorted((item for item in items if item is not None), key=by_role)
        inner = sorted(group, key=lambda update: -update.depth)
        orders = list(permutations(inner))
        tried = [[self._update(i, path, u) for i, u in zip(known, order, strict=True)] for order in orders]
        best = next((i for i, found in enumerate(tried) if all(isinstance(u, Update) for u in found)), 0)
        for item, update, outcome in zip(known, orders[best], tried[best], strict=True):
            if isinstance(outcome, str):
                self._fail(update, outcome)
            elif UPDATE in item.weight.settings:
                self._fail(update, f"{item.weight.name} of the base has an update already")
            else:
                self._items[item.weight.name] = self._with(item, update.parts, outcome)
                self._counts[LORA] += 1

    def _with(self, item: Item, parts: Mapping[str, Extent], update: Update) -> Item:
        weight = item.weight
        own = {role: replace(extent, name=self._own(extent.name)) for role, extent in parts.items()}
        changed = replace(weight, parts={**weight.parts, **own}, settings={**weight.settings, UPDATE: update})
        return replace(item, weight=changed)

    def _own(self, name: str) -> str:
        """A name that no tensor of the base has."""
        return f"{name} (adapter)" if name in self._stored else name

    def _update(self, item: Item, path: str, factored: Factored) -> Update | str:
        """How factors act on a weight, or why they cannot."""
        parts, weight, matrix = factored.parts, item.weight, item.matrices[0]
        missing = [label for role, label in ((A, "lora_A"), (B, "lora_B")) if role not in parts]
        if self._adapter.dora and MAGNITUDE not in parts:
            missing.append("lora_magnitude_vector")
        if missing:
            return f"{' and '.join(missing)} of {path} is missing"
        odd = next((extent for extent in parts.values() if extent.dtype not in TORCH_DTYPES), None)
        if odd is not None:
            return f"{odd.name} is stored as {odd.dtype}, a factor needs a floating-point type"
        key = path if weight.name.endswith(".weight") else f"{path}.{weight.name.rpartition('.')[2]}"
        a, b = parts[A].shape, parts[B].shape
        rank, shape = self._config.rank_of(key), weight.shape
        stacked = len(shape) == 3 and matrix.stack > 0
        count = shape[0] if stacked else 1
        axes = 2 if stacked else len(shape)
        if len(a) != axes or len(b) != axes or not (axes == 2 or matrix.role.startswith("Conv")):
            return f"lora_A {list(a)} and lora_B {list(b)} of {path} make no update of a weight of shape {list(shape)}"
        if a[0] != b[1] or any(size != 1 for size in b[2:]):
            return f"lora_A {list(a)} and lora_B {list(b)} of {path} have different ranks"
        if a[0] != rank * count:
            return f"lora_A of {path} has rank {a[0] / count:g}, {ADAPTER_CONFIG} says {rank}"
        wanted = shape[1:] if stacked else (shape[0], math.prod(shape[1:]))
        sizes = b[0], math.prod(a[1:])
        fits = [sizes == tuple(wanted), sizes[::-1] == tuple(wanted)]
        if not any(fits):
            return f"the update of {path} is {sizes[0]} x {sizes[1]}, the base has a weight of shape {list(shape)}"
        transposed = fits[1]
        if all(fits):
            transposed = factored.embedding or matrix.transposed or (self._config.transposed and not stacked)
        magnitude = parts.get(MAGNITUDE)
        if magnitude is not None and math.prod(magnitude.shape) != b[0]:
            return f"lora_magnitude_vector of {path} has shape {list(magnitude.shape)}, needed are {b[0]} lengths"
        return Update(
            LORA, self._config.scale_of(key), rank, transposed, count if stacked else 0, self._config.refusal is None
        )

    def _replace(self, name: str, extent: Extent) -> None:
        """A weight that the adapter brings whole."""
        found = self._names.module(name.removesuffix(".weight"))
        if extent.dtype not in TORCH_DTYPES:
            error = f"{extent.name} is stored as {extent.dtype}, which is no floating-point type"
            self._unmerged.append((Fault(extent.name, error, extent.shape), self._roles.read(name, extent.shape)))
            return
        if len(found) == 1:
            self._matched += 1
            item = self._items.get(found[0])
            if item is None:
                return
            if item.weight.shape == extent.shape:
                given = item.weight.settings.get(UPDATE)
                update = given if isinstance(given, Update) else Update(REPLACED)
                self._items[found[0]] = self._with(item, {REPLACEMENT: extent}, update)
                self._counts[REPLACED] += 1
                return
        reading = self._roles.read(name, extent.shape)
        own = replace(extent, name=self._own(extent.name))
        weight = Weight(name, extent.shape, PLAIN, {"weight": own}, {UPDATE: Update(ADDED)})
        reason = self._plan.outside(name, reading) or reading.skip or unmeasurable(weight, reading)
        if reason:
            self._adapter.skipped.append((extent.name, reason))
        else:
            self._added.append(Item(weight, tuple(matrices_of(name, extent.shape, reading))))
            self._counts[ADDED] += 1

    def _fail(self, update: Factored, error: str) -> None:
        fault = Fault(update.name, f"the adapter {self._config.name}: {error}", None)
        reading = self._reading(fault, update.path)
        if self._plan.outside(f"{update.path}.weight", reading) is None:
            self._unmerged.append((fault, reading))

    def _reading(self, fault: Fault, path: str | None = None) -> Reading:
        name = path if path is not None else START.sub("", fault.name)
        return Reading("") if fault.whole_file else self._roles.read(f"{name}.weight", fault.shape or ())

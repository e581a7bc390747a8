"""Models of the Hugging Face hub, through huggingface_hub: into its cache, or their headers alone."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from orthofast.errors import CheckpointError, MissingPackageError
from orthofast.scan.catalog import BITS, Catalog, Extent, Fault, stored_bytes
from orthofast.scan.readers.files import inside, is_folder, read_json, shown
from orthofast.scan.readers.folder import ADAPTER_CONFIG, CONFIG, PARAMS, QUANTIZE_CONFIGS, WEIGHTS, choose, is_index

NAME = re.compile(r"(hf://)?([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?")
SHORT_NAME = re.compile(r"(hf://)([\w][\w.-]*)(?:@([\w./-]+))?")  # old models without an organisation
BESIDE = (CONFIG, ADAPTER_CONFIG, PARAMS, *QUANTIZE_CONFIGS)

OWN_ERRORS = (
    "HTTPError",
    "HfHubHTTPError",
    "EntryNotFoundError",
    "NotASafetensorsRepoError",
    "SafetensorsParsingError",
)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model on the hub; without a revision its main branch."""

    repo: str
    revision: str | None = None


def model_name(source: str | os.PathLike[str]) -> ModelName | None:
    """The model a text names, None for a path: what exists on disk is always a path."""
    if not isinstance(source, str):
        return None
    found = NAME.fullmatch(source) or SHORT_NAME.fullmatch(source)
    if found is None:
        return None
    if not found[1] and (
        Path(source).exists() or found[2].endswith((*WEIGHTS, ".json")) or is_folder(Path(source).parent)
    ):
        return None
    return ModelName(found[2], found[3])


def fetch(name: ModelName) -> tuple[Path, str]:
    """Download the files that make up a checkpoint into the cache; what is there is not fetched again.

    HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are obeyed, by huggingface_hub itself.

    Returns:
        The snapshot's folder and the commit it is of.

    Raises:
        CheckpointError: if the model, its files or the network are not there.
        MissingPackageError: if huggingface_hub is not installed.
    """
    package = _package(name)
    errors = _errors(package)
    try:
        wanted = _wanted(package, name)
    except errors as error:
        if getattr(error, "response", None) is not None:  # the hub answered: there is no such model, or no access
            raise CheckpointError(_sentence(package, name, error)) from None
        wanted = None  # no network: what the cache holds
    try:
        folder = Path(
            package.snapshot_download(
                name.repo, revision=name.revision, allow_patterns=wanted, local_files_only=wanted is None
            )
        )
    except errors as error:
        cached = getattr(error, "snapshot_path", None)  # IncompleteSnapshotError: some files are in the cache
        if not isinstance(cached, str) or not is_folder(Path(cached)):
            raise CheckpointError(_sentence(package, name, error)) from None
        folder = Path(cached)  # what is missing is named when the folder is read
    return folder, folder.name


def read_headers(name: ModelName) -> Catalog:
    """Catalog of a model's safetensors headers, fetched by range requests; its tensors cannot be read from it.

    Offsets count from the start of a file's data. Extents name files that are not there.

    Raises:
        CheckpointError: if the model is not there, has no safetensors, or the network is not there.
        MissingPackageError: if huggingface_hub is not installed.
    """
    package = _package(name)
    try:
        revision = package.HfApi().model_info(name.repo, revision=name.revision).sha
        found = package.HfApi().get_safetensors_metadata(name.repo, revision=revision)
    except _errors(package) as error:
        raise CheckpointError(_sentence(package, name, error)) from None
    catalog = Catalog(Path(name.repo), revision=revision)
    for file, header in sorted(found.files_metadata.items()):
        for tensor, entry in header.tensors.items():
            shape = tuple(entry.shape)
            start, end = entry.data_offsets
            if entry.dtype not in BITS or stored_bytes(entry.dtype, shape) != end - start:
                error_text = f"{file}: the header entry of {shown(tensor)} says {entry.dtype} {list(shape)}"
                catalog.faults.append(Fault(tensor, error_text, shape))
            else:
                catalog.extents.append(Extent(tensor, Path(file), start, end - start, entry.dtype, shape))
    _add_config(catalog, package, name)
    catalog.notes.append("only the headers were fetched from the hub")
    return catalog


def _wanted(package: ModuleType, name: ModelName) -> list[str]:
    """Names of the files to download: one copy of the weights, and the configurations."""
    names = package.HfApi().list_repo_files(name.repo, revision=name.revision)
    root = [file for file in names if "/" not in file]
    choice = choose(root, name.repo)
    wanted = [*choice.names, *(file for file in BESIDE if file in root)]
    if choice.kind == "dcp":
        wanted += [file for file in root if file.endswith(".distcp")]
    if is_index(choice.names[0]):
        index = read_json(Path(package.hf_hub_download(name.repo, choice.names[0], revision=name.revision)))
        weight_map = index.get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        wanted += sorted(shard for shard in shards if isinstance(shard, str) and inside(shard, WEIGHTS))
    return wanted


def _add_config(catalog: Catalog, package: ModuleType, name: ModelName) -> None:
    expected: tuple[type[Exception], ...] = (CheckpointError, *_errors(package))
    try:
        file = Path(package.hf_hub_download(name.repo, CONFIG, revision=catalog.revision))
        catalog.config = read_json(file)
        catalog.config_digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except expected as error:
        catalog.notes.append(f"the configuration was not fetched: {shown(str(error))}")


def _package(name: ModelName) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise MissingPackageError(
            f"{name.repo} is no path here; to take it from the Hugging Face hub: pip install 'orthofast[hub]'"
        ) from None
    return huggingface_hub


def _errors(package: ModuleType) -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: of its own, of its client, of the system."""
    own = [getattr(package.errors, name, OSError) for name in OWN_ERRORS]
    return (OSError, ValueError, *own)


def _sentence(package: ModuleType, name: ModelName, error: Exception) -> str:
    what = f"{name.repo}@{name.revision}" if name.revision else name.repo
    errors = package.errors
    if isinstance(error, getattr(errors, "GatedRepoError", ())):
        return f"{what} is gated on the hub: ask for access on its page and set HF_TOKEN"
    if isinstance(error, getattr(errors, "RepositoryNotFoundError", ())):
        return f"{what} is neither a path here nor a model on the hub that can be seen; for a private one set HF_TOKEN"
    if isinstance(error, getattr(errors, "RevisionNotFoundError", ())):
        return f"{what}: the hub has no such revision"
    if isinstance(error, getattr(errors, "NotASafetensorsRepoError", ())):
        return f"{what} has no safetensors on the hub, of which alone headers can be fetched; scan it to download it"
    first = (str(error).splitlines() or [""])[0]
    if getattr(error, "response", None) is None:
        return (
            f"{what} is neither a path here nor in the cache, and the hub cannot be asked "
            f"(offline, or HF_HUB_OFFLINE is set): {shown(first)}"
        )
    return f"{what} cannot be fetched from the hub: {shown(first)}"

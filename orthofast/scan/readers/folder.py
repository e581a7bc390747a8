"""Which files of a folder are the checkpoint: one copy of the weights, so that none counts twice; by names alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from orthofast.errors import CheckpointError
from orthofast.scan.readers.files import listed

INDEX = re.compile(r"\.(safetensors|bin)\.index(\.[\w-]+)?\.json")  # with a variant as transformers puts it
SAFETENSORS = ".safetensors"
TORCH = (".bin", ".pt", ".pth", ".ckpt")
GGUF = ".gguf"
WEIGHTS = (SAFETENSORS, *TORCH, GGUF)
DCP = ".metadata"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
PARAMS = "params.json"
QUANTIZE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# looked for in this order; the first that exists is the checkpoint
FIRST = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
SECOND = (
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_MODELS = ("optimizer*", "scheduler*", "scaler*", "training_args.bin", "rng_state*", "random_states*", "*.tmp")
SIDE_MODELS = ("mmproj*", "imatrix*", "ggml-vocab*")
COPIES = ("original", "metal", "onnx")  # folders in which publishers keep the same weights again
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
META = re.compile(r"consolidated\.\d{2}\.pth")
OTHER_FORMATS = {
    ".h5": "Keras",
    ".keras": "Keras",
    ".onnx": "ONNX",
    ".msgpack": "Flax",
    ".npz": "numpy",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow",
    ".mlmodel": "Core ML",
    ".ot": "rust-bert",
    ".nemo": "NeMo",
    ".llamafile": "llamafile",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is read of a folder.

    Attributes:
        kind: "index", "files", "dcp", "gguf" or "meta"; with "adapter" the files are an adapter's.
        names: the index, or the weight files.
        notes: remarks on what was chosen.
    """

    kind: str
    names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def choose(names: Collection[str], where: str) -> Choice:
    """Pick the checkpoint among the files of a folder.

    Args:
        names: names of the files, without folders.
        where: the folder's name, for the sentence.

    Raises:
        CheckpointError: if there is none, or no rule tells which.
    """
    names = sorted(name for name in names if not any(fnmatchcase(name, glob) for glob in NOT_MODELS))
    found = _first_of(names, FIRST)
    if found is None and ADAPTER_CONFIG in names:
        adapter = next((name for name in ADAPTERS if name in names), None)
        found = Choice("adapter", (adapter,)) if adapter else None
    found = found or _safetensors(names) or _first_of(names, SECOND) or _index(names, "bin")
    if found is None and DCP in names:
        found = Choice("dcp", (DCP,))
    found = found or _gguf(names) or _consolidated(names) or _torch(names, where)
    if found is not None:
        return found
    others = [name for name in names if name.endswith(tuple(OTHER_FORMATS))]
    if others:
        kinds = sorted({OTHER_FORMATS[suffix] for suffix in OTHER_FORMATS if any(n.endswith(suffix) for n in others)})
        raise CheckpointError(
            f"{where} holds only {listed(others)}, and {' and '.join(kinds)} files are not read; "
            "convert the checkpoint to safetensors"
        )
    raise CheckpointError(
        f"{where} holds no {SAFETENSORS} file, no file of torch ({', '.join(TORCH)}), no {GGUF} file and no {DCP} of a "
        "distributed checkpoint"
    )


def is_index(name: str) -> bool:
    """Whether a file is the index of shards."""
    return INDEX.search(name) is not None


def _first_of(names: list[str], wanted: tuple[str, ...]) -> Choice | None:
    for name in wanted:
        if name in names:
            return Choice("index" if is_index(name) else "files", (name,))
    return None


def _index(names: list[str], kind: str) -> Choice | None:
    told = [(name, INDEX.search(name)) for name in names if not name.startswith("consolidated")]
    found = [name for name, match in told if match and match[1] == kind]
    if not found:
        return None
    notes = (f"several indexes, {found[0]} was taken, not {listed(found[1:])}",) if found[1:] else ()
    return Choice("index", (found[0],), notes)


def _safetensors(names: list[str]) -> Choice | None:
    index = _index(names, "safetensors")
    files = [name for name in names if name.endswith(SAFETENSORS) and name not in ADAPTERS]
    files = [name for name in files if not name.startswith("consolidated")] or files
    return index or (Choice("files", tuple(files)) if files else None)


def _gguf(names: list[str]) -> Choice | None:
    files = [name for name in names if name.endswith(GGUF)]
    models = [name for name in files if not any(fnmatchcase(name, glob) for glob in SIDE_MODELS)] or files
    if not models:
        return None
    stems = sorted({SHARD.sub(".", name) for name in models})
    taken = tuple(name for name in models if SHARD.sub(".", name) == stems[0])
    notes = (f"several models, {stems[0]} was taken, not {listed(stems[1:])}",) if stems[1:] else ()
    return Choice("gguf", taken, notes)


def _consolidated(names: list[str]) -> Choice | None:
    files = tuple(name for name in names if META.fullmatch(name))
    if not files:
        return None
    return Choice("files" if len(files) == 1 else "meta", files)


def _torch(names: list[str], where: str) -> Choice | None:
    files = [name for name in names if name.endswith(TORCH)]
    if not files:
        return None
    if len(files) > 1 and not all(SHARD.search(name) for name in files):
        raise CheckpointError(f"{where} holds several files of torch: {listed(files)}; name the one to scan")
    return Choice("files", tuple(files))

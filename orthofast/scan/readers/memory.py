"""Tensors that are in memory already: a module or a state dict as a catalog."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.scan.catalog import Catalog, Extent, Fault
from orthofast.scan.readers.state_dicts import model_tensors
from orthofast.scan.readers.torch_file import TORCH_NAMES

CODES = {getattr(torch, name): code for name, code in TORCH_NAMES.items() if hasattr(torch, name)}


def catalog_of(source: nn.Module | Mapping[str, object]) -> Catalog:
    """Catalog of a module's or a state dict's tensors; nothing is copied, tied parameters stand in ``tied``.

    Raises:
        InputError: if there is no tensor in it.
    """
    catalog = Catalog(Path(type(source).__name__), format="memory")
    if isinstance(source, nn.Module):
        found: object = source.state_dict()
        catalog.config = _config(source)
    else:
        found = source
    add_tensors(catalog, found, catalog.root)
    if not catalog.extents and not catalog.faults:
        raise InputError(
            f"checkpoint needs a module or mapping with tensors in it, got a {type(source).__name__} without"
        )
    return catalog


def add_tensors(catalog: Catalog, found: object, file: Path) -> None:
    """Put the tensors of nested containers into a catalog: values in ``memory``, an extent for each."""
    first: dict[tuple[object, ...], str] = {}
    known = {extent.name for extent in catalog.extents}
    for name, value in model_tensors(found, Tensor, catalog.notes):
        assert isinstance(value, Tensor)
        tensor = value.detach()
        why = _unusable(tensor)
        if name in known:
            why = "comes twice; the first counts"
        if why is not None:
            catalog.faults.append(Fault(name, f"{file.name}: {name!a} {why}", tuple(tensor.shape)))
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            catalog.tied[name] = first[key]
            continue
        nbytes = tensor.numel() * tensor.element_size()
        catalog.memory[name] = tensor
        known.add(name)
        catalog.extents.append(Extent(name, file, 0, nbytes, CODES[tensor.dtype], tuple(tensor.shape)))


def _unusable(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is sparse, quantised or nested, which is not read"
    if tensor.device.type == "meta":
        return "has no values: it is on the meta device"
    if tensor.dtype not in CODES:
        return f"is of the type {tensor.dtype}, which is not read"
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        return f"claims {tensor.numel()} elements where {held} bytes are stored: it is a repeated view"
    return None


def _config(module: nn.Module) -> Mapping[str, object]:
    """The configuration that models of transformers carry; empty elsewhere."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    as_dict = getattr(config, "to_dict", None)
    found = as_dict() if callable(as_dict) else None
    return found if isinstance(found, dict) else {}

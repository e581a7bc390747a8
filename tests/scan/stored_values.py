"""Values of a catalog's tensors as the scan reads them: placed, read by position, viewed."""

from __future__ import annotations

import torch
from torch import Tensor

from orthofast.scan.catalog import Catalog
from orthofast.scan.reading import Files, lay_out, stored_tensor
from orthofast.scan.weights import PLAIN, Weight


def stored_values(catalog: Catalog) -> dict[str, Tensor]:
    """Every extent's tensor, by name; aliases of tied tensors too."""
    weights = [Weight(extent.name, extent.shape, PLAIN, {"weight": extent}) for extent in catalog.extents]
    layout = lay_out(weights, catalog.memory)
    memory = torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8)
    files = Files()
    try:
        for segment in layout.segments:
            files.read(segment, memory.numpy()[segment.at : segment.at + segment.nbytes].data)
    finally:
        files.close()
    found = dict(catalog.memory)
    for extent, places in zip(catalog.extents, layout.places, strict=True):
        if "weight" in places:
            start = places["weight"]
            found[extent.name] = stored_tensor(memory[start : start + extent.nbytes], extent)
    return found | {alias: found[name] for alias, name in catalog.tied.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))

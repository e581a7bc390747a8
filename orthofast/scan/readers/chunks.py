"""Blocks of a tensor joined into one extent, once they are seen to fill it exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from orthofast.scan.catalog import Catalog, Extent, Fault, Piece
from orthofast.scan.readers.files import shown

MAX_COMPARED = 1024  # blocks of one tensor that are compared pair by pair
Sizes = tuple[int, ...]


def add_joined(
    catalog: Catalog, name: str, where: str, dtype: str, shape: Sizes, blocks: Mapping[Sizes, Extent]
) -> None:
    """Put a tensor into a catalog that is kept in blocks; a fault where they do not make it up.

    Args:
        catalog: what is extended.
        name: the tensor's.
        where: the checkpoint, to start a sentence with.
        dtype: of every block.
        shape: of the whole tensor.
        blocks: index of a block's first element -> where it lies.
    """
    why = _unfilled(shape, [(origin, extent.shape) for origin, extent in blocks.items()])
    if why is None and len(blocks) > 1 and any(extent.strides is not None for extent in blocks.values()):
        why = "is cut into chunks that are not stored row by row, which is not read"
    if why is not None:
        catalog.faults.append(Fault(name, f"{where}: {shown(name)} {why}", shape))
        return
    first, *others = (extent for _, extent in sorted(blocks.items()))
    pieces = tuple(Piece(e.file, e.offset, e.nbytes, origin, e.shape) for origin, e in sorted(blocks.items()))
    total = sum(piece.nbytes for piece in pieces)
    catalog.extents.append(
        Extent(name, first.file, first.offset, total, dtype, shape, first.strides, pieces if others else ())
    )


def _unfilled(shape: Sizes, blocks: list[tuple[Sizes, Sizes]]) -> str | None:
    """Why blocks, each an origin and sizes, do not fill a tensor exactly; None if they do."""
    if any(o + s > n for origin, sizes in blocks for o, s, n in zip(origin, sizes, shape, strict=True)):
        return "has a chunk that reaches beyond it"
    total = sum(math.prod(sizes) for _, sizes in blocks)
    if not blocks or total != math.prod(shape):
        return f"has chunks of {total} elements for its {math.prod(shape)}"
    cut = [axis for axis, n in enumerate(shape) if any(sizes[axis] != n for _, sizes in blocks)]
    if len(cut) == 1:  # rows or columns dealt out: neighbours decide
        spans = sorted((origin[cut[0]], origin[cut[0]] + sizes[cut[0]]) for origin, sizes in blocks)
        overlap = any(a[1] > b[0] for a, b in pairwise(spans))
    elif len(blocks) > MAX_COMPARED:
        return f"is cut into {len(blocks)} chunks along several axes, more than {MAX_COMPARED}"
    else:
        overlap = any(_overlap(blocks[i], blocks[j]) for i in range(len(blocks)) for j in range(i))
    return "has chunks that overlap" if overlap else None


def _overlap(a: tuple[Sizes, Sizes], b: tuple[Sizes, Sizes]) -> bool:
    return all(p < q + m and q < p + n for p, n, q, m in zip(a[0], a[1], b[0], b[1], strict=True))

"""Every field of a record by float64 loops over vectors, in numpy: the truth the backends are held to.

Inputs are (n, d) float64 arrays, one item at a time; decode 8-bit and 16-bit tensors with ``.to(torch.float64)`` first.
Nothing here comes from orthofast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Truth:
    """The fields of one item, and the cosines behind them."""

    pairs: int
    zero: int
    nonfinite: int
    norm_sq: Floats  # (n,)
    norm_sq_y: Floats | None  # (m,)
    cosines: Floats  # (pairs,)
    indices: Ints  # (pairs, 2)
    abs_sum: float
    sq_sum: float
    sum: float
    abs_max: float
    argmax: tuple[int, int]
    row_abs: Floats  # (n,)
    row_abs_y: Floats | None  # (m,)


def squared_lengths(x: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.array([np.sum(row * row) for row in x], dtype=np.float64).reshape(len(x))


def units(x: Floats) -> Floats:
    """Vectors of length 1; zero vectors stay zero. Halving or doubling first keeps squares in range."""
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        largest = np.max(np.abs(row), initial=0.0)
        if largest > 0 and np.isfinite(largest):
            scaled = np.ldexp(row, -np.frexp(largest)[1])
            out[i] = scaled / np.sqrt(np.sum(scaled * scaled))
        elif largest != 0:
            out[i] = np.nan
    return out


def is_zero(x: Floats) -> NDArray[np.bool_]:
    return np.array([not np.any(row) for row in x], dtype=bool).reshape(len(x))  # NaN counts as true


def is_nonfinite(x: Floats) -> NDArray[np.bool_]:
    return np.array([not np.all(np.isfinite(row)) for row in x], dtype=bool).reshape(len(x))


def partners(i: int, x: Floats, y: Floats | None, normalize: bool) -> Ints:
    """The other vectors that vector ``i`` forms a counted pair with, each unordered pair once."""
    side = x if y is None else y
    others = np.arange(0 if y is not None else i + 1, len(side))
    if not normalize:
        return others
    return others[~is_zero(side[others])] if np.any(x[i]) else others[:0]


def pairs_of(x: Floats, y: Floats | None = None, normalize: bool = True) -> tuple[Floats, Ints]:
    """Cosines (or dot products) of all pairs in order (i, j), and their indices (pairs, 2)."""
    left = units(x) if normalize else x
    right = left if y is None else units(y) if normalize else y
    values, indices = [np.zeros(0)], [np.zeros((0, 2), np.int64)]
    for i in range(len(x)):
        others = partners(i, x, y, normalize)
        with np.errstate(all="ignore"):
            values.append(right[others] @ left[i])
        indices.append(np.stack([np.full(len(others), i), others], 1))
    return np.concatenate(values), np.concatenate(indices)


def per_vector(values: Floats, owners: Ints, count: int) -> Floats:
    return np.bincount(owners, weights=np.abs(values), minlength=count).astype(np.float64)


def gram_stats(x: Floats, y: Floats | None = None, normalize: bool = True) -> Truth:
    cosines, indices = pairs_of(x, y, normalize)
    bad = int(is_nonfinite(x).sum()) + (0 if y is None else int(is_nonfinite(y).sum()))
    if bad:
        cosines = np.full_like(cosines, np.nan)
    sizes = np.abs(cosines)
    none = len(sizes) == 0 or bad > 0
    top = -1 if none else int(np.argmax(sizes))  # the first of equals
    row_abs = per_vector(cosines, indices[:, 0], len(x))
    row_abs_y = None if y is None else per_vector(cosines, indices[:, 1], len(y))
    if y is None:
        row_abs = row_abs + per_vector(cosines, indices[:, 1], len(x))
    if bad:
        row_abs = np.full_like(row_abs, np.nan)
        row_abs_y = None if row_abs_y is None else np.full_like(row_abs_y, np.nan)
    nan = float("nan")
    return Truth(
        pairs=len(cosines),
        zero=int(is_zero(x).sum()) + (0 if y is None else int(is_zero(y).sum())),
        nonfinite=bad,
        norm_sq=squared_lengths(x),
        norm_sq_y=None if y is None else squared_lengths(y),
        cosines=cosines,
        indices=indices,
        abs_sum=nan if bad else float(np.sum(sizes)),
        sq_sum=nan if bad else float(np.sum(cosines * cosines)),
        sum=nan if bad else float(np.sum(cosines)),
        abs_max=nan if none else float(sizes[top]),
        argmax=(-1, -1) if none else (int(indices[top, 0]), int(indices[top, 1])),
        row_abs=row_abs,
        row_abs_y=row_abs_y,
    )

"""What the tensors of a made checkpoint hold, in blocks of rows: fresh random bits, with planted structures.

Every entry is its own draw, none is used twice: raw 64-bit words of a generator, of which sign, mantissa and the lowest
two bits of the exponent are kept and the rest of the exponent is set. So entries are independent, symmetric about zero
and between 2^-7 and 2^-3 in size, and the mean |cosine| of rows is that of isotropic vectors up to terms of order
1/d; it costs two passes over the words, about as much as writing them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoint_plants import BROKEN, BUMPS, PLACES, P, Planted, broken, expected, leaf
from benchmarks.checkpoint_shapes import BF16, F8, F32, ITEM_BYTES, Spec

Bits = NDArray[Any]  # unsigned integers that hold a floating-point type

BLOCK_BYTES = 8 << 20
# bits that stay random, bits that are set, (exponent's bias, mantissa's bits)
LAYOUTS: dict[str, tuple[int, int, tuple[int, int]]] = {
    BF16: (0x81FF, 120 << 7, (127, 7)),
    F32: (0x81FFFFFF, 120 << 23, (127, 23)),
    "F16": (0x8FFF, 8 << 10, (15, 10)),
    F8: (0x9F, 4 << 3, (7, 3)),  # 2^-3 to 2, clear of NaN
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
SCALE = 2.0**-9  # of float8 blocks, times 1 to 1.25
ZERO_STEP = 8


class Content:
    """Values of all tensors of one checkpoint, from a seed and their names alone.

    Args:
        seed: another one gives other values everywhere but in planted structures without random parts.
        specs: tensors of the checkpoint, in its order.
        nan: also one NaN in one matrix.
    """

    def __init__(self, seed: int, specs: Iterable[Spec], *, nan: bool = False) -> None:
        self._seed = seed
        self.planted: list[Planted] = []
        self.random: list[Planted] = []  # what nothing is planted in, expected at the baseline
        self._structures: dict[str, str] = {}
        free, breaks = set(PLACES), nan
        for spec in specs:
            if len(spec.shape) != 2 or spec.scales:
                continue
            place = leaf(spec.name)
            if place in free:
                free.discard(place)
                self._plant(spec, PLACES[place])
            elif breaks and place in BROKEN:
                breaks = False
                self._structures[spec.name] = "nan"
                self.planted += broken(spec.name, spec.shape)
            else:
                self.random += expected(spec.name, "random", spec.shape)

    def _plant(self, spec: Spec, structure: str) -> None:
        self._structures[spec.name] = structure
        self.planted += expected(spec.name, structure, spec.shape)

    def structure(self, name: str) -> str:
        """What is planted in a tensor, "random" for nothing."""
        return self._structures.get(name, "random")

    def blocks(self, spec: Spec) -> Iterator[Bits]:
        """The tensor's bits, (rows, d) at a time, a few MiB each."""
        n, d = spec.shape if len(spec.shape) == 2 else (1, spec.shape[0])
        if spec.scales:
            yield self._scales(spec, n, d)
            return
        numbers = np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(spec.name.encode())]))
        structure = self.structure(spec.name)
        rows = max(ZERO_STEP, BLOCK_BYTES // (d * ITEM_BYTES[spec.dtype]) // ZERO_STEP * ZERO_STEP)
        for start in range(0, n, rows):
            count = min(rows, n - start)
            if structure in BUMPS:
                yield _bump(start, count, d, BUMPS[structure], spec.dtype)
                continue
            block = random_bits(numbers, (count, d), spec.dtype)
            if structure == "duplicates":
                block[1::2] = block[: count - count % 2 : 2]
            elif structure == "zeros":
                block[::ZERO_STEP] = 0
            elif structure == "nan" and start == 0:
                block[count // 2, d // 2] = encoded(float("nan"), spec.dtype)
            yield block

    def _scales(self, spec: Spec, n: int, d: int) -> Bits:
        weight = spec.name.removesuffix("_scale_inv")
        if self.structure(weight) in BUMPS:
            return np.ones((n, d), np.float32).view(np.uint32)
        numbers = np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(spec.name.encode())]))
        scales = SCALE * (1 + 0.25 * numbers.random((n, d), dtype=np.float32))
        if self.structure(weight) == "duplicates" or self.structure(weight) == "zeros":
            scales[:] = SCALE
        return scales.astype(np.float32).view(np.uint32)


def random_bits(numbers: np.random.Generator, shape: tuple[int, int], dtype: str) -> Bits:
    """Independent symmetric numbers as bits."""
    kept, fixed, _ = LAYOUTS[dtype]
    nbytes = ITEM_BYTES[dtype]
    count = shape[0] * shape[1]
    words = numbers.integers(0, 2**64 - 1, -(-count * nbytes // 8), dtype=np.uint64, endpoint=True)
    repeat = sum(1 << (8 * nbytes * place) for place in range(8 // nbytes))
    words &= np.uint64(kept * repeat)
    words |= np.uint64(fixed * repeat)
    return words.view(UNSIGNED[nbytes])[:count].reshape(shape)


def encoded(value: float, dtype: str) -> int:
    """The bits of a number that the type holds exactly: zero, a power of two, or NaN."""
    _, _, (bias, mantissa) = LAYOUTS[dtype]
    if value != value:
        return 0x7F if dtype == F8 else ((2 * bias + 1) << mantissa) | 1 << (mantissa - 1)
    if value == 0:
        return 0
    power = int(np.frexp(value)[1]) - 1
    if 2.0**power != value:
        raise ValueError(f"a planted number needs to be zero or a power of two, got {value}")
    if power + bias > 0:
        return (power + bias) << mantissa
    return 1 << (power + bias - 1 + mantissa)  # subnormal


def _bump(start: int, count: int, d: int, q: float, dtype: str) -> Bits:
    block = np.full((count, d), encoded(q, dtype), UNSIGNED[ITEM_BYTES[dtype]])
    block[np.arange(count), np.arange(start, start + count) % d] = encoded(P, dtype)
    return block


def decoded(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """Values of a block of bits in float32."""
    if dtype == F32:
        return bits.view(np.float32)
    if dtype == BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    raise ValueError(f"values of {dtype} need their scales; ask for them of the tensor's pair")


def whole(content: Content, spec: Spec) -> NDArray[np.float32]:
    """All values of one tensor that stands for itself, in its shape."""
    return np.concatenate([decoded(block, spec.dtype) for block in content.blocks(spec)]).reshape(spec.shape)

"""A weight as vectors: which of its slices are compared, as a strided (b, n, d) tensor, or as scaled float8 blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from orthofast.errors import InputError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True, slots=True, eq=False)
class BlockScaled:
    """8-bit floats with one factor per block: ``value[i, j] = data[i, j] * scale[i // rows, j // columns]``.

    What checkpoints of DeepSeek-V3 and its kin store as ``weight`` and ``weight_scale_inv``. The last blocks may hang
    over the edges. The tensors are shared, never copied or written to.

    Attributes:
        data: (n, d) or (b, n, d), float8.
        scale: (ceil(n / rows), ceil(d / columns)), with (b, ...) in front as ``data``; a float dtype, same device.
        block: (rows, columns) of one block.

    Raises:
        InputError: if they do not fit together.

    >>> import torch
    >>> data = torch.ones(3, 200).to(torch.float8_e4m3fn)
    >>> weight = BlockScaled(data, torch.tensor([[0.5, 2.0]]))
    >>> weight.dequantized(slice(0, 1))[0, [0, 127, 128]].tolist()
    [0.5, 0.5, 2.0]
    >>> tuple(as_vectors(weight, "cols").shape)
    (1, 200, 3)
    """

    data: Tensor
    scale: Tensor
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        data, scale, block = self.data, self.scale, self.block
        for name, value in (("data", data), ("scale", scale)):
            if not isinstance(value, Tensor):
                raise InputError(
                    f"{name} needs a torch.Tensor, got {type(value).__name__}; wrap it with torch.as_tensor"
                )
        if data.dtype not in FLOAT8:
            raise InputError(f"data needs a float8 dtype, got {data.dtype}; a plain tensor needs no BlockScaled")
        if data.dim() not in (2, 3):
            raise InputError(f"data needs shape (n, d) or (b, n, d), got {tuple(data.shape)}; reshape it")
        sides = isinstance(block, tuple) and len(block) == 2
        if not sides or not all(type(side) is int and side > 0 for side in block):
            raise InputError(f"block needs two positive integers, (rows, columns), got {block!r}")
        if not scale.dtype.is_floating_point:
            raise InputError(
                f"scale needs a floating-point dtype, got {scale.dtype}; convert it with .to(torch.float32)"
            )
        if scale.device != data.device:
            raise InputError(f"scale needs the device of data, {data.device}, got {scale.device}; move one of them")
        wanted = (*data.shape[:-2], *(-(-size // side) for size, side in zip(data.shape[-2:], block, strict=True)))
        if tuple(scale.shape) != wanted:
            raise InputError(
                f"scale needs shape {wanted}, one factor per block of {block[0]} x {block[1]} of data "
                f"{tuple(data.shape)}, got {tuple(scale.shape)}; pass block= if the blocks are others"
            )

    @property
    def shape(self) -> torch.Size:
        """Of the matrix it stands for: (n, d) or (b, n, d)."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Where data and scale are."""
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        """False: 8-bit weights are measured, not trained."""
        return False

    def transpose(self, first: int, second: int) -> BlockScaled:
        """The matrix with rows and columns exchanged, sharing memory; other dimensions stay where they are."""
        sides = {self.data.dim() - 2, self.data.dim() - 1}
        if {first % self.data.dim(), second % self.data.dim()} != sides:
            raise InputError(f"transpose needs the last two dimensions of a block-scaled matrix, got {first}, {second}")
        return BlockScaled(self.data.transpose(-2, -1), self.scale.transpose(-2, -1), self.block[::-1])

    def dequantized(self, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of some rows, (rows, d) or (b, rows, d), multiplied in float32 and then rounded to ``dtype``.

        A slice takes 4 bytes per value while it is made, whatever the size of the whole.
        """
        start, stop, step = rows.indices(self.shape[-2])
        if step != 1:
            raise InputError(f"rows needs a slice of step 1, got {rows}")
        height, width = self.block
        values = self.data[..., start:stop, :].to(torch.float32)
        index = torch.arange(start, max(start, stop), device=self.device) // height
        factors = self.scale.to(torch.float32)[..., index, :]
        factors = factors.repeat_interleave(width, dim=-1)[..., : self.shape[-1]]
        return values.mul_(factors).to(dtype)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a block-scaled matrix has no {name}; pass its .dequantized() where a tensor is needed")


Floats: TypeAlias = NDArray[np.floating[Any]]
Array: TypeAlias = Tensor | Floats | BlockScaled
VECTORS = ("rows", "cols", "heads", "filters", "center_tap")
NUMPY_DTYPES = ("float16", "float32", "float64")


def as_vectors(weight: Array, vectors: str = "rows", heads: int | None = None) -> Tensor:
    """The vectors of a weight as (b, n, d): ``b`` sets of ``n`` vectors of length ``d``.

    A weight is laid out as torch layers store it, (out, in) or (out, in, *kernel). (Transposed convolutions store
    (in, out, *kernel) and GPT-2's Conv1D (in, out): there "rows" and "cols" change places.)

    ============  =======================  ===========================================================
    vectors       shape                    one vector is
    ============  =======================  ===========================================================
    rows          (1, out, in * kernel)    what feeds one output neuron or channel
    cols          (1, in, out * kernel)    what one input feature or channel feeds
    heads         (heads, out / heads, .)  as rows, compared only within equal blocks of rows
    filters       (1, out, in * kernel)    as rows, by the name convolutions use
    center_tap    (1, in, out)             one input channel of the kernel's central tap, conv only
    ============  =======================  ===========================================================

    "center_tap" takes ``W[:, :, k1 // 2, k2 // 2]`` as the public code of Lu et al. 2024 does, and of that (out, in)
    matrix the columns, which are what their Table 2 prints (0.070 and 0.050 at the start: the baselines of R^128 and
    R^256). For its rows pass ``weight[:, :, k1 // 2, k2 // 2]`` with vectors="rows".

    The result shares the weight's memory whenever strides can say it; "cols" of a kernel wider than one tap,
    non-contiguous kernels, and arrays with negative strides or foreign byte order are copied. It is never written to.
    A :class:`BlockScaled` matrix gives a :class:`BlockScaled` (b, n, d) of the same memory, which folds take as it is.

    Args:
        weight: a tensor or numpy array, floating point, at least 2-D; or a :class:`BlockScaled` matrix.
        vectors: "rows", "cols", "heads", "filters" or "center_tap".
        heads: number of equal blocks of rows, with vectors="heads" only.

    Raises:
        InputError: if an argument cannot be used.

    >>> import torch
    >>> conv = torch.zeros(8, 4, 3, 3)
    >>> [tuple(as_vectors(conv, vectors).shape) for vectors in ("rows", "cols", "center_tap")]
    [(1, 8, 36), (1, 4, 72), (1, 4, 8)]
    >>> tuple(as_vectors(torch.zeros(768, 768), "heads", heads=12).shape)
    (12, 64, 768)
    """
    if vectors not in VECTORS:
        raise InputError(f"vectors needs one of {', '.join(VECTORS)}, got {vectors!r}")
    if heads is not None and vectors != "heads":
        raise InputError(f"heads={heads!r} needs vectors='heads', got vectors={vectors!r}; change one of them")
    if isinstance(weight, BlockScaled):
        return cast(Tensor, _block_scaled_vectors(weight, vectors, heads))  # the fold's door knows it by its type
    x = as_tensor(weight)
    if x.dim() < 2:
        raise InputError(
            f"weight needs at least 2 dimensions, (out, in) or (out, in, *kernel), got shape {tuple(x.shape)}; "
            "a bias or a norm has no vectors to compare"
        )
    if vectors == "cols":
        return _flat(x.transpose(0, 1)).unsqueeze(0)
    if vectors == "center_tap":
        return _center_tap(x).T.unsqueeze(0)
    rows = _flat(x)
    if vectors == "heads":
        blocks = _checked_heads(heads, len(rows))
        return _reshaped(rows, (blocks, len(rows) // blocks, rows.shape[1]), "vectors='heads'")
    return rows.unsqueeze(0)


def _block_scaled_vectors(weight: BlockScaled, vectors: str, heads: int | None) -> BlockScaled:
    if weight.data.dim() != 2:
        raise InputError(
            f"weight needs shape (out, in), got block-scaled {tuple(weight.shape)}; call once for each item"
        )
    data, scale, height = weight.data, weight.scale, weight.block[0]
    if vectors == "center_tap":
        raise InputError(
            "vectors='center_tap' needs a convolution weight, got a block-scaled matrix; use vectors='rows'"
        )
    if vectors == "cols":
        return BlockScaled(data.unsqueeze(0), scale.unsqueeze(0), weight.block).transpose(1, 2)
    if vectors != "heads":
        return BlockScaled(data.unsqueeze(0), scale.unsqueeze(0), weight.block)
    blocks = _checked_heads(heads, len(data))
    each = len(data) // blocks
    if each % height and blocks > 1:
        raise InputError(
            f"heads needs whole blocks of {height} rows per head, got {blocks} heads of {each} rows; "
            "pass weight.dequantized() instead"
        )
    return BlockScaled(data.view(blocks, each, data.shape[1]), scale.view(blocks, -1, scale.shape[1]), weight.block)


def dense_vectors(weight: Array, vectors: str = "rows", heads: int | None = None) -> Tensor:
    """As :func:`as_vectors`, with the values of a :class:`BlockScaled` matrix dequantised: all of them, in float32."""
    x: Tensor | BlockScaled = as_vectors(weight, vectors, heads)
    return x.dequantized() if isinstance(x, BlockScaled) else x


def as_tensor(weight: Array, name: str = "weight") -> Tensor:
    """A tensor of the same values, checked; it shares memory with the input where torch can express that.

    Args:
        weight: a dense floating-point tensor, or a numpy array of float16, float32 or float64.
        name: what to call the argument in an error.

    Raises:
        InputError: if it is neither, or holds no values.
    """
    if isinstance(weight, Tensor):
        return _checked_tensor(weight, name)
    if isinstance(weight, np.ndarray):
        return _from_numpy(weight, name)
    if isinstance(weight, BlockScaled):
        raise InputError(f"{name} needs a plain tensor here, got a block-scaled one; pass its .dequantized()")
    raise InputError(f"{name} needs a torch.Tensor or a numpy array, got {type(weight).__name__}; {_remedy(weight)}")


def _remedy(weight: object) -> str:
    if isinstance(weight, torch.nn.Module):
        return "pass its .weight"
    if isinstance(weight, (list, tuple)):
        return "build one with torch.tensor(...), or call once for each matrix"
    return "wrap it with torch.as_tensor"


def _checked_tensor(x: Tensor, name: str) -> Tensor:
    traced = torch.compiler.is_compiling()  # it cannot follow is_lazy and is_neg
    if not traced and is_lazy(x):
        raise InputError(f"{name} is a lazy parameter without a shape; run the module once on data first")
    if x.is_nested:
        raise InputError(f"{name} needs one dense tensor, got a nested tensor; call once for each of its .unbind()")
    if x.layout is not torch.strided:
        raise InputError(f"{name} needs a dense tensor, got layout {x.layout}; call .to_dense() first")
    if x.is_quantized:
        raise InputError(f"{name} needs floating-point values, got quantised {x.dtype}; call .dequantize() first")
    if not x.dtype.is_floating_point:
        remedy = "take .real, .imag or .abs()" if x.dtype.is_complex else "convert it with .to(torch.float32)"
        raise InputError(f"{name} needs a floating-point dtype, got {x.dtype}; {remedy}")
    if x.device.type == "meta":
        raise InputError(f"{name} is on the meta device and holds no values; load or initialise it first")
    return x.resolve_neg() if not traced and x.is_neg() else x


class _Writeable:
    """An array's memory under a writeable flag: torch warns about the other kind, and nothing here writes."""

    def __init__(self, array: Floats) -> None:
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _from_numpy(array: Floats, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name} needs a plain numpy array, got a masked array; fill it with .filled(0) first")
    if array.dtype.name not in NUMPY_DTYPES:
        raise InputError(
            f"{name} needs a numpy dtype among {', '.join(NUMPY_DTYPES)}, got {array.dtype}; "
            "convert it with .astype('float32')"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    elif any(step < 0 or step % array.itemsize for step in array.strides) or not array.flags.aligned:
        array = array.copy()
    elif not array.flags.writeable:
        array = np.asarray(_Writeable(array))
    return torch.from_numpy(np.asarray(array))


def _flat(x: Tensor) -> Tensor:
    """(n, ...) -> (n, d)."""
    return x if x.dim() == 2 else _reshaped(x, (len(x), math.prod(x.shape[1:])), "a kernel of several taps")


def _reshaped(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    try:
        return x.reshape(shape)
    except RuntimeError as error:
        placements = getattr(x, "placements", None)
        if placements is None:
            raise
        raise InputError(
            f"{what} needs a DTensor whose shards end where blocks of {shape} do, got shape {tuple(x.shape)} with "
            f"placements {placements}; redistribute it first, or measure full_tensor()"
        ) from error


def _center_tap(x: Tensor) -> Tensor:
    """(out, in, *kernel) -> (out, in)."""
    kernel = x.shape[2:]
    if not 1 <= len(kernel) <= 3 or 0 in kernel:
        raise InputError(
            f"vectors='center_tap' needs a convolution weight (out, in, *kernel) with 1 to 3 kernel dimensions, "
            f"got shape {tuple(x.shape)}; use vectors='rows'"
        )
    for size in reversed(kernel):
        x = x.select(-1, size // 2)
    return x


def _checked_heads(heads: int | None, out: int) -> int:
    if heads is None:
        raise InputError("vectors='heads' needs heads, the number of equal blocks of rows; pass heads=")
    if type(heads) is not int or heads < 1:
        raise InputError(f"heads needs a positive integer, got {heads!r}")
    if out % heads:
        raise InputError(f"heads needs a divisor of the {out} rows, got {heads}")
    return heads

"""Launcher of the warp-specialised Hopper fold: what it serves, whether this Triton compiles it, and the launch.

Work  entries * 128 * 256 * d multiply-adds of the work list, dense.
Memory  two float32 partials per entry; 192 KiB of shared memory and one block per multiprocessor.
Accuracy  exact 16-bit operands, float32 accumulation in a tile; reciprocal lengths are applied after the product.
Determinism  every partial is written by one warpgroup in one order, whatever the number of multiprocessors.

Gluon is an experimental language inside Triton and changes between releases. So the kernel is probed by compiling it,
which needs no GPU; where that fails, :func:`problem` is a sentence and nothing else happens.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from orthofast.errors import BackendError
from orthofast.kernels.schedule import Problem, work_list
from orthofast.kernels.triton_lists import DeviceLists

TILE = (128, 256)  # vectors of the left and right side of one entry
PARTIALS = 2  # per entry: one per half of its rows
CAPABILITY = (9, 0)  # warpgroup products exist there only
ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
STEP = 64  # entries of a vector per step of the kernel
SWIZZLE_BYTES = 128
ALIGNED = 8  # elements in 16 bytes: what a TMA stride is a multiple of
_LISTS = DeviceLists()


def problem(x: Tensor) -> str | None:
    """None if these vectors can be folded here, else the sentence why not.

    Args:
        x: (b, n, d), of any dtype, strides and device.
    """
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"the Gluon kernel needs an NVIDIA GPU, got {x.device}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability != CAPABILITY:
        return f"the Gluon kernel needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    return layout_problem(x) or compile_problem(x.dtype, along_rows(x))


def along_rows(x: Tensor) -> bool:
    """Whether a vector's entries lie side by side; else the same entry of neighbouring vectors must."""
    return x.stride(2) == 1


def layout_problem(x: Tensor) -> str | None:
    """None if TMA can read (b, n, d) in whole tiles, else the sentence why not."""
    b, n, d = x.shape
    if x.dtype not in ELEMENT:
        return f"the Gluon kernel folds bfloat16 and float16, got {x.dtype}"
    if n < 2 or d < 1 or b < 1:
        return f"the Gluon kernel needs vectors to pair, got shape {tuple(x.shape)}"
    outer, inner, lines = (x.stride(1), x.stride(2), n) if along_rows(x) else (x.stride(2), x.stride(1), d)
    if inner != 1:
        return f"the Gluon kernel needs neighbours in memory along vectors or across them, got strides {x.stride()}"
    if x.data_ptr() % 16 or outer % ALIGNED or outer < 1:
        return f"the Gluon kernel needs addresses in steps of 16 bytes, got strides {x.stride()} at {x.data_ptr() % 16}"
    if b > 1 and x.stride(0) != lines * outer:
        return f"the Gluon kernel needs items one after another in memory, got strides {x.stride()}"
    if b > 1 and not along_rows(x) and d % STEP:
        return f"the Gluon kernel folds columns of several items at lengths divisible by {STEP}, got {d}"
    if b * lines >= 1 << 31:
        return f"the Gluon kernel counts lines of memory in 31 bits, got {b * lines}"
    return None


@lru_cache(maxsize=8)
def compile_problem(dtype: torch.dtype, rows: bool) -> str | None:
    """None if the installed Triton compiles the kernel for Hopper, else the sentence why not; needs no GPU."""
    try:
        compiled(dtype, rows)
    except Exception as error:  # noqa: BLE001 - whatever an experimental compiler raises
        version = getattr(_triton(), "__version__", "of unknown version")
        said = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        return f"the Gluon kernel does not compile with triton {version}: {said}"
    return None


def compiled(dtype: torch.dtype, rows: bool) -> Any:
    """The kernel compiled ahead of time for compute capability 9.0: its code and resources, for gates and probes."""
    triton = _triton()
    kernels = _kernels()
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    source_type = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    layout = repr(_shared_layout())
    left, right = (f"tensordesc<{ELEMENT[dtype]}{block},{layout}>" for block in _blocks(rows))
    signature = {
        "left": left,
        "right": right,
        "work": "*i32",
        "inverse": "*fp32",
        "partials": "*fp32",
        "entries": "i32",
        "n": "i32",
        "d": "i32",
        "ALONG_ROWS": "constexpr",
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index in (2, 3, 4)}
    source = source_type(kernels.abs_sum_kernel, signature, {(8,): rows}, aligned)
    return triton.compile(source, target=target, options={"num_warps": kernels.WARPS})


def abs_sum_partials(x: Tensor, inverse: Tensor, entries: Tensor, programs: int, out: Tensor | None = None) -> Tensor:
    """Sum of |cos| over the pairs of each entry of the list, (entries,) float32, written to ``out`` if that is given.

    Queued on the current stream of the device of ``x``, without waiting for it. Pairs of one set only, i < j.

    Args:
        x: (b, n, d) that :func:`problem` has nothing against.
        inverse: (b, n) float32, contiguous: reciprocal lengths, 0 for a zero vector.
        entries: (entries, 2) int32, contiguous: item, and row tile | column tile << 16, in tiles of 128 x 256.
        programs: blocks to launch, one per multiprocessor at most.
        out: (entries,) float32 on the same device.

    Raises:
        BackendError: if the kernel cannot be launched.
    """
    b, n, d = x.shape
    rows = along_rows(x)
    partials = torch.empty((len(entries), PARTIALS), dtype=torch.float32, device=x.device)
    if not len(entries):
        return partials.sum(1) if out is None else out
    descriptor = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    layout = _shared_layout()
    shape = [b * n, d] if rows else [b * d, n]
    strides = [x.stride(1), 1] if rows else [x.stride(2), 1]
    left, right = (descriptor(x, shape, strides, block, layout) for block in _blocks(rows))
    kernels = _kernels()
    grid = (min(programs, len(entries)),)
    try:
        with torch.cuda.device(x.device):
            kernels.abs_sum_kernel[grid](
                left, right, entries, inverse, partials, len(entries), n, d, ALONG_ROWS=rows, num_warps=kernels.WARPS
            )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise BackendError(f"the Gluon kernel could not be launched: {error}") from error
    return torch.sum(partials, 1, out=out)  # the two halves, always in this order


def abs_sum(x: Tensor, norm_sq: Tensor) -> Tensor:
    """Sum of |cos| over the pairs of each item, (b,) float64: the whole fold but for the lengths.

    Args:
        x: (b, n, d) that :func:`problem` has nothing against.
        norm_sq: (b, n) float64 squared lengths, on the same device.
    """
    b, n, d = x.shape
    inverse = torch.where(norm_sq == 0, 0.0, norm_sq.rsqrt()).to(torch.float32).contiguous()
    entries = _entries_on(x.device, b, n, d)
    per_entry = abs_sum_partials(x, inverse, entries, _processors(x.device))
    return per_entry.view(b, -1).sum(1, dtype=torch.float64)  # items one after another, equally many entries


def _entries_on(device: torch.device, b: int, n: int, d: int) -> Tensor:
    """The work list, copied once per shape and device."""
    return _LISTS.get(device, (b, n, d), lambda: work_list((Problem(n, d, items=b),), *TILE).entries)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(rows: bool) -> tuple[list[int], list[int]]:
    """What one TMA copy brings of the left and right side, as stored."""
    half, columns = TILE[0] // PARTIALS, TILE[1]
    return ([half, STEP], [columns, STEP]) if rows else ([STEP, half], [STEP, columns])


def _shared_layout() -> Any:
    layouts = importlib.import_module("triton.experimental.gluon.language._layouts")
    return layouts.NVMMASharedLayout(swizzle_byte_width=SWIZZLE_BYTES, element_bitwidth=16, rank=2)


def _triton() -> ModuleType:
    return importlib.import_module("triton")


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    # its first lines fail where Triton has no Gluon, or another one
    return importlib.import_module("orthofast.kernels.gluon_kernels")

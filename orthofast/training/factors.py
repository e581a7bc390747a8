"""The two Kronecker factors of a layer: what its inputs and its output gradients are as rows, and their second moments.

====================  ==============================================  =====================================
module                a row of Sigma_x                                a row of Sigma_g
====================  ==============================================  =====================================
Linear, HF's Conv1D   an input; of sequences each position's          the gradient of an output
Conv1d, 2d, 3d        a patch (Grosse and Martens 2016), or with      the gradient of an output position
                      ``conv="pixels"`` a position's channels
Embedding             a one-hot index, so that Sigma_x is diagonal    the gradient of an output
====================  ==============================================  =====================================

``Sigma_x`` is the mean over rows, ``Sigma_g`` the sum over rows divided by the number M of terms of the loss, rows
being gradients of the terms' sum: for vectors both are the paper's (Huang et al. 2020, Eq. 4), and for shared weights
their Kronecker product is K-FAC's Fisher of one term (expand, Eschenhagen et al. 2023). The paper's code for
convolutions multiplies Sigma_g by the number of positions once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from orthofast.errors import InputError
from orthofast.training.covariance import (
    BUFFER,
    DiagonalMoment,
    SecondMoment,
    TriangularFactor,
    sum_dtype,
    workspace,
)
from orthofast.training.patches import PatchMoment, by_offsets

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HF_CONV1D = "transformers.pytorch_utils.Conv1D"
Rows: TypeAlias = "Iterator[tuple[Tensor, float]]"  # (N, d) and the weight of each


@dataclass(frozen=True, slots=True)
class Factors:
    """How inputs and output gradients become covariances.

    Attributes:
        conv: "patches" of convolutions, or "pixels": channels alone, as in the paper's code.
        sharing: of positions of a sequence: "expand", each is a row; or "reduce", inputs are averaged and gradients
            added over them. Convolutions follow.
        precision: of the sums: "float64", "float32", or "auto": float64 for sides up to 2048 on the host.
        method: "gram", or "qr": R factors, twice the digits and four times the work.
        centered: subtract the means of inputs and of gradients.
        rows_per_batch: rows of each layer used per batch, drawn at random; None for all.
        mask: from a batch to a boolean tensor (samples, positions): rows of layers whose inputs have these
            dimensions count where it is True.
        mc_samples: label draws per term with ``labels="mc"``.
        seed: of these draws and of ``rows_per_batch``.
        group: process group to add up over. None: that of all processes where the model is distributed.
    """

    conv: str = "patches"
    sharing: str = "expand"
    precision: str = "auto"
    method: str = "gram"
    centered: bool = False
    rows_per_batch: int | None = None
    mask: Callable[[Any], Tensor] | None = None
    mc_samples: int = 4
    seed: int = 0
    group: Any = None

    def __post_init__(self) -> None:
        choices = {
            "conv": ("patches", "pixels"),
            "sharing": ("expand", "reduce"),
            "precision": ("auto", "float32", "float64"),
            "method": ("gram", "qr"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} needs one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.method == "qr" and self.centered:
            raise InputError("method='qr' keeps no mean; use method='gram' for centred covariances")
        for name in ("rows_per_batch", "mc_samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} needs a positive integer, got {value!r}")


def kind_of(module: nn.Module) -> str:
    """Name of the row of the table above, or an empty string."""
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    for parent in type(module).__mro__:
        if parent is nn.Linear or f"{parent.__module__}.{parent.__qualname__}" == HF_CONV1D:
            return "dense"
    return "embedding" if isinstance(module, nn.Embedding) else ""


def sides_of(module: nn.Module, how: Factors) -> tuple[int, int]:
    """(d_in, d_out) of one weight matrix; of a grouped convolution that of one group."""
    if isinstance(module, CONVOLUTIONS):  # not from the weight: reading a parametrised one may change it
        channels = module.in_channels // module.groups
        patch = channels * math.prod(module.kernel_size) if how.conv == "patches" else channels
        return patch, module.out_channels // module.groups
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight: Any = module.weight
    return int(weight.shape[0]), int(weight.shape[1])


class LayerFactors:
    """Accumulates one layer's two second moments.

    Args:
        name: the module's path.
        module: the layer.
        how: see :class:`Factors`.
        device: where its inputs lie.

    Attributes:
        x: second moment of inputs.
        g: second moment of output gradients.
        positions: rows of Sigma_x per row of the batch in the last call.
        masked: whether a mask had the dimensions of its inputs.
        generator: draws rows where only some are used.
    """

    def __init__(self, name: str, module: nn.Module, how: Factors, device: torch.device) -> None:
        self.name, self.module, self.how = name, module, how
        self.kind = kind_of(module)
        self.d_in, self.d_out = sides_of(module, how)
        self.positions, self.masked = 0, False
        self.generator = torch.Generator("cpu").manual_seed(how.seed)
        made = TriangularFactor if how.method == "qr" else SecondMoment

        def moment(d: int) -> SecondMoment:
            return made(d, device=device, dtype=sum_dtype(d, device, how.precision), centered=how.centered)

        if self.kind == "embedding":
            self.x: SecondMoment = DiagonalMoment(self.d_in, device=device)
        elif isinstance(module, CONVOLUTIONS) and self._patches():
            dtype = sum_dtype(self.d_in, device, how.precision)
            self.x = PatchMoment(module.in_channels // module.groups, module.kernel_size, device=device, dtype=dtype)
        else:
            self.x = moment(self.d_in)
        self.g = moment(self.d_out)

    @property
    def groups(self) -> int:
        """Of a convolution; their matrices are averaged."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    def keep(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """(samples, positions) or flat bool: which rows of this input count; None for all."""
        if isinstance(self.module, nn.Embedding):
            kept = None if self.module.padding_idx is None else x != self.module.padding_idx
            if mask is not None and mask.shape == x.shape:
                kept, self.masked = mask if kept is None else kept & mask, True
            return kept
        if mask is None or self.kind == "conv" or mask.dim() >= x.dim() or x.shape[: mask.dim()] != mask.shape:
            return None
        self.masked = True
        return mask

    def add_inputs(self, x: Tensor, keep: Tensor | None = None) -> Tensor | None:
        """Add the rows of one call's input; returns which rows were drawn, for :meth:`add_gradient`."""
        if self.kind == "embedding":
            indices = x.flatten() if keep is None else x[keep]
            drawn = self._drawn(len(indices))
            self.positions = max(1, x.numel() // max(1, len(x)))
            self.x.update(indices if drawn is None else indices[drawn.to(x.device)])
            return drawn
        if self.kind == "conv":
            x = x if x.dim() == len(self.module.kernel_size) + 2 else x[None]  # type: ignore[arg-type]
            before = self.x.n
            self.x.note_dtype(x.dtype)  # rows come converted
            if isinstance(self.x, PatchMoment):
                for images in _padded(x, self.module).chunk(self.groups, 1):
                    self.x.add_images(images)
            else:
                for rows, weight in self._conv_inputs(x):
                    self.x.update(rows, weight=weight)
            self.positions = (self.x.n - before) // max(1, len(x) * self.groups)
            return None
        rows = _reduced(x, keep, "mean") if self.how.sharing == "reduce" else _flat(x, keep)
        self.positions = max(1, len(rows) // max(1, len(x))) if x.dim() > 1 else 1
        drawn = self._drawn(len(rows))
        self.x.update(rows if drawn is None else rows.index_select(0, drawn.to(rows.device)))
        return drawn

    def add_gradient(
        self, g: Tensor, *, scale: float = 1.0, keep: Tensor | None = None, drawn: Tensor | None = None
    ) -> None:
        """Add the rows of the gradient of one call's output.

        Args:
            g: of the output's shape.
            scale: multiplies the squares.
            keep: what :meth:`keep` gave for that call.
            drawn: what :meth:`add_inputs` gave.
        """
        if self.kind == "conv":
            g = g if g.dim() == len(self.module.kernel_size) + 2 else g[None]  # type: ignore[arg-type]
            self.g.note_dtype(g.dtype)
            for rows, weight in self._conv_gradients(g):
                self.g.update(rows, weight=weight * scale / self.groups, count=0.0)
            return
        reduce = self.how.sharing == "reduce" and self.kind == "dense"
        rows = _reduced(g, keep, "sum") if reduce else _flat(g, keep)
        if drawn is None:
            self.g.update(rows, weight=scale, count=0.0)
        else:
            self.g.update(rows.index_select(0, drawn.to(rows.device)), weight=scale * len(rows) / len(drawn), count=0.0)

    def add_terms(self, terms: float) -> None:
        """Count terms of the loss, which Sigma_g is divided by."""
        self.g.count += terms

    def _drawn(self, count: int) -> Tensor | None:
        limit = self.how.rows_per_batch
        if limit is None or count <= limit:
            return None
        return torch.randperm(count, generator=self.generator)[:limit]

    def _some(self, rows: Tensor, share: float) -> tuple[Tensor, float]:
        """About that share of the rows, at least one, and the weight that makes up for it."""
        if share >= 1 or len(rows) < 2:
            return rows, 1.0
        count = max(1, round(share * len(rows)))
        drawn = torch.randperm(len(rows), generator=self.generator)[:count].to(rows.device)
        return rows.index_select(0, drawn), len(rows) / count

    def _patches(self) -> bool:
        """Whether this convolution's inputs are measured without unfolding them."""
        module: Any = self.module
        how = self.how
        plain = how.conv == "patches" and how.sharing == "expand" and how.method == "gram"
        if not plain or how.centered or how.rows_per_batch is not None:
            return False
        return by_offsets(module.in_channels // module.groups, module.kernel_size, module.stride, module.dilation)

    def _conv_inputs(self, x: Tensor) -> Rows:
        module: Any = self.module
        if self.how.conv == "pixels":
            yield from self._positions(x, self.x.dtype)
            return
        spatial = len(module.kernel_size)
        padded = _padded(x, module)
        out = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
            )
        ]
        positions, groups, d = math.prod(out), self.groups, self.d_in
        share = 1.0 if self.how.rows_per_batch is None else self.how.rows_per_batch / (len(x) * positions * groups)
        strides = padded.stride()
        channels = x.shape[1] // groups
        step = max(1, BUFFER // max(1, d * groups * positions))
        for start in range(0, len(x), step):
            images = padded[start : start + step]
            count = len(images)
            windows = images.as_strided(
                (groups, channels, *module.kernel_size, count, *out),
                (
                    strides[1] * channels,
                    strides[1],
                    *(s * dilation for s, dilation in zip(strides[2:], module.dilation, strict=True)),
                    strides[0],
                    *(s * stride for s, stride in zip(strides[2:], module.stride, strict=True)),
                ),
                images.storage_offset(),
            )
            numbers = windows.numel()
            if x.device.type == "cpu":
                dtype = self.x.dtype
                patches = workspace(numbers, dtype).view(windows.shape).copy_(windows)
            else:
                patches = windows.contiguous()
            columns = patches.view(groups, d, count, positions)
            if self.how.sharing == "reduce" and spatial:
                reduced = columns.mean(-1)
                for group in reduced:
                    yield group.T, 1.0
                continue
            for group in columns.view(groups, d, count * positions):
                yield self._some(group.T, share)

    def _conv_gradients(self, g: Tensor) -> Rows:
        if self.how.sharing == "reduce" and self.how.conv == "patches":
            summed = g.flatten(2).sum(-1)
            for group in summed.chunk(self.groups, 1):
                yield group.contiguous(), 1.0
            return
        yield from self._positions(g, self.g.dtype)

    def _positions(self, x: Tensor, dtype: torch.dtype) -> Rows:
        """Channels of each position, some images at a time; columns of a contiguous buffer."""
        count, channels = x.shape[:2]
        groups = self.groups
        flat = x.flatten(2)  # (images, channels, positions)
        share = 1.0 if self.how.rows_per_batch is None else self.how.rows_per_batch / max(1, x.numel() // channels)
        step = max(1, BUFFER // max(1, channels * flat.shape[2]))
        for start in range(0, count, step):
            part = flat[start : start + step].movedim(1, 0)  # (channels, images, positions)
            if x.device.type == "cpu":
                part = workspace(part.numel(), dtype).view(part.shape).copy_(part)
            for group in part.reshape(groups, channels // groups, -1):
                yield self._some(group.T, share)


def _flat(x: Tensor, keep: Tensor | None) -> Tensor:
    """(rows, d): every position is one."""
    return x.reshape(-1, x.shape[-1]) if keep is None else x[keep]


def _reduced(x: Tensor, keep: Tensor | None, how: str) -> Tensor:
    """(samples, d): positions averaged or added up, those that count."""
    if x.dim() < 3:
        return _flat(x, keep)
    if keep is None:
        flat = x.flatten(1, -2)
        return flat.mean(1) if how == "mean" else flat.sum(1)
    kept = keep[..., None].to(x.dtype)
    total = (x * kept).flatten(1, -2).sum(1)
    return total if how == "sum" else total / kept.flatten(1, -2).sum(1).clamp(min=1)


def _padded(x: Tensor, module: Any) -> Tensor:
    """The input as the convolution sees it, contiguous."""
    if module.padding == "valid":
        sides = [0] * (2 * len(module.kernel_size))
    elif module.padding == "same":
        sides = []
        for kernel, dilation in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
            total = dilation * (kernel - 1)
            sides += [total // 2, total - total // 2]
    else:
        sides = [side for side in reversed(module.padding) for _ in range(2)]
    if not any(sides):
        return x.contiguous()
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(x, sides, mode=mode)

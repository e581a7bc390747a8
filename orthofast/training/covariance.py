"""Second moments of rows, accumulated batch by batch: one triangle by symmetric updates, an R factor, or a diagonal.

S = sum_i w_i x_i x_i^T  over rows x_i in R^d, divided by a count when it is read: uncentred as in Huang et al. 2020
(Section 3), or centred on request.

Work  N d^2 / 2 multiply-adds (BLAS syrk on the host: half of a product).  Memory  d^2 numbers and 4 MiB for rows that
must be converted; rows that lie contiguously in the dtype of the sums are read where they are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.linalg import blas
from torch import Tensor

from orthofast.errors import InputError
from orthofast.metrics.spectra import eigenvalue_tolerance, spectrum

WIDE = 2048  # sides up to here are summed in float64 on the host
BUFFER = 1 << 19  # numbers converted at a time: 4 MiB of float64
_local = threading.local()


def workspace(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers,) of this thread's one buffer: what it held before is lost."""
    held: Tensor | None = getattr(_local, "buffer", None)
    if held is None or held.numel() * held.element_size() < numbers * dtype.itemsize:
        held = _local.buffer = torch.empty(numbers * dtype.itemsize, dtype=torch.uint8, device="cpu")
    return held[: numbers * dtype.itemsize].view(dtype)


def sum_dtype(d: int, device: torch.device, precision: str = "auto", centered: bool = False) -> torch.dtype:
    """What sums are kept in: float64 for sides up to ``WIDE`` on the host and where asked, else float32."""
    if precision == "float32" and not centered:
        return torch.float32
    if precision == "float64" or centered or (device.type == "cpu" and d <= WIDE):
        return torch.float64
    return torch.float32


class SecondMoment:
    """Streaming second moment of rows in R^d.

    Args:
        d: length of a row.
        device: where the sums lie; rows must come from there.
        dtype: of the sums, float32 or float64; None chooses by :func:`sum_dtype`.
        centered: subtract the mean of the rows when read; sums are float64 then, as the subtraction cancels.

    Attributes:
        n: rows seen, those merged from elsewhere included.
        count: what the sum is divided by: the weights of the rows, unless :meth:`update` was told otherwise.

    >>> import torch
    >>> moment = SecondMoment(2)
    >>> moment.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moment.compute()
    tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)
    """

    def __init__(
        self,
        d: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        centered: bool = False,
    ) -> None:
        self.device = torch.device(device)
        if type(d) is not int or d < 1:
            raise InputError(f"d needs a positive integer, the length of a row, got {d!r}")
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"dtype needs float32 or float64, got {dtype}")
        self.d = d
        self.dtype = dtype or sum_dtype(d, self.device, centered=centered)
        if centered:
            self.dtype = torch.float64
        self.centered = centered
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.n = 0
        self.count = 0.0
        self.rows_eps = 0.0  # of the coarsest dtype rows came in
        self._sum = torch.zeros(self.d, self.d, dtype=self.dtype, device=self.device)  # upper triangle on the host
        self._mean = torch.zeros(self.d if self.centered else 0, dtype=torch.float64, device=self.device)

    def update(self, rows: Tensor, *, weight: float = 1.0, count: float | None = None) -> None:
        """Add ``weight`` times the outer products of rows.

        Args:
            rows: (N, d), any float dtype and strides.
            weight: of each row.
            count: added to what the sum is divided by; None: N times the weight.

        Raises:
            InputError: if rows has another shape, dtype or device.
        """
        _check(rows, self.d, self.device)
        rows = rows.detach()
        self.n += len(rows)
        self.count += len(rows) * weight if count is None else count
        self.note_dtype(rows.dtype)
        if self.device.type == "cpu":
            for part in _parts(rows, self.dtype):
                _rank_update(self._sum, part, weight)
        else:
            with _full_precision():
                wide = rows.to(self.dtype)
                self._sum.addmm_(wide.T, wide, alpha=weight)
        if self.centered:
            self._mean.add_(rows.sum(0, dtype=torch.float64), alpha=weight)

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Say what rows were stored in before they were converted: its rounding bounds what can be resolved."""
        self.rows_eps = max(self.rows_eps, torch.finfo(dtype).eps)

    def decay(self, factor: float) -> None:
        """Weigh all rows so far by ``factor``, from 0 to 1: an exponential average over calls."""
        if not 0 <= factor <= 1:
            raise InputError(f"factor needs a number from 0 to 1, got {factor!r}")
        self._settle()
        self.count *= factor
        self._sum.mul_(factor)
        self._mean.mul_(factor)

    def merge(self, other: SecondMoment) -> None:
        """Add the rows of another one.

        Raises:
            InputError: if it is of another length or kind.
        """
        if type(other) is not type(self) or other.d != self.d or other.centered != self.centered:
            raise InputError(f"merge needs a {type(self).__name__} of rows of length {self.d}, centred alike")
        other._settle()
        self._sum += other._sum.to(self.device, self.dtype)
        self._mean += other._mean.to(self.device)
        self._note(other.n, other.count, other.rows_eps)

    def _settle(self) -> None:
        """Put rows that wait into the sum."""

    def _note(self, n: int, count: float, eps: float) -> None:
        self.n, self.count, self.rows_eps = self.n + n, self.count + count, max(self.rows_eps, eps)

    def compute(self) -> Tensor:
        """(d, d) float64, symmetric; NaN before the first row."""
        self._settle()
        whole = self._sum.to(torch.float64) / (self.count or math.nan)
        whole = whole.triu() + whole.triu(1).T
        if self.centered:
            mean = self._mean / self.count
            whole -= torch.outer(mean, mean)
        return whole

    def spectrum(self) -> Tensor:
        """(d,) float64 on the host, largest first."""
        return spectrum(self.compute())

    @property
    def tol(self) -> float:
        """Share of the largest eigenvalue at and below which another one is rounding: of the sums, or of the rows."""
        return min(0.5, max(eigenvalue_tolerance(self.d, self.n, self.dtype), self.rows_eps**2))

    def packed(self) -> Tensor:
        """(3 + d (d + 1) / 2 [+ d],) float64: n, count, eps of rows, one triangle, sums of rows; adds up over ranks."""
        self._settle()
        index = torch.triu_indices(self.d, self.d, device=self.device)
        head = torch.tensor([self.n, self.count, self.rows_eps], dtype=torch.float64, device=self.device)
        return torch.cat([head, self._sum[index[0], index[1]].to(torch.float64), self._mean])

    def unpack(self, packed: Tensor) -> None:
        """Hold what :meth:`packed` gave, or a sum of these."""
        self.reset()
        index = torch.triu_indices(self.d, self.d, device=self.device)
        size = index.shape[1]
        self.n, self.count, self.rows_eps = round(float(packed[0])), float(packed[1]), float(packed[2])
        self._sum[index[0], index[1]] = packed[3 : 3 + size].to(self.dtype)
        self._mean.copy_(packed[3 + size :])


class TriangularFactor(SecondMoment):
    """The same by QR: R with ``R^T R = sum_i w_i x_i x_i^T``, which never squares a row.

    Eigenvalues are resolved down to (d eps)^2 of the largest instead of d eps, in the rows' own dtype. Work 2 N d^2.
    """

    def reset(self) -> None:
        """Forget all rows."""
        self.n = 0
        self.count = 0.0
        self.rows_eps = 0.0
        self._factor = torch.zeros(0, self.d, dtype=self.dtype, device=self.device)
        self._waiting: list[Tensor] = []
        self._mean = torch.zeros(0, dtype=torch.float64, device=self.device)
        if self.centered:
            raise InputError("method='qr' keeps no mean; use method='gram' for centred covariances")

    def update(self, rows: Tensor, *, weight: float = 1.0, count: float | None = None) -> None:
        """As :meth:`SecondMoment.update`; a weight must not be negative."""
        _check(rows, self.d, self.device)
        self._note(len(rows), len(rows) * weight if count is None else count, torch.finfo(rows.dtype).eps)
        self._waiting.append(rows.detach().to(self.dtype) * math.sqrt(weight))
        if sum(map(len, self._waiting)) >= 2 * self.d:
            self._settle()

    def decay(self, factor: float) -> None:
        """As :meth:`SecondMoment.decay`."""
        if not 0 <= factor <= 1:
            raise InputError(f"factor needs a number from 0 to 1, got {factor!r}")
        self._settle()
        self._factor.mul_(math.sqrt(factor))
        self.count *= factor

    def merge(self, other: SecondMoment) -> None:
        """As :meth:`SecondMoment.merge`."""
        if not isinstance(other, TriangularFactor) or other.d != self.d:
            raise InputError(f"merge needs a TriangularFactor of rows of length {self.d}")
        other._settle()
        self._waiting.append(other._factor.to(self.device, self.dtype))
        self._note(other.n, other.count, other.rows_eps)

    def compute(self) -> Tensor:
        """(d, d) float64, symmetric; NaN before the first row."""
        self._settle()
        factor = self._factor.to(torch.float64)
        return factor.T @ factor / (self.count or math.nan)

    def spectrum(self) -> Tensor:
        """(d,) float64 on the host, largest first: squared singular values of R, nothing squared before."""
        self._settle()
        factor = self._factor.to("cpu", torch.float64)
        if not self.count or not bool(factor.isfinite().all()):
            return torch.full((self.d,), math.nan, dtype=torch.float64)
        values = torch.linalg.svdvals(factor).square() / self.count
        return torch.cat([values, values.new_zeros(self.d - len(values))])

    @property
    def tol(self) -> float:
        """Share of the largest eigenvalue at and below which another one is rounding."""
        relative = self.d * torch.finfo(self.dtype).eps
        return min(0.5, max(relative**2, eigenvalue_tolerance(self.d), self.rows_eps**2))

    def packed(self) -> Tensor:
        """(3 + d^2,) float64; factors of several ranks are stacked by :func:`merge_over_ranks`, they do not add up."""
        self._settle()
        head = torch.tensor([self.n, self.count, self.rows_eps], dtype=torch.float64, device=self.device)
        whole = torch.zeros(self.d, self.d, dtype=torch.float64, device=self.device)
        whole[: len(self._factor)] = self._factor.to(torch.float64)
        return torch.cat([head, whole.flatten()])

    def unpack(self, packed: Tensor) -> None:
        """Hold what :meth:`packed` gave."""
        self.reset()
        self._note(round(float(packed[0])), float(packed[1]), float(packed[2]))
        self._factor = packed[3:].reshape(self.d, self.d).to(self.dtype)

    def _settle(self) -> None:
        if self._waiting:
            stacked = torch.cat([self._factor, *self._waiting])
            self._waiting = []
            self._factor = torch.linalg.qr(stacked, mode="r").R


class DiagonalMoment(SecondMoment):
    """The second moment of one-hot rows, such as the inputs of an embedding: how often each index came."""

    def reset(self) -> None:
        """Forget all rows."""
        self.n = 0
        self.count = 0.0
        self.rows_eps = 0.0
        self._sum = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        self._mean = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.centered = False

    def update(self, rows: Tensor, *, weight: float = 1.0, count: float | None = None) -> None:
        """Add indices.

        Args:
            rows: (N,) integers below d.
            weight: of each.
            count: as in :meth:`SecondMoment.update`.
        """
        self._note(len(rows), len(rows) * weight if count is None else count, 0.0)
        self._sum += torch.bincount(rows.detach(), minlength=self.d).to(torch.float64) * weight

    def compute(self) -> Tensor:
        """(d,) float64, the diagonal; NaN before the first row."""
        return self._sum / (self.count or math.nan)

    def spectrum(self) -> Tensor:
        """(d,) float64 on the host, largest first."""
        return self.compute().to("cpu").sort(descending=True).values

    @property
    def tol(self) -> float:
        """Counts are exact: only 0 is 0."""
        return 0.0

    def packed(self) -> Tensor:
        """(3 + d,) float64; adds up over ranks."""
        head = torch.tensor([self.n, self.count, self.rows_eps], dtype=torch.float64, device=self.device)
        return torch.cat([head, self._sum])

    def unpack(self, packed: Tensor) -> None:
        """Hold what :meth:`packed` gave, or a sum of these."""
        self.n, self.count, self.rows_eps = round(float(packed[0])), float(packed[1]), float(packed[2])
        self._sum.copy_(packed[3:])


def merge_over_ranks(moments: Sequence[SecondMoment], group: Any = None) -> None:
    """Make every rank's moments those of all ranks' rows: one message of packed triangles, and one of factors.

    All ranks of the group must call it with moments of the same shapes; each then holds the same bits.
    """
    sums = [moment for moment in moments if not isinstance(moment, TriangularFactor)]
    if sums:
        packed = [moment.packed() for moment in sums]
        coarsest = torch.stack([vector[2] for vector in packed])
        whole = torch.cat(packed)
        torch.distributed.all_reduce(whole, group=group)
        torch.distributed.all_reduce(coarsest, torch.distributed.ReduceOp.MAX, group=group)
        for moment, part, eps in zip(sums, whole.split([len(vector) for vector in packed]), coarsest, strict=True):
            moment.unpack(part)
            moment.rows_eps = float(eps)
    ranks = torch.distributed.get_world_size(group)
    for factor in (moment for moment in moments if isinstance(moment, TriangularFactor)):
        mine = factor.packed()
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, mine, group=group)
        factor.reset()
        for vector in gathered:  # in the order of ranks, so that all compute the same bits
            other = TriangularFactor(factor.d, device=factor.device, dtype=factor.dtype)
            other.unpack(vector)
            factor.merge(other)


def _check(rows: Tensor, d: int, device: torch.device) -> None:
    if not isinstance(rows, Tensor) or not rows.dtype.is_floating_point or rows.dim() != 2 or rows.shape[1] != d:
        told = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise InputError(f"rows needs a floating-point tensor (N, {d}), got {told}")
    if rows.device.type != device.type:
        raise InputError(f"rows needs to lie on {device}, where the sums are, got {rows.device}")


def _parts(rows: Tensor, dtype: torch.dtype) -> Any:
    """The rows in the dtype of the sums, one side contiguous: as they are if they can be, else some at a time."""
    if rows.dtype == dtype and (rows.is_contiguous() or rows.T.is_contiguous()):
        yield rows
        return
    across = rows.T.is_contiguous() and not rows.is_contiguous()
    step = max(1, BUFFER // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        buffer = workspace(part.numel(), dtype)
        ready = buffer.view(part.shape[1], part.shape[0]).T if across else buffer.view(part.shape)
        yield ready.copy_(part)


def _rank_update(total: Tensor, rows: Tensor, weight: float) -> None:
    """total += weight * rows^T rows in its upper triangle, which BLAS sees as the lower one of the transpose."""
    if not len(rows):
        return
    syrk = blas.dsyrk if total.dtype == torch.float64 else blas.ssyrk
    target = total.numpy().T
    if rows.is_contiguous():
        syrk(weight, rows.numpy().T, 1.0, target, trans=0, lower=1, overwrite_c=1)
    else:
        syrk(weight, rows.numpy(), 1.0, target, trans=1, lower=1, overwrite_c=1)


@contextmanager
def _full_precision() -> Any:
    """No TF32 in products: eigenvalues below a thousandth of the largest would be its rounding."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed

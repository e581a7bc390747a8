"""Second moment of a convolution's patches without the patches: neighbouring offsets differ by edges only.

A patch holds what a kernel sees at position t: x[t + a] for offsets a of the kernel. The block of a second moment that
belongs to offsets a and b is

    S[a, b] = sum_t x[t + a] x[t + b]^T ,    S[a + 1, b + 1] = S[a, b] - (t at the first edge) + (t past the last edge)

in each dimension, so that only blocks with min(a, b) = 0 are whole products: 13 of the 45 of a 3 x 3 kernel. All of it
is linear in the images: sums are kept as they come and put together when they are read. For strides and dilations of 1.

Work  (k_h k_w + (k_h - 1) (k_w - 1)) C^2 per position and edges.  Memory  k_w + 1 times some images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthofast.training.covariance import BUFFER, SecondMoment, workspace

NARROW = 8  # channels: below, products are too narrow and unfolding is as fast


def by_offsets(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether this convolution's patches are best measured so."""
    plain = all(s == 1 for s in stride) and all(d == 1 for d in dilation)
    return plain and len(kernel) in (1, 2) and max(kernel) > 1 and channels >= NARROW


class PatchMoment(SecondMoment):
    """Streaming second moment of the patches a convolution sees, a patch in the order its filters are stored.

    Args:
        channels: of one group.
        kernel: its size, one or two numbers.
        device: where the images lie.
        dtype: of the sums.

    >>> import torch
    >>> images = torch.arange(24.0).view(1, 2, 3, 4)
    >>> moment = PatchMoment(2, (2, 2))
    >>> moment.add_images(images)
    >>> patches = torch.nn.functional.unfold(images, 2)[0].double()
    >>> torch.equal(moment.compute(), patches @ patches.T / 6)
    True
    """

    def __init__(
        self,
        channels: int,
        kernel: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        self.rows, self.columns = kernel if len(kernel) == 2 else (1, *kernel)
        super().__init__(channels * self.rows * self.columns, device=device, dtype=dtype)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._pending: list[Tensor] = []

    def add_images(self, images: Tensor) -> None:
        """Add the patches of images, (n, C, *size), padded; some at a time."""
        images = images if images.dim() == 4 else images[:, :, None]
        height, width = images.shape[2:]
        tall, wide = height - self.rows + 1, width - self.columns + 1
        self.note_dtype(images.dtype)
        if not len(images):
            return
        self.n += len(images) * tall * wide
        self.count += len(images) * tall * wide
        if not self._pending:
            self._pending = self._fresh()
        numbers = self.channels * width * (height + self.columns * tall)
        step = max(1, BUFFER * 8 // self.dtype.itemsize // max(1, numbers))
        for start in range(0, len(images), step):
            self._add(images[start : start + step], tall, wide)
        self._add_edges(images, tall, wide)

    def _fresh(self) -> list[Tensor]:
        rows, columns, channels = self.rows, self.columns, self.channels
        shapes = [
            (rows, columns * channels, channels),  # S[(0, .), (b, 0)]
            (rows, max(0, columns - 1), channels, channels),  # S[(0, 0), (b, 1 ...)]
            (rows, (columns - 1) * channels, (columns - 1) * channels),  # steps of both column offsets
            ((rows - 1) * columns * channels, (rows - 1) * columns * channels),  # steps of both row offsets
        ]
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def _add(self, images: Tensor, tall: int, wide: int) -> None:
        """Products of whole images: all blocks with min(a, b) = 0."""
        first, others = self._pending[:2]
        n, _, _, width = images.shape
        flat, moved = self._laid_out(images, tall, wide)
        line, numbers = n * width, tall * n * width
        for b in range(self.rows):
            start = b * line
            first[b].addmm_(moved, flat[:, start : start + numbers].T)
            for c in range(1, self.columns if b else 1):  # of b = 0 the transposes are there
                others[b, c - 1].addmm_(moved[: self.channels], flat[:, start + c : start + c + numbers].T)

    def _add_edges(self, images: Tensor, tall: int, wide: int) -> None:
        """What a step of both offsets adds: past the last edge, less at the first."""
        rows, columns = self.rows, self.columns
        by_column, by_row = self._pending[2:]
        n, _, height, _ = images.shape
        for place, sign in ((wide, 1), (0, -1)):
            if columns > 1:
                strip = images[..., place : place + columns - 1].permute(3, 1, 2, 0).to(self.dtype)
                strip = strip.reshape(-1, height * n)
                for b in range(rows):
                    by_column[b].addmm_(strip[:, : tall * n], strip[:, b * n : (b + tall) * n].T, alpha=sign)
        for place, sign in ((tall, 1), (0, -1)):
            if rows > 1:
                lines = images[:, :, place : place + rows - 1].permute(2, 1, 0, 3)  # (rows - 1, C, n, width)
                strip = torch.stack([lines[..., c : c + wide] for c in range(columns)], 1).to(self.dtype)
                by_row.add_(_gram(strip.view(-1, n * wide)), alpha=sign)

    def _laid_out(self, images: Tensor, tall: int, wide: int) -> tuple[Tensor, Tensor]:
        """(C, height n width + rest), and moved by each column offset (columns C, tall n width), 0 past t."""
        columns, channels = self.columns, self.channels
        n, _, height, width = images.shape
        numbers, rest = height * n * width, columns - 1
        total = channels * (numbers + rest) + columns * channels * tall * n * width
        if images.device.type == "cpu":
            buffer = workspace(total, self.dtype)
        else:
            buffer = torch.empty(total, dtype=self.dtype, device=images.device)
        flat = buffer[: channels * (numbers + rest)].view(channels, numbers + rest)
        flat[:, numbers:].zero_()
        grid = flat[:, :numbers].view(channels, height, n, width)
        grid.copy_(images.permute(1, 2, 0, 3))
        moved = buffer[channels * (numbers + rest) :].view(columns, channels, tall, n, width)
        for c in range(columns):
            moved[c, ..., :wide].copy_(grid[:, :tall, :, c : c + wide])
        moved[..., wide:].zero_()
        return flat, moved.view(columns * channels, tall * n * width)

    def _settle(self) -> None:
        if self._pending:
            self._sum += self._assembled(*self._pending)
            self._pending = []

    def _assembled(self, first: Tensor, others: Tensor, by_column: Tensor, by_row: Tensor) -> Tensor:
        rows, columns, channels = self.rows, self.columns, self.channels
        side = columns * channels
        by_column = by_column.view(rows, columns - 1, channels, columns - 1, channels)
        gram = first.new_zeros(rows, side, rows, side)
        for b in range(rows):
            block = first.new_zeros(columns, channels, columns, channels)  # S[(0, .), (b, .)]
            block[:, :, 0] = first[b].view(columns, channels, channels)
            for c in range(1, columns):
                block[0, :, c] = others[b, c - 1] if b else block[c, :, 0].T
            for c in range(columns - 1):
                for other in range(columns - 1):
                    block[c + 1, :, other + 1] = block[c, :, other] + by_column[b, c, :, other]
            gram[0, :, b] = block.view(side, side)
            gram[b, :, 0] = block.view(side, side).T
        by_row = by_row.view(max(0, rows - 1), side, max(0, rows - 1), side)
        for b in range(rows - 1):
            for other in range(rows - 1):
                gram[b + 1, :, other + 1] = gram[b, :, other] + by_row[b, :, other]
        order = gram.view(rows, columns, channels, rows, columns, channels).permute(2, 0, 1, 5, 3, 4)
        return order.reshape(self.d, self.d)


def _gram(strip: Tensor) -> Any:
    """strip strip^T: on the host by NumPy, to which it is a symmetric product at half the work."""
    if strip.device.type == "cpu":
        array = strip.numpy()
        return torch.from_numpy(np.matmul(array, array.T))
    return strip @ strip.T

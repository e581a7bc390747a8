"""The formulas of the penalties on (b, n, d) vectors: each a differentiable value and a gradient in closed form.

Gram matrices are formed on the smaller side of n x d and never exceed it squared. Arithmetic is float32 (float64 for
float64 vectors) whatever autocast says. X is the matrix of vectors as rows, S the smaller of X X^T and X^T X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orthofast.kernels import gram_stats, mean_abs_cosine, mean_square_cosine

ValueAndGradient = tuple[Tensor, Tensor]


class Penalty(NamedTuple):
    """One penalty on (b, n, d) vectors.

    Attributes:
        value: (b, n, d) -> (b,), differentiable.
        gradient: (b, n, d) -> the same value and its gradient (b, n, d), without a graph.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], ValueAndGradient]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """The tensor in the dtype penalties compute in, and no autocast inside the block."""
    with torch.autocast(x.device.type, enabled=False):
        yield x.to(_dtype(x))


def smaller_gram(x: Tensor) -> Tensor:
    """(b, n, d) -> (b, s, s) with s = min(n, d)."""
    return x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT


def times_gram(x: Tensor, gram: Tensor) -> Tensor:
    """X times a matrix of the smaller side, from the right or from the left, (b, n, d)."""
    return x @ gram if x.shape[1] > x.shape[2] else gram @ x


def minus_identity(gram: Tensor) -> Tensor:
    """S - I, (b, s, s)."""
    return gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)


def _poison(x: Tensor) -> Tensor:
    """0, or NaN where an item holds NaN or Inf, (b,)."""
    return (x.detach().to(_dtype(x)) * 0).sum((1, 2))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, (b, n, d); rows of length 0 stay."""
    largest = x.detach().abs().amax(2, keepdim=True)  # squares of scaled entries neither over- nor underflow
    scaled = x / torch.where(largest == 0, 1.0, largest)
    square = scaled.square().sum(2, keepdim=True)
    return scaled / torch.where(square == 0, 1.0, square).sqrt()  # no infinite slope at zero


# --- means over pairs: the fold makes their gradients with them -----------------------------------------------


class _Mean(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b,) float64, differentiable."""


def pair_mean(x: Tensor, mean: _Mean) -> Tensor:
    """A mean over the pairs of non-zero rows; 0, and not NaN, where there is no pair."""
    value = mean(x)
    return torch.where(value.isnan() & ~_poison(x).isnan(), 0.0, value).to(_dtype(x))


def pair_mean_gradient(x: Tensor, mean: _Mean) -> ValueAndGradient:
    """The same with its gradient, from a graph of one operation that ends here."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = pair_mean(leaf, mean)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


# --- soft orthogonality -------------------------------------------------------------------------------------------


def _gram_sides(x: Tensor, double: bool) -> tuple[int, int]:
    """How often the smaller residual counts, and the constant that the larger side adds."""
    n, d = x.shape[1:]
    return (2, abs(n - d)) if double else (1, max(0, n - d))


def soft_orthogonality(x: Tensor, double: bool = False) -> Tensor:
    """``|X X^T - I|_F^2``, and with ``double`` also ``+ |X^T X - I|_F^2``."""
    times, constant = _gram_sides(x, double)
    with full_precision(x) as wide:
        return times * minus_identity(smaller_gram(wide)).square().sum((1, 2)) + constant


@torch.no_grad()
def soft_orthogonality_gradient(x: Tensor, double: bool = False) -> ValueAndGradient:
    """``4 X (S - I)`` on the smaller side, twice that with ``double``."""
    times, constant = _gram_sides(x, double)
    with full_precision(x) as wide:
        residual = minus_identity(smaller_gram(wide))
        value = times * residual.square().sum((1, 2)) + constant
        return value, times_gram(wide, residual).mul_(4 * times)


# --- mutual coherence: one pair is active, which the fold finds without an n x n matrix ---------------------------


def _active(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the largest product (b, 2), which items have one, and the row farthest from length 1, (b,)."""
    found = gram_stats(x, want=("abs_max",), normalize=normalize)
    assert found.argmax is not None
    assert found.norm_sq is not None
    away = (found.norm_sq - 1).abs()
    return found.argmax.clamp(min=0), found.argmax[:, 0] >= 0, away.argmax(1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(b, n, d), (b, r) -> (b, r, d)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _coherence_of(rows: Tensor, there: Tensor, poison: Tensor, normalize: bool) -> Tensor:
    """The penalty from its active rows (b, 3, d): a pair, and the row farthest from length 1."""
    first, second, lone = (unit_rows(rows) if normalize else rows).unbind(1)
    pair = torch.where(there, (first * second).sum(1).abs(), 0.0)
    if normalize:
        return pair + poison
    return torch.maximum(pair, (lone.square().sum(1) - 1).abs()) + poison


def mutual_coherence(x: Tensor, normalize: bool = False) -> Tensor:
    """``max |X X^T - I|``, entry by entry; with ``normalize`` the largest |cos| instead."""
    pair, there, lone = _active(x, normalize)
    with full_precision(x) as wide:
        rows = _rows(wide, torch.cat((pair, lone.unsqueeze(1)), 1))
        return _coherence_of(rows, there, _poison(wide), normalize)


def mutual_coherence_gradient(x: Tensor, normalize: bool = False) -> ValueAndGradient:
    """The gradient of the active pair or row, and zero elsewhere."""
    x = x.detach()
    pair, there, lone = _active(x, normalize)
    index = torch.cat((pair, lone.unsqueeze(1)), 1)
    with full_precision(x) as wide, torch.enable_grad():
        rows = _rows(wide, index).requires_grad_()
        value = _coherence_of(rows, there, _poison(wide), normalize)
        (slope,) = torch.autograd.grad(value.sum(), rows)  # of three rows, whatever n
    gradient = torch.zeros_like(wide)
    for row in range(index.shape[1]):  # one after another: rows may coincide
        gradient.scatter_add_(1, index[:, row, None, None].expand(-1, 1, x.shape[2]), slope[:, row : row + 1])
    return value.detach(), gradient


# --- spectral restricted isometry ---------------------------------------------------------------------------------


def _residual_times(x: Tensor, vector: Tensor) -> Tensor:
    """(S - I) v on the smaller side without forming S, (b, s) -> (b, s)."""
    inner = x if x.shape[1] > x.shape[2] else x.mT
    return torch.einsum("bts,bt->bs", inner, torch.einsum("bts,bs->bt", inner, vector)) - vector


def power_steps(x: Tensor, vector: Tensor, steps: int) -> Tensor:
    """The vector (b, s) after power iterations on S - I, of length 1; unchanged where S = I."""
    with torch.no_grad(), full_precision(x) as wide:
        vector = vector.to(wide.dtype)
        for _ in range(steps):
            onward = _residual_times(wide, vector)
            length = torch.linalg.vector_norm(onward, dim=1, keepdim=True)
            vector = torch.where(length > 0, onward / length, vector)  # NaN is not kept as the next start
        return vector


def srip(x: Tensor, vector: Tensor) -> Tensor:
    """``|(S - I) v|``: the spectral norm of S - I from below, reached when v is its leading singular vector."""
    with full_precision(x) as wide:
        value: Tensor = torch.linalg.vector_norm(_residual_times(wide, vector.to(wide.dtype)), dim=1)
        return value


@torch.no_grad()
def srip_gradient(x: Tensor, vector: Tensor) -> ValueAndGradient:
    """``(X v) u^T + (X u) v^T`` with ``u = (S - I) v / |(S - I) v|``, transposed on the side of n; 0 where S = I."""
    with full_precision(x) as wide:
        right = vector.to(wide.dtype)
        onward = _residual_times(wide, right)
        value = torch.linalg.vector_norm(onward, dim=1)
        left = torch.where((value > 0).unsqueeze(1), onward / value.unsqueeze(1), torch.zeros_like(onward))
        inner = wide if wide.shape[1] > wide.shape[2] else wide.mT  # (b, t, s)
        far_right, far_left = (torch.einsum("bts,bs->bt", inner, v).unsqueeze(2) for v in (right, left))
        gradient: Tensor = far_right * left.unsqueeze(1) + far_left * right.unsqueeze(1)
        return value, gradient if wide.shape[1] > wide.shape[2] else gradient.mT


def pair_penalty(mean: _Mean) -> Penalty:
    """A differentiable mean over pairs as a penalty."""
    return Penalty(partial(pair_mean, mean=mean), partial(pair_mean_gradient, mean=mean))


# those that are functions of the vectors alone, by the name a user may give
PENALTIES: dict[str, Penalty] = {
    "mean_abs_cosine": pair_penalty(mean_abs_cosine),
    "frame_potential": pair_penalty(mean_square_cosine),
    "soft_orthogonality": Penalty(soft_orthogonality, soft_orthogonality_gradient),
    "double_soft_orthogonality": Penalty(
        partial(soft_orthogonality, double=True), partial(soft_orthogonality_gradient, double=True)
    ),
    "mutual_coherence": Penalty(mutual_coherence, mutual_coherence_gradient),
    "max_abs_cosine": Penalty(
        partial(mutual_coherence, normalize=True), partial(mutual_coherence_gradient, normalize=True)
    ),
}

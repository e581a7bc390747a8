"""SRIP: the spectral norm of X X^T - I as a penalty, by power iteration from a vector kept from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from orthofast.errors import InputError
from orthofast.training.accumulate import Made, Term, add_made_, add_up, groups, trained
from orthofast.training.layers import Select, Source
from orthofast.training.losses import OrthogonalityPenalty, found_in
from orthofast.training.penalties import Penalty, power_steps, srip, srip_gradient

FIRST_STEPS = 15  # as torch's spectral_norm takes at the start


class SRIP(OrthogonalityPenalty):
    """Spectral restricted isometry: ``weight`` times the spectral norm of ``X X^T - I``, summed over layers.

    The largest deviation of a squared singular value from 1, ``max |s^2 - 1|`` (Bansal et al. 2018, Section 3.4). It is
    taken on the smaller side: the larger Gram matrix has the eigenvalue -1 besides, which no X can move. The Gram
    matrix is not formed; each power step applies X twice.

    The power vector of each layer is a buffer: it starts at random, follows the weights by ``steps`` iterations per
    call while in training mode, rests in eval mode, and travels in the ``state_dict``. (The public code starts anew at
    random in every call and stops far from convergence.) The value is a lower bound, reached as the vector converges;
    the gradient holds the vector fixed.

    Args:
        source: a model, or an iterable of modules or parameters, as in :func:`orthofast.training.find_layers`.
        steps: power iterations per call, at least 1.
        weight: factor of the sum.
        select: which layers.
        generator: of the first vectors, on the CPU; None: torch's own.

    Raises:
        InputError: if an argument cannot be used, or nothing is left to penalise.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 3)
    >>> _ = torch.nn.init.orthogonal_(layer.weight)
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(2)
    >>> round(SRIP(layer)().item(), 4)  # all squared singular values are 4
    3.0
    """

    def __init__(
        self,
        source: Source,
        *,
        steps: int = 1,
        weight: float = 1.0,
        select: Select = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if type(steps) is not int or steps < 1:
            raise InputError(f"steps needs a positive integer, the power iterations per call, got {steps!r}")
        found, skipped = found_in(source, select)
        one = Penalty(_refuse, _refuse)  # the same for all, so that they are grouped
        super().__init__([Term(layer, one) for layer in found], skipped, weight)
        self.steps = steps
        self._index = {term: index for index, term in enumerate(self._terms)}
        for index, term in enumerate(self._terms):
            x = term.layer.vectors().detach()
            start = torch.randn(1, min(x.shape[1:]), generator=generator).to(x.device)
            self.register_buffer(f"vector_{index}", power_steps(x, start, FIRST_STEPS).squeeze(0))

    def forward(self) -> Tensor:
        """The penalty, (), differentiable."""
        return add_up([srip(x, vector) for _, x, vector in self._with_vectors(self._terms)], self.weight)

    @torch.no_grad()
    def add_grad_(self) -> Tensor:
        """Add the penalty's gradient to ``.grad`` of the layers, as :func:`add_penalty_grad_` does."""
        made = [Made(group, *srip_gradient(x, vector)) for group, x, vector in self._with_vectors(trained(self._terms))]
        return add_made_(made, self.weight)

    def _with_vectors(self, terms: Sequence[Term]) -> Iterator[tuple[list[Term], Tensor, Tensor]]:
        """Groups of layers, their vectors (b, n, d) and their power vectors (b, s), moved on while training."""
        for group, x in groups(terms):
            names = [f"vector_{self._index[term]}" for term in group]
            vector = torch.stack([self.get_buffer(name).to(x.device) for name in names])  # a copy: buffers will change
            if self.training:
                vector = power_steps(x, vector, self.steps)
                for name, moved in zip(names, vector, strict=True):
                    self._keep(name, moved)
            yield group, x, vector

    def _keep(self, name: str, vector: Tensor) -> None:
        buffer = self.get_buffer(name)
        if buffer.device == vector.device:
            buffer.copy_(vector)
        else:  # the model has moved
            setattr(self, name, vector.to(buffer.dtype))


def _refuse(x: Tensor) -> NoReturn:
    raise InputError("SRIP keeps a vector per layer; call the module itself")

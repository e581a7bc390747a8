"""Which backend serves a call: the order, the choice, the reasons, and how to overrule them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, cast

from orthofast.errors import BackendError
from orthofast.kernels.contract import Request, make_request
from orthofast.records import GramStats
from orthofast.views import Array, as_tensor

# first that can, serves; a device type not named here has the reference alone
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native_cpu", "numba_cpu", "reference"),
    # what is proven in the interpreter comes first; a run on a GPU decides
    "cuda": ("triton_gpu", "native_cuda", "reference"),
}
ANY_DEVICE = ("reference",)
NAMES = ("native_cpu", "numba_cpu", "reference", "triton_gpu", "native_cuda")
ENVIRONMENT = "ORTHOFAST_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("orthofast_backend", default=None)
_loaded: dict[str, Backend] = {}


class Backend(Protocol):
    """What a backend file offers; a string DETAIL, where it has one, is shown by ``explain``.

    A backend may offer ``again(requests)``: None, or a function that folds other tensors of the same description.
    """

    NAME: str

    def supports(self, request: Request) -> str | None:
        """None if this request can be served, else the sentence why not."""

    def gram_stats(self, request: Request) -> GramStats:
        """Fold one request."""

    def gram_stats_many(self, requests: Sequence[Request]) -> list[GramStats]:
        """Fold several requests in one go."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One line of ``orthofast.explain``: a backend, whether it would serve, and why not."""

    backend: str
    serves: bool
    reason: str


def load(name: str) -> Backend:
    """The backend of that name; its file is imported on first use.

    Raises:
        BackendError: if there is none of that name.
    """
    backend = _loaded.get(name)
    if backend is None:
        if name not in NAMES:
            raise BackendError(f"backend needs one of {', '.join(NAMES)}, got {name!r}")
        backend = cast(Backend, importlib.import_module(f"orthofast.kernels.{name}"))
        _loaded[name] = backend
    return backend


def order_for(request: Request) -> tuple[str, ...]:
    """Backends in the order they are asked, for this request's device."""
    return ORDER.get(request.x.device.type, ANY_DEVICE)


def choose(request: Request, backend: str | None = None) -> Backend:
    """The backend that serves this request: the one named, or the first that can.

    Raises:
        BackendError: if the named backend is unknown or cannot serve the request.
    """
    return _choice(request, forced(backend))


def choose_each(requests: Sequence[Request], backend: str | None = None) -> dict[str, list[int]]:
    """For each backend that serves some of these requests, which ones; as :func:`choose` decides.

    Raises:
        BackendError: if the named backend is unknown or cannot serve a request.
    """
    name = forced(backend)
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(_choice(request, name).NAME, []).append(index)
    return groups


def forced(backend: str | None) -> str | None:
    """The backend that the argument, ``use_backend`` or the environment names; None where all may serve."""
    return backend or _chosen.get() or os.environ.get(ENVIRONMENT)


def _choice(request: Request, name: str | None) -> Backend:
    if name:
        named = _loaded.get(name) or load(name)
        reason = named.supports(request)
        if reason is not None:
            raise BackendError(f"backend {name} cannot serve this call: {reason}")
        return named
    for candidate in ORDER.get(request.x.device.type, ANY_DEVICE):
        found = _loaded.get(candidate) or load(candidate)
        if found.supports(request) is None:
            return found
    raise BackendError(f"no backend serves {request.x.dtype} on {request.x.device}")  # reference serves everything


class Explanations(list[Explanation]):
    """Explanations of one call; printed, a table."""

    def __repr__(self) -> str:
        width = max((len(line.backend) for line in self), default=0)
        return "\n".join(f"{'*' if line.serves else ' '} {line.backend:<{width}}  {line.reason}" for line in self)


def explain(x: Request | Array) -> Explanations:
    """For every backend in order: would it serve this call, and if not, why; printed, a table.

    A backend forced by ``use_backend`` or the environment is the only one asked.

    Args:
        x: what a fold would be given, (b, n, d) or (n, d), a tensor or numpy array; or a checked request.

    Raises:
        InputError: if ``x`` is neither.
        BackendError: if the forced backend is unknown.

    >>> import torch
    >>> [line.backend for line in explain(torch.ones(4, 3))][:3]
    ['native_cpu', 'numba_cpu', 'reference']
    """
    request = x if isinstance(x, Request) else make_request(as_tensor(x, "x"))
    lines = Explanations()
    served = False
    order = order_for(request)
    forced = _chosen.get() or os.environ.get(ENVIRONMENT)
    if forced:
        load(forced)
    for name in (*order, *(n for n in NAMES if n not in order)):
        reason = load(name).supports(request)
        if forced and name != forced:
            lines.append(Explanation(name, False, f"not asked: {forced} is forced by use_backend or {ENVIRONMENT}"))
        elif reason is not None:
            lines.append(Explanation(name, False, reason))
        elif served:
            lines.append(Explanation(name, False, "can serve; an earlier one does"))
        else:
            detail = getattr(load(name), "DETAIL", None)
            lines.append(Explanation(name, True, f"serves this call ({detail})" if detail else "serves this call"))
            served = True
    return lines


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every call goes to the named backend, or is refused with its reason.

    Raises:
        BackendError: at once, if there is no backend of that name.

    >>> import torch, orthofast
    >>> with orthofast.use_backend("reference"):
    ...     orthofast.pii(torch.eye(3))
    tensor(0., dtype=torch.float64)
    """
    load(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)

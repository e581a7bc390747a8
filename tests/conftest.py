"""Fixtures of all tests: the backends, fixed seeds, threads restored, fresh memory that is poisoned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from orthofast.kernels import dispatch
from orthofast.kernels.contract import make_request

REQUIRED = frozenset(filter(None, os.environ.get("ORTHOFAST_REQUIRE", "").split(",")))
# tests/gpu asks the others on a device; the interpreter's process names its own in REQUIRED
BACKENDS = tuple(name for name in dispatch.NAMES if name in REQUIRED or name in dispatch.ORDER["cpu"])
GARBAGE = 0x5A

# the same examples every time; no file of failures
settings.register_profile("orthofast", deadline=None, derandomize=True, database=None, max_examples=20)
settings.load_profile("orthofast")


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - set(dispatch.NAMES)
    if unknown:
        raise pytest.UsageError(f"ORTHOFAST_REQUIRE names {sorted(unknown)}; backends are {', '.join(dispatch.NAMES)}")


def skip_or_fail(backend: str, reason: str) -> None:
    """Skip with the backend's own sentence, or fail where the environment says this backend is owed."""
    if backend in REQUIRED:
        pytest.fail(f"ORTHOFAST_REQUIRE owes {backend}, but: {reason}")
    pytest.skip(f"{backend}: {reason}")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that serves a small float32 call."""
    name: str = request.param
    reason = dispatch.load(name).supports(make_request(torch.ones(4, 3)))
    if reason is not None:
        skip_or_fail(name, reason)
    return name


@pytest.fixture(autouse=True)
def _seeded_and_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same random numbers in every test; threads and the chosen backend as they were."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def poison_tensor(fresh: torch.Tensor) -> torch.Tensor:
    """NaN in floating-point memory, a recognisable pattern in the rest."""
    if fresh.device.type == "meta":
        return fresh
    if fresh.is_floating_point():
        return fresh.fill_(float("nan"))
    return fresh.fill_(True if fresh.dtype == torch.bool else GARBAGE)


def poison_array(fresh: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    fresh.fill(np.nan if fresh.dtype.kind == "f" else GARBAGE)
    return fresh


def _poisoned(allocate: Callable[..., Any], poison: Callable[[Any], Any]) -> Callable[..., Any]:
    def fresh(*args: Any, **kwargs: Any) -> Any:
        made = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(made) if caller.split(".")[0] == "orthofast" else made

    return fresh


class PoisonedNumpy:
    """numpy, but for fresh arrays."""

    empty = staticmethod(_poisoned(np.empty, poison_array))
    empty_like = staticmethod(_poisoned(np.empty_like, poison_array))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Memory orthofast allocates without filling holds NaN or garbage: whoever reads it before writing is seen."""
    patch = pytest.MonkeyPatch()
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            patch.setattr(owner, name, _poisoned(getattr(owner, name), poison_tensor))
    for name in dispatch.NAMES:  # not numpy itself: numba resolves np.empty while it compiles
        module = dispatch.load(name)
        if hasattr(module, "np"):
            patch.setattr(module, "np", PoisonedNumpy())
    yield
    patch.undo()

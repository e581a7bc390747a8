"""Fixtures of the tests that need a GPU: the device, its backends, folds that land on the CPU; a rehearsal without one.

``ORTHOFAST_GPU_REHEARSAL=1`` runs whatever needs no CUDA on the CPU, with the backends that serve there (the reference,
and the Triton kernels where ``TRITON_INTERPRET=1``), so that the tests themselves are known to work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orthofast.kernels import dispatch, gram_stats
from orthofast.kernels.contract import make_request
from orthofast.records import GramStats

REHEARSAL = os.environ.get("ORTHOFAST_GPU_REHEARSAL") == "1"
BACKENDS = dispatch.ORDER.get("cuda", dispatch.ANY_DEVICE)
Fold = Callable[..., GramStats]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first CUDA device, or the CPU in a rehearsal."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if REHEARSAL:
        return torch.device("cpu")
    pytest.skip("needs a CUDA device; torch sees none")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """A CUDA device, for what has no counterpart on a CPU."""
    if device.type != "cuda":
        pytest.skip("streams, graphs and device memory have no rehearsal on a CPU")
    return device


@pytest.fixture(scope="module", params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend for CUDA tensors that serves a small call."""
    name: str = request.param
    reason = dispatch.load(name).supports(make_request(torch.ones(8, 8, dtype=torch.bfloat16, device=device)))
    if reason is not None:
        required = os.environ.get("ORTHOFAST_REQUIRE", "").split(",")
        (pytest.fail if name in required else pytest.skip)(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_poisoned(poisoned_memory: None) -> None:
    """Partials that nobody writes are NaN in every test here."""


def served(backend: str, x: Tensor, y: Tensor | None = None, **options: Any) -> None:
    """Skip with the backend's sentence where it refuses this call."""
    reason = dispatch.load(backend).supports(make_request(x, y, **options))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(scope="module")
def fold(gpu_backend: str, device: torch.device) -> Fold:
    """gram_stats of vectors moved to the device by the backend under test; the record comes back to the CPU."""

    def call(x: Tensor, y: Tensor | None = None, **options: Any) -> GramStats:
        x, y = moved(x, device), None if y is None else moved(y, device)
        served(gpu_backend, x, y, **options)
        return landed(gram_stats(x, y, backend=gpu_backend, **options))

    return call


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The same tensor on the device with the same strides and the same offset from an aligned address."""
    if device.type == "cpu":
        return x
    words = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (words,))  # type: ignore[call-overload]
    there: Tensor = whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
    return there


def landed(record: GramStats) -> GramStats:
    """The record on the CPU; every field must have been on one device."""
    names = [name for name in GramStats.__slots__ if isinstance(getattr(record, name), Tensor)]
    assert len({getattr(record, name).device for name in names}) == 1
    return replace(record, **{name: getattr(record, name).cpu() for name in names})

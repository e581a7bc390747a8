"""Fixtures of the kernel tests: poisoned memory throughout, and a fold that skips with the backend's sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from orthofast.kernels import dispatch, gram_stats
from orthofast.kernels.contract import make_request
from orthofast.records import GramStats

Fold = Callable[..., GramStats]


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_poisoned(poisoned_memory: None) -> None:
    """All kernel tests run on poisoned memory."""


@pytest.fixture(scope="module")
def fold(backend: str) -> Fold:
    """gram_stats on the backend under test; a call it refuses skips the test with its sentence."""

    def call(x: Tensor, y: Tensor | None = None, **options: Any) -> GramStats:
        asked = {name: value for name, value in options.items() if name != "sample"}
        reason = dispatch.load(backend).supports(make_request(x, y, **asked))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        return gram_stats(x, y, backend=backend, **options)

    return call

"""Fixture of the metric tests: a metric on the backend under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orthofast.errors import BackendError
from tests.conftest import skip_or_fail

Measure = Callable[..., Any]


@pytest.fixture
def measure(backend: str) -> Measure:
    """``measure(metric, weight, **options)`` on the backend; a call it refuses skips or fails with its sentence."""

    def call(metric: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return metric(*arguments, backend=backend, **options)
        except BackendError as refusal:
            return skip_or_fail(backend, str(refusal))

    return call

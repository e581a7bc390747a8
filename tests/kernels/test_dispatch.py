"""Which backend serves: the one asked for or a refusal, else the first that can; an exception is never hidden."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from orthofast.errors import BackendError, InputError
from orthofast.kernels import dispatch, gram_stats, gram_stats_many
from orthofast.kernels.contract import Request, make_request, make_requests
from orthofast.records import GramStats
from tests.conftest import REQUIRED
from tests.kernels.cases import ALL, DTYPES, SHORT, gaussian

X = gaussian((6, 5), 0)


class Spy:
    """Stands in for a backend: refuses, breaks, or serves through the reference and notes that it did."""

    def __init__(self, name: str, refusal: str | None = None, error: Exception | None = None) -> None:
        self.NAME, self.refusal, self.error, self.calls = name, refusal, error, 0

    def supports(self, request: Request) -> str | None:
        return self.refusal

    def gram_stats(self, request: Request) -> GramStats:
        return self.gram_stats_many([request])[0]

    def gram_stats_many(self, requests: Sequence[Request]) -> list[GramStats]:
        self.calls += len(requests)
        if self.error is not None:
            raise self.error
        from_reference: Any = REFERENCE
        return list(from_reference.gram_stats_many(requests))


REFERENCE = dispatch.load("reference")


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spy]:
    """Every backend replaced by a spy that serves."""
    made = {name: Spy(name) for name in dispatch.NAMES}
    monkeypatch.setattr(dispatch, "_loaded", dict(made))
    return made


def calls(spies: dict[str, Spy]) -> dict[str, int]:
    return {name: spy.calls for name, spy in spies.items() if spy.calls}


def test_order_on_a_cpu_and_elsewhere() -> None:
    order = dispatch.order_for(make_request(X))
    assert order == ("native_cpu", "numba_cpu", "reference")
    ordered = {name for order in dispatch.ORDER.values() for name in order}
    assert ordered | set(dispatch.ANY_DEVICE) == set(dispatch.NAMES)
    assert all(order[-1] == "reference" for order in dispatch.ORDER.values())


def test_every_backend_is_a_file_with_its_name() -> None:
    for name in dispatch.NAMES:
        assert name == dispatch.load(name).NAME


def test_first_that_can_serves(spies: dict[str, Spy]) -> None:
    gram_stats(X)
    spies["native_cpu"].refusal = "needs a newer processor"
    gram_stats(X)
    spies["numba_cpu"].refusal = "numba is not installed"
    gram_stats_many([X, X])
    assert calls(spies) == {"native_cpu": 1, "numba_cpu": 1, "reference": 2}


@pytest.mark.parametrize("name", dispatch.NAMES)
@pytest.mark.parametrize("way", ["argument", "block", "environment"])
def test_a_named_backend_is_obeyed(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    if way == "argument":
        gram_stats(X, backend=name)
        gram_stats(X, sample=3, backend=name)
        gram_stats_many([X], backend=name)
    elif way == "block":
        with dispatch.use_backend(name):
            gram_stats(X)
            gram_stats_many([X])
    else:
        monkeypatch.setenv("ORTHOFAST_BACKEND", name)
        gram_stats(X)
    assert set(calls(spies)) == {name}


@pytest.mark.parametrize("name", dispatch.NAMES)
@pytest.mark.parametrize("way", ["argument", "block", "environment"])
def test_a_named_backend_that_cannot_is_refused(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    spies[name].refusal = "the moon is full"
    message = f"backend {name} cannot serve this call: the moon is full"
    if way == "environment":
        monkeypatch.setenv("ORTHOFAST_BACKEND", name)
    argument = name if way == "argument" else None
    block = dispatch.use_backend(name) if way == "block" else nullcontext()
    with pytest.raises(BackendError, match=message), block:
        gram_stats(X, backend=argument)
    if way != "block":
        with pytest.raises(BackendError, match=message):
            gram_stats_many([X], backend=argument)
    assert calls(spies) == {}


def test_argument_overrules_block_overrules_environment(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHOFAST_BACKEND", "numba_cpu")
    with dispatch.use_backend("reference"):
        gram_stats(X, backend="native_cpu")
        assert calls(spies) == {"native_cpu": 1}
        gram_stats(X)
        assert calls(spies) == {"native_cpu": 1, "reference": 1}
    gram_stats(X)
    assert calls(spies) == {"native_cpu": 1, "reference": 1, "numba_cpu": 1}


def test_blocks_nest_and_end_with_an_exception(spies: dict[str, Spy]) -> None:
    with dispatch.use_backend("reference"):
        with pytest.raises(KeyError), dispatch.use_backend("numba_cpu"):
            raise KeyError
        gram_stats(X)
    gram_stats(X)
    assert calls(spies) == {"reference": 1, "native_cpu": 1}


def test_block_of_one_thread_does_not_reach_another(spies: dict[str, Spy]) -> None:
    with dispatch.use_backend("reference"):
        other = threading.Thread(target=gram_stats, args=(X,))
        other.start()
        other.join()
    assert calls(spies) == {"native_cpu": 1}


def test_unknown_names_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"needs one of .*reference.*, got 'mkl'"), dispatch.use_backend("mkl"):
        pytest.fail("the block of an unknown backend was entered")
    monkeypatch.setenv("ORTHOFAST_BACKEND", "mkl")
    with pytest.raises(BackendError, match="got 'mkl'"):
        gram_stats(X)


def test_empty_environment_is_no_choice(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHOFAST_BACKEND", "")
    gram_stats(X)
    assert calls(spies) == {"native_cpu": 1}


@pytest.mark.parametrize("named", [None, "native_cpu"])
def test_an_exception_is_an_error_and_never_a_silent_fallback(spies: dict[str, Spy], named: str | None) -> None:
    spies["native_cpu"].error = ZeroDivisionError("broken backend")
    for call in (
        lambda: gram_stats(X, backend=named),
        lambda: gram_stats(X, sample=3, backend=named),
        lambda: gram_stats_many([X, X], backend=named),
    ):
        with pytest.raises(ZeroDivisionError, match="broken backend"):
            call()
    assert set(calls(spies)) == {"native_cpu"}


def test_a_backend_that_loses_a_record_is_an_error(spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spies["native_cpu"], "gram_stats_many", lambda requests: [])
    with pytest.raises((BackendError, ValueError)):
        gram_stats_many([X, X])


def test_many_requests_go_to_a_backend_together_and_come_back_in_order(
    spies: dict[str, Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_float32(request: Request) -> str | None:
        return None if request.x.dtype == torch.float32 else "float32 only"

    monkeypatch.setattr(spies["native_cpu"], "supports", only_float32)
    records = gram_stats_many(
        [gaussian((n, 4), n, dtype) for n, dtype in ((2, torch.float32), (3, torch.float64), (4, torch.float32))]
    )
    assert [record.pairs.item() for record in records] == [1, 3, 6]
    assert calls(spies) == {"native_cpu": 2, "numba_cpu": 1}


def test_explain_lists_every_backend_with_its_reason(spies: dict[str, Spy]) -> None:
    spies["native_cpu"].refusal = "not built here"
    lines = dispatch.explain(make_request(X))
    order = dispatch.ORDER["cpu"]
    assert [line.backend for line in lines] == [*order, *(name for name in dispatch.NAMES if name not in order)]
    assert [line.serves for line in lines] == [False, True, *[False] * (len(dispatch.NAMES) - 2)]
    assert lines[0].reason == "not built here"
    assert all(line.reason for line in lines)
    assert calls(spies) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_explain_agrees_with_the_choice(dtype: torch.dtype) -> None:
    request = make_request(X.to(dtype))
    serving = [line.backend for line in dispatch.explain(request) if line.serves]
    assert serving == [dispatch.choose(request).NAME]


@pytest.mark.parametrize("name", [name for name in dispatch.NAMES if name in REQUIRED | {"reference"}])
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_backends_that_are_owed_serve_every_dtype_and_field(name: str, dtype: torch.dtype) -> None:
    for y in (None, X.to(dtype)):
        for precision in ("auto", "high", "float64"):
            request = make_request(X.to(dtype), y, want=ALL, bins=4, precision=precision)
            assert dispatch.load(name).supports(request) is None


@pytest.mark.parametrize("precision", ["auto", "high", "highest", "float64"])
def test_many_requests_are_checked_as_each_alone(precision: str) -> None:
    xs = [X.to(dtype) for dtype in DTYPES] + [X.unsqueeze(0), X.T.requires_grad_()]
    options: dict[str, Any] = {"normalize": True, "want": ("abs_sum", "row_abs"), "bins": 4, "precision": precision}
    for x, made in zip(xs, make_requests(xs, **options), strict=True):
        alone = make_request(x, **options)
        assert (made.want, made.bins, made.normalize, made.precision) == (
            alone.want,
            alone.bins,
            alone.normalize,
            alone.precision,
        )
        assert (made.x.shape, made.x.stride(), made.x.data_ptr()) == (
            alone.x.shape,
            alone.x.stride(),
            alone.x.data_ptr(),
        )
        assert made.y is None
        assert not made.x.requires_grad
    for wrong in ({"bins": -1}, {"want": "mean"}, {"precision": "low"}):
        with pytest.raises(InputError):
            make_requests(xs, **{**options, **wrong})
    with pytest.raises(InputError, match="floating-point dtype"):
        make_requests([*xs, torch.ones(3, 3, dtype=torch.int32)], **options)

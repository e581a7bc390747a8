"""Bad arguments are refused by one sentence that names the argument, what was needed and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orthofast.errors import BackendError, InputError, OrthofastError
from orthofast.kernels import gram_stats, gram_stats_many

X = torch.ones(4, 3)

# name of the case: arguments, and what the sentence must say in this order
BAD_INPUT: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "x-list": (([[1.0, 2.0]],), {}, ["x needs a torch.Tensor", "got list", "torch.as_tensor"]),
    "x-none": ((None,), {}, ["x needs a torch.Tensor", "got NoneType"]),
    "x-integer": ((torch.ones(4, 3, dtype=torch.int64),), {}, ["x needs a floating-point dtype", "got torch.int64"]),
    "x-bool": ((torch.ones(4, 3, dtype=torch.bool),), {}, ["x needs a floating-point dtype", "got torch.bool"]),
    "x-complex": (
        (torch.ones(4, 3, dtype=torch.complex64),),
        {},
        ["x needs a floating-point dtype", "got torch.complex64"],
    ),
    "x-sparse": ((X.to_sparse(),), {}, ["x needs a dense tensor", "torch.sparse_coo", ".to_dense()"]),
    "x-meta": ((torch.ones(4, 3, device="meta"),), {}, ["x is on the meta device"]),
    "x-scalar": ((torch.tensor(1.0),), {}, ["x needs shape (b, n, d) or (n, d)", "got ()"]),
    "x-vector": ((torch.ones(4),), {}, ["x needs shape (b, n, d) or (n, d)", "got (4,)"]),
    "x-conv-filter": ((torch.ones(4, 3, 3, 3),), {}, ["x needs shape", "got (4, 3, 3, 3)"]),
    "y-list": ((X, [1.0]), {}, ["y needs a torch.Tensor", "got list"]),
    "y-dtype": ((X, X.double()), {}, ["y needs the dtype and device of x", "float32", "float64"]),
    "y-length": ((X, torch.ones(4, 5)), {}, ["y needs shape (b, m, d)", "d=3", "got (1, 4, 5)"]),
    "y-items": ((X, torch.ones(2, 4, 3)), {}, ["y needs shape (b, m, d)", "b=1", "got (2, 4, 3)"]),
    "y-integer": ((X, torch.ones(4, 3, dtype=torch.int8)), {}, ["y needs a floating-point dtype", "got torch.int8"]),
    "want-unknown": ((X,), {"want": ("abs_sum", "mean")}, ["want needs names among", "abs_sum", "got 'mean'"]),
    "want-unknown-string": ((X,), {"want": "pii"}, ["want needs names among", "got 'pii'"]),
    "want-number": ((X,), {"want": [3]}, ["want needs names among", "got 3"]),
    "want-hist-without-bins": ((X,), {"want": "hist"}, ["want='hist' needs bins"]),
    "bins-negative": ((X,), {"bins": -1}, ["bins needs an integer", "got -1"]),
    "bins-float": ((X,), {"bins": 2.5}, ["bins needs an integer", "got 2.5"]),
    "bins-many": ((X,), {"bins": 65537}, ["bins needs an integer", "65536", "got 65537"]),
    "bins-text": ((X,), {"bins": "ten"}, ["bins needs an integer", "got 'ten'"]),
    "bins-true": ((X,), {"bins": True}, ["bins needs an integer", "got True"]),
    "bins-none": ((X,), {"bins": None}, ["bins needs an integer", "got None"]),
    "bins-raw": ((X,), {"bins": 4, "normalize": False}, ["bins needs normalize=True"]),
    "precision-unknown": ((X,), {"precision": "low"}, ["precision needs one of", "highest", "got 'low'"]),
    "precision-dtype": ((X,), {"precision": torch.float64}, ["precision needs one of", "got torch.float64"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_by_one_clear_sentence(backend: str, name: str) -> None:
    arguments, options, words = BAD_INPUT[name]
    with pytest.raises(InputError) as caught:
        gram_stats(*arguments, backend=backend, **options)
    assert isinstance(caught.value, ValueError)
    assert_says(caught.value, words)


@pytest.mark.parametrize("name", [name for name, case in BAD_INPUT.items() if len(case[0]) == 1])
def test_bad_input_among_many_is_refused_alike(backend: str, name: str) -> None:
    (bad,), options, words = BAD_INPUT[name]
    with pytest.raises(InputError) as caught:
        gram_stats_many([X, bad], backend=backend, **options)
    assert_says(caught.value, words)


@pytest.mark.parametrize("name", ["cuda", "native", "Reference", "numba_cpu "])
def test_unknown_backend_is_refused_with_those_there_are(name: str) -> None:
    for call in (lambda: gram_stats(X, backend=name), lambda: gram_stats_many([X], backend=name)):
        with pytest.raises(BackendError) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)
        assert_says(caught.value, ["backend needs one of", "reference", f"got {name!r}"])


def assert_says(error: OrthofastError, words: list[str]) -> None:
    sentence = str(error)
    place = 0
    for word in words:
        place = sentence.find(word, place)
        assert place >= 0, f"{word!r} is missing, or out of order, in: {sentence}"
    assert "\n" not in sentence
    assert len(sentence) < 200

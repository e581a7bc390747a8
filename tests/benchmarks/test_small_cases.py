"""The small cases under pytest-benchmark (switch on with `--benchmark-enable`): values are checked, times never."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case, draw
from benchmarks.gate import expected_pii, relative_error, tolerance
from benchmarks.peers import backend_refuses, naive
from orthofast.kernels import dispatch, gram_stats, gram_stats_many

BACKENDS = dispatch.ORDER["cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(64, 576), (512, 512)], ids=["64x576", "512x512"])
@pytest.mark.parametrize("contestant", [*BACKENDS, "naive"])
def test_one_matrix(benchmark, contestant, n, d, dtype):
    vectors = draw(Case(n, d, dtype), 0)
    if contestant == "naive":
        value, limit = float(benchmark(naive, vectors)), 5e-2
    else:
        reason = backend_refuses(contestant, vectors)
        if reason is not None:
            pytest.skip(reason)
        record = benchmark(gram_stats, vectors, backend=contestant)
        value, limit = float(record.abs_sum / record.pairs), tolerance(n, exact=True)
    assert relative_error(value, expected_pii(vectors)) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_matrices_in_one_call(benchmark, backend):
    sets = [draw(Case(64, 96 + seed, "float32"), seed) for seed in range(40)]
    reason = backend_refuses(backend, sets[0])
    if reason is not None:
        pytest.skip(reason)
    records = benchmark(gram_stats_many, sets, backend=backend)
    assert len(records) == len(sets)
    for record, vectors in zip(records, sets, strict=True):
        value = float(record.abs_sum / record.pairs)
        assert relative_error(value, expected_pii(vectors)) <= tolerance(64, exact=True)

"""Conformal drift against float64 loops over pairs, its exact cases, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import orthofast
from orthofast.errors import BackendError, InputError
from orthofast.kernels.drift import drift_stats
from orthofast.metrics import conformal_drift, pii
from tests import oracle
from tests.conftest import skip_or_fail
from tests.tolerance import FLOOR

Drift = Callable[..., Any]


@pytest.fixture
def drift(backend: str) -> Drift:
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return conformal_drift(*arguments, backend=backend, **options)
        except BackendError as refusal:
            return skip_or_fail(backend, str(refusal))

    return call


def truth(before: Tensor, after: Tensor) -> tuple[float, float, int]:
    """Means over the pairs that exist in both versions, and how many there are, in float64."""
    versions = [x.to(torch.float64).numpy() for x in (before, after)]
    kept = ~(oracle.is_zero(versions[0]) | oracle.is_zero(versions[1]))
    units = [oracle.units(x[kept]) for x in versions]
    above = np.triu_indices(int(kept.sum()), 1)
    old, new = ((u @ u.T)[above] for u in units)
    if len(old) == 0:
        return math.nan, math.nan, 0
    return float(np.mean(np.abs(np.abs(old) - np.abs(new)))), float(np.mean(np.abs(old - new))), len(old)


def plain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The naive expression in the dtype products are made in: the rival whose error is doubled."""
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    index = torch.triu_indices(len(before), len(before), 1)
    old, new = (
        (u @ u.T)[index[0], index[1]] for u in (torch.nn.functional.normalize(x.to(wide)) for x in (before, after))
    )
    return (old.abs() - new.abs()).abs().mean().item(), (old - new).abs().mean().item()


SHAPES = {"tile": (40, 24), "blocks": (700, 40), "tall": (300, 7), "wide": (9, 1500), "pair": (2, 3)}
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float8": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "mixed": (torch.bfloat16, torch.float32),
    "mixed64": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
def test_it_is_the_mean_over_pairs(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], drift: Drift
) -> None:
    before = torch.randn(shape)
    after = (before + 0.3 * torch.randn(shape)).to(dtypes[1])
    before = before.to(dtypes[0])
    found = drift(before, after)
    absolute, signed, _ = truth(before, after)
    rival = plain(before, after)
    floor = FLOOR[torch.float64 if torch.float64 in dtypes else torch.float32]
    for got, true, other in zip(found, (absolute, signed), rival, strict=True):
        assert got.dtype == torch.float64
        assert got.shape == ()
        assert abs(got.item() - true) <= 2 * abs(other - true) + floor


def test_a_small_drift_is_resolved(drift: Drift) -> None:
    before = torch.randn(200, 100, dtype=torch.float64)
    after = before + 1e-4 * torch.randn(200, 100, dtype=torch.float64)
    before, after = before.float(), after.float()
    absolute, signed, _ = truth(before, after)
    found = drift(before, after)
    assert absolute < 2e-5
    assert found.absolute.item() == pytest.approx(absolute, rel=2e-3)
    assert found.signed.item() == pytest.approx(signed, rel=2e-3)


def test_what_leaves_every_angle_as_it_was_has_no_drift(drift: Drift) -> None:
    before = torch.randn(30, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    lengths = torch.rand(30, 1, dtype=torch.float64) + 0.5
    for after in (before, 3 * before, lengths * before, before @ rotation):
        found = drift(before, after)
        assert found.absolute.item() < 1e-15
        assert found.signed.item() < 1e-15


def test_turning_vectors_round_changes_signed_drift_alone(drift: Drift) -> None:
    before = torch.randn(20, 8, dtype=torch.float64)
    after = before.clone()
    after[0] = -after[0]
    found = drift(before, after)
    expected = 2 * oracle.gram_stats(before.numpy()).row_abs[0] / 190
    assert found.absolute.item() < 1e-15
    assert found.signed.item() == pytest.approx(expected, rel=1e-12)


def test_the_extremes_are_reached(drift: Drift) -> None:
    parallel = torch.ones(2, 2)
    assert [v.item() for v in drift(torch.eye(2), parallel)] == pytest.approx([1, 1], abs=1e-7)
    assert [v.item() for v in drift(parallel, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))] == pytest.approx(
        [0, 2], abs=1e-6
    )


def test_translation_turns_angles_about_the_origin(drift: Drift) -> None:
    moved = torch.eye(2) + 1  # cos 0 becomes 0.8
    assert drift(torch.eye(2), moved).absolute.item() == pytest.approx(0.8, abs=1e-7)


def test_it_bounds_the_difference_of_two_pii_values(drift: Drift) -> None:
    before, after = torch.randn(60, 10), torch.randn(60, 10)
    found = drift(before, after)
    difference = abs(pii(before) - pii(after)).item()
    assert difference < 0.2 * found.absolute.item()  # opposite changes cancel in the means
    assert found.absolute <= found.signed
    assert [v.item() for v in drift(after, before)] == pytest.approx([v.item() for v in found], rel=1e-6)


def test_zero_vectors_of_either_version_are_in_no_pair(drift: Drift) -> None:
    before, after = torch.randn(30, 6), torch.randn(30, 6)
    before[3] = 0
    after[7] = 0
    after[3] = 0
    absolute, signed, pairs = truth(before, after)
    found = drift(before, after)
    assert pairs == 28 * 27 // 2
    assert found.absolute.item() == pytest.approx(absolute, rel=1e-6)
    assert found.signed.item() == pytest.approx(signed, rel=1e-6)
    stats = drift_stats(before, after)
    assert (stats.pairs.item(), stats.zero.item(), stats.nonfinite.item()) == (378, 2, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("version", [0, 1])
def test_nan_in_either_version_is_nan(value: float, version: int, drift: Drift) -> None:
    weights = [torch.randn(10, 5), torch.randn(10, 5)]
    weights[version][4, 2] = value
    assert all(part.isnan() for part in drift(*weights))
    assert drift_stats(*weights).nonfinite.item() == 1


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (5, 0)], ids=str)
def test_fewer_than_two_vectors_are_nan(shape: tuple[int, int], drift: Drift) -> None:
    assert all(part.isnan() for part in drift(torch.ones(shape), torch.ones(shape)))


def test_vectors_of_any_length_keep_their_angles(drift: Drift) -> None:
    before, after = torch.randn(12, 9), torch.randn(12, 9)
    plainly = drift(before, after)
    for scale in (2.0**-120, 2.0**110):
        assert [v.item() for v in drift(before * scale, after)] == pytest.approx([v.item() for v in plainly], rel=1e-6)


def test_vectors_and_heads_mean_what_they_mean_for_pii(drift: Drift) -> None:
    before, after = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    heads = drift(before, after, vectors="heads", heads=2)
    assert heads.absolute.shape == heads.signed.shape == (2,)
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        assert heads.absolute[head].item() == pytest.approx(truth(before[rows], after[rows])[0], rel=1e-12)
    columns = drift(before, after, vectors="cols")
    assert columns.signed.item() == pytest.approx(truth(before.T, after.T)[1], rel=1e-12)
    kernels = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    assert drift(*kernels, vectors="filters").absolute == drift(*(k.flatten(1) for k in kernels)).absolute


def test_strided_and_numpy_weights_and_those_that_require_gradients(drift: Drift) -> None:
    before, after = torch.randn(16, 20), torch.randn(16, 20)
    expected = drift(before, after)
    strided = drift(before.T.contiguous().T, torch.stack((after, after), 2)[:, :, 1])
    assert [v.item() for v in strided] == pytest.approx([v.item() for v in expected], rel=1e-6)
    assert torch.equal(drift(before.numpy(), after.numpy()).signed, expected.signed)
    tracked = drift(before.clone().requires_grad_(), after)
    assert not tracked.absolute.requires_grad
    assert torch.equal(tracked.absolute, expected.absolute)


def test_the_bits_are_the_same_for_any_number_of_threads_and_under_autocast(drift: Drift) -> None:
    before, after = torch.randn(600, 70), torch.randn(600, 70)
    expected = drift(before, after)
    torch.set_num_threads(1)
    assert torch.equal(drift(before, after).absolute, expected.absolute)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(drift(before, after).signed, expected.signed)


def test_precision_float64_is_obeyed_for_float32_weights(drift: Drift) -> None:
    before = torch.randn(50, 30)
    after = before + 1e-6 * torch.randn(50, 30)
    absolute, signed, _ = truth(before, after)
    found = drift(before, after, precision="float64")
    assert found.absolute.item() == pytest.approx(absolute, rel=1e-8)
    assert found.signed.item() == pytest.approx(signed, rel=1e-8)


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), {}, r"after needs the shape of before, got \(3, 4\) against \(3, 2\)"),
        (torch.ones(3, 2), torch.ones(4, 2), {}, "after needs the shape of before"),
        (torch.ones(4, 2, 3), torch.ones(4, 6), {}, None),
        (torch.ones(3), torch.ones(3), {}, "weight needs at least 2 dimensions"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2), {}, "floating-point"),
        (torch.ones(3, 2), torch.ones(3, 2), {"vectors": "diagonal"}, "vectors needs one of"),
        (torch.ones(4, 2), torch.ones(4, 2), {"vectors": "heads"}, "needs heads"),
        (torch.ones(3, 2), torch.ones(3, 2), {"precision": "low"}, "precision needs one of"),
    ],
    ids=["length", "count", "same_vectors", "vector", "integers", "vectors", "heads", "precision"],
)
def test_bad_input_is_one_sentence(before: Tensor, after: Tensor, options: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert conformal_drift(before, after, **options).signed == 0
        return
    with pytest.raises(InputError, match=message):
        conformal_drift(before, after, **options)


def test_versions_on_two_devices_are_refused() -> None:
    with pytest.raises(InputError, match="meta device"):
        conformal_drift(torch.ones(3, 2), torch.ones(3, 2, device="meta"))


def test_a_backend_of_that_name_must_exist() -> None:
    with pytest.raises(BackendError, match="backend needs one of"):
        conformal_drift(torch.ones(3, 2), torch.ones(3, 2), backend="abacus")


def test_it_stands_in_the_facade() -> None:
    assert orthofast.conformal_drift is conformal_drift

"""The Gluon kernel's source, run by a model of the machine: right sums, no deadlock, no operand lost."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orthofast.kernels.schedule import Problem, work_list
from tests import oracle
from tests.triton.gluon_machine import DeadlockError, Descriptor, Machine, Pointer

kernels = pytest.importorskip("orthofast.kernels.gluon_kernels", exc_type=ImportError)

SMALL = {"HALF_ROWS": 4, "COLUMNS": 16, "K": 4}  # the kernel's sizes by 16; the ring stays as it is
BLOCK = (8, 16)


def folded(
    x: NDArray[np.float64],
    *,
    rows: bool = True,
    programs: int = 1,
    seed: int = 0,
    source: Any = kernels,
    **constants: Any,
) -> NDArray[np.float64]:
    """Sum of |cos| per item of (b, n, d), as the partials of the kernel give it."""
    b, n, d = x.shape
    constants = {**SMALL, **constants}
    half, columns, k = constants["HALF_ROWS"], constants["COLUMNS"], constants["K"]
    made = work_list((Problem(n, d, items=b),), *BLOCK)
    lengths = np.linalg.norm(x, axis=2)
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0).astype(np.float32)
    stored = (x if rows else x.transpose(0, 2, 1)).astype(np.float32)
    stored = stored.reshape(-1, stored.shape[2])
    blocks = ([half, k], [columns, k]) if rows else ([k, half], [k, columns])
    partials = np.full(2 * len(made), np.nan, np.float32)
    for program in range(programs):
        machine = Machine(source, constants, seed * programs + program, program, programs)
        machine.run(
            *(Descriptor(stored, block) for block in blocks),
            Pointer(made.entries.ravel()),
            Pointer(inverse.ravel()),
            Pointer(partials),
            len(made),
            n,
            d,
            ALONG_ROWS=rows,
        )
    per_entry = partials.astype(np.float64).reshape(-1, 2).sum(1)
    return np.array([per_entry[f : f + c].sum() for f, c in zip(made.first, made.count, strict=True)])


def vectors(b: int, n: int, d: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(b, n, d)).astype(np.float32).astype(np.float64)


def truth(x: NDArray[np.float64]) -> list[float]:
    return [oracle.gram_stats(item).abs_sum for item in x]


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 15, 16, 17, 33, 40])
def test_every_pair_is_summed_once_at_every_edge(n: int, rows: bool) -> None:
    x = vectors(1, n, 11, n)
    np.testing.assert_allclose(folded(x, rows=rows, seed=n), truth(x), rtol=1e-6)


@pytest.mark.parametrize("d", [1, 3, 4, 5, 12, 16, 17, 20, 36])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_any_number_of_steps_and_programs(d: int, programs: int) -> None:
    x = vectors(1, 40, d, d)
    np.testing.assert_allclose(folded(x, programs=programs, seed=d), truth(x), rtol=1e-6)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "cols"])
def test_items_one_after_another_do_not_mix(rows: bool) -> None:
    x = vectors(3, 19, 8)
    x[1] *= 1000
    np.testing.assert_allclose(folded(x, rows=rows, programs=2), truth(x), rtol=1e-6)


def test_a_nan_stays_with_its_item() -> None:
    x = vectors(3, 19, 8)
    x[1, 0] = np.nan
    got = folded(x)
    assert np.isnan(got).tolist() == [False, True, False]
    np.testing.assert_allclose(got[[0, 2]], np.array(truth(x))[[0, 2]], rtol=1e-6)


def test_zero_vectors_add_nothing() -> None:
    x = vectors(1, 21, 8)
    x[0, [0, 7, 20]] = 0
    np.testing.assert_allclose(folded(x), truth(x), rtol=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_random_orders_give_the_same_bits(seed: int) -> None:
    x = vectors(1, 33, 30)
    assert folded(x, seed=seed).tobytes() == folded(x, seed=1000).tobytes()


@pytest.mark.parametrize("stages", [2, 8])
def test_other_rings_work_too(stages: int) -> None:
    x = vectors(1, 33, 30)
    got = folded(x, RING=stages, RING_BITS=stages.bit_length() - 1)
    np.testing.assert_allclose(got, truth(x), rtol=1e-6)


BROKEN = {
    "the producer does not wait": ("mbarrier.wait(empty.index(stage), ((step >> RING_BITS) & 1) ^ 1)", "pass"),
    "the producer's parity is turned": ("((step >> RING_BITS) & 1) ^ 1)", "(step >> RING_BITS) & 1)"),
    "a consumer does not wait": ("mbarrier.wait(full.index(stage), (step >> RING_BITS) & 1)", "pass"),
    "a stage is given back while it is read": (
        "mbarrier.arrive(empty.index((step - 1) & (RING - 1)), pred=k > 0)",
        "mbarrier.arrive(empty.index(step & (RING - 1)), pred=k > 0)",
    ),
    "the last stage is never given back": (
        "        mbarrier.arrive(empty.index((step - 1) & (RING - 1)))\n",
        "",
    ),
    "one arrival too few is counted": ("count=CONSUMERS", "count=1"),
    "too few bytes are announced": ("(CONSUMERS * HALF_ROWS + COLUMNS) * K * 2", "HALF_ROWS * K * 2"),
    "the product is not awaited": ("warpgroup_mma_wait(0, deps=[acc])", "acc"),
    "the diagonal is counted": ("gl.expand_dims(columns, 0) > gl", "gl.expand_dims(columns, 0) >= gl"),
    "the next item's columns are counted": ("above & gl.expand_dims(columns < n, 0)", "above"),
    "the masked branch is entered too rarely": ("(row + HALF_ROWS > column) | ", ""),
    "both halves are the upper one": ("row + PART * HALF_ROWS", "row"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_noticed(fault: str, tmp_path: Any) -> None:
    """The model is worth something: each of these faults ends in a wrong sum or a deadlock."""
    source = altered(*BROKEN[fault], tmp_path)
    noticed = 0
    for seed in range(6):
        x = vectors(2, 35, 30, seed)
        x[1, 0] = np.nan  # right behind item 0
        try:
            good = np.allclose(folded(x, seed=seed, source=source)[0], truth(x)[0], rtol=1e-6)
        except (DeadlockError, AssertionError):
            good = False
        noticed += not good
    assert noticed > 0


def altered(old: str, new: str, folder: Any) -> Any:
    """The kernels' module with one place changed."""
    text = inspect.getsource(kernels)
    assert text.count(old) == 1, f"the kernel no longer says {old!r}"
    path = folder / "altered_gluon_kernels.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("altered_gluon_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

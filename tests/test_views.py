"""A weight as vectors: shapes, shared memory, arrays of every kind, and one sentence for what cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from orthofast.errors import InputError
from orthofast.views import VECTORS, BlockScaled, as_tensor, as_vectors, dense_vectors

MATRIX = torch.arange(12.0).reshape(4, 3)
CONV1D, CONV2D, CONV3D = (torch.randn(6, 4, *kernel) for kernel in ((5,), (3, 2), (3, 4, 5)))


@pytest.mark.parametrize(
    ("weight", "vectors", "expected"),
    [
        (MATRIX, "rows", MATRIX),
        (MATRIX, "filters", MATRIX),
        (MATRIX, "cols", MATRIX.T),
        (CONV2D, "rows", CONV2D.reshape(6, 24)),
        (CONV2D, "filters", CONV2D.reshape(6, 24)),
        (CONV2D, "cols", CONV2D.transpose(0, 1).reshape(4, 36)),
        (CONV1D, "rows", CONV1D.reshape(6, 20)),
        (CONV3D, "cols", CONV3D.transpose(0, 1).reshape(4, 360)),
        (CONV1D, "center_tap", CONV1D[:, :, 2].T),
        (CONV2D, "center_tap", CONV2D[:, :, 1, 1].T),
        (CONV3D, "center_tap", CONV3D[:, :, 1, 2, 2].T),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.shape)),
)
def test_vectors_are_these_slices(weight: torch.Tensor, vectors: str, expected: torch.Tensor) -> None:
    assert torch.equal(as_vectors(weight, vectors), expected.unsqueeze(0))


def test_heads_are_equal_blocks_of_rows() -> None:
    got = as_vectors(MATRIX, "heads", heads=2)
    assert torch.equal(got, torch.stack([MATRIX[:2], MATRIX[2:]]))
    assert torch.equal(as_vectors(CONV2D, "heads", heads=3)[1], CONV2D[2:4].reshape(2, 24))
    assert as_vectors(torch.zeros(0, 5), "heads", heads=3).shape == (3, 0, 5)
    assert as_vectors(torch.zeros(4, 0), "heads", heads=2).shape == (2, 2, 0)


STRIDED = torch.randn(40, 50)


@pytest.mark.parametrize(
    ("weight", "vectors", "heads"),
    [
        (STRIDED, "rows", None),
        (STRIDED, "cols", None),
        (STRIDED, "heads", 4),
        (STRIDED.T, "rows", None),
        (STRIDED.T, "heads", 5),
        (STRIDED[::2, 3:40:3], "rows", None),
        (STRIDED[::2, 3:40:3], "cols", None),
        (STRIDED[::2, 3:40:3], "heads", 10),
        (STRIDED[:1].expand(6, 50), "rows", None),
        (CONV2D, "rows", None),
        (CONV2D, "heads", 2),
        (CONV2D, "center_tap", None),
        (torch.randn(6, 4, 1, 1), "cols", None),
    ],
)
def test_memory_is_shared_where_strides_can_say_it(weight: torch.Tensor, vectors: str, heads: int | None) -> None:
    got = as_vectors(weight, vectors, heads)
    assert got.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_every_float_dtype_passes_unchanged() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        weight = torch.ones(4, 2).to(dtype)
        for vectors in ("rows", "cols"):
            assert as_vectors(weight, vectors).dtype == dtype


def test_a_parameter_keeps_its_graph() -> None:
    parameter = torch.nn.Linear(3, 2).weight
    assert as_vectors(parameter).requires_grad


def test_a_negated_view_shows_its_values() -> None:
    conjugate = torch.view_as_complex(torch.randn(3, 4, 2)).conj()
    imaginary = conjugate.imag
    assert imaginary.is_neg()
    got = as_vectors(imaginary)
    assert not got.is_neg()
    assert torch.equal(got[0], imaginary)


ARRAY = np.random.default_rng(0).standard_normal((6, 8))


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


def _unaligned() -> np.ndarray[Any, Any]:
    packed = np.zeros((6, 8), dtype=[("flag", "i1"), ("value", "f4")])
    packed["value"] = ARRAY
    return packed["value"]


ARRAYS: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
    "plain": lambda: ARRAY,
    "float32": lambda: ARRAY.astype(np.float32),
    "float16": lambda: ARRAY.astype(np.float16),
    "read-only": lambda: _read_only(ARRAY),
    "fortran": lambda: np.asfortranarray(ARRAY),
    "transposed-read-only": lambda: _read_only(ARRAY).T,
    "strided": lambda: ARRAY[::2, 1::3],
    "rows-backwards": lambda: ARRAY[::-1],
    "both-backwards-read-only": lambda: _read_only(ARRAY)[::-1, ::-2],
    "big-endian": lambda: ARRAY.astype(">f4"),
    "little-endian": lambda: ARRAY.astype("<f8"),
    "swapped-backwards": lambda: ARRAY.astype(">f4")[::-1, ::-1],
    "swapped-read-only": lambda: _read_only(ARRAY.astype(">f8")),
    "broadcast": lambda: np.broadcast_to(ARRAY[0], (6, 8)),
    "field-of-a-record": _unaligned,
    "one-row-backwards": lambda: ARRAY[:1][::-1],
    "empty": lambda: np.zeros((0, 8)),
    "subclass": lambda: ARRAY.view(np.matrix),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_give_their_values_without_a_warning(kind: str) -> None:
    array = ARRAYS[kind]()
    before, writeable = array.copy(), array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = as_vectors(array)
    assert got.dtype == {2: torch.float16, 4: torch.float32, 8: torch.float64}[array.itemsize]
    np.testing.assert_array_equal(got[0].numpy(), before)
    assert array.flags.writeable == writeable


@pytest.mark.parametrize("kind", ["plain", "read-only", "fortran", "transposed-read-only", "strided", "broadcast"])
def test_arrays_share_memory(kind: str) -> None:
    array = ARRAYS[kind]()
    assert as_vectors(array).data_ptr() == array.__array_interface__["data"][0]


def test_the_memory_of_a_read_only_array_outlives_the_array() -> None:
    def make() -> torch.Tensor:
        array = _read_only(ARRAY)
        return as_tensor(array)

    tensor = make()
    other = [np.full((6, 8), 9.0) for _ in range(20)]
    np.testing.assert_array_equal(tensor.numpy(), ARRAY)
    assert len(other) == 20


def test_a_mapped_file_is_read_in_place(tmp_path: Any) -> None:
    np.save(tmp_path / "weight.npy", ARRAY)
    mapped = np.load(tmp_path / "weight.npy", mmap_mode="r")
    got = as_vectors(mapped, "cols")
    assert got.data_ptr() == mapped.__array_interface__["data"][0]
    np.testing.assert_array_equal(got[0].numpy(), ARRAY.T)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [[1.0, 2.0]], r"needs a torch.Tensor or a numpy array, got list; build one with torch.tensor"),
    "tuple of tensors": (lambda: (MATRIX, MATRIX), "got tuple; .* call once for each matrix"),
    "module": (lambda: torch.nn.Linear(2, 2), r"got Linear; pass its \.weight"),
    "number": (lambda: 3.0, "got float; wrap it with torch.as_tensor"),
    "none": (lambda: None, "got NoneType"),
    "string": (lambda: "weight", "got str"),
    "numpy scalar": (lambda: np.float32(1), "got float32"),
    "scalar tensor": (lambda: torch.tensor(1.0), r"at least 2 dimensions, .* got shape \(\); a bias"),
    "vector": (lambda: torch.ones(5), r"at least 2 dimensions, .* got shape \(5,\); a bias"),
    "array of one dimension": (lambda: np.ones(5), r"got shape \(5,\)"),
    "integer": (lambda: torch.ones(2, 2, dtype=torch.int8), r"got torch.int8; convert it with \.to\(torch.float32\)"),
    "bool": (lambda: torch.ones(2, 2, dtype=torch.bool), r"got torch.bool; convert it"),
    "complex": (lambda: torch.ones(2, 2, dtype=torch.complex64), r"got torch.complex64; take \.real, \.imag or \.abs"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"got layout torch.sparse_coo; call \.to_dense"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        r"got quantised torch.qint8; call \.dequantize",
    ),
    "meta": (lambda: torch.ones(2, 2, device="meta"), "on the meta device and holds no values; load or initialise"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "lazy parameter without a shape; run the module once"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
        r"nested tensor; call once for each of its \.unbind",
    ),
    "integer array": (lambda: np.ones((2, 2), int), r"got int64; convert it with \.astype\('float32'\)"),
    "bool array": (lambda: np.ones((2, 2), bool), "got bool"),
    "complex array": (lambda: np.ones((2, 2), complex), "got complex128"),
    "long double array": (
        lambda: np.ones((2, 2), np.longdouble),
        "needs a numpy dtype among float16, float32, float64",
    ),
    "object array": (lambda: np.array([[None, 1.0]], object), "got object"),
    "record array": (lambda: np.zeros((2, 2), dtype=[("x", "f4")]), "needs a numpy dtype among"),
    "masked array": (lambda: np.ma.masked_less(ARRAY, 0), r"got a masked array; fill it with \.filled\(0\)"),
}


@pytest.mark.filterwarnings("ignore")  # torch announces some of these kinds as prototypes
@pytest.mark.parametrize("kind", REFUSED)
def test_a_weight_that_cannot_be_used_is_refused_with_the_remedy(kind: str) -> None:
    make, sentence = REFUSED[kind]
    weight = make()
    with pytest.raises(InputError, match=f"^weight .*{sentence}"):
        as_vectors(weight)


@pytest.mark.parametrize("vectors", ["row", "ROWS", "", None, 0, ("rows",)], ids=repr)
def test_unknown_vectors_are_refused_with_the_list(vectors: Any) -> None:
    with pytest.raises(InputError, match=f"^vectors needs one of {', '.join(VECTORS)}, got "):
        as_vectors(MATRIX, vectors)


@pytest.mark.parametrize(
    ("vectors", "heads", "sentence"),
    [
        ("heads", None, "vectors='heads' needs heads, the number of equal blocks of rows; pass heads="),
        ("heads", 2.0, "heads needs a positive integer, got 2.0"),
        ("heads", True, "heads needs a positive integer, got True"),
        ("heads", 0, "heads needs a positive integer, got 0"),
        ("heads", -2, "heads needs a positive integer, got -2"),
        ("heads", 3, "heads needs a divisor of the 4 rows, got 3"),
        ("heads", 8, "heads needs a divisor of the 4 rows, got 8"),
        ("rows", 2, "heads=2 needs vectors='heads', got vectors='rows'; change one of them"),
    ],
    ids=str,
)
def test_wrong_heads_are_refused(vectors: str, heads: Any, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        as_vectors(MATRIX, vectors, heads)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 0), (4, 3, 1, 1, 1, 1)], ids=str)
def test_a_central_tap_needs_a_kernel(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^vectors='center_tap' needs a convolution weight .* use vectors='rows'"):
        as_vectors(torch.zeros(shape), "center_tap")


def test_the_error_names_the_argument_it_is_told_of() -> None:
    with pytest.raises(InputError, match=r"^x needs a torch.Tensor"):
        as_tensor([1.0], "x")  # type: ignore[arg-type]


E4M3 = torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn)
FACTORS = torch.tensor([[2.0, 10.0]])


def test_a_block_scaled_matrix_is_its_values_times_the_factor_of_their_block() -> None:
    weight = BlockScaled(E4M3, FACTORS, (4, 2))
    expected = torch.tensor([[0.0, 2.0, 20.0], [6.0, 8.0, 50.0]])
    assert torch.equal(weight.dequantized(), expected)
    assert torch.equal(weight.dequantized(slice(1, 9)), expected[1:])
    assert weight.dequantized(slice(1, 1)).shape == (0, 3)
    assert weight.dequantized(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="step 1"):
        weight.dequantized(slice(0, 2, 2))


def test_block_scaled_vectors_share_memory_and_turn_with_their_factors() -> None:
    weight = BlockScaled(E4M3, FACTORS, (4, 2))
    rows, cols = as_vectors(weight), as_vectors(weight, "cols")
    assert isinstance(rows, BlockScaled)
    assert isinstance(cols, BlockScaled)
    assert rows.data.data_ptr() == cols.data.data_ptr() == E4M3.data_ptr()
    assert cols.block == (2, 4)
    assert torch.equal(cols.dequantized()[0], weight.dequantized().T)
    assert torch.equal(dense_vectors(weight, "cols")[0], weight.dequantized().T)
    assert torch.equal(dense_vectors(MATRIX, "cols"), as_vectors(MATRIX, "cols"))


def test_block_scaled_heads_are_whole_blocks_of_rows() -> None:
    data = torch.arange(24.0).reshape(8, 3).to(torch.float8_e4m3fn)
    weight = BlockScaled(data, torch.rand(4, 1), (2, 128))
    heads = as_vectors(weight, "heads", heads=2)
    assert isinstance(heads, BlockScaled)
    assert torch.equal(heads.dequantized(), weight.dequantized().view(2, 4, 3))
    with pytest.raises(InputError, match="whole blocks of 2 rows per head, got 8 heads of 1 rows"):
        as_vectors(weight, "heads", heads=8)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((MATRIX, FACTORS), "float8"),
        ((E4M3, [[1.0]]), "scale needs a torch.Tensor"),
        ((E4M3, FACTORS), r"needs shape \(1, 1\)"),
        ((E4M3.view(1, 2, 3), FACTORS, (4, 2)), r"needs shape \(1, 1, 2\)"),
        ((E4M3[0], FACTORS), r"needs shape \(n, d\)"),
        ((E4M3, FACTORS, (4, 0)), "two positive integers"),
        ((E4M3, FACTORS, 128), "two positive integers"),
        ((E4M3, FACTORS.int(), (4, 2)), "floating-point"),
        ((E4M3, FACTORS.to("meta"), (4, 2)), "device"),
    ],
)
def test_block_scaled_parts_that_do_not_fit_get_a_sentence(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(InputError, match=word):
        BlockScaled(*arguments)


def test_a_block_scaled_matrix_where_a_tensor_is_needed_gets_a_sentence() -> None:
    weight = BlockScaled(E4M3, FACTORS, (4, 2))
    for call in (lambda: as_tensor(weight), lambda: as_vectors(weight, "center_tap"), lambda: weight.transpose(0, 0)):
        with pytest.raises(InputError, match="block-scaled"):
            call()
    with pytest.raises(InputError, match="call once for each item"):
        as_vectors(BlockScaled(E4M3.view(1, 2, 3), FACTORS.view(1, 1, 2), (4, 2)))

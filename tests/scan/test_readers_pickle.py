"""The machine that walks pickles: plain data comes out as Python's own, and no opcode leads to code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthofast.errors import CheckpointError
from orthofast.scan.readers.checkpoint import open_checkpoint
from orthofast.scan.readers.pickle_walk import Global, Made, walk
from tests.scan.attacks import PICKLES, with_pickle

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


def walked(content: bytes, allowed: frozenset[str] = frozenset()) -> object:
    return walk(content, "it", refuse=lambda path: None if path in allowed else f"asks for {path}", build={})


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]))
def test_plain_data_is_what_python_reads(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    again = walked(content)
    expected = pickle.loads(content)
    if "\\ud" not in ascii(value):  # halves of surrogate pairs come as escapes
        assert again == expected


def test_shared_objects_stay_shared_and_memo_numbers_are_kept() -> None:
    shared: list[int] = [1]
    again = walked(pickle.dumps([shared, shared]))
    assert isinstance(again, list)
    assert again[0] is again[1]
    numbered = b"\x80\x02]q\x07(K\x05q\x03K\x06q\x09h\x03h\x09e."
    assert walked(numbered) == pickle.loads(numbered) == [5, 6, 5, 6]


def test_globals_and_calls_stay_records() -> None:
    content = b"\x80\x02cos\nsystem\nU\x04echo\x85R}U\x01aK\x01sb."
    made = walked(content, frozenset(["os.system"]))
    assert isinstance(made, Made)
    assert (made.path, made.args, made.state) == ("os.system", (b"echo",), {b"a": 1})
    assert walked(b"\x80\x02cos\nsystem\n.", frozenset(["os.system"])) == Global("os.system")


@pytest.mark.parametrize(("data", "word"), PICKLES.values(), ids=PICKLES.keys())
def test_a_hostile_pickle_is_one_sentence(data: bytes, word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        open_checkpoint(with_pickle(tmp_path / "hostile.pt", data))
    assert "hostile.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_an_object_or_a_sentence(content: bytes) -> None:
    refusal = ""
    try:
        walked(b"\x80\x02" + content + b".")
    except CheckpointError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith("it ")

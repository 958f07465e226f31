"""plain_pickle: equal to Python's pickle on plain data; everything else is refused."""

import builtins
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_data.plain_pickle import loads

text = st.text(max_size=300)
number = st.integers(-(2**31), 2**31 - 1)
plain = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
arrays = st.tuples(st.integers(1, 5), st.integers(1, 7), st.booleans()).map(
    lambda a: np.asarray(np.arange(a[0] * a[1], dtype=np.uint8).reshape(a[0], a[1]), order="F" if a[2] else "C")
)
BATCH = {"data": np.arange(6144, dtype=np.uint8).reshape(2, 3072), "labels": [3, 9], "filenames": ["a", "b"]}


@given(value=plain, protocol=st.sampled_from([2, 3, 4]))
def test_plain_data_is_read_as_pickle_reads_it(value, protocol):
    assert loads(pickle.dumps(value, protocol)) == value


@given(array=arrays, protocol=st.sampled_from([2, 3, 4]))
def test_arrays_are_read_as_pickle_reads_them(array, protocol):
    found = loads(pickle.dumps({"data": array}, protocol))["data"]
    assert found.dtype == np.uint8
    assert np.array_equal(found, array)


def python2_batch(data: bytes) -> bytes:
    """A batch with the operations of the published files: Python 2's strings, protocol 2."""
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03U\x01b\x87Rq\x04"
    dtype = b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K\x02M\x00\x0c\x86" + dtype + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    return b"\x80\x02}q\x07(U\x04data" + array + state + b"U\x06labels](K\x03K\x09eu."


def test_python2_strings_and_arrays():
    data = bytes(range(256)) * 24
    ours, theirs = loads(python2_batch(data)), pickle.loads(python2_batch(data), encoding="bytes")  # noqa: S301  our own
    assert ours[b"labels"] == theirs[b"labels"] == [3, 9]
    assert np.array_equal(ours[b"data"], theirs[b"data"])
    assert ours[b"data"].tobytes() == data


class Calls:
    """Pickles to a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


HOSTILE = {
    "os.system": Calls(os.system, "touch HERE"),
    "eval": Calls(eval, "open('HERE', 'w')"),
    "exec": Calls(exec, "open('HERE', 'w')"),
    "open": Calls(open, "HERE", "w"),
    "getattr": Calls(builtins.getattr, "text", "upper"),
    "numpy.load": Calls(np.fromfile, "HERE"),
    "object array": np.array([Calls(os.system, "touch HERE")], dtype=object),
    "float array": np.zeros(3),
    "structured array": np.zeros(3, "u1,u1"),
    "memoryview": Calls(bytearray, 1 << 40),
    "huge zeros": Calls(np.zeros, 1 << 40),
    "huge array": Calls(np.ndarray, (1 << 40,), np.dtype("u1")),
    "huge bytes": Calls(bytes, 1 << 40),
    "codec": Calls(__import__("_codecs").encode, "text", "zlib"),
    "complex": 1j,
    "set": {1, 2},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_hostile_pickles_are_refused_and_nothing_happens(tmp_path, monkeypatch, case, protocol):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({**BATCH, "labels": [HOSTILE[case]]}, protocol)
    with pytest.raises(ValueError, match="call of|operation|something other|dtype|expected|plain data"):
        loads(data)
    assert list(tmp_path.iterdir()) == []


def string(width: bytes, size: int) -> bytes:
    return width + size.to_bytes(4, "little")


def cycle_of_dicts() -> bytes:
    return b"\x80\x02}q\x00U\x01ah\x00s."


BOMBS = {
    "size of a string": b"\x80\x02" + string(b"T", 2**32 - 1) + b"abc.",
    "size of a text": b"\x80\x02" + string(b"X", 2**32 - 1) + b"abc.",
    "size of bytes": b"\x80\x03" + string(b"B", 2**32 - 1) + b"abc.",
    "eight byte size": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.",
    "long integer": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1.",
    "array of a huge shape": python2_batch(bytes(6144)).replace(b"K\x02M\x00\x0c", b"J\xff\xff\xff\x7fM\x00\x0c"),
    "reconstruct of a huge shape": python2_batch(bytes(6144)).replace(b"K\x00\x85", b"J\xff\xff\xff\x7f\x85"),
    "no end of copies": b"\x80\x02" + string(b"X", 50_000) + b"a" * 50_000 + b"q\x00"
    + b"c_codecs\nencode\nh\x00U\x06latin1\x86R" * 10_000 + b".",
    "endless name": b"\x80\x02c" + b"a" * 1_000_000,
    "persistent id": b"\x80\x02Phello\n.",
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(ios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\no.",
    "newobj": b"\x80\x02cos\nsystem\n)\x81.",
    "nothing on the stack": b"\x80\x02.",
    "mark alone": b"\x80\x02t.",
    "missing memo": b"\x80\x02h\x07.",
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_and_nonsense_are_refused_without_the_memory_they_ask_for(case):
    data = BOMBS[case]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            loads(data)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(data) + 2_000_000
    finally:
        tracemalloc.stop()


def test_a_memo_number_costs_nothing():
    tracemalloc.start()
    try:
        assert loads(b"\x80\x02]r\xff\xff\xff\xff.") == []
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_dict_that_holds_itself_ends():
    found = loads(cycle_of_dicts())
    assert found[b"a"] is not None


@given(cut=st.integers(0, 6400), flip=st.integers(0, 6400), value=st.integers(1, 255))
@settings(max_examples=300)
def test_truncated_and_flipped_files_give_data_or_valueerror(cut, flip, value):
    whole = python2_batch(bytes(6144))
    with pytest.raises(ValueError):
        loads(whole[: cut % len(whole)])
    damaged = bytearray(whole)
    damaged[flip % len(whole)] ^= value
    try:
        loads(bytes(damaged))
    except ValueError:
        return


@given(data=st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_give_data_or_valueerror(data):
    try:
        loads(b"\x80\x02" + data + b".")
    except ValueError:
        return

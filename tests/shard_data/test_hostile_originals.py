"""IDX files, CIFAR batches and CelebA lists with any content are read correctly or refused, in bounded memory."""

import gzip
import pickle
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shard_data import Cifar10, DataError, plain_pickle
from shard_data.plain_pickle import MAX_CONTAINERS, loads
from shard_data.sources import celeba_lists
from shard_data.sources.celeba_lists import read_attributes, read_column
from shard_data.sources.mnist import IMAGES, LABELS, read_idx
from tests.helpers.mnist_files import idx

SPARE = 6_000_000
"""Bytes that a read may allocate beyond twice the file's size: files are read and hashed in chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def outcome(read, size: int, error: type = DataError, spare: int = SPARE):
    """What `read` returns, or the error's message, which must be one short line; memory is limited by `size`."""
    value, message = None, ""
    tracemalloc.start()
    try:
        value = read()
    except error as refusal:
        message = str(refusal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (value is None) == ("\n" not in message and 0 < len(message) < 1000)
    assert peak < 2 * size + spare
    return value, message


def damaged(data: bytes, edits: list[tuple[int, int]], cut: int, extra: bytes) -> bytes:
    """Bytes replaced at the (place, value) of `edits`, `cut` bytes less, `extra` at the end."""
    content = bytearray(data)
    for place, value in edits:
        content[place % len(content)] = value
    return bytes(content[: len(content) - cut]) + extra


damage = st.tuples(
    st.lists(st.tuples(st.integers(0, 40) | st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.just(0) | st.integers(0, 30),
    st.just(b"") | st.binary(max_size=30),
)
big = st.integers(0, 40) | st.integers(0, 2**32 - 1) | st.sampled_from([2**31, 2**32 - 1, 2**16])


@given(shape=st.tuples(big, big, big), pixels=st.binary(max_size=2000), zipped=st.booleans(), fits=st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_idx_header_with_any_sizes_is_read_or_refused(folder, shape, pixels, zipped, fits):
    if fits:
        shape = (len(pixels), 1, 1)
    data = struct.pack(">I3I", IMAGES, *shape) + pixels
    path = folder / ("images.gz" if zipped else "images")
    path.write_bytes(gzip.compress(data) if zipped else data)
    found, _ = outcome(lambda: read_idx(path, IMAGES, 3), len(data))
    assert (found is not None) == (shape[0] * shape[1] * shape[2] == len(pixels))
    if found is not None:
        assert found.tobytes() == pixels
        assert found.shape == shape


@given(labels=st.binary(min_size=1, max_size=300), outer=damage, inner=damage, zipped=st.booleans())
@example(labels=b"\0", outer=([(3, 32)], 0, b""), inner=([], 0, b""), zipped=True)
@settings(max_examples=150, deadline=None)
def test_a_damaged_idx_file_is_read_or_refused(folder, labels, outer, inner, zipped):
    data = damaged(idx(np.frombuffer(labels, np.uint8)), *inner)
    stored = damaged(gzip.compress(data), *outer) if zipped else data
    path = folder / ("labels.gz" if zipped else "labels")
    path.write_bytes(stored)
    found, _ = outcome(lambda: read_idx(path, LABELS, 1), len(stored) + len(data))
    if found is not None:
        if zipped and stored[3]:  # flags, of which zlib refuses some that Python's gzip ignores
            return
        whole = zlib.decompressobj(31).decompress(stored) if zipped else stored
        assert whole[:8] == struct.pack(">2I", LABELS, len(found))
        assert found.tobytes() == whole[8:]


@pytest.mark.parametrize("count", [1000, 2**22])
def test_a_gzip_bomb_is_not_unpacked(folder, count):
    """256 MB of zeros in 256 KB of gzip data, after a header of `count` labels."""
    squeeze = zlib.compressobj(9, wbits=31)
    content = squeeze.compress(struct.pack(">2I", LABELS, count))
    zeros = bytes(2**24)
    content += b"".join(squeeze.compress(zeros) for _ in range(16)) + squeeze.flush()
    path = folder / "bomb.gz"
    path.write_bytes(content)
    _, message = outcome(lambda: read_idx(path, LABELS, 1), count)
    assert "too long, more than" in message


OPERATIONS = [
    b"N", b"\x88", b"\x89", b"}", b"]", b")", b"(", b"K\x07", b"M\x07\x01", b"J\xff\xff\xff\xff", b"U\x02ab",
    b"C\x02ab",
    b"T\x03\0\0\0abc", b"X\x02\0\0\0\xc3\xa9", b"\x8c\x01a", b"q\x00", b"h\x00", b"r\xff\xff\xff\xff", b"\x94", b"\x85",
    b"\x86", b"\x87", b"t", b"a", b"e", b"s", b"u", b"R", b"b", b"\x93", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"U\x02u1K\x00K\x01\x87", b"T\xff\xff\xff\xff",
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t",
]  # fmt: skip


@given(parts=st.lists(st.sampled_from(OPERATIONS) | st.binary(max_size=3), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_operations_of_a_pickle_give_data_or_valueerror(parts):
    data = b"\x80\x02" + b"".join(parts) + b"."
    outcome(lambda: [loads(data)], 0, ValueError, spare=200_000)


REPEATED = {
    "lists on the stack": b"]" * 100_000,
    "dicts on the stack": b"}" * 100_000,
    "lists in a list": b"](" + b"]" * 100_000 + b"e",
    "tuples": b"N" + b"\x85" * 100_000,
    "lists that are dropped": b"](]e" * 30_000,
    "marks": b"(" * 300_000,
    "copies of one string": b"U\x01aq\x00" + b"h\x00" * 300_000,
    "a long string with a wide character": b"X\0\0\x40\0" + "\U0001f600".encode() + b"a" * (2**22 - 4),
}  # fmt: skip


@pytest.mark.parametrize("case", REPEATED)
def test_repeated_operations_cannot_multiply_the_size_of_a_pickle(case, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_OPERATIONS", 100_000)
    data = b"\x80\x02" + REPEATED[case] + b"."
    _, message = outcome(lambda: loads(data), len(data), ValueError, spare=1_500_000)
    assert re.search(f"{MAX_CONTAINERS:,} lists|100,000 operations|not Latin-1", message)


def write_cifar(folder: Path, batch: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, 2))
    (folder / "test_batch").write_bytes(batch)
    return folder


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
BATCH = pickle.dumps({"labels": [1, 2, 3], "data": PIXELS}, 4)


@given(damage=damage)
@settings(max_examples=100, deadline=None)
def test_a_damaged_cifar_batch_is_read_or_refused(folder, damage):
    def read():
        source = Cifar10(write_cifar(folder / "cifar", damaged(BATCH, *damage)))
        source.description()
        return [source.load(record) for record in source.records("test")]

    samples, _ = outcome(read, len(BATCH))
    if samples is not None:
        assert all(sample.image.shape == (32, 32, 3) and 0 <= sample.label < 10 for sample in samples)
        found = np.stack([sample.image.transpose(2, 0, 1).ravel() for sample in samples])
        assert (found != PIXELS).sum() <= len(damage[0])  # a byte of a pixel changes that pixel and no other


NAMES = [f"attribute_{i}" for i in range(40)]
token = st.sampled_from(
    ["1", "-1", "0", "2", "x", "", "1e9", "99999999999999999999", "000001.jpg", "\x1b[31m", "é", "\0"]
)
row = st.tuples(st.sampled_from(["000001.jpg", "000002.jpg", "000003.jpg", "../a.jpg"]), st.lists(token, max_size=3))


@given(count=st.integers(0, 3), rows=st.lists(row, max_size=4), whole=st.booleans(), csv=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_list_of_attributes_is_read_or_refused(folder, count, rows, whole, csv):
    lines = [[name, *(values if not whole else ["1", "-1"] * 20)] for name, values in rows]
    separator = "," if csv else " "
    head = [separator.join(["image_id", *NAMES])] if csv else [str(count), separator.join(NAMES)]
    path = folder / ("attributes.csv" if csv else "attributes.txt")
    path.write_bytes("\n".join([*head, *map(separator.join, lines)]).encode())
    wanted = {name for name, *_ in lines}
    table, _ = outcome(lambda: read_attributes(path, wanted), path.stat().st_size)
    if table is not None:
        assert list(table.rows) == [name for name, *_ in lines]
        assert table.values.tolist() == [[int(value == "1") for value in values] for _, *values in lines]
        assert csv or count == len(lines)


@given(content=st.binary(max_size=300) | st.lists(st.tuples(st.integers(1, 4), st.integers(-1, 4))).map(
    lambda rows: "".join(f"{name:06d}.jpg {value}\r\n" for name, value in rows).encode()))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_partition_is_read_or_refused(folder, content):
    path = folder / "partition.txt"
    path.write_bytes(content)
    table, _ = outcome(lambda: read_column(path, 2), len(content))
    if table is not None:
        pairs = [line.split() for line in content.decode().splitlines() if line.strip()]
        assert [[name, str(value)] for name, value in zip(table.rows, table.values[:, 0], strict=True)] == pairs


LISTS = {
    "one endless line": b"000001.jpg " + b"1 " * 50_000,
    "a name without end": b"0" * 100_000,
    "too many rows": b"".join(b"%d.jpg 0\n" % i for i in range(20_000)),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_would_fill_the_memory_are_refused(folder, case, monkeypatch):
    monkeypatch.setattr(celeba_lists, "MAX_ROWS", 10_000)
    path = folder / "long.txt"
    path.write_bytes(LISTS[case])
    _, message = outcome(lambda: read_column(path, 2), len(LISTS[case]), spare=3_000_000)
    assert re.search("has a line of 4096|has more than 10,000 rows", message)

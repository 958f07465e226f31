"""Index files that are not what the manifest says: refused with one line that names the file, and never half read."""

import hashlib
import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.shards import TarShards, UnreadableShard
from tests.helpers.shard_sets import (
    Samples,
    assert_unreadable,
    edit_manifest,
    flip_byte,
    random_samples,
    rewrite_index,
    set_field,
    setting,
    write_set,
)

REFUSED = r"^\S+train-000001\.index\.npy: {}, so the 8 samples of train-000001\.tar cannot be found\. Copy or make .*$"


def assert_refused(root: Path, message: str) -> None:
    """By whatever is read first."""
    shards = TarShards(root, "train")
    for read in (shards.images, shards.keys, shards.labels, shards.attributes):
        with pytest.raises(UnreadableShard, match=REFUSED.format(message)):
            read([9, 10])


def test_an_offset_at_the_wrong_place(small):
    root, _ = small
    rewrite_index(root, "train-000001", lambda index: set_field(index, 3, "offset", index["offset"][3] - 512))
    assert_unreadable(root, 13, "its header is wrong")


def test_a_size_unlike_the_others(small):
    rewrite_index(small[0], "train-000001", lambda index: set_field(index, 3, "size", 100))
    assert_unreadable(small[0], 13, r"the index gives it 100 bytes; as .npy of \(4, 5, 3\) it has 188")


def retyped(**kinds):
    """A change of the index: these columns with these types."""
    return lambda index: index.astype([(name, kinds.get(name, index.dtype[name])) for name in index.dtype.names])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index[:7], r"it holds .* \(7,\) instead of 8 rows with key, offset and size"),
        (lambda index: index["offset"], "it holds uint64 .* instead of 8 rows with key, offset and size"),
        (lambda index: index[["key", "offset"]].copy(), "it has no column size"),
        (retyped(offset="<i8"), "its column offset is int64, the manifest's uint64"),
        (retyped(label="<f4"), "its column label is float32, the manifest's int32"),
        (retyped(key="U5"), "its keys are <U5"),
        (retyped(key="S2000"), r"its keys are \|S2000"),
        (lambda index: np.array([{"a": 1}] * 8, dtype=object), "it holds Python objects"),
        (lambda index: set_field(index, 3, "offset", 10**6), "it places sample 'train-s00013' at offset 1000000, .*"),
        (lambda index: set_field(index, 3, "offset", 2**63), "it places sample 'train-s00013' at offset .*"),
        (lambda index: set_field(index, 3, "offset", 2**64 - 1), "it places sample 'train-s00013' at offset .*"),
        (lambda index: set_field(index, 0, "label", 10), "its column label holds . to 10, allowed are -1 to 9"),
        (lambda index: set_field(index, 0, "label", -2), "its column label holds -2 to ., allowed are -1 to 9"),
        (
            lambda index: set_field(index, 5, "attributes", 2),
            "its column attributes holds -1 to 2, allowed .* 1",
        ),
    ],
)
def test_an_index_of_another_kind(small, change, message):
    """With the right hash, as a faulty writer would write it."""
    rewrite_index(small[0], "train-000001", change)
    assert_refused(small[0], message)


def test_an_index_with_other_attributes(small):
    edit_manifest(small[0], setting("attributes", value=["One"]))
    with pytest.raises(UnreadableShard, match=r"column attributes is \('i1', \(2,\)\), the manifest's \('i1', \(1,"):
        TarShards(small[0], "train").attributes([0])


def test_a_missing_index(small):
    (small[0] / "train-000001.index.npy").unlink()
    assert_refused(small[0], "No such file or directory")


def test_a_truncated_and_an_enlarged_index(small):
    """An enlarged file is sparse, takes no room on the disk and would fill the memory."""
    path = small[0] / "train-000001.index.npy"
    size = path.stat().st_size
    for wrong in (size - 1, 50 * 2**30):
        os.truncate(path, wrong)
        assert_refused(small[0], f"it has {wrong} bytes instead of {size}")


def test_a_changed_label_is_noticed(small):
    """It would show nowhere else."""
    path = small[0] / "train-000001.index.npy"
    flip_byte(path, path.stat().st_size - 7, mask=1)
    assert_refused(small[0], "its sha256 is not the manifest's")


# ------------------------------------------------------------------------------------------------------- any content


def npy(header: bytes, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header) % 2**16)
    return b"\x93NUMPY" + bytes(version) + length + header + data


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.npy", content)
    return buffer.getvalue()


SIZES = st.sampled_from([0, 7, 8, 9, 2**31, 2**60, 2**64, -8])
COLUMNS = st.lists(
    st.tuples(
        st.sampled_from(["key", "offset", "size", "label", "attributes", "hidden", "other"]),
        st.sampled_from(["S12", "S99999999999", "<u8", "<u4", "<i4", "<f8", "|O", "<M8[s]", "V5", "nonsense"]),
        st.sampled_from([(), (2,), (2**40,), (2, 2**31)]),
    ),
    max_size=6,
)
HEADERS = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda columns, rows, fortran: str({"descr": columns, "fortran_order": fortran, "shape": (rows,)}).encode(),
        COLUMNS,
        SIZES,
        st.booleans(),
    ),
    st.builds(lambda n: b"{'descr': " + b"(" * n + b")" * n + b"}", st.sampled_from([100, 5000, 60_000])),
)
CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.builds(zipped, st.binary(max_size=300)),
    st.builds(npy, HEADERS, st.binary(max_size=300), st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)])),
)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> tuple[Path, Samples, bytes]:
    """A set of one shard, and its index."""
    samples = random_samples(8, attributes=2)
    root = write_set(tmp_path_factory.mktemp("indexed"), {"train": samples}, [8])
    return root, samples, (root / "train-000000.index.npy").read_bytes()


def write_index(root: Path, content: bytes) -> None:
    """With its hash in the manifest."""
    (root / "train-000000.index.npy").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(root, setting("splits", "train", "shards", 0, "index_sha256", value=digest))


def read_all(root: Path) -> tuple | str:
    """Everything that the set holds, or the error; with at most a fixed amount of memory beyond twice the file."""
    shards = TarShards(root, "train")
    tracemalloc.start()
    try:
        read = shards.images, shards.labels, shards.attributes, shards.keys
        return tuple(what(range(8)) for what in read)
    except UnreadableShard as error:
        return str(error)
    finally:
        limit = 2 * (root / "train-000000.index.npy").stat().st_size + 300_000
        assert tracemalloc.get_traced_memory()[1] < limit
        tracemalloc.stop()


@settings(max_examples=300)
@given(CONTENTS)
@example(npy(str({"descr": "<u8", "fortran_order": False, "shape": (2**60,)}).encode(), b""))
@example(npy(b"(" * 60_000, b""))
def test_any_file_in_the_place_of_an_index_is_refused(indexed, content):
    """Also with the right hash: zips, pickles, claims of 2^60 rows, deeply nested headers."""
    root, _, _ = indexed
    write_index(root, content)
    result = read_all(root)
    assert isinstance(result, str)
    assert "train-000000.index.npy: " in result
    assert "\n" not in result


@settings(max_examples=300)
@given(st.data())
def test_any_values_in_an_index_are_refused_or_read(indexed, data):
    """Offsets outside, overlapping, unsorted or anywhere: the images are those at the offsets, or there is an error."""
    root, samples, whole = indexed
    index = np.load(io.BytesIO(whole))
    places = st.sampled_from(index["offset"].tolist()) | st.integers(0, 2**64 - 1) | st.integers(0, 30_000)
    for row in data.draw(st.lists(st.integers(0, 7), max_size=8)):
        index["offset"][row] = data.draw(places)
    if data.draw(st.booleans()):
        index["size"][data.draw(st.integers(0, 7))] = data.draw(st.integers(0, 2**32 - 1))
    buffer = io.BytesIO()
    np.save(buffer, index)
    write_index(root, buffer.getvalue())
    result = read_all(root)
    if isinstance(result, str):
        assert "train-000000." in result
        return
    at = {offset: row for row, offset in enumerate(np.load(io.BytesIO(whole))["offset"].tolist())}
    rows = [at[offset] for offset in index["offset"].tolist()]
    np.testing.assert_array_equal(result[0], samples.images[rows])
    np.testing.assert_array_equal(result[1], samples.labels)

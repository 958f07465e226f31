"""The fixed binarization of MNIST as published, from text and from MATLAB files: every pixel, and damaged files."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_data import BinarizedMnist, DataError, convert
from shard_data.__main__ import main
from shard_data.mat_file import read_binary_matrix
from shard_data.sources.binarized_mnist import FILES, read_amat
from tests.helpers.conversions import contents, index_rows

COUNTS = {"train": 23, "val": 7, "test": 5}


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr(BinarizedMnist, "counts", COUNTS)


def pictures(split: str) -> np.ndarray:
    """(n, 784) zeros and ones."""
    return (np.random.default_rng(COUNTS[split]).random((COUNTS[split], 784)) < 0.2).astype(np.uint8)


def write_amat(folder: Path) -> Path:
    """By stock numpy, as the published files."""
    folder.mkdir()
    for split, name in FILES.items():
        np.savetxt(folder / f"{name}.amat", pictures(split), fmt="%d")
    return folder


def write_mat(folder: Path, compressed: bool = True, dtype=np.float64, transposed: bool = False) -> Path:
    """By SciPy."""
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir()
    for split, name in FILES.items():
        data = pictures(split).astype(dtype)
        arrays = {"labels": np.arange(3.0), "data": data.T if transposed else data, "note": "chars"}
        scipy_io.savemat(folder / f"{name}.mat", arrays, do_compression=compressed)
    return folder


def stored(root: Path, split: str) -> np.ndarray:
    """(n, 784) as a reader of the tars finds them."""
    tar = (root / f"{split}-000000.tar").read_bytes()
    images = [np.frombuffer(tar, np.uint8, 784, int(row["offset"]) + 128) for row in index_rows(root, split)]
    return np.stack(images)


def test_every_pixel_of_the_text_files(tmp_path, capsys):
    source = write_amat(tmp_path / "source")
    assert main(["binarized_mnist", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "binarized_mnist is complete (train 23, val 7, test 5 images)" in capsys.readouterr().out
    for split in COUNTS:
        assert (stored(tmp_path / "out", split) == 255 * pictures(split)).all()
    manifest = convert(BinarizedMnist(source), tmp_path / "again")
    assert manifest["transform"]["binarization"] == "fixed"
    assert manifest["classes"] is None
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert main(["verify", str(tmp_path / "out"), "--decode"]) == 0


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.int16, np.bool_])
def test_matlab_files_give_the_same_set(tmp_path, compressed, transposed, dtype):
    text = convert(BinarizedMnist(write_amat(tmp_path / "text")), tmp_path / "one")
    mat = convert(BinarizedMnist(write_mat(tmp_path / "mat", compressed, dtype, transposed)), tmp_path / "two")
    assert text["fingerprint"] == mat["fingerprint"]


@pytest.mark.parametrize("ending", ["\r\n", " \n", "\n\n", "\t\n"])
def test_other_white_space_is_read(tmp_path, ending):
    path = tmp_path / "train.amat"
    lines = ["  ".join(map(str, row)) if i % 2 else " ".join(map(str, row)) for i, row in enumerate(pictures("train"))]
    path.write_bytes(ending.join([*lines, ""]).encode())
    assert (read_amat(path, 23) == pictures("train")).all()


def line(number: int, edit):
    def apply(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        lines[number - 1] = edit(lines[number - 1])
        return b"".join(lines)

    return apply


BAD = {
    "one image less": (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "truncated, 22 images instead of 23"),
    "half a line": (lambda data: data[:-400], "line 23: .* values instead of 784"),
    "one image more": (lambda data: data + data[:1568], "line 24: more than the 23 images of this split"),
    "a gray value": (line(9, lambda row: b"2" + row[1:]), "line 9: holds the value 2, where all are 0 or 1"),
    "fractions": (line(3, lambda row: b"0.5 " + row[2:]), "line 3: holds the value 0.5, where all are 0 or 1"),
    "a value less": (line(5, lambda row: row[2:]), "line 5: 783 values instead of 784"),
    "no blanks": (line(5, lambda row: row.replace(b" ", b"")), "line 5: holds the value"),
    "a web page": (lambda data: b"<!DOCTYPE html><title>404</title>" + data, "line 1: a web page titled '404'"),
    "zeros": (lambda data: bytes(len(data)), "line 1: "),
    "an endless line": (lambda data: data.replace(b"\n", b" "), "line 1: .* values instead of 784"),
    "empty": (lambda data: b"", "truncated, 0 images instead of 23"),
    "a colon for a one": (line(2, lambda row: b":" + row[1:]), "line 2: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text_files_are_named_in_one_line_and_leave_nothing(tmp_path, capsys, case):
    edit, message = BAD[case]
    path = write_amat(tmp_path / "source") / "binarized_mnist_train.amat"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}: {message}"):
        convert(BinarizedMnist(tmp_path / "source"), tmp_path / "out")
    assert main(["binarized_mnist", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    source = write_amat(tmp_path / "source")
    (source / "binarized_mnist_valid.amat").unlink()
    with pytest.raises(DataError, match=r"does not hold binarized_mnist_valid\.amat or \.mat; check --source"):
        convert(BinarizedMnist(source), tmp_path / "out")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        convert(BinarizedMnist(tmp_path / "nowhere"), tmp_path / "out")


def mat(path: Path, compressed: bool = False, **arrays) -> Path:
    pytest.importorskip("scipy.io").savemat(path, arrays, do_compression=compressed)
    return path


def test_other_matlab_files_are_refused(tmp_path):
    ones = np.ones((5, 784))
    for name, arrays, message in (
        ("gray", {"a": ones * 0.5}, "a holds the value 0.5"),
        ("few", {"a": ones[:4], "b": np.ones(3)}, "holds no matrix of 5 x 784 or 784 x 5; it holds a 4 x 784, b 1 x 3"),
        ("two", {"a": ones, "b": ones}, "holds more than one matrix"),
        ("complex", {"a": ones * 1j}, "holds no matrix"),
        ("cells", {"a": np.array([[1, "x"]], dtype=object), "b": {"c": 1}}, "holds no matrix"),
    ):
        with pytest.raises(DataError, match=f"{name}.mat: {message}.*; save one matrix of zeros and ones with -v7"):
            read_binary_matrix(mat(tmp_path / f"{name}.mat", **arrays), 5, 784)
    for content, message in (
        (b"MATLAB 7.3 MAT-file" + bytes(200), "version 7.3"),
        (b"<html>" + bytes(200), "a web page, not a MATLAB file of level 5"),
        (b"", "an empty file"),
    ):
        (tmp_path / "other.mat").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_binary_matrix(tmp_path / "other.mat", 5, 784)


def test_big_endian_files_are_read(tmp_path):
    """Written by hand from the description of the format: MATLAB on old machines wrote such."""
    data = pictures("test")
    body = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 5, 784)
    body += struct.pack(">HH4s", 1, 1, b"a\0\0\0") + struct.pack(">II", 9, 8 * data.size)
    body += np.asfortranarray(data).T.astype(">f8").tobytes()
    head = b"MATLAB 5.0".ljust(124) + struct.pack(">H", 0x0100) + b"MI"
    (tmp_path / "big.mat").write_bytes(head + struct.pack(">II", 14, len(body)) + body)
    assert (read_binary_matrix(tmp_path / "big.mat", 5, 784) == data).all()


@given(place=st.integers(0, 5000), value=st.integers(0, 255), cut=st.integers(0, 9000), compressed=st.booleans())
@settings(max_examples=200)
def test_a_damaged_matlab_file_is_read_right_or_refused(tmp_path_factory, place, value, cut, compressed):
    """Never another error, nor more memory than the file is worth."""
    path = mat(tmp_path_factory.mktemp("mat") / "a.mat", compressed, data=pictures("test"))
    content = bytearray(path.read_bytes())
    content[min(place, len(content) - 1)] = value
    path.write_bytes(content[: len(content) - cut if cut < len(content) else None])
    tracemalloc.start()
    try:
        found = read_binary_matrix(path, 5, 784)
    except DataError:
        return
    finally:
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()
    assert set(np.unique(found)) <= {0, 1}


def test_a_compressed_bomb_is_not_inflated(tmp_path):
    """1 MB that would unpack to 1 GB."""
    packed = zlib.compress(struct.pack("<IIIIII", 14, 2**30, 6, 8, 6, 0) + bytes(2**30 // 8), 9)
    head = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    (tmp_path / "bomb.mat").write_bytes(head + struct.pack("<II", 15, len(packed)) + packed)
    tracemalloc.start()
    with pytest.raises(DataError):
        read_binary_matrix(tmp_path / "bomb.mat", 5, 784)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.slow
def test_the_published_counts(tmp_path, monkeypatch):
    """50,000 + 10,000 + 10,000 images of random pixels: 110 MB of text."""
    monkeypatch.undo()
    counts = BinarizedMnist.counts
    assert counts == {"train": 50_000, "val": 10_000, "test": 10_000}
    values = (np.random.default_rng(0).random((50_000, 784)) < 0.2).astype(np.uint8)
    for split, name in FILES.items():
        lines = np.full((counts[split], 1568), ord(" "), np.uint8)
        lines[:, ::2], lines[:, -1] = values[: counts[split]] + ord("0"), ord("\n")
        (tmp_path / f"{name}.amat").write_bytes(lines.tobytes())
    manifest = convert(BinarizedMnist(tmp_path), tmp_path / "out", workers=2)
    assert {split: entry["count"] for split, entry in manifest["splits"].items()} == counts
    source = BinarizedMnist(tmp_path)
    assert all((source.load(source.records("train")[i]).image.ravel() == 255 * values[i]).all() for i in (0, 49_999))

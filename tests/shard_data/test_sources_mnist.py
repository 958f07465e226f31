"""MNIST and its siblings from IDX files: every pixel of the real ones, and files that cannot be used."""

import gzip
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from shard_data import DataError, FashionMnist, Kmnist, Mnist, convert
from shard_data.__main__ import main
from tests.helpers.conversions import contents, index_rows
from tests.helpers.mnist_files import digits, idx, write_mnist


@pytest.fixture
def mnist(tmp_path) -> Path:
    return write_mnist(tmp_path / "originals")


def change(name: str, edit):
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))

    return apply


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def repacked(edit):
    return lambda data: gzip.compress(edit(gzip.decompress(data)))


BAD_MNIST = {
    "missing": (IMAGES, lambda folder: (folder / IMAGES).unlink(), "does not hold train-images-idx3-ubyte"),
    "empty": (IMAGES, change(IMAGES, lambda data: b""), "not an IDX file"),
    "web page": (IMAGES, change(IMAGES, lambda data: b"<!DOCTYPE html>"), "damaged gzip.*is a web page"),
    "truncated gzip": (IMAGES, change(IMAGES, lambda data: data[:-100]), "truncated or damaged gzip"),
    "damaged gzip": (
        IMAGES,
        change(IMAGES, lambda data: data[:400] + bytes(99) + data[499:]),
        "damaged|cannot be read",
    ),
    "truncated": (IMAGES, change(IMAGES, repacked(lambda data: data[:-1])), "truncated, .* bytes"),
    "too long": (LABELS, change(LABELS, repacked(lambda data: data + b"\0")), "too long"),
    "header alone": (LABELS, change(LABELS, repacked(lambda data: data[:6])), "not an IDX file"),
    "wrong magic": (LABELS, change(LABELS, repacked(lambda data: b"\0\0\x0c\1" + data[4:])), "00000801"),
    "other size": (
        IMAGES,
        change(IMAGES, lambda data: gzip.compress(idx(np.zeros((37, 32, 32), np.uint8)))),
        "not MNIST",
    ),
    "fewer labels": (
        LABELS,
        change(LABELS, lambda data: gzip.compress(idx(np.zeros(10, np.uint8)))),
        "10 labels for the 11",
    ),
    "no images": (
        IMAGES,
        change(IMAGES, lambda data: gzip.compress(idx(np.zeros((0, 28, 28), np.uint8)))),
        "no images",
    ),
    "wrong labels": (LABELS, change(LABELS, lambda data: gzip.compress(idx(np.full(11, 10, np.uint8)))), "label 10"),
    "huge header": (
        IMAGES,
        change(IMAGES, repacked(lambda data: data[:4] + b"\xff" * 12)),
        "header says .* bytes; at most",
    ),
}


@pytest.mark.parametrize("case", BAD_MNIST)
def test_bad_mnist_files_are_named_in_one_line_and_leave_nothing(mnist, tmp_path, capsys, case):
    name, spoil, message = BAD_MNIST[case]
    spoil(mnist)
    with pytest.raises(DataError, match=message):
        convert(Mnist(mnist), tmp_path / "out")
    assert main(["mnist", "--source", str(mnist), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert name.removesuffix(".gz") in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory) -> tuple[Path, Path]:
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: the original MNIST files are needed")
    originals = Path(os.environ["REAL_DATA_DIR"]) / "mnist"
    out = tmp_path_factory.mktemp("real") / "mnist"
    convert(Mnist(originals), out, workers=2)
    return originals, out


@pytest.mark.parametrize(("split", "prefix", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)])
def test_every_pixel_and_label_of_the_real_mnist(real_mnist, split, prefix, count):
    originals, out = real_mnist
    pixels = gzip.decompress((originals / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((originals / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
    tars = b"".join(path.read_bytes()[:-1024] for path in sorted(out.glob(f"{split}-*.tar")))
    samples = np.frombuffer(tars, np.uint8).reshape(count, 2560)  # header 512, npy 128 + 784 + 112, label 512 + 512
    assert samples[:, 640 : 640 + 784].tobytes() == pixels
    assert (samples[:, 2048] - ord("0")).tobytes() == labels
    assert index_rows(out, split)["label"].astype(np.uint8).tobytes() == labels


@pytest.mark.parametrize(("name", "kind"), [("fashion_mnist", FashionMnist), ("kmnist", Kmnist)])
def test_the_siblings_of_mnist_differ_in_name_and_classes(mnist, tmp_path, name, kind):
    assert main([name, "--source", str(mnist), "--out", str(tmp_path / "cli"), "--workers", "1"]) == 0
    manifest = convert(kind(mnist), tmp_path / "out")
    assert manifest["name"] == name
    assert manifest["classes"] == list(kind.classes)
    assert len(set(kind.classes)) == 10
    assert contents(tmp_path / "cli") == contents(tmp_path / "out")
    assert index_rows(tmp_path / "out", "train")["label"].tolist() == digits("train")[1].tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-images-idx3-ubyte.html.gz", "a web page"),
        ("train-images-idx3-ubyte.annex_pointer.gz", "a git-annex pointer"),
        ("not_mnist_idx_custom_train-images.gz", "37 labels for the 900 images|instead of 28 x 28"),
    ],
)
def test_real_damaged_downloads_of_mnist_are_refused(mnist, tmp_path, name, message):
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: the damaged downloads are needed")
    shutil.copyfile(Path(os.environ["REAL_DATA_DIR"]) / "hostile" / "bad_downloads" / name, mnist / IMAGES)
    with pytest.raises(DataError, match=f"{IMAGES}|{LABELS}") as failure:
        convert(Mnist(mnist), tmp_path / "out")
    assert re.search(message, str(failure.value))

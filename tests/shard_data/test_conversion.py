"""Shard sets: what the writer promises about bytes, formats, interruptions and bad input."""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from math import prod
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_data import AlreadyComplete, DataError, FashionMnist, Kmnist, Mnist, ToyFaces, convert, plan
from shard_data.__main__ import main
from shard_data.plan import default_shard_size
from shard_data.shard import decode_image, encode_image, tar_member
from shard_data.verify import verify

COUNTS = {"train": 37, "t10k": 11}
SMALL_FACES = ToyFaces(size=16, train=23, val=7, test=0, seed=5)


def idx(array: np.ndarray) -> bytes:
    """An IDX file of uint8, written from its description."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def digits(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    rng, count = np.random.default_rng(len(prefix)), COUNTS[prefix]
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write_mnist(folder: Path, zipped: bool = True) -> Path:
    folder.mkdir()
    for prefix in COUNTS:
        for kind, array in zip(("images-idx3", "labels-idx1"), digits(prefix), strict=True):
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return folder


@pytest.fixture
def mnist(tmp_path) -> Path:
    return write_mnist(tmp_path / "originals")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stock(folder: Path, split: str, mode: str = "pill") -> list[dict]:
    """Every sample of a split as webdataset itself reads it; "pill" is its word for gray PNG files."""
    tars = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode(mode))


def rows(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.load(p, allow_pickle=False) for p in sorted(folder.glob(f"{split}-*.index.npy"))])


@pytest.mark.parametrize("encoding", ["npy", "png"])
@pytest.mark.parametrize("zipped", [True, False])
def test_webdataset_reads_the_pixels_and_labels_of_the_originals(tmp_path, encoding, zipped):
    source = Mnist(write_mnist(tmp_path / "originals", zipped))
    convert(source, tmp_path / "out", encoding=encoding, shard_size=10)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = digits(prefix)
        samples = stock(tmp_path / "out", split)
        assert [sample["__key__"] for sample in samples] == [f"{split}-{i:05d}" for i in range(COUNTS[prefix])]
        assert np.array_equal(np.stack([np.asarray(s[encoding]).reshape(28, 28) for s in samples]), images)
        assert [sample["cls"] for sample in samples] == labels.tolist()
    assert verify(tmp_path / "out", decode=True) == []


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_index_leads_to_each_image_without_reading_the_tar(mnist, tmp_path, encoding):
    manifest = convert(Mnist(mnist), tmp_path / "out", encoding=encoding, shard_size=10)
    images, labels = digits("train")
    found = []
    for shard in manifest["splits"]["train"]["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        index = np.load(tmp_path / "out" / shard["index"], mmap_mode="r", allow_pickle=False)
        assert index.dtype.names == ("key", "offset", "size", "label")
        found += [data[row["offset"] : row["offset"] + row["size"]] for row in index]
    read = np.load if encoding == "npy" else Image.open
    assert all(np.array_equal(np.asarray(read(io.BytesIO(f))).reshape(28, 28), i) for f, i in zip(found, images))  # noqa: B905
    assert len(found) == len(images)
    assert rows(tmp_path / "out", "train")["label"].tolist() == labels.tolist()


def test_faces_carry_their_attributes_into_json_and_index(tmp_path):
    manifest = convert(SMALL_FACES, tmp_path, shard_size=10)
    names = manifest["attributes"]
    for split in ("train", "val"):
        samples, index = stock(tmp_path, split), rows(tmp_path, split)
        for sample, row, record in zip(samples, index, SMALL_FACES.records(split), strict=True):
            face = SMALL_FACES.load(record)
            assert np.array_equal(sample["npy"], face.image)
            assert sample["json"]["attributes"] == dict(zip(names, row["attributes"].tolist(), strict=True))
            assert row["attributes"].tolist() == list(face.attributes)
            assert sample["json"]["hidden"] == [n for n, gone in zip(names, row["hidden"], strict=True) if gone]
            assert row["hidden"].tolist() == list(face.hidden)
            assert "cls" not in sample


def test_manifest_says_what_is_there(mnist, tmp_path):
    manifest = convert(Mnist(mnist), tmp_path / "out", shard_size=10)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["image"] == {"height": 28, "width": 28, "channels": 1}
    assert manifest["classes"] == list("0123456789")
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [10, 10, 10, 7]
    assert manifest["splits"]["test"]["count"] == 11
    expected = {"manifest.json", *(f"train-00000{i}.{s}" for i in range(4) for s in ("tar", "index.npy"))}
    assert set(content(tmp_path / "out")) == expected | {
        f"test-00000{i}.{s}" for i in range(2) for s in ("tar", "index.npy")
    }


def test_fingerprint_is_of_the_samples_not_of_where_they_came_from(tmp_path):
    prints = []
    for zipped in (True, False):
        source = Mnist(write_mnist(tmp_path / f"originals{zipped}", zipped))
        prints.append(convert(source, tmp_path / f"out{zipped}"))
    assert prints[0]["source"] != prints[1]["source"]
    assert prints[0]["fingerprint"] == prints[1]["fingerprint"]
    assert (
        convert(Mnist(tmp_path / "originalsTrue"), tmp_path / "png", encoding="png")["fingerprint"]
        != prints[0]["fingerprint"]
    )


def test_tars_are_plain_ustar_of_time_and_owner_zero(tmp_path):
    convert(SMALL_FACES, tmp_path, shard_size=10)
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path) as tar:
        for member in tar:
            header = path.read_bytes()[member.offset : member.offset + 512]
            assert header[257:265] == b"ustar\x0000"
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.offset_data == member.offset + 512  # no extended header in between


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_same_bytes_for_any_number_of_workers(tmp_path, encoding):
    for name, workers in (("one", 1), ("again", 1), ("two", 2), ("three", 3)):
        convert(SMALL_FACES, tmp_path / name, encoding=encoding, shard_size=4, workers=workers)
    reference = content(tmp_path / "one")
    assert len(reference) == 2 * (6 + 2) + 1
    assert all(content(tmp_path / name) == reference for name in ("again", "two", "three"))


class Unreliable(ToyFaces):
    """Faces whose loading fails at one place; counts what it loaded."""

    fails_at: int | None
    loads: int

    def load(self, record):
        object.__setattr__(self, "loads", self.loads + 1)
        if record.where == self.fails_at:
            raise OSError(errno.EIO, "the cable was pulled", "original.jpg")
        return super().load(record)


def unreliable(fails_at: int | None) -> Unreliable:
    source = Unreliable(size=16, train=23, val=7, test=0, seed=5)
    object.__setattr__(source, "fails_at", fails_at)
    object.__setattr__(source, "loads", 0)
    return source


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    convert(SMALL_FACES, folder, shard_size=4)
    return content(folder)


@given(stops=st.lists(st.integers(0, 22), max_size=3))
@settings(max_examples=15, deadline=None)
def test_interrupted_conversion_goes_on_to_the_same_bytes(uninterrupted, tmp_path_factory, stops):
    folder, finished = tmp_path_factory.mktemp("interrupted"), 0
    for stop in stops:
        source = unreliable(stop)
        if stop >= finished:
            with pytest.raises(DataError, match=r"original\.jpg.*the cable was pulled"):
                convert(source, folder, shard_size=4)
            assert not (folder / "manifest.json").exists()
            assert not list(folder.glob("*.partial"))
            finished = stop // 4 * 4
    source = unreliable(None)
    convert(source, folder, shard_size=4)
    assert source.loads == 30 - finished  # nothing finished is done twice
    assert content(folder) == uninterrupted


@given(cut=st.floats(0, 1), flip=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_what_a_crash_tore_is_made_again(uninterrupted, tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("torn")
    with pytest.raises(DataError):
        convert(unreliable(21), folder, shard_size=4)
    journal = folder / "unfinished.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    torn = round(cut * len(lines[-1]))
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn])
    damaged = folder / f"train-00000{flip}.tar"
    damaged.write_bytes(damaged.read_bytes()[:-700])
    convert(SMALL_FACES, folder, shard_size=4)
    assert content(folder) == uninterrupted


def test_another_conversion_into_an_unfinished_folder_leaves_nothing_of_the_first(uninterrupted, tmp_path):
    with pytest.raises(DataError):
        convert(unreliable(21), tmp_path, shard_size=2)
    (tmp_path / "train-000007.tar.partial").write_bytes(b"a kill leaves such a file")
    convert(SMALL_FACES, tmp_path, shard_size=4)
    assert content(tmp_path) == uninterrupted


def test_killed_conversion_goes_on_and_leaves_no_process(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "3000", "--val", "0", "--test", "0", "--shard-size", "100"]
    command = [sys.executable, "-m", "shard_data", *words, "--workers", "2", "--out"]
    environment = {**os.environ, "SHARD_DATA_TEST": tmp_path.name}
    for patience in (1, 2, 6):
        process = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL, env=environment)
        wait_until(lambda: len(list((tmp_path / "killed").glob("*.index.npy"))) >= patience)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not processes_with(f"SHARD_DATA_TEST={tmp_path.name}"))
        assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("killed", "straight"):
        subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_with(variable: str) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path] if variable.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_ctrl_c_stops_all_workers_and_says_how_to_go_on(tmp_path):
    words = ["toy_faces", "--train", "100000", "--shard-size", "50000", "--workers", "2", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shard_data", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    wait_until(lambda: len(list((tmp_path / "out").glob("*.partial"))) == 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.splitlines()[-1] == "interrupted; run the same command again, and it goes on"
    assert "Traceback" not in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished.jsonl"]


def test_a_complete_set_is_not_touched_unless_told(tmp_path, capsys):
    convert(SMALL_FACES, tmp_path, shard_size=2)
    before = content(tmp_path)
    with pytest.raises(AlreadyComplete, match="complete set of toy_faces.*--overwrite"):
        convert(SMALL_FACES, tmp_path)
    words = ["toy_faces", "--out", str(tmp_path), "--size", "16", "--train", "3", "--val", "0", "--test", "0"]
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert content(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--overwrite", "--workers", "1"]) == 0
    assert set(content(tmp_path)) == {"manifest.json", "train-000000.tar", "train-000000.index.npy", "notes.txt"}


def test_files_of_others_are_never_overwritten(tmp_path):
    (tmp_path / "val-000000.tar").write_bytes(b"somebody's own shard")
    with pytest.raises(DataError, match=r"val-000000\.tar: is in the way"):
        convert(SMALL_FACES, tmp_path, overwrite=True)
    assert content(tmp_path) == {"val-000000.tar": b"somebody's own shard"}


def test_full_disk_is_named_and_the_same_command_goes_on(tmp_path, uninterrupted, monkeypatch):
    calls, fsync = [], os.fsync

    def full_at_the_fifth(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_fifth)
    with pytest.raises(DataError, match="the disk is full; free some space and run the same command again"):
        convert(SMALL_FACES, tmp_path, shard_size=4)
    assert not list(tmp_path.glob("*.partial"))
    convert(SMALL_FACES, tmp_path, shard_size=4)
    assert content(tmp_path) == uninterrupted


def change(name: str, edit):
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))

    return apply


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def repacked(edit):
    return lambda data: gzip.compress(edit(gzip.decompress(data)))


BAD_MNIST = {
    "missing": (IMAGES, lambda folder: (folder / IMAGES).unlink(), "not found"),
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
    "huge promise": (IMAGES, change(IMAGES, repacked(lambda data: data[:4] + b"\xff" * 12)), "truncated"),
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


def test_folders_and_options_that_cannot_be_used(mnist, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["mnist", "--source", str(mnist), "--out", str(out), "--workers", "1"]) == 2
        assert str(out) in capsys.readouterr().err
    for words, message in ((["--shard-size", "0"], "shard size 0"), (["--workers", "0"], "workers 0")):
        assert main(["mnist", "--source", str(mnist), "--out", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["mnist", "--sou", str(mnist), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(mnist, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["mnist", "--source", str(mnist), "--out", str(tmp_path / "locked" / "out")]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_conversion_imports_neither_torch_nor_webdataset(tmp_path):
    code = f"""
import sys
from shard_data.__main__ import main
assert main(["toy_faces", "--out", {str(tmp_path)!r}, "--size", "16", "--train", "2", "--val", "0", "--test", "0"]) == 0
assert main(["info", {str(tmp_path)!r}]) == 0
assert main(["verify", {str(tmp_path)!r}]) == 0
print([name for name in ("torch", "webdataset", "pipeline") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_default_shards_stay_near_tens_of_megabytes():
    for shape in ((28, 28, 1), (32, 32, 3), (64, 64, 3), (256, 256, 3)):
        size = default_shard_size(shape)
        assert 8e6 < size * np.prod(shape) + size * 2048 <= 32 * 2**20
    assert default_shard_size((8192, 8192, 3)) == 1


images = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])).flatmap(
    lambda shape: st.binary(min_size=prod(shape), max_size=prod(shape)).map(
        lambda data: np.frombuffer(data, np.uint8).reshape(shape)
    )
)


@given(image=images, encoding=st.sampled_from(["npy", "png"]))
def test_encodings_lose_nothing(image, encoding):
    assert np.array_equal(decode_image(encode_image(image, encoding), encoding), image)


@given(name=st.text("abcxyz019-_./", min_size=1, max_size=99), size=st.integers(0, 2000))
def test_tar_headers_are_those_of_the_standard_library(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_member(name, bytes(size))[:512] == info.tobuf(tarfile.USTAR_FORMAT)


@given(data=st.binary(max_size=1100))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_tar_members_are_what_the_standard_library_reads(data):
    archive = io.BytesIO(tar_member("train-00000.npy", data) + tar_member("other.cls", b"7") + bytes(1024))
    with tarfile.open(fileobj=archive) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == {
            "train-00000.npy": data,
            "other.cls": b"7",
        }


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
    assert rows(out, split)["label"].astype(np.uint8).tobytes() == labels


@pytest.mark.parametrize(("name", "kind"), [("fashion_mnist", FashionMnist), ("kmnist", Kmnist)])
def test_the_siblings_of_mnist_differ_in_name_and_classes(mnist, tmp_path, name, kind):
    assert main([name, "--source", str(mnist), "--out", str(tmp_path / "cli"), "--workers", "1"]) == 0
    manifest = convert(kind(mnist), tmp_path / "out")
    assert manifest["name"] == name
    assert manifest["classes"] == list(kind.classes)
    assert len(set(kind.classes)) == 10
    assert content(tmp_path / "cli") == content(tmp_path / "out")
    assert rows(tmp_path / "out", "train")["label"].tolist() == digits("train")[1].tolist()


@given(seed=st.integers(0, 2**64), size=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_shuffled_writing_is_a_permutation_that_the_seed_decides(tmp_path_factory, seed, size):
    folder = tmp_path_factory.mktemp("shuffled")
    manifest = convert(SMALL_FACES, folder, shuffle_seed=seed, shard_size=size)
    keys = [row["key"].decode() for row in rows(folder, "train")]
    assert sorted(keys) == [record.key for record in SMALL_FACES.records("train")]
    assert keys == sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    assert manifest["shuffle_seed"] == seed
    assert verify(folder, decode=True) == []


def test_shuffle_seed_shows_in_the_fingerprint_and_not_in_the_samples(tmp_path):
    prints = {
        seed: convert(SMALL_FACES, tmp_path / str(seed), shuffle_seed=seed)["fingerprint"] for seed in (None, 0, 1)
    }
    assert len(set(prints.values())) == 3
    sets = [{s["__key__"]: s["npy"].tobytes() for s in stock(tmp_path / str(seed), "train")} for seed in prints]
    assert sets[0] == sets[1] == sets[2]
    assert "shuffle_seed" not in json.loads((tmp_path / "None" / "manifest.json").read_text())


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch, encoding):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5_000))
    with pytest.raises(DataError, match=r"are needed and 0\.0 GB are free; free some space"):
        convert(SMALL_FACES, tmp_path, encoding=encoding)
    assert content(tmp_path) == {}


def test_space_of_what_is_replaced_counts_as_free(tmp_path, monkeypatch):
    convert(SMALL_FACES, tmp_path)
    before = content(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 0))
    convert(SMALL_FACES, tmp_path, overwrite=True)
    assert content(tmp_path) == before
    with pytest.raises(DataError, match="are needed"):
        convert(ToyFaces(size=32, train=23, val=7, test=0), tmp_path, overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("encoding", ["npy", "png"])
@pytest.mark.parametrize("made", ["faces", "digits"])
def test_the_estimate_never_refuses_what_fits(tmp_path, encoding, made):
    source = SMALL_FACES if made == "faces" else Mnist(write_mnist(tmp_path / "originals"))
    manifest = convert(source, tmp_path / "out", encoding=encoding)
    records = plan.plan_records(source, None)
    need = plan.least_bytes(plan.plan_layout(source, encoding, records)) * sum(map(len, records.values()))
    used = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert used / 4 < need <= used, manifest["name"]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_do_not_show(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "4000", "--val", "0", "--test", "0", "--shard-size", "50"]
    command = [sys.executable, "-m", "shard_data", *words, "--workers", "2", "--shuffle", "3", "--out"]
    environment = {**os.environ, "SHARD_DATA_TEST": tmp_path.name}
    rng, kills = np.random.default_rng(20), 0
    while kills < 20:
        process = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL, env=environment)
        time.sleep(rng.uniform(0.2, 1.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: not processes_with(f"SHARD_DATA_TEST={tmp_path.name}"))
        if (tmp_path / "killed" / "manifest.json").exists():
            shutil.rmtree(tmp_path / "killed")
    for name in ("killed", "straight"):
        if not (tmp_path / name / "manifest.json").exists():
            subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


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

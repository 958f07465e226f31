"""The files of a shard set, read with webdataset, tarfile and numpy; the same arguments give the same bytes."""

import hashlib
import io
import json
import tarfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_data import Mnist, convert
from shard_data.shard import decode_image, encode_image, tar_member
from shard_data.verify import verify
from tests.helpers.conversions import SMALL_FACES, contents, index_rows, stock_samples
from tests.helpers.mnist_files import COUNTS, digits, write_mnist


@pytest.fixture
def mnist(tmp_path) -> Path:
    return write_mnist(tmp_path / "originals")


@pytest.mark.parametrize("encoding", ["npy", "png"])
@pytest.mark.parametrize("zipped", [True, False])
def test_webdataset_reads_the_pixels_and_labels_of_the_originals(tmp_path, encoding, zipped):
    source = Mnist(write_mnist(tmp_path / "originals", zipped))
    convert(source, tmp_path / "out", encoding=encoding, shard_size=10)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = digits(prefix)
        samples = stock_samples(tmp_path / "out", split)
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
    assert index_rows(tmp_path / "out", "train")["label"].tolist() == labels.tolist()


def test_faces_carry_their_attributes_into_json_and_index(tmp_path):
    manifest = convert(SMALL_FACES, tmp_path, shard_size=10)
    names = manifest["attributes"]
    for split in ("train", "val"):
        samples, index = stock_samples(tmp_path, split), index_rows(tmp_path, split)
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
    assert set(contents(tmp_path / "out")) == expected | {
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
    reference = contents(tmp_path / "one")
    assert len(reference) == 2 * (6 + 2) + 1
    assert all(contents(tmp_path / name) == reference for name in ("again", "two", "three"))


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


@given(seed=st.integers(0, 2**64), size=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_shuffled_writing_is_a_permutation_that_the_seed_decides(tmp_path_factory, seed, size):
    folder = tmp_path_factory.mktemp("shuffled")
    manifest = convert(SMALL_FACES, folder, shuffle_seed=seed, shard_size=size)
    keys = [row["key"].decode() for row in index_rows(folder, "train")]
    assert sorted(keys) == [record.key for record in SMALL_FACES.records("train")]
    assert keys == sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    assert manifest["shuffle_seed"] == seed
    assert verify(folder, decode=True) == []


def test_shuffle_seed_shows_in_the_fingerprint_and_not_in_the_samples(tmp_path):
    prints = {
        seed: convert(SMALL_FACES, tmp_path / str(seed), shuffle_seed=seed)["fingerprint"] for seed in (None, 0, 1)
    }
    assert len(set(prints.values())) == 3
    sets = [{s["__key__"]: s["npy"].tobytes() for s in stock_samples(tmp_path / str(seed), "train")} for seed in prints]
    assert sets[0] == sets[1] == sets[2]
    assert "shuffle_seed" not in json.loads((tmp_path / "None" / "manifest.json").read_text())

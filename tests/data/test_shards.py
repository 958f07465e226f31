"""Random access to shard sets: the right pixels for whole sets, an error that names the place for damaged ones."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import shards as shards_module
from pipeline.data.shards import TarShards, UnreadableShard
from shard_data.source import Record, Sample
from shard_data.writer import convert
from tests.helpers.shard_sets import Samples, edit_manifest, random_samples, rewrite_index, write_set


@pytest.fixture(params=["npy", "png"])
def encoding(request) -> str:
    return request.param


@pytest.fixture
def small(tmp_path) -> tuple[Path, Samples]:
    """23 .npy samples in shards of 10, 8 and 5."""
    samples = random_samples(23, attributes=2)
    return write_set(tmp_path / "small", {"train": samples}, [10, 8, 5]), samples


@pytest.fixture
def small_png(tmp_path) -> tuple[Path, Samples]:
    samples = random_samples(23)
    return write_set(tmp_path / "small_png", {"train": samples}, [10, 8, 5], "png"), samples


def flip_byte(path: Path, place: int, mask: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def place_of(root: Path, index: int) -> tuple[Path, str, int]:
    """(tar, key, offset of the image) of a sample of the small sets, from the index files."""
    for number, size in enumerate((10, 8, 5)):
        if index < size:
            row = np.load(root / f"train-{number:06d}.index.npy")[index]
            return root / f"train-{number:06d}.tar", row["key"].decode(), int(row["offset"])
        index -= size
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------- whole sets


@pytest.mark.parametrize("channels", [1, 3])
def test_any_samples_in_any_order(tmp_path, encoding, channels):
    samples = random_samples(40, 5, 7, channels, attributes=3)
    root = write_set(
        tmp_path, {"train": samples, "test": random_samples(3, 5, 7, channels, 3, seed=9)}, [9, 4], encoding
    )
    shards = TarShards(root, "train")
    assert len(shards) == 40
    assert shards.image_shape == (5, 7, channels)
    assert shards.shard_sizes == (9, 4, 4, 4, 4, 4, 4, 4, 3)
    assert shards.attribute_names == ("Attribute_0", "Attribute_1", "Attribute_2")
    assert shards.classes[3] == "class 3"
    assert shards.fingerprint == json.loads((root / "manifest.json").read_text())["fingerprint"]
    for indices in (np.arange(40), np.random.default_rng(1).integers(0, 40, 100), [39], [0, 0, 12, 13, 12]):
        images = shards.images(indices)
        assert images.flags.c_contiguous
        np.testing.assert_array_equal(images, samples.images[indices])
        np.testing.assert_array_equal(shards.labels(indices), samples.labels[indices])
        np.testing.assert_array_equal(shards.attributes(indices), samples.attributes[indices])
        assert shards.keys(indices) == [f"train-s{i:05d}" for i in indices]


def test_a_set_without_labels_and_attributes(tmp_path):
    samples = Samples(random_samples(5).images)
    shards = TarShards(write_set(tmp_path, {"train": samples}, [3]), "train")
    assert shards.classes == shards.attribute_names == ()
    assert shards.labels([4, 0]).tolist() == [-1, -1]
    assert shards.attributes([4, 0]).shape == (2, 0)


def test_nothing_asked_nothing_given(small):
    shards = TarShards(small[0], "train")
    assert shards.images([]).shape == (0, 4, 5, 3)
    assert shards.labels([]).shape == (0,)
    assert shards.keys([]) == []


@pytest.mark.parametrize("indices", [[-1], [23], [0, 99]])
def test_indices_outside_the_split_are_refused(small, indices):
    with pytest.raises(IndexError, match="split 'train' with 23 samples"):
        TarShards(small[0], "train").images(indices)


def test_stock_webdataset_reads_the_same_samples(tmp_path, encoding):
    samples = random_samples(20, 8, 8, 3, attributes=2)
    root = write_set(tmp_path, {"train": samples}, [7], encoding)
    tars = [str(path) for path in sorted(root.glob("*.tar"))]
    stock = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    shards = TarShards(root, "train")
    assert [sample["__key__"] for sample in stock] == shards.keys(range(20))
    np.testing.assert_array_equal(np.stack([sample[encoding] for sample in stock]), shards.images(range(20)))
    assert [sample["cls"] for sample in stock] == shards.labels(range(20)).tolist()
    assert [
        [sample["json"]["attributes"].get(name, -1) for name in shards.attribute_names] for sample in stock
    ] == shards.attributes(range(20)).tolist()


def test_opening_reads_the_manifest_alone(small):
    """Sets of a million samples open at once: no tar and no index is touched before a sample is asked for."""
    root, samples = small
    hidden = [(path, path.read_bytes()) for path in root.iterdir() if path.name != "manifest.json"]
    for path, _ in hidden:
        path.unlink()
    shards = TarShards(root, "train")
    assert len(shards) == 23
    for path, content in hidden:
        if path.suffix == ".npy":
            path.write_bytes(content)
    assert shards.labels([3, 20]).tolist() == samples.labels[[3, 20]].tolist()  # needs no tar
    with pytest.raises(UnreadableShard):
        shards.images([3])


def test_files_stay_behind_when_it_is_pickled(small):
    root, samples = small
    shards = TarShards(root, "train")
    fresh = len(pickle.dumps(shards))
    shards.images(range(23))
    message = pickle.dumps(shards)
    assert len(message) == fresh
    copy = pickle.loads(message)  # noqa: S301 - our own object, as a worker gets it
    np.testing.assert_array_equal(copy.images(range(23)), samples.images)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 8)
    samples = random_samples(60, 2, 2)
    shards = TarShards(write_set(tmp_path, {"train": samples}, [1]), "train")
    before = len(os.listdir("/proc/self/fd"))
    for indices in (np.arange(60), np.arange(60)[::-1]):
        np.testing.assert_array_equal(shards.images(indices), samples.images[indices])
        assert len(os.listdir("/proc/self/fd")) - before <= 16


# ------------------------------------------------------------------------------------------------------- bad manifests


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder; make a shard set with: python -m shard_data"):
        TarShards(tmp_path / "nowhere", "train")


def test_an_unfinished_set(small):
    (small[0] / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"not a complete shard set; make it, or finish it, with: python -m shard_data"
    ):
        TarShards(small[0], "train")


def test_an_unknown_split(small):
    with pytest.raises(ValueError, match="no split 'valid'; it has: train"):
        TarShards(small[0], "valid")


def _change(*path, value):
    def change(manifest):
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("version", value=2), "version 2, but this release reads version 1"),
        (_change("format", value="pictures"), "format: Input should be 'webdataset-shards'"),
        (_change("encoding", value="jpeg"), "encoding: Input should be 'npy' or 'png'"),
        (_change("image", "channels", value=2), "image.channels: Input should be 1 or 3"),
        (_change("image", "height", value="28"), "image.height: Input should be a valid integer"),
        (_change("splits", "train", "count", value=24), "the shards hold 23 samples, but count says 24"),
        (
            _change("splits", "train", "shards", 0, "count", value=0),
            r"splits.train.shards.0.count: .* greater than or equal",
        ),
        (
            _change("splits", "train", "shards", 0, "file", value="../x.tar"),
            r"splits.train.shards.0.file: .* match pattern",
        ),
        (
            _change("splits", "train", "shards", 0, "file", value="/x.tar"),
            r"splits.train.shards.0.file: .* match pattern",
        ),
        (lambda manifest: manifest.pop("fingerprint"), "fingerprint: Field required"),
    ],
)
def test_a_manifest_that_breaks_the_format(small, change, message):
    edit_manifest(small[0], change)
    with pytest.raises(ValueError, match=message) as caught:
        TarShards(small[0], "train")
    assert str(small[0] / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_manifest_that_is_no_object(small, content):
    (small[0] / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json: .*make the shard set again"):
        TarShards(small[0], "train")


# ------------------------------------------------------------------------------------------------------ damaged shards


def assert_named(root: Path, index: int, message: str, asked=range(23)) -> None:
    """Reading raises UnreadableShard naming tar, key and offset of sample `index`, also the second time."""
    tar, key, offset = place_of(root, index)
    shards = TarShards(root, "train")
    for _ in range(2):
        with pytest.raises(UnreadableShard, match=message) as caught:
            shards.images(asked)
        text = str(caught.value)
        assert f"{tar}: sample '{key}' at offset {offset}: " in text
        assert f"python -m shard_data verify {root}" in text


def test_a_missing_tar(small):
    (small[0] / "train-000001.tar").unlink()
    assert_named(small[0], 10, "No such file")
    assert_named(small[0], 15, "No such file", asked=[2, 15, 11])


def test_a_missing_tar_spares_the_other_shards(small):
    root, samples = small
    (root / "train-000001.tar").unlink()
    np.testing.assert_array_equal(TarShards(root, "train").images([0, 22]), samples.images[[0, 22]])


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_tar_cut_short(small, keep):
    os.truncate(small[0] / "train-000001.tar", keep)
    assert_named(small[0], 10, f"the file has {keep} bytes, the manifest says")


def test_a_tar_cut_short_while_it_is_open(small):
    """Reading the lost pages of a mapped file would kill the process."""
    root, _ = small
    shards = TarShards(root, "train")
    shards.images(range(23))
    os.truncate(root / "train-000001.tar", 0)
    with pytest.raises(UnreadableShard, match=r"train-000001\.tar: sample 'train-s00017' .* the file has 0 bytes"):
        shards.images([17])


def test_every_damaged_byte_of_an_npy_header_is_noticed(small):
    root, samples = small
    for index in (10, 13):  # the header that the others are compared with, and another
        tar, _, offset = place_of(root, index)
        for place in range(offset, offset + 128):
            flip_byte(tar, place, mask=1)
            with pytest.raises(UnreadableShard):
                TarShards(root, "train").images(range(10, 18))
            flip_byte(tar, place, mask=1)
        np.testing.assert_array_equal(TarShards(root, "train").images(range(23)), samples.images)
    flip_byte(place_of(root, 13)[0], place_of(root, 13)[2] + 60)
    assert_named(root, 13, "header is damaged", asked=[0, 12, 13])


@pytest.mark.parametrize(
    "stored",
    [
        np.zeros((5, 4, 3), np.uint8),
        np.zeros((4, 5, 3), np.int8),
        np.asfortranarray(random_samples(1).images[0]),
        np.zeros((4, 5), np.uint8),
    ],
    ids=["shape", "dtype", "fortran", "dimensions"],
)
def test_an_npy_of_another_kind(small, stored):
    """What a faulty writer could store: the member is replaced in place, header and all."""
    root, _ = small
    tar, _, offset = place_of(root, 10)
    path = root / "other.npy"
    np.save(path, stored)
    content = bytearray(tar.read_bytes())
    content[offset : offset + path.stat().st_size] = path.read_bytes()
    tar.write_bytes(content)
    rewrite_index(root, "train-000001", lambda index: _with(index, 0, "size", path.stat().st_size))
    assert_named(root, 10, "not the .npy that it should be|the index gives it")


def _with(index: np.ndarray, row: int, field: str, value) -> np.ndarray:
    index[field][row] = value
    return index


@pytest.mark.parametrize("value", [10**6, 2**63, 2**64 - 1])
def test_an_offset_outside_the_file(small, value):
    root, _ = small
    rewrite_index(root, "train-000001", lambda index: _with(index, 3, "offset", value))
    assert_named(root, 13, "the index places it outside the file's .* bytes")


def test_an_offset_at_the_wrong_place(small):
    root, _ = small
    rewrite_index(root, "train-000001", lambda index: _with(index, 3, "offset", index["offset"][3] - 512))
    assert_named(root, 13, "header is damaged")


def test_a_size_unlike_the_others(small):
    rewrite_index(small[0], "train-000001", lambda index: _with(index, 3, "size", 100))
    assert_named(small[0], 13, r"the index gives it 100 bytes; as .npy of \(4, 5, 3\) it has 188")


def _pickled(_index):
    return np.array([{"a": 1}] * 8, dtype=object)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index[:7], r"instead of 8 rows"),
        (lambda index: index["offset"], "instead of 8 rows with key, offset and size"),
        (lambda index: index[["key", "offset"]].copy(), "instead of 8 rows with key, offset and size"),
        (
            lambda index: index.astype([(n, "<i8" if n == "offset" else index.dtype[n]) for n in index.dtype.names]),
            "instead of",
        ),
        (_pickled, "Python objects"),
    ],
)
def test_an_index_of_another_kind(small, change, message):
    root, _ = small
    rewrite_index(root, "train-000001", change)
    with pytest.raises(
        UnreadableShard, match=rf"train-000001\.index\.npy: .*{message}.* the 8 samples of train-000001\.tar"
    ):
        TarShards(root, "train").images([12])


def test_an_index_with_other_attributes(small):
    edit_manifest(small[0], _change("attributes", value=["One"]))
    with pytest.raises(UnreadableShard, match=r"attributes are \(2,\), the manifest's 1"):
        TarShards(small[0], "train").attributes([0])


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_index(small, damage):
    """A flipped bit of a label would show nowhere else: the index is hashed when it is opened."""
    root, _ = small
    path = root / "train-000001.index.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        flip_byte(path, path.stat().st_size - 7, mask=1)
    shards = TarShards(root, "train")
    for read in (shards.images, shards.keys, shards.labels, shards.attributes):
        with pytest.raises(UnreadableShard, match=r"train-000001\.index\.npy: .*the 8 samples of train-000001\.tar"):
            read([9, 10])


@pytest.mark.parametrize("damage", ["bytes", "size", "mode", "jpeg", "empty"])
def test_a_damaged_png(small_png, damage):
    root, _ = small_png
    tar, _, offset = place_of(root, 13)
    size = int(np.load(root / "train-000001.index.npy")["size"][3])
    if damage == "bytes":
        flip_byte(tar, offset + size // 2)
    else:
        replace_member(
            tar, offset, size, {"size": (6, 4), "mode": (5, 4), "jpeg": (5, 4), "empty": None}[damage], damage
        )
    assert_named(root, 13, "not the PNG that it should be")


def replace_member(tar: Path, offset: int, size: int, image_size: tuple[int, int] | None, kind: str) -> None:
    """Put another, smaller picture, or nothing but zeros, where the PNG was."""
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = bytes(size)
    if image_size:
        path = tar.with_name("other")
        Image.new("L" if kind == "mode" else "RGB", image_size).save(path, "JPEG" if kind == "jpeg" else "PNG")
        other = path.read_bytes()[: 512 if kind == "jpeg" else size]
        content[offset : offset + len(other)] = other
    tar.write_bytes(content)


def test_changed_pixels_are_noticed_where_tars_are_verified(small):
    root, samples = small
    tar, _, offset = place_of(root, 13)
    flip_byte(tar, offset + 150, mask=1)
    assert (TarShards(root, "train").images([13])[0] != samples.images[13]).sum() == 1
    shards = TarShards(root, "train", verify=True)
    for wanted in (10, 13, 13):
        place = f"'train-s000{wanted}' at offset {place_of(root, wanted)[2]}: some bytes of the shard were changed"
        with pytest.raises(UnreadableShard, match=place):
            shards.images([wanted])
    np.testing.assert_array_equal(shards.images([0, 22]), samples.images[[0, 22]])


def test_a_tar_is_hashed_once(small, monkeypatch):
    root, _ = small
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 1)
    hashed = []
    sha256 = shards_module.sha256
    monkeypatch.setattr(shards_module, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    shards = TarShards(root, "train", verify=True)
    for _ in range(3):
        shards.images(range(23))
    assert [name for name in hashed if name.endswith(".tar")] == [f"train-{n:06d}.tar" for n in range(3)]


@pytest.fixture(scope="module")
def victims(tmp_path_factory) -> dict[str, tuple[Path, Samples, dict[str, bytes]]]:
    """One set per encoding, with the content of its files to restore them from."""
    sets = {}
    for encoding in ("npy", "png"):
        samples = random_samples(12, 8, 8)
        root = write_set(tmp_path_factory.mktemp("victims") / encoding, {"train": samples}, [5], encoding)
        sets[encoding] = root, samples, {path.name: path.read_bytes() for path in root.iterdir()}
    return sets


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_random_damage_never_changes_a_label_or_goes_unnamed(victims, data):
    """Cuts and byte flips anywhere: reading gives the right labels and keys, or an error that names the place; and the
    right pixels too, where they are verified or PNG.
    """
    root, samples, contents = victims[data.draw(st.sampled_from(["npy", "png"]))]
    name = data.draw(st.sampled_from(sorted(set(contents) - {"manifest.json"})))
    content = bytearray(contents[name])
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (root / name).write_bytes(content)
    try:
        _read_all(root, samples, name, verify=data.draw(st.booleans()))
    finally:
        (root / name).write_bytes(contents[name])


def _read_all(root: Path, samples: Samples, damaged: str, verify: bool) -> None:
    """Shard by shard, so that the whole ones are seen to be spared. Pixels of .npy files carry no checksum."""
    shards = TarShards(root, "train", verify)
    for number, rows in enumerate((range(5), range(5, 10), range(10, 12))):
        touched = damaged.startswith(f"train-{number:06d}")
        error, images = _try_reading(shards, samples, rows)
        if error:
            assert touched
            assert damaged in error
            assert damaged.endswith(".npy") or re.search(r": sample 'train-s\d+' at offset \d+: ", error)
            continue
        assert not (touched and (verify or damaged.endswith(".npy")))  # damage of an index never goes unnoticed
        assert (images == samples.images[rows]).all() or (touched and shards.manifest["encoding"] == "npy")


def _try_reading(shards: TarShards, samples: Samples, rows: range) -> tuple[str | None, np.ndarray | None]:
    try:
        assert shards.labels(rows).tolist() == samples.labels[rows].tolist()
        assert shards.keys(rows) == [f"train-s{i:05d}" for i in rows]
        return None, shards.images(rows)
    except UnreadableShard as error:
        return str(error), None


# ------------------------------------------------------------------------------------------------------- both sides


class MadeSource:
    """A source of shard_data with every column that there is."""

    name = "made"
    classes = ("zero", "one", "two")
    attributes = ("Smiling", "Bangs")
    columns = frozenset({"label", "attributes", "hidden", "identity"})
    splits = ("train", "test")
    image_shape = (6, 9, 3)

    def __init__(self):
        rng = np.random.default_rng(4)
        self.samples = {
            f"{split}_{i}": Sample(
                rng.integers(0, 256, self.image_shape, dtype=np.uint8),
                label=int(rng.integers(-1, 3)),
                attributes=rng.integers(-1, 2, 2).tolist(),
                hidden=rng.integers(0, 2, 2).astype(bool).tolist(),
                identity=int(rng.integers(-1, 9)),
            )
            for split, count in (("train", 50), ("test", 7))
            for i in range(count)
        }

    def transform(self):
        return {"made": "at random"}

    def description(self):
        return {}

    def records(self, split):
        return [Record(key, key) for key in self.samples if key.startswith(split)]

    def load(self, record):
        return self.samples[record.where]


def test_reader_reads_the_writer(tmp_path, encoding):
    """Written by shard_data, read by pipeline: the two know each other by the format alone."""
    source = MadeSource()
    convert(source, tmp_path / "made", encoding=encoding, shard_size=8)
    for split, count in (("train", 50), ("test", 7)):
        shards = TarShards(tmp_path / "made", split)
        samples = [source.samples[f"{split}_{i}"] for i in range(count)]
        order = np.random.default_rng(0).permutation(count)
        assert len(shards) == count
        assert shards.keys(order) == [f"{split}_{i}" for i in order]
        assert shards.labels(range(count)).tolist() == [sample.label for sample in samples]
        assert shards.attributes(range(count)).tolist() == [sample.attributes for sample in samples]
        np.testing.assert_array_equal(shards.images(order), np.stack([samples[i].image for i in order]))
        assert shards.classes == source.classes
        assert shards.attribute_names == source.attributes

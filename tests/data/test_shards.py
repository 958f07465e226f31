"""Random access to shard sets: the right pixels, labels and attributes; manifests that are refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.data import shards as shards_module
from pipeline.data.shards import TarShards, UnreadableShard
from shard_data.source import Record, Sample
from shard_data.writer import convert
from tests.helpers.shard_sets import Samples, edit_manifest, random_samples, setting, write_set


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


def test_no_indices_give_empty_arrays(small):
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
        assert len(os.listdir("/proc/self/fd")) - before <= 8


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("version", value=2), "version 2, but this release reads version 1"),
        (setting("format", value="pictures"), "format: Input should be 'webdataset-shards'"),
        (setting("encoding", value="jpeg"), "encoding: Input should be 'npy' or 'png'"),
        (setting("image", "channels", value=2), "image.channels: Input should be 1 or 3"),
        (setting("image", "height", value="28"), "image.height: Input should be a valid integer"),
        (setting("splits", "train", "count", value=24), "the shards hold 23 samples, but count says 24"),
        (
            setting("splits", "train", "shards", 0, "count", value=0),
            r"splits.train.shards.0.count: .* greater than or equal",
        ),
        (
            setting("splits", "train", "shards", 0, "file", value="../x.tar"),
            r"splits.train.shards.0.file: .* match pattern",
        ),
        (
            setting("splits", "train", "shards", 0, "file", value="/x.tar"),
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

"""Tars that are not what the manifest says: an error that names shard, sample and offset, and never a wrong sample."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import shards as shards_module
from pipeline.data.read_files import OpenFile
from pipeline.data.shards import TarShards, UnreadableShard
from tests.helpers.shard_sets import (
    Samples,
    assert_unreadable,
    flip_byte,
    place_of,
    random_samples,
    rewrite_index,
    set_field,
    write_set,
)


def test_a_missing_tar(small):
    (small[0] / "train-000001.tar").unlink()
    assert_unreadable(small[0], 10, "No such file")
    assert_unreadable(small[0], 15, "No such file", asked=[2, 15, 11])


def test_a_missing_tar_spares_the_other_shards(small):
    root, samples = small
    (root / "train-000001.tar").unlink()
    np.testing.assert_array_equal(TarShards(root, "train").images([0, 22]), samples.images[[0, 22]])


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_tar_cut_short(small, keep):
    os.truncate(small[0] / "train-000001.tar", keep)
    assert_unreadable(small[0], 10, f"the file has {keep} bytes, the manifest says")


def test_a_tar_cut_short_while_it_is_open(small):
    """An error, and not the signal that kills a process that has mapped the file."""
    root, _ = small
    shards = TarShards(root, "train")
    shards.images(range(23))
    os.truncate(root / "train-000001.tar", 0)
    with pytest.raises(UnreadableShard, match=r"train-000001\.tar: sample 'train-s00017' .* the file has 0 bytes"):
        shards.images([17])


def test_every_changed_byte_of_an_npy_header_is_noticed(small):
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
    assert_unreadable(root, 13, "its header is wrong", asked=[0, 12, 13])


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
    rewrite_index(root, "train-000001", lambda index: set_field(index, 0, "size", path.stat().st_size))
    assert_unreadable(root, 10, "not the .npy that it should be|the index gives it")


@pytest.mark.parametrize("change", ["bytes", "size", "mode", "jpeg", "empty"])
def test_a_changed_png(small_png, change):
    root, _ = small_png
    tar, _, offset = place_of(root, 13)
    size = int(np.load(root / "train-000001.index.npy")["size"][3])
    if change == "bytes":
        flip_byte(tar, offset + size // 2)
    else:
        replace_member(
            tar, offset, size, {"size": (6, 4), "mode": (5, 4), "jpeg": (5, 4), "empty": None}[change], change
        )
    assert_unreadable(root, 13, "not the PNG that it should be")


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
    monkeypatch.setattr(OpenFile, "sha256", lambda file, sha256=OpenFile.sha256: hashed.append(1) or sha256(file))
    shards = TarShards(root, "train", verify=True)
    for _ in range(3):
        shards.images(range(23))
    assert len(hashed) == 3


@pytest.fixture(scope="module")
def victims(tmp_path_factory) -> dict[str, tuple[Path, Samples, dict[str, bytes]]]:
    """One set per encoding, with the content of its files to restore them from."""
    sets = {}
    for encoding in ("npy", "png"):
        samples = random_samples(12, 8, 8)
        root = write_set(tmp_path_factory.mktemp("victims") / encoding, {"train": samples}, [5], encoding)
        sets[encoding] = root, samples, {path.name: path.read_bytes() for path in root.iterdir()}
    return sets


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_changes_never_change_a_label_or_go_unnamed(victims, data):
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


def _read_all(root: Path, samples: Samples, changed: str, verify: bool) -> None:
    """Shard by shard, so that the whole ones are seen to be spared. Pixels of .npy files carry no checksum."""
    shards = TarShards(root, "train", verify)
    for number, rows in enumerate((range(5), range(5, 10), range(10, 12))):
        touched = changed.startswith(f"train-{number:06d}")
        error, images = _try_reading(shards, samples, rows)
        if error:
            assert touched
            assert changed in error
            assert changed.endswith(".npy") or re.search(r": sample 'train-s\d+' at offset \d+: ", error)
            continue
        assert not (touched and (verify or changed.endswith(".npy")))  # a changed index never goes unnoticed
        assert (images == samples.images[rows]).all() or (touched and shards.manifest["encoding"] == "npy")


def _try_reading(shards: TarShards, samples: Samples, rows: range) -> tuple[str | None, np.ndarray | None]:
    try:
        assert shards.labels(rows).tolist() == samples.labels[rows].tolist()
        assert shards.keys(rows) == [f"train-s{i:05d}" for i in rows]
        return None, shards.images(rows)
    except UnreadableShard as error:
        return str(error), None

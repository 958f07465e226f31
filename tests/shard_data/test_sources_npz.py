"""npz: arrays of one's own become the same samples, mapped or unpacked; hostile and inconsistent files are named."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_data import DataError, Npz, convert
from shard_data.__main__ import main
from shard_data.sources.npz import MAX_UNPACKED
from shard_data.verify import verify

RNG = np.random.default_rng(0)


def arrays(count: int = 40, **changes) -> dict[str, np.ndarray]:
    """A valid set of arrays; a change of None removes one."""
    made = {
        "images": RNG.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8),
        "labels": RNG.integers(-1, 3, count),
        "classes": np.array(["cat", "dog", "Émeu"]),
        "attributes": RNG.integers(-1, 2, (count, 2)).astype(np.int8),
        "attribute_names": np.array(["Smiling", "Wearing_Hat"]),
    } | changes
    return {name: array for name, array in made.items() if array is not None}


def samples(folder: Path) -> list[dict]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_every_sample_is_what_the_arrays_say(tmp_path, save, encoding):
    made = arrays()
    save(tmp_path / "in.npz", **made)
    manifest = convert(Npz(tmp_path / "in.npz"), tmp_path / "out", encoding=encoding, workers=2, shard_size=7)
    assert verify(tmp_path / "out", decode=True) == []
    assert manifest["classes"] == ["cat", "dog", "Émeu"]
    assert manifest["attributes"] == ["Smiling", "Wearing_Hat"]
    found = {sample["json"]["index"]: sample for sample in samples(tmp_path / "out")}
    assert sorted(found) == list(range(40))
    for i, sample in found.items():
        picture = sample["npy"] if encoding == "npy" else np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert np.array_equal(picture, made["images"][i])
        assert sample.get("cls", -1) == made["labels"][i]
        assert list(sample["json"]["attributes"].values()) == made["attributes"][i].tolist()


def test_stored_and_compressed_files_give_the_same_bytes(tmp_path):
    made = arrays()
    np.savez(tmp_path / "a.npz", **made)
    np.savez_compressed(tmp_path / "b.npz", **made)
    fingerprints = {convert(Npz(tmp_path / f"{n}.npz"), tmp_path / n)["fingerprint"] for n in "ab"}
    assert len(fingerprints) == 1
    assert isinstance(Npz(tmp_path / "a.npz").arrays.images, np.memmap)
    assert not isinstance(Npz(tmp_path / "b.npz").arrays.images, np.memmap)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.sampled_from([(4, 5), (4, 5, 1), (4, 5, 3)]), st.booleans(), st.booleans())
def test_shapes_and_orders_of_any_kind_are_read(tmp_path, count, shape, compressed, fortran):
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "in.npz", images=np.asfortranarray(images) if fortran else images)
    source = Npz(tmp_path / "in.npz", val=0, test=0)
    expected = images[..., None] if len(shape) == 2 else images
    assert source.image_shape == expected.shape[1:]
    found = [source.load(record).image for record in source.records("train")]
    assert np.array_equal(np.stack(found), expected)
    assert source.columns == frozenset()
    assert source.classes is source.attributes is None


def test_the_split_by_hash_is_a_partition_that_lasts(tmp_path):
    made = arrays(400)
    np.savez(tmp_path / "in.npz", **made)
    source = Npz(tmp_path / "in.npz", val=0.2, test=0.3)
    split = {name: {record.where for record in source.records(name)} for name in source.splits}
    assert sorted(i for rows in split.values() for i in rows) == list(range(400))
    assert 50 < len(split["val"]) < 110
    assert 80 < len(split["test"]) < 160
    np.savez(tmp_path / "more.npz", images=np.concatenate([made["images"]] * 2))
    more = Npz(tmp_path / "more.npz", val=0.2, test=0.3)
    for name, rows in split.items():  # an image stays in its split when others come
        assert {record.where for record in more.records(name) if record.where < 400} == rows


def test_names_are_made_where_none_are_given(tmp_path):
    np.savez(tmp_path / "in.npz", **arrays(classes=None, attribute_names=None))
    source = Npz(tmp_path / "in.npz")
    assert source.classes == ("0", "1", "2")
    assert source.attributes == ("attribute_00", "attribute_01")


def test_the_source_pickles_without_pixels(tmp_path):
    np.savez(tmp_path / "in.npz", **arrays(1000))
    source = Npz(tmp_path / "in.npz")
    assert source.arrays.images.nbytes > 50_000
    assert len(pickle.dumps(source)) < 500


WRONG = {
    "objects": ({"labels": np.array([{}] * 40, object)}, "'labels' holds Python objects, which are not read"),
    "an unknown array": ({"label": np.zeros(40)}, "unknown array 'label'; known: images, labels"),
    "no images": ({"images": None}, "holds no array 'images'; it has: attribute_names, attributes, classes, labels"),
    "floats": ({"images": np.zeros((40, 6, 5, 3))}, "images are float64; give uint8"),
    "channels first": ({"images": np.zeros((40, 3, 6, 6), np.uint8)}, "with 1 or 3 channels C, last"),
    "no image": ({"images": np.zeros((0, 6, 5, 3), np.uint8)}, r"'images' has shape \(0, 6, 5, 3\)"),
    "huge sides": ({"images": np.zeros((1, 1, 1025, 1), np.uint8), "labels": None}, "sides up to 1024"),
    "too few labels": ({"labels": np.zeros(39, np.int64)}, r"labels are int64 \(39,\); give whole numbers \(40,\)"),
    "labels as floats": ({"labels": np.full(40, np.nan)}, "labels are float64"),
    "negative labels": ({"labels": np.full(40, -2)}, "labels run from -2 to -2"),
    "endless labels": ({"labels": np.full(40, 2**40), "classes": None}, "labels run from 1099511627776"),
    "a label without a class": ({"labels": np.full(40, 3)}, "label 3 and only 3 classes"),
    "classes without labels": ({"labels": None}, "classes and no labels"),
    "two classes of one name": ({"classes": np.array(["a", "b", "a"])}, "classes hold 'a'; give each name once"),
    "a class without a name": ({"classes": np.array(["a", "", "c"])}, "classes hold ''"),
    "a class that moves the cursor": ({"classes": np.array(["a", "\x1b[2J", "c"])}, r"classes hold '\\x1b\[2J'"),
    "names as bytes": ({"classes": np.array([b"a", b"b", b"c"])}, "classes are [|]S1"),
    "attributes of 2": ({"attributes": np.full((40, 2), 2)}, "attributes run from 2 to 2"),
    "attributes as floats": ({"attributes": np.ones((40, 2))}, "attributes are float64"),
    "too few names": ({"attribute_names": np.array(["a"])}, "1 attribute_names for 2 columns"),
    "names of no attributes": ({"attributes": None}, "attribute_names and no attributes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_inconsistent_file_is_refused_by_name(tmp_path, capsys, what):
    changes, message = WRONG[what]
    path = tmp_path / "in.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(DataError, match=message) as error:
        convert(Npz(path), tmp_path / "out")
    assert str(path) in str(error.value)
    assert main(["npz", "--source", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def header_of(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


HOSTILE = {
    "a promise of more than there is": {"images.npy": header_of("(99999999, 999, 999, 3)") + bytes(100)},
    "code for a header": {"images.npy": header_of("(__import__('os').getpid(),)") + bytes(4)},
    "a way out of the folder": {"../images.npy": npy(np.zeros((1, 4, 4, 3), np.uint8))},
    "no array at all": {"images.npy": b"GIF89a"},
    "nothing": {},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path, what):
    path = write_zip(tmp_path / "in.npz", HOSTILE[what])
    with pytest.raises(DataError, match=r"in\.npz"):
        convert(Npz(path), tmp_path / "out")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    side = 1024
    count = MAX_UNPACKED // (side * side * 3) + 1
    path = tmp_path / "in.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as file:
        file.write(header_of(f"({count}, {side}, {side}, 3)"))
        for _ in range(count):
            file.write(bytes(side * side * 3))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"compressed and \d+ MiB large; write it with numpy.savez"):
        convert(Npz(path), tmp_path / "out")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_never_becomes_a_set(tmp_path, save):
    """Cut or flipped anywhere: refused, or what was damaged is not used (names and sizes of the archive itself)."""
    made = arrays(settings=None)
    save(tmp_path / "good.npz", **made)
    good = (tmp_path / "good.npz").read_bytes()
    reference = convert(Npz(tmp_path / "good.npz"), tmp_path / "good")["fingerprint"]
    refused = 0
    rng = np.random.default_rng(1)
    for trial in range(40):
        damaged = bytearray(good)
        place = int(rng.integers(len(good)))
        if trial % 4 == 0:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            assert convert(Npz(tmp_path / "bad.npz"), tmp_path / "out", overwrite=True)["fingerprint"] == reference
        except DataError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("source", ["missing.npz", "folder"])
def test_a_source_that_is_no_file_is_named(tmp_path, source):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=source):
        convert(Npz(tmp_path / source), tmp_path / "out")

"""folder: classes, given and hashed splits, skipped files, pixels of plain Pillow."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_data import DataError, Folder, convert
from shard_data.__main__ import main
from shard_data.errors import Incomplete
from shard_data.verify import verify


def picture(seed: int, size=(40, 30)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / path)
    return root


def samples(folder: Path, split: str) -> dict[str, dict]:
    """Every sample of a split by the file that it comes from."""
    tars = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    found = webdataset.WebDataset(tars, shardshuffle=False).decode()
    return {sample["json"]["file"]: sample for sample in found}


def splits_of(source: Folder) -> dict[str, str]:
    source.description()
    return {record.where[0]: split for split in source.splits for record in source.records(split)}


CLASSES = [f"{name}/{i}.png" for name in ("cat", "dog", "Émeu") for i in range(6)]


def test_sub_folders_are_classes_and_pixels_are_plain_pillow(tmp_path):
    write(tmp_path / "in", *CLASSES)
    manifest = convert(Folder(tmp_path / "in", 32, val=0, test=0), tmp_path / "out", shard_size=5, shuffle_seed=0)
    assert manifest["classes"] == ["cat", "dog", "Émeu"]
    assert list(manifest["splits"]) == ["train"]
    assert verify(tmp_path / "out", decode=True) == []
    found = samples(tmp_path / "out", "train")
    assert found.keys() == set(CLASSES)
    for seed, path in enumerate(CLASSES):
        plain = picture(seed).resize((42, 32), Image.Resampling.BILINEAR).crop((5, 0, 37, 32))
        assert np.array_equal(found[path]["npy"], np.asarray(plain))
        assert manifest["classes"][found[path]["cls"]] == path.split("/")[0]


@pytest.mark.parametrize("paths", [("a.png", "b.jpg"), CLASSES])
def test_without_classes_there_are_no_labels(tmp_path, paths):
    source = Folder(write(tmp_path / "in", *paths), use_classes=len(paths) < 3, val=0, test=0)
    assert convert(source, tmp_path / "out")["classes"] is None
    assert "label" not in np.load(tmp_path / "out" / "train-000000.index.npy").dtype.names
    assert len(samples(tmp_path / "out", "train")) == len(paths)


def test_given_split_folders_are_the_splits(tmp_path):
    paths = ["train/x/1.png", "train/y/2.png", "validation/x/3.png", "test/y/deep/4.png"]
    source = Folder(write(tmp_path / "in", *paths))
    assert splits_of(source) == dict(zip(paths, ("train", "train", "val", "test"), strict=True))
    manifest = convert(source, tmp_path / "out")
    assert manifest["classes"] == ["x", "y"]
    assert manifest["source"]["splits"] == "given"
    assert samples(tmp_path / "out", "test")["test/y/deep/4.png"]["cls"] == 1


def test_an_image_outside_of_given_splits_is_named(tmp_path):
    write(tmp_path / "in", "train/x/1.png", "extra/2.png")
    with pytest.raises(DataError, match=r"extra/2\.png: outside of train, val and test"):
        convert(Folder(tmp_path / "in"), tmp_path / "out")


def test_ambiguous_classes_are_named(tmp_path):
    write(tmp_path / "in", "1.png", "cat/2.png")
    with pytest.raises(DataError, match=r"1\.png is in no subfolder, but cat/2\.png is, .*--no-classes"):
        convert(Folder(tmp_path / "in"), tmp_path / "out")


@given(kept=st.sets(st.integers(0, 59), min_size=1), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_hashed_split_of_an_image_depends_on_nothing_but_its_path_and_the_seed(tmp_path_factory, kept, seed):
    root, part = tmp_path_factory.mktemp("all"), tmp_path_factory.mktemp("part")
    for i in range(60):
        for folder in [root] + ([part] if i in kept else []):
            (folder / f"{i}.png").touch()
    whole = splits_of(Folder(root, val=0.2, test=0.3, split_seed=seed))
    assert splits_of(Folder(part, val=0.2, test=0.3, split_seed=seed)) == {f"{i}.png": whole[f"{i}.png"] for i in kept}


def test_the_rule_of_the_split_stays(tmp_path):
    """Sets that were made before keep their splits."""
    names = [f"{i}.png" for i in range(300)]
    for name in names:
        (tmp_path / name).touch()
    shares = {name: int(hashlib.sha256(f"7:{name}".encode()).hexdigest()[:16], 16) / 2**64 for name in names}
    expected = {name: "test" if share < 0.1 else "val" if share < 0.3 else "train" for name, share in shares.items()}
    assert splits_of(Folder(tmp_path, val=0.2, test=0.1, split_seed=7)) == expected
    by_share = sorted(names, key=shares.get)
    numbered = splits_of(Folder(tmp_path, val=30, test=5, split_seed=7))
    assert [numbered[name] for name in by_share] == ["test"] * 5 + ["val"] * 30 + ["train"] * 265


def test_numbers_of_images_give_splits_of_exactly_that_size(tmp_path):
    """They are nested: the images of a smaller val are in a larger one; another seed takes others."""
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
    found = {}
    for val, test, seed in ((30, 0, 0), (50, 0, 0), (30, 20, 0), (30, 0, 1)):
        splits = splits_of(Folder(tmp_path, val=val, test=test, split_seed=seed))
        of = {split: {path for path in splits if splits[path] == split} for split in ("train", "val", "test")}
        assert {split: len(paths) for split, paths in of.items()} == {
            "train": 300 - val - test,
            "val": val,
            "test": test,
        }
        found[val, test, seed] = of
    assert found[30, 0, 0]["val"] < found[50, 0, 0]["val"] == found[30, 20, 0]["val"] | found[30, 20, 0]["test"]
    assert found[30, 0, 0]["val"] != found[30, 0, 1]["val"]
    with pytest.raises(DataError, match="val 300 and test 0 of 300 images leave none for train"):
        splits_of(Folder(tmp_path, val=300, test=0))


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "00000/00000.png"])
def test_a_face_of_1024_pixels_is_pillows_bilinear_reduction(tmp_path, name):
    """As the recipes for CelebA-HQ and FFHQ make their sets, by their own commands."""
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(1).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    words = "folder --size 256 --no-classes --val 0 --test 0 --workers 1".split()
    assert main([*words, "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    plain = np.asarray(Image.open(path).resize((256, 256), Image.Resampling.BILINEAR))
    assert np.array_equal(samples(tmp_path / "out", "train")[name]["npy"], plain)


def test_hashed_split_has_about_the_given_shares(tmp_path):
    for i in range(2000):
        (tmp_path / f"{i}.png").touch()
    found = list(splits_of(Folder(tmp_path, val=0.1, test=0.2)).values())
    assert abs(found.count("val") - 200) < 60
    assert abs(found.count("test") - 400) < 80
    assert found != list(splits_of(Folder(tmp_path, val=0.1, test=0.2, split_seed=1)).values())
    assert found[:5] == list(splits_of(Folder(tmp_path, val=0.1, test=0.2)).values())[:5]


def spoil(root: Path) -> dict[str, str]:
    """Files that cannot be converted, and a part of the reason for each."""
    (root / "cat/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (root / "cat/empty.png").write_bytes(b"")
    (root / "dog/phone.HEIC").write_bytes(b"ftypheic")
    picture(1, (1000, 3)).save(root / "dog/strip.png")
    picture(1).save(root / "dog/moving.gif", save_all=True, append_images=[picture(2)])
    (root / "dog/gone.png").symlink_to(root / "nowhere.png")
    (root / "dog/device.png").symlink_to("/dev/null")  # of /dev/zero, and of a pipe, there would be no end
    (root / "linked").symlink_to(root / "cat")
    return {
        "cat/broken.jpg": "cannot be decoded",
        "cat/empty.png": "known format",
        "dog/phone.HEIC": ".heic images are not supported",
        "dog/strip.png": "1000 x 3 pixels, too elongated",
        "dog/moving.gif": "2 frames",
        "dog/gone.png": "No such file",
        "dog/device.png": "not a regular file",
        "linked": "a link to a folder",
    }


def test_unreadable_images_are_listed_and_other_files_are_counted(tmp_path, capsys):
    root = write(tmp_path / "in", *CLASSES)
    reasons = spoil(root)
    for name in ("README.md", "cat/labels.csv", ".hidden.png", "__MACOSX/._1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("text")
    words = ["folder", "--source", str(root), "--out", str(tmp_path / "out"), "--workers", "1", "--size", "16"]
    assert main(words) == 2
    assert "files missing or unreadable" in capsys.readouterr().err
    assert main([*words, "--partial"]) == 0
    source = Folder(root, 16)
    manifest = convert(source, tmp_path / "api", partial=True, workers=2, shard_size=3)
    listed = {name: o["reason"] for o in manifest["omitted"] for name in o["names"]}
    assert listed.keys() == reasons.keys()
    assert all(reasons[name] in listed[name] for name in reasons)
    assert manifest["source"]["ignored_files"] == {".csv": 1, ".md": 1}
    kept = {path for split in manifest["splits"] for path in samples(tmp_path / "api", split)}
    assert kept == set(CLASSES)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_in_another_encoding_are_listed(tmp_path):
    root = write(tmp_path / "in", "good.png")
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "good.png").read_bytes())
    with pytest.raises(Incomplete, match=r"its name is not UTF-8; rename it: caf\\xe9\.png"):
        convert(Folder(root), tmp_path / "out")
    assert convert(Folder(root), tmp_path / "out", partial=True)["omitted"][0]["names"] == ["caf\\xe9.png"]


def test_dots_spaces_and_long_names_are_no_matter(tmp_path):
    paths = ["a.b.c.png", "with space.PNG", "x" * 200 + ".png", "Ünïcödé.png"]
    manifest = convert(Folder(write(tmp_path / "in", *paths), val=0, test=0), tmp_path / "out")
    assert samples(tmp_path / "out", "train").keys() == set(paths)
    assert verify(tmp_path / "out", decode=True) == []
    assert manifest["splits"]["train"]["count"] == 4


def test_the_command_shuffles_and_records_it(tmp_path):
    root = write(tmp_path / "in", *CLASSES)
    words = ["folder", "--source", str(root), "--size", "16", "--val", "0", "--test", "0", "--workers", "1"]
    orders = {}
    for name, more in (("default", []), ("again", []), ("seed 1", ["--shuffle", "1"]), ("none", ["--shuffle", "none"])):
        out = tmp_path / name
        assert main([*words, *more, "--out", str(out)]) == 0
        orders[name] = list(samples(out, "train"))
    assert orders["none"] == sorted(CLASSES)
    assert orders["default"] == orders["again"]
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(sorted(order) == sorted(CLASSES) for order in orders.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size 7"),
        ({"size": 1025}, "size 1025"),
        ({"fit": "stretch"}, "fit 'stretch'"),
        ({"filter": "nearest"}, "filter 'nearest'"),
        ({"val": 0.5, "test": 0.5}, "sum is below 1"),
        ({"val": -0.1}, "shares from 0 to 1"),
        ({"val": 3, "test": 0.1}, "or both whole numbers"),
        ({"val": 3.5, "test": 0}, "or both whole numbers"),
        ({"val": -3, "test": 4}, "or both whole numbers"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        Folder(tmp_path, **options)


def test_no_folder_and_no_image(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Folder(tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no images found"):
        convert(Folder(tmp_path / "in"), tmp_path / "out")


def test_a_changed_folder_is_another_conversion(tmp_path, monkeypatch):
    """An unfinished conversion is resumed only if the folder still holds the same files."""
    root = write(tmp_path / "in", *[f"{i}.png" for i in range(8)])
    load = Folder.load

    def failing(self, record):
        if record.key == "train-0000005":
            raise OSError(5, "the cable was pulled", "5.png")
        return load(self, record)

    monkeypatch.setattr(Folder, "load", failing)
    with pytest.raises(DataError, match="cable"):
        convert(Folder(root, val=0, test=0), tmp_path / "out", shard_size=2)
    monkeypatch.setattr(Folder, "load", load)
    (root / "0.png").unlink()
    write(root, "9.png")
    convert(Folder(root, val=0, test=0), tmp_path / "out", shard_size=2)
    assert samples(tmp_path / "out", "train").keys() == {f"{i}.png" for i in (1, 2, 3, 4, 5, 6, 7, 9)}


def test_jpeg_of_a_camera_held_upright_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    buffer = io.BytesIO()
    picture(1, (60, 20)).save(buffer, "JPEG", quality=95, exif=exif)
    (tmp_path / "in" / "x.jpg").write_bytes(buffer.getvalue())
    convert(Folder(tmp_path / "in", 20, val=0, test=0), tmp_path / "out")
    turned = Image.open(buffer).transpose(Image.Transpose.ROTATE_270).crop((0, 20, 20, 40))
    assert np.array_equal(samples(tmp_path / "out", "train")["x.jpg"]["npy"], np.asarray(turned))

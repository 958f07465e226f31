"""celeba: pixels of a plain Pillow crop and resize, all forms of lists and images, missing and unreadable files."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_data import CelebA, DataError, convert
from shard_data.__main__ import main
from shard_data.errors import Incomplete
from shard_data.sources.celeba import parse_crop
from shard_data.verify import verify

NAMES = [f"{i:06d}.jpg" for i in range(1, 13)]
ATTRIBUTES = [f"Attribute_{i:02d}" for i in range(40)]
PARTITION = [0, 0, 1, 0, 2, 0, 0, 1, 0, 2, 0, 0]
RNG = np.random.default_rng(3)
VALUES = RNG.integers(0, 2, (12, 40))
PEOPLE = RNG.integers(1, 10177, 12).tolist()
CROPS = {
    "box148": (15, 40, 163, 188),
    "center108": (35, 55, 143, 163),
    "center140": (19, 39, 159, 179),
    "center178": (0, 20, 178, 198),
    "30,50,100,90": (30, 50, 100, 90),
}
LINE_ENDS = {"LF": "\n", "CRLF": "\r\n"}


def jpeg(seed: int, size=(178, 218)) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (11, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PICTURES = {name: jpeg(i) for i, name in enumerate(NAMES)}


def texts(end: str = "\n") -> dict[str, bytes]:
    """The lists as the authors publish them."""
    rows = [f"{n} " + " ".join(f"{2 * v - 1:2d}" for v in row) for n, row in zip(NAMES, VALUES, strict=True)]
    lists = {
        "list_attr_celeba.txt": [str(len(NAMES)), " ".join(ATTRIBUTES) + " ", *rows],
        "list_eval_partition.txt": [f"{n} {p}" for n, p in zip(NAMES, PARTITION, strict=True)],
        "identity_CelebA.txt": [f"{n} {p}" for n, p in zip(NAMES, PEOPLE, strict=True)],
    }
    return {name: "".join(line + end for line in lines).encode() for name, lines in lists.items()}


def kaggle(end: str = "\n") -> dict[str, bytes]:
    rows = [",".join([n, *(str(2 * v - 1) for v in row)]) for n, row in zip(NAMES, VALUES, strict=True)]
    lists = {
        "list_attr_celeba.csv": [",".join(["image_id", *ATTRIBUTES]), *rows],
        "list_eval_partition.csv": ["image_id,partition", *(f"{n},{p}" for n, p in zip(NAMES, PARTITION, strict=True))],
    }
    return {name: "".join(line + end for line in lines).encode() for name, lines in lists.items()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(pictures: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("img_align_celeba/", b"")
        for name, data in pictures.items():
            archive.writestr(f"img_align_celeba/{name}", data)
    return buffer.getvalue()


def under(folder: str, pictures: dict[str, bytes] = PICTURES) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in pictures.items()}


def moved(files: dict[str, bytes]) -> dict[str, bytes]:
    return {("Eval/" if "partition" in name else "Anno/") + name: data for name, data in files.items()}


LAYOUTS = {
    "folder": lambda: texts() | under("img_align_celeba"),
    "CRLF": lambda: texts("\r\n") | under("img_align_celeba"),
    "as published": lambda: moved(texts("\r\n")) | {"Img/img_align_celeba.zip": zipped(PICTURES)},
    "Img": lambda: moved(texts()) | under("Img/img_align_celeba"),
    "zip": lambda: texts() | {"img_align_celeba.zip": zipped(PICTURES)},
    "stored zip": lambda: texts() | {"img_align_celeba.zip": zipped(PICTURES, zipfile.ZIP_STORED)},
    "kaggle": lambda: kaggle() | under("img_align_celeba/img_align_celeba"),
    "kaggle CRLF": lambda: kaggle("\r\n") | under("img_align_celeba/img_align_celeba"),
}


@pytest.fixture
def originals(tmp_path) -> Path:
    return write(tmp_path / "originals", LAYOUTS["folder"]())


def samples(folder: Path, split: str) -> list[dict]:
    import webdataset

    tars = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))


def expected(data: bytes, box=CROPS["box148"], size=64, filter=Image.Resampling.BILINEAR) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).crop(box).resize((size, size), filter))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_attributes_identities_and_splits_of_every_layout(tmp_path, layout):
    folder = write(tmp_path / "originals", LAYOUTS[layout]())
    manifest = convert(CelebA(folder), tmp_path / "out", shard_size=4, workers=1 + ("zip" in layout))
    assert verify(tmp_path / "out", decode=True) == []
    assert manifest["attributes"] == ATTRIBUTES
    assert manifest["omitted"] == []
    for number, split in enumerate(("train", "val", "test")):
        members = [i for i, p in enumerate(PARTITION) if p == number]
        found = samples(tmp_path / "out", split)
        assert [sample["__key__"] + ".jpg" for sample in found] == [NAMES[i] for i in members]
        for sample, i in zip(found, members, strict=True):
            assert np.array_equal(sample["npy"], expected(PICTURES[NAMES[i]]))
            assert sample["json"]["attributes"] == dict(zip(ATTRIBUTES, VALUES[i].tolist(), strict=True))
            assert sample["json"].get("identity") == (None if "kaggle" in layout else PEOPLE[i])
    rows = np.load(tmp_path / "out" / "val-000000.index.npy")
    assert np.array_equal(rows["attributes"], VALUES[[2, 7]])
    assert ("identity" in rows.dtype.names) == ("kaggle" not in layout)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("size", "filter"), [(32, "lanczos"), (128, "bicubic"), (64, "box"), (140, "bilinear")])
def test_crops_sizes_and_filters_are_plain_pillow_and_recorded(originals, tmp_path, crop, size, filter):
    manifest = convert(CelebA(originals, size, crop, filter), tmp_path / "out")
    assert manifest["transform"] == {"crop": list(CROPS[crop]), "size": size, "filter": filter}
    first = samples(tmp_path / "out", "val")[0]["npy"]
    assert np.array_equal(first, expected(PICTURES[NAMES[2]], CROPS[crop], size, Image.Resampling[filter.upper()]))


def test_layouts_of_one_content_have_one_fingerprint(tmp_path):
    prints = set()
    for layout in ("folder", "CRLF", "as published", "zip"):
        folder = write(tmp_path / layout / "in", LAYOUTS[layout]())
        prints.add(convert(CelebA(folder), tmp_path / layout / "out")["fingerprint"])
    assert len(prints) == 1


@pytest.mark.parametrize("crop", ["box149", "center219", "center0", "1,2,3", "0,0,179,10", "5,5,5,9", "9,9,3,12", ""])
def test_boxes_that_are_none_or_outside_are_refused(crop):
    with pytest.raises(DataError, match="crop"):
        parse_crop(crop)


@pytest.mark.parametrize(("option", "value"), [("size", 31), ("size", 257), ("filter", "sinc"), ("crop", "face")])
def test_options_out_of_range_are_refused(originals, option, value):
    with pytest.raises(DataError, match=option):
        CelebA(originals, **{option: value})


def spoil_rows(folder: Path) -> None:
    """Missing image, image without row, attributes without row, damaged image, wrong size, a page for an image."""
    images = folder / "img_align_celeba"
    (images / NAMES[0]).unlink()
    (images / "999999.jpg").write_bytes(PICTURES[NAMES[0]])
    path = folder / "list_attr_celeba.txt"
    lines = path.read_text().replace("12\n", "11\n", 1).splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(NAMES[1])))
    (images / NAMES[2]).write_bytes(PICTURES[NAMES[2]][:-900])
    (images / NAMES[3]).write_bytes(jpeg(1, (89, 109)))
    (images / NAMES[4]).write_bytes(b"<!DOCTYPE html><title>Quota exceeded</title>")


LISTED = {
    ("train", "no such image", NAMES[0]),
    ("none", "no row in list_eval_partition.txt", "999999.jpg"),
    ("train", "no row in list_attr_celeba.txt", NAMES[1]),
}
UNREADABLE = {("val", NAMES[2]), ("train", NAMES[3]), ("test", NAMES[4])}


def test_missing_and_unreadable_images_stop_with_a_list_and_the_command_to_skip_them(originals, tmp_path, capsys):
    spoil_rows(originals)
    words = ["celeba", "--source", str(originals), "--out", str(tmp_path / "out dir"), "--workers", "1"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert all(
        f"{split.replace('none', 'no split')}: 1 file, {reason}: {name}" in message for split, reason, name in LISTED
    )
    assert message.splitlines()[-1].endswith(f"--out '{tmp_path / 'out dir'}' --workers 1 --partial")
    assert not (tmp_path / "out dir").exists()
    assert main([*words, "--partial"]) == 0
    assert main(["verify", str(tmp_path / "out dir"), "--decode"]) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_partial_set_lists_every_omission_with_its_reason(originals, tmp_path, workers):
    spoil_rows(originals)
    manifest = convert(CelebA(originals), tmp_path / "out", partial=True, shard_size=2, workers=workers)
    entries = {(o["split"], o["reason"], name) for o in manifest["omitted"] for name in o["names"]}
    assert entries >= LISTED
    assert {(split, name) for split, _, name in entries - LISTED} == UNREADABLE
    assert all(o["count"] == len(o["names"]) for o in manifest["omitted"])
    reasons = {name: reason for _, reason, name in entries}
    assert "truncated" in reasons[NAMES[2]]
    assert reasons[NAMES[3]] == "89 x 109 pixels instead of 178 x 218"
    kept = [sample["__key__"] for split in ("train", "val", "test") for sample in samples(tmp_path / "out", split)]
    gone = {name for _, name in UNREADABLE} | {name for _, _, name in LISTED}
    assert sorted(kept) == [name[:-4] for name in NAMES if name not in gone]


def test_all_unreadable_images_are_listed_and_after_a_fix_only_their_shards_are_written_again(
    originals, tmp_path, monkeypatch
):
    damaged = {NAMES[1]: b"", NAMES[8]: b"\xff\xd8\xff", NAMES[9]: b"text"}
    write(originals / "img_align_celeba", damaged)
    with pytest.raises(Incomplete) as failure:
        convert(CelebA(originals), tmp_path / "out", shard_size=2)
    assert all(name in str(failure.value) for name in damaged)
    assert not (tmp_path / "out" / "manifest.json").exists()
    write(originals / "img_align_celeba", {name: PICTURES[name] for name in damaged})
    loaded, load = [], CelebA.load
    monkeypatch.setattr(CelebA, "load", lambda self, record: (loaded.append(record.key), load(self, record))[1])
    manifest = convert(CelebA(originals), tmp_path / "out", shard_size=2)
    assert manifest["omitted"] == []
    assert {f"{key}.jpg" for key in loaded} == {NAMES[0], NAMES[1], NAMES[6], NAMES[8], NAMES[4], NAMES[9]}
    assert manifest == convert(CelebA(originals), tmp_path / "uninterrupted", shard_size=2)


def test_a_shard_without_readable_images_is_deleted_and_a_set_without_any_is_refused(originals, tmp_path):
    write(originals / "img_align_celeba", {NAMES[2]: b"", NAMES[7]: b""})
    manifest = convert(CelebA(originals), tmp_path / "out", partial=True)
    assert list(manifest["splits"]) == ["train", "test"]
    assert not list((tmp_path / "out").glob("val-*"))
    write(originals / "img_align_celeba", dict.fromkeys(NAMES, b""))
    with pytest.raises(DataError, match="no original could be read"):
        convert(CelebA(originals), tmp_path / "nothing", partial=True)


def rows(text: bytes, edit) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join(edit(lines))


BAD_LISTS = {
    "web page": ("list_attr_celeba.txt", lambda _: b"<!DOCTYPE html><title>Quota exceeded</title>", "Quota exceeded"),
    "empty": ("list_eval_partition.txt", lambda _: b"", "is an empty file"),
    "pointer": ("identity_CelebA.txt", lambda _: b"\0.git/annex/objects/x", "git-annex pointer"),
    "fewer rows": ("list_attr_celeba.txt", lambda text: rows(text, lambda lines: lines[:-3]), "says 12 rows.* 9"),
    "torn row": ("list_attr_celeba.txt", lambda text: text[:-9], r"row 12 \('000012.jpg'\)"),
    "39 names": (
        "list_attr_celeba.txt",
        lambda text: text.replace(b"Attribute_39", b""),
        "39 attributes instead of 40",
    ),
    "strange value": (
        "list_attr_celeba.txt",
        lambda text: text.replace(b" -1", b" +7", 1),
        "from -1 to 7, not -1 to 1",
    ),
    "fourth split": ("list_eval_partition.txt", lambda text: text.replace(b" 2", b" 3"), "0 to 3, not 0 to 2"),
    "twice": ("list_eval_partition.txt", lambda text: text + b"000001.jpg 0\n", r"row 13 \('000001.jpg'\)"),
    "path": ("list_eval_partition.txt", lambda text: text + b"../../etc/x.jpg 0\n", "row 13"),
    "no count": ("list_attr_celeba.txt", lambda text: text.split(b"\n", 1)[1], "instead of the number of its rows"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_named_and_leave_nothing(originals, tmp_path, case, capsys):
    name, spoil, message = BAD_LISTS[case]
    (originals / name).write_bytes(spoil((originals / name).read_bytes()))
    with pytest.raises(DataError, match=message):
        convert(CelebA(originals), tmp_path / "out", partial=True)
    assert main(["celeba", "--source", str(originals), "--out", str(tmp_path / "out")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_parts_are_named(originals, tmp_path):
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        data = (originals / name).read_bytes()
        (originals / name).unlink()
        with pytest.raises(DataError, match=name):
            convert(CelebA(originals), tmp_path / "out")
        (originals / name).write_bytes(data)
    with pytest.raises(DataError, match="does not hold img_align_celeba/ with JPEGs or img_align_celeba.zip"):
        convert(CelebA(write(tmp_path / "lists", texts())), tmp_path / "out")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


def test_hostile_zips_write_nothing_and_their_damage_is_named(tmp_path):
    outside = {f"../../{NAMES[0]}": b"", "/etc/passwd.jpg": b"", "../outside.jpg": b"x"}
    data = zipped(PICTURES)
    place = data.index(NAMES[2].encode()) + 500
    folder = write(tmp_path / "in", texts() | {"img_align_celeba.zip": flipped(data, place)})
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "a") as archive:
        for name in list(outside)[1:]:
            archive.writestr(name, outside[name])
    manifest = convert(CelebA(folder), tmp_path / "out", partial=True)
    names = {name: o["reason"] for o in manifest["omitted"] for name in o["names"]}
    assert names.keys() == {NAMES[2], "passwd.jpg", "outside.jpg"}
    assert names[NAMES[2]] == "damaged in img_align_celeba.zip"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "a") as archive:
        archive.writestr(f"../../{NAMES[0]}", b"")
    with pytest.raises(DataError, match="several files of the same name"):
        convert(CelebA(folder), tmp_path / "out2", partial=True)


@pytest.mark.parametrize(
    ("data", "what"), [(b"<html><title>Quota</title>", "'Quota'"), (b"", "an empty file"), (b"PK\x03\x04", "ZIP")]
)
def test_something_else_in_place_of_the_zip_is_named(tmp_path, data, what):
    folder = write(tmp_path / "in", texts() | {"img_align_celeba.zip": data})
    with pytest.raises(DataError, match=f"img_align_celeba.zip: cannot be read as a ZIP.*{what}"):
        convert(CelebA(folder), tmp_path / "out", partial=True)


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    data = zipped({**PICTURES, NAMES[0]: bytes(10_000_000)})
    size = (10_000_000).to_bytes(4, "little")
    data = data.replace(size, (5_000).to_bytes(4, "little"))
    folder = write(tmp_path / "in", texts() | {"img_align_celeba.zip": data})
    manifest = convert(CelebA(folder), tmp_path / "out", partial=True)
    assert manifest["omitted"][0]["names"] == [NAMES[0]]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Path]:
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: aligned faces of CelebA are needed")
    folder = Path(os.environ["REAL_DATA_DIR"])
    out = tmp_path_factory.mktemp("celeba") / "out"
    return folder, out


@pytest.mark.slow
def test_the_real_faces_are_a_plain_pillow_crop_and_resize(real):
    folder, out = real
    manifest = convert(CelebA(folder / "celeba"), out, partial=True, workers=2)
    assert [entry["count"] for entry in manifest["splits"].values()] == [4000, 500, 500]
    assert sum(o["count"] for o in manifest["omitted"]) == 202_599 - 5_000
    for split in manifest["splits"]:
        for sample in samples(out, split):
            data = (folder / "celeba" / "img_align_celeba" / f"{sample['__key__']}.jpg").read_bytes()
            assert np.array_equal(sample["npy"], expected(data)), sample["__key__"]


def test_the_real_copy_does_not_pass_for_complete(real, tmp_path):
    folder, _ = real
    with pytest.raises(Incomplete, match="197,599 files missing"):
        convert(CelebA(folder / "celeba"), tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["list_attr_celeba.gdrive_quota_html.txt", "list_attr_celeba.header202599_rows20000.txt"]
)
def test_real_damaged_lists_are_refused(real, tmp_path, name):
    folder, _ = real
    data = (folder / "hostile" / "bad_downloads" / name).read_bytes()
    write(tmp_path / "in", LAYOUTS["folder"]() | {"list_attr_celeba.txt": data})
    with pytest.raises(DataError, match=r"list_attr_celeba\.txt.*(Quota exceeded|says 202,599 rows.* 20,000)"):
        convert(CelebA(tmp_path / "in"), tmp_path / "out", partial=True)

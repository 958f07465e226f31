"""verify and info: a damaged set is found out, wherever the damage lies."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_data import DataError, ToyFaces, convert, manifest
from shard_data.__main__ import main
from shard_data.errors import Damaged
from shard_data.files import sha256
from shard_data.info import contact_sheet, describe
from shard_data.verify import verify

SHARDS = ("train-000000", "train-000001", "val-000000")


@pytest.fixture(scope="module", params=["npy", "png"])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    convert(ToyFaces(size=16, train=8, val=3, test=0), folder, encoding=request.param, shard_size=5)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def sign(folder, **changes):
    """Make the manifest fit what lies in the folder, as a faulty writer would."""
    content = manifest.load(folder)
    content.update(changes)
    for shard in manifest.all_shards(content):
        shard["sha256"], shard["index_sha256"] = sha256(folder / shard["file"]), sha256(folder / shard["index"])
    content["fingerprint"] = manifest.fingerprint(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def rewrite_index(folder, stem, edit):
    rows = np.load(folder / f"{stem}.index.npy")
    np.save(folder / f"{stem}.index.npy", edit(rows))
    sign(folder)


@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_set_has_no_faults(whole, decode, capsys):
    assert verify(whole, decode) == []
    assert main(["verify", str(whole), *(["--decode"] if decode else [])]) == 0
    assert f"{whole}: no errors found" in capsys.readouterr().out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_or_missing_byte_is_found_and_its_file_named(whole, tmp_path_factory, data):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("damage") / "set")
    name = data.draw(st.sampled_from([f"{stem}.{kind}" for stem in SHARDS for kind in ("tar", "index.npy")]))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    (folder / name).write_bytes(content)
    faults = verify(folder, decode=True)
    assert len(faults) == 1
    assert faults[0].startswith(f"{name}: corrupt")
    shutil.rmtree(folder)


def write_zip(path):
    with path.open("wb") as file:
        np.savez(file, rows=np.zeros(3))


ODD_INDEXES = {
    "zip": write_zip,
    "pickle": lambda path: np.save(path, np.array([{}, {}]), allow_pickle=True),
    "no fields": lambda path: np.save(path, np.zeros(5)),
    "a scalar": lambda path: np.save(path, np.load(path)[0]),
    "2^60 rows": lambda path: path.write_bytes(path.read_bytes().replace(b"(5,)", b"(1152921504606846976,)")),
    "negative rows": lambda path: path.write_bytes(path.read_bytes().replace(b"(5,)", b"(-5,)")),
    "terminal codes": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'\x1b[2J':           "),
}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("what", ODD_INDEXES)
def test_an_index_of_another_kind_is_a_fault_and_no_traceback(copy, what, decode):
    ODD_INDEXES[what](copy / "train-000000.index.npy")
    sign(copy)
    faults = verify(copy, decode)
    assert len(faults) == 1
    assert faults[0].startswith("train-000000.")
    assert faults[0].isprintable()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_files_that_a_faulty_writer_signed_give_faults_and_no_traceback(whole, tmp_path_factory, data):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("signed") / "set")
    path = folder / data.draw(st.sampled_from([f"train-000000.{kind}" for kind in ("tar", "index.npy")]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    sign(folder)
    faults = verify(folder, decode=True)
    assert all(fault.startswith("train-00000") and fault.isprintable() for fault in faults)
    assert all(fault.startswith("train-000000") for fault in faults if "occurs twice" not in fault)
    shutil.rmtree(folder)


def test_the_command_names_shard_and_fault_and_exits_with_one(copy, capsys):
    (copy / "train-000001.tar").unlink()
    (copy / "val-000000.index.npy").write_bytes(b"?")
    assert main(["verify", str(copy)]) == 1
    errors = capsys.readouterr().err
    assert f"{copy}/train-000001.tar: missing" in errors
    assert f"{copy}/val-000000.index.npy: corrupt" in errors


@pytest.mark.parametrize(
    ("spoil", "kind", "code"),
    [
        (lambda text: text[:-50], Damaged, 1),
        (lambda text: text.replace('"count": 5', '"count": 6'), Damaged, 1),
        (lambda text: text.replace("webdataset-shards", "other"), DataError, 2),
        (lambda text: text.replace('"version": 1', '"version": 2'), DataError, 2),
    ],
)
def test_a_manifest_that_cannot_be_trusted(copy, spoil, kind, code, capsys):
    path = copy / "manifest.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(kind, match=r"manifest\.json"):
        verify(copy)
    assert main(["verify", str(copy)]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_set(tmp_path, capsys):
    for command in ("verify", "info"):
        assert main([command, str(tmp_path)]) == 2
        assert "not a complete shard set" in capsys.readouterr().err


def test_an_index_that_does_not_fit_its_tar(copy):
    rewrite_index(copy, "train-000000", lambda rows: rows[[0, 1, 3, 2, 4]])
    assert verify(copy) == [
        "train-000000.tar: tar and index differ from sample 2 on; 5 samples in the tar, 5 in the index"
    ]


def test_an_index_that_lacks_a_row(copy):
    rewrite_index(copy, "train-000000", lambda rows: rows[:-1])
    faults = verify(copy)
    assert "train-000000.tar: tar and index differ from sample 4 on; 5 samples in the tar, 4 in the index" in faults
    assert "train-000000.index.npy: 4 rows, the manifest says 5" in faults


def test_a_key_that_occurs_twice(copy):
    for suffix in ("tar", "index.npy"):
        shutil.copy(copy / f"train-000000.{suffix}", copy / f"train-000001.{suffix}")
    sign(copy)
    assert "train-000001.tar: key train-00003 occurs twice in this set" in verify(copy)


@pytest.mark.parametrize(
    ("column", "message"), [("attributes", "its attributes differ"), ("hidden", "what is hidden differs")]
)
def test_decoding_finds_columns_that_contradict_the_json(copy, column, message):
    def flip(rows):
        rows[column][1, 4] = 1 - rows[column][1, 4]
        return rows

    rewrite_index(copy, "val-000000", flip)
    assert verify(copy) == []
    assert verify(copy, decode=True) == [f"val-000000.tar: sample val-00001: {message} between tar and index"]


def test_decoding_finds_pictures_of_another_size(copy):
    sign(copy, image={"height": 16, "width": 24, "channels": 3})
    faults = verify(copy, decode=True)
    assert len(faults) == 11
    assert "is uint8 (16, 16, 3), the manifest says uint8 (16, 24, 3)" in faults[0]


def test_info_shows_splits_and_attributes(whole, capsys):
    assert main(["info", str(whole)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == describe(whole)
    assert "toy_faces: 16 x 16 x 3" in text
    assert any(line.split()[:3] == ["val", "3", "1"] for line in text.splitlines())
    share = np.mean([np.load(whole / f"{stem}.index.npy")["attributes"][:, 14].sum() for stem in SHARDS[:2]]) * 2 / 8
    assert any(line.split() == ["Smiling", f"{100 * share:.1f}"] for line in text.splitlines())


def test_info_of_a_set_that_lists_no_omissions(copy):
    content = manifest.load(copy)
    del content["omitted"]
    (copy / "manifest.json").write_text(json.dumps(content))
    assert "toy_faces: 16 x 16 x 3" in describe(copy)


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.npy"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_info_of_a_damaged_set_names_the_file(copy, tmp_path, name, spoil, capsys):
    spoil(copy / name)
    assert main(["info", str(copy), "--sheet", str(tmp_path / "sheet.png")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {copy / name}: cannot be read")
    assert not (tmp_path / "sheet.png").exists()


def test_contact_sheet_shows_the_first_pictures(whole, tmp_path):
    contact_sheet(whole, tmp_path / "sheet.png", columns=4, rows=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = ToyFaces(size=16).load(ToyFaces(size=16, train=1).records("train")[0]).image
    assert np.array_equal(sheet[4:100, 4:100], first.repeat(6, 0).repeat(6, 1))
    assert sheet.shape[1] % 4 == 0
    with pytest.raises(DataError, match="choose another file"):
        contact_sheet(whole, tmp_path / "nowhere" / "sheet.png")

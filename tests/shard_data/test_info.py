"""info, its contact sheets, and what the command line says of skipped files and of names from files."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from shard_data import Npz, convert, info
from shard_data.__main__ import main
from shard_data.errors import Damaged
from shard_data.info import contact_sheet, describe
from tests.helpers.launching import ROOT
from tests.helpers.shard_sets import Samples, random_samples, rewrite_index, write_set

NAMES = [f"Attribute_Number_{i:02d}" for i in range(40)]


def with_attributes(folder, present: int) -> None:
    values = np.zeros((6, 40), np.int8)
    values[:, :present] = 1
    images = np.full((6, 64, 64, 3), 128, np.uint8)
    np.savez(folder / "in.npz", images=images, attributes=values, attribute_names=np.array(NAMES))
    convert(Npz(folder / "in.npz", val=0, test=0), folder / "out")


def test_a_contact_sheet_has_a_line_for_each_of_many_attributes(tmp_path, monkeypatch):
    with_attributes(tmp_path, present=12)
    drawn = []
    monkeypatch.setattr(info.ImageDraw.ImageDraw, "text", lambda self, place, text, **_: drawn.append((place, text)))
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png", columns=3, rows=2)
    assert [text for _, text in drawn[:12]] == [name.replace("_", " ") for name in NAMES[:12]]
    assert len({place for place, _ in drawn[:12]}) == 12
    width, height = Image.open(tmp_path / "sheet.png").size
    assert max(info._text_width(text) for _, text in drawn) <= width // 3
    assert max(place[1] for place, _ in drawn[:12]) + info.LINE_HEIGHT <= height // 2


def test_a_contact_sheet_without_any_caption(tmp_path):
    with_attributes(tmp_path, present=0)
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png", columns=3, rows=2)
    assert Image.open(tmp_path / "sheet.png").size[0] >= 3 * 64


def test_long_class_names_are_cut_to_the_tile(tmp_path):
    classes = np.array(["a name of a class that is much longer than any tile is wide " * 3])
    np.savez(tmp_path / "in.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, int), classes=classes)
    convert(Npz(tmp_path / "in.npz", val=0, test=0), tmp_path / "out")
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] <= 4 * (2 * info.TILE_WIDTH + 2 * info.MARGIN)


def relabeled(index: np.ndarray) -> np.ndarray:
    index["label"] = 10
    return index


INDEXES = {
    "a label without a class": relabeled,
    "other columns": lambda index: index[["key", "offset"]].copy(),
    "no columns": lambda index: np.arange(len(index)),
    "an image beyond the end": lambda index: np.array(
        [(k, 2**60, s, *rest) for k, _, s, *rest in index.tolist()], index.dtype
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_of_other_content_is_refused_in_one_line(tmp_path, case, capsys):
    root = write_set(tmp_path / "set", {"train": random_samples(6, height=8, width=8)}, [6])
    rewrite_index(root, "train-000000", INDEXES[case])
    assert main(["info", str(root), "--sheet", str(tmp_path / "sheet.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-000000" in line
    assert "cannot be read" in line
    assert ("its index places an image at bytes" in line) == (case == "an image beyond the end")


def test_an_index_that_gives_a_huge_number_of_rows_is_refused(tmp_path):
    root = write_set(tmp_path / "set", {"train": random_samples(6)}, [6])
    path = root / "train-000000.index.npy"
    path.write_bytes(path.read_bytes().replace(b"(6,), }" + b" " * 6, b"(%d,), }" % 10**6))
    assert b"1000000" in path.read_bytes()
    with pytest.raises(Damaged, match=r"index\.npy: cannot be read"):
        describe(root)


def test_samples_without_a_label_are_counted_apart(tmp_path):
    samples = Samples(np.zeros((5, 4, 4, 3), np.uint8), labels=np.array([0, -1, 3, -1, 3]))
    text = describe(write_set(tmp_path / "set", {"train": samples}, [5]))
    counts = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in text.splitlines()}
    assert (counts["class 0"], counts["class 3"], counts["(no label)"]) == ("1", "2", "2")


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\x1b[31m.png").write_bytes(b"no image")
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    assert main(["folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown
    assert "a\\x1b[31m.png" in shown


@pytest.mark.parametrize("broken", [1, 12])
def test_partial_says_how_many_files_were_skipped(tmp_path, broken, capsys):
    (tmp_path / "in").mkdir()
    for i in range(broken):
        (tmp_path / "in" / f"{i:02d}.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "good.png")
    words = ["folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--val", "0", "--test", "0"]
    assert main([*words, "--workers", "1"]) == 2
    files = "1 file" if broken == 1 else "12 files"
    assert (
        f"error: folder: {files} missing or unreadable:\n  train: {files}, cannot be decoded" in capsys.readouterr().err
    )
    assert main([*words, "--workers", "1", "--partial"]) == 0
    output = capsys.readouterr().out
    assert "folder is complete but for skipped files (train 1 images)" in output
    assert f"skipped {files}; manifest.json lists all:\n  train: {files}, cannot be decoded" in output
    assert ("09.png and 2 more" in output) == (broken == 12)
    assert "skipped when the set was made:" in describe(tmp_path / "out")


def test_info_may_be_read_in_part(tmp_path):
    """As by `info DIR | head -1`."""
    write_set(tmp_path / "set", {"train": random_samples(3)}, [3])
    command = [sys.executable, "-m", "shard_data", "info", str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)

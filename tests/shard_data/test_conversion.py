"""Conversion into a folder: options, folders that are in use or too small, what is imported."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from shard_data import AlreadyComplete, DataError, Mnist, ToyFaces, convert, plan
from shard_data.__main__ import main
from shard_data.plan import default_shard_size
from tests.helpers.command_lines import check_commands, shown_facts
from tests.helpers.conversions import SMALL_FACES, contents
from tests.helpers.mnist_files import write_mnist


@pytest.fixture
def mnist(tmp_path) -> Path:
    return write_mnist(tmp_path / "originals")


def test_a_complete_set_is_only_replaced_with_overwrite(tmp_path, capsys):
    convert(SMALL_FACES, tmp_path, shard_size=2)
    before = contents(tmp_path)
    with pytest.raises(AlreadyComplete, match="complete set of toy_faces.*--overwrite"):
        convert(SMALL_FACES, tmp_path)
    words = ["toy_faces", "--out", str(tmp_path), "--size", "16", "--train", "3", "--val", "0", "--test", "0"]
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--overwrite", "--workers", "1"]) == 0
    assert set(contents(tmp_path)) == {"manifest.json", "train-000000.tar", "train-000000.index.npy", "notes.txt"}


def test_what_is_written_and_what_comes_next_is_said(tmp_path, capfd, monkeypatch):
    words = [
        "toy_faces",
        "--out",
        str(tmp_path / "new"),
        "--size",
        "16",
        "--train",
        "3",
        "--val",
        "1",
        "--workers",
        "1",
    ]
    assert main([*words, "--test", "0"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"toy_faces: images of 16x16x3 into {tmp_path}/new"
    facts = shown_facts(lines)
    assert facts["images"] == ["train 3, val 1"]
    assert facts["shards"] == ["2, images as npy; 1 process"]
    assert any(line.startswith(f"{tmp_path}/new: toy_faces is complete") for line in lines)
    check_commands(facts["next"])
    assert facts["next"][-1].endswith(f"--model nvae --data {tmp_path}/new --run-dir runs/new data.size=16")
    monkeypatch.setattr("shard_data.progress._pipe", 2)  # as of a program that another one started
    assert main([*words, "--test", "0", "--overwrite"]) == 0
    assert "next" not in shown_facts(capfd.readouterr().out.splitlines())


def test_a_set_with_a_damaged_manifest_is_not_overwritten(tmp_path, capsys):
    convert(SMALL_FACES, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    before = contents(tmp_path)
    assert main(["toy_faces", "--out", str(tmp_path), "--train", "3", "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json" in line
    assert "delete the folder" in line or "choose another" in line
    assert contents(tmp_path) == before


def test_files_of_others_are_never_overwritten(tmp_path):
    (tmp_path / "val-000000.tar").write_bytes(b"somebody's own shard")
    with pytest.raises(DataError, match=r"val-000000\.tar: would be overwritten"):
        convert(SMALL_FACES, tmp_path, overwrite=True)
    assert contents(tmp_path) == {"val-000000.tar": b"somebody's own shard"}


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


COUNTS = {
    "none": (["--train", "0", "--val", "0", "--test", "0"], "train, val and test are all 0"),
    "negative": (["--train", "-1"], "train -1: must be from 0 to 10,000,000"),
    "absurd": (["--train", "100000000000"], "train 100000000000: must be from 0 to 10,000,000"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_numbers_of_faces_out_of_range_are_refused_in_one_line(tmp_path, case, capsys):
    argv, message = COUNTS[case]
    assert main(["toy_faces", *argv, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_set_without_a_train_split(tmp_path, capsys):
    argv = ["toy_faces", "--train", "0", "--val", "3", "--test", "0", "--size", "16", "--workers", "1"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert "toy_faces is complete (val 3 images)" in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 0


SOURCES = ["mnist", "cifar10", "cifar100", "celeba", "folder", "npz"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_source_is_named_with_the_option(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        assert main([name, "--source", str(source), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {source}: ")
        assert "--source" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*SOURCES, "toy_faces", "fashion_mnist", "kmnist", "info"])
def test_the_help_of_every_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"python -m shard_data {name.replace('kmnist', 'mnist')} " in capsys.readouterr().out.partition("\n\n")[2]


def test_a_refused_conversion_leaves_no_empty_folder(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5_000))
    (tmp_path / "mine").mkdir()
    for out in ("mine", "new"):
        with pytest.raises(DataError, match="needs at least"):
            convert(SMALL_FACES, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


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


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(tmp_path, monkeypatch, encoding):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 5_000))
    with pytest.raises(DataError, match=r"needs at least 0\.1 MB, and 0\.0 MB are free; free some space"):
        convert(SMALL_FACES, tmp_path, encoding=encoding)
    assert contents(tmp_path) == {}


def test_space_of_what_is_replaced_counts_as_free(tmp_path, monkeypatch):
    convert(SMALL_FACES, tmp_path)
    before = contents(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 0))
    convert(SMALL_FACES, tmp_path, overwrite=True)
    assert contents(tmp_path) == before
    with pytest.raises(DataError, match="needs at least 0.1 MB"):
        convert(ToyFaces(size=32, train=23, val=7, test=0), tmp_path, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("encoding", ["npy", "png"])
@pytest.mark.parametrize("made", ["faces", "digits"])
def test_the_estimate_never_refuses_what_fits(tmp_path, encoding, made):
    source = SMALL_FACES if made == "faces" else Mnist(write_mnist(tmp_path / "originals"))
    manifest = convert(source, tmp_path / "out", encoding=encoding)
    records = plan.plan_records(source, None)
    need = plan.least_bytes(plan.plan_layout(source, encoding, records)) * sum(map(len, records.values()))
    used = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert used / 4 < need <= used, manifest["name"]

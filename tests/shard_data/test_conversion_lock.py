"""Conversions into one folder at the same time: one converts, the others say who holds the folder."""

import os
import subprocess
import sys

import pytest

from shard_data import AlreadyComplete, DataError, ToyFaces, convert, writer
from shard_data.__main__ import main
from shard_data.file_lock import FileLock
from shard_data.verify import verify
from shard_data.writer import LOCK

FACES = ToyFaces(size=16, train=6, val=0, test=0)


def test_a_folder_that_is_being_converted_into_is_refused_with_the_holder(tmp_path, capsys):
    with FileLock(tmp_path / LOCK):
        with pytest.raises(DataError, match=rf"process {os.getpid()} on .* is converting into this folder; wait"):
            convert(FACES, tmp_path)
        assert main(["toy_faces", "--out", str(tmp_path), "--train", "3"]) == 2
        assert f"process {os.getpid()}" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    convert(FACES, tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_two_commands_at_once_make_one_whole_set(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "1500", "--val", "0", "--test", "0", "--workers", "1"]
    command = [sys.executable, "-m", "shard_data", *words, "--shard-size", "100", "--out", str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2]
    for process, message in zip(processes, messages, strict=True):
        assert process.returncode == 0 or "is converting into this folder" in message or "--overwrite" in message
    assert verify(tmp_path) == []


def test_a_set_that_another_process_finishes_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    make_lock = writer.FileLock

    def finish_first(path):
        monkeypatch.setattr(writer, "FileLock", make_lock)
        convert(FACES, tmp_path)
        return make_lock(path)

    monkeypatch.setattr(writer, "FileLock", finish_first)
    with pytest.raises(AlreadyComplete):
        convert(FACES, tmp_path)


def test_progress_does_not_flood_a_log(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "300", "--val", "0", "--test", "0", "--workers", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "shard_data", *words, "--out", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert result.stderr == ""

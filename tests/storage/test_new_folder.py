"""Folders that are complete or absent, whatever ends their writing."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from pipeline.storage.new_folder import check_new, new_folder


def fill(path, text="all of it"):
    with new_folder(path) as hidden:
        hidden.mkdir()
        (hidden / "file").write_text(text)


def fill_half(path, error):
    with new_folder(path) as hidden:
        hidden.mkdir()
        (hidden / "file").write_text("half")
        raise error


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "parent" / "new"
    with new_folder(path) as hidden:
        hidden.mkdir()
        (hidden / "file").write_text("x")
        assert not path.exists()
    assert (names(path), names(path.parent)) == (["file"], ["new"])


def test_an_empty_folder_is_replaced_and_a_full_one_refused(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    fill(tmp_path / "new")
    with pytest.raises(ValueError, match=r"new is not empty; name a new folder, or remove it"):
        fill(tmp_path / "new", "other")
    assert (tmp_path / "new/file").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    fill(".")
    assert names(tmp_path / "empty") == ["file"]


def test_a_place_that_cannot_be_written_to_is_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file/a/new cannot be made, as \S+/file cannot be written to; name another"):
        check_new(tmp_path / "file" / "a" / "new")
    check_new(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match="b cannot be made, as"):
        check_new(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]


def test_a_file_or_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dangling", "file"):
        with pytest.raises(ValueError, match=f"{name} is there and is not a folder"):
            fill(tmp_path / name)
    assert names(tmp_path) == ["dangling", "file", "link", "outside"]


def test_one_that_fails_leaves_nothing(tmp_path):
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fill_half(tmp_path / "new", error)
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.storage.new_folder import check_new, new_folder
with new_folder(Path(sys.argv[1])) as hidden:
    hidden.mkdir()
    (hidden / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    path = tmp_path / "new"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.endswith(".writing")
    host = socket.gethostname()
    others = [f".new.{host}.{os.getppid()}.writing", ".new.elsewhere.1.writing", f".newer.{host}.99999999.writing"]
    for name in others:
        (tmp_path / name).mkdir()
    fill(path)
    assert names(tmp_path) == sorted([*others, "new"])

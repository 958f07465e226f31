"""Conversions that are interrupted, killed or run out of disk: the same command finishes them, to the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_data import DataError, ToyFaces, convert
from tests.helpers.conversions import SMALL_FACES, contents


class Unreliable(ToyFaces):
    """Faces whose loading fails at one place; counts what it loaded."""

    fails_at: int | None
    loads: int

    def load(self, record):
        object.__setattr__(self, "loads", self.loads + 1)
        if record.where == self.fails_at:
            raise OSError(errno.EIO, "the cable was pulled", "original.jpg")
        return super().load(record)


def unreliable(fails_at: int | None) -> Unreliable:
    source = Unreliable(size=16, train=23, val=7, test=0, seed=5)
    object.__setattr__(source, "fails_at", fails_at)
    object.__setattr__(source, "loads", 0)
    return source


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    convert(SMALL_FACES, folder, shard_size=4)
    return contents(folder)


@given(stops=st.lists(st.integers(0, 22), max_size=3))
@settings(max_examples=15, deadline=None)
def test_an_interrupted_conversion_resumes_to_the_same_bytes(uninterrupted, tmp_path_factory, stops):
    folder, finished = tmp_path_factory.mktemp("interrupted"), 0
    for stop in stops:
        source = unreliable(stop)
        if stop >= finished:
            with pytest.raises(DataError, match=r"original\.jpg.*the cable was pulled"):
                convert(source, folder, shard_size=4)
            assert not (folder / "manifest.json").exists()
            assert not list(folder.glob("*.partial"))
            finished = stop // 4 * 4
    source = unreliable(None)
    convert(source, folder, shard_size=4)
    assert source.loads == 30 - finished  # nothing finished is done twice
    assert contents(folder) == uninterrupted


@given(cut=st.floats(0, 1), flip=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_files_truncated_by_a_crash_are_written_again(uninterrupted, tmp_path_factory, cut, flip):
    folder = tmp_path_factory.mktemp("torn")
    with pytest.raises(DataError):
        convert(unreliable(21), folder, shard_size=4)
    journal = folder / "unfinished.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    torn = round(cut * len(lines[-1]))
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn])
    damaged = folder / f"train-00000{flip}.tar"
    damaged.write_bytes(damaged.read_bytes()[:-700])
    convert(SMALL_FACES, folder, shard_size=4)
    assert contents(folder) == uninterrupted


JOURNALS = {
    "no JSON": b"\xff\x00 text\n",
    "a number": b"5\n5\n",
    "no list of files": b'{"plan": {}, "ours": 7}\n',
    "numbers as files": b'{"plan": {}, "ours": [7, null]}\n[]\nnull\n',
    "shards without names": b'{"plan": null, "ours": []}\n{"file": 7}\n{"file": "train-000000.tar"}\n',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", JOURNALS)
def test_a_journal_of_any_content_is_only_a_conversion_from_the_start(uninterrupted, tmp_path, case):
    (tmp_path / "unfinished.jsonl").write_bytes(JOURNALS[case])
    convert(SMALL_FACES, tmp_path, shard_size=4)
    assert contents(tmp_path) == uninterrupted


def test_a_journal_cannot_delete_files_outside_of_its_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.jsonl").write_text(json.dumps({"plan": None, "ours": ["../mine.txt"]}) + "\n")
    convert(SMALL_FACES, tmp_path / "out")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_another_conversion_into_an_unfinished_folder_leaves_nothing_of_the_first(uninterrupted, tmp_path):
    with pytest.raises(DataError):
        convert(unreliable(21), tmp_path, shard_size=2)
    (tmp_path / "train-000007.tar.partial").write_bytes(b"a kill leaves such a file")
    convert(SMALL_FACES, tmp_path, shard_size=4)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_killed_conversion_resumes_and_leaves_no_process(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "3000", "--val", "0", "--test", "0", "--shard-size", "100"]
    command = [sys.executable, "-m", "shard_data", *words, "--workers", "2", "--out"]
    environment = {**os.environ, "SHARD_DATA_TEST": tmp_path.name}
    for finished in (1, 2, 6):
        process = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL, env=environment)
        wait_until(lambda: len(list((tmp_path / "killed").glob("*.index.npy"))) >= finished)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not processes_with(f"SHARD_DATA_TEST={tmp_path.name}"))
        assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("killed", "uninterrupted"):
        subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_with(variable: str) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path] if variable.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_ctrl_c_stops_all_workers_and_says_how_to_resume(tmp_path):
    words = ["toy_faces", "--train", "100000", "--shard-size", "50000", "--workers", "2", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shard_data", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    wait_until(lambda: len(list((tmp_path / "out").glob("*.partial"))) == 2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished.jsonl"]


def test_a_full_disk_is_named_and_the_same_command_resumes(tmp_path, uninterrupted, monkeypatch):
    calls, fsync = [], os.fsync

    def full_at_the_fifth(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_fifth)
    with pytest.raises(DataError, match="the disk is full; free some space and run the same command again"):
        convert(SMALL_FACES, tmp_path, shard_size=4)
    assert not list(tmp_path.glob("*.partial"))
    convert(SMALL_FACES, tmp_path, shard_size=4)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    words = ["toy_faces", "--size", "16", "--train", "4000", "--val", "0", "--test", "0", "--shard-size", "50"]
    command = [sys.executable, "-m", "shard_data", *words, "--workers", "2", "--shuffle", "3", "--out"]
    environment = {**os.environ, "SHARD_DATA_TEST": tmp_path.name}
    rng, kills = np.random.default_rng(20), 0
    while kills < 20:
        process = subprocess.Popen([*command, tmp_path / "killed"], stderr=subprocess.DEVNULL, env=environment)
        time.sleep(rng.uniform(0.2, 1.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: not processes_with(f"SHARD_DATA_TEST={tmp_path.name}"))
        if (tmp_path / "killed" / "manifest.json").exists():
            shutil.rmtree(tmp_path / "killed")
    for name in ("killed", "uninterrupted"):
        if not (tmp_path / name / "manifest.json").exists():
            subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")

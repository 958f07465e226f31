"""File locks: one holder at a time, named, and none that survives it."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from shard_data import file_lock
from shard_data.file_lock import FileLock, LockHeld


@contextlib.contextmanager
def process(action):
    """A forked process that runs `action` and then sleeps; killed at the end of the block."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        action()
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_second_is_refused_with_the_name_of_the_first(tmp_path):
    path = tmp_path / "lock"
    with process(lambda: FileLock(path).acquire()) as child:
        with pytest.raises(LockHeld) as caught:
            FileLock(path).acquire()
        assert caught.value.holder == f"process {child} on {os.uname().nodename}"
        assert str(path) in str(caught.value)
    with FileLock(path) as lock:  # the first was killed
        assert lock.holder() == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(LockHeld):
            FileLock(path).acquire()
    FileLock(path).acquire().release()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = FileLock(tmp_path / "lock").acquire()
    with process(lambda: None):
        lock.release()
        FileLock(tmp_path / "lock").acquire().release()


def test_a_started_program_does_not_keep_the_lock(tmp_path):
    lock = FileLock(tmp_path / "lock").acquire()
    program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        lock.release()
        FileLock(tmp_path / "lock").acquire().release()
    finally:
        program.communicate(b"\n", timeout=60)


def test_a_forked_child_that_ends_leaves_the_lock_to_its_parent(tmp_path):
    with FileLock(tmp_path / "lock") as lock:
        with process(lambda: lock.release(delete=True)):
            pass
        assert lock.is_current()
        with pytest.raises(LockHeld):
            FileLock(tmp_path / "lock").acquire()


def test_waiting_says_once_for_whom(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lock, "RETRY_SECONDS", 0.01)
    first, second, waits = FileLock(tmp_path / "lock").acquire(), FileLock(tmp_path / "lock"), []
    with pytest.raises(LockHeld):
        second.acquire(0.1, waits.append)
    assert waits == [f"process {os.getpid()} on {os.uname().nodename}"]
    first.release()
    second.acquire(0.1, waits.append).release()
    assert len(waits) == 1


def test_a_deleted_file_is_no_longer_the_lock(tmp_path):
    path = tmp_path / "lock"
    with FileLock(path) as first:
        assert first.is_current()
        path.unlink()
        assert not first.is_current()
        with FileLock(path) as second:
            assert second.is_current()
            assert not first.is_current()
            first.release(delete=True)
            assert path.exists()  # of the second
            second.release(delete=True)
    assert not path.exists()


def test_a_file_deleted_before_the_lock_is_taken_is_opened_again(tmp_path, monkeypatch):
    path, calls = tmp_path / "lock", []

    def flock(descriptor, how, take=file_lock.fcntl.flock):
        if not calls:
            path.unlink()
        calls.append(descriptor)
        take(descriptor, how)

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    with FileLock(path) as lock:
        assert lock.is_current()
        assert len(calls) == 2


def test_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "letter").write_text("keep me")
    (tmp_path / "lock").symlink_to(tmp_path / "letter")
    with pytest.raises(OSError):
        FileLock(tmp_path / "lock").acquire()
    assert (tmp_path / "letter").read_text() == "keep me"


def test_a_holder_from_a_strange_file_is_printable(tmp_path):
    (tmp_path / "lock").write_bytes(b"\x1b[2Jprocess 1 on \xff\nmore")
    assert FileLock(tmp_path / "lock").holder() == "[2Jprocess 1 on \N{REPLACEMENT CHARACTER}"
    assert FileLock(tmp_path / "none").holder() == "another process"


def test_a_file_system_without_locks_raises_oserror_and_leaves_nothing_open(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="locks"):
        FileLock(tmp_path / "lock").acquire()
    assert len(os.listdir("/proc/self/fd")) == before

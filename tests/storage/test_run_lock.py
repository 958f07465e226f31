"""The lock of a run folder."""

import errno
import os
import signal
import threading
import time

import pytest

from pipeline.storage import run_lock
from pipeline.storage.run_lock import RunLock


def start_holder(folder, then):
    """A process that takes the lock, says so through a pipe, and goes on with `then`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lock = RunLock(folder)
        os.write(writer, b"held")
        then(lock)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    return child


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    child = start_holder(tmp_path / "run", lambda lock: time.sleep(60))
    with pytest.raises(ValueError, match=rf"run is in use by process {child} on {os.uname().nodename}; .*--run-dir"):
        RunLock(tmp_path / "run")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(tmp_path / "run") as lock, pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
        RunLock(lock.path.parent)
    RunLock(tmp_path / "run").release()


def test_a_worker_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()

    def fork_a_worker(lock):
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())  # once it runs: until then it has not let go
            time.sleep(60)
            os._exit(0)

    child = start_holder(tmp_path, fork_a_worker)
    os.waitpid(child, 0)
    worker = int(os.read(reader, 16))
    try:
        os.kill(worker, 0)
        RunLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run folder .*file/run cannot be written: Not a directory; name another"):
        RunLock(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="cannot be locked .*file system with flock"):
        RunLock(tmp_path)


def test_a_restart_waits_for_the_dying(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_lock.log, "propagate", True)
    caplog.set_level("INFO", logger="pipeline")
    child = start_holder(tmp_path, lambda lock: time.sleep(60))
    killer = threading.Timer(0.3, lambda: (os.kill(child, signal.SIGKILL), os.waitpid(child, 0)))
    killer.start()
    with RunLock(tmp_path, patience=30):
        killer.join()
    assert f"in use by process {child}" in caplog.text
    assert "waiting up to 30 s" in caplog.text

"""The lock of a run folder."""

import errno
import fcntl
import os
import signal
import threading
import time

import pytest

from pipeline.storage import checkpoint
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_writer import CheckpointWriter
from pipeline.storage.run_lock import RunFolderLost, RunLock
from shard_data.file_lock import FileLock
from tests.helpers.checkpoints import small


def start_holder(folder, then):
    """A process that takes the lock, reports it through a pipe, and runs `then`."""
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
        RunLock(lock.folder)
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
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="cannot be locked .*file system with flock"):
        RunLock(tmp_path)


def test_a_restart_waits_for_the_dying(tmp_path, caplog):
    caplog.set_level("INFO", logger="pipeline")
    child = start_holder(tmp_path, lambda lock: time.sleep(60))
    killer = threading.Timer(0.3, lambda: (os.kill(child, signal.SIGKILL), os.waitpid(child, 0)))
    killer.start()
    with RunLock(tmp_path, timeout=30):
        killer.join()
    assert f"in use by process {child}" in caplog.text
    assert "waiting up to 30 s" in caplog.text


def test_a_linked_lock_is_refused_and_its_target_kept(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"run.lock is a symbolic link, which is refused"):
        RunLock(tmp_path / "run")
    assert (tmp_path / "elsewhere").read_text() == "kept"


# --- the folder changes while it is held ------------------------------------------------------------------------------


def remove_lock(folder):
    (folder / "run.lock").unlink()


def remove_lock_and_start_again(folder):
    (folder / "run.lock").unlink()
    RunLock(folder).release()


def move(folder):
    folder.rename(folder.with_name("elsewhere"))


def move_and_start_again(folder):
    move(folder)
    RunLock(folder).release()


@pytest.mark.parametrize("change", [remove_lock, remove_lock_and_start_again, move, move_and_start_again])
def test_a_holder_that_lost_its_folder_is_stopped_before_it_writes(tmp_path, change):
    """Two processes wrote to one run after `rm run.lock` or `mv RUN elsewhere` and the same command again."""
    folder = tmp_path / "run"
    with RunLock(folder) as lock:
        checkpoints = Checkpoints(folder / "checkpoints", check=lock.check)
        checkpoints.save(1, small(), {})
        change(folder)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunFolderLost, match="run was moved or deleted, or its run.lock was replaced"):
            checkpoints.save(2, small(), {})
        assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_lost_during_a_write_gets_no_checkpoint(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:
        checkpoints = Checkpoints(tmp_path / "checkpoints", check=lock.check)
        write = checkpoint.write_folder

        def slow(*args):
            write(*args)
            remove_lock(tmp_path)

        monkeypatch.setattr(checkpoint, "write_folder", slow)
        with pytest.raises(RunFolderLost):
            checkpoints.save(1, small(), {})
        assert os.listdir(checkpoints.folder) == []


def test_the_writer_passes_it_to_the_training_thread(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        writer = CheckpointWriter(Checkpoints(tmp_path / "run" / "checkpoints", check=lock.check), print)
        move(tmp_path / "run")
        writer.save(1, small(), {})
        with pytest.raises(RunFolderLost):
            writer.finish()
        assert not (tmp_path / "run").exists()


def test_a_passing_fault_does_not_lose_the_folder(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock, monkeypatch.context() as patched:
        patched.setattr(FileLock, "is_current", refuse_to_look)
        lock.check()


def refuse_to_look(lock):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

"""What kills and full disks leave of checkpoints, and the lock of a run folder."""

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.storage import checkpoint
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import size_of, snapshot
from pipeline.storage.checkpoint_writer import CheckpointWriter
from tests.helpers.checkpoints import FACTS, assert_same, damage, in_child, small


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


# --- kills and errors -------------------------------------------------------------------------------------------------


SYSTEM_CALLS = ["mkdir", "fsync", "rename", "rmdir", "unlink", "open"]


def die_at(call_number):
    """From here on, end this process at once at its n-th call that touches the file system, before the call is made."""
    calls = 0

    def deadly(original):
        def call(*args, **kwargs):
            nonlocal calls
            if calls == call_number:
                os._exit(9)
            calls += 1
            return original(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.parametrize("damaged", [False, True], ids=["new step", "in place of an unreadable one"])
def test_death_at_any_point_leaves_a_good_checkpoint(tmp_path, damaged):
    """With keep=1 the new checkpoint replaces the only other one: the most delicate case."""
    deaths, seen = 0, set()
    while True:
        checkpoints = Checkpoints(tmp_path / str(deaths), keep=1)
        checkpoints.save(1, small(1), {})
        if damaged:
            damage(checkpoints.save(2, small(7), {}))
            Checkpoints(checkpoints.folder).save(1, small(1), {})

        def save(checkpoints=checkpoints, at=deaths):
            die_at(at)
            checkpoints.save(2, small(2), {})

        status = in_child(save)
        found = checkpoints.latest()
        assert_same(small(found.step), found.tensors)
        seen.add(found.step)
        checkpoints.save(3, small(3), {})  # clears up what the dead process left
        assert os.listdir(checkpoints.folder) == ["step_00000003"]
        if status == 0:
            break
        assert status == 9
        deaths += 1
    assert deaths > 15
    assert seen == {1, 2}


def test_leftovers_of_a_living_process_are_spared(checkpoints, tmp_path):
    host = os.uname().nodename
    checkpoints.save(1, small(), {})
    alive = checkpoints.folder / f".step_00000007.{host}.{os.getppid()}.writing"
    elsewhere = checkpoints.folder / ".step_00000007.another.host.1.writing"
    alive.mkdir()
    elsewhere.mkdir()
    (checkpoints.folder / ".mine").mkdir()
    checkpoints.save(2, small(), {})
    assert (alive.exists(), elsewhere.exists(), (checkpoints.folder / ".mine").exists()) == (True, False, True)


def fail_at(monkeypatch, call_number, for_good):
    """The n-th call that changes the file system fails; `for_good`: and all after it. Returns what has been called."""
    calls = []

    def failing(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) - 1 == call_number or (for_good and len(calls) > call_number):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("for_good", [False, True], ids=["one call fails", "all calls fail from there on"])
def test_an_error_at_any_point_leaves_a_good_checkpoint_and_no_rubbish(tmp_path, for_good):
    refused, number, finished = 0, 0, False
    while not finished:
        checkpoints = Checkpoints(tmp_path / str(number), keep=1)
        checkpoints.save(1, small(1), {})
        with pytest.MonkeyPatch.context() as patched:
            calls = fail_at(patched, number, for_good)
            try:
                checkpoints.save(2, small(2), {})
            except OSError:
                refused += 1
            finished = len(calls) <= number
        if not for_good:
            assert [name for name in os.listdir(checkpoints.folder) if name.endswith(".writing")] == []
        found = checkpoints.latest()
        assert_same(small(found.step), found.tensors)
        checkpoints.save(2, small(2), {})
        assert checkpoints.latest().step == 2
        checkpoints.save(3, small(3), {})
        assert os.listdir(checkpoints.folder) == ["step_00000003"]
        number += 1
    assert refused >= 7  # mkdir, three files, folder, rename, folder above


@pytest.fixture
def recorded(checkpoints, monkeypatch):
    """What is put on the disk, named and removed, in order, from here on."""
    events = []

    def record(module, name, label):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: (events.append(label(*args)), original(*args, **kw))[1])

    def ending(path):
        return Path(path).name.split(".")[-1]

    checkpoints.keep = 1
    checkpoints.save(1, small(), {})
    record(os, "fsync", lambda descriptor: ("sync", ending(os.readlink(f"/proc/self/fd/{descriptor}"))))
    record(os, "rename", lambda source, target: ("rename", ending(target)))
    record(shutil, "rmtree", lambda path, **kw: ("remove", ending(path)))
    return events


def test_everything_is_on_disk_before_the_name_and_the_old_goes_last(checkpoints, recorded):
    checkpoints.save(2, small(), {})
    assert recorded == [
        ("sync", "safetensors"),
        ("sync", "safetensors"),
        ("sync", "json"),
        ("sync", "writing"),
        ("rename", "step_00000002"),
        ("sync", "checkpoints"),
        ("rename", "deleting"),
        ("remove", "deleting"),
    ]


def test_the_old_one_stays_while_the_new_name_may_not_be_on_the_disk(checkpoints, recorded, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "sync_folder", lambda folder: folder == checkpoints.folder and refuse(folder))
        with pytest.raises(OSError, match="step 2 could not be written"):
            checkpoints.save(2, small(), {})
    assert checkpoints.steps() == [1, 2]
    recorded.clear()
    checkpoints.save(2, small(), {})
    assert recorded == [("sync", "checkpoints"), ("rename", "deleting"), ("remove", "deleting")]
    assert checkpoints.steps() == [2]


# --- full disks -------------------------------------------------------------------------------------------------------


def megabytes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"x": torch.randn(count * 2**18, generator=generator)}}


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """(bytes): the disk of the checkpoints reports so many as free."""

    def limit(size):
        def usage(folder):
            used = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            return shutil._ntuple_diskusage(size, used, size - used)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return limit


def test_room_for_two_is_enough_to_keep_one(tmp_path, small_disk):
    small_disk(7 * 2**20)  # a checkpoint of 2 MiB needs 3, and two take 4
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 5):
        checkpoints.save(step, megabytes(2, step), {})
        assert checkpoints.steps() == [step]


def test_one_too_many_after_a_kill_does_not_fill_the_disk_for_good(tmp_path, small_disk):
    Checkpoints(tmp_path).save(1, megabytes(2, 1), {})
    Checkpoints(tmp_path).save(2, megabytes(2, 2), {})  # and died before it deleted the first
    small_disk(6 * 2**20)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, megabytes(2, 3), {})
    assert checkpoints.steps() == [3]


def test_the_only_good_one_is_not_given_up_for_room(tmp_path, small_disk):
    Checkpoints(tmp_path).save(1, megabytes(2, 1), {})
    damage(Checkpoints(tmp_path).save(2, megabytes(2, 2), {}))
    small_disk(6 * 2**20)
    with pytest.raises(OSError, match="step 3 could not be written .* are free"):
        Checkpoints(tmp_path, keep=1).save(3, megabytes(2, 3), {})
    assert Checkpoints(tmp_path).latest().step == 1


@pytest.fixture
def tmpfs(tmp_path):
    """A real disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_what_was_there(tmpfs, monkeypatch):
    """Another process takes the space after it was checked: the kernel refuses in the midst of a file."""
    checkpoints = Checkpoints(tmpfs / "checkpoints", keep=1)
    checkpoints.save(1, megabytes(4, 1), {})

    def greedy(folder, needed):
        (tmpfs / "ballast").write_bytes(bytes(shutil.disk_usage(tmpfs).free - 2**20))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_check_space", greedy)
        with pytest.raises(OSError, match="step 2 could not be written .*: No space left on device") as caught:
            checkpoints.save(2, megabytes(4, 2), {})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(checkpoints.folder) == ["step_00000001"]
    assert shutil.disk_usage(tmpfs).free == 2**20
    assert_same(megabytes(4, 1), checkpoints.latest().tensors)
    with pytest.raises(OSError, match="step 2 .*5.0 MiB are needed and 1.0 MiB are free"):
        checkpoints.save(2, megabytes(4, 2), {})
    (tmpfs / "ballast").unlink()
    checkpoints.save(2, megabytes(4, 2), {})
    assert_same(megabytes(4, 2), checkpoints.latest().tensors)


def test_a_small_disk_takes_one_after_another(tmpfs):
    """16 MiB, 6 MiB each: two fit, not three."""
    checkpoints = Checkpoints(tmpfs / "checkpoints", keep=1)
    for step in range(1, 6):
        checkpoints.save(step, megabytes(6, step), {})
    Checkpoints(checkpoints.folder).save(6, megabytes(6, 6), {})
    checkpoints.save(7, megabytes(6, 7), {})
    assert checkpoints.steps() == [7]
    assert_same(megabytes(6, 7), checkpoints.latest().tensors)


def test_too_little_space_is_seen_before_writing(checkpoints, monkeypatch):
    checkpoints.save(1, small(), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**20))
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 .*checkpoints: 1.0 MiB are needed and 1.0 MiB are free; check space"
    ) as caught:
        checkpoints.save(2, small(), {})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(checkpoints.folder) == ["step_00000001"]


def test_the_needed_space_is_not_underestimated(tmp_path):
    tensors = {"model": {f"block.{i}.a_rather_long_name_of_a_weight": torch.randn(i) for i in range(300)}, "none": {}}
    path = Checkpoints(tmp_path).save(1, tensors, FACTS)
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    assert on_disk <= size_of(snapshot(tensors)) <= on_disk + 2**20 + 512 * 300


def test_a_failed_write_leaves_nothing_and_the_next_one_works(checkpoints):
    """The kernel refuses to write beyond a file size, as a full disk would."""
    large = {"model": {"x": torch.zeros(100_000)}}
    checkpoints.save(1, small(), {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match="step 2 could not be written to .*checkpoints: File too large"):
            checkpoints.save(2, large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(checkpoints.folder) == ["step_00000001"]
    checkpoints.save(2, large, {})
    assert checkpoints.latest().step == 2


def test_a_run_folder_that_is_moved_after_it_was_checked_is_not_made_again(tmp_path):
    """Its name may be another run's by then."""
    run = tmp_path / "run"
    run.mkdir()
    once = iter([lambda: run.rename(tmp_path / "moved")])
    checkpoints = Checkpoints(run / "checkpoints", keep=2, check=lambda: next(once, lambda: None)())
    with pytest.raises(OSError, match="could not be written to .*run/checkpoints: No such file or directory"):
        checkpoints.save(1, small(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="step 1 could not be written to .*file/checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, small(), {})


def test_a_last_checkpoint_that_was_given_up_is_not_tried_again_on_the_way_out(checkpoints, monkeypatch):
    pauses = []
    monkeypatch.setattr("pipeline.storage.checkpoint_writer.time.sleep", pauses.append)
    monkeypatch.setattr(Checkpoints, "write", refuse)
    with pytest.raises(OSError, match="refused"):
        save_and_finish(CheckpointWriter(checkpoints, lambda *failure: None, retry_after=(1, 4)))
    assert pauses == [1, 4]


def refuse(*_):
    raise OSError(errno.EIO, "refused")


def save_and_finish(writer):
    with writer:
        writer.save(2, small(2), {})
        writer.finish()

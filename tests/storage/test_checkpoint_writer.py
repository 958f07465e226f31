"""Checkpoints are written beside training, whatever happens to the disk, the process and the tensors meanwhile."""

import errno
import os
import queue
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import checkpoint
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import read_folder, snapshot
from pipeline.storage.checkpoint_writer import RETRY_AFTER, CheckpointWriter, snapshot_into
from tests.helpers.checkpoints import FACTS, assert_same, small


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def reported():
    """(step, message) of each failure."""
    return queue.Queue()


@pytest.fixture
def writer(checkpoints, reported):
    return CheckpointWriter(checkpoints, lambda *failure: reported.put(failure), retry_after=(0, 0))


@pytest.fixture
def gate(checkpoints, monkeypatch):
    """Writes stand still until it is set; `gate.reached` says that one has begun."""
    gate, write = threading.Event(), Checkpoints.write
    gate.reached = threading.Event()

    def held(*args):
        gate.reached.set()
        assert gate.wait(60)
        return write(*args)

    monkeypatch.setattr(Checkpoints, "write", held)
    yield gate
    gate.set()


def refuse(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# --- beside training --------------------------------------------------------------------------------------------------


def test_save_returns_while_the_disk_is_still_busy(checkpoints, writer, gate):
    stall = writer.save(1, small(1), FACTS, score=2.5)
    assert gate.reached.wait(60)
    assert checkpoints.steps() == []
    assert stall > 0
    gate.set()
    writer.finish()
    found = checkpoints.latest()
    assert (found.step, found.facts, found.score) == (1, FACTS, 2.5)
    assert_same(small(1), found.tensors)


def test_what_training_changes_after_save_is_not_written(checkpoints, writer, gate):
    tensors, facts = small(1), {"progress": {"step": 1}}
    writer.save(1, tensors, facts)
    for group in tensors.values():
        for tensor in group.values():
            tensor.fill_(3)
    facts["progress"]["step"] = 99
    tensors["model"]["another"] = torch.zeros(1)
    gate.set()
    writer.finish()
    assert_same(small(1), checkpoints.latest().tensors)
    assert checkpoints.latest().facts == {"progress": {"step": 1}}


def test_a_second_save_waits_for_the_first_and_order_is_kept(checkpoints, writer, gate):
    """Its tensors go to the memory that the first write reads from."""
    writer.save(1, small(1), {})
    threading.Timer(0.05, gate.set).start()
    writer.save(2, small(2), {})
    assert_same(small(1), read_folder(checkpoints.path(1)).tensors)
    writer.finish()
    assert_same(small(2), checkpoints.latest().tensors)


def test_equal_tensors_give_equal_bytes_on_either_way(checkpoints, writer, tmp_path):
    writer.save(5, small(5), FACTS, 1.0)
    writer.finish()
    direct = Checkpoints(tmp_path / "direct").save(5, small(5), FACTS, 1.0)
    assert {file.name: file.read_bytes() for file in direct.iterdir()} == {
        file.name: file.read_bytes() for file in checkpoints.path(5).iterdir()
    }


def test_finish_may_be_called_at_any_time(writer, checkpoints):
    writer.finish()
    writer.save(1, small(), {})
    writer.finish()
    writer.finish()
    writer.save(2, small(), {})
    writer.finish()
    assert checkpoints.steps() == [1, 2]


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_memory_is_taken_again_where_it_fits():
    first = snapshot_into({}, small(1))
    addresses = {(stem, name): tensor.data_ptr() for stem, group in first.items() for name, tensor in group.items()}
    tensors = small(2)
    tensors["ema"]["weight"] = torch.ones(5)
    tensors["optimizer"] = {"weight/moment": torch.ones(2)}
    second = snapshot_into(first, tensors)
    assert_same(tensors, second)
    assert second["model"]["weight"].data_ptr() == addresses["model", "weight"]
    assert second["model"]["steps"].data_ptr() == addresses["model", "steps"]


@given(st.lists(st.sampled_from(["float32", "bfloat16", "int64"]), min_size=2, max_size=2), st.integers(0, 2**32))
def test_any_layout_is_copied_to_the_bit(dtypes, seed):
    buffers = {}
    for dtype in dtypes:  # the second time into the memory of the first, where its type is the same
        raw = torch.randint(0, 256, (2, 3, 4, 5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        x = raw.view(getattr(torch, dtype))[..., 0]
        tensors = {
            "model": {
                "plain": x.contiguous(),
                "channels_last": x.contiguous(memory_format=torch.channels_last),
                "transposed": x.transpose(0, 2),
                "expanded": x[:1].expand(3, -1, -1, -1),
                "empty": x[:0],
                "scalar": x[0, 0, 0, 0],
            }
        }
        buffers = snapshot_into(buffers, tensors)
        assert_same(tensors, buffers)
        assert_same(snapshot(tensors), buffers)
        assert all(tensor.is_contiguous() for tensor in buffers["model"].values())


def test_tied_tensors_and_parameters_are_separate_copies():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    taken = snapshot_into({}, {"model": {"encoder": weight, "decoder": weight, "row": weight[0]}})["model"]
    assert len({tensor.data_ptr() for tensor in taken.values()}) == 3
    assert not any(tensor.requires_grad for tensor in taken.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_arrive_before_save_returns():
    weight = torch.randn(64, 32, 3, 3, device="cuda")
    layouts = {"plain": weight, "channels_last": weight.to(memory_format=torch.channels_last), "host": torch.ones(3)}
    expected = {"model": {name: tensor.cpu() for name, tensor in layouts.items()}}
    taken = snapshot_into({}, {"model": layouts})
    weight.zero_()
    assert_same(expected, taken)
    assert (taken["model"]["plain"].is_pinned(), taken["model"]["host"].is_pinned()) == (True, False)


# --- a disk that fails ------------------------------------------------------------------------------------------------


@contextmanager
def no_fsync():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        yield


@contextmanager
def no_rename():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        yield


@contextmanager
def no_space():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "_check_space", refuse)
        yield


@contextmanager
def no_large_files():
    """The kernel refuses to write so much into a file, in the midst of it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def large(seed):
    return {"model": {"x": torch.full((50_000,), float(seed))}}


@pytest.mark.parametrize("harm", [no_large_files, no_fsync, no_rename, no_space])
def test_training_outlives_a_disk_that_fails_for_a_while(checkpoints, writer, reported, caplog, harm):
    writer.save(1, large(1), {})
    writer.finish()
    with harm():
        for step in (2, 3):
            writer.save(step, large(step), {})
            failed, message = reported.get(timeout=60)
            assert failed == step
            assert f"step {step} could not be written to {checkpoints.folder}" in message
            assert message in caplog.text
    writer.save(4, large(4), {})
    writer.finish()
    assert sorted(os.listdir(checkpoints.folder)) == ["step_00000001", "step_00000004"]
    assert_same(large(4), checkpoints.latest().tensors)


def test_the_last_one_is_tried_again_until_it_is_there(checkpoints, writer, reported, monkeypatch, caplog):
    with ExitStack() as fault:
        fault.enter_context(no_fsync())
        writer.save(7, small(7), FACTS, score=0.5)
        pauses = []

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 2:
                fault.close()

        monkeypatch.setattr("pipeline.storage.checkpoint_writer.time.sleep", sleep)
        writer.finish()
    assert pauses == [0, 0]
    assert_same(small(7), checkpoints.latest().tensors)
    assert checkpoints.latest().score == 0.5
    assert reported.qsize() == 1  # further tries are for the log only
    assert "tried again" in caplog.text
    writer.finish()


def test_a_last_one_that_cannot_be_written_is_an_error(checkpoints, writer):
    writer.save(1, small(1), {})
    writer.finish()
    with no_rename():
        writer.save(2, small(2), {})
        with pytest.raises(OSError, match="step 2 could not be written to .*: Input/output error; check space"):
            writer.finish()
    assert os.listdir(checkpoints.folder) == ["step_00000001"]
    writer.finish()
    assert_same(small(2), checkpoints.latest().tensors)


def test_the_tries_of_the_last_one_last_for_a_minute():
    assert sum(RETRY_AFTER) == 60
    assert list(RETRY_AFTER) == sorted(RETRY_AFTER)


def test_an_interrupted_snapshot_is_never_written(checkpoints, writer, monkeypatch):
    """After a failed write, the next snapshot overwrites what would be tried again: half of it is no checkpoint."""

    def interrupted(buffers, tensors):
        buffers["model"]["weight"].zero_()
        raise KeyboardInterrupt

    with no_fsync():
        writer.save(1, small(1), {})
        monkeypatch.setattr("pipeline.storage.checkpoint_writer.snapshot_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.save(2, small(2), {})
    writer.finish()
    assert checkpoints.steps() == []


# --- faults of the program, and the end of it ----------------------------------------------------------------------


@pytest.mark.parametrize("ask", [lambda writer: writer.save(2, small(), {}), CheckpointWriter.finish])
def test_a_fault_of_the_program_is_raised_on_the_training_thread_once(writer, checkpoints, ask):
    writer.save(1, small(), {"lr": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        ask(writer)
    writer.finish()
    assert os.listdir(checkpoints.folder) == []


def test_a_listener_that_fails_is_a_fault_of_the_program(checkpoints):
    def on_failure(step, message):
        raise RuntimeError("nobody listens")

    writer = CheckpointWriter(checkpoints, on_failure, retry_after=())
    with no_fsync():
        writer.save(1, small(), {})
        with pytest.raises(RuntimeError, match="nobody listens"):
            writer.finish()


def test_the_end_of_the_block_waits_for_the_disk(checkpoints, writer, gate):
    with writer:
        writer.save(1, small(1), {})
        threading.Timer(0.05, gate.set).start()
    assert checkpoints.steps() == [1]


def save_and_fail(writer, step):
    with writer:
        writer.save(step, small(step), {})
        raise ZeroDivisionError


def test_an_exception_in_the_block_waits_too_and_stays_the_one_that_is_raised(checkpoints, writer, caplog):
    with pytest.raises(ZeroDivisionError):
        save_and_fail(writer, step=1)
    assert checkpoints.steps() == [1]
    with no_fsync(), pytest.raises(ZeroDivisionError):
        save_and_fail(writer, step=2)
    assert checkpoints.steps() == [1]
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_the_end_of_the_block_tells_what_is_not_written(writer):
    with no_fsync(), pytest.raises(OSError, match="step 3"), writer:
        writer.save(3, small(3), {})


def test_a_process_that_ends_without_finish_still_writes(tmp_path):
    script = textwrap.dedent("""
        import sys, time, torch
        from pipeline.storage.checkpoint import Checkpoints
        from pipeline.storage.checkpoint_writer import CheckpointWriter
        write = Checkpoints.write
        Checkpoints.write = lambda *args: (time.sleep(0.3), write(*args))
        writer = CheckpointWriter(Checkpoints(sys.argv[1]), print)
        writer.save(1, {"model": {"x": torch.ones(3)}}, {})
        raise SystemExit(3)
    """)
    env = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=False)
    assert ended.returncode == 3
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert Checkpoints(tmp_path).latest().step == 1


def save_in_a_loop(folder, first, report):
    """Announces each step of which it knows that it is on the disk."""
    torch.set_num_threads(1)
    writer = CheckpointWriter(Checkpoints(folder, keep=2), lambda step, message: os._exit(4))
    for step in range(first, first + 10_000):
        tensors = {stem: {"x": torch.full((200_000,), float(step))} for stem in ("model", "ema")}
        writer.save(step, tensors, {"step": step})
        os.write(report, (step - 1).to_bytes(8, "little"))


def kill_while_saving(folder, first, delay):
    """The last step that a process announced before it was killed, in its third save or later."""
    reader, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_in_a_loop(folder, first, report)
        finally:
            os._exit(5)
    os.close(report)
    with open(reader, "rb") as file:
        announced = file.read(3 * 8)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        announced += file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return int.from_bytes(announced[-8:], "little")


def test_kills_at_random_moments_leave_only_whole_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    hidden, latest = 0, 0
    for seed in range(20):
        announced = kill_while_saving(tmp_path, latest + 1, delay=random.Random(seed).uniform(0, 0.04))
        hidden += any(name.startswith(".") for name in os.listdir(tmp_path))
        for step in checkpoints.steps():
            content = read_folder(checkpoints.path(step)).tensors
            assert all((content[stem]["x"] == step).all() for stem in ("model", "ema"))
        assert checkpoints.steps()[-1] >= announced > latest
        latest = checkpoints.steps()[-1]
    assert hidden > 0  # some kills met a write
    checkpoints.save(latest + 1, small(), {})
    assert sorted(os.listdir(tmp_path)) == [checkpoints.path(step).name for step in (latest, latest + 1)]

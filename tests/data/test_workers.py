"""Processes that make items ahead: in order, one-line errors for all that happens to them, and none is left behind."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import workers as workers_module
from pipeline.data.workers import WorkerFailed, iterate, iterate_in_workers
from pipeline.distributed.preemption import StopRequest
from pipeline.distributed.watchdog import STALLED
from shard_data import progress
from tests.helpers.launching import ROOT, TIMEOUT, is_alive, launch, run_command, started, wait_until
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set


class Numbers:
    """Items are arrays of their number; making one may take a while, need progress, hang, or raise."""

    def __init__(self, seconds: float = 0.0, hangs: int | None = None, error: Exception | None = None):
        self.seconds, self.hangs, self.error = seconds, hangs, error

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        if number == self.hangs:
            time.sleep(1000)
        if self.error is not None and number == 3:
            raise self.error
        for _ in range(10):
            time.sleep(self.seconds / 10)
            progress.advance()
        return np.full(100_000, number), number


def numbers_of(items) -> list[int]:
    found = []
    for array, number in items:
        assert (array == number).all()
        found.append(number)
    return found


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@contextmanager
def no_child_left():
    """None after the block, within a second."""
    yield
    wait_until(lambda: not multiprocessing.active_children(), timeout=5)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_items_come_in_order(workers):
    with no_child_left():
        assert numbers_of(iterate_in_workers(Numbers(), range(3, 20), workers)) == list(range(3, 20))
        assert numbers_of(iterate_in_workers(Numbers(), range(1), workers)) == [0]
        assert numbers_of(iterate_in_workers(Numbers(), range(0), workers)) == []
    assert numbers_of(iterate(Numbers(), range(3, 20))) == list(range(3, 20))


def test_workers_that_are_not_forked(monkeypatch):
    monkeypatch.setattr(workers_module, "multiprocessing", multiprocessing.get_context("spawn"))
    assert numbers_of(iterate_in_workers(Numbers(), range(3), 1)) == [0, 1, 2]


def test_workers_make_a_few_items_ahead_and_no_more(tmp_path):
    class Traced(Numbers):
        def __getitem__(self, number: int):
            (tmp_path / str(number)).touch()
            return super().__getitem__(number)

    items = iterate_in_workers(Traced(), range(100), 2)
    next(items)
    wait_until(lambda: len(list(tmp_path.iterdir())) > 8)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 2 * (workers_module.READ_AHEAD + 3)


def test_a_loop_that_ends_early_leaves_no_worker():
    with no_child_left():
        items = iterate_in_workers(Numbers(), range(100), 2)
        next(items)
        assert len(children()) == 2
        del items


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("a wrong thing"), ValueError, "^a wrong thing$"),
        (OSError(5, "a fault", "a file"), OSError, r"^\[Errno 5\] a fault: 'a file'$"),
        (KeyError("a bug"), RuntimeError, r"(?s)in a data loader worker.*raise self\.error.*KeyError: 'a bug'"),
    ],
)
def test_an_error_is_raised_in_its_turn(error, kind, message):
    items = iterate_in_workers(Numbers(error=error), range(10), 2)
    assert [next(items)[1] for _ in range(3)] == [0, 1, 2]
    with no_child_left(), pytest.raises(kind, match=message):
        next(items)


class Threads(Numbers):
    def __getitem__(self, number: int):
        return torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_workers_use_one_thread_and_leave_ctrl_c_to_the_trainer():
    assert list(iterate_in_workers(Threads(), range(2), 2)) == [(1, True), (1, True)]


# ------------------------------------------------------------------------------------------ killed and stuck workers


def test_a_killed_worker_is_named():
    """Workers that read ahead are nearly always in the middle of sending an item."""
    items = iterate_in_workers(Numbers(), range(100), 2, timeout=30)
    next(items)
    time.sleep(0.3)
    killed = min(children())
    os.kill(killed, signal.SIGKILL)
    message = rf"^data loader worker 0 \(process {killed}\) ended unexpectedly: SIGKILL; if memory ran out, lower data"
    with no_child_left(), pytest.raises(WorkerFailed, match=message):
        numbers_of(items)


@pytest.mark.parametrize("how", ["hangs", "stopped"])
def test_a_stuck_worker_ends_the_loop(how):
    """Also one that was stopped in the middle of sending an item, and the worker beside it."""
    items = iterate_in_workers(Numbers(hangs=11 if how == "hangs" else None), range(40), 2, timeout=0.7)
    next(items)
    pids = children()
    if how == "stopped":
        time.sleep(0.3)
        os.kill(max(pids), signal.SIGSTOP)
    message = (
        rf"^the data loader is stuck: data loader worker 1 \(process {max(pids)}\) has read nothing for 0\.7 s "
        r"\(train\.collective_timeout\); look at the disk or network that holds data\.root$"
    )
    with no_child_left(), pytest.raises(WorkerFailed, match=message):
        numbers_of(items)
    assert not any(map(is_alive, pids))


def test_slow_items_are_no_hang_while_something_is_read():
    """Each takes longer than the timeout, in a worker and without."""
    assert numbers_of(iterate_in_workers(Numbers(seconds=1.5), range(2), 2, timeout=0.8)) == [0, 1]
    assert numbers_of(iterate(Numbers(seconds=1.5), range(1), timeout=0.8)) == [0]


def test_a_slow_user_of_items_is_no_hang():
    for items in (iterate_in_workers(Numbers(), range(3), 1, 0.5), iterate(Numbers(), range(3), 0.5)):
        for _ in items:
            time.sleep(0.8)


STUCK = """
from pipeline.data.workers import iterate
from pipeline.distributed.logs import start_logging
from tests.data.test_workers import Numbers, numbers_of
start_logging(is_main=True)
numbers_of(iterate(Numbers(hangs=2), range(10), timeout=0.5))
"""


def test_a_read_that_hangs_in_the_training_process_ends_it():
    result = run_command(sys.executable, "-c", STUCK, timeout=TIMEOUT, PYTHONPATH=str(ROOT))
    assert result.returncode == STALLED
    assert re.match(r"error: the data loader is stuck: this process has read nothing for 0\.5 s .*\n$", result.stderr)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_tiny_recipe(tmp_path, write_tiny_set(tmp_path / "data"), train={"steps": 1}, validation={"every": 0})


MOUNTS = "mount -t tmpfs -o size={size} tmpfs /dev/shm"


def may_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-m", "sh", "-c", MOUNTS.format(size="1M")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount in a namespace (root)")
def test_batches_need_no_shared_memory(recipe):
    """Batches of 72 KiB in a /dev/shm of 64 KiB, as larger ones in the 64 MiB of Docker's default."""
    words = ["--config", str(recipe), "--run-dir", str(recipe.parent / "run"), "data.workers=2", "samples.every=0"]
    words += ["train.batch_size=96", "train.collective_timeout=20"]
    script = f'{MOUNTS.format(size="64k")} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, str(ROOT / "pipeline/train.py"), *words]
    result = run_command(*command, timeout=TIMEOUT, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr


HANGING_DISK = """
import os, sys, time
from pipeline import train
from pipeline.data.tar_images import TarImages
if os.environ["RANK"] == "0":
    TarImages.read_into = lambda *arguments: time.sleep(1000)
sys.exit(train.main())
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_stuck_loader_of_the_first_rank_ends_all_ranks(recipe, workers):
    """Where the rank reads itself, the watchdog ends it; where a worker reads, its timeout does, or the watchdog, which
    has the same one: both name who is stuck.
    """
    script = recipe.parent / "script.py"
    script.write_text(HANGING_DISK)
    words = ["--config", str(recipe), "--run-dir", str(recipe.parent / "run"), f"data.workers={workers}"]
    result = launch(2, script, *words, "train.collective_timeout=4", PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    worker = r"^error: the data loader is stuck: data loader worker 0 \(process \d+\) has read nothing for 4 s"
    itself = r"collective timeout: after 4 s .*\n  rank 0 .*pipeline/data/\w+\.py:\d+ in "
    assert re.search(f"{worker}|{itself}" if workers else itself, result.stderr, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------ signals


def signal_from_elsewhere(pids: list[int]) -> None:
    """A worker's own process may end it; SLURM may not."""
    code = "import os, sys; [os.kill(int(pid), number) for pid in sys.argv[1:] for number in (10, 15)]"
    subprocess.run([sys.executable, "-c", code, *map(str, pids)], check=True)


def test_workers_continue_when_a_whole_job_is_signalled():
    """SLURM signals every process of a step."""
    with StopRequest(), no_child_left():
        items = iterate_in_workers(Numbers(0.005), range(40), 2)
        found = [next(items)[1] for _ in range(4)]
        signal_from_elsewhere(children())
        found += numbers_of(items)
    assert found == list(range(40))


ENDLESS = """
import signal
from pipeline.data import workers
from tests.data.test_workers import Numbers, children
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
items = workers.iterate_in_workers(Numbers(0.005), range(10**9), 2)
next(items)
print(*children(), flush=True)
for _ in items:
    pass
"""


def test_ctrl_c_ends_the_process_once_and_quietly():
    """The whole group gets the signal, as from a terminal: one traceback, the trainer's own."""
    with started([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGINT
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")
        wait_until(lambda: not any(map(is_alive, pids)))


LATE = """
import os, time
from pipeline.data import workers
from tests.data.test_workers import Numbers
def start_late(start=workers._ignore_signals):
    print(os.getpid(), flush=True)
    time.sleep(2)
    start()
workers._ignore_signals = start_late
next(workers.iterate_in_workers(Numbers(), range(10**9), 2))
"""


@pytest.mark.parametrize("script", [ENDLESS, LATE], ids=["working", "starting"])
def test_workers_end_when_their_process_is_killed(script):
    """Also where they have not started their work."""
    with started([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        while len(pids) < 2:
            pids.append(int(process.stdout.readline()))
        process.kill()
        wait_until(lambda: not any(map(is_alive, pids)))


SUSPENDED = """
from pipeline.data.workers import iterate, iterate_in_workers
from tests.data.test_workers import Numbers
for items in (iterate_in_workers(Numbers(0.6), range(6), 1, 1.0), iterate(Numbers(0.1), range(6), 1.0)):
    for _, number in items:
        print(number, flush=True)
"""


@pytest.mark.slow
def test_a_suspended_job_is_not_stuck():
    """As by `scontrol suspend`, for longer than the timeout."""
    with started([sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE) as process:
        for number in [*range(6), *range(6)]:
            assert int(process.stdout.readline()) == number
            if number == 1:
                os.killpg(process.pid, signal.SIGSTOP)
                time.sleep(1.5)
                os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(TIMEOUT) == 0


LEAVES = """
from pipeline.data.workers import iterate_in_workers
from tests.data.test_workers import Numbers
items = iterate_in_workers(Numbers(hangs=1), range(10), 1)
next(items)
"""


def test_leaving_while_a_worker_reads_ends_it():
    """At its end the interpreter sends SIGTERM to workers and waits for them, as long as that takes."""
    result = run_command(sys.executable, "-c", LEAVES, timeout=TIMEOUT, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stderr) == (0, "")

"""Signals that ask a run to stop: noted, agreed between steps, and ignored by the loader's workers."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.data.loader import _start_worker, start_workers
from pipeline.distributed.preemption import SIGNALS, StopRequest
from tests.helpers.launching import ROOT, TIMEOUT, is_alive, run_command, started, wait_until
from tests.helpers.rank_scripts import run_script, write_script


@pytest.fixture
def handlers():
    """The process's handlers, put back after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_the_reason(handlers, number):
    with StopRequest() as stop:
        assert stop.reason is None
        signal.raise_signal(number)
        assert stop.reason == number.name
        for again in SIGNALS:
            signal.raise_signal(again)
        assert stop.reason == number.name
    for again in SIGNALS:
        signal.raise_signal(again)  # would end this process if it were not ignored


def test_handlers_are_restored_where_nobody_asked(handlers):
    caught = []
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    with StopRequest() as stop:
        pass
    signal.raise_signal(signal.SIGUSR1)
    assert caught == [signal.SIGUSR1]
    assert stop.reason is None
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def test_ctrl_c_is_left_alone(handlers):
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)


EDGE = """
import json
from pipeline.distributed.preemption import StopRequest
with StopRequest() as stop:
    for step in range(1000):
        runtime.sum(torch.ones(2))
        if step == 7 and runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        if runtime.any_of(False, stop.reason is not None)[1]:
            break
    reasons = runtime.gather_objects(stop.reason)
(folder / f"{runtime.rank}.json").write_text(json.dumps([step, reasons]))
runtime.close()
if runtime.rank == 1:
    signal.raise_signal(signal.SIGTERM)
"""


def test_ranks_stop_at_the_same_step_whichever_was_signalled(tmp_path):
    result = run_script(2, write_script(tmp_path, EDGE))
    assert result.returncode == 0, result.stderr
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0][0] == 7
    assert results[0][1] in ([None, "SIGUSR1"], [None, "SIGTERM"])  # both were pending; the kernel orders them


# ------------------------------------------------------------------------------------------------------ loader workers


class Numbers(Dataset):
    """Numbers, each but the first after a while."""

    def __init__(self, count: int, seconds: float):
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        time.sleep(self.seconds if number else 0)
        return torch.tensor(number)


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


def signal_from_elsewhere(pids: list[int]) -> None:
    """A worker's own process may end it; SLURM may not."""
    code = "import os, sys; [os.kill(int(pid), number) for pid in sys.argv[1:] for number in (10, 15)]"
    subprocess.run([sys.executable, "-c", code, *map(str, pids)], check=True)


def test_workers_read_on_when_a_whole_job_is_signalled(handlers):
    """SLURM signals every process of a step. The loader ends in good order all the same."""
    loader = DataLoader(Numbers(40, 0.005), batch_size=None, num_workers=2, worker_init_fn=_start_worker)
    with StopRequest():
        batches = start_workers(loader)
        found = [next(batches).item() for _ in range(4)]
        pids = workers()
        assert len(pids) == 2
        signal_from_elsewhere(pids)
        found += [batch.item() for batch in batches]
    assert found == list(range(40))
    wait_until(lambda: not any(map(is_alive, pids)))


READS = """
import sys, time
from torch.utils.data import DataLoader
from pipeline.data.loader import _start_worker
from tests.distributed.test_preemption import Numbers, workers
def start(worker):
    time.sleep(2 * worker)
    _start_worker(worker)
batches = iter(DataLoader(Numbers(1000, 0.005), batch_size=None, num_workers=2, worker_init_fn=start))
next(batches)
print(*workers(), flush=True)
time.sleep(1000)
"""


def test_workers_end_when_their_process_is_killed():
    """Also where one of them had not begun yet."""
    with started(
        [sys.executable, "-c", READS],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        process.kill()
        wait_until(lambda: not any(map(is_alive, pids)))


LEAVES = """
from torch.utils.data import DataLoader
from pipeline.data.loader import _start_worker
from tests.distributed.test_preemption import Numbers
batches = iter(DataLoader(Numbers(1000, 1000), batch_size=None, num_workers=1, worker_init_fn=_start_worker))
next(batches)
"""


def test_leaving_while_a_worker_reads_ends_it():
    """At its end the interpreter sends SIGTERM to workers and waits for them, as long as that takes."""
    result = run_command(sys.executable, "-c", LEAVES, timeout=TIMEOUT, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stderr) == (0, "")

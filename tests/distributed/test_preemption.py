"""Signals that request a run to stop: recorded, and agreed on by all ranks between steps."""

import hashlib
import json
import os
import signal
import threading
import time

import pytest

from pipeline.distributed import preemption
from pipeline.distributed.preemption import SIGNALS, StopRequest
from tests.helpers.launching import wait_until
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


def test_ctrl_c_raises_outside_training(handlers):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert (stop.reason, stop.interrupted) == (None, True)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_is_recorded_and_the_second_ends(handlers, monkeypatch, second):
    """SLURM and torchrun both deliver the first one: what follows within a moment is not a second."""
    monkeypatch.setattr(preemption, "REPEAT_AFTER", 0.5)
    ended = []
    with StopRequest() as stop, stop.finishing_steps(lambda: ended.append(stop.reason)):
        for number in (signal.SIGINT, second):
            signal.raise_signal(number)
        wait_until(lambda: stop.interrupted)
        time.sleep(0.6)
        assert ended == []
        for number in (signal.SIGUSR1, second):
            signal.raise_signal(number)
        wait_until(lambda: ended)
    assert ended == ["SIGINT"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_sigterm_alone_is_never_a_second_ctrl_c(handlers, monkeypatch):
    monkeypatch.setattr(preemption, "REPEAT_AFTER", 0.0)
    ended = []
    with StopRequest() as stop, stop.finishing_steps(lambda: ended.append(stop.reason)):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
    assert (stop.reason, ended) == ("SIGTERM", [])


def test_ctrl_c_is_noticed_while_the_main_thread_computes(handlers):
    """In one call of a C function Python runs no handler."""
    seen = []
    with StopRequest() as stop, stop.finishing_steps(lambda: None):
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        observer = threading.Thread(
            target=lambda: (wait_until(lambda: stop.interrupted and stop.has_arrived), seen.append(time.monotonic()))
        )
        observer.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second or more
        computed = time.monotonic()
        observer.join()
    assert stop.reason == "SIGINT"
    assert seen[0] < computed


def test_an_ignored_ctrl_c_stays_ignored(handlers):
    """As in a background job of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.finishing_steps(pytest.fail):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert (stop.reason, stop.interrupted) == (None, False)
    finally:
        signal.signal(signal.SIGINT, before)


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

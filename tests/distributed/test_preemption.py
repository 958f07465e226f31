"""Signals that request a run to stop: recorded, and agreed on by all ranks between steps."""

import json
import signal

import pytest

from pipeline.distributed.preemption import SIGNALS, StopRequest
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

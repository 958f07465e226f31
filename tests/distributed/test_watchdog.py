"""Processes that hang, stop, fail or lose their launcher: real ones, two of them, with a timeout of 3 seconds."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.heartbeat import LONGEST_TICK, Heartbeat, Heartbeats
from pipeline.distributed.watchdog import HUNG, ORPHANED, PEER_FAILED, STALLED
from tests.helpers.launching import ROOT, TIMEOUT, clean_environment, is_alive, started, wait_until
from tests.helpers.rank_scripts import pid_of, run_script, script_command, write_script


def exit_codes(stderr: str) -> dict[int, int]:
    """By rank, as torchrun's last report says."""
    return {int(r): int(c) for r, c in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", stderr)}


# ------------------------------------------------------------------------------------------------------------ hanging

HANGS = """
from pipeline.distributed.preemption import StopRequest
def hang(step):
    if runtime.rank == 1:
        time.sleep(1000)
with StopRequest():  # the launcher ends the slower rank by SIGTERM, which is noted only
    train(hang)
"""


def test_a_rank_that_sleeps_is_named_and_all_show_their_stacks(tmp_path):
    result = run_script(2, write_script(tmp_path, HANGS))
    assert "collective timeout: after 3 s (train.collective_timeout)" in result.stderr
    assert re.search(r"rank 1 on \S+ has not joined; it is at: \S*script\.py:\d+ in hang", result.stderr)
    assert result.stderr.count("has not joined") == 1
    assert exit_codes(result.stderr) == {0: HUNG, 1: HUNG}
    stacks = [(tmp_path / f"stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "runtime.py" in stacks[0]
    assert " in sum\n" in stacks[0]
    assert " in hang\n" in stacks[1]
    for rank in (0, 1):
        assert f"rank {rank} on" in result.stderr
        assert stacks[rank].split("\n", 1)[1].strip() in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(tmp_path, rank):
    """Also where it is the main process, which cannot print. Continued, it ends too, by itself or by the launcher."""
    with started(script_command(2, write_script(tmp_path, "train()"))) as launcher:
        pids = [pid_of(tmp_path, r) for r in (0, 1)]
        os.kill(pids[rank], signal.SIGSTOP)
        output = ""
        while "no heartbeat" not in output:
            line = launcher.stderr.readline()
            assert line, output
            output += line
        os.kill(pids[rank], signal.SIGCONT)
        output += launcher.communicate(timeout=TIMEOUT)[1]
    assert re.search(rf"rank {rank} on \S+: no heartbeat for \d+ s; it was last at: ", output)
    codes = exit_codes(output)
    assert codes[1 - rank] == HUNG
    assert codes[rank] in (HUNG, -signal.SIGTERM)


SLOW = """
for step in range(5):
    time.sleep(1.6 * runtime.rank)
    runtime.sum(torch.ones(2))
runtime.close()
"""


@pytest.mark.slow
def test_a_slow_rank_that_advances_is_not_missing(tmp_path):
    """The other one waits for it more than twice the timeout in all, but never as long as the timeout."""
    result = run_script(2, write_script(tmp_path, SLOW))
    assert result.returncode == 0, result.stderr


STALLS = """
from pipeline.distributed.preemption import StopRequest
from shard_data import progress
def advance(pieces):
    for _ in range(pieces):
        time.sleep(1)
        progress.advance()
runtime.run_on_all(lambda: advance(6) if runtime.rank == 0 else None, "counting")
def hang():
    advance(6)
    (folder / "advanced").write_text("")
    time.sleep(1000)
with StopRequest():  # the launcher ends the slower rank by SIGTERM, which is noted only
    runtime.run_on_main(hang, "hashing the shards")
"""


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_work_that_others_wait_for_ends_the_run_when_it_stands_still(tmp_path, processes):
    """Not while it advances: twice for twice the timeout."""
    result = run_script(processes, write_script(tmp_path, STALLS, progress_timeout=3))
    assert (tmp_path / "advanced").exists(), result.stderr
    place = r"at \S+:\d+ in \S+"
    lines = re.findall(
        rf"^rank 0 on \S+ made no progress in hashing the shards for . s \({place}\); .*$", result.stderr, re.M
    )
    assert len(lines) == 1, result.stderr
    assert lines[0].endswith("the run ends (train.progress_timeout: 3 s)")
    assert "Python stacks" not in result.stderr
    for rank in range(processes):
        assert "Current thread" in (tmp_path / f"stacks/rank_0000{rank}.txt").read_text()
    if processes == 2:
        assert exit_codes(result.stderr) == {0: STALLED, 1: STALLED}
    else:
        assert f"exit status {STALLED}" in result.stderr


# ------------------------------------------------------------------------------------------------------------ failing

FAILS = """
def fail(step):
    if runtime.rank == 1:
        raise RuntimeError("out of luck")
try:
    with runtime.propagate_failure():
        train(fail)
finally:
    runtime.close()
"""


def test_one_ranks_error_ends_both_with_its_message(tmp_path):
    """The launcher names the rank that failed, not the one that had to follow."""
    result = run_script(2, write_script(tmp_path, FAILS))
    message = re.findall(r"^rank 1 on \S+ failed: RuntimeError: out of luck$", result.stderr, re.MULTILINE)
    assert len(message) == 1
    assert "[rank1]: RuntimeError: out of luck" in result.stderr
    assert "collective timeout" not in result.stderr
    assert re.search(r"Root Cause.*\n\[0\]:\n.*\n.*\n +rank +: 1 .*\n +exitcode +: 1 ", result.stderr)


VANISHES = """
from pipeline.distributed.preemption import StopRequest
def vanish(step):
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    with StopRequest(), runtime.propagate_failure():  # the launcher ends the survivor by SIGTERM, which is noted only
        train(vanish)
finally:
    runtime.close()
"""


@pytest.mark.slow
def test_the_survivor_of_a_killed_rank_names_it(tmp_path):
    result = run_script(2, write_script(tmp_path, VANISHES))
    assert re.search(
        r"^rank 0 on \S+ failed: RuntimeError: .*; rank 1 gives no heartbeat$", result.stderr, re.MULTILINE
    )
    assert exit_codes(result.stderr) == {0: 1, 1: -signal.SIGKILL}


SAME = """
try:
    with runtime.propagate_failure():
        train(lambda step: int("spoiled"))
except ValueError as error:
    (folder / f"{runtime.rank}.error").write_text(str(error))
finally:
    runtime.close()
"""


def test_an_error_of_all_ranks_is_raised_on_each(tmp_path):
    result = run_script(2, write_script(tmp_path, SAME))
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stderr
    assert [(tmp_path / f"{rank}.error").read_text() for rank in (0, 1)] == [
        "invalid literal for int() with base 10: 'spoiled'"
    ] * 2


# ----------------------------------------------------------------------------------------------------- launcher's death


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_end_when_their_launcher_is_killed(tmp_path, processes):
    """Within 5 seconds; 10 are granted on a busy machine."""
    script = write_script(tmp_path, "train()")
    with (
        (tmp_path / "stderr").open("w") as stderr,
        started(script_command(processes, script), stderr=stderr) as launcher,
    ):
        pids = [pid_of(tmp_path, rank) for rank in range(processes)]
        assert all(map(is_alive, pids))
        launcher.kill()
        end = time.monotonic() + 10
        wait_until(lambda: not any(map(is_alive, pids)))
        assert time.monotonic() < end
    output = (tmp_path / "stderr").read_text()
    assert "the launcher" in output
    assert "has died; this process ends" in output


def test_ranks_end_when_their_launcher_is_stopped(tmp_path):
    """It holds the store of the process group, which then does not answer."""
    script = write_script(tmp_path, "train()")
    with (tmp_path / "stderr").open("w") as stderr, started(script_command(2, script), stderr=stderr) as launcher:
        pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
        launcher.send_signal(signal.SIGSTOP)
        wait_until(lambda: not any(map(is_alive, pids)), timeout=30)
    output = (tmp_path / "stderr").read_text()
    assert re.search(
        r"^rank 0 on \S+ ends: the store .* has not answered for \d s; is its launcher stopped\?$", output, re.M
    )


LOOK = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1], "look").exists():
    time.sleep(0.02)
from pipeline.distributed.launcher import Launcher
launcher = Launcher()
(Path(sys.argv[1]) / "seen.part").write_text(f"{launcher.exists} {launcher.is_gone()}")
(Path(sys.argv[1]) / "seen.part").rename(Path(sys.argv[1]) / "seen")
"""

START = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]])"
"""What a launcher does, but that it ends at once."""


def look(folder: Path, parent: list[str], marked: bool) -> str:
    """What a process sees whose parent ended before it looked."""
    script = folder / "look.py"
    script.write_text(LOOK)
    marks = {"TORCHELASTIC_RUN_ID": "none"} if marked else {}
    with started([*parent, str(script), str(folder)], env=clean_environment(PYTHONPATH=str(ROOT)) | marks) as process:
        process.wait(TIMEOUT)
        (folder / "look").write_text("")
        wait_until((folder / "seen").exists)
    return (folder / "seen").read_text()


def test_a_launcher_that_died_before_we_looked_is_missed(tmp_path):
    assert look(tmp_path, [sys.executable, "-c", START], marked=True) == "True True"


def test_without_a_launcher_the_parents_end_means_nothing(tmp_path):
    """As `nohup python pipeline/train.py &` in a shell that is closed."""
    assert look(tmp_path, [sys.executable, "-c", START], marked=False) == "False False"
    (tmp_path / "seen").unlink()
    assert look(tmp_path, ["sh", "-c", f'"{sys.executable}" "$0" "$1" &'], marked=False) == "False False"


def test_a_shell_in_a_launchers_environment_is_no_launcher(tmp_path):
    """Its variables may have been exported; the shell is the parent, and runs in our session."""
    (tmp_path / "look").write_text("")
    (tmp_path / "look.py").write_text(LOOK)
    words = ["sh", "-c", f'"{sys.executable}" "$0" "$1"; true', str(tmp_path / "look.py"), str(tmp_path)]
    subprocess.run(
        words,
        env=clean_environment(PYTHONPATH=str(ROOT), TORCHELASTIC_RUN_ID="none"),
        check=True,
        timeout=TIMEOUT,
    )
    assert (tmp_path / "seen").read_text() == "False False"


# ----------------------------------------------------------------------------------------------------------- heartbeats


def latest(joined: list[int], count: int, silent: frozenset[int] = frozenset()) -> list[Heartbeat]:
    return [Heartbeat(0 if rank in silent else count, n, "host", "a.py:1 in f") for rank, n in enumerate(joined)]


def test_who_is_behind_is_missing_after_the_timeout():
    heartbeats = Heartbeats(latest([5, 5, 5], 0), timeout=10)
    for tick in range(1, 12):
        heartbeats.update(latest([6, 5, 6], tick), elapsed=1)
        assert heartbeats.missing() == []
    heartbeats.update(latest([6, 5, 6], 12), elapsed=1)
    assert heartbeats.missing() == [1]
    assert heartbeats.describe(1) == "rank 1 on host has not joined; it is at: a.py:1 in f"


@given(st.lists(st.integers(0, 3), min_size=2, max_size=4), st.integers(1, 60))
def test_a_rank_that_waits_without_a_collective_is_not_behind(extra, ticks):
    """All have entered as many; for how long does not matter. Nor does being ahead in turns."""
    heartbeats = Heartbeats(latest([0] * len(extra), 0), timeout=3)
    for tick in range(1, ticks):
        ahead = [tick * 4 + n for n in extra] if tick % 2 else [tick * 4] * len(extra)
        heartbeats.update(latest(ahead, tick), elapsed=1)
        assert heartbeats.missing() == []
    for tick in range(ticks, ticks + 10):
        heartbeats.update(latest([ticks * 4 + 3] * len(extra), tick), elapsed=1)
    assert heartbeats.missing() == []


def test_a_silent_rank_is_missing_even_where_no_rank_waits():
    heartbeats = Heartbeats(latest([5, 5], 0), timeout=10)
    for tick in range(1, 12):
        heartbeats.update(latest([5, 5], tick, silent=frozenset({0})), elapsed=1)
    assert heartbeats.missing() == [0]
    assert heartbeats.present() == [1]
    assert heartbeats.describe(0) == "rank 0 on host: no heartbeat for 11 s; it was last at: a.py:1 in f"


def test_a_rank_that_left_is_missed_only_by_those_who_wait_for_it():
    def left(joined: int, tick: int) -> list[Heartbeat]:
        return [Heartbeat(tick, joined, "host", "a.py:1 in f"), Heartbeat(3, 5, "host", "its end", running=False)]

    heartbeats = Heartbeats(left(5, 0), timeout=10)
    for tick in range(1, 100):
        heartbeats.update(left(5, tick), elapsed=1)
        assert heartbeats.missing() == []
    for tick in range(100, 112):
        heartbeats.update(left(6, tick), elapsed=1)
    assert heartbeats.missing() == [1]
    assert heartbeats.describe(1) == "rank 1 on host has left the run"


def working(advanced: list[int], waiting: list[bool], count: int) -> list[Heartbeat]:
    return [
        Heartbeat(count, 5, "host", "a.py:1 in f", True, done, "" if waits else "hashing", waits)
        for done, waits in zip(advanced, waiting, strict=True)
    ]


@pytest.mark.parametrize("waiting", [[False, True, True], [False, False, True]])
def test_work_is_stalled_when_no_rank_advances(waiting):
    """A rank that waits for a file that another one fetches does not advance itself."""
    heartbeats = Heartbeats(working([0, 0, 0], waiting, 0), timeout=3, progress_timeout=10)
    for tick in range(1, 100):
        heartbeats.update(working([tick // 9, 0, 0], waiting, tick), elapsed=1)
        assert heartbeats.stalled() == []
    for tick in range(100, 112):
        heartbeats.update(working([99, 0, 0], waiting, tick), elapsed=1)
    assert heartbeats.stalled() == [rank for rank in range(3) if not waiting[rank]]
    assert heartbeats.missing() == []
    assert heartbeats.describe_stall(0) == "rank 0 on host made no progress in hashing for 11 s (at a.py:1 in f)"


def test_work_that_no_rank_waits_for_is_not_stalled():
    heartbeats = Heartbeats(working([0, 0], [False, False], 0), timeout=3, progress_timeout=10)
    for tick in range(1, 100):
        heartbeats.update(working([0, 0], [False, False], tick), elapsed=1)
        assert heartbeats.stalled() == []


def test_a_suspended_observer_reports_no_rank():
    """All of a job stopped for a day, and continued: the others' heartbeats come a moment later."""
    heartbeats = Heartbeats(latest([6, 5], 0), timeout=2 * LONGEST_TICK)
    heartbeats.update(latest([6, 5], 1), elapsed=1)
    heartbeats.update(latest([6, 5], 1), elapsed=86400)
    assert heartbeats.missing() == []


def test_exit_codes_are_neither_signals_nor_taken():
    codes = {HUNG, PEER_FAILED, ORPHANED, STALLED}
    assert len(codes) == 4
    assert all(2 < code < 124 for code in codes)

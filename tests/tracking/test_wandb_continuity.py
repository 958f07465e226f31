"""One W&B run over any number of kills: the unmodified client against a stand-in for the server."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.metrics_file import read_records
from pipeline.tracking.wandb_files import cut_torn_end, whole_records
from tests.tracking.test_tracker import log_chunks
from tests.tracking.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
KEY = "local-0123456789abcdef0123456789abcdef01234567"[-40:]
SAME_IN_EACH_ATTEMPT = {"train/loss", "kl/8x8_group00", "val/elbo"}

LOGGING_PROCESS = """
import logging, math, os, sys, time
from pathlib import Path
from pipeline.tracking.tracker import Tracker, TrackingConfig

folder, mode, attempt, last_step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("wandb").setLevel(logging.WARNING)
checkpoint = folder / "checkpoint"
start = int(checkpoint.read_text()) if checkpoint.exists() else 0
config = TrackingConfig(wandb=mode, wandb_timeout=3.0)
with Tracker(config, folder, {"seed": 1}, is_main=True, start_step=start, attempt=attempt) as run:
    print("ready", flush=True)
    for step in range(start + 1, last_step + 1):
        if step % 3 == 0:
            run.log(step, {"val/elbo": -1.0 / step})
        run.log(step, {"train/loss": math.sin(step), "kl/8x8_group00": math.nan if step % 5 == 0 else float(step)})
        if step % 101 == 0 or step == last_step:
            checkpoint.with_suffix(".new").write_text(str(step))
            checkpoint.with_suffix(".new").replace(checkpoint)
        time.sleep(0.005)
"""


class Attempts:
    """Starts of one run in `folder`, each a process of its own."""

    def __init__(self, folder: Path, server: WandbServer):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.server = server
        self.number = 0
        self.reached = 0
        self.said = ""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
            "HOME": str(folder.parent),
            "PYTHONPATH": str(ROOT),
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": server.url,
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",  # seconds, the least that wandb knows; by default 15
        }

    def start(self, mode: str, last_step: int) -> subprocess.Popen:
        self.number += 1
        command = [sys.executable, "-c", LOGGING_PROCESS, self.folder, mode, str(self.number), str(last_step)]
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder.parent,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill(self, mode: str, when: Callable[[], bool] | float, whole_group: bool = False) -> None:
        """Start, and after so many seconds of logging, or when something is so, SIGKILL the process, or its group."""
        process = self.start(mode, last_step=10**6)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        self.wait(process, when)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        self.said += process.communicate()[1]
        assert process.returncode == -signal.SIGKILL
        self.reached = max([self.reached, *(record["step"] for record in read_records(self.folder / "metrics.jsonl"))])

    def wait(self, process: subprocess.Popen, when: Callable[[], bool] | float) -> None:
        if isinstance(when, float):
            time.sleep(when)
            return
        while not when():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)

    def moments(self, seed: int) -> Iterator[Callable[[], bool] | float]:
        """Ten moments to kill at. Among them: when the server has steps that no checkpoint has, and the contrary."""
        chance = random.Random(seed)
        for number in range(10):
            if number % 5 == 2:
                yield lambda: self.server_step > (self.checkpoint or 0)
            elif number % 5 == 4:
                yield self.next_checkpoint()
            else:
                yield chance.choice([0.0, chance.uniform(0.0, 0.5), chance.uniform(0.5, 1.5)])

    def next_checkpoint(self) -> Callable[[], bool]:
        before = self.checkpoint
        return lambda: self.checkpoint != before

    @property
    def server_step(self) -> int:
        return max((run.last_step for run in list(self.server.runs.values())), default=-1)

    def finish(self, mode: str) -> None:
        last_step = self.reached + 30
        process = self.start(mode, last_step)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        self.said += error
        assert [line["step"] for line in self.metrics()] == list(range(1, last_step + 1))

    @property
    def checkpoint(self) -> int | None:
        path = self.folder / "checkpoint"
        return int(path.read_text()) if path.exists() else None

    def metrics(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{key: float(v) if isinstance(v, str) else v for key, v in json.loads(line).items()} for line in lines]

    def sync(self) -> str:
        """`wandb sync` of everything, as the log says that it is done."""
        result = subprocess.run(
            [Path(sys.executable).parent / "wandb", "sync", self.folder / "wandb"],
            cwd=self.folder.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stderr


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(float(a)) and math.isnan(float(b)))


def assert_one_run(server: WandbServer, attempts: Attempts) -> list[dict]:
    """Each record of metrics.jsonl is on the server once, in its order, under its step, with its values."""
    assert list(server.runs) == [(attempts.folder / "wandb_run_id").read_text().strip()]
    run = server.runs[list(server.runs)[0]]
    assert run.overwritten == 0
    history, metrics = run.history, attempts.metrics()
    assert [row["_step"] for row in history] == [record["step"] for record in metrics]
    for row, record in zip(history, metrics, strict=True):
        assert row["step"] == record["step"]
        assert {key for key in record if "/" in key} <= row.keys()
        for key in SAME_IN_EACH_ATTEMPT & record.keys():
            assert same(row[key], record[key]), (record["step"], key)
        assert row["attempt"] <= record["attempt"]  # W&B keeps a step as it was told first
        if row["attempt"] == record["attempt"]:
            assert row["perf/wall_clock_s"] == record["perf/wall_clock_s"]
            assert abs(row["_timestamp"] - record["time"]) < 5
    clock = [record["perf/wall_clock_s"] for record in metrics]
    assert clock == sorted(clock)
    assert KEY not in attempts.said
    return history


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def test_online_over_ten_kills(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    for number, moment in enumerate(attempts.moments(seed=1)):
        attempts.kill("online", moment, whole_group=number % 2 == 1)
    attempts.finish("auto")
    history = assert_one_run(server, attempts)
    pairs = zip(history, attempts.metrics(), strict=True)
    assert any(row["attempt"] < record["attempt"] for row, record in pairs)  # steps were replayed and not told again
    assert "already; they are not told again" in attempts.said
    assert "records of earlier attempts are sent now" in attempts.said
    assert next(iter(server.runs.values())).exit_codes == [0]


def test_offline_over_ten_kills(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    for number, moment in enumerate(attempts.moments(seed=2)):
        attempts.kill("offline", 0.5 if number % 5 == 2 else moment, whole_group=number % 2 == 1)
    attempts.finish("offline")
    assert server.runs == {}
    assert len(list(attempts.folder.glob("wandb/offline-run-*/*.wandb"))) == 11
    attempts.sync()
    assert_one_run(server, attempts)
    assert "records of earlier attempts are sent now" in attempts.said


def test_offline_and_online_in_turn(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    attempts.kill("offline", 1.5)
    attempts.kill("offline", 0.3)
    attempts.kill("online", 1.0)
    server.stop()
    attempts.kill("auto", 1.5)  # nobody answers: offline
    server.start()
    attempts.finish("auto")
    assert "The next attempt that reaches W&B" in attempts.said
    assert_one_run(server, attempts)
    assert "No runs to sync" in attempts.sync()  # all that was kept offline has been sent
    assert_one_run(server, attempts)


def test_a_server_that_is_away_for_a_while(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    process = attempts.start("online", 600)
    attempts.wait(process, lambda: attempts.server_step > 0)
    server.stop()
    sent = attempts.server_step
    time.sleep(1.5)
    server.start()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert 0 < sent < 600
    assert_one_run(server, attempts)


# --- the offline files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline_attempt(tmp_path_factory):
    """A folder in which one attempt was offline for 400 steps, and its file in there."""
    with WandbServer() as server:
        attempts = Attempts(tmp_path_factory.mktemp("offline") / "run", server)
        attempts.reached = 370
        attempts.finish("offline")
    (path,) = attempts.folder.glob("wandb/offline-run-*/*.wandb")
    return attempts.folder, path.relative_to(attempts.folder)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whole_records_end_where_the_file_is_torn_or_flipped(offline_attempt, data):
    content = offline_attempt[0].joinpath(offline_attempt[1]).read_bytes()
    records = list(log_chunks(content))
    found = list(whole_records(content))
    assert [record for record, _ in found] == records
    assert found[-1][1] == len(content) > 3 * 32768
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[place] ^= data.draw(st.integers(1, 255))
    whole = [pair for pair in found if pair[1] <= place]
    assert list(whole_records(content[:place])) == whole
    after_flip = list(whole_records(bytes(flipped)))
    assert after_flip == (found if 4 <= place < 7 else [] if place < 4 else whole) or is_padding(content, place)


def is_padding(content: bytes, place: int) -> bool:
    """Whether a byte fills up a block: fewer than 7 are left of it."""
    return place % 32768 > 32768 - 7


def test_no_file_of_wandb_has_no_records(tmp_path):
    assert list(whole_records(b"")) == list(whole_records(b"something else" * 10)) == []
    path = tmp_path / "a.wandb"
    path.write_bytes(b"something else")
    cut_torn_end(path)
    assert path.read_bytes() == b"something else"


def torn_at_the_end_of_a_block(content, ends):
    """As the service leaves it: whole blocks are written at once, the rest once in a second."""
    assert 2 * 32768 not in ends
    return content[: 2 * 32768]


def torn_in_a_chunk(content, ends):
    return content[: ends[len(ends) // 2] + 20]


def zeros_after_a_power_cut(content, ends):
    return content[: ends[len(ends) // 2]] + bytes(5000)


def dead_before_the_run_had_a_name(content, ends):
    return content[: ends[0]]


def whole(content, ends):
    return content


@pytest.mark.parametrize(
    "torn",
    [torn_at_the_end_of_a_block, torn_in_a_chunk, zeros_after_a_power_cut, dead_before_the_run_had_a_name, whole],
)
def test_wandb_sync_passes_over_what_a_kill_tore(tmp_path, server, offline_attempt, torn):
    folder, path = offline_attempt
    content = (folder / path).read_bytes()
    shutil.copytree(folder, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / path).write_bytes(torn(content, [end for _, end in whole_records(content)]))
    attempts = Attempts(tmp_path / "run", server)
    attempts.number, attempts.reached = 1, 400
    attempts.finish("offline")
    assert ("records of earlier attempts are sent now" in attempts.said) == (torn is not whole)
    attempts.sync()
    assert_one_run(server, attempts)
    assert "No runs to sync" in attempts.sync()

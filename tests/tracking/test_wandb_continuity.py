"""One W&B run over any number of kills: the unmodified client against a stand-in for the server."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.storage.metrics_file import read_records
from tests.helpers.trackers import KEY
from tests.helpers.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
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
        """The messages of `wandb sync`."""
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


def upload(attempts: Attempts) -> str:
    """The messages of an upload of the run."""
    folder = attempts.folder
    (folder / "config.yaml").write_text("seed: 1\n")
    command = [sys.executable, "-m", "pipeline.tracking.upload", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=attempts.environment, capture_output=True, text=True, timeout=60)
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
        assert row["attempt"] <= record["attempt"]  # W&B keeps a step as it was logged first
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


@pytest.mark.slow
def test_online_over_ten_kills(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    for number, moment in enumerate(attempts.moments(seed=1)):
        attempts.kill("online", moment, whole_group=number % 2 == 1)
    attempts.finish("auto")
    history = assert_one_run(server, attempts)
    pairs = zip(history, attempts.metrics(), strict=True)
    assert any(row["attempt"] < record["attempt"] for row, record in pairs)  # steps were replayed and not sent again
    assert "they are not sent again" in attempts.said
    assert "steps that it lacks" in attempts.said
    assert next(iter(server.runs.values())).exit_codes == [0]


@pytest.mark.slow
def test_offline_over_ten_kills_and_an_upload(tmp_path, server):
    """The upload sends each step once, also where the last attempt was killed; repeating it sends nothing."""
    attempts = Attempts(tmp_path / "run", server)
    for number, moment in enumerate(attempts.moments(seed=2)):
        attempts.kill("offline", 0.5 if number % 5 == 2 else moment, whole_group=number % 2 == 1)
    assert server.runs == {}
    assert len(list(attempts.folder.glob("wandb/offline-run-*/*.wandb"))) == 10
    upload(attempts)
    assert_one_run(server, attempts)
    assert "sent 0 steps" in upload(attempts)
    attempts.finish("offline")
    upload(attempts)
    assert_one_run(server, attempts)
    assert "No runs to sync" in attempts.sync()


@pytest.mark.slow
def test_offline_and_online_in_turn(tmp_path, server):
    attempts = Attempts(tmp_path / "run", server)
    attempts.kill("offline", 1.5)
    attempts.kill("offline", 0.3)
    attempts.kill("online", 1.0)
    server.stop()
    attempts.kill("auto", 1.5)  # the server cannot be reached: offline
    server.start()
    attempts.finish("auto")
    assert "to upload this run later" in attempts.said
    assert_one_run(server, attempts)
    assert "No runs to sync" in attempts.sync()  # everything that was logged offline has been sent
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

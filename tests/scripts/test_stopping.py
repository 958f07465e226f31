"""How runs end: asked to stop, killed, or with a disk that is full; and that the same command goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.storage.metrics_file import read_records
from pipeline.storage.status import read_status
from tests.chaos import differences
from tests.conftest import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.tracking.wandb_server import WandbServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """The tiny recipe in batches of 12, for 40 steps, with a checkpoint at every tenth."""
    folder = tmp_path_factory.mktemp("stopping")
    data = write_set(
        folder / "data", {"train": random_samples(41, 16, 16), "test": random_samples(13, 16, 16)}, [10, 7]
    )
    settings = tiny_settings(data)
    settings["train"] |= {"batch_size": 12, "steps": 40}
    settings["data"] |= {"trace": True, "workers": 1}
    settings["checkpoint"] |= {"every": 10}
    settings["validation"] |= {"every": 40}
    settings["samples"] |= {"every": 0}
    settings["tracking"] |= {"log_every": 1}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(processes: int, recipe: Path, run_dir: Path, *words: str, **variables: str) -> subprocess.Popen:
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    command = [*launch, "pipeline/train.py", "--config", str(recipe), "--run-dir", str(run_dir), *words]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return subprocess.Popen(command, cwd=ROOT, env=environment | variables, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """What a run that ends well said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def await_step(run_dir: Path, step: int) -> None:
    """Until the run has logged this step."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = run_dir / "metrics.jsonl"
        if path.is_file() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def straight(recipe_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(1, recipe_file, folder))
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_asked_to_stop_it_saves_at_the_edge_of_a_step_and_goes_on_from_there(recipe_file, straight, tmp_path, name):
    process = start(1, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 3)
    for rank in ranks_of(process):
        rank.send_signal(signal.Signals[name])
    said = finish(process)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.attempt) == ("preempted", name, 1)
    assert f"stopped by {name} at step {status.step} of 40 with a checkpoint" in said
    assert 3 <= status.step < 40
    assert f"at step {status.step}" in finish(start(1, recipe_file, tmp_path / "run"))
    assert (read_status(tmp_path / "run").state, read_status(tmp_path / "run").attempt) == ("finished", 2)
    assert list(differences(straight, tmp_path / "run")) == []


def test_a_signal_to_one_rank_stops_both(recipe_file, tmp_path):
    process = start(2, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 3)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    assert "stopped by SIGUSR1" in finish(process)
    assert read_status(tmp_path / "run").state == "preempted"


def test_a_killed_run_is_marked_running_and_a_failed_one_failed(recipe_file, tmp_path):
    process = start(1, recipe_file, tmp_path / "run")
    await_step(tmp_path / "run", 15)  # the checkpoint of step 10 is whole
    process.kill()
    process.communicate()
    assert read_status(tmp_path / "run").state == "running"
    again = start(1, recipe_file, tmp_path / "run", "optim.beta1=0.5")  # started while the orphan is still about to end
    _, said = again.communicate(timeout=120)
    assert again.returncode != 0
    assert "the checkpoint was made with other settings" in said
    assert read_status(tmp_path / "run").state == "failed"
    diverging = start(
        1, recipe_file, tmp_path / "other", "optim.lr=1e30", "optim.warmup_steps=0", "train.max_skipped_steps=2"
    )
    _, said = diverging.communicate(timeout=120)
    status = read_status(tmp_path / "other")
    assert (diverging.returncode, status.state) == (1, "failed")
    assert "lower optim.lr" in status.reason


def test_wandb_gets_one_continuous_run(recipe_file, tmp_path):
    """Online against a stand-in for the server: killed, stopped, finished; every step once, and pictures."""
    with WandbServer() as server:
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local" + "0" * 35, "WANDB_MODE": "online"}
        words = ("tracking.wandb=online", "samples.every=20", "samples.count=4")
        killed = start(1, recipe_file, tmp_path / "run", *words, **online)
        await_step(tmp_path / "run", 13)
        ranks_of(killed)[0].kill()
        killed.communicate()
        stopped = start(1, recipe_file, tmp_path / "run", *words, **online)
        await_step(tmp_path / "run", 23)
        ranks_of(stopped)[0].send_signal(signal.SIGUSR1)
        finish(stopped)
        finish(start(1, recipe_file, tmp_path / "run", *words, **online))
    (run,) = server.runs.values()
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert [row["_step"] for row in run.history] == [record["step"] for record in records] == list(range(1, 41))
    for row, record in zip(run.history, records, strict=True):
        assert row["train/loss"] == record["train/loss"], record["step"]
    assert sorted({record["attempt"] for record in records}) == [1, 2, 3]
    assert run.exit_codes[-1] == 0
    assert any(name.endswith(".png") for name in run.files)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_in_training_does_not_end_it(recipe_file, straight, small_disk, tmp_path):
    """Full while checkpoints are due, free again before the last one: the run ends well, and equal to the straight."""
    run_dir = small_disk / "run"
    process = start(1, recipe_file, run_dir)
    await_step(run_dir, 3)
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError:
            pass
    await_step_or_log(run_dir, "could not be written")
    ballast.unlink()
    said = finish(process)
    assert "could not be written" in said
    assert read_status(run_dir).state == "finished"
    assert [line for line in differences(straight, run_dir) if "safetensors" in line] == []


def await_step_or_log(run_dir: Path, words: str) -> None:
    """Until the run's log says so, or the run is over (a full disk may keep the log from saying anything)."""
    end = time.monotonic() + 60
    while time.monotonic() < end and read_status(run_dir).state == "running":
        if words in (run_dir / "log.txt").read_text():
            return
        time.sleep(0.05)


def test_chaos_sees_a_difference(tmp_path, straight, recipe_file):
    """The comparison can fail: another seed is another run, and one changed figure is seen."""
    other = tmp_path / "run"
    finish(start(1, recipe_file, other, "train.seed=2"))
    assert any("model.safetensors" in line for line in differences(straight, other))
    assert any("data_trace" in line for line in differences(straight, other))
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert "metrics.jsonl differs" in list(differences(straight, other))

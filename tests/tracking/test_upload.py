"""`python -m pipeline.tracking.upload RUN`, against a stand-in for the W&B server."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.storage.metrics_file import MetricsFile
from pipeline.storage.run_lock import RunLock
from pipeline.storage.status import StatusFile
from pipeline.tracking import upload
from pipeline.tracking.history import read_history
from tests.helpers.trackers import KEY, picture, tracker

CONFIG_FILE = "tracking: {wandb: disabled, project: digits, tags: [a, b], wandb_timeout: 30.0}\noptim: {lr: 0.01}\n"


def write_picture(path, value):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture(value)).save(path)


@pytest.fixture
def run_dir(tmp_path):
    """A run that was killed at step 30, after the pictures of step 35 were written."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG_FILE)
    metrics = MetricsFile(folder / "metrics.jsonl", -1)
    for step in (10, 20, 30):
        metrics.add(step, {"train/loss": step / 7})
    metrics.close()
    for step in (15, 20, 35):
        write_picture(folder / f"samples/step_{step:08d}_temperature_0.7.png", step)
        write_picture(folder / f"reconstructions/step_{step:08d}.png", step + 1)
    write_picture(folder / "samples/mine.png", 0)
    return folder


def run_upload(folder, *arguments):
    command = [sys.executable, "-m", "pipeline.tracking.upload", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert KEY not in result.stdout + result.stderr
    return result.returncode, result.stderr


def test_history_of_a_run_folder(run_dir):
    samples, reconstructions = "samples/temperature_0.7", "reconstructions"
    keys = [(logged.step, list(logged.scalars), sorted(logged.pictures)) for logged in read_history(run_dir)]
    assert keys == [
        (10, ["train/loss"], []),
        (15, [], [reconstructions, samples]),
        (20, ["train/loss"], [reconstructions, samples]),
        (30, ["train/loss"], []),
    ]
    assert [logged.step for logged in read_history(run_dir, last_step=15)] == [10, 15]


def test_scalars_pictures_settings_and_tags_arrive_once(run_dir, server):
    code, messages = run_upload(run_dir)
    assert (code, "sent 4 steps and 4 pictures; W&B has steps up to 30" in messages) == (0, True), messages
    assert run_upload(run_dir)[0] == 0
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == [10, 15, 20, 30]
    assert [row.get("train/loss") for row in run.history] == [10 / 7, None, 20 / 7, 30 / 7]
    for row, value in zip(run.history[1:3], (15, 20), strict=True):
        for key, expected in (("samples/temperature_0.7", value), ("reconstructions", value + 1)):
            assert len([name for name in run.files if row[key]["path"] in name]) == 1
            content = run.files[row[key]["path"]]
            assert (np.asarray(Image.open(io.BytesIO(content))) == picture(expected)).all()
    assert len([name for name in run.files if name.endswith(".png")]) == 4
    assert (run.project, run.tags) == ("digits", ["a", "b"])
    assert json.loads(run.config)["optim"]["value"] == {"lr": 0.01}
    assert run.exit_codes[-1] == 1
    StatusFile(run_dir).end("finished")
    assert run_upload(run_dir)[0] == 0
    assert run.exit_codes[-1] == 0


def test_the_next_online_start_sends_pictures(run_dir, server):
    with tracker(run_dir, "online", start_step=20, wandb_timeout=30.0) as run:
        run.log(30, {"train/loss": 1.0})
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == [10, 15, 20, 30]
    assert "reconstructions" in run.history[2]
    assert len([name for name in run.files if name.endswith(".png")]) == 4


def test_an_unreadable_picture_is_skipped(run_dir, server):
    (run_dir / "reconstructions/step_00000020.png").write_bytes(b"not a picture")
    code, messages = run_upload(run_dir)
    assert code == 0
    assert "step_00000020.png cannot be sent" in messages
    (run,) = server.runs.values()
    assert "samples/temperature_0.7" in run.history[2]
    assert "reconstructions" not in run.history[2]


def test_errors_name_the_cause(run_dir, server, tmp_path, monkeypatch, capfd):
    def error_of(folder, *arguments):
        assert upload.main([str(folder), *arguments]) == 2
        return capfd.readouterr().err

    assert "is not the folder of a training run" in error_of(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert "--timeout 0: must be positive" in error_of(run_dir, "--timeout", "0")
    with RunLock(run_dir):
        assert f"{run_dir} is in use by process {os.getpid()}" in error_of(run_dir)
    server.stop()
    (run_dir / "config.yaml").write_text(CONFIG_FILE.replace("30.0", "1.0"))
    assert "W&B cannot be used" in error_of(run_dir)
    server.start()
    monkeypatch.delenv("WANDB_API_KEY")
    assert "no key found" in error_of(run_dir)
    (run_dir / "metrics.jsonl").write_text("")
    assert "has no records" in error_of(run_dir)
    assert server.runs == {}


FAILING_UPLOAD = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking import upload

def stop_service():
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    (service,) = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core")]
    os.kill(service, signal.SIGSTOP)

def connect(*arguments, **options):
    run = original(*arguments, **options)
    stop_service()
    if sys.argv[2] == "interrupt":
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    return run

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
original, upload.connect = upload.connect, connect
sys.exit(upload.main([sys.argv[1], "--timeout", "2"]))
"""


@pytest.mark.parametrize(("ending", "code"), [("timeout", 2), ("interrupt", 130)])
def test_an_upload_whose_service_stops_ends_and_can_be_repeated(run_dir, server, ending, code):
    command = [sys.executable, "-c", FAILING_UPLOAD, str(run_dir), ending]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    assert ("repeat the command to send the rest" in result.stderr) == (ending == "timeout")
    assert run_upload(run_dir)[0] == 0
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == [10, 15, 20, 30]


def test_help_lists_the_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        upload.main(["--help"])
    assert "exit codes:" in capsys.readouterr().out

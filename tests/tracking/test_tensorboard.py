"""The log for TensorBoard, read back by TensorBoard's own reader."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking import tensorboard_run
from tests.helpers.trackers import picture, read_metrics, tracker

ROOT = Path(__file__).parents[2]
reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="the package tensorboard is not installed"
)


def read(folder: Path):
    """{key: {step: value}} of scalars, and {key: {step: array}} of pictures, as TensorBoard shows them."""
    log = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    scalars = {key: [(event.step, event.value) for event in log.Scalars(key)] for key in log.Tags()["scalars"]}
    pictures = {
        key: [(event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for event in log.Images(key)]
        for key in log.Tags()["images"]
    }
    for values in [*scalars.values(), *pictures.values()]:
        assert [step for step, _ in values] == sorted({step for step, _ in values})  # each step once, in order
    return {key: dict(values) for key, values in scalars.items()}, {key: dict(v) for key, v in pictures.items()}


def assert_same_as_metrics(folder: Path) -> None:
    """Every key and value of metrics.jsonl, and nothing else."""
    expected: dict[str, dict[int, float]] = {}
    for line in read_metrics(folder):
        for key, value in line.items():
            if key not in ("step", "time"):
                expected.setdefault(key, {})[line["step"]] = pytest.approx(float(value), rel=1e-6, nan_ok=True)
    assert read(folder)[0] == expected


def test_the_same_keys_and_pictures(tmp_path):
    with tracker(tmp_path, "disabled", tensorboard=True) as run:
        for step in (10, 20):
            run.log(step, {"train/loss": step / 7, "kl/8x8_group00": float("nan")})
            run.log(step, {"val/elbo": -1.0 * step}, {"samples/temperature_0.7": picture(step)})
    assert_same_as_metrics(tmp_path)
    shown = read(tmp_path)[1]
    assert shown.keys() == {"samples/temperature_0.7"}
    for step in (10, 20):
        assert (shown["samples/temperature_0.7"][step] == picture(step)).all()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tensorboard.summary.writer.record_writer import RecordWriter
from tests.helpers.trackers import picture, tracker

write = RecordWriter.write
RecordWriter.write = lambda *given: (time.sleep(0.02), write(*given))  # a slow disk, behind TensorBoard's queue
run = tracker(Path(sys.argv[1]), "disabled", tensorboard=True)
for step in range(1, 8):
    run.log(step, {"train/loss": 1.0 * step}, {"reconstructions": picture(step)})
    if step == 5:
        run.sync()  # before the checkpoint of step 5
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_curve_over_a_kill(tmp_path):
    """The attempt logged steps 6 and 7 as well, which the next one repeats with other values."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment)
    assert process.returncode == -signal.SIGKILL
    time.sleep(1)  # files are read in the order of the second in their names
    with tracker(tmp_path, "disabled", start_step=5, attempt=2, tensorboard=True) as run:
        for step in (6, 7, 8):
            run.log(step, {"train/loss": 100.0 * step}, {"reconstructions": picture(100 + step)})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert_same_as_metrics(tmp_path)
    shown = read(tmp_path)[1]["reconstructions"]
    assert {step: int(array[0, 0, 0]) for step, array in shown.items()} == {
        **{step: step for step in range(1, 6)},
        **{step: 100 + step for step in (6, 7, 8)},
    }


def test_a_fresh_start_repeats_nothing(tmp_path):
    """A run that died before its first checkpoint starts again at step 0."""
    for value in (1.0, 2.0):
        with tracker(tmp_path, "disabled", tensorboard=True) as run:
            run.log(0, {"val/elbo": value})
            run.log(1, {"train/loss": value})
    assert_same_as_metrics(tmp_path)


def test_a_run_that_was_without_it_gets_its_history(tmp_path):
    with tracker(tmp_path, "disabled") as run:
        for step in (1, 2, 3):
            run.log(step, {"train/loss": 1.0 * step})
    records = [record | {"time": 1000.0 + record["step"]} for record in read_metrics(tmp_path)]  # long ago
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "reconstructions").mkdir()
    Image.fromarray(picture(2)).save(tmp_path / "reconstructions/step_00000002.png")
    (tmp_path / "reconstructions/step_00000001.png").write_bytes(b"not a picture")
    for attempt, start in ((2, 2), (3, 3)):
        with tracker(tmp_path, "disabled", start_step=start, attempt=attempt, tensorboard=True) as run:
            run.log(start + 1, {"train/loss": 10.0 * start})
    assert_same_as_metrics(tmp_path)
    assert list(read(tmp_path)[1]["reconstructions"]) == [2]
    log = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [event.wall_time for event in log.Scalars("train/loss")][:2] == [1001.0, 1002.0]


def fail(*_, **__):
    raise OSError("full")


def test_an_error_is_logged_once_and_the_run_continues(tmp_path, monkeypatch, caplog):
    with tracker(tmp_path, "disabled", tensorboard=True) as run:
        monkeypatch.setattr(run._tensorboard._writer, "add_scalar", fail)
        with caplog.at_level(logging.WARNING):
            for step in (1, 2, 3):
                run.log(step, {"train/loss": 1.0})
    messages = [record.message for record in caplog.records]
    assert messages == ["TensorBoard is off (full); metrics.jsonl is still written"]
    assert len(read_metrics(tmp_path)) == 3


def test_without_the_package_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # so that its import fails
    with pytest.raises(ValueError, match="tracking.tensorboard=true needs the package tensorboard.*pip install"):
        tracker(tmp_path, "disabled", tensorboard=True)
    assert not (tmp_path / tensorboard_run.FOLDER).exists()
    with tracker(tmp_path, "disabled") as run:
        run.log(1, {"train/loss": 1.0})

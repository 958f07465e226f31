"""What the tracker logs to metrics.jsonl and W&B, also over restarts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking import tracker as tracking
from pipeline.tracking import wandb_connection
from pipeline.tracking.tracker import Tracker, TrackingConfig
from tests.helpers.trackers import CONFIG, history, picture, read_metrics, read_wandb, tracker

ROOT = Path(__file__).parents[2]
SCALARS = [
    *(f"train/{name}" for name in ["loss", "elbo", "bpd", "log_px", "kl", "beta", "lr", "grad_norm", "skipped_steps"]),
    *(
        f"{kind}/{group}"
        for kind in ("kl", "active_units")
        for group in ("8x8_group00", "8x8_group01", "16x16_group00")
    ),
    *(f"val/{name}" for name in ["elbo", "bpd", "nll", "bpd_nll"]),
    *(f"perf/{name}" for name in ["images_per_second", "data_wait", "step_ms", "gpu_memory_gib", "mfu"]),
    "samples_seen",
]
COST = ["attempt", "perf/wall_clock_s"]
"""What the tracker adds to each record."""
IMAGES = ["samples/temperature_0.7", "samples/temperature_1.0", "reconstructions"]


# --- what is logged ---------------------------------------------------------------------------------------------------


@pytest.fixture
def logged_run(tmp_path):
    """An offline run of three steps with every key, read back."""
    folder = tmp_path / "my_run"
    with tracker(folder, tags=("a", "b"), group="seeds") as run:
        for step in (10, 20, 30):
            run.log(step, {key: step + i / 100 for i, key in enumerate(SCALARS)})
            run.log(step, {}, {key: picture(step + i) for i, key in enumerate(IMAGES)})
        run.alert("Loss is not finite", "step 30 was skipped")
    return folder, read_wandb(folder)


def test_every_key_is_in_both_records(logged_run):
    folder, records = logged_run
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert all(line.keys() == {"step", "time", *SCALARS, *COST} for line in lines)
    steps = history(records)
    assert sorted(steps) == [10, 20, 30]
    for line in lines:
        logged = steps[line["step"]]
        assert {key: logged[key] for key in SCALARS + COST} == {key: line[key] for key in SCALARS + COST}
        keys = {key for key in logged if not key.startswith("_")}
        assert keys == {"step", "kl_by_group", *SCALARS, *COST, *IMAGES}  # each key once
        kl = [line[f"kl/{group}"] for group in ("8x8_group00", "8x8_group01", "16x16_group00")]
        assert logged["kl_by_group"] == {"_type": "histogram", "values": kl, "bins": [0, 1, 2, 3]}
        assert logged["_step"] == line["step"]


def test_pictures_arrive_to_the_pixel(logged_run):
    folder, records = logged_run
    files = next(folder.glob("wandb/offline-run-*/files"))
    for step, logged in history(records).items():
        for i, key in enumerate(IMAGES):
            assert logged[key]["_type"] == "image-file"
            assert (np.asarray(Image.open(files / logged[key]["path"])) == picture(step + i)).all()


def test_axes_and_summaries(logged_run):
    records = logged_run[1]
    metrics = {record.metric.name: record.metric for record in records if record.WhichOneof("record_type") == "metric"}
    assert {*SCALARS, *COST, *IMAGES, "kl_by_group"} == metrics.keys() - {"step"}
    assert all(metric.step_metric == "step" for name, metric in metrics.items() if name != "step")
    assert {key for key, metric in metrics.items() if metric.options.hidden} == {"attempt", "samples_seen"}
    assert metrics["train/elbo"].summary.max
    assert metrics["val/elbo"].summary.max
    assert metrics["val/bpd"].summary.min
    assert metrics["perf/images_per_second"].summary.mean


def test_settings_name_tags_and_alert_arrive(logged_run):
    run = next(record.run for record in logged_run[1] if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert (run.display_name, run.project, list(run.tags)) == ("my_run", "nvae-pipeline", ["a", "b"])
    assert run.run_group == "seeds"
    alerts = [record.alert for record in logged_run[1] if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["Steps were skipped", "Steps were skipped", "Loss is not finite"]
    assert (alerts[-1].text, alerts[-1].level) == ("step 30 was skipped", "WARN")
    assert {alert.wait_duration for alert in alerts} == {3_600_000}  # milliseconds


def test_no_code_no_git_and_no_terminal(logged_run):
    folder, records = logged_run
    kinds = {record.WhichOneof("record_type") for record in records}
    assert not kinds & {"output", "output_raw"}
    assert not any(record.run.git.remote_url or record.run.git.commit for record in records)
    names = {path.name for path in folder.glob("wandb/*/files/**/*")}
    assert not any(re.search(r"\.(py|patch|diff)$|output\.log", name) for name in names)


def test_the_wandb_folder_lies_in_the_run_folder(logged_run):
    assert sorted(os.listdir(logged_run[0])) == ["metrics.jsonl", "wandb", "wandb_run_id"]


# --- restarts and endings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["[1, 2]", '"NaN"', "1e999", '"long"', "{}", "1" * 400])
def test_a_wall_clock_that_is_no_number_is_ignored(tmp_path, seconds):
    records = ['{"step": 1, "time": 1.0, "perf/wall_clock_s": 100.0}', f'{{"step": 2, "perf/wall_clock_s": {seconds}}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(records) + "\n")
    with tracker(tmp_path, start_step=2, wandb="disabled") as run:
        run.log(3, {"train/loss": 1.0})
    assert 100 <= read_metrics(tmp_path)[-1]["perf/wall_clock_s"] < 200


def test_one_run_over_restarts(tmp_path):
    with tracker(tmp_path) as run:
        for step in (1, 2, 3):
            run.log(step, {"train/loss": 1.0 * step})
    with tracker(tmp_path, start_step=2) as run:
        for step in (3, 4):
            run.log(step, {"train/loss": 10.0 * step})
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    ids = {record.run.run_id for record in read_wandb(tmp_path) if record.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / "wandb_run_id").read_text().strip()}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_cost_is_summed_over_attempts_without_the_time_between(tmp_path, monkeypatch):
    """Attempt 1 logs steps 1-3 and is killed; attempt 2 starts an hour later from step 2."""
    seconds = iter([100.0, 110.0, 120.0, 135.5, 3700.0, 3701.0, 3702.0])
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    run = tracker(tmp_path, "disabled")
    for step in (1, 2, 3):
        run.log(step, {}, {"reconstructions": picture(0)})
        run.log(step, {"train/loss": 1.0})
        run.log(step, {"val/bpd": 1.0})
    with tracker(tmp_path, "disabled", start_step=2, attempt=2) as run:
        for step in (3, 4):
            run.log(step, {"train/loss": 1.0})
    cost = [(line["step"], line["attempt"], line["perf/wall_clock_s"]) for line in read_metrics(tmp_path)]
    assert cost == [(1, 1, 10.0), (2, 1, 20.0), (3, 2, 36.5), (4, 2, 37.5)]


def test_a_fresh_start_repeats_nothing(tmp_path):
    """A run that died before its first checkpoint starts again at step 0."""
    for _ in range(2):
        with tracker(tmp_path, "disabled") as run:
            for step in (0, 1):
                run.log(step, {"train/loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_id_of_a_sweep_and_of_an_invalid_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-7")
    assert wandb_connection.run_id(tmp_path) == "sweep-7"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_connection.run_id(tmp_path) == "sweep-7"
    (tmp_path / "wandb_run_id").write_text("../x\n")
    fresh = wandb_connection.run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", fresh)
    assert wandb_connection.run_id(tmp_path) == fresh


def test_a_failed_run_is_marked_so_and_sends_an_alert(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), tracker(tmp_path):
        raise RuntimeError("out of memory")
    records = read_wandb(tmp_path)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [("The run failed", "RuntimeError: out of memory")]


@pytest.mark.parametrize(
    ("folder", "given", "variable", "group"),
    [
        ("nvae-seed3", None, None, "nvae"),
        ("nvae-seed12", None, None, "nvae"),
        ("nvae-seed3", "mine", None, "mine"),
        ("nvae", None, None, None),
        ("nvae-seed3", None, "by variable", None),  # wandb reads the variable
    ],
)
def test_seeds_of_one_array_are_a_group(tmp_path, monkeypatch, folder, given, variable, group):
    if variable:
        monkeypatch.setenv("WANDB_RUN_GROUP", variable)
    assert wandb_connection.group_of(TrackingConfig(group=given), tmp_path / folder) == group


def test_other_processes_write_nothing(tmp_path):
    with Tracker(TrackingConfig(), tmp_path / "run", CONFIG, is_main=False, start_step=0) as run:
        run.log(1, {"train/loss": 1.0}, {"reconstructions": picture(0)})
        run.alert("a", "b")
    assert not (tmp_path / "run").exists()


def test_disabled_does_not_even_import_wandb(tmp_path):
    code = (
        "import sys\n"
        "from pipeline.tracking.tracker import Tracker, TrackingConfig\n"
        "config = TrackingConfig(wandb='disabled')\n"
        "with Tracker(config, sys.argv[1], {}, is_main=True, start_step=0) as run:\n"
        "    run.log(1, {'train/loss': 1.0}); run.alert('a', 'b')\n"
        "print('wandb' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]

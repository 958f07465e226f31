"""A real training run in W&B, key by key: offline, read back from wandb's file, and online on the stand-in server."""

import json
import math
import signal

import pytest

from pipeline.distributed.preemption import StopRequest
from pipeline.run.attempt import run_attempt
from pipeline.training.trainer import Trainer
from tests.helpers.trackers import history, read_metrics, read_wandb

GROUPS = ("4x4_group00", "8x8_group00", "8x8_group01")
"""Of the tiny recipe."""
KEYS = {
    *(f"train/{name}" for name in ("loss", "elbo", "bpd", "log_px", "kl", "beta", "lr", "grad_norm")),
    *(f"train/{name}" for name in ("spectral", "batch_norm", "skipped_steps", "skipped_samples")),
    *(f"{kind}/{group}" for kind in ("kl", "active_units") for group in GROUPS),
    *(f"val/{name}" for name in ("elbo", "bpd", "nll", "bpd_nll", "kl", "log_px")),
    *(f"perf/{name}" for name in ("images_per_second", "data_wait", "step_ms", "host_memory_gib", "wall_clock_s")),
    "perf/checkpoint_stall_ms",
    "samples_seen",
    "attempt",
}
MEDIA = {"kl_by_group", "samples/temperature_0.7", "samples/temperature_1", "reconstructions"}


@pytest.fixture
def train(make_recipe, make_runtime, tmp_path):
    """(mode, how it ends) -> the run folder after an attempt at the tiny recipe's six steps."""

    def run(mode: str, state: str = "finished"):
        folder = tmp_path / f"{mode}-seed1"
        recipe = make_recipe(f"tracking.wandb={mode}", "tracking.tags=[tiny]")
        with StopRequest() as stop:
            assert run_attempt(folder, recipe, make_runtime(), stop) == state
        return folder

    return run


def assert_each_key_once(rows, folder):
    """`rows`: what W&B has of each step. Numbers are those of metrics.jsonl, and no key has a second name."""
    lines = {line["step"]: line for line in read_metrics(folder)}
    assert set().union(*lines.values()) == {"step", "time", *KEYS}
    assert {step: {key for key in row if key in KEYS} for step, row in rows.items()} == {
        step: line.keys() - {"step", "time"} for step, line in lines.items()
    }
    for step, line in lines.items():
        for key in KEYS & line.keys():
            assert rows[step][key] == line[key] or math.isnan(float(line[key])), (step, key)
    assert set().union(*rows.values()) - {key for row in rows.values() for key in row if key[0] == "_"} == {
        "step",
        *KEYS,
        *MEDIA,
    }
    assert rows[6]["kl_by_group"]["values"] == pytest.approx([max(lines[6][f"kl/{group}"], 0) for group in GROUPS])


def test_offline_key_by_key(train, tiny_set):
    folder = train("offline")
    records = read_wandb(folder)
    assert_each_key_once(history(records), folder)
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert sorted(metric.name for metric in metrics if metric.name != "step") == sorted(KEYS | MEDIA)  # defined once
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_group, list(run.tags)) == ("offline", ["tiny"])
    assert config["model"]["name"] == "nvae"
    facts = config["environment"]
    assert (facts["model"], facts["processes"], facts["device"], facts["precision"]) == ("nvae", 1, "CPU", "fp32")
    assert facts["data_fingerprint"] == json.loads((tiny_set / "manifest.json").read_text())["fingerprint"]
    assert len(facts["code"]) == 16


def test_online_key_by_key(train, server):
    folder = train("online")
    (run,) = server.runs.values()
    assert_each_key_once({row["_step"]: row for row in run.history}, folder)
    assert (run.group, run.tags, run.overwritten, run.alerts) == ("online", ["tiny"], 0, [])
    assert json.loads(run.config)["environment"]["value"]["model"] == "nvae"


def test_a_stop_sends_an_alert_and_the_next_start_continues_the_same_run(train, server, monkeypatch):
    train_step = Trainer.train_step

    def stopped(trainer, step, micro_batches):
        if step == 3:  # which the next attempt does not repeat
            signal.raise_signal(signal.SIGTERM)
        return train_step(trainer, step, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    train("online", "preempted")
    (run,) = server.runs.values()
    assert run.alerts == ["The run was stopped"]
    folder = train("online")
    assert list(server.runs.values()) == [run]
    assert_each_key_once({row["_step"]: row for row in run.history}, folder)
    assert (run.alerts, run.overwritten) == (["The run was stopped"], 0)
    assert {row["attempt"] for row in run.history} == {1, 2}

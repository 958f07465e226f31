"""`train.profile`: what is recorded and written, that training is the same, and how a recording is summarized."""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from pipeline.distributed.preemption import StopRequest
from pipeline.run.attempt import run_attempt
from pipeline.run.step_profile import covered, summarize
from pipeline.storage.checkpoint import Checkpoints


@pytest.fixture
def train(make_recipe, make_runtime):
    """(folder, overrides) -> the run's log file, after training there."""
    log = logging.getLogger("pipeline")
    log.setLevel(logging.INFO)

    def run(folder: Path, *overrides: str) -> str:
        quiet = ("samples.every=0", "validation.every=0", "tracking.log_every=1", "checkpoint.every=100")
        model = ("model={name: mlp_vae, hidden: 64, latent_size: 8}", "regularizers.strength=0")
        with StopRequest() as stop:
            run_attempt(folder, make_recipe(*quiet, *model, *overrides), make_runtime(), stop)
        return (folder / "log.txt").read_text()

    return run


def steps_in(trace: Path) -> int:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    return len({event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")})


def test_a_profile_is_written_and_training_is_the_same(train, tmp_path):
    """Steps 0 to 9 are skipped, step 10 warms up, 11 and 12 are recorded, and training goes on."""
    text = train(tmp_path / "with", "train.steps=14", "train.profile=2")
    train(tmp_path / "without", "train.steps=14")
    files = list((tmp_path / "with" / "profile").iterdir())
    assert [file.name for file in files] == ["step_00000013_rank_0.json.gz"]
    assert steps_in(files[0]) == 2
    assert not (tmp_path / "without" / "profile").exists()
    states = [Checkpoints(tmp_path / name / "checkpoints").load("latest").tensors for name in ("with", "without")]
    for stem, group in states[0].items():
        assert all(torch.equal(tensor, states[1][stem][name]) for name, tensor in group.items()), stem
    table = text[text.index("profile of 2 steps up to step 13") :].splitlines()
    shares = [float(line.split("%")[0]) for line in table[2:22]]
    assert len(shares) == 20
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100
    assert any(line.endswith("  aten::addmm") for line in table[2:22])
    assert "GPU" not in table[0]
    assert "step 14/14" in text.partition("profile of")[2]


@pytest.mark.parametrize(("steps", "profile", "recorded"), [(4, 2, 2), (2, 2, 2), (1, 5, 1)])
def test_short_runs_are_recorded_to_their_end(train, tmp_path, steps, profile, recorded):
    train(tmp_path, f"train.steps={steps}", f"train.profile={profile}")
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == f"step_{steps:08d}_rank_0.json.gz"
    assert steps_in(trace) == recorded


def test_a_profile_that_cannot_be_written_does_not_end_training(train, tmp_path):
    (tmp_path / "profile").write_text("not a folder")
    text = train(tmp_path, "train.steps=3", "train.profile=1")
    assert "could not be written" in text
    assert "step 3/3" in text


# ------------------------------------------------------------------------------------------------ a recording of a GPU


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def row(key: str, count: int, cpu: float, gpu: float, device: DeviceType = DeviceType.CPU):
    return SimpleNamespace(
        key=key, count=count, self_cpu_time_total=cpu, self_device_time_total=gpu, device_type=device
    )


def test_kernels_are_counted_and_overlapping_ones_are_not_busy_twice():
    """Two steps of 1 ms: a kernel until 400 us, another stream's copy from 300 to 500, a kernel from 1500 to 2000."""
    events = [
        event("ProfilerStep#3", 0, 1000, DeviceType.CPU, annotation=True),
        event("ProfilerStep#4", 1000, 2000, DeviceType.CPU, annotation=True),
        event("ProfilerStep#3", 0, 900, annotation=True),
        event("aten::conv2d", 0, 100, DeviceType.CPU),
        event("gemm", 0, 400),
        event("Memcpy HtoD (Pinned -> Device)", 300, 500),
        event("Memset (Device)", 450, 500),
        event("elementwise", 1500, 2000),
    ]
    rows = [
        row("aten::conv2d", 4, 100, 500),
        row("ProfilerStep*", 2, 900, 0),
        row("gemm", 1, 0, 400, DeviceType.CUDA),
        row("aten::add", 2, 300, 600),
    ]
    summary = summarize(SimpleNamespace(events=lambda: events, key_averages=lambda: rows), steps=2)
    assert (summary.step_ms, summary.kernels, summary.busy) == (1.0, 1.0, 0.5)
    assert [operator.name for operator in summary.operators] == ["aten::add", "aten::conv2d", "(between operators)"]
    assert summary.operators[0] == ("aten::add", 1.0, 0.3, 0.15)
    assert summary.describe().startswith("1.0 ms and 1 kernels per step, GPU busy for 50% of the time")
    assert summary.table().splitlines()[1].split() == ["54.5%", "0.300", "0.150", "1.0", "aten::add"]


def test_intervals_are_united():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4

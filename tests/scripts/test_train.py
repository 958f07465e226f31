"""The command as users type it: real processes under `accelerate launch`, one and two of them, and what wrong input
gets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "pipeline" / "train.py")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """The tiny recipe on 12 images in batches of 12, so that 1, 2 and 3 processes can share a batch."""
    folder = tmp_path_factory.mktemp("launch")
    data = write_set(
        folder / "data", {"train": random_samples(41, 16, 16), "test": random_samples(13, 16, 16)}, [10, 7]
    )
    settings = tiny_settings(data)
    settings["train"] |= {"batch_size": 12}
    settings["tracking"] |= {"log_every": 1}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    # OMP_NUM_THREADS: what the user has must not matter. Nothing of an outer launcher may leak in.
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)


def plain(recipe: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, TRAIN, "--config", str(recipe), *words, **environment)


def launch(processes: int, recipe: Path, *words: str) -> subprocess.CompletedProcess:
    """With the shipped configurations, on a free port."""
    name = "cpu.yaml" if processes == 1 else "cpu_2proc.yaml"
    extra = ["--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    module = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / name),
    ]
    return run(*module, *extra, TRAIN, "--config", str(recipe), *words)


def metrics(folder: Path, without: str = "perf/") -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("time", "attempt") and not key.startswith(without)}
        for record in records
    ]


def close(expected: list[dict], found: list[dict], tolerance: float) -> None:
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=tolerance, abs=1e-12), (one["step"], key)


@pytest.fixture(scope="module")
def single(recipe_file, tmp_path_factory) -> Path:
    """The float64 run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("single")
    result = launch(1, recipe_file, "--run-dir", str(folder), "train.precision=fp64", "data.trace=true")
    assert result.returncode == 0, result.stderr
    assert "1 process on CPU" in result.stderr
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_give_the_losses_of_one(recipe_file, single, tmp_path, processes):
    """Float64, global batch norm, KL balancing, regularizers, EMA, validation with a ragged tail: 1e-10 relative.

    The trace is equal.
    """
    result = launch(processes, recipe_file, "--run-dir", str(tmp_path), "train.precision=fp64", "data.trace=true")
    assert result.returncode == 0, result.stderr
    assert f"{processes} processes on CPU" in result.stderr
    assert "Warning" not in result.stderr
    assert len(metrics(single)) == 6
    close(metrics(single), metrics(tmp_path), 1e-10)
    assert (single / "data_trace.jsonl").read_text() == (tmp_path / "data_trace.jsonl").read_text()


def test_two_processes_resume_bit_for_bit(recipe_file, tmp_path):
    """Stopped mid-epoch after a checkpoint, and run again by the same command: equal files to the byte."""
    straight = launch(2, recipe_file, "--run-dir", str(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    assert "Warning" not in straight.stderr
    first = launch(2, recipe_file, "--run-dir", str(tmp_path / "parts"), "train.steps=6", "train.max_skipped_steps=5")
    assert first.returncode == 0, first.stderr
    for step in (4, 6):  # as if the process had died after step 2's checkpoint
        folder = tmp_path / f"parts/checkpoints/step_{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = launch(2, recipe_file, "--run-dir", str(tmp_path / "parts"))
    assert again.returncode == 0, again.stderr
    assert "at step 2" in again.stderr
    for stem in ("model", "ema", "optimizer", "regularizers"):
        file = f"checkpoints/step_00000006/{stem}.safetensors"
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), stem
    close(metrics(tmp_path / "straight"), metrics(tmp_path / "parts"), 0)


def test_a_run_goes_on_with_any_number_of_processes(recipe_file, tmp_path):
    """Stopped mid-epoch on 1 process, on 2 and on 3, and finished on 1: the trace and, in float64, the figures of a
    straight run.
    """
    words = ["train.precision=fp64", "data.trace=true", "train.steps=8", "checkpoint.every=2", "checkpoint.keep=null"]
    straight = launch(1, recipe_file, "--run-dir", str(tmp_path / "straight"), *words)
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "parts"
    for processes, stop in ((1, 2), (2, 4), (3, 6), (1, 8)):
        result = launch(processes, recipe_file, "--run-dir", str(folder), *words)
        assert result.returncode == 0, result.stderr
        assert f"{processes} process" in result.stderr
        assert ("resumed" in result.stderr) == (stop > 2)
        for step in range(stop + 2, 10, 2):  # as if it had been killed after this checkpoint
            shutil.rmtree(folder / f"checkpoints/step_{step:08d}")
    close(metrics(tmp_path / "straight"), metrics(folder), 1e-10)
    assert (tmp_path / "straight/data_trace.jsonl").read_text() == (folder / "data_trace.jsonl").read_text()


def test_the_run_folder_holds_what_the_readme_says(single):
    assert {path.name for path in single.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "log.txt", "samples", "reconstructions", "checkpoints", "data_trace.jsonl"
    }  # fmt: skip
    assert {path.name for path in (single / "checkpoints/step_00000006").iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "regularizers.safetensors", "meta.json"
    }  # fmt: skip
    pictures = {path.name for path in (single / "samples").iterdir()}
    assert pictures == {"step_00000006_temperature_0.7.png", "step_00000006_temperature_1.png"}
    assert [path.name for path in (single / "reconstructions").iterdir()] == ["step_00000006.png"]
    assert yaml.safe_load((single / "config.yaml").read_text())["train"]["batch_size"] == 12


def test_metrics_have_every_key_the_design_names(single):
    """Of those that apply on a CPU: no GPU memory, and no model FLOPs utilisation of an unknown peak."""
    keys = set().union(*(record.keys() for record in metrics(single, without="nothing")))
    groups = ("4x4_group00", "8x8_group00", "8x8_group01")
    assert keys >= {
        f"train/{name}" for name in ("loss", "elbo", "bpd", "log_px", "kl", "beta", "lr", "grad_norm", "skipped_steps")
    }
    assert keys >= {f"{kind}/{group}" for kind in ("kl", "active_units") for group in groups}
    assert keys >= {"val/elbo", "val/bpd", "val/nll", "val/bpd_nll"}
    assert keys >= {"perf/images_per_second", "perf/data_wait", "perf/step_ms", "samples_seen"}


def test_a_finished_run_says_so(recipe_file, single):
    result = launch(1, recipe_file, "--run-dir", str(single), "train.precision=fp64", "data.trace=true")
    assert result.returncode == 0
    assert "is finished: step 6 of 6" in result.stderr


def test_a_live_run_folder_is_refused(recipe_file, tmp_path):
    from pipeline.storage.run_lock import RunLock

    with RunLock(tmp_path):
        result = plain(recipe_file, "--run-dir", str(tmp_path), "--wait", "1")
    assert result.returncode == 2
    assert f"in use by process {os.getpid()}" in result.stderr


def test_the_number_of_processes_can_be_insisted_on(recipe_file, tmp_path):
    result = plain(recipe_file, "--run-dir", str(tmp_path / "run"), "train.expect_processes=2")
    assert result.returncode == 2
    assert "2 processes were expected and 1 started" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_names_those_that_do(recipe_file, tmp_path):
    result = launch(2, recipe_file, "--run-dir", str(tmp_path / "run"), "train.micro_batch=3")
    assert result.returncode != 0
    assert (
        "2 processes cannot share a micro-batch of 3 images equally; train.micro_batch can be [2, 4, 6, 12]"
        in result.stderr
    )
    assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()


BAD = {
    "a mistyped setting": (["train.batchsize=3"], r"error: train.batchsize: unknown key; did you mean 'batch_size'\?"),
    "no such data": (["--data", "nowhere"], r"error: nowhere: no complete shard set"),
    "a size that the scales do not divide": (["data.size=18"], "16 or 20 would work"),
    "data of another size": (["data.size=32"], r"error: data.size is 32, but .* holds images of 16x16"),
    "data of other channels": (
        ["data.channels=1", "model.likelihood={name: bernoulli}"],
        "error: data.channels is 1, but .* 3 channels",
    ),
    "no such split": (["validation.split=dev"], "no split 'dev'; it has: train, test"),
    "a checkpoint that is not there": (["--resume", "nowhere"], "no checkpoint at nowhere"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_input_gets_one_line_and_exit_code_2(recipe_file, tmp_path, what):
    words, message = BAD[what]
    result = plain(recipe_file, "--run-dir", str(tmp_path / "run"), *words)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_an_unwritable_run_folder_is_named(recipe_file, tmp_path):
    (tmp_path / "file").write_text("")
    result = plain(recipe_file, "--run-dir", str(tmp_path / "file" / "run"))
    assert result.returncode == 2
    assert f"{tmp_path}/file/run" in result.stderr


def test_the_command_line_teaches(tmp_path):
    text = run(sys.executable, TRAIN, "--help").stdout
    assert all(
        word in text
        for word in ("--model", "--config", "--data", "--run-dir", "--resume", "--dry-run", "section.key=value")
    )
    missing = run(sys.executable, TRAIN, cwd=tmp_path)
    assert missing.returncode == 2
    assert "--model" in missing.stderr
    abbreviated = run(sys.executable, TRAIN, "--mod", "nvae", cwd=tmp_path)
    assert abbreviated.returncode == 2


def test_dry_run_prints_and_touches_nothing(tmp_path):
    words = ["train.seed=7", "--dry-run", "train.micro_batch=32", "--train.batch_size=64"]  # before, between and after
    result = run(sys.executable, TRAIN, "optim.clip=200", "--model", "nvae_celeba64", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "153,281,364 parameters" in result.stdout
    for setting in ("batch_size: 64", "micro_batch: 32", "seed: 7", "clip: 200"):
        assert setting in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_recipes_without_their_data_say_how_to_make_them(tmp_path):
    result = run(sys.executable, TRAIN, "--model", "nvae_celeba64", cwd=tmp_path)
    assert result.returncode == 2
    assert "make it with: python -m shard_data celeba --size 64 --source DIR --out data/celeba64" in result.stderr


def test_a_run_that_diverges_ends_with_code_1(recipe_file, tmp_path):
    result = plain(
        recipe_file, "--run-dir", str(tmp_path), "optim.lr=1e30", "optim.warmup_steps=0", "train.max_skipped_steps=2"
    )
    assert result.returncode == 1
    assert "lower optim.lr" in result.stderr

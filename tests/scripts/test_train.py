"""pipeline/train.py on one to three real processes, and its messages for wrong input."""

import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._inductor import config as inductor_config

from pipeline.storage.attempts import read_attempts
from pipeline.storage.run_lock import RunLock
from pipeline.train import main
from tests.helpers.command_lines import check_commands, shown_facts
from tests.helpers.launching import TRAIN, run_command, train, train_alone
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.run_folders import (
    assert_metrics_close,
    last_checkpoint,
    metrics,
    read_lines,
    remove_checkpoints_after,
    tensor_bytes,
)
from tests.helpers.vdvae_files import write_vdvae_recipe

FP64 = (
    "train.precision=fp64",
    "data.trace=true",
    "train.steps=8",
    "samples.every=8",
    "checkpoint.every=2",
    "checkpoint.keep=null",
)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    return write_tiny_recipe(folder, write_tiny_set(folder / "data"))


@pytest.fixture(scope="module")
def single(recipe_file, tmp_path_factory) -> Path:
    """The float64 run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("single")
    result = train(1, recipe_file, "--run-dir", str(folder), *FP64)
    assert result.returncode == 0, result.stderr
    assert "1 process on CPU" in result.stderr
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_losses_of_one(recipe_file, single, tmp_path, processes):
    """Float64, global batch norm, KL balancing, regularizers, EMA, validation with a ragged tail: 1e-10 relative.

    The trace is equal.
    """
    result = train(processes, recipe_file, "--run-dir", str(tmp_path), *FP64)
    assert result.returncode == 0, result.stderr
    assert f"{processes} processes on CPU" in result.stderr
    assert "Warning" not in result.stderr
    assert len(metrics(single)) == 8
    assert_metrics_close(metrics(single), metrics(tmp_path), 1e-10)
    assert (single / "data_trace.jsonl").read_text() == (tmp_path / "data_trace.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(recipe_file, tmp_path):
    """Stopped mid-epoch after a checkpoint, and run again by the same command: equal files to the byte."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    result = train(2, recipe_file, "--run-dir", str(uninterrupted), "train.steps=6")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    shutil.copytree(uninterrupted, resumed)
    remove_checkpoints_after(resumed, 4)
    again = train(2, recipe_file, "--run-dir", str(resumed), "train.steps=6")
    assert again.returncode == 0, again.stderr
    assert "at step 4" in again.stderr
    assert set(tensor_bytes(resumed)) == {
        f"{stem}.safetensors" for stem in ("model", "ema", "optimizer", "regularizers")
    }
    assert last_checkpoint(resumed).name == "step_00000006"
    assert tensor_bytes(resumed) == tensor_bytes(uninterrupted)
    assert_metrics_close(metrics(uninterrupted), metrics(resumed), 0)


@pytest.mark.slow
def test_a_run_resumes_on_any_number_of_processes(recipe_file, single, tmp_path):
    """Stopped mid-epoch on 1 process, on 2 and on 3, and finished on 1: the trace and, in float64, the figures of the
    uninterrupted run.
    """
    resume_on_several(recipe_file, single, tmp_path / "run")


@pytest.mark.slow
def test_a_vdvae_resumes_on_any_number_of_processes(recipe_file, tmp_path):
    """The same, by the rules that VDVAE is trained with. One of its steps is skipped by the norm of its gradient."""
    data = {"root": str(recipe_file.parent / "data")}
    rules = {"name": "adamw", "gradient_unit": "nats_per_dimension", "beta2": 0.9, "warmup_from_zero": True, "clip": 5}
    sections = {"optim": rules, "tracking": {"log_every": 1}, "train": {"batch_size": 12, "ema_decay": 0.9}}
    recipe = write_vdvae_recipe(tmp_path / "vdvae.yaml", data=data, **sections)
    probe = train(1, recipe, "--run-dir", str(tmp_path / "probe"), *FP64)
    assert probe.returncode == 0, probe.stderr
    norms = sorted(record["train/grad_norm"] for record in metrics(tmp_path / "probe"))
    threshold = f"optim.skip_threshold={(norms[-1] + norms[-2]) / 2}"
    result = train(1, recipe, "--run-dir", str(tmp_path / "single"), *FP64, threshold)
    assert result.returncode == 0, result.stderr
    assert max(record["train/skipped_by_norm"] for record in metrics(tmp_path / "single")) >= 1
    resume_on_several(recipe, tmp_path / "single", tmp_path / "run", threshold)


def resume_on_several(recipe_file: Path, single: Path, folder: Path, *overrides: str) -> None:
    """Resumes a copy of a run at step 2 on 2 processes, at 4 on 3 and at 6 on 1, and compares the results."""
    shutil.copytree(single, folder)
    for processes, resumed_at in ((2, 2), (3, 4), (1, 6)):
        remove_checkpoints_after(folder, resumed_at)
        result = train(processes, recipe_file, "--run-dir", str(folder), *FP64, *overrides)
        assert result.returncode == 0, result.stderr
        assert f"{processes} process" in result.stderr
        assert f"at step {resumed_at}" in result.stderr
    assert_metrics_close(metrics(single), metrics(folder), 1e-10)
    assert (single / "data_trace.jsonl").read_text() == (folder / "data_trace.jsonl").read_text()


def test_the_run_folder_holds_what_the_readme_says(single):
    assert {path.name for path in single.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "log.txt", "samples", "reconstructions", "checkpoints", "data_trace.jsonl",
        "attempts.jsonl", "status.json",
    }  # fmt: skip
    assert {path.name for path in last_checkpoint(single).iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "regularizers.safetensors", "meta.json"
    }  # fmt: skip
    pictures = {path.name for path in (single / "samples").iterdir()}
    assert pictures == {"step_00000008_temperature_0.7.png", "step_00000008_temperature_1.png"}
    assert [path.name for path in (single / "reconstructions").iterdir()] == ["step_00000008.png"]
    assert yaml.safe_load((single / "config.yaml").read_text())["train"]["batch_size"] == 12


def test_each_start_is_recorded(single):
    (facts,) = read_attempts(single)
    assert (facts.attempt, facts.step, facts.total_steps, facts.model, facts.images) == (1, 0, 8, "nvae", 41)
    assert (facts.processes, facts.device, facts.threads, facts.precision) == (1, "CPU", 1, "fp64")
    assert (facts.latent_groups, facts.host, facts.torch) == (3, socket.gethostname(), torch.__version__)
    weights = load_file(last_checkpoint(single) / "model.safetensors")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert facts.parameters == sum(value.numel() for name, value in weights.items() if not name.endswith(buffers))


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


def test_log_lines_name_the_time_left(single):
    """At the speed of training in the first line; then at the pace of the records, with validation and checkpoints."""
    text = (single / "log.txt").read_text()
    lines = re.findall(r"step (\d+)/8 +\d+ % .* (\S+) images/s +(\d+):(\d+):(\d+) left", text)
    assert [line[0] for line in lines] == [str(step) for step in range(1, 9)]
    times = {record["step"]: record["time"] for record in read_lines(single / "metrics.jsonl")}
    for step, speed, *time_left in lines:
        hours, minutes, seconds = map(int, time_left)
        steps, left = int(step) - 1, 8 - int(step)
        expected = left * ((times[int(step)] - times[1]) / steps if steps else 12 / float(speed))
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, abs=1.5)


def test_the_log_begins_and_ends_with_what_a_reader_needs(single):
    """Ten lines at the start with the processes and W&B, and at the end the paths and three commands that exist."""
    lines = [line.split(" INFO ", 1)[-1] for line in (single / "log.txt").read_text().splitlines()]
    first = lines[: next(i for i, line in enumerate(lines) if line.startswith(("no best", "step")))]
    assert 7 <= len(first) <= 9
    facts = shown_facts(first[1:])
    assert facts["model"][0].startswith("30,112 parameters; 3 latent groups: 1 of 2x4x4, 2 of 2x8x8")
    assert "41 images of 16x16x3 (train); validated on 13 (test) every 3 steps" in facts["data"][0]
    assert facts["length"] == ["8 steps of 12 images, 2.34 epochs; from step 0"]
    assert facts["watch"][1] == f"python -m pipeline.status {single} --long"
    end = next(i for i, line in enumerate(lines) if "is finished: step 8 of 8" in line)
    facts = shown_facts(lines[end + 1 :])
    assert Path(facts["checkpoint"][0]) == last_checkpoint(single)
    best = max((record for record in metrics(single) if "val/elbo" in record), key=lambda record: record["val/elbo"])
    assert facts["best"][0].startswith(f"ELBO of test {best['val/elbo']:,.2f} nats")
    assert facts["best"][0].endswith(f", step {best['step']}")
    assert len(facts["next"]) == 3
    assert all(str(single) in command for command in facts["next"])
    check_commands(facts["next"])


def test_a_finished_run_says_so(recipe_file, single):
    result = train(1, recipe_file, "--run-dir", str(single), *FP64)
    assert result.returncode == 0
    assert "is finished: step 8 of 8" in result.stderr


def test_a_run_folder_in_use_is_refused(recipe_file, tmp_path):
    with RunLock(tmp_path):
        result = train_alone(recipe_file, "--run-dir", str(tmp_path), "--wait", "1")
    assert result.returncode == 2
    assert f"in use by process {os.getpid()}" in result.stderr


def test_a_batch_that_does_not_divide_names_those_that_do(recipe_file, tmp_path):
    result = train(2, recipe_file, "--run-dir", str(tmp_path / "run"), "train.micro_batch=3")
    assert result.returncode != 0
    assert (
        "2 processes cannot share a micro-batch of 3 images equally; train.micro_batch can be [2, 4, 6, 12]"
        in result.stderr
    )
    assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "run").exists()


BAD = {
    "an unknown setting": (["train.batchsize=3"], r"error: train.batchsize: unknown key; did you mean 'batch_size'\?"),
    "no such data": (["--data", "nowhere"], r"error: nowhere: no complete shard set"),
    "a size that the scales do not divide": (["data.size=18"], "16 or 20 would work"),
    "data of another size": (
        ["data.size=32"],
        r"error: data.size is 32, but .* holds images of 16x16; .* or train with data.size=16",
    ),
    "data of other channels": (
        ["data.channels=1", "model.likelihood={name: bernoulli}"],
        "error: data.channels is 1, but .* 3 channels",
    ),
    "no such split": (["validation.split=dev"], "no split 'dev'; it has: train, test"),
    "no such checkpoint": (["--resume", "nowhere"], "no checkpoint at nowhere"),
    "too few processes": (["train.expect_processes=2"], "2 processes were expected and 1 started"),
}


@pytest.fixture
def train_here(make_runtime, capfd):
    """(arguments) -> exit code and standard error of train.py in this process."""

    def run(*arguments: str) -> tuple[int, str]:
        make_runtime()
        code = main([*arguments, "train.cpu_threads=1"])
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize("what", BAD)
def test_wrong_input_gets_one_line_and_exit_code_2(recipe_file, train_here, tmp_path, what):
    arguments, message = BAD[what]
    code, error = train_here("--config", str(recipe_file), "--run-dir", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_without_a_compiler_a_compiled_run_ends_before_its_first_step(recipe_file, train_here, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        torch._dynamo.reset()
        code, error = train_here(
            "--config", str(recipe_file), "--run-dir", str(tmp_path / "run"), "train.compile=whole", "train.steps=1"
        )
    assert code == 2
    assert "error: train.compile=whole: the compiler does not work on this machine: " in error
    assert "install a C++ compiler (g++)" in error
    assert "or set train.compile=off" in error
    assert "Traceback" not in error


def test_an_unwritable_run_folder_is_named(recipe_file, train_here, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = train_here("--config", str(recipe_file), "--run-dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert f"{tmp_path}/file/run" in error


def test_recipes_without_their_data_say_how_to_make_them(train_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = train_here("--model", "nvae_celeba64", "train.batch_size=16", "train.precision=fp32")
    assert code == 2
    assert "make it with: python -m shard_data celeba --size 64 --source DIR --out data/celeba64" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = ("--model", "--config", "--data", "--run-dir", "--resume", "--dry-run", "section.key=value")
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--dryrun", "did you mean --dry-run?"),
        ("--rundir=x", "did you mean --run-dir?"),
        ("--lr=1", "such as optim.lr="),
    ],
)
def test_an_unknown_option_is_answered_by_the_most_similar(argument, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nvae", argument])
    assert ended.value.code == 2
    assert f"unknown argument {argument}; " in (error := capsys.readouterr().err)
    assert hint in error


@pytest.mark.parametrize("arguments", [[], ["--mod", "nvae"]])
def test_without_a_whole_option_that_names_the_recipe_the_error_names_it(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_dry_run_prints_and_changes_nothing(tmp_path):
    """Started in another folder, with overrides before, between and after the options."""
    options = ["train.seed=7", "--dry-run", "train.micro_batch=32", "--train.batch_size=64"]
    result = run_command(sys.executable, TRAIN, "optim.clip=200", "--model", "nvae_celeba64", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "153,281,364 parameters" in result.stdout
    for setting in ("batch_size: 64", "micro_batch: 32", "seed: 7", "clip: 200"):
        assert setting in result.stdout
    assert list(tmp_path.iterdir()) == []

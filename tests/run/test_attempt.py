"""One attempt at a run: what it does with its folder, and how it ends."""

import logging
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline import export
from pipeline.distributed.preemption import StopRequest
from pipeline.inference.model_folder import ModelContent, write_model_folder
from pipeline.run.attempt import run_attempt
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.run_lock import RunFolderLost
from pipeline.storage.status import read_status
from pipeline.training.trainer import Trainer
from tests.helpers.launching import wait_until


@pytest.fixture
def attempt(make_recipe, make_runtime):
    """(folder, overrides, options of run_attempt) -> how it ended."""
    log = logging.getLogger("pipeline")
    before, level = list(log.handlers), log.level
    log.setLevel(logging.INFO)

    def run(folder: Path, *overrides: str, **options) -> str:
        recipe = make_recipe("tracking.log_every=1", "samples.every=0", "validation.every=0", *overrides)
        with StopRequest() as stop:
            return run_attempt(folder, recipe, make_runtime(), stop, **options)

    yield run
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def at_step(monkeypatch):
    """(step, work) -> does this work before that step."""
    train_step = Trainer.train_step

    def install(when: int, work) -> None:
        def patched(trainer: Trainer, step: int, micro_batches: list):
            if step == when:
                work()
            return train_step(trainer, step, micro_batches)

        monkeypatch.setattr(Trainer, "train_step", patched)

    return install


def test_the_status_names_checkpoints_that_are_on_the_disk(attempt, tmp_path, monkeypatch):
    """While one is written, the status names the one before; that of step 4 cannot be written."""
    write = Checkpoints.write
    during = []

    def slow_write(checkpoints: Checkpoints, step: int, *rest) -> Path:
        time.sleep(0.2)  # training goes on meanwhile
        during.append((step, read_status(tmp_path / "run").step))
        if step == 4:
            raise OSError(28, "No space left on device")
        return write(checkpoints, step, *rest)

    monkeypatch.setattr(Checkpoints, "write", slow_write)
    assert attempt(tmp_path / "run") == "finished"
    assert during == [(2, 0), (4, 2), (6, 2)]
    assert read_status(tmp_path / "run").step == 6


@pytest.mark.parametrize("change", ["moved", "deleted", "lock deleted"])
def test_a_run_that_loses_its_folder_ends(attempt, at_step, tmp_path, change):
    """Before it writes there again: another process may have the folder's name now."""
    folder = tmp_path / "run"
    work = {
        "moved": lambda: folder.rename(tmp_path / "elsewhere"),
        "deleted": lambda: shutil.rmtree(folder),
        "lock deleted": lambda: (folder / "run.lock").unlink(),
    }
    checkpoints = Checkpoints(folder / "checkpoints")
    at_step(3, lambda: (wait_until(lambda: checkpoints.steps() == [2]), work[change]()))
    with pytest.raises(RunFolderLost, match=f"{folder} was moved or deleted"):
        attempt(folder, "data.trace=true")
    assert folder.exists() == (change == "lock deleted")  # nothing is written that would make it again
    if folder.exists():
        assert checkpoints.steps() == [2]
        assert read_status(folder).state == "running"


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(attempt, at_step, tmp_path):
    """Of which nothing is missing: the same command then ends where an uninterrupted run does."""
    at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    assert attempt(tmp_path / "run") == "interrupted"
    status = read_status(tmp_path / "run")
    assert (status.state, status.step, status.reason) == ("interrupted", 3, "SIGINT")
    assert "stopped by Ctrl-C at step 3 of 6 with a checkpoint" in (tmp_path / "run/log.txt").read_text()
    at_step(-1, None)
    assert attempt(tmp_path / "run") == attempt(tmp_path / "uninterrupted") == "finished"
    ends = [Checkpoints(tmp_path / name / "checkpoints").load("latest").tensors for name in ("run", "uninterrupted")]
    assert all(torch.equal(tensor, ends[1]["model"][name]) for name, tensor in ends[0]["model"].items())


def test_the_log_file_starts_with_the_first_message(attempt, tmp_path):
    attempt(tmp_path / "run")
    lines = (tmp_path / "run/log.txt").read_text().splitlines()
    assert f"nvae on 1 process on CPU, 1 thread each, fp32 in {tmp_path}/run" in lines[0]
    assert sum("nvae on 1 process" in line for line in lines) == 1
    end = next(i for i, line in enumerate(lines) if "is finished: step 6 of 6" in line)
    assert "python pipeline/report.py" in lines[-1]
    assert len(lines) - end <= 10
    assert all(re.match(r"\d{4}-\d\d-\d\d \S+ [A-Z]+ ", line) for line in lines)


def test_a_mistake_in_the_command_leaves_a_finished_run_finished(attempt, at_step, tmp_path):
    attempt(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match="no complete shard set"):
            attempt(tmp_path / "run", f"data.root={tmp_path / 'missing'}")
    assert read_status(tmp_path / "run").state == "finished"
    at_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    assert attempt(tmp_path / "run", "train.steps=9") == "preempted"
    with pytest.raises(ValueError, match="no complete shard set"):
        attempt(tmp_path / "run", f"data.root={tmp_path / 'missing'}")
    assert read_status(tmp_path / "run").state == "failed"


def test_init_starts_at_step_0_and_repeating_the_command_continues(attempt, at_step, tmp_path):
    attempt(tmp_path / "first", "train.ema_decay=0")
    weights = Checkpoints(tmp_path / "first/checkpoints").load("latest").tensors["model"]
    at_step(4, lambda: signal.raise_signal(signal.SIGINT))
    command = (tmp_path / "second", "train.ema_decay=0", "train.steps=8", "optim.name=adamw", "optim.lr=1e-30")
    command += ("optim.lr_min=0", "optim.weight_decay=0", "regularizers.strength=0")
    assert attempt(*command, init=str(tmp_path / "first")) == "interrupted"
    found = Checkpoints(tmp_path / "second/checkpoints").load("latest")
    assert found.step == 5
    parameters = [name for name in weights if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(found.tensors["model"][name], weights[name]) for name in parameters)  # steps of no length
    at_step(-1, None)
    assert attempt(*command, init=str(tmp_path / "first")) == "finished"
    log = (tmp_path / "second/log.txt").read_text()
    assert log.count("initialized") == 1
    assert "resumed from" in log


def test_weights_of_a_release_keep_their_license(attempt, at_step, make_recipe, tmp_path):
    """In runs that start from them, over restarts, in model folders of these, and in runs that start from those."""
    attempt(tmp_path / "first", "train.ema_decay=0")
    weights = Checkpoints(tmp_path / "first/checkpoints").load("latest").tensors["model"]
    source = {"kind": "nvlabs", "sha256": "0" * 64}
    write_model_folder(tmp_path / "released", ModelContent(make_recipe(), weights, 0, {"source": source}), "")
    at_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    assert attempt(tmp_path / "second", init=str(tmp_path / "released")) == "preempted"
    at_step(-1, None)
    assert attempt(tmp_path / "second", init=str(tmp_path / "released")) == "finished"
    assert export.main([str(tmp_path / "second"), "--out", str(tmp_path / "model")]) == 0
    attempt(tmp_path / "third", init=str(tmp_path / "model"))
    for name in ("second", "third"):
        found = Checkpoints(tmp_path / name / "checkpoints").load("latest")
        assert found.facts["initialized_from"] == source
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license_name: nvlabs-nvae-non-commercial" in card
    assert f"Training started from weights: kind `nvlabs`, sha256 `{'0' * 64}`" in card
    assert "initialized_from" not in Checkpoints(tmp_path / "first/checkpoints").load("latest").facts

"""A resumed run equals an uninterrupted one bit for bit; what may not be resumed is refused with the reason."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.evaluation.likelihood_bounds import Evaluator
from pipeline.recipe import Recipe
from pipeline.run.resume import ResumeRefused, changed_settings, choose_checkpoint, restore
from pipeline.run.session import Session
from pipeline.storage.checkpoint import Checkpoints
from pipeline.tracking.tracker import Tracker
from pipeline.training.trainer import Trainer


@pytest.fixture
def train(make_recipe, make_runtime):
    """(folder, overrides, stop, resume) -> the session after training in `folder`, interrupted after step `stop`."""

    def run(folder: Path, *overrides: str, stop: int | None = None, resume: str = "auto") -> Session:
        recipe: Recipe = make_recipe(*overrides)
        session = Session(recipe, make_runtime(recipe.train.precision), folder)
        checkpoint = choose_checkpoint(session.checkpoints, resume)
        if checkpoint is not None:
            restore(session, checkpoint, resume)
        if stop is not None:
            interrupt_after(session.trainer, stop)
        tracker = Tracker(recipe.tracking, folder, session.settings, is_main=True, start_step=session.trainer.step)
        try:
            session.run(tracker)
        except Interrupted:
            pass
        finally:
            tracker.finish()
        return session

    return run


class Interrupted(Exception):
    pass


def interrupt_after(trainer: Trainer, last: int) -> None:
    """As a kill would, between the update of step `last` and everything that follows a step."""
    train_step = trainer.train_step

    def interrupted(step: int, micro_batches: list):
        skipped = train_step(step, micro_batches)
        if step == last:
            raise Interrupted
        return skipped

    trainer.train_step = interrupted


def final_bytes(folder: Path) -> dict[str, bytes]:
    """The tensors' files of the last checkpoint."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(train, tmp_path, stop):
    """Six steps over 41 images cross an epoch's end; checkpoints are at 2, 4 and 6, so most stops lose a step that is
    taken again.
    """
    overrides = ("data.trace=true", "tracking.log_every=1")
    train(tmp_path / "uninterrupted", *overrides)
    stopped = train(tmp_path / "parts", *overrides, stop=stop)
    assert stopped.trainer.step == stop
    resumed = train(tmp_path / "parts", *overrides)
    assert resumed.trainer.step == 6
    expected, found = final_bytes(tmp_path / "uninterrupted"), final_bytes(tmp_path / "parts")
    assert set(expected) == {f"{stem}.safetensors" for stem in ("model", "ema", "optimizer", "regularizers")}
    assert {name for name in expected if expected[name] != found[name]} == set()
    assert lines(tmp_path / "uninterrupted/data_trace.jsonl") == lines(tmp_path / "parts/data_trace.jsonl")
    assert [line["step"] for line in lines(tmp_path / "parts/data_trace.jsonl")] == list(range(6))


def test_the_trace_has_each_sample_once_per_epoch(train, tmp_path):
    train(tmp_path, "data.trace=true", "train.steps=11")
    seen = [
        (epoch, key)
        for line in lines(tmp_path / "data_trace.jsonl")
        for epoch, key in zip(line["epochs"], line["keys"], strict=True)
    ]
    assert len(seen) == 88
    for epoch in (0, 1):
        assert sorted(key for e, key in seen if e == epoch) == [f"train-s{i:05d}" for i in range(41)]


def test_metrics_after_a_resume_have_no_gap_and_no_repeat(train, tmp_path):
    train(tmp_path, "tracking.log_every=1", stop=3)
    train(tmp_path, "tracking.log_every=1")
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_workers_do_not_change_the_run(train, tmp_path):
    train(tmp_path / "none", "train.steps=4")
    train(tmp_path / "two", "train.steps=4", "data.workers=2")
    assert final_bytes(tmp_path / "none") == final_bytes(tmp_path / "two")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.latent_channels=3"], "model.latent_channels: 2 -> 3"),
        (["train.batch_size=4"], "train.batch_size: 8 -> 4"),
        (["train.seed=2"], "train.seed: 1 -> 2"),
        (["train.micro_batch=4"], "train.micro_batch: None -> 4"),
        (["optim.lr=0.005"], "optim.lr: 0.01 -> 0.005"),
        (["optim.clip=1.0"], "optim.clip: 0.0 -> 1.0"),
        (["optim.name=adamw"], "optim.name: adamax -> adamw"),
        (["data.flip=false"], "data.flip: True -> False"),
        (["train.ema_decay=0.0"], "train.ema_decay: 0.9 -> 0.0"),
    ],
)
def test_another_run_is_refused(train, tmp_path, overrides, named):
    train(tmp_path / "run", stop=2)
    with pytest.raises(ResumeRefused, match="other settings") as error:
        train(tmp_path / "run", *overrides)
    assert named in str(error.value)
    assert f"--run-dir {tmp_path}/run-2" in str(error.value)
    assert "--resume changed" in str(error.value)


@pytest.mark.parametrize(
    "word", ["optim.name=adamw", "regularizers.strength=0", "train.ema_decay=0", "model.latent_channels=3"]
)
def test_changed_settings_that_the_state_does_not_fit_are_refused_in_one_line(train, tmp_path, word):
    """Another optimizer, regularizers off, no average, another shape. `--init` is the way that the message names."""
    train(tmp_path / "run", stop=2)
    before = contents(tmp_path / "run")
    with pytest.raises(ResumeRefused, match=r"does not fit|this run needs") as error:
        train(tmp_path / "run", word, resume="changed")
    assert word.partition("=")[0] in str(error.value)
    assert f"--init {tmp_path}/run/checkpoints/step_00000002 --run-dir {tmp_path}/run-2" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_regularizers_that_are_switched_on_are_refused_in_one_line(train, tmp_path):
    train(tmp_path / "run", "regularizers.strength=0", stop=2)
    with pytest.raises(ResumeRefused, match=r"regularizers.strength: 0.0 -> 0.01.*--init"):
        train(tmp_path / "run", resume="changed")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_with_forged_facts_is_refused_in_one_line(train, tmp_path):
    """As `Checkpoints.save` would write them: every hash is right."""
    session = train(tmp_path / "run", stop=2)
    good = session.checkpoints.latest()
    forged = {
        "progress": [None, [], {"step": "2"}, good.facts["progress"] | {"skipped_steps": -1}],
        "settings": [None, "nvae", 7],
        "data_fingerprint": [None, 5],
        "classifier": [{}],
    }
    for name, values in forged.items():
        for value in values:
            checkpoint = replace(good, facts=good.facts | {name: value})
            with pytest.raises(ValueError, match=re.escape(str(good.path))) as error:
                restore(session, checkpoint)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["classifier", "checkpoints", "picture"])
def test_a_path_of_something_else_is_refused_in_one_line(train, tmp_path, what):
    folder = tmp_path / what
    if what == "classifier":
        shutil.copytree(Path(__file__).parents[1] / "old_runs/classifier", folder)
    else:
        folder.mkdir()
        (folder / "file").write_text("")
    with pytest.raises(ValueError, match=rf"{folder}") as error:
        train(tmp_path / "run", resume=str(folder))
    assert "\n" not in str(error.value)


def test_nan_in_validation_alone_does_not_end_training(train, tmp_path, monkeypatch):
    """The second of three validations: its record stays valid JSON, and its checkpoint is not the best."""
    evaluate = Evaluator.run

    def poisoned(self, model, step):
        if step != 4:
            return evaluate(self, model, step)
        with torch.no_grad():
            own = [parameter.clone() for parameter in model.parameters()]
            next(model.parameters()).fill_(torch.nan)
            figures = evaluate(self, model, step)
            for parameter, value in zip(model.parameters(), own, strict=True):
                parameter.copy_(value)
        return figures

    monkeypatch.setattr(Evaluator, "run", poisoned)
    session = train(tmp_path, "validation.every=2", "validation.split=val", "data.holdout=5", "checkpoint.keep=null")
    assert session.finished
    assert session.trainer.progress.skipped_steps == 0
    text = (tmp_path / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    scores = {record["step"]: float(record["val/elbo"]) for record in records if "val/elbo" in record}
    assert [step for step, elbo in scores.items() if math.isnan(elbo)] == [4]
    assert session.checkpoints.best().step == max((2, 6), key=scores.__getitem__)
    assert session.checkpoints.load(session.checkpoints.path(4)).score is None


def test_what_may_change_is_logged(train, tmp_path, monkeypatch):
    said = []
    train(tmp_path, stop=2)
    monkeypatch.setattr("pipeline.run.resume.log.info", lambda text, *values: said.append(text % values))
    train(tmp_path, "train.steps=7", "data.workers=1", "train.channels_last=false")
    changes = [line.partition(": ")[2] for line in said if line.startswith("changed since the checkpoint")]
    assert changes == ["data.workers: 0 -> 1", "train.steps: 6 -> 7", "train.channels_last: True -> False"]
    assert "the schedules of the learning rate and of beta now span 7 steps" in said


def test_changed_continues_with_other_settings(train, tmp_path):
    train(tmp_path, "train.steps=4")
    session = train(tmp_path, "optim.lr=0.005", "train.seed=2", resume="changed")
    assert session.trainer.step == 6
    saved = session.checkpoints.latest().facts["settings"]
    assert (saved["optim"]["lr"], saved["train"]["seed"]) == (0.005, 2)
    assert train(tmp_path, "optim.lr=0.005", "train.seed=2").finished  # the new settings are now those of the run


def test_a_setting_that_the_checkpoint_lacks_counts_as_its_default(make_recipe):
    wanted = make_recipe("optim.beta2=0.99").model_dump(mode="json")
    saved = make_recipe().model_dump(mode="json")
    del saved["optim"]["beta2"], saved["optim"]["beta1"]
    assert changed_settings(saved, wanted) == ([], ["optim.beta2: 0.999 -> 0.99"])


def test_a_run_folder_can_be_given_to_start_from(train, tmp_path):
    train(tmp_path / "first", "train.steps=4")
    branch = train(tmp_path / "branch", "train.steps=5", "optim.lr=0.005", resume=str(tmp_path / "first"))
    assert (branch.trainer.step, branch.checkpoints.steps()) == (5, [5])


def test_other_data_are_refused(train, tmp_path, make_recipe):
    from tests.helpers.shard_sets import random_samples, write_set

    other = write_set(
        tmp_path / "other", {"train": random_samples(41, 16, 16, seed=8), "test": random_samples(9, 16, 16)}, [50]
    )
    train(tmp_path / "run", stop=2)
    with pytest.raises(ValueError, match="fingerprint"):
        train(tmp_path / "run", f"data.root={other}")


def test_an_unreadable_checkpoint_is_skipped(train, tmp_path):
    train(tmp_path)
    newest = tmp_path / "checkpoints/step_00000006/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    found = choose_checkpoint(Checkpoints(tmp_path / "checkpoints"), "auto")
    assert found.step == 4
    assert "step_00000006" in found.passed_over[0]
    assert train(tmp_path).trainer.step == 6


def test_never_refuses_a_run_that_has_checkpoints(train, tmp_path):
    train(tmp_path, resume="never")
    with pytest.raises(ValueError, match="holds checkpoints up to step 6"):
        train(tmp_path, resume="never")


def test_a_path_starts_a_run_from_another_and_repeating_the_command_continues_it(train, tmp_path):
    train(tmp_path / "first")
    start = str(tmp_path / "first/checkpoints/step_00000004")
    branch = train(tmp_path / "branch", "train.steps=8", stop=7, resume=start)
    assert branch.trainer.step == 7
    again = choose_checkpoint(branch.checkpoints, start)
    assert again.path == tmp_path / "branch/checkpoints/step_00000006"
    with pytest.raises(ValueError, match="no checkpoint at"):
        choose_checkpoint(Checkpoints(tmp_path / "empty"), str(tmp_path / "nowhere"))


def test_a_finished_run_stays_as_it_is(train, tmp_path):
    train(tmp_path)
    before = final_bytes(tmp_path)
    finished = train(tmp_path)
    assert finished.finished
    assert final_bytes(tmp_path) == before


def test_validation_is_the_same_each_time_and_for_any_batch_size(train, tmp_path):
    session = train(tmp_path)
    figures = session.evaluator.run(session.trainer.model, step=6)
    assert figures == session.evaluator.run(session.trainer.model, step=6)
    assert set(figures) == {"val/elbo", "val/bpd", "val/nll", "val/bpd_nll", "val/log_px", "val/kl"}
    assert -figures["val/elbo"] + 1e-3 > figures["val/nll"]  # more samples tighten the bound, on average
    assert torch.tensor(list(figures.values())).isfinite().all()

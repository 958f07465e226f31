"""Resuming: which checkpoint a command continues, what may differ from it, and restoring its state."""

import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, build, flatten, with_present_names
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe
from pipeline.run.session import Session
from pipeline.storage.checkpoint import Checkpoint, Checkpoints
from pipeline.training.progress import Progress

log = logging.getLogger("pipeline")

CHANGEABLE = (
    "train.steps",
    "train.epochs",
    "train.precision",
    "train.channels_last",
    "train.compile",
    "train.recompute",
    "train.tf32",
    "train.cudnn_benchmark",
    "train.deterministic",
    "train.ddp_bucket_mb",
    "train.profile",
    "train.cpu_threads",
    "train.expect_processes",
    "train.max_skipped_steps",
    "train.collective_timeout",
    "train.progress_timeout",
    "model.classifier",
    "data.root",
    "data.source",
    "data.cache",
    "data.verify",
    "data.on_error",
    "data.workers",
    "data.trace",
    "checkpoint.",
    "tracking.",
    "validation.",
    "samples.",
)
"""Settings, or whole sections, that may change when a run is resumed: none of them changes what is optimized."""

LENGTH = {"train.steps", "train.epochs"}


class ResumeRefused(ValueError):
    """The command does not fit the run that is in its folder. Nothing in the folder has changed."""


def choose_checkpoint(checkpoints: Checkpoints, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` means: `auto` and `changed` the run's latest, `never` none, or the path of a
    checkpoint or of a run, whose latest it is.

    A run that has checkpoints of its own continues from them also when a path is given, so that repeating a command
    continues it. Raises ResumeRefused where `never` is given for a run that has some, ValueError where a path has none.
    """
    if resume == "never":
        if checkpoints.steps():
            raise ResumeRefused(
                f"--resume never: {checkpoints.folder} holds checkpoints up to step {checkpoints.steps()[-1]}; "
                f"use another --run-dir, for instance {unused_name(checkpoints.folder.parent)}, or remove that folder"
            )
        return None
    own = checkpoints.latest() if resume in ("auto", "changed") or checkpoints.own_steps() else None
    if own is not None or resume in ("auto", "changed"):
        return own
    of_run = Path(resume) / "checkpoints"
    return Checkpoints(of_run).load("latest") if of_run.is_dir() else checkpoints.load(resume)


def find_checkpoint(runtime: Runtime, checkpoints: Checkpoints, resume: str) -> Checkpoint | None:
    """The main process chooses; every rank reads the checkpoint that it chose."""
    chosen = runtime.run_on_main(lambda: choose_checkpoint(checkpoints, resume), "reading a checkpoint")
    path = runtime.from_main(chosen.path if chosen is not None else None)
    if path is None or chosen is not None:
        return chosen
    return checkpoints.load(path)


def restore(session: Session, checkpoint: Checkpoint, resume: str = "auto") -> None:
    """Continues a session from a checkpoint.

    Raises ResumeRefused where the run's own checkpoint was made with other settings or data, unless `resume` is
    `changed`, and where its state does not fit the changed settings. A checkpoint of another run starts this one, with
    the settings of this one.
    """
    progress = read_progress(checkpoint)
    allowed, other = changed_settings(checkpoint.facts["settings"], session.settings)
    saved, found = checkpoint.facts["data_fingerprint"], session.data.train.fingerprint
    if saved != found:
        other.append(f"data.root: data with the fingerprint {saved[:12]} -> {found[:12]}")
    is_own = checkpoint.path.resolve().parent == session.checkpoints.folder.resolve()
    if other and is_own and resume != "changed":
        raise ResumeRefused(
            "the checkpoint was made with other settings:\n  " + "\n  ".join(other) + "\nGive the old settings, or\n"
            f"  --run-dir {unused_name(session.folder)}  to start a new run with the new settings\n"
            "  --resume changed  to continue this run with the new settings"
        )
    if is_own and saved == found and checkpoint.facts.get("holdout") != session.data.holdout:
        raise ResumeRefused(
            "the checkpoint was trained on images that would now be held out: a run cannot change data.holdout, nor "
            f"train.seed where it is set; give the old values, or --run-dir {unused_name(session.folder)}"
        )
    load_state(session, checkpoint, progress, allowed + other)
    for change in allowed:
        log.info("changed since the checkpoint: %s", change)
    for change in other:
        log.warning("changed since the checkpoint: %s", change)
    if any(change.partition(":")[0] in LENGTH for change in allowed):
        log.info("the schedules of the learning rate and of beta now span %d steps", session.trainer.total_steps)
    session.saved_step = session.trainer.step
    session.initialized_from = checkpoint.facts.get("initialized_from")
    log.info("resumed from %s at step %d", checkpoint.path, session.trainer.step)


def read_progress(checkpoint: Checkpoint) -> Progress:
    """Raises ValueError where the checkpoint is not one of a training run."""
    facts = checkpoint.facts
    if "classifier" in facts:
        raise ValueError(f"{checkpoint.path} is a classifier; --resume takes a checkpoint or a run folder of train.py")
    if not isinstance(facts.get("settings"), dict) or not isinstance(facts.get("data_fingerprint"), str):
        raise ValueError(f"{checkpoint.path} states no settings or no data: it is not a checkpoint of a training run")
    try:
        return Progress.read(facts.get("progress"), checkpoint.step)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} cannot be resumed: {error}") from None


def load_state(session: Session, checkpoint: Checkpoint, progress: Progress, changes: list[str]) -> None:
    """Raises ResumeRefused where the state does not fit and settings have changed, ValueError where they have not."""
    try:
        session.trainer.resume(progress, checkpoint.tensors)
    except ValueError as error:
        if not changes:
            raise
        problem = ", ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ResumeRefused(
            f"{checkpoint.path} cannot be continued with these changes ({'; '.join(changes)}): {problem}. Give the old "
            f"settings, or start a new run from its weights: --init {checkpoint.path} --run-dir "
            f"{unused_name(session.folder)}"
        ) from None


def changed_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """One line for each setting that differs: those that may change, and the others.

    A setting that the checkpoint lacks counts as its default.
    """
    old, new = flatten(with_defaults(saved)), flatten(wanted)
    paths = [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
    lines = {path: f"{path}: {old.get(path)} -> {new.get(path)}" for path in paths}
    return (
        [line for path, line in lines.items() if path.startswith(CHANGEABLE)],
        [line for path, line in lines.items() if not path.startswith(CHANGEABLE)],
    )


def with_defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a checkpoint, which an earlier version may have written, as this version would write them."""
    present = with_present_names(settings)
    try:
        return build(Recipe, present).model_dump(mode="json")
    except ConfigError:  # this version does not accept them: compare what is written
        return present


def unused_name(folder: Path) -> Path:
    """The first of FOLDER-2, FOLDER-3 ... that does not exist."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())

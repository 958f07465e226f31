"""One attempt at a run: its lock, its data and checkpoint, training, and how it ended."""

import hashlib
import logging
import os
from pathlib import Path

import torch

from pipeline.distributed.agreement import code_version
from pipeline.distributed.log_file import LogFile
from pipeline.distributed.logs import log_lines
from pipeline.distributed.preemption import StopRequest
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe
from pipeline.run.announce import first_lines, last_lines
from pipeline.run.initialize import initialize
from pipeline.run.micro_batch import resolve_micro_batch
from pipeline.run.out_of_memory import OutOfMemory, explained
from pipeline.run.prepare_data import prepare_data
from pipeline.run.resume import ResumeRefused, find_checkpoint, restore
from pipeline.run.session import Session
from pipeline.run.start_facts import record_start
from pipeline.storage.run_lock import RunFolderLost, RunLock
from pipeline.storage.status import State, StatusFile
from pipeline.tracking.tracker import Tracker
from pipeline.training.progress import TrainingDiverged
from shard_data.terminal import aligned

log = logging.getLogger("pipeline")

FAILURES = {TrainingDiverged: 1, RunFolderLost: 2, OutOfMemory: 2}
"""Exit codes of the errors, besides ValueError and OSError, that end an attempt."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""


def run_attempt(
    folder: Path,
    recipe: Recipe,
    runtime: Runtime,
    stop: StopRequest,
    resume: str = "auto",
    init: str | None = None,
    wait: float = 60.0,
    may_make_data: bool = True,
) -> State:
    """Trains in a run folder that no other process uses. Returns how that ended, which status.json says too.

    `resume`, `init`: as on the command line of `train.py`. `wait`: seconds to wait for the processes of an earlier
    attempt. Raises ValueError for a user error, ResumeRefused among them, TrainingDiverged, RunFolderLost, OutOfMemory.
    """
    runtime.run_on_all(lambda: check_batch(recipe, runtime.world_size), "checking the batch size")
    lock = runtime.run_on_main(lambda: RunLock(folder, wait), f"locking {folder}")  # the main process holds it
    try:
        session = open_session(folder, recipe, runtime, resume, init, may_make_data, lock)
        was_finished = runtime.from_main(session.status.status.state) == "finished"
        completed = True
        if not (session.finished and was_finished):  # killed after its last step, it still has to close its records
            with stop.finishing_steps(lambda: end_at_once(session, runtime.is_main)):
                completed = train_with_tracker(session, recipe, runtime, stop)
        return report_end(session, runtime, stop, completed)
    except ResumeRefused:
        raise
    except (ValueError, TrainingDiverged, OutOfMemory) as error:
        # Not OSError: a disk may be there again at the next attempt. A run stays finished if its command had a mistake.
        if lock is not None and (status := StatusFile(folder)).status.state != "finished":
            status.end("failed", str(error))
        raise
    finally:
        if lock is not None:
            lock.release()


def open_session(
    folder: Path,
    recipe: Recipe,
    runtime: Runtime,
    resume: str,
    init: str | None,
    may_make_data: bool,
    lock: RunLock | None,
) -> Session:
    """The run at its last checkpoint or at its start, with its log file open. A refusal writes nothing in the folder.

    Raises ValueError where the processes do not agree on what they run, and ResumeRefused.
    """
    log_file = LogFile()
    if runtime.is_main:
        log.addHandler(log_file)
    log.info("%s on %s in %s", recipe.model.name, runtime.describe(), folder)
    runtime.check_agreement(
        {
            "settings": fingerprint_of(recipe),
            "code": code_version(),
            "torch": torch.__version__,
            "processes": str(runtime.world_size),
        }
    )
    runtime.run_on_main(lambda: prepare_data(recipe, may_make_data), f"making {recipe.data.root}")
    recipe = resolve_micro_batch(recipe, runtime, folder)
    session = Session(recipe, runtime, folder, lock.check if lock is not None else lambda: None)
    runtime.check_agreement({"training data": session.data.train.fingerprint})
    checkpoint = find_checkpoint(runtime, session.checkpoints, resume)
    if checkpoint is not None:
        runtime.run_on_all(lambda: restore(session, checkpoint, resume), "restoring a checkpoint")
    elif init is not None:
        source = find_checkpoint(runtime, session.checkpoints, init)
        runtime.run_on_all(lambda: initialize(session, source), "loading weights")
    if runtime.is_main:
        log_file.open(folder / "log.txt")
    return session


def train_with_tracker(session: Session, recipe: Recipe, runtime: Runtime, stop: StopRequest) -> bool:
    """Trains to the last step (True) or to a stop request (False), with metrics.jsonl and W&B open."""
    step, total_steps = session.trainer.step, session.trainer.total_steps

    def tracker(is_main: bool) -> Tracker:
        attempt = session.status.begin(step, total_steps) if is_main else 1
        facts = record_start(session, attempt) if is_main else None
        shown = session.settings | {"environment": facts.environment if facts is not None else {}}
        opened = Tracker(recipe.tracking, session.folder, shown, is_main=is_main, start_step=step, attempt=attempt)
        if facts is not None:
            log_lines(first_lines(session, facts))
        return opened

    # Inside the tracker: its last upload to W&B must not delay the failure report to the other processes.
    with (
        runtime.run_on_main(lambda: tracker(is_main=True), "starting the tracker") or tracker(is_main=False) as opened,
        runtime.propagate_failure(),
        explained(session.recipe, runtime),
    ):
        completed = session.run(opened, should_stop=lambda: stop.reason is not None)
        if not completed:
            text = f"At step {session.trainer.step} of {total_steps}, with a checkpoint. The same command continues it."
            opened.send_alert("The run was stopped", text)
        return completed


def end_at_once(session: Session, is_main: bool) -> None:
    """Ends this process after a second Ctrl-C, whatever its main thread does."""
    if is_main:
        session.status.end("interrupted", "SIGINT")
        step = session.status.status.step
        where = f"from the checkpoint of step {step}" if step else "from the beginning: there is no checkpoint yet"
        log.error("interrupted; the same command continues %s", where)
    os._exit(INTERRUPTED)


def report_end(session: Session, runtime: Runtime, stop: StopRequest, completed: bool) -> State:
    """Logs, and writes to status.json, whether the run is finished or was stopped by a signal. Returns the state."""
    trainer, folder = session.trainer, session.folder
    reasons = [reason for reason in runtime.gather_objects(stop.reason) if reason is not None]
    if completed:
        state, reason = "finished", ""
        log.info("%s is finished: step %d of %d.", folder, trainer.step, trainer.total_steps)
        if runtime.is_main:
            log_lines(last_lines(session))
    else:
        interrupted = "SIGINT" in reasons
        state, reason = ("interrupted", "SIGINT") if interrupted else ("preempted", reasons[0])
        message = "stopped by %s at step %d of %d with a checkpoint; run the same command again to continue"
        log.info(message, "Ctrl-C" if interrupted else reason, trainer.step, trainer.total_steps)
        log_lines(aligned({"checkpoint": str(session.checkpoints.folder / f"step_{trainer.step:08d}")}))
    if runtime.is_main:
        session.status.end(state, reason)
    return state


def fingerprint_of(recipe: Recipe) -> str:
    """A short hash of the resolved settings."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def check_batch(recipe: Recipe, world_size: int) -> None:
    """Raises ValueError where the processes cannot share a micro-batch equally."""
    train = recipe.train
    micro_batch = train.images_per_pass
    if micro_batch % world_size:
        fitting = [size for size in range(world_size, train.batch_size + 1, world_size) if train.batch_size % size == 0]
        nearest = max(world_size, round(train.batch_size / world_size) * world_size)
        fix = (
            f"train.micro_batch can be {fitting}" if fitting else f"the nearest train.batch_size that does is {nearest}"
        )
        raise ValueError(f"{world_size} processes cannot share a micro-batch of {micro_batch} images equally; {fix}")

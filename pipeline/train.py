"""Trains a model.

    accelerate launch pipeline/train.py --model nvae
    accelerate launch pipeline/train.py --config my_recipe.yaml --data data/celeba64 train.batch_size=64 optim.lr=5e-3

Run the same command again to continue an interrupted run.
"""

import argparse
import hashlib
import logging
import re
import shlex
import sys
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from pipeline.cli import run_python  # noqa: E402
from pipeline.config import dump  # noqa: E402
from pipeline.data.remote import is_address  # noqa: E402
from pipeline.distributed.agreement import code_version  # noqa: E402
from pipeline.distributed.logs import launched_rank, start_logging  # noqa: E402
from pipeline.distributed.preemption import StopRequest  # noqa: E402
from pipeline.distributed.runtime import Runtime  # noqa: E402
from pipeline.recipe import RECIPES, Recipe, load_recipe, recipe_path  # noqa: E402
from pipeline.run.session import Session, choose_checkpoint, describe  # noqa: E402
from pipeline.storage.checkpoint import Checkpoint, Checkpoints  # noqa: E402
from pipeline.storage.run_lock import RunLock  # noqa: E402
from pipeline.storage.status import StatusFile  # noqa: E402
from pipeline.tracking.tracker import Tracker  # noqa: E402
from pipeline.training.progress import TrainingDiverged  # noqa: E402

log = logging.getLogger("pipeline")


def build_parser() -> argparse.ArgumentParser:
    """The command line; settings follow it as `section.key=value` words."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every setting of a recipe can be given as a word, for instance: train.steps=500 train.micro_batch=16 "
        "train.precision=bf16 data.workers=4 checkpoint.every=1000 tracking.wandb=offline. --dry-run prints them all "
        "with their values.",
    )
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", metavar="NAME", help=f"train this model by its default recipe, or any recipe by name: {names}"
    )
    what.add_argument("--config", metavar="FILE", type=Path, help="a recipe file of your own")
    parser.add_argument(
        "--data", metavar="DIR", help="the shard set to train on (data.root): a folder, or its http(s):// address"
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and pictures go (default: runs/<recipe>)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="auto",
        help="continue the run's last checkpoint (auto, the default), refuse to (never), or begin from the checkpoint "
        "folder PATH",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long to wait for processes of an attempt before, which still hold the run folder (default: 60)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved settings, parameters, latent groups and memory, then stop",
    )
    parser.add_argument("words", metavar="section.key=value", nargs="*", help="settings that replace the recipe's")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Settings may stand anywhere, and with a leading `--`, as W&B sweeps write them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if not re.match(r"(--)?\w+\.[\w.]+=", word)]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; settings are written section.key=value")
    if not (parsed.model or parsed.config):
        parser.error("one of --model NAME and --config FILE is needed, for instance --model nvae")
    parsed.words += rest
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 finished, or stopped by SIGTERM or SIGUSR1 with a checkpoint (status.json tells which); 1 diverged;
    2 something the user can mend; 130 interrupted by Ctrl-C; 80, 81, 82: see watchdog.
    """
    parsed = parse(arguments)
    start_logging(None, launched_rank() == 0)
    try:
        return run(parsed)
    except (ValueError, OSError) as error:
        return fail(error, code=2)
    except TrainingDiverged as error:
        return fail(error, code=1)
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again to continue from the last checkpoint", code=130)


def fail(error: Exception | str, code: int) -> int:
    """One message from the main process."""
    if launched_rank() == 0:
        log.error("error: %s", error)
    return code


def run(parsed: argparse.Namespace) -> int:
    """From the command line to a finished run."""
    path = recipe_path(parsed.model) if parsed.model else parsed.config
    recipe = load_recipe(path, parsed.words, parsed.data)
    if parsed.dry_run:
        if launched_rank() == 0:
            print(f"{dump(recipe)}\n{describe(recipe)}")
        return 0
    train, folder = recipe.train, parsed.run_dir or Path("runs") / path.stem
    with StopRequest() as stop:
        runtime = Runtime(train.precision, train.cpu_threads, train.expect_processes, train.collective_timeout)
        runtime.watchdog.stacks = folder / "stacks"
        with runtime.closing():
            runtime.run_on_all(lambda: check_batch(recipe, runtime.world_size))
            train_in(folder, recipe, runtime, parsed, stop)
    return 0


def train_in(folder: Path, recipe: Recipe, runtime: Runtime, parsed: argparse.Namespace, stop: StopRequest) -> None:
    """Trains in a run folder that no other process uses, and leaves word of how that ended."""
    lock = runtime.run_on_main(lambda: RunLock(folder, parsed.wait))  # held by the main process until it ends
    try:
        start_logging(folder / "log.txt" if runtime.is_main else None, runtime.is_main)
        log.info("%s on %s in %s", recipe.model.name, runtime.describe(), folder)
        session = open_session(folder, recipe, runtime, parsed)
        told = runtime.from_main(session.status.status.state) == "finished"
        completed = True
        if not (session.finished and told):  # killed after its last step, it has still to close its records
            completed = train_with_tracker(session, recipe, runtime, stop)
        report_end(session, runtime, stop, completed)
    except (ValueError, TrainingDiverged) as error:  # not OSError: a disk may be there again at the next attempt
        if lock is not None:
            StatusFile(folder).end("failed", str(error))
        raise
    finally:
        if lock is not None:
            lock.release()


def open_session(folder: Path, recipe: Recipe, runtime: Runtime, parsed: argparse.Namespace) -> Session:
    """The run as its last checkpoint left it. Raises ValueError where the processes do not agree on what they run."""
    runtime.check_agreement(
        {
            "settings": fingerprint_of(recipe),
            "code": code_version(),
            "torch": torch.__version__,
            "processes": str(runtime.world_size),
        }
    )
    runtime.run_on_main(lambda: provide(recipe, may_make=parsed.data is None))
    session = Session(recipe, runtime, folder)
    runtime.check_agreement({"training data": session.data.train.fingerprint})
    checkpoint = find_checkpoint(runtime, Checkpoints(folder / "checkpoints"), parsed.resume)
    if checkpoint is not None:
        session.resume(checkpoint)
    return session


def find_checkpoint(runtime: Runtime, checkpoints: Checkpoints, resume: str) -> Checkpoint | None:
    """The main process chooses; every rank reads what it chose."""
    chosen = runtime.run_on_main(lambda: choose_checkpoint(checkpoints, resume))
    path = runtime.from_main(chosen.path if chosen is not None else None)
    if path is None or chosen is not None:
        return chosen
    return checkpoints.load(path)


def train_with_tracker(session: Session, recipe: Recipe, runtime: Runtime, stop: StopRequest) -> bool:
    """Trains to the last step (True) or to a stop request (False), with metrics.jsonl and W&B open."""
    step, total_steps = session.trainer.step, session.trainer.total_steps

    def tracker(is_main: bool) -> Tracker:
        attempt = session.status.begin(step, total_steps) if is_main else 1
        return Tracker(
            recipe.tracking, session.folder, session.settings, is_main=is_main, start_step=step, attempt=attempt
        )

    # Inside the tracker: its last upload to W&B must not delay the failure report to the other processes.
    with (
        runtime.run_on_main(lambda: tracker(is_main=True)) or tracker(is_main=False) as opened,
        runtime.propagate_failure(),
    ):
        return session.run(opened, should_stop=lambda: stop.reason is not None)


def report_end(session: Session, runtime: Runtime, stop: StopRequest, completed: bool) -> None:
    """Logs, and writes to status.json, whether the run is finished or was stopped by a signal."""
    trainer, folder = session.trainer, session.folder
    reasons = [reason for reason in runtime.gather_objects(stop.reason) if reason is not None]
    if not completed:
        state, reason = "preempted", reasons[0]
        words = "stopped by %s at step %d of %d with a checkpoint; run the same command again to go on"
        log.info(words, reason, trainer.step, trainer.total_steps)
    else:
        state, reason = "finished", ""
        words = "%s is finished: step %d of %d; train.steps=N trains on"
        log.info(words, folder, trainer.step, trainer.total_steps)
    if runtime.is_main:
        session.status.end(state, reason)


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
        remedy = (
            f"train.micro_batch can be {fitting}" if fitting else f"the nearest train.batch_size that does is {nearest}"
        )
        raise ValueError(f"{world_size} processes cannot share a micro-batch of {micro_batch} images equally; {remedy}")


def provide(recipe: Recipe, may_make: bool) -> None:
    """The recipe's own data, and the frozen classifier that its model may need of them, where they are missing."""
    provide_data(recipe, may_make)
    folder, root = recipe.model.classifier_folder, recipe.data.root
    if folder and may_make and not is_address(root) and not Path(folder).exists():
        words = ["--data", root, "--out", folder, "--epochs", "2"]
        log.info("%s is missing and trained once: python pipeline/train_classifier.py %s", folder, shlex.join(words))
        run_python(str(Path(__file__).with_name("train_classifier.py")), *words)


def provide_data(recipe: Recipe, may_make: bool) -> None:
    """Makes the recipe's own data where they are missing and need no originals.

    Raises ValueError that names the command for others.
    """
    root, source = recipe.data.root, recipe.data.source
    if root is None:
        raise ValueError("data.root: the recipe names no shard set; give one with --data DIR")
    if is_address(root) or (Path(root) / "manifest.json").is_file():
        return
    command = f"python -m shard_data {source} --out {root}"
    if source is None or "DIR" in source or not may_make:
        how = f"; make it with: {command}" if source else ""
        raise ValueError(f"{root}: no complete shard set (no manifest.json){how}")
    log.info("%s is missing and made once: %s", root, command)
    run_python("-m", "shard_data", *shlex.split(source), "--out", root)


if __name__ == "__main__":
    sys.exit(main())

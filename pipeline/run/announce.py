"""The lines at the start and at the end of a training run, on the terminal and in log.txt."""

import shlex
from collections import Counter

from pipeline.cli import as_called
from pipeline.run.resume import unused_name
from pipeline.run.session import Session
from pipeline.storage.attempts import AttemptFacts
from pipeline.storage.metrics_file import read_records
from pipeline.tracking.history import WALL_CLOCK
from shard_data.terminal import aligned, duration

NO_BEST = "none is kept, since validation.split=test; data.holdout=N validation.split=val keeps one"


def first_lines(session: Session, facts: AttemptFacts) -> list[str]:
    """What is trained on which data, for how long, where it writes, how to stop, resume and watch it. With the line
    that names the processes, and W&B's, ten at most.
    """
    folder, recipe = shlex.quote(str(session.folder)), session.recipe
    return aligned(
        {
            "model": f"{facts.parameters:,} parameters; {describe_groups(session)}",
            "data": describe_data(session, facts),
            "best": "" if session.keeps_best or not recipe.validation.every else NO_BEST,
            "length": f"{facts.total_steps:,} steps of {recipe.train.batch_size:,} images, "
            f"{facts.total_steps * recipe.train.batch_size / facts.images:.3g} epochs; from step {facts.step:,}",
            "writes": f"{folder}: metrics every {recipe.tracking.log_every:,} steps"
            + every("pictures", recipe.samples.every)
            + every("checkpoints", recipe.checkpoint.every),
            "stop": "Ctrl-C or SIGTERM finishes the step and writes a checkpoint; the same command resumes",
            "watch": [
                as_called(f"python pipeline/report.py {folder} --serve"),
                as_called(f"python -m pipeline.status {folder} --long"),
            ],
        }
    )


def every(what: str, steps: int) -> str:
    """`, pictures every 400`."""
    return f", {what} every {steps:,}" if steps else ""


def describe_groups(session: Session) -> str:
    """`6 latent groups: 1 of 20x4x4, 5 of 20x8x8`."""
    groups = session.trainer.model.groups
    shapes = Counter("x".join(map(str, group.shape)) for group in groups)
    if len(groups) == 1:
        return f"1 latent group of {next(iter(shapes))}"
    return f"{len(groups)} latent groups: " + ", ".join(f"{number} of {shape}" for shape, number in shapes.items())


def describe_data(session: Session, facts: AttemptFacts) -> str:
    """`data/toy_faces32: 19,200 images of 32x32x3 (train); validated on 2,400 (val) every 400 steps`."""
    data, config = session.data, session.recipe.validation
    text = f"{facts.data}: {facts.images:,} images of {'x'.join(map(str, data.train.image_shape))} ({data.train.split})"
    if not config.every:
        return f"{text}; no validation"
    count = min(config.images or len(data.held_out), len(data.held_out))
    return f"{text}; validated on {count:,} ({data.held_out.split}) every {config.every:,} steps"


def last_lines(session: Session) -> list[str]:
    """What a finished run has cost and reached, where its files are, and what comes next."""
    folder, trainer, recipe = shlex.quote(str(session.folder)), session.trainer, session.recipe
    seconds, best = read_end(session)
    attempts = session.status.status.attempt
    took = f"{duration(seconds)} of training, in {attempts} attempt{'' if attempts == 1 else 's'}" if seconds else ""
    pictures = ", samples/, reconstructions/" if recipe.samples.every else ""
    longer = f"train.steps above {trainer.total_steps} trains longer; a new run has another --run-dir, for instance"
    return aligned(
        {
            "took": took,
            "best": best,
            "checkpoint": str(session.checkpoints.folder / f"step_{trainer.step:08d}"),
            "files": f"{folder}: metrics.jsonl, log.txt{pictures}",
            "more": f"{longer} {shlex.quote(str(unused_name(session.folder)))}",
            "next": [
                as_called(f"python pipeline/evaluate.py {folder} --split {recipe.validation.split}"),
                as_called(f"python pipeline/sample.py {folder} --temperature 0.7 1.0"),
                as_called(f"python pipeline/report.py {folder}"),
            ],
        }
    )


def read_end(session: Session) -> tuple[float, str]:
    """Seconds of training over all attempts, and the best validation, as metrics.jsonl states them."""
    seconds, best = 0.0, None
    try:
        for record in read_records(session.folder / "metrics.jsonl"):
            seconds = max(seconds, record.get(WALL_CLOCK, 0.0))
            if "val/elbo" in record and (best is None or record["val/elbo"] > best["val/elbo"]):
                best = record
    except OSError:  # what was trained is complete without it
        return 0.0, ""
    if best is None:
        return seconds, ""
    bits = f" ({best['val/bpd']:.4f} bits/dim)" if "val/bpd" in best else ""
    split = session.recipe.validation.split
    return seconds, f"ELBO of {split} {best['val/elbo']:,.2f} nats{bits}, step {best['step']:,}"

"""The lines of `python -m pipeline.status RUN --long`."""

import shlex
import sys
import time
from pathlib import Path

from pipeline.reporting.run_folder import Run, RunReader, count, printable
from pipeline.reporting.summary import Summary, summarize
from pipeline.reporting.text import moment
from pipeline.reporting.text_table import STYLES
from pipeline.storage.attempts import AttemptFacts
from shard_data.terminal import aligned, duration, paint

SHOWN_CHECKPOINTS = 5
SHOWN_WARNINGS = 3


def long_status(folder: Path, now: float | None = None) -> list[str]:
    """The state of a run for a reader. Raises ValueError for a folder that is no run's."""
    now = time.time() if now is None else now
    run = RunReader(folder).read()
    summary = summarize(run, now)
    state = paint(summary.state, STYLES[summary.tone], sys.stdout)
    facts = {
        "left": summary.time_left.replace(" left", "", 1),
        "why": printable(summary.reason),
        "model": describe_model(run),
        "data": printable(str(run.settings.get("data.root") or "")),
        "started": describe_last_start(run),
        "code": printable(run.attempts[-1].revision) if run.attempts else "",
        **{figure.label: describe_figure(figure.value, figure.detail) for figure in summary.figures},
        "checkpoints": describe_checkpoints(run),
        "written": f"{duration(max(0.0, now - run.changed))} ago, {moment(run.changed)}" if run.changed > 0 else "",
        "warnings": [printable(line) for line in run.warnings[-SHOWN_WARNINGS:]],
        "missing": run.notes,
        "next": next_commands(run, summary),
    }
    return [f"{paint(printable(run.name), 'bold', sys.stdout)}: {state}, {describe_step(summary)}", *aligned(facts)]


def describe_step(summary: Summary) -> str:
    """`step 400 of 1,600 (25.0 %)`."""
    if not summary.total_steps:
        return f"step {summary.step:,}"
    return f"step {summary.step:,} of {summary.total_steps:,} ({100 * summary.progress:.1f} %)"


def describe_figure(value: str, detail: str) -> str:
    """`-8,871 (val, step 1,600)`."""
    return f"{value} ({detail})" if detail else value


def describe_model(run: Run) -> str:
    """Its name, and its size where the run states it."""
    name = printable(str(run.settings.get("model.name") or ""))
    facts = run.attempts[-1] if run.attempts else AttemptFacts()
    if not facts.parameters:
        return name
    size = f"{count(facts.parameters, 'parameter')}, {count(facts.latent_groups, 'latent group')}"
    return f"{name or printable(facts.model)}: {size}"


def describe_last_start(run: Run) -> str:
    """When, where and at which step the run was started last."""
    if not run.attempts:
        return printable(run.started)
    facts = run.attempts[-1]
    return f"{moment(facts.time)} at step {facts.step:,}, attempt {facts.attempt}: {run.started}"


def describe_checkpoints(run: Run) -> str:
    """The steps of the last ones."""
    if not run.checkpoints:
        return "none yet"
    steps = ", ".join(f"{step:,}" for step in run.checkpoints[-SHOWN_CHECKPOINTS:])
    return f"{'... ' if len(run.checkpoints) > SHOWN_CHECKPOINTS else ''}{steps}"


def next_commands(run: Run, summary: Summary) -> list[str]:
    """What one does with a run in this state."""
    folder = printable(shlex.quote(str(run.folder)))
    watch = f"python pipeline/report.py {folder}{' --serve' if summary.state.startswith('running') else ''}"
    if not run.checkpoints or summary.state.startswith("running"):
        return [watch]
    return [watch, f"python pipeline/evaluate.py {folder}", f"python pipeline/sample.py {folder}"]

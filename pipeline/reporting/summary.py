"""The first lines of a report: in which state a run is, how far, how good, and how long it takes."""

import math
import time
from dataclasses import dataclass

from pipeline.reporting.run_folder import Run, count, seconds_silent
from pipeline.reporting.text import moment, number
from shard_data.terminal import duration

SILENT = 900.0
"""Seconds without a record after which a run that states `running` may have been killed; at least 10 intervals."""
STATES = {
    "none": ("not started, or not known", "quiet"),
    "running": ("running", "busy"),
    "preempted": ("preempted", "warn"),
    "interrupted": ("interrupted", "warn"),
    "finished": ("finished", "good"),
    "failed": ("failed", "bad"),
}
"""What is shown for a state, and how."""


@dataclass(frozen=True)
class Objective:
    """The figure by which a run is judged."""

    key: str
    """Of `metrics.jsonl`."""
    label: str
    unit: str
    larger_is_better: bool
    held_out: bool
    """Measured on the validation split."""


OBJECTIVES = (
    Objective("val/elbo", "ELBO", "nats", True, True),
    Objective("train/elbo", "ELBO", "nats", True, False),
)
BITS = (
    Objective("val/bpd", "bits/dim", "", False, True),
    Objective("train/bpd", "bits/dim", "", False, False),
)


@dataclass(frozen=True)
class Figure:
    """A number of the summary."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """The summary of one run."""

    state: str
    tone: str
    """good, busy, warn, bad or quiet."""
    step: int
    total_steps: int
    progress: float | None
    """In [0, 1]."""
    seconds_left: float | None
    """At the speed of the last records; None where nothing runs, or nothing is known."""
    time_left: str
    reason: str
    """Why it stopped, or what may be wrong."""
    figures: list[Figure]


def objective_of(run: Run) -> Objective | None:
    """Nats for binary images, bits per dimension for others; of the held-out split where it was validated."""
    binary = run.settings.get("model.likelihood.name") == "bernoulli"
    candidates = OBJECTIVES + BITS if binary else BITS + OBJECTIVES
    return next((objective for objective in candidates if objective.key in run.history.best), None)


def split_of(run: Run, objective: Objective) -> str:
    """`training`, or the split that was validated; `held out` where the settings do not name it."""
    split = run.settings.get("validation.split") if objective.held_out else "training"
    return split[:100] if isinstance(split, str) else "held out"


def best_of(run: Run, objective: Objective) -> tuple[int, float] | None:
    """Step and value of the best one."""
    best = run.history.best.get(objective.key)
    return None if best is None else best[objective.larger_is_better]


def summarize(run: Run, now: float | None = None) -> Summary:
    """The summary at this moment."""
    now = time.time() if now is None else now
    status, pace = run.status, run.history.seconds_per_step()
    step, total = max(status.step, run.history.last_step), status.total_steps
    state, tone = STATES[status.state]
    reason, time_left, seconds_left = status.reason, "", None
    if status.state == "running":
        state, tone, reason = judge_running(run, pace, now)
        if not reason and pace and total > step and math.isfinite((total - step) * pace):
            seconds_left = (total - step) * pace
            time_left = f"{duration(seconds_left)} left, until {moment(now + seconds_left)}"
    return Summary(
        state=state,
        tone=tone,
        step=step,
        total_steps=total,
        progress=min(1.0, step / total) if total else None,
        seconds_left=seconds_left,
        time_left=time_left,
        reason=reason,
        figures=figures_of(run, pace),
    )


def judge_running(run: Run, pace: float | None, now: float) -> tuple[str, str, str]:
    """State, tone and what may be wrong with a run that states `running`. `pace`: seconds per step."""
    if run.held is False:
        return "killed", "warn", "No process trains in this folder any more. The same command again continues the run."
    recent, silent = run.history.recent, seconds_silent(run, now)
    interval = pace * max(1, recent[-1][0] - recent[-2][0]) if pace else 0.0
    if silent <= max(SILENT, 10 * interval):
        return (*STATES["running"], "")
    written = f"Nothing was written for {duration(silent)}."
    if run.held:
        return "running", "warn", f"{written} Its process is alive, and may hang; look at log.txt."
    return (
        "running?",
        "warn",
        f"{written} If no process is training, the run was killed: the same command again continues it.",
    )


def figures_of(run: Run, pace: float | None) -> list[Figure]:
    """What stands below the state."""
    history, figures = run.history, []
    for objective in _objectives_shown(run):
        step, value = best_of(run, objective)
        label = f"best {objective.label}" + (f", {objective.unit}" if objective.unit else "")
        figures.append(Figure(label, number(value), f"{split_of(run, objective)}, step {step:,}"))
    if (kl := history.last("train/kl")) is not None:
        figures.append(Figure("KL, nats", number(kl), "training, newest"))
    if (speed := history.last("perf/images_per_second")) is not None:
        figures.append(Figure("images/s", number(speed, 3), _pace(pace)))
    if history.seconds:
        figures.append(Figure("training time", duration(history.seconds), "over all attempts"))
    if run.status.attempt:
        figures.append(Figure("attempts", number(run.status.attempt), _restarts(run)))
    return figures


def _pace(seconds_per_step: float | None) -> str:
    if not seconds_per_step:
        return ""
    if seconds_per_step >= 1:
        return f"{number(seconds_per_step, 3)} s per step"
    return f"{number(1 / seconds_per_step, 3)} steps per second"


def _restarts(run: Run) -> str:
    restarts = len(run.history.attempts) - 1
    if restarts > 0:
        return f"{count(restarts, 'restart')} in the curves"
    return "never restarted" if run.status.attempt == 1 else ""


def _objectives_shown(run: Run) -> list[Objective]:
    """The main one, and the same bound in the other unit."""
    main = objective_of(run)
    if main is None:
        return []
    others = [one for one in OBJECTIVES + BITS if one.held_out == main.held_out and one.label != main.label]
    return [main, *(one for one in others if one.key in run.history.best)]

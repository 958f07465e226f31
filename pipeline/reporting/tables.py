"""The tables of a report: evaluations, validation, attempts, settings, environment."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reporting.curves import group_order
from pipeline.reporting.defaults import REQUIRED, default_of
from pipeline.reporting.run_folder import Run
from pipeline.reporting.summary import Objective, best_of, objective_of, split_of, summarize
from pipeline.reporting.text import moment, number, setting
from pipeline.reporting.thinning import evenly
from shard_data.terminal import duration

MAX_ROWS = 200
MAIN_FIGURES = 12
MAX_VALIDATIONS = 30


@dataclass(frozen=True)
class Table:
    """Rows of text. `numeric`: columns that are aligned to the right."""

    head: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    is_facts: bool = False
    """One value to a line, which may be long."""


def evaluation_table(run: Run) -> Table | None:
    """A row for each evaluation; a column for each figure, without those of single groups and classes."""
    if not run.evaluations:
        return None
    names = list(dict.fromkeys(name for one in run.evaluations for name in one.report["figures"] if "/" not in name))
    if not names:
        names = list(dict.fromkeys(name for one in run.evaluations for name in one.report["figures"]))
    names = names[:MAIN_FIGURES]
    rows = []
    for one in run.evaluations[:MAX_ROWS]:
        figures = one.report["figures"]
        data = one.report.get("data") if isinstance(one.report.get("data"), dict) else {}
        facts = [_text(one.report.get("step")), _text(data.get("split")), _text(one.report.get("images"))]
        facts.append(_text(one.report.get("importance_samples")))
        rows.append([one.file, *facts, *(_figure(figures.get(name)) for name in names)])
    head = ["file", "step", "split", "images", "importance samples", *names]
    return Table(head, rows, frozenset(range(1, len(head))) - {2})


def evaluate_command(run: Run) -> str:
    """What measures the newest checkpoint."""
    return f"python -m pipeline.evaluate {shlex.quote(str(run.folder))}"


def shared_notes(notes: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """Sentences on several runs: with the run's name, but for those that hold for all."""
    everywhere = [note for note in notes[0] if all(note in own for own in notes)]
    own = [f"{name}: {note}" for name, run in zip(names, notes, strict=True) for note in run if note not in everywhere]
    return everywhere + own


def validation_table(run: Run) -> Table | None:
    """The figures of the held-out split, at no more than MAX_VALIDATIONS steps, evenly spaced."""
    curves = {key: dict(curve.points()) for key, curve in run.history.curves.items() if key.startswith("val/")}
    steps = evenly(sorted({step for points in curves.values() for step in points}), MAX_VALIDATIONS)
    if not steps:
        return None
    names = list(curves)[:MAIN_FIGURES]
    rows = [[number(step), *(number(curves[name].get(step), 5) for name in names)] for step in reversed(steps)]
    return Table(["step", *(name.removeprefix("val/") for name in names)], rows, frozenset(range(len(names) + 1)))


def _text(value: object) -> str:
    if isinstance(value, str):
        return value[:100]
    return number(value) if type(value) in (int, float) else "\N{EN DASH}"


def _figure(value: object) -> str:
    return number(value, 5) if type(value) in (int, float) else "\N{EN DASH}"


def attempt_table(run: Run) -> Table | None:
    """A row for each start that has logged something; None for a run that was never restarted."""
    if len(run.history.attempts) < 2:
        return None
    rows = []
    for one in run.history.attempts[-MAX_ROWS:]:
        steps = [number(one.first_step), number(one.last_step)]
        rows.append([str(one.number), *steps, moment(one.begin), duration(one.end - one.begin)])
    head = ["attempt", "first logged step", "last logged step", "first record", "to its last record"]
    return Table(head, rows, frozenset(range(len(head))))


def facts_table(facts: Sequence[Sequence[tuple[str, str]]], names: Sequence[str]) -> Table:
    """A row for each fact, and a column for each run; a run that lacks one has a dash."""
    by_run = [dict(own) for own in facts]
    rows = list(dict.fromkeys(name for own in by_run for name in own))
    cells = [[name, *(own.get(name, "\N{EN DASH}") for own in by_run)] for name in rows]
    return Table(["", *names] if len(names) > 1 else [], cells, is_facts=True)


def changed_settings(settings: Mapping[str, Any]) -> Table:
    """The settings that differ from their defaults, and those that have none."""
    rows = []
    for path, value in settings.items():
        default = default_of(path, settings)
        if default is REQUIRED or value != default:
            rows.append([path, setting(value), "\N{EN DASH}" if default is REQUIRED else setting(default)])
    return Table(["setting", "value", "default"], rows)


def settings_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """All settings, in the order of config.yaml."""
    return facts_table([[(path, setting(value)) for path, value in run.settings.items()] for run in runs], names)


def differing_settings(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The settings in which runs differ; a run that lacks one has a dash."""
    paths = list(dict.fromkeys(path for run in runs for path in run.settings))
    absent = object()
    rows = []
    for path in paths:
        values = [run.settings.get(path, absent) for run in runs]
        if any(value is absent or value != values[0] for value in values):
            rows.append([path, *("\N{EN DASH}" if value is absent else setting(value) for value in values)])
    return Table(["setting", *names], rows)


def group_table(run: Run) -> Table | None:
    """The newest KL and active units of each latent group."""
    newest = {}
    for name, table in run.history.groups.items():
        rows, _, means = table.table()
        newest[name] = {row: values[-1] for row, values in zip(rows, means, strict=True)}
    groups = sorted(newest["kl"] | newest["active_units"], key=group_order)
    if not groups:
        return None
    rows = [[group, number(newest["kl"].get(group)), number(newest["active_units"].get(group))] for group in groups]
    return Table(["group", "KL, nats", "active units"], rows, frozenset({1, 2}))


def environment_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """What the runs were trained with, as far as their folders say."""
    return facts_table([environment_of(run) for run in runs], names)


def environment_of(run: Run) -> list[tuple[str, str]]:
    """The facts of one run."""
    rows = [("last start", run.started)] if run.started else []
    for name, key in (("torch", "torch"), ("processes", "world_size"), ("run id", "run_id")):
        if isinstance(run.facts.get(key), str | int):
            rows.append((name, str(run.facts[key])[:200]))
    if run.checkpoints:
        rows.append(("checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints[-10:])))
    return [*rows, ("folder", str(run.folder)), ("last written", moment(run.changed))]


def describe_objective(run: Run, objective: Objective | None) -> str:
    """`ELBO, nats, test`; empty for a run without figures."""
    if objective is None:
        return ""
    return ", ".join(part for part in (objective.label, objective.unit, split_of(run, objective)) if part)


def comparison_table(runs: Sequence[Run]) -> list[dict[str, object]]:
    """A row for each run: state, progress, best and newest figures; the best of all is marked."""
    objectives = [objective_of(run) for run in runs]
    bests = [best_of(run, one) if one else None for run, one in zip(runs, objectives, strict=True)]
    rows = []
    kinds = [describe_objective(run, objective) for run, objective in zip(runs, objectives, strict=True)]
    for run, objective, best, kind in zip(runs, objectives, bests, kinds, strict=True):
        history, summary = run.history, summarize(run)
        rivals = [other[1] for other, one in zip(bests, kinds, strict=True) if other and one == kind]
        wins = best is not None and len(rivals) > 1 and best[1] == (max if objective.larger_is_better else min)(rivals)
        rows.append(
            {
                "summary": summary,
                "best": number(best[1]) if best else "\N{EN DASH}",
                "best_of": kind,
                "best_step": number(best[0]) if best else "\N{EN DASH}",
                "wins": wins,
                "kl": number(history.last("train/kl")),
                "speed": number(history.last("perf/images_per_second"), 3),
                "time": duration(history.seconds) if history.seconds else "\N{EN DASH}",
                "attempts": number(run.status.attempt) if run.status.attempt else "\N{EN DASH}",
            }
        )
    return rows

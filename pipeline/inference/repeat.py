"""An evaluation run again from its report, and its figures compared."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.distributed.runtime import Precision, Runtime
from pipeline.inference.announce import some_of
from pipeline.inference.evaluate_run import EvaluationRequest, describe, measure, prepare
from pipeline.inference.locations import is_hub, local_path
from pipeline.inference.metrics import METRICS, Options
from pipeline.inference.report import conditions, flattened, read_report, to_finite
from pipeline.inference.text import joined, printable
from pipeline.storage.checkpoint_folder import META

RELATIVE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 1e-2}
"""By precision: how far rounding may move a figure, relative to it or to 1."""
STANDARD_ERRORS = 4.0
"""How far other latent noise may move a figure."""
SAME = {
    "weights_sha256": "weights",
    "fingerprint": "data",
    "holdout": "data",
    "pixels_sha256": "pixels",
    "classifier_digest": "judge",
    "feature_weights_sha256": "feature network",
}
"""Entries of a report and of its `data` that a repetition must find again, and what they stand for."""
WHERE = {
    "weights": "MODEL",
    "data": "--data",
    "pixels": "--data",
    "judge": "--classifier",
    "feature network": "--feature-weights",
}


class Earlier(BaseModel):
    """The parts of a report that a repetition needs, with their types checked."""

    model_config = ConfigDict(strict=True, frozen=True)

    metrics: list[str] = Field(min_length=1)
    checkpoint: str
    step: int
    weights_sha256: str
    seed: int = Field(ge=0, lt=2**63)
    precision: Precision
    batch_size: int = Field(ge=1)
    images: int | None = Field(None, ge=0)
    split_images: int | None = Field(None, ge=1)
    classifier: str | None = None
    threads: int | None = Field(None, ge=1)
    data: dict[str, Any] | None = None
    code: dict[str, Any] = {}
    figures: dict[str, float | None]


class Difference(NamedTuple):
    """A figure before and now. NaN stands for a figure that is not finite."""

    name: str
    before: float
    now: float
    allowed: float
    """The largest difference that counts as agreement; infinite where the figures cannot be compared."""

    @property
    def is_compared(self) -> bool:
        return math.isfinite(self.allowed)

    @property
    def agrees(self) -> bool:
        both_undefined = math.isnan(self.before) and math.isnan(self.now)
        return both_undefined or self.before == self.now or abs(self.now - self.before) <= self.allowed


class Report(NamedTuple):
    """A report that was read for a repetition."""

    path: Path
    content: dict[str, Any]
    earlier: Earlier


def load_report(path: Path) -> Report:
    """Raises ValueError for a file that is not a report of an evaluation, or lacks what a repetition needs."""
    content = read_report(path)
    if isinstance(content, str):
        raise ValueError(f"--repeat {path}: cannot be read: {content}; give a file of RUN/evaluations")
    try:
        earlier = Earlier.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(printable(f"--repeat {path}: not a whole report: {place}: {first['msg']}")) from None
    unknown = [name for name in earlier.metrics if name not in METRICS]
    if unknown:
        raise ValueError(printable(f"--repeat {path}: this version has no metric {unknown[0]!r}"))
    return Report(path, content, earlier)


def request_of(
    report: Report, location: str | None, data: str | None, command: Sequence[str], **files: Path | None
) -> EvaluationRequest:
    """What the report measured. `location`, `data` and `files` (options of this name) are other places of the same
    things, where not None. Raises ValueError for a report that states no options, or whose model is not where it was.
    """
    earlier = report.earlier
    place = earlier.checkpoint if location is None else location
    if location is None and not is_hub(place) and not local_path(place).is_dir():
        raise ValueError(f"--repeat {report.path}: no checkpoint at {place}; name the model's place, too: MODEL")
    is_run = not is_hub(place) and not os.path.lexists(local_path(place) / META)
    return EvaluationRequest(
        location=place,
        checkpoint=str(earlier.step) if is_run else "latest",
        data=(earlier.data or {}).get("root") if data is None else data,
        metrics=earlier.metrics,
        options=options_of(report, files),
        batch_size=earlier.batch_size,
        out=None,
        command=command,
    )


def options_of(report: Report, files: Mapping[str, Path | None]) -> Options:
    """The options that the report states. Raises ValueError for values of another type."""
    content, earlier = report.content, report.earlier
    stated = {field.name: content[field.name] for field in fields(Options) if field.name in content}
    if earlier.data is not None:
        count = (earlier.images or 0) + int(earlier.figures.get("skipped_samples") or 0)
        limit = None if count == earlier.split_images else count
        stated |= {"split": earlier.data.get("split"), "images": limit}
    stated |= {name: path for name, path in files.items() if path is not None}
    try:
        return TypeAdapter(Options).validate_python(stated)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(printable(f"--repeat {report.path}: {first['loc'][0]}: {first['msg']}")) from None


def repeat(report: Report, request: EvaluationRequest, runtime: Runtime) -> bool:
    """Measures again, prints each figure before and now, and returns whether they agree: all that can be compared, and
    at least one. Writes nothing.

    Raises ValueError, before anything is measured, where weights, data or judge are not those of the report.
    """
    measurement = prepare(request, runtime)
    now = describe(request.metrics, measurement, request)
    runtime.run_on_all(lambda: check_same(report, now))
    figures = {}
    for name in dict.fromkeys(request.metrics):
        figures |= measure(name, measurement)
    changes = changed_conditions(report.content, now)
    differences = compare(report.content, now | {"figures": to_finite(figures)}, changes)
    if runtime.is_main:
        show(differences, changes)
    return all(difference.agrees for difference in differences) and any(each.is_compared for each in differences)


def check_same(report: Report, now: dict[str, Any]) -> None:
    """Raises ValueError that names what is not as in the report."""
    before, after = flattened(report.content), flattened(now)
    for name, what in SAME.items():
        if before.get(name) not in (None, after.get(name)):
            raise ValueError(
                printable(
                    f"--repeat {report.path}: {name} was {before[name]}, and is {after.get(name)} here: other {what}; "
                    f"name the place of the same ones with {WHERE[what]}"
                )
            )


def changed_conditions(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What may change the last digits of figures, with its value before and now."""
    earlier, here = conditions(before), conditions(now)
    return [f"{name} {str(was)[:20]}, now {str(here[name])[:20]}" for name, was in earlier.items() if was != here[name]]


def compare(before: dict[str, Any], now: dict[str, Any], changes: Sequence[str]) -> list[Difference]:
    """Of each figure of the report before: equal to the bit where no condition changed; else by rounding (RELATIVE).
    The noise of another kind of device differs: then figures are compared by their standard errors, and those without
    one are not compared.
    """
    old, new = before["figures"], now["figures"]
    other_noise = (before.get("device") == "CPU") != (now["device"] == "CPU")
    differences = []
    for name in old:
        was, is_now = (math.nan if one.get(name) is None else one[name] for one in (old, new))
        errors = [one.get(f"{name}_se") for one in (old, new)]
        if not changes or math.isnan(was) or math.isnan(is_now):
            allowed = 0.0
        elif other_noise:
            allowed = STANDARD_ERRORS * math.hypot(*errors) if None not in errors else math.inf
        else:
            allowed = RELATIVE[now["precision"]] * max(1.0, abs(was)) + name.startswith("active_units/")
        differences.append(Difference(name, was, is_now, allowed))
    return differences


def show(differences: Sequence[Difference], changes: Sequence[str]) -> None:
    """Prints a line for each figure, then which are not compared, and whether the others agree."""
    rows = [
        [name, f"{before:16.8f}", f"{now:16.8f}", f"{now - before:11.2e}", f"{allowed:9.1e}"]
        for name, before, now, allowed in differences
    ]
    print("\n".join(map(printable, joined([["", "before", "now", "difference", "allowed"], *rows]))))
    if changes:
        print(printable(f"not to the bit, since conditions changed: {'; '.join(changes)}"))
    skipped = [difference.name for difference in differences if not difference.is_compared]
    if skipped:
        print(f"not compared, since the latent noise is another and they have no standard error: {some_of(skipped)}")
    print(printable(conclusion(differences, len(skipped))))


def conclusion(differences: Sequence[Difference], num_skipped: int) -> str:
    """The last line."""
    disagreeing = [difference.name for difference in differences if not difference.agrees]
    if disagreeing:
        return f"these figures do not agree: {', '.join(disagreeing)}"
    if num_skipped == len(differences):
        return "no figure can be compared; repeat the report on the kind of device that it states"
    return "all other figures agree" if num_skipped else "all figures agree"

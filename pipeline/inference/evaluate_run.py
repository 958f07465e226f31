"""From a request of `evaluate.py` to its reports: which checkpoint, data and judge, what is measured, where it is
written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.remote import is_address
from pipeline.distributed.agreement import code_version
from pipeline.distributed.runtime import Runtime
from pipeline.inference.folders import check_split, check_writable, output_folder
from pipeline.inference.locations import find_model, results_folder
from pipeline.inference.metrics import METRICS, Measurement, Options, check_held_out, check_metrics, evaluation_recipe
from pipeline.inference.report import FOLDER, describe_measurement, save_in_run, save_report, table
from pipeline.inference.text import printable
from pipeline.inference.trained import load
from pipeline.run.classifier_folder import load_classifier
from pipeline.run.data import RunData

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, on what, and where to write it."""

    location: str
    """Of the model; see `locations`."""
    checkpoint: str
    """`latest`, `best`, a step, or a checkpoint's folder."""
    data: str | None
    """Shard set, a folder or an address; None: the one that the run was trained on."""
    metrics: Sequence[str]
    options: Options
    batch_size: int
    """Images in a pass over all processes."""
    out: Path | None
    """One file for all metrics; None: files in MODEL/evaluations."""
    command: Sequence[str]
    """The command line, for the report."""


def evaluate(request: EvaluationRequest, runtime: Runtime) -> None:
    """Measures, writes the reports and prints the figures."""
    # The main process chooses for all: a run that is being trained may write a newer checkpoint at any moment.
    chosen = runtime.run_on_main(lambda: find_model(request.location, request.checkpoint).place)
    place = runtime.from_main(chosen)
    measurement = prepare(request, place, runtime)
    facts = {"code": code_version()}
    if measurement.data is not None:
        facts["data"] = measurement.data.held_out.fingerprint
    runtime.check_agreement(facts)
    names, figures = list(dict.fromkeys(request.metrics)), {}
    for name in names:
        log.info("%s", printable(describe_question(name, measurement)))
        found = METRICS[name].measure(measurement)
        if request.out is None:
            save(request, measurement, [name], found)
        figures |= found
    if request.out is not None:
        save(request, measurement, names, figures)
    if runtime.is_main:
        print(table(figures))


def prepare(request: EvaluationRequest, place: str, runtime: Runtime) -> Measurement:
    """Loads the model, the judge and the data. Raises ValueError, on every rank, for what cannot be measured."""
    metrics = [METRICS[name] for name in request.metrics]
    reads_images = any(metric.reads_images for metric in metrics)

    def load_all() -> tuple:
        if request.out is None:
            check_writable(output_folder(results_folder(request.location), FOLDER))
        trained = load(place, device=runtime.device, dtype=runtime.dtype)
        options = request.options
        if options.seed is None:
            options = replace(options, seed=trained.recipe.train.seed)
        check_metrics(request.metrics, trained, options)
        judged = any("classifier" in metric.options for metric in metrics)
        judge = load_classifier(options.classifier) if judged else None
        recipe = evaluation_recipe(trained.recipe, request.data, options, request.batch_size)
        if reads_images and not is_address(recipe.data.root) and not recipe.data.holdout:
            check_split(recipe.data.root, options.split)
        return trained, options, judge, recipe

    trained, options, judge, recipe = runtime.run_on_all(load_all)
    data = RunData(recipe, runtime, progress=True) if reads_images else None
    if data is not None:
        check_held_out(trained, data)
    return Measurement(trained, runtime, options, data, judge)


def describe_question(name: str, measurement: Measurement) -> str:
    """One line that says what is measured."""
    trained, options, data = measurement.trained, measurement.options, measurement.data
    values = {option: getattr(options, option) for option in METRICS[name].options}
    shown = [f"{option.replace('_', ' ')} {value}" for option, value in values.items() if value is not None]
    where = f" on {data.recipe.data.root}" if METRICS[name].reads_images else ""
    return f"{name} of {trained.recipe.model.name} at step {trained.step}{where}: {', '.join(shown)}"


def save(request: EvaluationRequest, measurement: Measurement, names: list[str], figures: dict[str, float]) -> None:
    """Writes the report of these metrics, on the main process, to `--out` or into MODEL/evaluations."""

    def write() -> Path:
        report = describe_measurement(names, measurement, figures, request.batch_size, request.command)
        if request.out is None:
            return save_in_run(results_folder(request.location), report, measurement.trained.recipe.train.seed)
        save_report(request.out, report)
        return request.out

    path = measurement.runtime.run_on_main(write)
    if measurement.runtime.is_main:
        log.info("written to %s", path)

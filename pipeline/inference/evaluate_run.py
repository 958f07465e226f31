"""From a request of `evaluate.py` to its reports: which checkpoint, data and judge, what is measured, where it is
written."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.remote import is_address
from pipeline.distributed.agreement import code_version
from pipeline.distributed.logs import log_lines
from pipeline.distributed.runtime import Runtime
from pipeline.inference import announce
from pipeline.inference.feature_weights import load_feature_network
from pipeline.inference.folders import check_at_hand, check_split, check_writable, output_folder
from pipeline.inference.load_model import load
from pipeline.inference.locations import find_model, results_folder
from pipeline.inference.metrics import (
    METRICS,
    Measurement,
    Options,
    check_binarizations,
    check_held_out,
    check_metrics,
    evaluation_recipe,
)
from pipeline.inference.report import (
    FOLDER,
    conditions,
    describe_measurement,
    file_stem,
    question,
    save_in_run,
    save_report,
    to_finite,
)
from pipeline.inference.sample_metrics import SampleSets
from pipeline.inference.text import figure_lines, printable
from pipeline.inference.trained import TrainedModel
from pipeline.models.classifier import Classifier
from pipeline.recipe import Recipe
from pipeline.run.classifier_folder import load_classifier
from pipeline.run.data import RunData
from pipeline.storage.evaluation_journal import EvaluationJournal

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
    more_temperatures: Sequence[float] = ()
    """At which the metrics of samples are measured, too, after `options.temperature`."""


def evaluate(request: EvaluationRequest, runtime: Runtime) -> list[Path]:
    """Measures, writes the reports and prints the figures. Returns the reports' files, on the main process."""
    if request.out is None:
        runtime.run_on_all(lambda: check_writable(output_folder(results_folder(request.location), FOLDER)))
    measurement = prepare(request, runtime)
    log_lines(first_lines(request, measurement))
    names = list(dict.fromkeys(request.metrics))
    with journals(names, measurement, request) as journal_of:
        figures, files = measure_all(names, measurement, request, journal_of)
    if runtime.is_main:
        print_figures(figures)
    of_samples = [name for name in names if "temperature" in METRICS[name].options]
    for temperature in request.more_temperatures if of_samples else ():
        measurement = at_temperature(measurement, temperature)
        figures, more = measure_all(of_samples, measurement, request, {})
        files += more
        if runtime.is_main:
            print(f"\ntemperature {temperature:g}")
            print_figures(figures)
    return files


def print_figures(figures: Mapping[str, float]) -> None:
    print("\n".join(figure_lines(figures)))


def measure_all(
    names: list[str], measurement: Measurement, request: EvaluationRequest, journal_of: Mapping[str, EvaluationJournal]
) -> tuple[dict[str, float], list[Path]]:
    """The figures of these metrics, and the files of their reports."""
    figures, files = {}, []
    for name in names:
        found = measure(name, measurement._replace(journal=journal_of.get(name)))
        if request.out is None:
            files.append(save(request, measurement, [name], found))
        figures |= found
    if request.out is not None:
        files.append(save(request, measurement, names, figures))
    return figures, files


def at_temperature(measurement: Measurement, temperature: float) -> Measurement:
    """The measurement of samples at another temperature."""
    options = replace(measurement.options, temperature=temperature)
    return measurement._replace(options=options, sets=measurement.sets and measurement.sets.at(options))


@contextmanager
def journals(
    names: Sequence[str], measurement: Measurement, request: EvaluationRequest
) -> Iterator[dict[str, EvaluationJournal]]:
    """By the names of the metrics that resume: where each keeps its results until all reports are written.

    Raises ValueError, on every rank, for the journal of an evaluation under other conditions.
    """
    runtime, opened = measurement.runtime, {}
    for name in names:
        if METRICS[name].resumes:
            report = describe([name], measurement, request)
            path = request.out or (
                output_folder(results_folder(request.location), FOLDER)
                / file_stem(report, measurement.trained.recipe.train.seed)
            )
            depends_on = question(report) | conditions(report)
            opened[name] = runtime.run_on_all(
                lambda path=path, depends_on=depends_on: open_journal(path, depends_on, runtime.rank)
            )
    complete = False
    try:
        yield opened
        complete = True
    finally:
        for journal in opened.values():
            journal.close(delete=complete)


def open_journal(path: Path, depends_on: dict[str, Any], rank: int) -> EvaluationJournal:
    """This rank's. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = EvaluationJournal(path, depends_on, rank)
    if journal.records:
        log.info("%s: resumes; %d batches of this process were measured before", journal.path, len(journal.records))
    return journal


def measure(name: str, measurement: Measurement) -> dict[str, float]:
    """The figures of one metric, the same on every rank."""
    log.info("%s", printable(describe_question(name, measurement)))
    return METRICS[name].measure(measurement)


def prepare(request: EvaluationRequest, runtime: Runtime) -> Measurement:
    """Loads the model, the judge, the feature network and the data, the same on every rank. Raises ValueError, on every
    rank, for what cannot be measured.
    """
    # The main process chooses for all: a run that is being trained may write a newer checkpoint at any moment.
    chosen = runtime.run_on_main(lambda: find_model(request.location, request.checkpoint).place)
    place = runtime.from_main(chosen)
    trained, options, judge, recipe = runtime.run_on_all(lambda: load_all(request, place, runtime))
    reads_images = any(METRICS[name].reads_images for name in request.metrics)
    data = RunData(recipe, runtime, progress=True) if reads_images else None
    facts = {"code": code_version()}
    if data is not None:
        check_held_out(trained, data)
        facts["data"] = data.held_out.fingerprint
    runtime.check_agreement(facts)
    sets = None
    if any(METRICS[name].uses_samples for name in request.metrics):
        network = runtime.run_on_all(
            lambda: load_feature_network(options.feature_weights, runtime.device, runtime.dtype),
            "fetching the weights of the feature network",
        )
        sets = SampleSets(trained, runtime, options, data, network, request.metrics)
    return Measurement(trained, runtime, options, data, judge, sets)


def load_all(
    request: EvaluationRequest, place: str, runtime: Runtime
) -> tuple[TrainedModel, Options, Classifier | None, Recipe]:
    """The model at `place`, the options with the model's defaults, the judge, and the recipe that describes the data.
    Raises ValueError for what cannot be measured.
    """
    trained = load(place, device=runtime.device, dtype=runtime.dtype)
    options = request.options
    if options.seed is None:
        options = replace(options, seed=trained.recipe.train.seed)
    check_metrics(request.metrics, trained, options)
    metrics = [METRICS[name] for name in request.metrics]
    judged = any("classifier" in metric.options for metric in metrics)
    judge = load_classifier(options.classifier) if judged else None
    reads_images = any(metric.reads_images for metric in metrics)
    if reads_images and request.data is None:
        check_at_hand(trained.recipe.data.root)
    recipe = evaluation_recipe(trained, request.data, options, request.batch_size)
    check_binarizations(options, recipe)
    if reads_images and not is_address(recipe.data.root) and not recipe.data.holdout:
        check_split(recipe.data.root, options.split)
    return trained, options, judge, recipe


def describe_question(name: str, measurement: Measurement) -> str:
    """One line that says what is measured."""
    trained, options, data = measurement.trained, measurement.options, measurement.data
    used = [option for option in METRICS[name].options if option != "readjust" or options.readjust]
    values = {option: getattr(options, option) for option in used}
    shown = [f"{option.replace('_', ' ')} {value}" for option, value in values.items() if value is not None]
    where = f" on {data.recipe.data.root}{describe_binarization(data.recipe)}" if METRICS[name].reads_images else ""
    return f"{name} of {trained.recipe.model.name} at step {trained.step}{where}: {', '.join(shown)}"


def describe_binarization(recipe: Recipe) -> str:
    """Of the images, where they are binarized."""
    words = {"dynamic": f" (binarized at random, seed {recipe.train.seed})", "fixed": " (binarized, fixed)", "none": ""}
    return words[recipe.data.binarize]


def describe(names: Sequence[str], measurement: Measurement, request: EvaluationRequest) -> dict[str, Any]:
    """The report of these metrics before they are measured, as the main process describes it, on every rank."""

    def describe_here() -> dict[str, Any]:
        return to_finite(describe_measurement(names, measurement, {}, request.batch_size, request.command))

    return measurement.runtime.from_main(measurement.runtime.run_on_main(describe_here, "reading the images"))


def first_lines(request: EvaluationRequest, measurement: Measurement) -> list[str]:
    """What is measured, where it is written, and what a kill costs."""
    trained, data = measurement.trained, measurement.data
    images = ""
    if data is not None:
        count = min(data.recipe.validation.images or len(data.held_out), len(data.held_out))
        images = f"{data.recipe.data.root}, split {data.held_out.split}: {count:,} of {len(data.held_out):,} images"
    resumes = any(METRICS[name].resumes for name in request.metrics)
    return announce.first_lines(
        "evaluation",
        trained.recipe.model.name,
        trained.step,
        measurement.runtime.describe(),
        {
            "model": announce.weights_of(trained.place, trained.averaged),
            "data": printable(images),
            "metrics": ", ".join(dict.fromkeys(request.metrics)),
            "writes": str(request.out or output_folder(results_folder(request.location), FOLDER)),
            "stop": "Ctrl-C; the same command measures only what is missing" if resumes else "Ctrl-C",
        },
    )


def save(request: EvaluationRequest, measurement: Measurement, names: list[str], figures: dict[str, float]) -> Path:
    """Writes the report of these metrics, on the main process, to `--out` or into MODEL/evaluations. Returns its path
    there.
    """

    def write() -> Path:
        report = describe_measurement(names, measurement, figures, request.batch_size, request.command)
        if request.out is None:
            return save_in_run(results_folder(request.location), report, measurement.trained.recipe.train.seed)
        save_report(request.out, report)
        return request.out

    path = measurement.runtime.run_on_main(write)
    if measurement.runtime.is_main:
        log.info("written to %s", path)
    return path

"""The metrics of evaluate.py. A new one is a function here, which calls the computation, and an entry in METRICS."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import build
from pipeline.data.holdout import SPLIT as HELD_OUT
from pipeline.data.loader import is_binarized
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.class_recognition import recognition
from pipeline.evaluation.edit_metric import edit_figures, held_out_faces, hidden_by
from pipeline.evaluation.likelihood_bounds import Evaluator, Journal
from pipeline.inference.folders import load_manifest
from pipeline.inference.held_out_batches import HeldOutBatches
from pipeline.inference.readjust import check_batch_norm
from pipeline.inference.sample_metrics import SampleOptions, SampleSets, sampled_model
from pipeline.inference.trained import TrainedModel
from pipeline.models.classifier import Classifier
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.recipe import Recipe
from pipeline.run.data import RunData
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")

HEADLINES = ("elbo", "bpd", "nll", "bpd_nll", "log_px", "kl")
ERRORS = ("_se", "_binarization_se")
"""Standard errors of the first four."""


@dataclass(frozen=True)
class Options(SampleOptions):
    """What the user chose. A metric depends on `seed` and on those that its entry in METRICS names."""

    split: str = "test"
    images: int | None = None
    """Only so many images of the split; None: all."""
    images_seed: int | None = None
    """The images are chosen at random with this seed; None: the first ones."""
    importance_samples: int = 0
    binarizations: int = 1
    """Of the images at random, over which figures are means."""
    per_class: int = 1000
    """Samples of each class."""
    classifier: Path | None = None
    """Folder of the judge."""


class Measurement(NamedTuple):
    """What a metric is computed from."""

    trained: TrainedModel
    runtime: Runtime
    options: Options
    data: RunData | None
    """The split; None where no metric of the command reads images."""
    judge: Classifier | None
    sets: SampleSets | None = None
    """Features of samples and of real images; None where no metric of the command uses them."""
    journal: Journal | None = None
    """Where a metric that `resumes` keeps the results of its batches."""


class Metric(NamedTuple):
    """One choice of `--metrics`."""

    measure: Callable[[Measurement], dict[str, float]]
    """The figures, the same on every rank."""
    options: tuple[str, ...]
    """The fields of `Options`, beside `seed`, that change the figures."""
    condition: type[ClassCondition] | type[AttributeCondition] | None = None
    """What the model must have been trained with."""
    resumes: bool = False
    """Whether an interrupted measurement continues from its journal."""

    @property
    def reads_images(self) -> bool:
        return "split" in self.options

    @property
    def uses_samples(self) -> bool:
        """Whether it compares features of samples with those of real images."""
        return "samples" in self.options


def bound_figures(measurement: Measurement) -> dict[str, float]:
    """`elbo`, `log_px`, `kl`, `nll` in nats per image, `bpd` and `bpd_nll` in bits per dimension, and for each group
    `kl/GROUP` in nats and `active_units/GROUP`: means over the split, the same for any number of processes. `elbo_se`
    and so on are standard errors of the mean over images, `elbo_binarization_se` and so on over binarizations.

    With the seed that the model was trained with, `elbo` is the `val/elbo` of training.
    """
    trained, data = measurement.trained, measurement.data
    evaluator = Evaluator(
        data.recipe.validation,
        data,
        measurement.runtime,
        measurement.options.seed,
        detailed=True,
        binarizations=measurement.options.binarizations,
        journal=measurement.journal,
    )
    figures = {name.removeprefix("val/"): value for name, value in evaluator.run(trained.model, trained.step).items()}
    main = [f"{name}{ending}" for name in HEADLINES for ending in ("", *ERRORS)]
    return {name: figures[name] for name in dict.fromkeys((*main, *figures)) if name in figures}


def edit_measurement(measurement: Measurement) -> dict[str, float]:
    """See pipeline.evaluation.edit_metric.edit_figures."""
    trained, data, judge, runtime = measurement.trained, measurement.data, measurement.judge, measurement.runtime
    batches = HeldOutBatches(data)
    figures = edit_figures(
        trained.model,
        trained.recipe.condition,
        held_out_faces(batches, data.held_out, data.model_inputs, judge),
        judge,
        measurement.options.seed,
        hidden_by(data.held_out, judge),
        sum_after_barrier(runtime),
        runtime.autocast,
    )
    num_skipped = batches.report(trained.step)
    return figures | ({"skipped_samples": float(num_skipped)} if num_skipped else {})


def recognition_measurement(measurement: Measurement) -> dict[str, float]:
    """See pipeline.evaluation.class_recognition."""
    options, runtime, judge = measurement.options, measurement.runtime, measurement.judge
    ranks = runtime.rank, runtime.world_size, sum_after_barrier(runtime)
    trained, classes = measurement.trained, torch.eye(measurement.trained.model.condition_size)

    def condition_of(numbers: Tensor) -> Tensor:
        return classes[numbers // options.per_class].to(trained.device, trained.dtype)

    def shown(passes: Sequence[Tensor]) -> Iterable[Tensor]:
        return with_progress(passes, Progress("samples", len(passes), "batches", write=log.info, shown=runtime.is_main))

    with runtime.autocast():
        model = sampled_model(trained, options, len(classes) * options.per_class, condition_of)
    how = options.per_class, options.temperature, options.seed
    return recognition(model, judge, *how, *ranks, shown, runtime.autocast)


IMAGES = ("split", "images", "images_seed")
SAMPLES = (*IMAGES, "samples", "temperature", "readjust", "decoder", "rounding", "resize")
SUBSETS = ("kid_subsets", "kid_subset_size")
METRICS = {
    "elbo": Metric(bound_figures, (*IMAGES, "importance_samples", "binarizations"), resumes=True),
    "edit": Metric(edit_measurement, (*IMAGES, "classifier"), AttributeCondition),
    "recognition": Metric(
        recognition_measurement, ("per_class", "temperature", "readjust", "classifier"), ClassCondition
    ),
    "fid": Metric(lambda measurement: measurement.sets.frechet(), SAMPLES),
    "kid": Metric(lambda measurement: measurement.sets.kernel(), (*SAMPLES, *SUBSETS)),
    "precision_recall": Metric(lambda measurement: measurement.sets.precision_recall(), SAMPLES),
}
"""By the names that `--metrics` takes."""

TRAINED_WITH = {AttributeCondition: "attributes", ClassCondition: "classes"}


def check_metrics(names: Sequence[str], trained: TrainedModel, options: Options) -> None:
    """Raises ValueError for metrics and options that do not apply to the model, and for a judge that is missing."""
    for name in names:
        metric = METRICS[name]
        if metric.condition and not isinstance(trained.recipe.condition, metric.condition):
            raise ValueError(
                f"--metrics {name}: the model was not trained with {TRAINED_WITH[metric.condition]}; "
                f"choose from {', '.join(applicable_metrics(trained))}"
            )
        if "classifier" in metric.options and options.classifier is None:
            raise ValueError(f"--metrics {name}: needs a judge: --classifier FOLDER, made by train_classifier.py")
    if options.readjust:
        of_samples = [name for name, metric in METRICS.items() if "readjust" in metric.options]
        if not {*names} & {*of_samples}:
            listed = " ".join(of_samples)
            raise ValueError(f"--readjust {options.readjust}: is for samples; add one of --metrics {listed}")
        check_batch_norm(trained.model, trained.recipe)


def applicable_metrics(trained: TrainedModel) -> list[str]:
    """The metrics that a model has."""
    condition = trained.recipe.condition
    return [name for name, metric in METRICS.items() if not metric.condition or isinstance(condition, metric.condition)]


def evaluation_recipe(trained: TrainedModel, root: str | None, options: Options, batch_size: int = 100) -> Recipe:
    """The recipe of a run with one split as its data, of its own shard set where `root` is None, or the place of a copy
    of it. For a run with `data.holdout`, `val` is the held-out images, and the training split is without them. Another
    set may have a `val` of its own. Of a set that is binarized already, the images are measured as they are
    (`data.binarize=fixed`), also by a model that was trained on dynamic binarizations.

    Raises ConfigError for numbers out of range.
    """
    recipe, facts = trained.recipe, trained.facts
    settings = recipe.model_dump(mode="json")
    own_set = root in (None, recipe.data.root) or load_manifest(root)["fingerprint"] == facts.get("data_fingerprint")
    root = recipe.data.root if root is None else root
    settings["data"] |= {"root": root, "train_split": options.split}
    if recipe.data.holdout and options.split == HELD_OUT and (own_set or HELD_OUT not in load_manifest(root)["splits"]):
        settings["data"]["train_split"] = recipe.data.train_split
    elif options.split != recipe.data.train_split or not own_set:
        settings["data"]["holdout"] = 0
    if not own_set and recipe.data.binarize == "dynamic" and is_binarized(load_manifest(root)):
        settings["data"]["binarize"] = "fixed"
        log.info("%s is binarized already: measured as it is (fixed), not by dynamic binarization", root)
    settings["validation"] |= {
        "split": options.split,
        "images": options.images,
        "images_seed": options.images_seed,
        "batch_size": batch_size,
        "importance_samples": options.importance_samples,
    }
    return build(Recipe, settings)


def check_binarizations(options: Options, recipe: Recipe) -> None:
    """Raises ValueError for several binarizations of images that are not binarized at random."""
    if options.binarizations > 1 and recipe.data.binarize != "dynamic":
        raise ValueError(
            f"--binarizations {options.binarizations}: the images of {recipe.data.root} are not binarized at random "
            f"(data.binarize is {recipe.data.binarize}); omit the option"
        )


def check_held_out(trained: TrainedModel, data: RunData) -> None:
    """Raises ValueError where `val` are not the images that were held out of the model's training."""
    if data.holdout is not None and data.holdout != trained.facts.get("holdout"):
        raise ValueError(
            f"--split {data.held_out.split}: the run's validation images are a share of the set that it was trained on "
            f"(data.holdout), and {data.recipe.data.root} is another set; give that set with --data, or another --split"
        )


def sum_after_barrier(runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """The sum over ranks that may finish minutes apart: they wait without a timeout."""

    def total(values: Tensor) -> Tensor:
        runtime.barrier()
        return runtime.sum(values)

    return total

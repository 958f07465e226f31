"""What evaluate.py measures of a trained model on a split of a shard set, and the JSON that tells it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import build
from pipeline.data.holdout import SPLIT as HELD_OUT
from pipeline.distributed.agreement import code_version
from pipeline.distributed.runtime import Runtime
from pipeline.evaluation.class_recognition import recognition
from pipeline.evaluation.edit_metric import edit_figures, held_out_faces, hidden_by
from pipeline.evaluation.likelihood_bounds import Evaluator
from pipeline.inference.trained import TrainedModel
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.recipe import Recipe
from pipeline.run.classifier_folder import load_classifier
from pipeline.run.data import RunData
from pipeline.storage.atomic import replacing

HEADLINES = ("elbo", "bpd", "nll", "bpd_nll", "log_px", "kl")


def evaluation_recipe(
    recipe: Recipe,
    root: str | None,
    split: str,
    images: int | None = None,
    batch_size: int = 100,
    importance_samples: int = 0,
) -> Recipe:
    """The recipe of a run whose data are this split alone, of its own shard set where `root` is None. Of a run with
    `data.holdout`, `val` are the held-out images, and its training split is without them.

    Raises ConfigError for numbers that make no sense.
    """
    settings = recipe.model_dump(mode="json")
    root = recipe.data.root if root is None else root
    settings["data"] |= {"root": root, "train_split": split}
    if recipe.data.holdout and split == HELD_OUT:
        settings["data"]["train_split"] = recipe.data.train_split
    elif split != recipe.data.train_split or root != recipe.data.root:
        settings["data"]["holdout"] = 0
    settings["validation"] |= {
        "split": split,
        "images": images,
        "batch_size": batch_size,
        "importance_samples": importance_samples,
    }
    return build(Recipe, settings)


def check_held_out(trained: TrainedModel, data: RunData) -> None:
    """Raises ValueError where `val` are not the images that were held out of the model's training."""
    if data.holdout is not None and data.holdout != trained.facts.get("holdout"):
        raise ValueError(
            f"--split {data.held_out.split}: the run's validation images are a share of the set that it was trained on "
            f"(data.holdout), and {data.recipe.data.root} is another set; give that set with --data, or another --split"
        )


def check_metrics(metrics: Sequence[str], trained: TrainedModel, classifier: Path | None) -> None:
    """Raises ValueError for metrics that a model does not have, or that need a judge where there is none."""
    condition = trained.recipe.condition
    if "edit" in metrics and not isinstance(condition, AttributeCondition):
        raise ValueError("--metrics edit: the model was not trained with attributes, so there is nothing to edit by")
    if "recognition" in metrics and not isinstance(condition, ClassCondition):
        raise ValueError("--metrics recognition: the model was not trained with classes, so it can be asked for none")
    if classifier is None and set(metrics) - {"elbo"}:
        raise ValueError("--metrics edit and recognition need a judge: --classifier FOLDER, of train_classifier.py")


def bound_figures(trained: TrainedModel, data: RunData, runtime: Runtime, seed: int) -> dict[str, float]:
    """`elbo`, `log_px`, `kl`, `nll` in nats per image, `bpd` and `bpd_nll` in bits per dimension, and for each group
    `kl/GROUP` in nats and `active_units/GROUP`: means over the split, the same for any number of processes.

    With the seed that the model was trained with, `elbo` is `val/elbo` of the training's validation.
    """
    evaluator = Evaluator(data.recipe.validation, data, runtime, seed, by_group=True, wait_for_ranks=True)
    figures = {name.removeprefix("val/"): value for name, value in evaluator.run(trained.model, trained.step).items()}
    groups = [group.name for group in trained.model.groups]
    order = [f"{kind}/{group}" for kind in ("kl", "active_units") for group in groups]
    return {name: figures[name] for name in (*HEADLINES, *order, "skipped_samples") if name in figures}


def edit_measurement(
    trained: TrainedModel, data: RunData, runtime: Runtime, classifier: Path, seed: int
) -> dict[str, float]:
    """See pipeline.evaluation.edit_metric.edit_figures."""
    judge = runtime.run_on_all(lambda: load_classifier(classifier))
    return edit_figures(
        trained.model,
        trained.recipe.condition,
        held_out_faces(data.held_out_batches(), data.held_out, data.model_inputs, judge),
        judge,
        seed,
        hidden_by(data.held_out, judge),
        sum_after_barrier(runtime),
    )


def recognition_measurement(
    trained: TrainedModel, runtime: Runtime, classifier: Path, per_class: int, temperature: float, seed: int
) -> dict[str, float]:
    """See pipeline.evaluation.class_recognition."""
    judge = runtime.run_on_all(lambda: load_classifier(classifier))
    place = runtime.rank, runtime.world_size, sum_after_barrier(runtime)
    return recognition(trained.model, judge, per_class, temperature, seed, *place)


def sum_after_barrier(runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """The sum over ranks that may finish minutes apart: they wait for each other without a timeout."""

    def total(values: Tensor) -> Tensor:
        runtime.barrier()
        return runtime.sum(values)

    return total


def describe_measurement(
    trained: TrainedModel, data: RunData, runtime: Runtime, seed: int, figures: dict[str, Any]
) -> dict[str, Any]:
    """The figures with everything that they depend on."""
    recipe, shards = data.recipe, data.held_out
    likelihood = getattr(recipe.model, "likelihood", None)
    skipped = int(figures.get("skipped_samples", 0))
    return {
        "model": recipe.model.name,
        "checkpoint": str(trained.path),
        "step": trained.step,
        "averaged_weights": trained.averaged,
        "data": {
            "root": recipe.data.root,
            "split": shards.split,
            "fingerprint": shards.fingerprint,
            "holdout": data.holdout,
            "trained_on_fingerprint": trained.facts.get("data_fingerprint"),
            "binarize": recipe.data.binarize,
            "bits": recipe.data.bits,
        },
        "images": min(recipe.validation.images or len(shards), len(shards)) - skipped,
        "num_dimensions": trained.model.num_dimensions,
        "groups": {group.name: group.shape for group in trained.model.groups},
        "likelihood": None if likelihood is None else likelihood.name,
        "bin_rule": getattr(likelihood, "bin_rule", None),
        "condition": recipe.condition and recipe.condition.model_dump(mode="json"),
        "importance_samples": recipe.validation.importance_samples,
        "seed": seed,
        "precision": runtime.precision,
        "code": {"version": code_version(), "torch": torch.__version__},
        "figures": figures,
    }


def report_path(run: Path, split: str, step: int, metrics: Sequence[str] = ("elbo",)) -> Path:
    """Where the report of a run's checkpoint lies unless the user says otherwise."""
    other = "" if list(metrics) == ["elbo"] else f"_{'_'.join(metrics)}"
    return run / f"evaluation_{split}_step_{step:08d}{other}.json"


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all. Figures that are no finite number become null."""
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
    with replacing(path) as file:
        file.write((json.dumps(finite, indent=1, allow_nan=False) + "\n").encode())


def table(figures: dict[str, Any]) -> str:
    """The figures as lines for people."""
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {value:12.4f}" for name, value in figures.items())

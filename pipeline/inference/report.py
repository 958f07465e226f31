"""Evaluations as JSON files in RUN/evaluations: one for each distinct question, with all that its figures depend on."""

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from pipeline.inference.code_facts import code_facts
from pipeline.inference.feature_weights import INCEPTION
from pipeline.inference.folders import output_folder
from pipeline.inference.metrics import METRICS, Measurement, Options
from pipeline.inference.sample_metrics import SampleOptions
from pipeline.inference.text import printable
from pipeline.run.classifier_folder import classifier_digest
from pipeline.storage.atomic import atomic_file
from shard_data.files import read_bounded

log = logging.getLogger("pipeline")

FOLDER = "evaluations"
FORMER = "evaluation_*.json"
"""Reports of earlier versions, in the run folder itself."""
UNFINISHED = "*.rank0.unfinished"
"""Journals; see `EvaluationJournal`."""
MAX_BYTES = 4 * 2**20
QUESTION = (
    "metrics", "step", "weights_sha256", "split", "images", "images_seed", "split_images", "fingerprint", "holdout",
    "importance_samples", "binarize", "binarizations", "per_class", "temperature", "readjust", "classifier_digest",
    "seed", "precision",
    "samples", "decoder", "rounding", "resize", "kid_subsets", "kid_subset_size", "feature_weights_sha256",
)  # fmt: skip
"""The entries of a report, and of its `data`, that say what was measured: equal ones are one question."""
CONDITIONS = ("device", "batch_size", "num_processes", "threads", "version", "torch", "numpy")
"""Entries of a report, and of its `code`, beside the question: where these are equal, too, figures are, to the bit."""
MAX_SHOWN = 6


def describe_measurement(
    names: Sequence[str], measurement: Measurement, figures: dict[str, Any], batch_size: int, command: Sequence[str]
) -> dict[str, Any]:
    """The figures of these metrics with everything that they depend on, as JSON values."""
    trained, runtime, options = measurement.trained, measurement.runtime, measurement.options
    used = {option for name in names for option in METRICS[name].options}
    likelihood = getattr(trained.recipe.model, "likelihood", None)
    report = {
        "format": "nvae-pipeline-evaluation",
        "version": 1,
        "metrics": list(names),
        "model": trained.recipe.model.name,
        "checkpoint": trained.place,
        "step": trained.step,
        "averaged_weights": trained.averaged,
        "weights_sha256": trained.weights_sha256,
        "num_dimensions": trained.model.num_dimensions,
        "groups": {group.name: group.shape for group in trained.model.groups},
        "likelihood": None if likelihood is None else likelihood.name,
        "bin_rule": getattr(likelihood, "bin_rule", None),
        "condition": trained.recipe.condition and trained.recipe.condition.model_dump(mode="json"),
    }
    if "split" in used:
        report |= describe_data(measurement, used, int(figures.get("skipped_samples", 0)))
    if "classifier" in used:
        digest = f"{classifier_digest(options.classifier):016x}"
        report |= {"classifier": str(options.classifier), "classifier_digest": digest}
    if "samples" in used:
        report |= {"feature_network": "Inception-v3 of 2015-12-05", "feature_weights_sha256": INCEPTION.sha256}
    described = {"split", "images", "images_seed", "classifier"}
    report |= {name: getattr(options, name) for name in option_names() if name in used - described}
    return report | {
        "seed": options.seed,
        "precision": runtime.precision,
        "batch_size": batch_size,
        "device": runtime.device_name,
        "num_processes": runtime.world_size,
        "threads": torch.get_num_threads(),
        "command": list(command),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_facts(),
        "figures": figures,
    }


def option_names() -> list[str]:
    """The fields of Options. A report holds those that its metrics use under their own names."""
    return [field.name for field in fields(Options)]


def describe_data(measurement: Measurement, used: set[str], skipped: int) -> dict[str, Any]:
    """The split, and how many images of it were measured. `used`: the options of the metrics."""
    binarizations = measurement.options.binarizations if "binarizations" in used else 1
    recipe, shards, size = measurement.data.recipe, measurement.data.held_out, measurement.data.split_size
    count = min(recipe.validation.images or size, size)
    return {
        "data": {
            "root": recipe.data.root,
            "split": shards.split,
            "fingerprint": shards.fingerprint,
            "holdout": measurement.data.holdout,
            "trained_on_fingerprint": measurement.trained.facts.get("data_fingerprint"),
            "name": shards.manifest["name"],
            "transform": shards.manifest["transform"],
            "binarize": recipe.data.binarize,
            "binarization_seed": recipe.train.seed if recipe.data.binarize == "dynamic" else None,
            "bits": recipe.data.bits,
            "pixels_sha256": measurement.data.held_out_sha256(binarizations),
        },
        "split_images": size,
        "images": count - skipped,
        "images_seed": recipe.validation.images_seed if count < size else None,
    }


def file_stem(report: dict[str, Any], training_seed: int) -> str:
    """The name of a report's file: metric, split and step, and what differs from the defaults."""
    data, figures = report.get("data"), report["figures"]
    words = [*report["metrics"], *([data["split"]] if data else []), f"step_{report['step']:08d}"]
    if report.get("importance_samples"):
        words.append(f"importance_{report['importance_samples']}")
    if report.get("binarizations", 1) > 1:
        words.append(f"binarizations_{report['binarizations']}")
    if data and report["images"] + int(figures.get("skipped_samples", 0)) < report["split_images"]:
        words.append(f"images_{report['images']}")
        words += [] if report["images_seed"] is None else [f"images_seed_{report['images_seed']}"]
    if "per_class" in report:
        words.append(f"per_class_{report['per_class']}_temperature_{report['temperature']:g}")
    if "samples" in report:
        words += sample_words(report)
    if report.get("readjust"):
        words.append(f"readjust_{report['readjust']}")
    if "classifier_digest" in report:
        words.append(f"classifier_{report['classifier_digest'][:8]}")
    if data and data["fingerprint"] != data["trained_on_fingerprint"]:
        words.append(f"data_{data['fingerprint'][:8]}")
    if report["seed"] != training_seed:
        words.append(f"seed_{report['seed']}")
    if report["precision"] != "fp32":
        words.append(report["precision"])
    return re.sub(r"[^\w.-]", "_", "_".join(words))[:200]


def sample_words(report: dict[str, Any]) -> list[str]:
    """The number of samples, and what differs from the default protocol."""
    words = [f"samples_{report['samples']}"]
    if report["temperature"] != SampleOptions.temperature:
        words.append(f"temperature_{report['temperature']:g}")
    changed = [name for name in ("decoder", "rounding", "resize") if report[name] != getattr(SampleOptions, name)]
    return words + [f"{name}_{report[name]}" for name in changed]


def question(report: dict[str, Any]) -> dict[str, Any]:
    """What was measured, without what came out."""
    flat = {"readjust": 0} | flattened(report)  # which reports of earlier versions do not state
    return {name: flat.get(name) for name in QUESTION}


def conditions(report: dict[str, Any]) -> dict[str, Any]:
    """Under which conditions it was computed."""
    flat = flattened(report)
    return {"code" if name == "version" else name: flat.get(name) for name in CONDITIONS}


def flattened(report: dict[str, Any]) -> dict[str, Any]:
    """A report with the entries of its `data` and `code` among its own."""
    parts = [report.get(name) for name in ("data", "code")]
    return report | {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def save_in_run(run: Path, report: dict[str, Any], training_seed: int) -> Path:
    """Writes a report into RUN/evaluations under a name of its own, and returns its path.

    An earlier report of the same question is replaced, and the log says so. Other files are kept: the new name gets a
    number.
    """
    folder, stem, replaced = output_folder(run, FOLDER), file_stem(report, training_seed), None
    for number in count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}_{number}.json")
        if not os.path.lexists(path):
            break
        earlier = read_report(path)
        if isinstance(earlier, dict) and question(earlier) == question(report):
            replaced = earlier
            break
    save_report(path, report)
    if replaced is not None:
        same = replaced["figures"] == to_finite(report)["figures"]
        held = "the same figures" if same else f"other figures: {headline(replaced)}"
        log.info("%s: replaced; it held the same evaluation, of %s, with %s", path, date_of(replaced), held)
    return path


def save_report(path: Path, report: dict[str, Any]) -> None:
    """Writes JSON, completely or not at all. Figures that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(to_finite(report), indent=1, allow_nan=False) + "\n").encode())


def to_finite(report: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON holds it: lists for tuples, null for numbers that are not finite."""
    return json.loads(json.dumps(report), parse_constant=lambda _: None)


def read_report(path: Path) -> dict[str, Any] | str:
    """A report, of this version or an earlier one; or, where it is none, why not."""
    try:
        report = json.loads(read_bounded(path, MAX_BYTES))
    except OSError as error:
        return error.strerror
    except (ValueError, RecursionError):
        return "not JSON"
    return report if isinstance(report, dict) and isinstance(report.get("figures"), dict) else "not an evaluation"


def list_reports(run: Path) -> list[str]:
    """A line for each evaluation in a folder, also an unfinished one: its file, and its main figures. Raises ValueError
    if the folder is not there.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder, so there are no evaluations of this model")
    files = sorted(run.glob(FORMER)) + sorted(output_folder(run, FOLDER).glob("*.json"))
    lines = []
    for path in files:
        report = read_report(path)
        text = f"cannot be read: {report}" if isinstance(report, str) else headline(report)
        lines.append(printable(f"{path.relative_to(run)}  {text}"))
    unfinished = sorted(output_folder(run, FOLDER).glob(UNFINISHED))
    return lines + [
        printable(f"{path.relative_to(run)}  unfinished: the same command resumes it") for path in unfinished
    ]


def reports_of(folder: Path, weights_sha256: str) -> dict[str, dict[str, Any]]:
    """The evaluations in a folder that are of exactly these weights, by the names of their files."""
    files = sorted(output_folder(folder, FOLDER).glob("*.json"))
    found = {path.name: read_report(path) for path in files}
    return {
        name: report
        for name, report in found.items()
        if isinstance(report, dict) and report.get("weights_sha256") == weights_sha256
    }


def headline(report: dict[str, Any]) -> str:
    """The main figures, those of the fewest slashes in their names, on one line, with their standard errors."""
    figures = {name: value for name, value in report["figures"].items() if isinstance(value, float)}
    depth = min((name.count("/") for name in figures if name != "skipped_samples"), default=0)
    main = {name: value for name, value in figures.items() if name.count("/") == depth and not name.endswith("_se")}
    errors = {name: f" (se {figures[f'{name}_se']:.4f})" for name in main if f"{name}_se" in figures}
    shown = [f"{printable(name)} {value:.4f}{errors.get(name, '')}" for name, value in main.items()]
    return "  ".join(shown[:MAX_SHOWN]) or "no figures"


def date_of(report: dict[str, Any]) -> str:
    """When it was written."""
    return printable(str(report.get("time"))[:25])

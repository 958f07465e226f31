"""From a run to a model folder with its card: what `export.py` does."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.config import build
from pipeline.data.remote import fetch_manifest, is_address
from pipeline.distributed.logs import log_lines
from pipeline.inference import announce, draw_samples, hub, model_card
from pipeline.inference.load_model import find_device, load
from pipeline.inference.locations import HUB, find_model, results_folder
from pipeline.inference.model_folder import (
    ModelContent,
    content_of,
    is_averaged,
    read_model_folder,
    read_recipe,
    weights_stem,
    write_model_folder,
)
from pipeline.inference.readjust import Readjustment, readjusted_content, temperature_of
from pipeline.inference.releases import license_of
from pipeline.inference.report import reports_of
from pipeline.models.conditions import AttributeCondition, ClassCondition
from pipeline.recipe import Recipe
from pipeline.storage.checkpoint_folder import Checkpoint
from pipeline.storage.new_folder import check_new
from pipeline.storage.status import read_status
from shard_data import manifest as manifests

log = logging.getLogger("pipeline")

FACTS = ("initialized_from", "data_fingerprint", "holdout", "classes", "torch", "world_size")
"""What a checkpoint states that a model folder keeps. Counters of training, for instance, it does not need."""
REAL_FACES = re.compile(r"celeb|ffhq|lfw|vggface", re.IGNORECASE)
"""Names of data sets that show real people."""
SAMPLES, SEED = 64, 0
"""Of the picture."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how it is described."""

    location: str
    """Of the model; see `locations`."""
    checkpoint: str
    """`latest`, `best`, a step, or a checkpoint's folder."""
    out: Path
    picture: str = "auto"
    """Whether there is a picture of samples: yes, no, or auto: unless the data set shows real people."""
    repository: hub.Repository | None = None
    """Where it is going to be pushed."""
    license: model_card.License | None = None
    datasets: Sequence[str] = ()
    """Ids of data sets on the Hub."""
    device: str | None = None
    readjust: Readjustment | None = None
    """How batch norm's statistics are re-estimated, if they are."""


def export_model_folder(request: ExportRequest) -> None:
    """Writes a model folder, completely or not at all. Raises ValueError for a model or folder that cannot be used."""
    check_new(request.out)
    found, place = find_model(request.location, request.checkpoint)
    content, digest = content_of(found), found.sha256[weights_stem(found)]
    license = choose_license(request.license, found)
    log_lines(first_lines(request, found, place))
    reports = reports_of(results_folder(request.location), digest)
    manifest = find_manifest(content)
    about = model_card.About(
        name=request.repository.name.partition("/")[2] if request.repository else request.out.resolve().name,
        location=f"{HUB}{request.repository.name}" if request.repository else request.out.resolve().name,
        license=license,
        datasets=request.datasets,
        manifest=manifest,
        real_faces=shows_real_faces(content.recipe, manifest),
    )
    described = replace(content, recipe=publishable(content.recipe), facts=facts_of(found, request.location))
    if request.readjust:
        described, reports = readjusted_content(described, request.readjust, find_device(request.device)), {}
    picture = None
    if request.picture == "yes" or (request.picture == "auto" and not about.real_faces):
        picture, caption = draw_picture(place, request.device, described)
        about = replace(about, picture=caption)
    elif request.picture == "auto":
        log.info("no picture of samples, because the data set shows real people; --picture yes adds it")
    write_model_folder(request.out, described, model_card.render(described, about, reports), picture)
    log.info("%s; evaluations of these weights in its card: %d", announce.written_to(request.out), len(reports))


def choose_license(given: model_card.License | None, found: Checkpoint) -> model_card.License | None:
    """Raises ValueError where another one is given than that of the release that the weights came from."""
    of_release = license_of(found.facts)
    if given and of_release:
        raise ValueError(f"--license {given.id}: the weights have a license already, {of_release.name}; leave it out")
    return given or of_release


def first_lines(request: ExportRequest, found: Checkpoint, place: str) -> list[str]:
    """What is written of which model, and where it goes."""
    how, repository = request.readjust, request.repository
    return announce.first_lines(
        "model folder",
        read_recipe(found).model.name,
        found.step,
        find_device(request.device),
        {
            "model": announce.weights_of(place, is_averaged(found)),
            "readjust": f"{how.iterations:,} batches of samples at temperature {how.temperature:g}" if how else "",
            "writes": str(request.out),
            "pushes": hub.address(repository) if repository else "",
        },
    )


def push_folder(folder: Path, repository: hub.Repository, private: bool) -> None:
    """Verifies a model folder, and uploads it as it is. Raises ValueError, which says how to try again."""
    read_model_folder(folder)
    log.info("uploading %s to %s", folder, hub.address(repository))
    try:
        commit = hub.push(folder, repository, private)
    except ValueError as error:
        again = f"python -m pipeline.export {folder} --push {repository.name}"
        raise ValueError(f"{error}\n{folder} is complete; to push it again: {again}") from None
    log.info("pushed to %s; load it as %s@%s", hub.address(repository), repository, commit)


def facts_of(found: Checkpoint, location: str) -> dict[str, Any]:
    """What the model folder states; a model folder that is exported again keeps what it stated."""
    if "source" in found.facts:
        return found.facts
    kept = {name: found.facts[name] for name in FACTS if name in found.facts}
    source = {
        "kind": "run",
        "run_id": found.facts.get("run_id"),
        "averaged": is_averaged(found),
        "weights_sha256": found.sha256[weights_stem(found)],
        "total_steps": read_status(results_folder(location)).total_steps,
    }
    return kept | {"source": source}


def publishable(recipe: Recipe) -> Recipe:
    """The recipe without what belongs to the author's machine and accounts: absolute paths become names, and logging
    has its defaults.
    """
    settings = recipe.model_dump(mode="json")
    del settings["tracking"]
    data, model = settings["data"], settings["model"]
    data |= {"root": _relative(data["root"], "data"), "cache": None}
    if model.get("classifier"):
        model["classifier"] = _relative(model["classifier"], "classifiers")
    return build(Recipe, settings)


def _relative(path: str | None, folder: str) -> str | None:
    if path is None or is_address(path):
        return path
    parts = PurePosixPath(path)
    return f"{folder}/{parts.name}" if parts.is_absolute() or ".." in parts.parts else path


def find_manifest(content: ModelContent) -> Mapping[str, Any] | None:
    """The manifest of the shard set that the model was trained on, if it is at hand and still the same set."""
    root, trained_on = content.recipe.data.root, content.facts.get("data_fingerprint")
    if root is None:
        return None
    if not trained_on:
        log.warning("the card does not describe the data, as the model does not state which shard set it is of")
        return None
    try:
        found = manifests.parse(fetch_manifest(root), root) if is_address(root) else manifests.load(Path(root))
    except (ValueError, OSError) as error:
        log.warning("the card does not describe the data, as the shard set cannot be read: %s", error)
        return None
    if found["fingerprint"] != trained_on:
        log.warning("the card does not describe the data: %s is another set than the one that was trained on", root)
        return None
    return found


def shows_real_faces(recipe: Recipe, manifest: Mapping[str, Any] | None) -> bool:
    """Whether the data set is known to show real people."""
    names = [model_card.data_name(recipe, manifest), recipe.data.source or "", recipe.data.root or ""]
    return any(map(REAL_FACES.search, names))


def draw_picture(place: str, device: str | None, content: ModelContent) -> tuple[np.ndarray, str]:
    """uint8 (height, width, 3) of samples, the first that there are, and a caption.

    `content`: what is written, whose batch norm may be that of a temperature, unlike that of the model at `place`.
    """
    trained = load(place, device=device)
    trained.model.load_state_dict(content.weights)
    temperature = temperature_of(content.facts)
    condition = trained.recipe.condition
    if isinstance(condition, ClassCondition):
        plan = draw_samples.plan_classes(trained, None, max(1, SAMPLES // condition.num_classes))
    elif isinstance(condition, AttributeCondition):
        plan = draw_samples.plan_attributes(trained, {}, SAMPLES)
    else:
        plan = draw_samples.plan_count(trained, SAMPLES)
    images = draw_samples.sample_images(trained, plan, temperature, SEED)
    rows = {ClassCondition: ", a row for each class", AttributeCondition: " with unknown attributes"}
    order = f"{rows.get(type(condition), '')}, seed {SEED}, not selected"
    caption = f"Samples of the prior at temperature {temperature:g}{order}"
    return draw_samples.picture(plan, images), caption

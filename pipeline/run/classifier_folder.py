"""A classifier's folder: the checkpoint format (safetensors and a hashed meta.json), written once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.models.classifier import Classifier, ClassifierConfig, FrozenClassifier
from pipeline.storage.checkpoint_folder import META, read_folder, snapshot, write_folder
from pipeline.storage.new_folder import new_folder

HOW_TO_MAKE = "make one with: python -m pipeline.train_classifier --data DIR --out"


def save_classifier(classifier: Classifier, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """A new folder, complete or not there. `facts`: JSON values to keep beside. Raises as `new_folder` does."""
    contents = {**facts, "classifier": classifier.config.model_dump(mode="json")}
    with new_folder(folder) as hidden:
        write_folder(hidden, snapshot({"model": classifier.state_dict()}), step, contents, None)


def load_classifier(folder: Path | str) -> Classifier:
    """A classifier in eval mode, on the CPU, whose parameters take no gradient.

    Raises ValueError where the folder is missing, damaged, or not a classifier's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no classifier; {HOW_TO_MAKE} {folder}")
    found = read_folder(folder)
    try:
        config = ClassifierConfig.model_validate(found.facts.get("classifier"))
    except ValidationError as error:
        raise ValueError(f"{folder}: not the folder of a classifier; {HOW_TO_MAKE} FOLDER") from error
    with torch.device("meta"):
        classifier = Classifier(config)
    try:
        classifier.load_state_dict(found.tensors.get("model", {}), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit the classifier: {error}") from None
    return classifier.requires_grad_(False).eval()


def classifier_digest(folder: Path | str) -> int:
    """63 bits that stand for the folder's content, wherever it lies."""
    return int.from_bytes(hashlib.sha256((Path(folder) / META).read_bytes()).digest()[:8], "little") >> 1


def load_frozen_classifier(folder: Path | str) -> FrozenClassifier:
    """The classifier with its digest. Raises as `load_classifier` does."""
    return FrozenClassifier(load_classifier(folder), classifier_digest(folder))

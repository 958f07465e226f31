"""Features of real images, kept from one evaluation to the next.

They lie in the cache folder of fetched sets (`data.cache`, NVAE_CACHE_DIR or ~/.cache/nvae-pipeline), in `features/`:
a folder for the moments of a set and one for its features, named after the sha256 of all that they depend on. Each is a
checkpoint folder: safetensors and a hashed meta.json, written whole and verified byte by byte when read. They may be
deleted at any time.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.feature_moments import Moments
from pipeline.evaluation.image_features import ImageFeatures
from pipeline.storage.checkpoint_folder import UnreadableCheckpoint, read_folder, snapshot, write_folder
from pipeline.storage.new_folder import new_folder

log = logging.getLogger("pipeline")

FOLDER = "features"
MOMENTS, ROWS = "moments", "rows"
"""The two kinds of folders."""


class FeatureCache:
    """The folders of one set of images."""

    def __init__(self, cache: Path, facts: dict[str, Any], count: int, size: int, dtype: torch.dtype):
        """`facts`: JSON values that the features depend on. `count` images, features of `size` dimensions."""
        self.root = cache / FOLDER
        self.facts = json.loads(json.dumps(facts | {"precision": str(dtype)}))  # as a file gives them back
        self.count = count
        with torch.device("meta"):
            covariance = torch.empty(size, size, dtype=torch.float64)
            self.shapes = {
                MOMENTS: {"mean": covariance[0], "covariance": covariance},
                ROWS: {"rows": torch.empty(count, size, dtype=dtype)},
            }

    def folder(self, kind: str) -> Path:
        """Of the moments, or of the rows."""
        facts = json.dumps(self.facts | {"kind": kind}, sort_keys=True)
        return self.root / hashlib.sha256(facts.encode()).hexdigest()[:32]

    def load(self, with_rows: bool) -> ImageFeatures | None:
        """None where a folder that is needed is missing, or damaged, which is logged."""
        moments = self._read(MOMENTS)
        rows = self._read(ROWS) if with_rows and moments else None
        if moments is None or (with_rows and rows is None):
            return None
        return ImageFeatures(Moments(self.count, moments["mean"], moments["covariance"]), rows and rows["rows"])

    def _read(self, kind: str) -> dict[str, Tensor] | None:
        folder = self.folder(kind)
        if not folder.exists():
            return None
        try:
            found = read_folder(folder)
        except UnreadableCheckpoint as error:
            log.warning("%s; the features are computed again", error)
            return None
        tensors, shapes = found.tensors.get(FOLDER, {}), self.shapes[kind]
        fits = tensors.keys() == shapes.keys() and all(
            (tensors[name].shape, tensors[name].dtype) == (like.shape, like.dtype) for name, like in shapes.items()
        )
        if fits and found.facts == self.facts | {"kind": kind}:
            return tensors
        log.warning("%s: does not hold what its name says; the features are computed again", folder)
        return None

    def save(self, features: ImageFeatures) -> None:
        """Writes each folder whole or not at all, in place of one that could not be used. Where that fails, the log
        says so, and nothing else changes.
        """
        contents = {MOMENTS: {"mean": features.moments.mean, "covariance": features.moments.covariance}}
        if features.rows is not None:
            contents[ROWS] = {"rows": features.rows}
        for kind, tensors in contents.items():
            folder = self.folder(kind)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                with new_folder(folder) as hidden:
                    facts = self.facts | {"kind": kind}
                    write_folder(hidden, snapshot({FOLDER: tensors}), step=0, facts=facts, score=None)
            except (OSError, ValueError) as error:  # ValueError: something else lies there
                log.warning("%s: the features of the real images could not be kept (%s)", folder, error)

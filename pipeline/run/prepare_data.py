"""Creates a recipe's data, and the classifier that its model may need, if they are missing."""

import logging
import shlex
from pathlib import Path

from pipeline.cli import ROOT, run_python
from pipeline.data.remote import is_address
from pipeline.recipe import Recipe

log = logging.getLogger("pipeline")


def prepare_data(recipe: Recipe, may_make: bool) -> None:
    """Creates what is missing. Raises ValueError for a shard set that is missing and cannot be created here."""
    prepare_shards(recipe, may_make)
    folder, root = recipe.model.classifier_folder, recipe.data.root
    if folder and may_make and not is_address(root) and not Path(folder).exists():
        arguments = ["--data", root, "--out", folder, "--epochs", "2"]
        command = shlex.join(arguments)
        log.info("%s is missing; training it once: python -m pipeline.train_classifier %s", folder, command)
        run_python(
            str(ROOT / "pipeline/train_classifier.py"), *arguments, progress_timeout=recipe.train.progress_timeout
        )


def prepare_shards(recipe: Recipe, may_make: bool) -> None:
    """Creates the recipe's shard set if it is missing and needs no originals.

    Raises ValueError for other sets, with the command that makes them.
    """
    root, source = recipe.data.root, recipe.data.source
    if root is None:
        raise ValueError("data.root: the recipe names no shard set; give one with --data DIR")
    if is_address(root) or (Path(root) / "manifest.json").is_file():
        return
    command = f"python -m shard_data {source} --out {root}"
    if source is None or "DIR" in source or not may_make:
        how = f"; make it with: {command}" if source else ""
        raise ValueError(f"{root}: no complete shard set (no manifest.json){how}")
    log.info("%s is missing; making it once: %s", root, command)
    run_python("-m", "shard_data", *shlex.split(source), "--out", root, progress_timeout=recipe.train.progress_timeout)

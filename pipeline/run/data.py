"""The data of a run, as the recipe describes them."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.data.device_copies import on_device
from pipeline.data.holdout import SPLIT, check_holdout, describe_holdout, open_split, random_images
from pipeline.data.loader import Batch, build_eval_loader, build_train_loader, check_binarization, check_data
from pipeline.data.order import Order
from pipeline.data.preprocess import Preprocess, to_model_input
from pipeline.data.remote import check_address, default_cache, fetch_manifest, fetch_set, is_address
from pipeline.data.shards import TarShards, UnreadableShard
from pipeline.data.unreadable import SkippedSample
from pipeline.distributed.runtime import Runtime
from pipeline.recipe import Recipe, total_steps
from pipeline.run.unreadable_log import UnreadableLog
from shard_data import manifest as manifests
from shard_data.manifest import Manifest
from shard_data.terminal import Progress, with_progress

log = logging.getLogger("pipeline")

HASHED_AT_ONCE = 100
"""Images."""


class RunData:
    """The training split and the held-out split of a recipe's shard set: a `TrainingData`.

    With `progress`, `held_out_batches` shows its progress on the main process.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, progress: bool = False):
        self.recipe = recipe
        self._pixel_hashes: dict[int, str] = {}
        self._shows_progress = progress and runtime.is_main
        self.runtime = runtime
        config = recipe.data
        self.train, whole = self._open_shards()
        self.split_size = len(whole)  # of the validation split
        self.held_out = random_images(whole, recipe.validation.images, recipe.validation.images_seed)
        self.holdout = describe_holdout(config, recipe.train.seed, self.train)
        if self.holdout is not None:
            log.info("%(count)d of the %(of)d training images are held out for validation (data.holdout)", self.holdout)
        self.order = Order(self.train.shard_sizes, recipe.train.seed, config.window)
        self.unreadable = UnreadableLog(runtime)
        self._augment = Preprocess(recipe.train.seed, flip=config.flip, binarize=config.binarize, pad=config.pad)
        self._plain = Preprocess(recipe.train.seed, binarize=config.binarize, pad=config.pad)

    def _open_shards(self) -> list[TarShards]:
        """Of the training and the validation split; from an address, they are fetched first."""
        config, runtime = self.recipe.data, self.runtime
        splits = config.train_split, self.recipe.validation.split
        if not is_address(config.root):
            runtime.run_on_all(lambda: check_set(self.recipe, manifests.load(Path(config.root)), config.root))
            return runtime.run_on_all(
                lambda: [self._open(config.root, split) for split in splits], f"opening {config.root}"
            )
        address = check_address(config.root)
        manifest = runtime.from_main(runtime.run_on_main(lambda: fetch_manifest(address), f"fetching {address}"))
        runtime.run_on_all(lambda: check_set(self.recipe, manifests.parse(manifest, address), address))
        cache = Path(config.cache) if config.cache else default_cache()
        stored = [config.train_split if config.holdout and split == SPLIT else split for split in splits]
        folder = runtime.run_on_all(
            lambda: fetch_set(address, manifest, stored, cache, progress=runtime.is_main), f"fetching {address}"
        )
        return [self._open(folder, split, origin=address) for split in splits]

    def _open(self, root: str | Path, split: str, origin: str | None = None) -> TarShards:
        config = self.recipe.data
        verify = config.verify and config.on_error == "raise"  # a hash cannot say which sample to skip
        return open_split(root, split, config, self.recipe.train.seed, verify, origin)

    def batches(self, step: int) -> Iterable[Batch]:
        """This rank's micro-batches from optimizer step `step` to the end of the run."""
        train = self.recipe.train
        loader = build_train_loader(
            self.train,
            self._augment,
            self.order,
            micro_batch=train.images_per_pass,
            start=step * train.micro_batches,
            stop=self.total_steps * train.micro_batches,
            **self._reading,
        )
        return on_device(loader, self.runtime.device)

    def held_out_batches(self, first: int = 0, epoch: int = 0, batch_size: int | None = None) -> Iterable[Batch]:
        """See TrainingData."""
        config = self.recipe.validation
        loader = build_eval_loader(
            self.held_out,
            self._plain,
            batch_size=batch_size or config.batch_size,
            limit=config.images,
            first=first,
            epoch=epoch,
            **self._reading,
        )
        batches = on_device(loader, self.runtime.device)
        if not self._shows_progress:
            return batches
        return with_progress(batches, Progress("evaluate", first + len(loader), "batches", first, log.info))

    @property
    def _reading(self) -> dict[str, Any]:
        """How this rank reads either split."""
        return {
            "rank": self.runtime.rank,
            "world_size": self.runtime.world_size,
            "workers": self.recipe.data.workers,
            "pin_memory": self.runtime.device.type == "cuda",
            "on_error": self.recipe.data.on_error,
            "timeout": self.recipe.train.collective_timeout,
        }

    def held_out_sha256(self, binarizations: int = 1) -> str:
        """Of the uint8 pixels (N, C, H, W) of the validation images, binarized as for the model and without padding;
        one binarization after the other. Reads them once, on this rank alone, without those that are unreadable.
        """
        if binarizations not in self._pixel_hashes:
            self._pixel_hashes[binarizations] = self._hash_pixels(binarizations)
        return self._pixel_hashes[binarizations]

    def _hash_pixels(self, binarizations: int) -> str:
        config, digest = self.recipe.data, hashlib.sha256()
        plain = Preprocess(self.recipe.train.seed, binarize=config.binarize)
        for epoch in range(binarizations):
            for batch in build_eval_loader(
                self.held_out,
                plain,
                batch_size=HASHED_AT_ONCE,
                limit=self.recipe.validation.images,
                epoch=epoch,
                on_error=config.on_error,
            ):
                digest.update(batch.images.numpy().tobytes())
        return digest.hexdigest()

    def held_out_inputs(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The first `count` images of the validation split as model input, and their conditions, the same on every
        rank; fewer where some are unreadable.
        """
        on_error = self.recipe.data.on_error
        batches = build_eval_loader(self.held_out, self._plain, batch_size=count, on_error=on_error)
        return self.model_inputs(self.runtime.run_on_all(lambda: first_with_images(batches), "reading images"))

    def report_unreadable(
        self,
        step: int,
        skipped: Sequence[SkippedSample],
        error: UnreadableShard | None,
        split: Literal["train", "held_out"] = "train",
    ) -> int:
        """See TrainingData and UnreadableLog.report."""
        shards = self.train if split == "train" else self.held_out
        return self.unreadable.report(step, shards.split, skipped, error)

    def model_inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the model takes of a batch, on the device: (b, C, H, W) in [0, 1], and (b, K) or None."""
        device, dtype = self.runtime.device, self.runtime.dtype
        x = to_model_input(batch.images.to(device, non_blocking=True), self.recipe.data.bits, dtype)
        if self.recipe.train.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.recipe.condition is None:
            return x, None
        condition = self.recipe.condition.encode(batch.labels, batch.attributes, self.train.attribute_names)
        return x, condition.to(device, dtype, non_blocking=True)

    @property
    def total_steps(self) -> int:
        return total_steps(self.recipe, self.order.epoch_size)


def check_set(recipe: Recipe, manifest: Manifest, place: str) -> None:
    """Raises ValueError, naming the setting, where the shard set at `place` is not what the recipe expects."""
    check_holdout(recipe.data, recipe.validation.split, manifest, place)
    splits = {"data.train_split": recipe.data.train_split, "validation.split": recipe.validation.split}
    if recipe.data.holdout:  # validation.split is a part of the training split
        del splits["validation.split"]
    if len(set(splits.values())) > 1 or recipe.data.holdout:  # evaluate.py opens one split, which no setting names
        manifests.check_splits(manifest, place, splits)
    check_data(recipe.data, manifest["image"], place)
    check_binarization(recipe.data, manifest, place)
    if recipe.condition is not None:
        recipe.condition.check(manifest["classes"], manifest["attributes"])


def first_with_images(batches: Iterable[Batch]) -> Batch:
    """The first batch of which something could be read. Raises UnreadableShard where there is none."""
    for batch in batches:
        if len(batch.images):
            return batch
    raise UnreadableShard(f"no sample can be read; the last problem: {batch.skipped[-1].problem}")

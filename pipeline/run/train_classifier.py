"""Trains a classifier of a shard set's classes or attributes, and measures its accuracy."""

import logging
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.cli import log_next
from pipeline.data.loader import Batch, build_eval_loader, build_train_loader
from pipeline.data.order import Order
from pipeline.data.preprocess import Preprocess, to_model_input
from pipeline.data.shards import TarShards
from pipeline.distributed.logs import log_lines
from pipeline.distributed.runtime import cores_per_process
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.run.classifier_folder import save_classifier
from pipeline.storage.new_folder import check_new
from shard_data.progress import advance
from shard_data.terminal import Progress, aligned

log = logging.getLogger("pipeline")

PEAK_LR, WEIGHT_DECAY = 2e-3, 1e-2
WINDOW = 32  # shards that are shuffled together


class ClassifierTraining(NamedTuple):
    """How a classifier is trained."""

    data: Path
    """The shard set."""
    split: str
    """Split to train on."""
    held_out: str
    """Split to measure the accuracy on."""
    epochs: float
    batch_size: int
    """Images per step."""
    width: int
    """Channels of the first stage."""
    noise: float
    """Largest standard deviation of the Gaussian noise that is added to images in [0, 1]; 0: none."""
    seed: int
    """Of weights, order and noise."""
    threads: int | None
    """On CPU; None: all cores."""


def train_classifier(training: ClassifierTraining, folder: Path) -> None:
    """Trains a classifier and writes it to a new folder, with its accuracy.

    Raises ValueError if the folder exists, or the set has neither classes nor attributes.
    """
    check_new(folder)
    torch.set_num_threads(training.threads or cores_per_process())
    config = describe_images(TarShards(training.data, training.split), training.width)
    flip = config.kind == "attributes"  # not digits
    images = LabeledImages(training.data, training.split, training.seed, flip)
    held_out = LabeledImages(training.data, training.held_out, training.seed)
    steps = max(1, round(training.epochs * len(images.shards) / training.batch_size))
    log_lines(first_lines(training, config, images, steps, folder))
    classifier = fit(config, images, steps, training)
    figures = accuracy(classifier, held_out)
    for name, share in figures.items():
        log.info("%-32s %6.2f %% of %s", name, 100 * share, training.held_out)
    facts: dict[str, Any] = {
        "held_out": {name: None if math.isnan(share) else share for name, share in figures.items()},
        "held_out_split": training.held_out,
        "data_fingerprint": images.shards.fingerprint,
        "noise": training.noise,
        "seed": training.seed,
    }
    save_classifier(classifier, folder, steps, facts)
    log.info("written to %s", folder)
    metric = "recognition" if config.kind == "classes" else "edit"
    log_next([f"python pipeline/evaluate.py MODEL --metrics {metric} --classifier {shlex.quote(str(folder))}"])


def first_lines(
    training: ClassifierTraining, config: ClassifierConfig, images: "LabeledImages", steps: int, folder: Path
) -> list[str]:
    """What is trained on what, for how long, and where it is written."""
    threads = torch.get_num_threads()
    on_cpu = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    where = on_cpu if images.device.type == "cpu" else str(images.device)
    facts = {
        "data": f"{training.data}: {len(images.shards):,} images ({training.split}), measured on {training.held_out}",
        "length": f"{steps:,} steps of {training.batch_size:,} images, {training.epochs:g} epochs",
        "writes": f"{folder}, at the end",
        "stop": "Ctrl-C; nothing is written then",
    }
    return [f"a classifier of {len(config.names)} {config.kind} on {where}", *aligned(facts)]


class LabeledImages:
    """Batches of a split of a shard set with their targets, on the device."""

    def __init__(self, root: Path, split: str, seed: int, flip: bool = False):
        self.shards = TarShards(root, split)
        self.seed = seed
        self.flip = flip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def training(self, batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) for each step, with targets as in Classifier.correct."""
        order = Order(self.shards.shard_sizes, self.seed, WINDOW)
        preprocess = Preprocess(self.seed, flip=self.flip)
        loader = build_train_loader(self.shards, preprocess, order, micro_batch=batch_size, start=0, stop=steps)
        return map(self._item, loader)

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) of the whole split, in natural order."""
        return map(self._item, build_eval_loader(self.shards, Preprocess(self.seed), batch_size))

    def _item(self, batch: Batch) -> tuple[Tensor, Tensor]:
        advance()
        x = to_model_input(batch.images.to(self.device)).contiguous(memory_format=torch.channels_last)
        return x, self._target(batch).to(self.device)

    def _target(self, batch: Batch) -> Tensor:
        if not self.shards.classes:
            hidden = torch.from_numpy(self.shards.hidden(batch.indices.numpy()))
            return batch.attributes.masked_fill(hidden, -1).float()
        if bool((batch.labels < 0).any()):
            raise ValueError(f"{self.shards.root}: an image of split '{self.shards.split}' has no label")
        return batch.labels


def describe_images(shards: TarShards, width: int) -> ClassifierConfig:
    """The classifier of a set's classes, or of its attributes if it has no classes. Raises ValueError for neither."""
    height, across, channels = shards.image_shape
    names = shards.classes or shards.attribute_names
    if not names:
        raise ValueError(f"{shards.root}: the set has neither classes nor attributes to classify")
    kind = "classes" if shards.classes else "attributes"
    return ClassifierConfig(kind=kind, names=names, image_shape=(channels, height, across), width=width)


def fit(config: ClassifierConfig, images: LabeledImages, steps: int, training: ClassifierTraining) -> Classifier:
    """AdamW under a one-cycle learning rate (Smith & Topin 2017); the progress bar shows the loss, nats per image."""
    torch.manual_seed(training.seed)
    classifier = Classifier(config).to(images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    with Progress("train", steps, "steps", write=log.info) as bar:
        for number, (x, target) in enumerate(images.training(training.batch_size, steps), start=1):
            loss = classifier.loss(with_noise(x, training.noise) if training.noise else x, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(figures=f"loss {loss.item():.3f}" if number % 20 == 0 else "")
    return classifier


def with_noise(x: Tensor, largest: float) -> Tensor:
    """Images (B, C, H, W) with Gaussian noise, whose standard deviation is uniform in [0, largest] for each image.

    A classifier trained on them depends less on fine patterns that people do not see: Kaur et al. 2019,
    arXiv:1910.08640.
    """
    return x + largest * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)


@torch.no_grad()
def accuracy(classifier: Classifier, images: LabeledImages, batch_size: int = 500) -> dict[str, float]:
    """Share of correct answers in [0, 1]: `accuracy`; for attributes also `accuracy/NAME`. NaN if no value is known."""
    classifier.eval()
    correct = torch.cat([classifier.correct(x, target) for x, target in images.held_out(batch_size)])  # (N, 1 or A)
    figures = {"accuracy": correct.nanmean().item()}
    if classifier.kind == "attributes":
        by_name = zip(classifier.names, correct.nanmean(0).tolist(), strict=True)
        figures |= {f"accuracy/{name}": share for name, share in by_name}
    return figures

"""Trains a small classifier of a shard set's classes, or of its attributes. It judges samples and edits of models.

    python pipeline/train_classifier.py --data data/mnist --out classifiers/mnist
    python pipeline/train_classifier.py --data data/toy_faces32 --out classifiers/judge --seed 2

Prints the accuracy on held-out images and writes it beside the weights. Attributes that an image cannot show (bangs
under a hat) count neither in training nor in the accuracy.
"""

import argparse
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import run_tool  # noqa: E402
from pipeline.data.loader import Batch, build_eval_loader, build_train_loader  # noqa: E402
from pipeline.data.order import Order  # noqa: E402
from pipeline.data.preprocess import Preprocess, to_model_input  # noqa: E402
from pipeline.data.shards import TarShards  # noqa: E402
from pipeline.distributed.runtime import cores_per_process  # noqa: E402
from pipeline.models.classifier import Classifier, ClassifierConfig  # noqa: E402
from pipeline.run.classifier_folder import check_new, save_classifier  # noqa: E402
from shard_data.progress import advance  # noqa: E402

log = logging.getLogger("pipeline")

PEAK_LR, WEIGHT_DECAY = 2e-3, 1e-2
WINDOW = 32  # shards that are shuffled together


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_classifier.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the shard set")
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the classifier")
    add("--epochs", type=float, default=5.0, metavar="N", help="passes over the training split (default %(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="images per step (default %(default)s)")
    add("--width", type=int, default=32, metavar="N", help="channels of the first stage (default %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of weights and order (default %(default)s)")
    add(
        "--threads", type=int, default=cores_per_process(), metavar="N", help="on CPU (default: the cores, %(default)s)"
    )
    add("--split", default="train", help="what to train on (default %(default)s)")
    add("--held-out", default="test", metavar="SPLIT", help="what to measure on (default %(default)s)")
    return parser


class Images:
    """Batches of a split of a shard set, with their targets, on the device."""

    def __init__(self, root: Path, split: str, seed: int, flip: bool = False):
        self.shards = TarShards(root, split)
        self.seed = seed
        self.flip = flip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def training(self, batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) for each step. See Classifier.correct for targets."""
        order = Order(self.shards.shard_sizes, self.seed, WINDOW)
        preprocess = Preprocess(self.seed, flip=self.flip)
        loader = build_train_loader(self.shards, preprocess, order, micro_batch=batch_size, start=0, stop=steps)
        return map(self._item, loader)

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) of the whole split, in natural order."""
        return map(self._item, build_eval_loader(self.shards, Preprocess(self.seed), batch_size))

    def _item(self, batch: Batch) -> tuple[Tensor, Tensor]:
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
    """Classes where the set has them, else attributes. Raises ValueError where it has neither."""
    height, across, channels = shards.image_shape
    names = shards.classes or shards.attribute_names
    if not names:
        raise ValueError(f"{shards.root}: the set has neither classes nor attributes to classify")
    kind = "classes" if shards.classes else "attributes"
    return ClassifierConfig(kind=kind, names=names, image_shape=(channels, height, across), width=width)


def train(config: ClassifierConfig, images: Images, steps: int, batch_size: int, seed: int) -> Classifier:
    """AdamW under a one-cycle learning rate (Smith & Topin 2017); the progress bar shows the loss, nats per image."""
    torch.manual_seed(seed)
    classifier = Classifier(config).to(images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    with tqdm(images.training(batch_size, steps), total=steps, desc="train", unit="step", disable=None) as bar:
        for number, (x, target) in enumerate(bar, start=1):
            advance()
            loss = classifier.loss(x, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if number % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return classifier


@torch.no_grad()
def accuracy(classifier: Classifier, images: Images, batch_size: int = 500) -> dict[str, float]:
    """Share of correct answers in [0, 1]: `accuracy`; for attributes also `accuracy/NAME`. NaN if nothing is known."""
    classifier.eval()
    correct = torch.cat([classifier.correct(x, target) for x, target in images.held_out(batch_size)])  # (N, 1 or A)
    figures = {"accuracy": correct.nanmean().item()}
    if classifier.kind == "attributes":
        by_name = zip(classifier.names, correct.nanmean(0).tolist(), strict=True)
        figures |= {f"accuracy/{name}": share for name, share in by_name}
    return figures


def run(parsed: argparse.Namespace) -> None:
    """From the command line to a written classifier."""
    check_new(parsed.out)
    if min(parsed.epochs, parsed.batch_size, parsed.width, parsed.threads) <= 0:
        raise ValueError("--epochs, --batch-size, --width and --threads must be above 0")
    torch.set_num_threads(parsed.threads)
    config = describe_images(TarShards(parsed.data, parsed.split), parsed.width)
    images = Images(parsed.data, parsed.split, parsed.seed, flip=config.kind == "attributes")  # not digits
    held_out = Images(parsed.data, parsed.held_out, parsed.seed)
    steps = max(1, round(parsed.epochs * len(images.shards) / parsed.batch_size))
    classifier = train(config, images, steps, parsed.batch_size, parsed.seed)
    figures = accuracy(classifier, held_out)
    for name, share in figures.items():
        log.info("%-32s %6.2f %% of %s", name, 100 * share, parsed.held_out)
    facts = {
        "held_out": {name: None if math.isnan(share) else share for name, share in figures.items()},
        "held_out_split": parsed.held_out,
        "data_fingerprint": images.shards.fingerprint,
        "seed": parsed.seed,
    }
    save_classifier(classifier, parsed.out, steps, facts)
    log.info("written to %s", parsed.out)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: run(parsed), interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())

"""Trains a small classifier of a shard set's classes, or of its attributes, for metrics of samples and edits.

    python pipeline/train_classifier.py --data data/mnist --out classifiers/mnist
    python pipeline/train_classifier.py --data data/toy_faces32 --out classifiers/judge --seed 2
    python pipeline/train_classifier.py --data data/celeba64 --out classifiers/celeba64 --noise 0.4

Prints the accuracy on held-out images and writes it beside the weights. Attributes that an image cannot show (bangs
under a hat) count neither in training nor in the accuracy.

For the loss of attribute_vae on photographs, train with --noise: without it, a model learns fine patterns that only the
classifier takes for an attribute.
"""

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, run_tool  # noqa: E402
from pipeline.run.train_classifier import ClassifierTraining, train_classifier  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = CommandLine("train_classifier.py", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the shard set")
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the classifier")
    add("--epochs", type=float, default=5.0, metavar="N", help="passes over the training split (default %(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="images per step (default %(default)s)")
    add("--width", type=int, default=32, metavar="N", help="channels of the first layers (default %(default)s)")
    about_noise = "largest standard deviation of Gaussian noise on training images in [0, 1] (default: none)"
    add("--noise", type=float, default=0.0, metavar="S", help=about_noise)
    add("--seed", type=int, default=1, metavar="N", help="of weights, order of images and noise (default %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add("--split", default="train", help="split to train on (default %(default)s)")
    add("--held-out", default="test", metavar="SPLIT", help="split that accuracy is measured on (default %(default)s)")
    return parser


def run(parsed: argparse.Namespace) -> None:
    """From the command line to a written classifier."""
    for name in ("epochs", "batch_size", "width", "threads"):
        value = getattr(parsed, name)
        if value is not None and not 0 < value < math.inf:  # NaN is not either
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be a finite number above 0")
    if not 0 <= parsed.seed < 2**63:
        raise ValueError(f"--seed {parsed.seed}: must be from 0 to 2^63 - 1")
    if not 0 <= parsed.noise <= 1:
        raise ValueError(f"--noise {parsed.noise:g}: must be from 0 to 1, the range of the images' values")
    training = ClassifierTraining(
        data=parsed.data,
        split=parsed.split,
        held_out=parsed.held_out,
        epochs=parsed.epochs,
        batch_size=parsed.batch_size,
        width=parsed.width,
        noise=parsed.noise,
        seed=parsed.seed,
        threads=parsed.threads,
    )
    train_classifier(training, parsed.out)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: run(parsed), interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())

"""Edits pictures with a trained model: by attribute, by class, or by interpolation with another picture.

    python pipeline/edit.py runs/attribute_vae --image me.png --set Smiling=1 --strength 0..1
    python pipeline/edit.py runs/attribute_vae --data data/toy_faces32 --key test-00003 --set Blond_Hair=1
    python pipeline/edit.py runs/nvae --image me.png --set Smiling=1 --data data/toy_faces32 --images 2000
    python pipeline/edit.py runs/nvae --image me.png you.png --interpolate

Every row of the picture begins with the original and its reconstruction. A conditional model decodes the same latents
under another class or other attributes. For a model without a condition, the latents are moved by the mean difference
between images of --data with the attribute and without.
"""

import argparse
import logging
import sys
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from pipeline.cli import run_tool  # noqa: E402
from pipeline.inference.edit_picture import EditRequest, write_edits  # noqa: E402
from pipeline.inference.folders import output_folder  # noqa: E402
from pipeline.inference.locations import HELP, results_folder  # noqa: E402
from pipeline.inference.trained import load  # noqa: E402

log = logging.getLogger("pipeline")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="edit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("location", metavar="MODEL", help=HELP)
    add("--image", metavar="FILE", type=Path, nargs="+", default=[], help="pictures to edit")
    add("--key", metavar="KEY", nargs="+", default=[], help="samples of --data to edit, by key or number")
    add("--data", metavar="DIR", help="shard set: of --key, and of the mean differences")
    add("--split", default="test", help="split of --data (default test)")
    add("--set", metavar="NAME=1|CLASS", action="append", default=[], help="attribute (1 or 0), or class, to change to")
    known = "known attributes, or class, of the pictures of --image; the rest is inferred"
    add("--known", metavar="NAME=1,...|CLASS", action="append", default=[], help=known)
    add("--strength", metavar="S", default="1", help="how much of the edit: 1 (default), 0,0.5,1 or 0..1")
    add("--steps", metavar="N", type=int, default=7, help="of a range of strengths, or of --interpolate (default 7)")
    add("--interpolate", action="store_true", help="between two pictures: linear above, spherical below")
    add("--images", metavar="N", type=int, default=2000, help="of --data, for the mean differences (default 2000)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--out", metavar="FILE.png", type=Path, help="the picture (default: in MODEL/edited)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: edit(parsed))


def edit(parsed: argparse.Namespace) -> None:
    """From the command line to the picture."""
    check_arguments(parsed)
    request = EditRequest(
        files=parsed.image,
        known=parsed.known,
        data=parsed.data,
        split=parsed.split,
        keys=parsed.key,
        edits=parsed.set,
        strengths=parse_strengths(parsed.strength, parsed.steps),
        steps=parsed.steps,
        num_images=parsed.images,
    )
    trained = load(parsed.location, parsed.checkpoint, parsed.device)
    folder = results_folder(parsed.location)
    path = write_edits(trained, request, parsed.out, folder if parsed.out else output_folder(folder, "edited"))
    log.info("%s", path)


def check_arguments(parsed: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are missing, contradict each other, or are out of range."""
    pictures = len(parsed.image) + len(parsed.key)
    if not pictures:
        raise ValueError("give pictures with --image FILE..., or samples with --data DIR --key KEY...")
    if parsed.key and not parsed.data:
        raise ValueError("--key: give the shard set of the samples with --data DIR")
    if parsed.known and not parsed.image:
        raise ValueError("--known: applies to pictures of --image; samples of --key have their own attributes or class")
    if parsed.interpolate == bool(parsed.set):
        raise ValueError("give either --set NAME=1, or --interpolate")
    if parsed.interpolate and pictures != 2:
        raise ValueError(f"--interpolate: needs two pictures; {pictures} given")
    if parsed.steps < 2:
        raise ValueError(f"--steps {parsed.steps}: must be at least 2")
    if parsed.images < 1:
        raise ValueError(f"--images {parsed.images}: must be at least 1")
    if parsed.out is not None and parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out}: is a folder; name a file")


def parse_strengths(text: str, steps: int) -> Tensor:
    """`1`, `0,0.5,1`, or `0..1` in so many steps. Raises ValueError for anything else."""
    try:
        first, dots, last = text.partition("..")
        if dots:
            strengths = torch.linspace(float(first), float(last), steps)
        else:
            strengths = torch.tensor([float(word) for word in text.split(",")])
    except ValueError:
        raise ValueError(f"--strength {text}: give a number, a list like 0,0.5,1 or a range like 0..1") from None
    if not bool(strengths.isfinite().all()):
        raise ValueError(f"--strength {text}: must be finite")
    return strengths


if __name__ == "__main__":
    sys.exit(main())

"""Edits pictures with a trained model: by attribute, by class, or on the way from one picture to another.

    python pipeline/edit.py runs/attribute_vae --image me.png --set Smiling=1 --strength 0..1
    python pipeline/edit.py runs/attribute_vae --data data/toy_faces32 --key test-00003 --set Blond_Hair=1
    python pipeline/edit.py runs/nvae --image me.png --set Smiling=1 --data data/toy_faces32 --images 2000
    python pipeline/edit.py runs/nvae --image me.png you.png --interpolate

Every row of the picture begins with the original and its reconstruction. A model that is told attributes or a class is
told others; of one that is told nothing, the latents are moved by the mean difference between images of --data that
have the attribute and those that have not.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from pipeline.cli import run_tool  # noqa: E402
from pipeline.data.shards import TarShards  # noqa: E402
from pipeline.evaluation.images import image_grid, save_png, to_uint8  # noqa: E402
from pipeline.inference import editing  # noqa: E402
from pipeline.inference.editing import Subject  # noqa: E402
from pipeline.inference.parse_condition import parse_settings  # noqa: E402
from pipeline.inference.read_image import open_picture  # noqa: E402
from pipeline.inference.trained import TrainedModel, load  # noqa: E402

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
    add("run", metavar="RUN", type=Path, help="the folder of a training run")
    add("--image", metavar="FILE", type=Path, nargs="+", default=[], help="pictures to edit")
    add("--key", metavar="KEY", nargs="+", default=[], help="samples of --data to edit, by key or number")
    add("--data", metavar="DIR", help="shard set: of --key, and of the mean differences")
    add("--split", default="test", help="split of --data (default test)")
    add("--set", metavar="NAME=1|CLASS", action="append", default=[], help="attribute (1 or 0), or class, to change to")
    known = "attributes, or class, that the pictures of --image have; the rest is inferred"
    add("--known", metavar="NAME=1,...|CLASS", action="append", default=[], help=known)
    add("--strength", metavar="S", default="1", help="how much of the edit: 1 (default), 0,0.5,1 or 0..1")
    add("--steps", metavar="N", type=int, default=7, help="of a range of strengths, or of --interpolate (default 7)")
    add("--interpolate", action="store_true", help="the way between two pictures: linear above, spherical below")
    add("--images", metavar="N", type=int, default=2000, help="of --data, for the mean differences (default 2000)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, or a checkpoint's folder")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--out", metavar="FILE.png", type=Path, help="the picture (default: in RUN/edited)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: edit(parsed))


def edit(parsed: argparse.Namespace) -> None:
    """From the command line to the picture."""
    check_wish(parsed)
    trained = load(parsed.run, parsed.checkpoint, parsed.device)
    shards = TarShards(parsed.data, parsed.split) if parsed.data else None
    subjects = find_subjects(trained, shards, parsed)
    if parsed.interpolate:
        rows, columns = interpolation(trained, subjects, parsed.steps)
    else:
        rows, columns = strips(trained, shards, subjects, parsed)
    path = parsed.out or parsed.run / "edited" / default_name(subjects, parsed)
    save_png(path, image_grid(rows, columns))
    log.info("%s", path)


def check_wish(parsed: argparse.Namespace) -> None:
    """Raises ValueError where the command line asks for nothing, or for two things at once."""
    pictures = len(parsed.image) + len(parsed.key)
    if not pictures:
        raise ValueError("give pictures with --image FILE..., or samples with --data DIR --key KEY...")
    if parsed.key and not parsed.data:
        raise ValueError("--key: give the shard set of the samples with --data DIR")
    if parsed.known and not parsed.image:
        raise ValueError("--known: is about the pictures of --image; samples of --key bring what they have")
    if parsed.interpolate == bool(parsed.set):
        raise ValueError("give either --set NAME=1, or --interpolate")
    if parsed.interpolate and pictures != 2:
        raise ValueError(f"--interpolate: the way between two pictures; {pictures} given")
    if parsed.steps < 2:
        raise ValueError(f"--steps {parsed.steps}: at least 2")
    if parsed.images < 1:
        raise ValueError(f"--images {parsed.images}: at least 1")


def find_subjects(trained: TrainedModel, shards: TarShards | None, parsed: argparse.Namespace) -> list[Subject]:
    """The pictures of the command line, with what the model is told of each."""
    subjects = []
    transform = shards.manifest["transform"] if shards else None
    for path in parsed.image:
        image, done = open_picture(path, trained.image_shape, transform)
        condition, inferred = editing.know(trained, image, parsed.known)
        log.info("%s: taken %s%s", path.name, done, f"; inferred: {inferred}" if inferred else "")
        subjects.append(Subject(path.stem, image, condition))
    for key in parsed.key:
        index = editing.find_sample(shards, key)
        image = torch.from_numpy(shards.images([index]).transpose(0, 3, 1, 2).copy())
        subjects.append(Subject(shards.keys([index])[0], image, editing.condition_of(trained, shards, index)))
    return subjects


def strips(
    trained: TrainedModel, shards: TarShards | None, subjects: list[Subject], parsed: argparse.Namespace
) -> tuple[Tensor, int]:
    """A row for each picture: original, reconstruction, and the edit at each strength."""
    strengths = parse_strengths(parsed.strength, parsed.steps)
    if trained.recipe.condition is None:
        if shards is None:
            raise ValueError("the model was trained without a condition; give --data DIR, a shard set with attributes")
        direction = editing.find_direction(trained, shards, parse_settings(",".join(parsed.set)), parsed.images)
        edits = [editing.edit_by_direction(trained, subject, direction, strengths) for subject in subjects]
    else:
        edits = [editing.edit_by_condition(trained, subject, parsed.set, strengths) for subject in subjects]
    rows = [
        torch.cat([subject.image, reconstruction(trained, subject), to_uint8(edited)])
        for subject, edited in zip(subjects, edits, strict=True)
    ]
    return torch.cat(rows), 2 + len(strengths)


def interpolation(trained: TrainedModel, subjects: list[Subject], steps: int) -> tuple[Tensor, int]:
    """Two rows, linear and spherical, between the originals."""
    start, end = subjects
    ways = editing.interpolate(trained, start, end, steps)
    rows = [torch.cat([start.image, to_uint8(way), end.image]) for way in ways]
    return torch.cat(rows), steps + 2


def reconstruction(trained: TrainedModel, subject: Subject) -> Tensor:
    """uint8 (1, C, H, W)."""
    return to_uint8(trained.reconstruct(subject.image, subject.condition, seed=None))


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
        raise ValueError(f"--strength {text}: give finite numbers")
    return strengths


def default_name(subjects: list[Subject], parsed: argparse.Namespace) -> str:
    """Tells the pictures and the edit, in letters that every file system takes."""
    what = ["interpolation"] if parsed.interpolate else parsed.set
    words = [*(subject.name for subject in subjects[:2]), *what]
    return re.sub(r"[^\w.-]+", "_", "_".join(words))[:100] + ".png"


if __name__ == "__main__":
    sys.exit(main())

"""Edits pictures with a trained model: by attribute, by class, by interpolation, or by latent group.

    python pipeline/edit.py runs/attribute_vae --image me.png --set Smiling=1 --strength 0..1
    python pipeline/edit.py runs/attribute_vae --data data/toy_faces32 --key test-00003 --set Blond_Hair=1
    python pipeline/edit.py runs/nvae --image me.png --set Smiling=1 --data data/toy_faces32 --images 2000
    python pipeline/edit.py runs/nvae --image me.png you.png --interpolate --gif
    python pipeline/edit.py runs/nvae --data data/toy_faces32 --key 3 17 --keep-groups
    python pipeline/edit.py runs/nvae --data data/toy_faces32 --key 3 --traverse 4x4_group00

--set: a conditional model decodes the same latents under another class or other attributes. For a model without a
condition, the latents are moved by the mean difference between images of --data with the attribute and without.

--keep-groups: reconstructions from the first K latent groups, in the order of sampling, for each K. Kept groups are the
posteriors' means; the others have the means of their priors given these, or are sampled with --temperature.

--traverse: one group is moved along its principal directions by -3 to 3 standard deviations (--strength). For each
image of --data, e = (z - mu) / sigma, with z the posterior's mean, and mu and sigma of the group's prior given the
groups before it. The directions are the principal components of e. Groups after it keep their own e, and so follow from
their priors given the moved group; with --temperature 0 they have the means of these priors.
"""

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from pipeline.cli import CommandLine, log_lines, run_tool  # noqa: E402
from pipeline.inference.edit_picture import EditRequest, first_lines, write_edits  # noqa: E402
from pipeline.inference.folders import output_folder  # noqa: E402
from pipeline.inference.latent_groups import parse_temperature  # noqa: E402
from pipeline.inference.load_model import load  # noqa: E402
from pipeline.inference.locations import HELP, results_folder  # noqa: E402

log = logging.getLogger("pipeline")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("edit.py", __doc__)
    add_pictures(parser.add_argument_group("pictures"))
    add_edits(parser.add_argument_group("attributes and classes"))
    add_interpolation(parser.add_argument_group("interpolation"))
    add_latent_groups(parser.add_argument_group("latent groups"))
    return parser


def add_pictures(options: argparse._ArgumentGroup) -> None:
    """What is edited, by which model, and where the result goes."""
    add = options.add_argument
    add("location", metavar="MODEL", help=HELP)
    add("--image", metavar="FILE", type=Path, nargs="+", default=[], help="pictures to edit")
    add("--key", metavar="KEY", nargs="+", default=[], help="samples of --data to edit, by key or number")
    known = "known attributes, or class, of the pictures of --image; the rest is inferred"
    add("--known", metavar="NAME=1,...|CLASS", action="append", default=[], help=known)
    data = "shard set: of --key, of the mean differences of --set, and of the directions of --traverse"
    add("--data", metavar="DIR", help=data)
    add("--split", default="test", help="split of --data (default test)")
    images = "images of --data that are read for the mean differences and the directions (default 2000)"
    add("--images", metavar="N", type=int, default=2000, help=images)
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--out", metavar="FILE.png", type=Path, help="the picture (default: in MODEL/edited)")


def add_edits(options: argparse._ArgumentGroup) -> None:
    """Of --set; --strength and --steps are of --traverse too."""
    add = options.add_argument
    add("--set", metavar="NAME=1|CLASS", action="append", default=[], help="attribute (1 or 0), or class, to change to")
    strength = "of the edit: a number, several as 0,0.5,1 or a range as 0..1 (default 1); with --traverse in standard "
    strength += "deviations (default -3..3)"
    add("--strength", metavar="S", help=strength)
    add("--steps", metavar="N", type=int, default=7, help="of a range of strengths, or of --interpolate (default 7)")


def add_interpolation(options: argparse._ArgumentGroup) -> None:
    """Of --interpolate."""
    add = options.add_argument
    rows = "between two pictures: linearly in the upper row, spherically in the lower one"
    add("--interpolate", action="store_true", help=rows)
    add("--gif", action="store_true", help="also write the spherical interpolation as a GIF, back and forth")
    add("--webp", action="store_true", help="the same as a lossless WebP; --out FILE.gif or FILE.webp means it too")
    frames = "frames of the animation, from one end to the other (default 25)"
    add("--frames", metavar="N", type=int, default=25, help=frames)


def add_latent_groups(options: argparse._ArgumentGroup) -> None:
    """Of --keep-groups and --traverse."""
    add = options.add_argument
    kept = "numbers of first groups, resolutions (8x8: all groups up to it) or names of groups (default: each number)"
    add("--keep-groups", metavar="K", nargs="*", help=kept)
    moved = "latent group to move, such as 8x8_group03: the GROUP of the metrics' kl/GROUP"
    add("--traverse", metavar="GROUP", help=moved)
    add("--directions", metavar="D", type=int, default=4, help="principal directions of --traverse (default 4)")
    temperature = "of groups that follow from their priors: a number, or by resolution as 4x4=1.0,8x8=0.7 (default 0 "
    add("--temperature", metavar="T", help=temperature + "with --keep-groups, 1 with --traverse)")
    add("--seed", type=int, default=0, help="of the noise of the groups that --keep-groups does not keep (default 0)")


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
        kept=parsed.keep_groups,
        traversed=parsed.traverse,
        directions=parsed.directions,
        temperature=None if parsed.temperature is None else parse_temperature(parsed.temperature),
        seed=parsed.seed,
        strengths=parse_strengths(parsed.strength or ("-3..3" if parsed.traverse else "1"), parsed.steps),
        steps=parsed.steps,
        frames=parsed.frames,
        num_images=parsed.images,
    )
    trained = load(parsed.location, parsed.checkpoint, parsed.device)
    folder = results_folder(parsed.location)
    folder = folder if parsed.out else output_folder(folder, "edited")
    log_lines(first_lines(trained, request, parsed.out or folder))
    for path in write_edits(trained, request, picture_path(parsed.out), folder, animations(parsed)):
        log.info("written to %s", path)


def animations(parsed: argparse.Namespace) -> list[str]:
    """Suffixes of the animations to write."""
    own = parsed.out.suffix if parsed.out else ""
    return [suffix for suffix, chosen in ((".gif", parsed.gif), (".webp", parsed.webp)) if chosen or own == suffix]


def picture_path(out: Path | None) -> Path | None:
    """Of the PNG file beside an animation."""
    return out.with_suffix(".png") if out and out.suffix in (".gif", ".webp") else out


def check_arguments(parsed: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are missing, contradict each other, or are out of range."""
    pictures = len(parsed.image) + len(parsed.key)
    if not pictures:
        raise ValueError("give pictures with --image FILE..., or samples with --data DIR --key KEY...")
    if parsed.key and not parsed.data:
        raise ValueError("--key: give the shard set of the samples with --data DIR")
    if parsed.known and not parsed.image:
        raise ValueError("--known: applies to pictures of --image; samples of --key have their own attributes or class")
    actions = [bool(parsed.set), parsed.interpolate, parsed.keep_groups is not None, parsed.traverse is not None]
    if sum(actions) != 1:
        raise ValueError("give one of --set NAME=1, --interpolate, --keep-groups, --traverse GROUP")
    if parsed.interpolate and pictures != 2:
        raise ValueError(f"--interpolate: needs two pictures; {pictures} given")
    if parsed.traverse is not None and not parsed.data:
        raise ValueError("--traverse: give a shard set with --data DIR; the directions are those of its images")
    if parsed.temperature is not None and parsed.keep_groups is None and parsed.traverse is None:
        raise ValueError("--temperature: applies to --keep-groups and --traverse")
    if parsed.strength is not None and not (parsed.set or parsed.traverse):
        raise ValueError("--strength: applies to --set and --traverse")
    if animations(parsed) and not parsed.interpolate:
        raise ValueError("--gif, --webp: only --interpolate is animated")
    for option, least in (("steps", 2), ("frames", 2), ("images", 1), ("directions", 1)):
        if getattr(parsed, option) < least:
            raise ValueError(f"--{option} {getattr(parsed, option)}: must be at least {least}")
    if not 0 <= parsed.seed < 2**63:
        raise ValueError(f"--seed {parsed.seed}: must be from 0 to 2^63 - 1")
    if parsed.out is not None and parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out}: is a folder; name a file")
    if parsed.out is not None and parsed.out.suffix not in ("", ".png", ".gif", ".webp"):
        raise ValueError(f"--out {parsed.out}: pictures are PNG files; name it {parsed.out.with_suffix('.png').name}")


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

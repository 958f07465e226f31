"""Samples from a trained model: pictures, arrays, or a shard set.

python pipeline/sample.py runs/nvae --temperature 0.7 1.0
python pipeline/sample.py runs/nvae --temperature 4x4=1.0,8x8=0.7 --fix-groups 4x4
python pipeline/sample.py runs/mlp_cvae --classes 0-9 --per-class 10
python pipeline/sample.py runs/attribute_vae --attributes Smiling=1,Eyeglasses=0 --data data/toy_faces32
python pipeline/sample.py runs/mlp_cvae --per-class 500 --as-shards data/sampled_digits
"""

import argparse
import logging
import shlex
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, log_lines, log_next, run_python, run_tool  # noqa: E402
from pipeline.inference import draw_samples  # noqa: E402
from pipeline.inference.folders import output_folder  # noqa: E402
from pipeline.inference.latent_groups import (  # noqa: E402
    parse_first_groups,
    parse_temperature,
    resolve_temperature,
    temperature_text,
)
from pipeline.inference.load_model import load  # noqa: E402
from pipeline.inference.locations import HELP, results_folder  # noqa: E402
from pipeline.inference.parse_condition import parse_classes, parse_settings  # noqa: E402
from pipeline.inference.trained import TrainedModel  # noqa: E402

log = logging.getLogger("pipeline")
COUNT, PER_CLASS = 64, 10
TEMPERATURE = (
    "scale of the priors' sigmas (default 1): a number, or by resolution or group, as 4x4=1.0,8x8=0.7, "
    "with 1 for those that are not named; several temperatures give several pictures"
)
READJUST = "first re-estimate batch norm's statistics with N batches of such samples (default 0: do not)"
FIX_GROUPS = (
    "each row of the picture shares the latents of the first K groups, in the order of sampling (lowest resolution "
    "first), and its images show what the others change. K: a number, a resolution (8x8: all groups up to it), or a "
    "group's name (default: nothing is shared)"
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("sample.py", __doc__)
    add = parser.add_argument
    add("location", metavar="MODEL", help=HELP)
    add("--count", metavar="N", type=int, help=f"samples (default {COUNT}); with classes see --per-class")
    add("--classes", metavar="0-9,Shirt", help="classes by number or name, a row each (default: all)")
    add("--per-class", metavar="N", type=int, help=f"samples of each class (default {PER_CLASS})")
    add("--attributes", metavar="NAME=1,...", help="attributes present (1) or absent (0) in all samples")
    add("--data", metavar="DIR", help="shard set; the other attributes are those of its images (default: unknown)")
    add("--split", default="train", help="split of --data (default train)")
    add("--temperature", metavar="T", nargs="+", default=["1"], help=TEMPERATURE)
    add("--fix-groups", metavar="K", help=FIX_GROUPS)
    add("--seed", type=int, default=0, help="of the latent noise (default 0); another seed gives other samples")
    add("--readjust", metavar="N", type=int, default=0, help=READJUST)
    add("--checkpoint", default="latest", help="latest (default), best by validation, a step, or a checkpoint's folder")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--out", metavar="DIR", type=Path, help="folder for pictures and arrays (default MODEL/samples)")
    add("--npz", action="store_true", help="also write images and labels as arrays, in a .npz file")
    add("--as-shards", metavar="DIR", help="write the samples, with their labels, as a new shard set")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: sample(parsed))


def sample(parsed: argparse.Namespace) -> None:
    """From the command line to the files."""
    check_arguments(parsed)
    trained = load(parsed.location, parsed.checkpoint, parsed.device)
    plan = make_plan(trained, parsed)
    if parsed.fix_groups is not None:
        count = parse_first_groups(parsed.fix_groups, trained.model.groups, "--fix-groups")
        plan = draw_samples.with_fixed_groups(trained, plan, count)
    for temperature in map(parse_temperature, parsed.temperature):
        resolve_temperature(temperature, trained.model.groups)  # raises for unknown names, before anything is written
    log_lines(draw_samples.first_lines(trained, plan, parsed.temperature, [picture_folder(parsed), parsed.as_shards]))
    for temperature in map(parse_temperature, parsed.temperature):
        sample_at(temperature, trained, plan, parsed)
    log_next(next_commands(trained, parsed))


def next_commands(trained: TrainedModel, parsed: argparse.Namespace) -> list[str]:
    """What one does after looking at samples."""
    place = shlex.quote(parsed.location)
    if parsed.as_shards:
        return [f"python pipeline/train_classifier.py --data {shlex.quote(parsed.as_shards)} --out classifiers/samples"]
    commands = [f"python pipeline/sample.py {place} --seed {parsed.seed + 1}"]
    if len(trained.model.groups) > 1:
        commands.append(f"python pipeline/sample.py {place} --fix-groups 1")
    return [*commands, f"python pipeline/evaluate.py {place}"]


def picture_folder(parsed: argparse.Namespace) -> Path:
    """Where pictures and arrays are written."""
    return parsed.out or output_folder(results_folder(parsed.location), "samples")


def check_arguments(parsed: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are out of range or contradict each other."""
    for text in parsed.temperature:
        parse_temperature(text)
    if not 0 <= parsed.seed < 2**63:
        raise ValueError(f"--seed {parsed.seed}: must be from 0 to 2^63 - 1")
    if parsed.readjust < 0:
        raise ValueError(f"--readjust {parsed.readjust}: must be at least 0")
    if parsed.out is not None and parsed.out.exists() and not parsed.out.is_dir():
        raise ValueError(f"--out {parsed.out}: is a file; name a folder")
    if parsed.as_shards and len(parsed.temperature) > 1:
        raise ValueError("--as-shards: a shard set has samples of one temperature; give one --temperature")
    if parsed.as_shards and (Path(parsed.as_shards) / "manifest.json").exists():
        raise ValueError(f"--as-shards: {parsed.as_shards} holds a shard set already; name another folder")


def sample_at(
    temperature: float | dict[str, float], trained: TrainedModel, plan: draw_samples.Plan, parsed: argparse.Namespace
) -> None:
    """Samples at one temperature, and writes them."""
    model = trained
    if parsed.readjust:
        model = draw_samples.readjusted(trained, plan, temperature, parsed.seed, parsed.readjust)
    images = draw_samples.sample_images(model, plan, temperature, parsed.seed)
    name = f"samples_step_{trained.step:08d}_temperature_{temperature_text(temperature)}_seed_{parsed.seed}"
    if plan.fixed_groups:
        name += f"_fixed_{plan.fixed_groups}"
    stem = picture_folder(parsed) / name
    draw_samples.save_picture(Path(f"{stem}.png"), plan, images)
    log.info("%d samples of %s at step %d: %s.png", plan.count, trained.recipe.model.name, trained.step, stem)
    settings = {
        "checkpoint": trained.place,
        "temperature": temperature,
        "seed": parsed.seed,
        "readjust": parsed.readjust,
        "fixed_groups": plan.fixed_groups,
    }
    if parsed.npz:
        draw_samples.save_npz(Path(f"{stem}.npz"), trained, plan, images, settings)
        log.info("arrays: %s.npz", stem)
    if parsed.as_shards:
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "samples.npz"
            draw_samples.save_npz(arrays, trained, plan, images, settings)
            run_python(
                "-m", "shard_data", "npz", "--source", str(arrays), "--out", parsed.as_shards, "--name", "samples"
            )


def make_plan(trained: TrainedModel, parsed: argparse.Namespace) -> draw_samples.Plan:
    """The samples of the command line. Raises ValueError for options that do not apply to the model."""
    if parsed.count is not None and parsed.count < 1:
        raise ValueError(f"--count {parsed.count}: must be at least 1")
    if trained.classes or parsed.classes or parsed.per_class:
        if parsed.count is not None or parsed.attributes or parsed.data:
            raise ValueError("the model is conditional on classes: give --classes and --per-class alone")
        classes = parse_classes(parsed.classes, trained.classes) if parsed.classes and trained.classes else None
        return draw_samples.plan_classes(trained, classes, PER_CLASS if parsed.per_class is None else parsed.per_class)
    count = parsed.count or COUNT
    if trained.recipe.condition is None and not (parsed.attributes or parsed.data):
        return draw_samples.plan_count(trained, count)
    others = draw_samples.sample_conditions(trained, parsed.data, parsed.split, count) if parsed.data else None
    return draw_samples.plan_attributes(trained, parse_settings(parsed.attributes or ""), count, others)


if __name__ == "__main__":
    sys.exit(main())

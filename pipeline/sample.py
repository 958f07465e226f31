"""Draws samples of a trained model: pictures, arrays, or a shard set.

python pipeline/sample.py runs/nvae --temperature 0.7 1.0
python pipeline/sample.py runs/mlp_cvae --classes 0-9 --per-class 10
python pipeline/sample.py runs/attribute_vae --attributes Smiling=1,Eyeglasses=0 --data data/toy_faces32
python pipeline/sample.py runs/mlp_cvae --per-class 500 --as-shards data/drawn_digits
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

# A script's own folder comes first on the path; put the project's root there instead, so that `pipeline` is a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import run_python, run_tool  # noqa: E402
from pipeline.inference import draw_samples  # noqa: E402
from pipeline.inference.parse_condition import parse_classes, parse_settings  # noqa: E402
from pipeline.inference.trained import TrainedModel, load  # noqa: E402

log = logging.getLogger("pipeline")
COUNT, PER_CLASS = 64, 10


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a training run")
    add("--count", metavar="N", type=int, help=f"samples (default {COUNT}); with classes see --per-class")
    add("--classes", metavar="0-9,Shirt", help="classes by number or name, a row each (default: all)")
    add("--per-class", metavar="N", type=int, help=f"samples of each class (default {PER_CLASS})")
    add("--attributes", metavar="NAME=1,...", help="attributes that all samples have (1) or have not (0)")
    add("--data", metavar="DIR", help="shard set whose images lend the attributes that --attributes does not name")
    add("--split", default="train", help="split of --data (default train)")
    add("--temperature", metavar="T", type=float, nargs="+", default=[1.0], help="scale of the priors' sigmas")
    add("--seed", type=int, default=0, help="another seed, other samples (default 0)")
    add("--readjust", metavar="N", type=int, default=0, help="batches that re-estimate batch norm first (default 0)")
    add("--checkpoint", default="latest", help="latest (default), best by validation, or a checkpoint's folder")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--out", metavar="DIR", type=Path, help="folder for pictures and arrays (default RUN/drawn)")
    add("--npz", action="store_true", help="also write images and labels as arrays")
    add("--as-shards", metavar="DIR", help="write the samples, with their labels, as a shard set")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: sample(parsed))


def sample(parsed: argparse.Namespace) -> None:
    """From the command line to the files."""
    if parsed.as_shards and len(parsed.temperature) > 1:
        raise ValueError("--as-shards: a shard set has samples of one temperature; give one")
    if parsed.as_shards and (Path(parsed.as_shards) / "manifest.json").exists():
        raise ValueError(f"--as-shards: {parsed.as_shards} holds a shard set already; name another folder")
    trained = load(parsed.run, parsed.checkpoint, parsed.device)
    plan = make_plan(trained, parsed)
    for temperature in parsed.temperature:
        model = trained
        if parsed.readjust:
            model = draw_samples.readjusted(trained, plan, temperature, parsed.seed, parsed.readjust)
        images = draw_samples.draw(model, plan, temperature, parsed.seed)
        name = f"samples_step_{trained.step:08d}_temperature_{temperature:g}_seed_{parsed.seed}"
        stem = (parsed.out or parsed.run / "drawn") / name
        draw_samples.save_picture(Path(f"{stem}.png"), plan, images)
        log.info("%d samples of %s at step %d: %s.png", plan.count, trained.recipe.model.name, trained.step, stem)
        settings = {
            "checkpoint": str(trained.path),
            "temperature": temperature,
            "seed": parsed.seed,
            "readjust": parsed.readjust,
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
    """What the command line asks for. Raises ValueError where the model cannot be asked that."""
    if parsed.count is not None and parsed.count < 1:
        raise ValueError(f"--count {parsed.count}: ask for at least one sample")
    if trained.classes or parsed.classes or parsed.per_class:
        if parsed.count is not None or parsed.attributes or parsed.data:
            raise ValueError("the model is told classes: give --classes and --per-class alone")
        classes = parse_classes(parsed.classes, trained.classes) if parsed.classes and trained.classes else None
        return draw_samples.plan_classes(trained, classes, PER_CLASS if parsed.per_class is None else parsed.per_class)
    count = parsed.count or COUNT
    if trained.recipe.condition is None and not (parsed.attributes or parsed.data):
        return draw_samples.plan_count(trained, count)
    given = draw_samples.conditions_of(trained, parsed.data, parsed.split, count) if parsed.data else None
    return draw_samples.plan_attributes(trained, parse_settings(parsed.attributes or ""), count, given)


if __name__ == "__main__":
    sys.exit(main())

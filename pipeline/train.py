"""Trains a model as a recipe says, on one process or several.

    accelerate launch pipeline/train.py --model nvae
    accelerate launch pipeline/train.py --model nvae --dry-run
    accelerate launch pipeline/train.py --config my_recipe.yaml --data data/celeba64 train.batch_size=64 optim.lr=5e-3

Without --data, the recipe's own data set is used; a synthetic one is made where it is missing. To resume an interrupted
run, run the same command again.
"""

import argparse
import re
import sys
from difflib import get_close_matches
from pathlib import Path

if not __package__:  # run as a script, whose own folder comes first on the path; `pipeline` is found in its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli import CommandLine, run_tool  # noqa: E402
from pipeline.distributed.logs import launched_rank  # noqa: E402
from pipeline.distributed.preemption import StopRequest  # noqa: E402
from pipeline.recipe import RECIPES, load_recipe, recipe_path  # noqa: E402
from pipeline.run.attempt import FAILURES, INTERRUPTED, run_attempt  # noqa: E402
from pipeline.run.build import build_runtime  # noqa: E402
from pipeline.run.dry_run import describe  # noqa: E402
from pipeline.run.run_folder import default_folder  # noqa: E402

EPILOG = """Every setting of a recipe can be overridden, for instance: train.steps=500 train.micro_batch=16
train.precision=bf16 data.workers=4 checkpoint.every=1000 tracking.wandb=offline. --dry-run-all prints
all settings with their values; docs/settings.md explains them.

exit codes: 0 finished, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 1 the training diverged;
2 an error that the message explains; 80 to 83 a process failed or hung; 130 interrupted by Ctrl-C
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; overrides of settings are written `section.key=value`."""
    parser = CommandLine(
        "train.py",
        __doc__,
        EPILOG,
    )
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", metavar="NAME", help=f"train this model by its default recipe, or any recipe by name: {names}"
    )
    what.add_argument("--config", metavar="FILE", type=Path, help="a recipe file")
    parser.add_argument(
        "--data", metavar="DIR", help="the shard set to train on (data.root): a folder, or its http(s):// address"
    )
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and pictures go (default: runs/<recipe>)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|changed|never|PATH",
        default="auto",
        help="auto (default): resume from the run's last checkpoint, with the same settings. changed: also with "
        "other settings. never: refuse to resume. PATH: start from a checkpoint folder, or from the last checkpoint "
        "of a run folder",
    )
    parser.add_argument(
        "--init",
        metavar="PATH",
        help="start a new run from the weights of a checkpoint folder, or of the last checkpoint of a run folder: "
        "training begins at step 0, and the model may differ in some layers. A run that has checkpoints continues "
        "from them",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long to wait for the processes of an earlier attempt that still use the run folder (default: 60)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings that differ from the defaults, the model's size, the data and the number of steps, "
        "then stop",
    )
    parser.add_argument("--dry-run-all", action="store_true", help="the same, and every other setting with its default")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that replace the recipe's")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Overrides may be anywhere in it, and may begin with `--`, as W&B sweeps write them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if not re.match(r"(--)?\w+\.[\w.]+=", argument)]
    if unknown:
        options = re.findall(r"--[a-z-]+", parser.format_usage())
        similar = get_close_matches(unknown[0].partition("=")[0], options, n=1, cutoff=0.7)
        hint = (
            f"did you mean {similar[0]}?" if similar else "settings are written section.key=value, such as optim.lr=0.1"
        )
        parser.error(f"unknown argument {unknown[0]}; {hint}")
    if not (parsed.model or parsed.config):
        parser.error("one of --model NAME and --config FILE is needed, for instance --model nvae")
    if parsed.init and parsed.resume not in ("auto", "changed", "never"):
        parser.error("--init starts from weights alone and --resume PATH from the whole state; give one of them")
    parsed.overrides += rest
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 finished, or stopped by SIGTERM or SIGUSR1 with a checkpoint (status.json says which); 1 diverged;
    2 a user error; 130 interrupted by Ctrl-C; 80, 81, 82: see watchdog.
    """
    parsed = parse(arguments)
    return run_tool(lambda: run(parsed), "run the same command again", FAILURES)


def run(parsed: argparse.Namespace) -> int:
    """From the command line to a finished run."""
    path = recipe_path(parsed.model) if parsed.model else parsed.config
    recipe = load_recipe(path, parsed.overrides, parsed.data)
    folder = parsed.run_dir or default_folder(path.stem)
    if parsed.dry_run or parsed.dry_run_all:
        if launched_rank() == 0:
            print(describe(recipe, folder, all_settings=parsed.dry_run_all))
        return 0
    with StopRequest() as stop:
        runtime = build_runtime(recipe.train)
        runtime.watchdog.stacks = folder / "stacks"
        runtime.watchdog.is_stopping = lambda: stop.has_arrived
        with runtime.closing():
            may_make_data = parsed.data is None
            state = run_attempt(folder, recipe, runtime, stop, parsed.resume, parsed.init, parsed.wait, may_make_data)
    return INTERRUPTED if state == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())

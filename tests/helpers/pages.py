"""The commands, code and files of README.md and docs/guides, in the order in which a reader meets them.

    bash      each line is a command, run by bash; `  # ...` ends it
    python    code; with `# PATH.py` as its first line, a file
    yaml      a file, with `# PATH.yaml` as its first line
    diff      a change to files of the checkout, for `git apply`
    text      not run

A test adds options to commands that would take long (`SMALLER`); a reader sees none of them.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.recipe import RECIPES, load_recipe
from shard_data import ToyFaces, convert
from shard_data.__main__ import build_parser
from tests.helpers.launching import ROOT, run_command
from tests.helpers.mnist_files import write_mnist
from tests.helpers.release_files import write_release_file
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
SOURCES = ("pipeline", "shard_data", "accelerate_configs", "slurm", "tests")

PAPER = r"(nvae_(cifar10|celeba64|celebahq256|ffhq256|imagenet32|mnist)\b(?!_)|conv_vae)"
ONE_STEP = "train.steps=1 train.batch_size=2 validation.every=0 samples.every=0 tracking.wandb=disabled"
SMALLER = [
    (rf"pipeline/train\.py (?!.*--dry-run).*{PAPER}", "--dry-run"),
    (rf"pipeline/train\.py (?!.*--dry-run)(?!.*{PAPER})", ONE_STEP),
    (r"pipeline/evaluate\.py (?!.*--list)", "--images 4 --batch-size 4"),
    (r"pipeline/evaluate\.py .*--importance-samples", "--importance-samples 2"),
    (r"pipeline/evaluate\.py .*recognition", "--per-class 2"),
    (r"pipeline/train_classifier\.py", "--epochs 0.01 --width 4"),
    (r"pipeline/(sample|export)\.py .*--readjust", "--readjust 1"),
    (r"pipeline/edit\.py .*(--images|--traverse)", "--images 16"),
]
"""(commands, options): options that win, since they come last."""

REPLACED = {"accelerate_configs/multi_gpu.yaml": "accelerate_configs/cpu_2proc.yaml"}
"""Two processes of a CPU take the place of GPUs."""

NOT_RUN = {
    "git clone": "needs the repository's address",
    "make": "installs packages, runs the tests, or takes minutes",
    "source .venv": "the test has an environment",
    "python pipeline/report.py runs/mine --serve": "serves until it is stopped: tests/reporting",
    "pip install": "installs packages: a test builds and installs the wheel",
}
"""Starts of commands, and why they are not run."""

SBATCH = """#!/usr/bin/env bash
# In place of SLURM's: accepts a job whose script exists.
for word in "$@"; do
    case $word in *.sh) [ -f "$word" ] && echo "Submitted batch job 1" && exit ;; esac
done
echo "no such script: $*" >&2
exit 1
"""


class Step(NamedTuple):
    """A command, or a block of another language."""

    kind: str
    text: str


def steps(page: Path) -> list[Step]:
    """What a reader of the page does, in order."""
    found = []
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "bash":
            lines = (line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            found += [Step(kind, line) for line in lines if line]
        elif kind != "text":
            found.append(Step(kind, block))
    return found


def why_not_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


class Checkout:
    """A copy of the sources, in which each step is taken once, however many pages show it."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, set()
        for name in SOURCES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        prepare(folder)

    def take(self, step: Step) -> None:
        """Runs or writes it, and fails with its output. Skips what was done already, and what cannot be run here."""
        if step in self.done or (step.kind == "bash" and why_not_run(step.text)):
            return
        if step.kind == "bash":
            self.run("bash", "-c", self.completed(step.text))
        elif step.kind == "diff":
            (self.folder / "change.diff").write_text(step.text)
            self.run("git", "apply", "--unidiff-zero", "change.diff")
        elif name := FILE.match(step.text):
            (self.folder / name[1]).write_text(step.text if step.kind == "yaml" else step.text.split("\n", 1)[1])
        else:
            assert step.kind == "python", f"a block of {step.kind} without the name of its file"
            self.run(sys.executable, "-c", step.text, PYTHONPATH=str(self.folder))
        self.done.add(step)

    def run(self, *command: str, **environment: str) -> None:
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        defaults = {"HOME": str(self.folder / "home"), "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        result = run_command(*command, cwd=self.folder, **{"PYTHONPATH": "", **defaults, **environment})
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"

    def completed(self, command: str) -> str:
        """The command with the test's options, and with what is at hand here in place of what is not."""
        command = " ".join([command, *(options for pattern, options in SMALLER if re.search(pattern, command))])
        for name, other in REPLACED.items():
            command = command.replace(name, other)
        if "-m shard_data" not in command:
            return command
        if re.search(r"shard_data (celeba|cifar10)", command):  # a large download: only that it can be typed
            assert build_parser().parse_args(command.split()[3:]).source
            return "true"
        originals = self.folder / "data/originals/mnist"
        real = (originals / "train-images-idx3-ubyte.gz").is_symlink()
        command = command if real else command.replace(" --download", "")
        return command.replace("--source DIR", "--source ~/pictures")


def prepare(folder: Path) -> None:
    """The user's files: pictures, originals of MNIST, a checkpoint of the release. Sets and runs of long commands."""
    for name in ("bin", "home", "data/originals"):
        (folder / name).mkdir(parents=True)
    (folder / "bin/sbatch").write_text(SBATCH)
    (folder / "bin/sbatch").chmod(0o755)
    place_mnist(folder / "data/originals/mnist")
    pixels = np.random.default_rng(0).integers(0, 256, (72, 80, 3), dtype=np.uint8)
    for number in range(60):
        place = folder / "home/pictures" / ("cats", "dogs")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pixels, number, 0)).save(place)
    Image.fromarray(pixels).save(folder / "face.png")
    write_release_file(folder / "checkpoint.pt")
    convert(ToyFaces(size=32, train=16, val=16, test=20), folder / "data/toy_faces32")
    for name in ("nvae_mnist", "nvae_cifar10", "nvae_celeba64"):
        make_trained(folder, name)


def place_mnist(folder: Path) -> None:
    """The real files if there are any, otherwise small ones."""
    if "REAL_DATA_DIR" not in os.environ:
        write_mnist(folder)
        return
    folder.mkdir()
    for file in (Path(os.environ["REAL_DATA_DIR"]) / "mnist").glob("*.gz"):
        (folder / file.name).symlink_to(file)


def make_trained(folder: Path, name: str) -> None:
    """A run of a recipe that takes GPUs, with a narrow model that was never trained, and a small set."""
    small = [
        "model.groups_per_scale=[1]",
        "model.encoder_channels=4",
        "model.decoder_channels=4",
        "train.precision=fp32",
    ]
    recipe = load_recipe(RECIPES / f"{name}.yaml", small)
    size = recipe.data.size
    if name != "nvae_mnist":  # whose set is made from the originals
        images = {split: random_samples(8, size, size, 3) for split in ("train", "val", "test")}
        write_set(folder / recipe.data.root, images, [8])
    make_run(folder / f"runs/{name}", recipe.model_dump(mode="json"))

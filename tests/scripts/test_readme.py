"""The README's commands and Python code, run as written in a copy of the checkout that holds small data and runs.

Training commands get a few overrides more, so that they take one step. What this machine cannot run is in `NOT_RUN`.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.recipe import RECIPES, load_recipe
from shard_data import ToyFaces, convert
from shard_data.__main__ import build_parser
from tests.helpers.launching import ROOT, run_command
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
LINES = [line.split("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [line for line in LINES if line]
ONE_STEP = shlex.split(
    "train.steps=1 train.epochs=null train.batch_size=2 validation.every=0 samples.every=0 tracking.wandb=disabled"
)
PAPER = ("nvae_celeba64", "nvae_cifar10", "nvae_mnist.yaml")
NOT_RUN = {
    "git clone": "needs the repository's address",
    "python pipeline/convert.py": "needs a file of the release: tests/scripts/test_convert.py",
    "make": "runs the tests, or takes minutes",
    "sbatch": "needs a cluster: tests/test_slurm.py",
    "slurm/": "needs a cluster: tests/test_slurm.py",
    "python pipeline/launch.py --config_file accelerate_configs/multi_gpu": "needs GPUs: test_launch.py",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources with the sets and runs that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pipeline", "shard_data", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    convert(ToyFaces(size=32, train=16, val=16, test=8), folder / "data/toy_faces32")
    convert(ToyFaces(size=64, train=8, val=8, test=8), folder / "data/celeba64")
    digits = {split: random_samples(20, 28, 28, 1) for split in ("train", "test")}
    write_set(folder / "data/mnist", digits, [20])
    classes = [str(digit) for digit in range(10)]
    make_run(folder / "runs/mlp_cvae", load_recipe(RECIPES / "mlp_cvae.yaml", []).model_dump(mode="json"), classes)
    faces = load_recipe(RECIPES / "attribute_vae.yaml", ["model.classification_weight=0", "model.classifier=null"])
    make_run(folder / "runs/attribute_vae", faces.model_dump(mode="json"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "face.png")
    (folder / "pictures").mkdir()
    for number in range(40):
        Image.fromarray(np.roll(pixels, number, 0)).save(folder / f"pictures/{number}.png")
    return folder


def why_not_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def completed(command: str) -> list[str]:
    """The command's words, with this Python, and short where it would train for long."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    if words[:2] == ["accelerate", "launch"]:
        cpu = ["--config_file", "accelerate_configs/cpu.yaml"]
        words[:2] = [sys.executable, "-m", "accelerate.commands.launch", *([] if "--config_file" in words else cpu)]
    if "pipeline/train.py" in words and "--dry-run" not in words:
        words += ["--dry-run"] if any(name in command for name in PAPER) else ONE_STEP
    return words


def test_the_readme_has_commands():
    assert len(COMMANDS) > 12
    assert sum(why_not_run(command) is None for command in COMMANDS) > 8


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("python -m shard_data")])
def test_a_command_works_as_written(checkout, command):
    if reason := why_not_run(command):
        pytest.skip(reason)
    if "runs/nvae" in command and not (checkout / "runs/nvae").exists():  # the first training command makes it
        train = next(command for command in COMMANDS if "--model nvae" in command)
        run_command(*completed(train), cwd=checkout, PYTHONPATH="", OMP_NUM_THREADS="1")
    result = run_command(*completed(command), cwd=checkout, PYTHONPATH="", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m shard_data")])
def test_a_command_of_shard_data_works_as_written(checkout, command):
    """Where the originals are an official download, only that the command line is accepted: its source has tests."""
    words = completed(command)
    if any(source in words for source in ("celeba", "cifar10")):
        assert build_parser().parse_args(words[3:]).source
        return
    words = [str(checkout / "pictures") if word == "DIR" else word for word in words]
    result = run_command(*words, cwd=checkout, PYTHONPATH="")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python_code_works_as_written(checkout, code):
    result = run_command(sys.executable, "-c", code, cwd=checkout, PYTHONPATH=str(checkout), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-3000:]

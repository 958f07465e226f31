"""The wheel, installed in an environment of its own, as a user has it who has no checkout.

torch and the other dependencies are those of the environment that runs the tests. Nothing is downloaded.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.cli import with_installed_names
from tests.helpers.launching import ROOT, run_command

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PACKAGES = ("pipeline", "shard_data")
TOP_LEVEL = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
SHORT = shlex.split(
    "train.epochs=null train.batch_size=2 train.cpu_threads=1 validation.every=0 samples.every=0 data.root=faces "
    "data.workers=0 'data.source=toy_faces --size 32 --train 8 --val 8 --test 8' tracking.wandb=disabled "
    "model.encoder_channels=4 model.decoder_channels=4"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as pip builds it, from the sources alone: what an earlier build left in the checkout plays no part."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    built = run_command(sys.executable, "-W", "ignore", "-c", build, cwd=sources)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The environment's folder of programs. Only the wheel is installed; the rest is read where it is."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(TOP_LEVEL))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    installed = run_command(*pip, "--quiet", "--no-index", "--no-deps", str(wheel), cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


@pytest.fixture
def call(programs, tmp_path):
    """Runs a command outside of the checkout, and fails with its errors unless it ends with `code`."""

    def call(*command: str, code: int = 0) -> subprocess.CompletedProcess:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        ended = run_command(str(programs / command[0]), *command[1:], cwd=tmp_path, PATH=path, PYTHONPATH="")
        assert ended.returncode == code, ended.stderr
        return ended

    return call


def test_everything_that_the_packages_hold_is_in_the_wheel(wheel):
    """Recipes, tables of defaults, the page of the report with its library and the library's license."""
    held = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    held = {name for name in held if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {Path(name).suffix for name in held} >= {".py", ".yaml", ".json", ".html", ".css", ".js"}
    assert packed == held


def test_each_command_is_named_after_its_module():
    modules = {target: target.removesuffix(":main").removesuffix(".__main__") for target in COMMANDS.values()}
    assert {with_installed_names(f"python -m {module}"): target for target, module in modules.items()} == COMMANDS


HELP_OF_ALL = """
import contextlib, importlib, io, json, os, sys
helps = {}
for name, target in json.loads(sys.argv[1]).items():
    module, function = target.split(":")
    sys.argv = [os.path.join(os.path.dirname(sys.executable), name), "--help"]
    main = getattr(importlib.import_module(module), function)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    helps[name] = out.getvalue()
import pipeline
print(json.dumps({"helps": helps, "package": pipeline.__file__}))
"""


def test_help_names_the_commands_that_are_installed(programs, tmp_path):
    """The scripts of a checkout are not there. One process for all, since each imports torch for seconds."""
    ended = run_command(
        str(programs / "python"), "-c", HELP_OF_ALL, json.dumps(COMMANDS), cwd=tmp_path, PYTHONPATH="", COLUMNS="200"
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert Path(found["package"]).is_relative_to(programs.parent)
    for name, text in found["helps"].items():
        assert re.match(rf"usage: {name}\b", text), text
        assert set(re.findall(r"\bnvae-[a-z]+(?:-[a-z]+)*", text)) <= COMMANDS.keys() | {"nvae-pipeline"}
        if name != "nvae-launch":  # accelerate's own words follow
            assert re.findall(r"\S*\w\.py\b|python -m \w+|docs/\S+", text) == []
    assert all((programs / name).is_file() for name in COMMANDS)


@pytest.mark.slow
def test_the_demo_is_trained_outside_of_a_checkout(call, tmp_path):
    """Its data are made by a command that it starts. Then two processes resume it, and other commands use it."""
    trained = call("nvae-train", "--model", "nvae", *SHORT, "train.steps=1")
    assert "faces is missing; making it once" in trained.stderr
    two = ["--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml"), "--main_process_port", "0"]
    more = ["-m", "pipeline.train", "--model", "nvae", *SHORT]
    call("nvae-launch", *two, *more, "--resume", "changed", "train.steps=2")
    accelerate = ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    call(*accelerate, *more, "--resume", "changed", "train.steps=3")
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/nvae/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]
    call("nvae-sample", "runs/nvae", "--count", "2")
    assert (tmp_path / "runs/nvae/samples").is_dir()
    call("nvae-report", "runs/nvae")
    assert "uPlot" in (tmp_path / "runs/nvae/report.html").read_text()
    assert call("nvae-status", "runs/nvae").stdout == "finished\n"
    (tmp_path / "mine.yaml").write_text(call("nvae-recipe", "mlp_vae").stdout)
    assert "ConfigError" not in call("nvae-train", "--config", "mine.yaml", "--dry-run").stdout
    assert "error: no MODEL" in call("nvae-evaluate", code=2).stderr
    assert call("nvae-train", "--modle", "nvae", code=2).stderr.splitlines()[-1].startswith("nvae-train: error: ")

"""sweeps/nvae_small.yaml as written, by wandb's own commands, on the stand-in server; only its trials are short."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.run_folder import default_folder
from shard_data import ToyFaces, convert
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.trackers import KEY
from tests.helpers.wandb_server import WandbServer

SHORT = {"train.steps": 2, "validation.images": 8, "samples.count": 8, "samples.reconstructions": 4}
PROGRAMS = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), str(Path(sys.prefix) / "bin")]))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources, and a small data set in the place that the recipe names."""
    for name in ("pipeline", "shard_data", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    convert(ToyFaces(size=32, train=16, val=16, test=8), tmp_path / "data/toy_faces32")
    return tmp_path


def wandb(checkout: Path, server: WandbServer, *words: str) -> str:
    """The messages of a wandb command."""
    environment = clean_environment(
        WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, PATH=f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    )
    environment.pop("WANDB_MODE", None)
    command = [str(Path(sys.executable).parent / "wandb"), *words]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert KEY not in result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_three_trials_of_the_sweep(checkout):
    with WandbServer() as server:
        server.shortened = SHORT
        created = wandb(checkout, server, "sweep", "sweeps/nvae_small.yaml")
        assert "wandb agent stand-in/nvae-pipeline/sweep1" in created
        messages = wandb(checkout, server, "agent", "stand-in/nvae-pipeline/sweep1")
    assert sorted(os.listdir(checkout / "runs")) == ["nvae-trial0", "nvae-trial1", "nvae-trial2"], messages
    assert sorted(server.runs) == ["trial0", "trial1", "trial2"]
    rates = []
    for name, run in server.runs.items():
        folder = checkout / f"runs/nvae-{name}"
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert (folder / "wandb_run_id").read_text().strip() == name
        assert (run.sweep, run.project, run.exit_codes) == ("sweep1", "nvae-pipeline", [0])
        (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (row,) = run.history
        assert row["val/bpd"] == record["val/bpd"] > 0
        rates.append(json.loads(run.config)["optim"]["value"]["lr"])
    assert rates == [5e-3, 1e-2, 1.5e-2]


@pytest.mark.parametrize(
    ("sweep", "run_id", "folder"),
    [
        (None, None, "runs/nvae"),
        (None, "abc", "runs/nvae"),  # a run id alone is a user's
        ("s1", "abc123", "runs/nvae-abc123"),
        ("s1", "../abc", "runs/nvae"),
    ],
)
def test_the_run_folder_follows_the_trial(monkeypatch, sweep, run_id, folder):
    for name, value in (("WANDB_SWEEP_ID", sweep), ("WANDB_RUN_ID", run_id)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert default_folder("nvae") == Path(folder)

"""The workspace of a W&B project, made from code: what it holds, and how it is saved on the stand-in server."""

import json
import re
import sys

import pytest

from pipeline.config import load_yaml
from pipeline.evaluation.sample_grids import SamplesConfig
from pipeline.recipe import RECIPES
from pipeline.tracking import dashboard
from tests.helpers.launching import ROOT

pytest.importorskip("wandb_workspaces", reason="the package wandb-workspaces is not installed")

RANKS = ("", "_min", "_max")
TEMPERATURES = ("0", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")
PANELS = {
    "Objective": [
        ["train/loss"],
        ["train/elbo", "val/elbo"],
        ["train/bpd", "val/bpd"],
        ["train/log_px", "val/log_px"],
        ["train/kl", "val/kl"],
        ["train/beta"],
        ["train/lr"],
    ],
    "Latent groups": [["kl_by_group"], "^kl/.*", "^active_units/.*"],
    "Samples": [[f"samples/temperature_{temperature}" for temperature in TEMPERATURES], ["reconstructions"]],
    "Stability": [
        ["train/grad_norm"],
        ["train/skipped_steps", "train/skipped_by_norm"],
        ["train/skipped_samples"],
        ["train/spectral"],
        ["train/batch_norm"],
    ],
    "Throughput": [
        ["perf/images_per_second"],
        [f"perf/step_ms{end}" for end in RANKS],
        [f"perf/data_wait{end}" for end in RANKS],
        [f"perf/gpu_memory_gib{end}" for end in RANKS],
        [f"perf/host_memory_gib{end}" for end in RANKS],
        ["perf/mfu"],
        ["perf/checkpoint_stall_ms"],
    ],
    "Validation": [["val/elbo"], ["val/bpd"], ["val/nll"], ["val/bpd_nll"]],
}
"""Of each section, in order: the keys of each panel, or the pattern of its keys."""


def panels_of(spec: dict) -> dict:
    """As PANELS, from the JSON that W&B gets."""
    found = {}
    for section in spec["section"]["panelBankConfig"]["sections"]:
        configs = [panel["config"] for panel in section["panels"]]
        found[section["name"]] = [
            config.get("mediaKeys") or config.get("metrics") or config["metricRegex"] for config in configs
        ]
    return found


def printed(capsys, *arguments: str) -> dict:
    assert dashboard.main(["--project", "digits", *arguments, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_prints_the_workspace_as_json(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server, and none is needed
    view = printed(capsys, "--entity", "team")
    assert {key: view[key] for key in ("entity", "project", "name")} == {
        "entity": "team",
        "project": "digits",
        "name": "NVAE pipeline",
    }
    assert panels_of(view["spec"]) == PANELS
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    kinds = {panel["viewType"] for section in sections for panel in section["panels"]}
    assert kinds == {"Run History Line Plot", "Media Browser"}
    galleries = [panel["config"] for section in sections for panel in section["panels"] if section["name"] == "Samples"]
    assert all(config["gallerySettings"]["axis"] == "step" for config in galleries)  # media by step
    norm = sections[3]["panels"][0]["config"]
    assert norm["yLogScale"] is True
    assert printed(capsys, "--entity", "team") == view  # the same each time


def test_galleries_name_the_temperatures_of_all_recipes():
    recipes = [load_yaml(path).get("samples", {}).get("temperatures", ()) for path in RECIPES.glob("*.yaml")]
    temperatures = {f"{value:g}" for values in [SamplesConfig().temperatures, *recipes] for value in values}
    assert temperatures <= set(dashboard.TEMPERATURES)


def test_it_is_created_once_and_then_updated(server, capsys):
    assert dashboard.main(["--project", "stand-in"]) == 0
    address = capsys.readouterr().out.strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/stand-in/stand-in\?nw=nvaepipelin", address)
    ((name, view),) = server.views.items()
    assert panels_of(json.loads(view["spec"])) == PANELS
    changed = json.loads(view["spec"])
    changed["section"]["panelBankConfig"]["sections"] = []
    changed["section"]["runSets"][0]["search"]["query"] = "seed"  # what a user has saved
    server.views[name]["spec"] = json.dumps(changed)
    assert dashboard.main(["--project", "stand-in", "--entity", "stand-in"]) == 0
    ((_, view),) = server.views.items()
    assert panels_of(json.loads(view["spec"])) == PANELS
    assert json.loads(view["spec"])["section"]["runSets"][0]["search"]["query"] == "seed"
    assert (server.saves, server.unknown) == (2, [])


def test_a_library_that_takes_no_id_is_named_and_nothing_is_saved(server, capfd, monkeypatch):
    """As when a later version renames the private field, or computes it: without an id, each call would make another
    workspace.
    """
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    fixed = f"pip install wandb-workspaces=={dashboard.TESTED}"
    ignored = property(lambda workspace: "", lambda workspace, name: None)
    with monkeypatch.context() as changed:
        changed.setattr(workspaces.Workspace, "_internal_name", ignored)
        assert dashboard.main(["--project", "stand-in"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "a new workspace does not take an id, so that each call would make another one" in error
    assert fixed in error
    monkeypatch.delattr(workspaces.Workspace, "_to_model")
    assert dashboard.main(["--project", "stand-in", "--dry-run"]) == 2
    assert fixed in capfd.readouterr().err
    assert (server.saves, server.views) == (0, {})
    assert f"wandb-workspaces=={dashboard.TESTED}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_errors_name_the_cause(server, capfd, monkeypatch):
    def error_of(*arguments):
        assert dashboard.main(arguments) == 2
        return capfd.readouterr().err.splitlines()[-1]

    missing = error_of("--project", "other")
    assert "workspace of project 'other' cannot be saved" in missing
    assert "not found" in missing
    monkeypatch.delenv("WANDB_API_KEY")
    assert "no W&B key found: set WANDB_API_KEY" in error_of("--project", "stand-in")
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, name, None)  # so that its import fails
    assert "wandb-workspaces is not installed: pip install wandb-workspaces. Without it" in error_of(
        "--project", "p", "--dry-run"
    )

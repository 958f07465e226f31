"""Makes the page of a W&B project, a saved workspace, from code: `python -m pipeline.tracking.dashboard --project P`.

The only module that imports wandb_workspaces.
"""

import argparse
import json
import sys
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from pipeline.cli import CommandLine, run_tool
from pipeline.tracking.wandb_metrics import KL_BY_GROUP
from pipeline.tracking.wandb_service import default_entity, describe, find_key

DESCRIPTION = """Creates the workspace "NVAE pipeline" of a Weights & Biases (W&B) project, or updates it.

Its sections: Objective, Latent groups, Samples (pictures by step), Stability, Throughput, Validation. An update
replaces these sections, and keeps the selection, filters and colors of runs that were saved there.

examples:
  python -m pipeline.tracking.dashboard --project nvae-pipeline
  python -m pipeline.tracking.dashboard --project nvae-pipeline --entity my-team
  python -m pipeline.tracking.dashboard --project nvae-pipeline --dry-run
"""
EXIT_CODES = "exit codes: 0 done; 2 an error that the message explains; 130 interrupted by Ctrl-C"
NAME = "NVAE pipeline"
VIEW = "nvaepipelin"
"""W&B's id of the workspace within its project, eleven letters as W&B's own: the `nw=` of its address."""

TESTED = "0.4.13"
"""The version of wandb-workspaces that this was tested with. It has no public way to choose the id of a new workspace,
nor to see what would be saved; its private names for both may change.
"""

TEMPERATURES = ("0", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")
"""Of `samples/temperature_T`. W&B's panels of pictures name each key; those that a project lacks stay empty."""

CURVES = {
    "Objective": {
        "Loss": ["train/loss"],
        "ELBO, nats": ["train/elbo", "val/elbo"],
        "Bits per dimension": ["train/bpd", "val/bpd"],
        "Log-likelihood of the pixels, nats": ["train/log_px", "val/log_px"],
        "KL, nats": ["train/kl", "val/kl"],
        "Weight of the KL": ["train/beta"],
        "Learning rate": ["train/lr"],
    },
    "Stability": {
        "Gradient norm": ["train/grad_norm"],
        "Skipped steps, and those by their gradient's norm": ["train/skipped_steps", "train/skipped_by_norm"],
        "Skipped samples": ["train/skipped_samples"],
        "Sum of spectral norms": ["train/spectral"],
        "Sum of batch norm's scales": ["train/batch_norm"],
    },
    "Throughput": {
        "Images per second": ["perf/images_per_second"],
        "Milliseconds per step, and extremes over ranks": ["perf/step_ms", "perf/step_ms_min", "perf/step_ms_max"],
        "Share of time waiting for data": ["perf/data_wait", "perf/data_wait_min", "perf/data_wait_max"],
        "GPU memory, GiB": ["perf/gpu_memory_gib", "perf/gpu_memory_gib_min", "perf/gpu_memory_gib_max"],
        "Host memory, GiB": ["perf/host_memory_gib", "perf/host_memory_gib_min", "perf/host_memory_gib_max"],
        "Model FLOPs utilization": ["perf/mfu"],
        "Wait for a checkpoint, ms": ["perf/checkpoint_stall_ms"],
    },
    "Validation": {
        "ELBO, nats": ["val/elbo"],
        "Bits per dimension": ["val/bpd"],
        "Negative log-likelihood, nats": ["val/nll"],
        "Bits per dimension of the likelihood": ["val/bpd_nll"],
    },
}
"""Sections of line plots: the keys of each plot, by its title."""
LOG_SCALE = ("Gradient norm",)
"""Plots with a logarithmic y-axis."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("python -m pipeline.tracking.dashboard", DESCRIPTION, EXIT_CODES)
    parser.add_argument("--project", required=True, help="the W&B project (tracking.project), which has a run")
    parser.add_argument("--entity", help="the W&B user or team (default: that of your W&B key)")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON, and send nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: see run_tool."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Prints or saves the workspace. Raises ValueError where that is not possible."""
    load_library()
    if parsed.dry_run:
        print(json.dumps(as_json(parsed.entity or "", parsed.project), indent=1))
        return
    if not find_key():
        raise ValueError("no W&B key found: set WANDB_API_KEY or run `wandb login`; --dry-run needs none")
    try:
        workspace = find_workspace(parsed.entity or default_entity(), parsed.project)
        workspace.save()
    except Exception as error:  # wandb_workspaces raises many kinds
        raise ValueError(f"the workspace of project {parsed.project!r} cannot be saved: {describe(error)}") from None
    print(workspace.url)


def load_library() -> Any:
    """wandb_workspaces.workspaces. Raises ValueError where it is not installed."""
    try:
        from wandb_workspaces import workspaces
    except ImportError:
        raise ValueError(
            "the package wandb-workspaces is not installed: pip install wandb-workspaces. Without it W&B arranges the "
            "same keys by itself, and python pipeline/report.py RUN --serve shows a run without W&B"
        ) from None
    return workspaces


def find_workspace(entity: str, project: str) -> Any:
    """The saved workspace with its sections replaced, or a new one that is not saved yet."""
    library = load_library()
    try:
        workspace = library.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={VIEW}")
    except ValueError as error:
        if not str(error).startswith("Workspace"):  # the project is missing
            raise
        workspace = new_workspace(entity, project)
        set_view(workspace)
    workspace.sections = sections()
    return workspace


def set_view(workspace: Any) -> None:
    """Gives a new workspace the id VIEW, by which the next call finds it. Raises ValueError where it takes none."""
    with suppress(AttributeError):
        workspace._internal_name = f"nw-{VIEW}-v"
        if workspace.url.endswith(f"?nw={VIEW}"):
            return
    raise unsupported_library("a new workspace does not take an id, so that each call would make another one")


def unsupported_library(problem: str) -> ValueError:
    """For a version of wandb-workspaces without the private names that are used here."""
    found = version("wandb-workspaces")
    return ValueError(f"wandb-workspaces {found}: {problem}; use {TESTED}: pip install wandb-workspaces=={TESTED}")


def new_workspace(entity: str, project: str) -> Any:
    """A workspace with the project's sections, and no panels that W&B generates."""
    library = load_library()
    return library.Workspace(entity=entity, project=project, name=NAME, sections=sections())


def sections() -> list[Any]:
    """The sections in the order of the page."""
    library = load_library()
    panels = {name: [line_plot(title, keys) for title, keys in plots.items()] for name, plots in CURVES.items()}
    ordered = {
        "Objective": panels["Objective"],
        "Latent groups": latent_groups(),
        "Samples": pictures(),
        **{name: panels[name] for name in ("Stability", "Throughput", "Validation")},
    }
    small, large = (library.SectionLayoutSettings(columns=columns, rows=3) for columns in (3, 1))
    return [
        library.Section(name=name, panels=plots, is_open=True, layout_settings=large if name == "Samples" else small)
        for name, plots in ordered.items()
    ]


def line_plot(title: str, keys: list[str]) -> Any:
    """Curves over steps."""
    from wandb_workspaces.reports import v2

    return v2.LinePlot(title=title, y=keys, log_y=title in LOG_SCALE or None)


def latent_groups() -> list[Any]:
    """The KL by group, which W&B draws over steps as a heat map, and the curves of all groups."""
    from wandb_workspaces.reports import v2

    return [
        line_plot("KL by group, nats (bar i: group i in the order of sampling)", [KL_BY_GROUP]),
        v2.LinePlot(title="KL of each group, nats", metric_regex="^kl/.*"),
        v2.LinePlot(title="Active units of each group", metric_regex="^active_units/.*"),
    ]


def pictures() -> list[Any]:
    """Galleries with a slider over steps."""
    from wandb_workspaces.reports import v2

    samples = [f"samples/temperature_{temperature}" for temperature in TEMPERATURES]
    galleries = {"Samples of the prior": samples, "Reconstructions (above: originals)": ["reconstructions"]}
    return [
        v2.MediaBrowser(title=title, media_keys=keys, mode="gallery", gallery_axis="step")
        for title, keys in galleries.items()
    ]


def as_json(entity: str, project: str) -> dict[str, Any]:
    """What would be sent, without the ids that each call draws at random."""
    try:
        view = new_workspace(entity, project)._to_model()
    except AttributeError:
        raise unsupported_library("it cannot show a workspace without saving it, as --dry-run does") from None
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": entity, "project": project, "name": NAME, "view": VIEW, "spec": without_ids(spec)}


def without_ids(value: Any) -> Any:
    """JSON without its `__id__` and `id`."""
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in ("__id__", "id")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())

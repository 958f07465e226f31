"""What may differ between a checkpoint and the command that continues it."""

from collections.abc import Mapping
from typing import Any

from pipeline.config import flatten, with_present_names

CHANGEABLE = (
    "train.steps",
    "train.epochs",
    "train.micro_batch",
    "train.precision",
    "train.channels_last",
    "train.compile",
    "train.cpu_threads",
    "train.expect_processes",
    "train.max_skipped_steps",
    "train.collective_timeout",
    "optim.lr",
    "optim.lr_min",
    "optim.clip",
    "model.classifier",
    "data.root",
    "data.source",
    "data.cache",
    "data.verify",
    "data.on_error",
    "data.workers",
    "data.trace",
    "checkpoint.",
    "tracking.",
    "validation.",
    "samples.",
)
"""Settings, or whole sections, that may change when a run is resumed. Anything else would make it another run."""


def changed_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs and may. Raises ValueError naming those that may not."""
    old, new = flatten(with_present_names(saved)), flatten(wanted)
    paths = [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
    lines = {path: f"{path}: {old.get(path)} -> {new.get(path)}" for path in paths}
    refused = [line for path, line in lines.items() if not path.startswith(CHANGEABLE)]
    if refused:
        raise ValueError(
            "the checkpoint was made with other settings:\n  "
            + "\n  ".join(refused)
            + "\nGive the old settings to continue it, or start another run with --run-dir."
        )
    return list(lines.values())


def check_fingerprint(saved: str, found: str) -> None:
    """Raises ValueError where the data are not those that the run began with."""
    if saved != found:
        raise ValueError(
            f"data.root: the checkpoint was trained on data with fingerprint {saved[:12]}, this is {found[:12]}; "
            "give the old data with --data, or start another run with --run-dir"
        )

"""Where a trained model is: a run, a checkpoint, a model folder, or a repository of the Hugging Face Hub."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.inference import hub
from pipeline.storage.checkpoint import Checkpoints
from pipeline.storage.checkpoint_folder import FOLDER_NAME, META, Checkpoint, read_folder
from pipeline.storage.run_id import read_run_id

LOCATIONS = "a run folder, a checkpoint's folder, a model folder, local-dir:FOLDER, or hf-hub:OWNER/NAME[@REVISION]"

HELP = f"{LOCATIONS}; files are written into that folder, for hf-hub into ./OWNER--NAME, unless --out is given"
"""Of the argument of the tools."""
LOCAL, HUB = "local-dir:", "hf-hub:"
_RUN_FOLDER = "give the folder of a run"


class Found(NamedTuple):
    """A checkpoint, verified, and the location that names exactly this one."""

    checkpoint: Checkpoint
    place: str
    """The folder's path, or hf-hub:OWNER/NAME@COMMIT."""


def find_model(location: Path | str, checkpoint: Path | str | int = "latest") -> Found:
    """The checkpoint at a location (see LOCATIONS). `checkpoint` chooses one of a run: "latest", "best", a step, or a
    checkpoint's folder.

    Raises ValueError if there is none, with the steps that are available in a run.
    """
    if is_hub(location):
        repository = hub.parse_repository(str(location).removeprefix(HUB))
        _check_only_one(location, checkpoint)
        folder, commit = hub.pull(repository)
        # The library's cache holds links to its own files.
        return Found(read_folder(folder, follow=True), f"{HUB}{repository.name}@{commit}")
    path = local_path(location)
    if os.path.lexists(path / META):
        _check_only_one(location, checkpoint)
        found = read_folder(path)
    else:
        found = find_checkpoint(path, checkpoint)
    return Found(found, str(found.path))


def is_hub(location: Path | str) -> bool:
    """Whether the location is a repository of the Hub."""
    return str(location).startswith(HUB)


def local_path(location: Path | str) -> Path:
    """The path of a location that is a folder."""
    return Path(str(location).removeprefix(LOCAL))


def results_folder(location: Path | str) -> Path:
    """The folder into which the tools write what they make of a model: the run of a checkpoint, the model folder
    itself, or OWNER--NAME in the current folder for a repository of the Hub.
    """
    if is_hub(location):
        return Path(hub.parse_repository(str(location).removeprefix(HUB)).name.replace("/", "--"))
    path = local_path(location)
    of_a_run = FOLDER_NAME.fullmatch(path.name) and path.parent.name == "checkpoints"
    return path.parents[1] if of_a_run else path


def _check_only_one(location: Path | str, checkpoint: Path | str | int) -> None:
    if checkpoint != "latest":
        raise ValueError(f"{location}: is one model; choose a checkpoint (here {checkpoint}) only of a run folder")


def find_checkpoint(run: Path, checkpoint: Path | str | int) -> Checkpoint:
    """A checkpoint of a run. Raises ValueError as `find_model` does."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{run}: {explain_no_run(run)}")
    checkpoints = Checkpoints(folder, run_id=read_run_id(run))
    if checkpoint not in ("latest", "best"):
        return checkpoints.load(find_folder(checkpoints, checkpoint))
    found = checkpoints.latest() if checkpoint == "latest" else checkpoints.best()
    if found is None:
        missing = "no checkpoint there yet" if checkpoint == "latest" else "no checkpoint has a validation score"
        raise ValueError(f"{folder}: {missing}; {available_steps(checkpoints)}")
    return found


def find_folder(checkpoints: Checkpoints, checkpoint: Path | str | int) -> Path:
    """Of the checkpoint of a step, or at a path. Raises ValueError if there is none."""
    if isinstance(checkpoint, int) or str(checkpoint).isdecimal():
        if int(checkpoint) not in checkpoints.steps():
            raise ValueError(
                f"{checkpoints.folder}: no checkpoint of step {checkpoint}; {available_steps(checkpoints)}"
            )
        return checkpoints.path(int(checkpoint))
    path = Path(checkpoint)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}; {available_steps(checkpoints)}")
    if not os.path.lexists(path / META):
        raise ValueError(f"{path}: not the folder of a checkpoint; {available_steps(checkpoints)}")
    return path


def available_steps(checkpoints: Checkpoints) -> str:
    """For messages."""
    return f"available steps: {', '.join(map(str, checkpoints.steps())) or 'none'}"


def explain_no_run(path: Path) -> str:
    """Why a path is not the folder of a run, and what to give instead."""
    if not path.exists():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
        return f"no such folder; {_RUN_FOLDER}" + (f", or {HUB}{path} for a model of the Hub" if is_name else "")
    if not path.is_dir():
        return f"a file, not a run folder; {_RUN_FOLDER}"
    if (path / "manifest.json").is_file():
        return f"a shard set, not a run folder; {_RUN_FOLDER}"
    return f"no run with checkpoints there; {_RUN_FOLDER}"

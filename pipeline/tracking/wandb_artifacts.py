"""A model folder as an artifact of a W&B run, and the data that the model was trained on as the artifact's input."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.checkpoint_folder import read_folder
from pipeline.storage.json_file import read_object
from pipeline.storage.run_id import read_run_id

MAX_NAME = 128
"""Characters of an artifact's name that W&B accepts."""


@dataclass(frozen=True)
class ModelArtifact:
    """What is sent."""

    model: Path
    """A model folder, as export.py writes it."""
    manifest: Path
    """The manifest.json of the shard set that the model was trained on."""
    fingerprint: str
    """Of the shard set."""

    @property
    def model_name(self) -> str:
        return artifact_name(self.model.resolve().name)

    @property
    def data_name(self) -> str:
        return artifact_name(self.manifest.resolve().parent.name)

    def send(self, run: Any, timeout: float) -> None:
        """Sends both, and waits until the server has them. `timeout` in seconds."""
        import wandb

        data = wandb.Artifact(self.data_name, type="dataset", metadata={"fingerprint": self.fingerprint})
        data.add_file(str(self.manifest))
        run.use_artifact(data)
        model = wandb.Artifact(self.model_name, type="model", metadata={"data_fingerprint": self.fingerprint})
        model.add_dir(str(self.model))
        run.log_artifact(model).wait(timeout=round(timeout))


def find_artifact(run_dir: Path, model: Path, data: Path) -> ModelArtifact:
    """Verifies the model folder, that it was exported from the run, and that `data` is the shard set of its training.

    Raises ValueError.
    """
    if not (model / "model.safetensors").is_file():
        raise ValueError(f"{model} is no model folder: it has no model.safetensors; pipeline/export.py writes one")
    facts = read_folder(model).facts
    source, run_id = facts.get("source"), read_run_id(run_dir)
    exported_from = source.get("run_id") if isinstance(source, dict) else None
    if exported_from != run_id:
        raise ValueError(f"{model} was exported from run {exported_from}, and {run_dir} is run {run_id}")
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{data} holds no manifest.json; name the shard set of the training with --data DIR")
    if read_object(manifest).get("fingerprint") != facts.get("data_fingerprint"):
        raise ValueError(f"{data} is another shard set than that of the training; name that one with --data DIR")
    return ModelArtifact(model, manifest, str(facts["data_fingerprint"]))


def artifact_name(name: str) -> str:
    """A name that W&B accepts: letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_NAME]

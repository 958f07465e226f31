"""Uploads a run to Weights & Biases (W&B) from its folder: `python -m pipeline.tracking.upload RUN`."""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.cli import CommandLine, run_tool
from pipeline.config import build, load_yaml, with_present_names
from pipeline.storage.attempts import read_attempts
from pipeline.storage.run_lock import RunLock
from pipeline.storage.status import read_status
from pipeline.tracking.history import read_history
from pipeline.tracking.tracking_config import TrackingConfig
from pipeline.tracking.wandb_artifacts import ModelArtifact, find_artifact
from pipeline.tracking.wandb_connection import connect
from pipeline.tracking.wandb_service import kill_service

log = logging.getLogger("pipeline")

DESCRIPTION = """Uploads a run to Weights & Biases (W&B).

Sends the steps of metrics.jsonl that the server lacks, and the pictures of these steps in RUN/samples and
RUN/reconstructions, under the run id of the folder. Use it after an offline run, or when W&B did not receive
everything. It can be repeated: each step is sent once. Project, entity, name and tags are those of RUN/config.yaml.

--model sends a model folder as well, which export.py wrote from this run, as an artifact of the W&B run. Its input is
the manifest of the shard set: an artifact that holds manifest.json, and none of the images.

examples:
  python -m pipeline.tracking.upload runs/nvae
  python -m pipeline.tracking.upload runs/nvae --model models/faces --data data/toy_faces32
"""
EXIT_CODES = """exit codes:
  0    W&B has every step of metrics.jsonl
  2    an error that the message explains; repeat the command after fixing it
  130  interrupted by Ctrl-C; repeat the command to send the rest
"""
PROGRESS_INTERVAL = 10.0
"""Seconds between two progress messages."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine("python -m pipeline.tracking.upload", DESCRIPTION, EXIT_CODES)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a training run")
    parser.add_argument(
        "--model", metavar="DIR", type=Path, help="a model folder of this run to send as an artifact (see export.py)"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="the shard set of the training (default: data.root of RUN/config.yaml)"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=600.0, help="limit for the upload (default: 600)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; see EXIT_CODES."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: upload(parsed.run, parsed.timeout, parsed.model, parsed.data))


def upload(run_dir: Path, timeout: float, model: Path | None = None, data: Path | None = None) -> None:
    """Send what W&B lacks of a run, and a model folder. Raises ValueError if that fails, or takes longer than `timeout`
    seconds.
    """
    if timeout <= 0:
        raise ValueError(f"--timeout {timeout:g}: must be positive")
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not the folder of a training run: it needs metrics.jsonl and config.yaml")
    settings = with_present_names(load_yaml(run_dir / "config.yaml"))
    config = build(TrackingConfig, settings.get("tracking") or {})
    if data is not None and model is None:
        raise ValueError("--data names the data of a model; give --model as well")
    artifact = None if model is None else find_artifact(run_dir, model, data or Path(settings["data"]["root"]))
    environment = {"environment": starts[-1].environment} if (starts := read_attempts(run_dir)) else {}
    with RunLock(run_dir):
        send(run_dir, config, settings | environment, timeout, artifact)


def send(
    run_dir: Path, config: TrackingConfig, settings: dict, timeout: float, artifact: ModelArtifact | None = None
) -> None:
    """The upload itself, while no other process writes to the folder."""
    history = read_history(run_dir)
    if not history:
        raise ValueError(f"{run_dir}/metrics.jsonl has no records; there is nothing to upload")
    exit_code = 0 if read_status(run_dir).state == "finished" else 1
    try:
        run = connect(config, run_dir, settings, upload_timeout=timeout)
        missing = run.send_missing(history)
        if artifact is not None:
            run.send(lambda run: artifact.send(run, timeout))
        with progress_messages():
            complete = run.finish(exit_code)
    except ConnectionError as error:
        advice = "Check the key (wandb login --relogin) and the network"
        raise ValueError(f"W&B cannot be used: {error}. {advice}") from None
    except KeyboardInterrupt:
        kill_service()  # otherwise wandb would continue to send when Python exits
        raise
    if not complete:
        raise ValueError("W&B did not receive everything; repeat the command to send the rest")
    pictures = sum(len(logged.pictures) for logged in missing)
    log.info("sent %d steps and %d pictures; W&B has steps up to %d", len(missing), pictures, history[-1].step)
    if artifact is not None:
        log.info("sent the model %s, with the data %s as its input", artifact.model_name, artifact.data_name)


@contextmanager
def progress_messages() -> Iterator[None]:
    """Log a message every few seconds."""
    done, start = threading.Event(), time.monotonic()

    def work() -> None:
        while not done.wait(PROGRESS_INTERVAL):
            log.info("waiting for W&B to receive the data: %d s", time.monotonic() - start)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        done.set()


if __name__ == "__main__":
    sys.exit(main())

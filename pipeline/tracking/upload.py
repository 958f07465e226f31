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
from pipeline.storage.run_lock import RunLock
from pipeline.storage.status import read_status
from pipeline.tracking.history import read_history
from pipeline.tracking.wandb_run import TrackingConfig, connect, kill_service

log = logging.getLogger("pipeline")

DESCRIPTION = """Uploads a run to Weights & Biases (W&B).

Sends the steps of metrics.jsonl that the server lacks, and the pictures of these steps in RUN/samples and
RUN/reconstructions, under the run id of the folder. Use it after an offline run, or when W&B did not receive
everything. It can be repeated: each step is sent once. Project, entity, name and tags are those of RUN/config.yaml.

example: python -m pipeline.tracking.upload runs/nvae
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
        "--timeout", metavar="SECONDS", type=float, default=600.0, help="limit for the upload (default: 600)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; see EXIT_CODES."""
    parsed = build_parser().parse_args(arguments)
    return run_tool(lambda: upload(parsed.run, parsed.timeout))


def upload(run_dir: Path, timeout: float) -> None:
    """Send what W&B lacks of a run. Raises ValueError if that fails, or takes longer than `timeout` seconds."""
    if timeout <= 0:
        raise ValueError(f"--timeout {timeout:g}: must be positive")
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not the folder of a training run: it needs metrics.jsonl and config.yaml")
    settings = with_present_names(load_yaml(run_dir / "config.yaml"))
    config = build(TrackingConfig, settings.get("tracking") or {})
    with RunLock(run_dir):
        send(run_dir, config, settings, timeout)


def send(run_dir: Path, config: TrackingConfig, settings: dict, timeout: float) -> None:
    """The upload itself, while no other process writes to the folder."""
    history = read_history(run_dir)
    if not history:
        raise ValueError(f"{run_dir}/metrics.jsonl has no records; there is nothing to upload")
    exit_code = 0 if read_status(run_dir).state == "finished" else 1
    try:
        run = connect(config, run_dir, settings, upload_timeout=timeout)
        missing = run.send_missing(history)
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

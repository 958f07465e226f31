"""Logging of a run: always to `metrics.jsonl`, and optionally to one Weights & Biases (W&B) run over all attempts and
to TensorBoard.

`metrics.jsonl` is authoritative: an online start sends the steps that W&B lacks, and none that it has.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.metrics_file import MetricsFile, read_records
from pipeline.tracking.alerts import Alerts
from pipeline.tracking.history import WALL_CLOCK, read_history
from pipeline.tracking.tensorboard_run import TensorBoardRun
from pipeline.tracking.tracking_config import TrackingConfig
from pipeline.tracking.wandb_connection import start_wandb
from pipeline.tracking.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Tracker:
    """Logs scalars and pictures, and sends alerts. Does nothing on processes other than the main one.

    `run_config` is what W&B shows as the run's configuration. Records after `start_step`, whose steps are about to be
    repeated, are removed from `metrics.jsonl`. If the run is online, the steps up to `start_step` that W&B lacks
    (because earlier attempts were killed or offline) are sent first, with their pictures. `attempt` counts the starts
    of this run from 1.

    Raises ValueError if a fresh start (`start_step` 0) with `tracking.wandb=online` is refused by W&B, or if
    `tracking.tensorboard` is set and TensorBoard is not installed. A context manager: an exception that passes through
    is sent as an alert, and marks the W&B run as failed.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path | str,
        run_config: Mapping[str, Any],
        *,
        is_main: bool,
        start_step: int,
        attempt: int = 1,
    ):
        self._metrics: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoardRun | None = None
        if not is_main:
            return
        self._started = time.monotonic()
        self._attempt = attempt
        self._timed_step: int | None = None
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path, last_step = run_dir / "metrics.jsonl", start_step or -1
        self._alerts = Alerts.of(run_config)
        if config.tensorboard:
            self._tensorboard = TensorBoardRun(run_dir, last_step)
        self._wandb = start_wandb(config, run_dir, run_config, fresh=start_step == 0)
        self._spent = _seconds_spent(path)
        self._metrics = MetricsFile(path, last_step)
        if self._wandb is not None:
            self._wandb.send_missing(read_history(run_dir, last_step))
        if self._tensorboard is not None and self._tensorboard.is_new:
            self._tensorboard.log_history(read_history(run_dir, last_step))

    def log(self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray] | None = None) -> None:
        """Log the scalars of `step`, and its pictures (uint8, height x width x 3) to W&B and TensorBoard. Steps
        must not decrease.

        Several calls for one step make one record. Log a step before saving its checkpoint: a kill then leaves no gap.
        Each record also gets `attempt` and `perf/wall_clock_s`: seconds of training over all attempts, each counted
        from its start to the last record that the next one finds, without the time in between.
        """
        if self._metrics is None:
            return
        scalars = self._with_cost(step, scalars)
        self._metrics.add(step, scalars)
        if self._wandb is not None:
            self._wandb.log(step, scalars, images or {})
        if self._tensorboard is not None:
            self._tensorboard.log(step, scalars, images or {})
        for alert in self._alerts.find(step, scalars):
            self.alert(*alert)

    def _with_cost(self, step: int, scalars: Mapping[str, float]) -> Mapping[str, float]:
        if not scalars or step == self._timed_step:
            return scalars
        self._timed_step = step
        seconds = self._spent + time.monotonic() - self._started
        return {**scalars, "attempt": self._attempt, WALL_CLOCK: round(seconds, 3)}

    def sync(self) -> None:
        """Flush `metrics.jsonl` to disk, and TensorBoard's file to the operating system. Call it before saving a
        checkpoint: a power failure, or a kill, then leaves no gap.
        """
        if self._metrics is not None:
            self._metrics.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def alert(self, title: str, text: str) -> None:
        """Log a warning, and send it as a W&B alert (by e-mail or Slack, depending on the user's W&B settings)."""
        if self._metrics is not None:
            logger.warning("%s: %s", title, text)
        self.send_alert(title, text)

    def send_alert(self, title: str, text: str) -> None:
        """Send a W&B alert of what the terminal shows already."""
        if self._wandb is not None:
            self._wandb.alert(title, text)

    def finish(self, exit_code: int = 0) -> None:
        """Send the rest to W&B and finish its run, within twice `wandb_timeout`; close the files."""
        if self._wandb is not None:
            self._wandb.finish(exit_code)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._metrics is not None:
            self._metrics.close()
        self._wandb = self._tensorboard = self._metrics = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.send_alert("The run failed", f"{kind.__name__}: {error}"[:1000])
        self.finish(exit_code=0 if error is None else 1)


def _seconds_spent(path: Path) -> float:
    """Seconds of training that a `metrics.jsonl` records."""
    seconds = (record.get(WALL_CLOCK, 0.0) for record in read_records(path))
    return max((value for value in seconds if math.isfinite(value)), default=0.0)

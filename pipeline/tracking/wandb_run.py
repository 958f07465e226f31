"""One run in Weights & Biases (W&B), which can neither stop nor delay training."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tracking.history import LoggedStep
from pipeline.tracking.wandb_media import Media
from pipeline.tracking.wandb_metrics import MetricDefinitions
from pipeline.tracking.wandb_service import describe, how_to_upload, kill_service

logger = logging.getLogger(__name__)

ALERT_WAIT = 3600
"""Seconds: a disk that stays full for a night is no message for each checkpoint."""


class WandbRun:
    """A W&B run that can neither stop nor delay training.

    `last_step` is the last step that W&B has (-1: none; None: unknown, because the run is offline). Steps up to it are
    not sent. All calls run one after the other on a separate thread. After an error, or when 1000 calls are queued
    because the wandb service does not answer, W&B is switched off for the rest of the attempt, with one warning.
    """

    def __init__(self, run: Any, run_dir: Path, timeout: float, last_step: int | None, total_steps: int = 0):
        """`run` is what `wandb.init` returned; `timeout` in seconds; `total_steps` of training, 0 if unknown."""
        self.last_step = last_step
        self._run = run
        self._run_dir = run_dir
        self._timeout = timeout
        self._exit_code = 0
        self._definitions = MetricDefinitions(run)
        self._media = Media(total_steps)
        self._off = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1000)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the run's page."""
        return self._run.url

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log the scalars and pictures of a step."""
        if self.last_step is None or step > self.last_step:
            scalars, pictures = dict(scalars), dict(pictures)
            self.send(lambda run: self._log(step, scalars, self._media.pictures(step, pictures)))

    def send_missing(self, history: Sequence[LoggedStep]) -> list[LoggedStep]:
        """Send the steps that W&B lacks, and return them. Sends none if the run is offline."""
        if self.last_step is None:
            return []
        if self.last_step > max((logged.step for logged in history), default=-1):
            logger.info("W&B already has steps up to %d; they are not sent again", self.last_step)
        missing = [logged for logged in history if logged.step > self.last_step]
        if missing:
            steps = missing[0].step, missing[-1].step
            logger.info("W&B: sending %d steps that it lacks, %d to %d", len(missing), *steps)
            self.send(lambda run: self._log_files(missing))
        return missing

    def alert(self, title: str, text: str) -> None:
        """Send an alert to those who watch this run. W&B sends one of the same title only after ALERT_WAIT."""
        self.send(lambda run: run.alert(title=title[:63], text=text, level="WARN", wait_duration=ALERT_WAIT))

    def send(self, call: Callable[[Any], None]) -> None:
        """Queue a call with wandb's run. An error of it switches W&B off."""
        if self._off:
            return
        try:
            self._calls.put_nowait(lambda: call(self._run))
        except queue.Full:
            self._switch_off("its service does not answer")

    def finish(self, exit_code: int) -> bool:
        """Finish the run. Returns whether W&B received everything.

        Takes at most twice the timeout: a wandb service that has not finished by then is killed.
        """
        self._exit_code = exit_code
        try:
            self._calls.put_nowait(None)
            self._thread.join(2 * self._timeout)
        except queue.Full:
            self._switch_off("its service does not answer")
        if self._thread.is_alive():
            self._switch_off("it did not finish in time")
            kill_service()  # otherwise wandb would wait for it when Python exits
        return not self._off

    def _log_files(self, history: Sequence[LoggedStep]) -> None:
        for logged in history:
            pictures = {}
            for key, path in logged.pictures.items():
                try:
                    pictures |= self._media.pictures(logged.step, {key: path})
                except Exception as error:  # a file that is no picture
                    logger.warning("W&B: %s cannot be sent: %s", path, describe(error))
            self._log(logged.step, logged.scalars, pictures, logged.time)

    def _log(
        self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Any], time: float | None = None
    ) -> None:
        """`pictures` are wandb's; `time` is in seconds since 1970 (None: now)."""
        record: dict[str, Any] = {**scalars, **self._media.histograms(step, scalars), **pictures}
        for key in record:
            self._definitions.define(key)
        record["step"] = step
        if time is not None:
            record["_timestamp"] = time
        self._run.log(record, step=step)

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            self._try(call)
        self._try(lambda: self._run.finish(exit_code=self._exit_code), even_if_off=True)

    def _try(self, call: Callable[[], None], even_if_off: bool = False) -> None:
        if self._off and not even_if_off:
            return
        try:
            call()
        except Exception as error:  # no error of W&B may end training
            self._switch_off(describe(error))

    def _switch_off(self, why: str) -> None:
        if self._off:
            return
        self._off = True
        logger.warning("W&B is off (%s). metrics.jsonl is still written; %s", why, how_to_upload(self._run_dir))

"""The log of a run for TensorBoard. The only module that imports torch.utils.tensorboard.

Keys and pictures are those of `metrics.jsonl` and of the run folder. All attempts write to one folder, RUN/tensorboard;
an attempt that resumes from a checkpoint first tells TensorBoard to drop the steps that it repeats.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.tracking.history import LoggedStep

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"


class TensorBoardRun:
    """Writes event files. An error, such as a full disk, switches it off for the rest of the attempt, with one warning.

    `last_step`: the steps up to it are kept (-1: none). Raises ValueError where the package tensorboard is missing.
    """

    def __init__(self, run_dir: Path, last_step: int):
        writer_class = _writer_class()
        self.folder = run_dir / FOLDER
        self.is_new = not any(self.folder.glob("events.out.tfevents.*"))
        self._off = False
        self._writer = writer_class(str(self.folder), purge_step=last_step + 1)

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log the scalars of `step` and its pictures, uint8 (height, width, 3)."""
        self._try(lambda: self._log(step, scalars, pictures, None))

    def log_history(self, history: Sequence[LoggedStep]) -> None:
        """Log what a run folder holds of steps that were not logged here."""
        for logged in history:
            self._try(lambda logged=logged: self._log(logged.step, logged.scalars, _read(logged.pictures), logged.time))

    def flush(self) -> None:
        """Hand everything to the operating system, so that a kill of the process takes nothing away."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """Write the rest, and close the file."""
        self._try(self._writer.close)

    def _log(
        self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray], time: float | None
    ) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step, walltime=time)
        for key, picture in pictures.items():
            self._writer.add_image(key, picture, step, walltime=time, dataformats="HWC")

    def _try(self, call: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            call()
        except Exception as error:  # nothing of TensorBoard may end training
            self._off = True
            logger.warning("TensorBoard is off (%s); metrics.jsonl is still written", error)


def _writer_class() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tracking.tensorboard=true needs the package tensorboard, which is not installed: pip install tensorboard. "
            "Without it, set tracking.tensorboard=false; metrics.jsonl, W&B and report.py do not need it"
        ) from None
    return SummaryWriter


def _read(paths: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The pictures that can be read."""
    pictures = {}
    for key, path in paths.items():
        try:
            with Image.open(path) as picture:
                pictures[key] = np.asarray(picture.convert("RGB"))
        except Exception as error:  # a file that is no picture; Pillow raises many kinds
            logger.warning("TensorBoard: %s cannot be read: %s", path, error)
    return pictures

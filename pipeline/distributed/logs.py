"""Log messages of the package on the terminal."""

import logging
import os
import time
from collections.abc import Iterable

from tqdm import tqdm

from shard_data.terminal import paint

log = logging.getLogger("pipeline")

REPORT_DELAY = 10.0
"""Seconds that other processes leave to the main process for its error."""


STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class TerminalHandler(logging.StreamHandler):
    """Writes to stderr. A progress bar there is cleared before each message and drawn again below it.

    On a terminal with colors, warnings are yellow and errors red.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message."""
        try:
            style = STYLES.get(record.levelname, "")
            tqdm.write(paint(self.format(record), style, self.stream), file=self.stream)
        except Exception:
            self.handleError(record)


def log_lines(lines: Iterable[str]) -> None:
    """A record for each line, so that a log file has a time before each."""
    for line in lines:
        log.info("%s", line)


def launched_rank() -> int:
    """This process's rank before any process group exists. 0 where no launcher started several processes.

    RANK alone is not enough: it may come from the environment of a plain call.
    """
    environment = os.environ
    if "LOCAL_RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) <= 1:
        return 0
    return int(environment.get("RANK", "0"))


def report_error(error: Exception) -> None:
    """Logs an error that ends a command, once, on the main process.

    Another process waits: the launcher ends all processes when the first one exits, and would cut the main process
    short. If it is still there after that, the main process has no such error, so it logs its own.
    """
    if getattr(error, "is_reported", False):
        return
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    rank = launched_rank()
    if rank > 0:
        time.sleep(REPORT_DELAY)
        log.error("error on rank %d: %s", rank, message)
    else:
        log.error("error: %s", message)
    error.is_reported = True


def start_logging(is_main: bool) -> None:
    """Sends messages of the package to the terminal: all of the main process, warnings and errors of the others."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    terminal = TerminalHandler()
    terminal.setLevel(logging.INFO if is_main else logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)

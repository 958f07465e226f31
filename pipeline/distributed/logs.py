"""Log messages of the package: to the terminal, and to a file of the run."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger("pipeline")


def launched_rank() -> int:
    """This process's rank before any process group exists. 0 where no launcher started several processes.

    RANK alone is not enough: it may come from the environment of a plain call.
    """
    environment = os.environ
    if "LOCAL_RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) <= 1:
        return 0
    return int(environment.get("RANK", "0"))


def start_logging(log_file: Path | None, is_main: bool, earlier: Iterable[logging.LogRecord] = ()) -> None:
    """Sends messages of the package to the terminal and, where given, to `log_file`.

    The terminal shows all messages of the main process, and the warnings and errors of the others. `earlier`: records
    that the terminal has shown and the file lacks.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO if is_main else logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if log_file is not None:
        file = logging.FileHandler(log_file)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for record in earlier:
            file.handle(record)
        log.addHandler(file)

"""Where the threads of this process are."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
log = logging.getLogger("pipeline")


def main_thread_position() -> str:
    """The innermost frame of the main thread that is in this package, or else the innermost one."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return place(frame)
        frame = frame.f_back
    return place(innermost) if innermost is not None else "its end"


def place(frame: FrameType) -> str:
    """As `pipeline/training/trainer.py:12 in fit`."""
    file = Path(frame.f_code.co_filename)
    shown = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE) else file
    return f"{shown}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def show_stacks(folder: Path | None, rank: int, in_log: bool) -> None:
    """Every thread's Python stack, to a file of this rank in `folder`, where one is given, and to the log."""
    name = f"rank_{rank:05d}.txt"
    try:
        text = write_stacks(folder and folder / name)
    except OSError as error:
        log.error("%s: %s", name, error)
        faulthandler.dump_traceback(all_threads=True)
        return
    if in_log:
        log.error("rank %d on %s, Python stacks:\n%s", rank, socket.gethostname(), text)


def write_stacks(path: Path | None) -> str:
    """The Python stacks of all threads, also appended to the file, where one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") if path is not None else tempfile.TemporaryFile("w+") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        start = file.tell()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(start)
        return file.read()

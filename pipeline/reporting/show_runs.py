"""The work of `python -m pipeline.runs`: the table once, as JSON, or again and again."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.reporting.run_table import MAX_DEPTH, Row, RunList, Wanted, as_json, select
from pipeline.reporting.text import moment
from pipeline.reporting.text_table import note_lines, table_lines
from shard_data.terminal import BYTES, Progress, is_terminal, paint


def show_runs(root: Path, wanted: Wanted, as_records: bool = False) -> None:
    """Prints the table, or JSON. Raises ValueError for a folder that does not exist."""
    runs = RunList(root)
    rows = select(read_with_progress(runs), wanted)
    if as_records:
        print(json.dumps([as_json(row) for row in rows], indent=1))
    else:
        print("\n".join(lines_of(rows, runs)))


def read_with_progress(runs: RunList) -> list[Row]:
    """The rows; shows how far it is where that takes long."""
    size = sum(path.stat().st_size for folder in runs.find() if (path := folder / "metrics.jsonl").is_file())
    with Progress("metrics", size, BYTES) as progress:
        return runs.read(progress.update)


def lines_of(rows: Sequence[Row], runs: RunList) -> list[str]:
    """The table for standard output, with its notes."""
    if not rows:
        number = len(runs.folders)
        return [f"none of the {number} runs in {runs.root} match" if number else no_runs(runs.root)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    notes = note_lines(rows)
    table = table_lines(rows, width, lambda text, style: paint(text, style, sys.stdout))
    return [*table, *([""] if notes else []), *notes]


def no_runs(root: Path) -> str:
    """What is said of a folder without runs."""
    return f"no runs in {root}, nor in folders up to {MAX_DEPTH} levels below; pipeline/train.py writes runs/NAME"


def watch_runs(root: Path, wanted: Wanted, seconds: float) -> None:
    """Prints the table again and again until Ctrl-C, which leaves the last one. Raises ValueError for a folder that
    does not exist.
    """
    runs = RunList(root)
    lines: list[str] = []
    with screen() as show:
        try:
            rows = read_with_progress(runs)
            while True:
                title = f"{root} at {moment(time.time())}, every {seconds:g} s; Ctrl-C ends"
                lines = lines_of(select(rows, wanted), runs)
                show([title, "", *lines])
                time.sleep(seconds)
                runs.find()
                rows = runs.read()
        except KeyboardInterrupt:
            pass
    if is_terminal(sys.stdout):
        print("\n".join(lines))


@contextmanager
def screen() -> Iterator:
    """A function that shows lines in place of those before, on the terminal's second screen; what the terminal showed
    before comes back. Elsewhere it prints them below each other.
    """
    if not is_terminal(sys.stdout):
        yield lambda lines: print("\n".join([*lines, ""]), flush=True)
        return
    sys.stdout.write("\x1b[?1049h")
    sys.stdout.flush()  # a bar is on the second screen too
    try:
        yield draw
    finally:
        sys.stdout.write("\x1b[?1049l")
        sys.stdout.flush()


def draw(lines: Sequence[str]) -> None:
    """Overwrites the screen, without flicker, with as many lines as it has room for."""
    width, height = shutil.get_terminal_size()
    lines = [line if "\x1b" in line else line[:width] for line in lines]  # a table has that width already
    if len(lines) > height:
        lines = [*lines[: height - 1], f"{len(lines) - height + 1} more lines; --state, --name and --model show fewer"]
    sys.stdout.write("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J")
    sys.stdout.flush()

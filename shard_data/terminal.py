"""What a person sees of a command: aligned lines, progress, and color, where the terminal has it.

Colors follow NO_COLOR (no-color.org) and TERM=dumb, and are for terminals alone. So are bars; elsewhere, long work has
a line per minute.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TextIO, TypeVar

from tqdm import tqdm

from shard_data.progress import is_watched

Item = TypeVar("Item")

STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
MINUTE = 60.0
"""Seconds between lines of progress."""
BAR_DELAY = 0.5
"""Seconds of work before a bar is shown."""
BYTES = "B"
"""The unit whose numbers are written in MB."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_reader(end: str = "") -> bool:
    """Writes out what was printed, and `end`. False where the program that reads it has ended (`| head`); the rest is
    dropped then.
    """
    try:
        print(end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def paint(text: str, style: str, stream: TextIO) -> str:
    """The text in one of STYLES where it is written to a terminal with colors; as it is elsewhere."""
    if not style or os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def aligned(facts: Mapping[str, str | Sequence[str]], indent: str = "  ") -> list[str]:
    """A line for each fact, or for each of its parts, with the texts below each other. Facts without a text are
    omitted.
    """
    lines, width = [], max(map(len, facts), default=0)
    for name, text in facts.items():
        for number, part in enumerate([text] if isinstance(text, str) else text):
            if part:
                lines.append(f"{indent}{'' if number else name:<{width}}  {part}")
    return lines


def padded(rows: Sequence[Sequence[str]], to_right: Sequence[bool]) -> list[list[str]]:
    """The cells of a table's rows, each as wide as the widest of its column; moved to the right side in the columns
    where `to_right` is true.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cells(row: Sequence[str]) -> list[str]:
        places = zip(row, widths, to_right, strict=True)
        return [text.rjust(width) if right else text.ljust(width) for text, width, right in places]

    return [cells(row) for row in rows]


def next_lines(commands: Sequence[str]) -> list[str]:
    """The commands that come next; none where another program started this one."""
    return [] if is_watched() else aligned({"next": commands})


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`; a dash for what is not finite."""
    if not math.isfinite(seconds):
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def print_line(line: str) -> None:
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows how far long work is: a bar on a terminal; elsewhere a line per minute, with the time that is left.

    `what` is done with `total` things (None: not known) called `unit`, of which `done` were done before. `write` takes
    a line (None: for work that writes lines of its own, a bar alone); `shown` false shows nothing. A context manager.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int = 0,
        write: Callable[[str], object] | None = print_line,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        has_bar = shown and is_terminal(sys.stderr)
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._write, self._clock, self._has_lines = write, clock, shown and not has_bar and write is not None
        self._begun, self._started = done, clock()
        self._shown, self._figures = self._started, ""
        scaled = unit == BYTES
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=unit if scaled else f" {unit}", unit_scale=scaled,
            disable=not has_bar, delay=BAR_DELAY, smoothing=0.05,
        )  # fmt: skip
        if has_bar and (self._bar.ncols or 0) < 1:  # a terminal that states no size, where tqdm draws an empty line
            self._bar.ncols = self._bar.nrows = None

    def update(self, count: int = 1, figures: str = "") -> None:
        """So many more are done. `figures` stand behind the bar or the line from now on."""
        self.done += count
        if figures:
            self._figures = figures
            self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(count)
        now = self._clock()
        if self._has_lines and now - self._shown >= MINUTE and self.done != self.total:
            self._shown = now
            self._write(", ".join(filter(None, [self._line(now), self._figures])))

    def set_total(self, total: int | None) -> None:
        """How much there is to do, once that is known."""
        self.total = self._bar.total = total

    def _line(self, now: float) -> str:
        """`elbo: 1,100 of 5,000 images (22 %), about 7 min left`."""
        unit = "MB" if self.unit == BYTES else self.unit
        done = f"{self.what}: {self._number(self.done)}"
        if not self.total:
            return f"{done} {unit}"
        left = (now - self._started) / max(1, self.done - self._begun) * (self.total - self.done)
        share = 100 * self.done // self.total
        return f"{done} of {self._number(self.total)} {unit} ({share} %), about {duration(left)} left"

    def _number(self, count: int) -> str:
        return f"{count / 1e6:,.1f}" if self.unit == BYTES else f"{count:,}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def with_progress(items: Iterable[Item], progress: Progress) -> Iterator[Item]:
    """The items; each counts as done when the next one is taken."""
    with progress:
        for item in items:
            yield item
            progress.update()

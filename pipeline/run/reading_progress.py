"""How far an evaluation is: a bar on a terminal; elsewhere a line per minute, with the time that is left."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from pipeline.data.loader import Batch

log = logging.getLogger("pipeline")

SECONDS = 60.0
"""Between lines."""


def with_progress(
    batches: Iterable[Batch], first: int, remaining: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Batch]:
    """The batches; `first` others were measured before, and `remaining` are these."""
    if sys.stderr.isatty():
        yield from tqdm(batches, desc="evaluating", unit="batch", initial=first, total=first + remaining)
        return
    start = shown = clock()
    for done, batch in enumerate(batches):
        now = clock()
        if done and now - shown >= SECONDS:
            shown = now
            left = (now - start) / done * (remaining - done)
            log.info("evaluated %d of %d batches; %s left", first + done, first + remaining, duration(left))
        yield batch


def duration(seconds: float) -> str:
    """`about 3 h 05 min`, or minutes alone."""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"about {hours} h {minutes:02d} min" if hours else f"about {minutes} min"

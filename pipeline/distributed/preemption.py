"""Signals that stop training between steps: SIGTERM and SIGUSR1, which clusters send before they preempt a job, and
Ctrl-C (SIGINT).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_AFTER = 1.0
"""Seconds. A SIGINT sooner than this after the first is not a second one: SLURM and the launcher may both send it."""
LAST = b"\0"
"""Ends the thread that receives the signals' numbers. (Its end of file would not: loader workers share the pipe.)"""

log = logging.getLogger("pipeline")


class StopRequest:
    """A context, entered in the main thread, that records these signals instead of ending the process.

    SIGINT is recorded only inside `finishing_steps`; outside it raises KeyboardInterrupt as usual. A process that was
    started with SIGINT ignored, as a shell's background jobs are, keeps ignoring it.

    After SIGTERM or SIGUSR1, both stay ignored when the context ends: schedulers and launchers repeat them, and the
    process must be able to report how it ended.
    """

    def __init__(self):
        self.reason: str | None = None
        """The name of the first signal, for instance "SIGTERM"."""
        self.has_arrived = False
        """Whether any of the signals has. True at once, even while the main thread is in a long C call."""
        self.interrupted = False
        """Whether SIGINT has arrived; likewise."""
        self._interrupted_at = 0.0
        self._end_at_once: Callable[[], None] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Python runs its handlers in the main thread, between two bytecodes. The numbers of signals come here at once.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._previous_descriptor)
        os.write(self._writer, LAST)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        for number, handler in self._previous.items():
            if self.reason is not None:
                handler = signal.SIG_IGN
            elif handler is None:  # a handler that Python did not set and cannot restore
                handler = signal.SIG_DFL
            signal.signal(number, handler)

    @contextmanager
    def finishing_steps(self, end_at_once: Callable[[], None]) -> Iterator[None]:
        """Inside, the first SIGINT is recorded like the other signals. After it, a second SIGINT, or the SIGTERM that
        torchrun sends for it, calls `end_at_once` in another thread.
        """
        previous = signal.getsignal(signal.SIGINT)
        if previous is signal.SIG_IGN:
            yield
            return
        self._end_at_once = end_at_once
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            self._end_at_once = None
            signal.signal(signal.SIGINT, previous or signal.SIG_DFL)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _listen(self) -> None:
        while (byte := os.read(self._reader, 1)) != LAST:
            self._receive(byte[0])

    def _receive(self, number: int) -> None:
        end_at_once = self._end_at_once
        self.has_arrived = self.has_arrived or number in (*SIGNALS, signal.SIGINT)
        if not self.interrupted and number == signal.SIGINT:
            self.interrupted, self._interrupted_at = True, time.monotonic()
            if end_at_once is not None:
                self._note(number, None)
                # Not a foreground process any more where `accelerate launch` has ended: hence the other way.
                log.info(
                    "Ctrl-C: finishing this step and writing a checkpoint. To end at once, press Ctrl-C again or run "
                    "kill -INT %d",
                    os.getpid(),
                )
        elif end_at_once is not None and self._is_second(number):
            end_at_once()

    def _is_second(self, number: int) -> bool:
        is_repeated = self.interrupted and time.monotonic() - self._interrupted_at >= REPEAT_AFTER
        return is_repeated and number in (signal.SIGINT, signal.SIGTERM)

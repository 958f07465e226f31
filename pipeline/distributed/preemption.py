"""SIGTERM and SIGUSR1, which clusters send before they preempt a job, stop training between steps."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context, entered in the main thread, that records these signals instead of ending the process.

    After a signal, the signals stay ignored when the context ends: schedulers and launchers repeat them, and the
    process must be able to report how it ended. Ctrl-C is not handled here.
    """

    def __init__(self):
        self.reason: str | None = None
        """The name of the first signal, for instance "SIGTERM"."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            if self.reason is not None:
                handler = signal.SIG_IGN
            elif handler is None:  # a handler that Python did not set and cannot restore
                handler = signal.SIG_DFL
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

"""Asked to stop: SIGTERM and SIGUSR1, which clusters send before they take a machine away, wait for a step's edge."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context, entered in the main thread, in which the signals are noted and nothing else happens.

    Once a stop was asked for, the signals stay ignored after the context: schedulers and launchers repeat them, and a
    process that is about to end by itself must be able to say how it ended. Ctrl-C is left alone.
    """

    def __init__(self):
        self.reason: str | None = None
        """Name of the first signal that came, as "SIGTERM"."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            if self.reason is not None:
                handler = signal.SIG_IGN
            elif handler is None:  # a handler of another language's, which Python cannot put back
                handler = signal.SIG_DFL
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

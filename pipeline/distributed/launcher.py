"""The launcher that started this process (`accelerate launch`, torchrun), and whether it still lives.

The kernel could tell of a parent's death by itself (PR_SET_PDEATHSIG), but it means the thread that started us rather
than the process, knows no message, and exists on Linux only. Asking for the parent's number costs nothing.
"""

import os

MARKS = frozenset({"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"})
"""Environment variables that the launchers set always: torchrun (also below `accelerate launch` with several processes)
and `accelerate launch` with one."""


class Launcher:
    """Make one early: it remembers its maker's parent.

    A mark alone proves nothing, since it may come from a shell that a launcher started, or that a user put it into. The
    launchers start us with their own interpreter. A shell as our parent is left in peace, so that a run under `nohup`
    outlives it; anything else that took us in, from another session, did so because the launcher died before we looked.
    """

    def __init__(self):
        self._parent = os.getppid()
        marked = not MARKS.isdisjoint(os.environ)
        ours = program(self._parent) == program(os.getpid())
        adopted = self._parent == 1 or os.getsid(self._parent) != os.getsid(0)
        self.exists = marked and (ours or adopted)
        self._gone = marked and not ours and adopted

    def is_gone(self) -> bool:
        return self.exists and (self._gone or os.getppid() != self._parent)


def program(pid: int) -> str | None:
    """The executable of a process, None where it cannot be told."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None

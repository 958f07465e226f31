"""The launcher that started this process (`accelerate launch`, torchrun), and whether it is alive.

The kernel can signal a parent's death (PR_SET_PDEATHSIG), but it watches the parent's thread instead of the process,
leaves no time for a message, and exists on Linux only. Comparing the parent's process id costs nothing.
"""

import os

MARKS = frozenset({"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"})
"""Environment variables that the launchers always set: torchrun (also below `accelerate launch` with several processes)
and `accelerate launch` with one."""


class Launcher:
    """Create it early: it stores the parent's process id.

    A mark alone is not enough, since a shell may have exported it. The launchers start this process with their own
    interpreter. If the parent is a shell, there is no launcher, so that a run under `nohup` survives the shell. If the
    parent is another program in another session, the launcher died before this object was created.
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
    """The executable of a process, None where it cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None

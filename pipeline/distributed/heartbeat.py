"""Heartbeats of all processes: when each was last seen, and which one the others wait for in a collective."""

import json
from collections.abc import Iterable
from typing import NamedTuple

LONGEST_TICK = 2.0  # seconds
SILENT = 3.0  # seconds without a heartbeat after which a process is called silent


class Heartbeat(NamedTuple):
    """What a process reports about itself twice a second."""

    count: int
    joined: int
    """Collectives that it has entered since the start, in all its process groups."""
    host: str
    at: str
    """The position of its main thread."""
    running: bool = True
    """False after it has left without an error."""

    def encode(self) -> str:
        return json.dumps(self)

    @classmethod
    def decode(cls, text: str | bytes) -> "Heartbeat":
        return cls(*json.loads(text))


class Heartbeats:
    """Every rank's last heartbeat, timed by one observer.

    Its time stops while the observer itself is stopped (a suspended job), and the hosts' clocks need not agree.
    Processes enter collectives in the same order, so a rank that has entered fewer than another is behind.
    """

    def __init__(self, latest: Iterable[Heartbeat], timeout: float):
        """`timeout`: seconds that others may wait for a process."""
        self.timeout = timeout
        self.latest = list(latest)
        self._now = 0.0
        self._last_seen = [0.0] * len(self.latest)
        self._behind: dict[int, float] = {}  # since when a rank has been behind with the same number of collectives

    def update(self, latest: Iterable[Heartbeat], elapsed: float) -> None:
        """Takes every rank's current heartbeat, `elapsed` seconds after the last call."""
        self._now += min(elapsed, LONGEST_TICK)
        before, self.latest = self.latest, list(latest)
        ahead = max(heartbeat.joined for heartbeat in self.latest)
        for rank, (old, new) in enumerate(zip(before, self.latest, strict=True)):
            if new.count != old.count:
                self._last_seen[rank] = self._now
            if new.joined != old.joined or new.joined == ahead:
                self._behind.pop(rank, None)
            if new.joined < ahead:
                self._behind.setdefault(rank, self._now)

    def silence(self, rank: int) -> float:
        """Seconds since the last heartbeat; 0 for a rank that has left."""
        return self._now - self._last_seen[rank] if self.latest[rank].running else 0.0

    def silent(self) -> list[int]:
        """Ranks without a recent heartbeat."""
        return [rank for rank in range(len(self.latest)) if self.silence(rank) > min(SILENT, self.timeout)]

    def present(self) -> list[int]:
        """Ranks that are expected to act on a failure report."""
        silent = self.silent()
        return [rank for rank, heartbeat in enumerate(self.latest) if heartbeat.running and rank not in silent]

    def missing(self) -> list[int]:
        """Ranks that others have waited for, or that were silent, for longer than the timeout."""
        late = {rank for rank, since in self._behind.items() if self._now - since > self.timeout}
        dead = {rank for rank in range(len(self.latest)) if self.silence(rank) > self.timeout}
        return sorted(late | dead)

    def describe(self, rank: int) -> str:
        """One line about a missing rank."""
        heartbeat = self.latest[rank]
        name = f"rank {rank} on {heartbeat.host}"
        if not heartbeat.running:
            return f"{name} has left the run"
        if rank in self.silent():
            return f"{name}: no heartbeat for {self.silence(rank):.0f} s; it was last at: {heartbeat.at}"
        return f"{name} has not joined; it is at: {heartbeat.at}"

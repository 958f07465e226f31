"""Heartbeats of all processes: when each was last seen, and which one the others wait for in a collective."""

import json
import math
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
    advanced: int = 0
    """Pieces of work done since the start (see `shard_data.progress`)."""
    work: str = ""
    """The work that it does while others wait without a collective, for instance "writing a checkpoint"."""
    waiting: bool = False
    """Whether it waits for the work of others, without a collective."""

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

    def __init__(self, latest: Iterable[Heartbeat], timeout: float, progress_timeout: float = math.inf):
        """`timeout`: seconds that others may wait for a process in a collective. `progress_timeout`: seconds that
        others may wait for work without a collective while no process advances.
        """
        self.timeout = timeout
        self.progress_timeout = progress_timeout
        self.latest = list(latest)
        self._now = 0.0
        self._last_seen = [0.0] * len(self.latest)
        self._last_advance = 0.0
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
        if not self._is_waited_for_work() or progress_of(before) != progress_of(self.latest):
            self._last_advance = self._now

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

    def _is_waited_for_work(self) -> bool:
        """A single process counts as waiting for its own work."""
        alone = len(self.latest) == 1 and self.latest[0].work != ""
        return alone or any(heartbeat.waiting for heartbeat in self.latest)

    def stalled(self) -> list[int]:
        """Ranks that others wait for without a collective, while no rank advanced for `progress_timeout`."""
        if self._now - self._last_advance <= self.progress_timeout:
            return []
        return [rank for rank, heartbeat in enumerate(self.latest) if heartbeat.running and not heartbeat.waiting]

    def describe_stall(self, rank: int) -> str:
        """A part of a line about a stalled rank."""
        heartbeat = self.latest[rank]
        work = f" in {heartbeat.work}" if heartbeat.work else ""
        seconds = self._now - self._last_advance
        return f"rank {rank} on {heartbeat.host} made no progress{work} for {seconds:.0f} s (at {heartbeat.at})"

    def describe(self, rank: int) -> str:
        """One line about a missing rank."""
        heartbeat = self.latest[rank]
        name = f"rank {rank} on {heartbeat.host}"
        if not heartbeat.running:
            return f"{name} has left the run"
        if rank in self.silent():
            return f"{name}: no heartbeat for {self.silence(rank):.0f} s; it was last at: {heartbeat.at}"
        return f"{name} has not joined; it is at: {heartbeat.at}"


def progress_of(heartbeats: Iterable[Heartbeat]) -> list[tuple[int, int]]:
    """What changes when any of the processes advances."""
    return [(heartbeat.joined, heartbeat.advanced) for heartbeat in heartbeats]

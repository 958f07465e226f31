"""The roll of the processes: who was heard of when, and who keeps the others waiting in a collective."""

import json
from collections.abc import Iterable
from typing import NamedTuple

LONGEST_TICK = 2.0  # seconds
SILENT = 3.0  # seconds without a heartbeat after which a process is called silent


class Beat(NamedTuple):
    """What a process tells of itself about twice a second."""

    count: int
    joined: int
    """Collectives that it has entered since the start, in all its process groups."""
    host: str
    at: str
    """Where its main thread is."""
    here: bool = True
    """False once it has left in good order."""

    def encode(self) -> str:
        return json.dumps(self)

    @classmethod
    def decode(cls, text: str | bytes) -> "Beat":
        return cls(*json.loads(text))


class Roll:
    """Every rank's last beat, by one observer's time.

    That time stands still while the observer itself is stopped (a suspended job), and hosts' clocks need not agree.
    Processes enter collectives in the same order, so the number entered tells who is behind.
    """

    def __init__(self, beats: Iterable[Beat], timeout: float):
        """`timeout`: seconds that others may wait for a process."""
        self.timeout = timeout
        self.beats = list(beats)
        self._now = 0.0
        self._heard = [0.0] * len(self.beats)
        self._behind: dict[int, float] = {}  # since when a rank has been behind with the same number of collectives

    def note(self, beats: Iterable[Beat], elapsed: float) -> None:
        """Every rank's beat as it is now, `elapsed` seconds after the last time."""
        self._now += min(elapsed, LONGEST_TICK)
        before, self.beats = self.beats, list(beats)
        ahead = max(beat.joined for beat in self.beats)
        for rank, (old, new) in enumerate(zip(before, self.beats, strict=True)):
            if new.count != old.count:
                self._heard[rank] = self._now
            if new.joined != old.joined or new.joined == ahead:
                self._behind.pop(rank, None)
            if new.joined < ahead:
                self._behind.setdefault(rank, self._now)

    def silence(self, rank: int) -> float:
        """Seconds since the last beat; 0 for a rank that has left."""
        return self._now - self._heard[rank] if self.beats[rank].here else 0.0

    def silent(self) -> list[int]:
        """Ranks that gave no sign for a while."""
        return [rank for rank in range(len(self.beats)) if self.silence(rank) > min(SILENT, self.timeout)]

    def present(self) -> list[int]:
        """Ranks that can be expected to act on a message."""
        silent = self.silent()
        return [rank for rank, beat in enumerate(self.beats) if beat.here and rank not in silent]

    def missing(self) -> list[int]:
        """Ranks that others have waited for, or that were silent, for longer than the timeout."""
        late = {rank for rank, since in self._behind.items() if self._now - since > self.timeout}
        dead = {rank for rank in range(len(self.beats)) if self.silence(rank) > self.timeout}
        return sorted(late | dead)

    def describe(self, rank: int) -> str:
        """What is known of a missing rank, in one line."""
        beat = self.beats[rank]
        name = f"rank {rank} on {beat.host}"
        if not beat.here:
            return f"{name} has left the run"
        if rank in self.silent():
            return f"{name}: no heartbeat for {self.silence(rank):.0f} s; it was last at: {beat.at}"
        return f"{name} has not joined; it is at: {beat.at}"

"""The checkpoints of one run: which exist, which is used, and which are kept.

    checkpoints/step_00001000/   see `checkpoint_folder`

A checkpoint is written to a hidden folder, synced to disk and renamed; only then are older ones deleted. One
process writes to a folder of checkpoints: `run_lock` ensures that. `snapshot` (fast) is separate from
`Checkpoints.write` (slow), which `CheckpointWriter` calls off the training thread.
"""

import errno
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pydantic

from pipeline.schema import Section
from pipeline.storage.checkpoint_folder import (
    FOLDER_NAME,
    Checkpoint,
    Snapshot,
    UnreadableCheckpoint,
    read_folder,
    read_meta,
    size_of,
    snapshot,
    sync_folder,
    write_folder,
)

logger = logging.getLogger(__name__)

MAX_LISTINGS = 20
"""How often the folder is listed again while a writer deletes the checkpoints that are read."""
_HIDDEN = re.compile(r"\.step_\d{8,}\.(?P<host>.+)\.(?P<pid>\d+)\.(writing|deleting)")


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = pydantic.Field(1000, ge=0)
    """Steps between checkpoints; also after the last step. 0: only where a signal stops the run."""
    keep: int | None = pydantic.Field(3, ge=1)
    """How many of the latest are kept, besides the best by validation; null: all."""
    milestones: int = pydantic.Field(0, ge=0)
    """Checkpoints of every so many steps are kept as well; a multiple of `every`. 0: none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.milestones and (not self.every or self.milestones % self.every):
            raise ValueError(
                f"checkpoint.milestones={self.milestones} is not a multiple of checkpoint.every={self.every}, so that "
                "some of these steps would have no checkpoint"
            )
        return self


class Checkpoints:
    """The checkpoints of one run: `save`, `latest`, `best`, `load`.

    `keep`: how many of the latest are kept, besides the best one and those whose step is a multiple of `milestones`;
    None or 0 keeps all. `run_id`: stated in every checkpoint that is written; checkpoints that state another id are not
    used, unless `load` is given their path. `check`: called before each change in the folder; it raises where this
    process may no longer write there.
    """

    def __init__(
        self,
        folder: Path | str,
        keep: int | None = None,
        run_id: str | None = None,
        check: Callable[[], None] = lambda: None,
        milestones: int = 0,
    ):
        self.folder = Path(folder)
        self.keep = keep
        self.milestones = milestones
        self.run_id = run_id
        self.check = check

    def save(self, step: int, tensors: Snapshot, facts: Mapping[str, Any], score: float | None = None) -> Path:
        """Write the checkpoint of `step` and delete those that are no longer kept. Returns its folder.

        `tensors`: {file stem: {name: tensor on any device, of any layout}}. `facts`: JSON values, with string keys and
        finite numbers. `score`: lower is better; None or a non-finite one never makes a checkpoint the best. A good
        checkpoint of the same step stays as it is, an unreadable one is replaced. Raises OSError, naming the folder,
        where it cannot be written: nothing is lost then.
        """
        return self.write(step, snapshot(tensors), facts, score)

    def write(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], score: float | None = None) -> Path:
        """`save` for tensors that are a snapshot already. May run on another thread, one call at a time."""
        self.check()
        target = self.path(step)
        facts = facts if self.run_id is None else {**facts, "run_id": self.run_id}
        score = float(score) if score is not None and math.isfinite(score) else None
        try:
            self.folder.mkdir(exist_ok=True)  # not the run folder, which may have been moved since it was checked
            self._remove_leftovers()
            if not self._is_good(target):
                self._make_room(step, size_of(snapshot))
                self._write_new(target, snapshot, step, facts, score)
            sync_folder(
                self.folder
            )  # also for an existing one: the process that renamed it may have been killed before
            self._delete_old(step)
        except OSError as error:
            message = f"the checkpoint of step {step} could not be written to {self.folder}: {error.strerror or error}"
            raise OSError(error.errno, f"{message}; check space, quota and permissions there") from error
        return target

    def latest(self) -> Checkpoint | None:
        """The usable checkpoint of the highest step, or None where there is no checkpoint.

        Unreadable ones and those of another run are skipped, logged, and named in the result. Raises
        UnreadableCheckpoint where none is usable.
        """
        return self._first_usable(lambda steps: steps[::-1])

    def best(self) -> Checkpoint | None:
        """The usable checkpoint of the lowest score, or None where none has a score. Raises as `latest` does."""
        return self._first_usable(self._by_score)

    def load(self, path: Path | str) -> Checkpoint:
        """The checkpoint in folder `path`, "latest" or "best".

        Raises ValueError where nothing is there, UnreadableCheckpoint where it is not intact.
        """
        if path in ("latest", "best"):
            found = self.latest() if path == "latest" else self.best()
            if found is None:
                raise ValueError(f"{self.folder} holds no checkpoint that could be its {path}")
            return found
        if not Path(path).is_dir():
            raise ValueError(f"no checkpoint at {path}: name a folder such as {self.path(1000)}")
        return read_folder(Path(path))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, readable or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False))
        return sorted(int(match[1]) for match in map(FOLDER_NAME.fullmatch, names) if match)

    def own_steps(self) -> list[int]:
        """`steps` without the checkpoints of another run."""
        return list(self._own_scores(self.steps()))

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.folder / f"step_{step:08d}"

    def _first_usable(self, ranked: Callable[[list[int]], list[int]]) -> Checkpoint | None:
        """A checkpoint that a running writer deletes while it is read is not unreadable: the folder is listed again."""
        for _ in range(MAX_LISTINGS):
            listed = self.steps()
            found, problems = self._try_each(ranked(listed))
            if found is not None or set(listed) <= set(self.steps()):
                break
        for problem in problems:
            logger.warning("checkpoint skipped: %s", problem)
        if found is None and problems:
            lines = "\n  ".join(problems)
            raise UnreadableCheckpoint(
                f"no checkpoint in {self.folder} can be used:\n  {lines}\n"
                "To start a new run, use another run folder or move this one away."
            )
        return None if found is None else replace(found, passed_over=tuple(problems))

    def _try_each(self, steps: Iterable[int]) -> tuple[Checkpoint | None, list[str]]:
        """The first usable one, and why those before it are not. Ends early where one was deleted."""
        problems: list[str] = []
        for step in steps:
            try:
                found = read_folder(self.path(step))
            except UnreadableCheckpoint as error:
                problems.append(str(error))
                if not self.path(step).is_dir():
                    break
                continue
            if self._is_own_id(found.facts):
                return found, problems
            other = repr(found.facts["run_id"])[:34]
            problems.append(f"{found.path}: belongs to another run ({other}); give its path to continue from it")
        return None, problems

    def _own_scores(self, steps: Iterable[int]) -> dict[int, float | None]:
        """The scores of those that are of this run, as far as they can be read; None where there is no score."""
        scores: dict[int, float | None] = {}
        for step in steps:
            try:
                meta = read_meta(self.path(step))
            except UnreadableCheckpoint:
                scores[step] = None
                continue
            if self._is_own_id(meta.facts):
                scores[step] = meta.score
        return scores

    def _is_own_id(self, facts: Mapping[str, Any]) -> bool:
        return self.run_id is None or facts.get("run_id") in (None, self.run_id)

    def _by_score(self, steps: Iterable[int]) -> list[int]:
        scores = {}
        for step in steps:
            try:
                score = read_meta(self.path(step)).score
            except UnreadableCheckpoint:
                continue
            if score is not None:
                scores[step] = score
        return sorted(scores, key=scores.__getitem__)

    def _is_good(self, target: Path) -> bool:
        if not target.is_dir():
            return False
        try:
            return self._is_own_id(read_folder(target).facts)
        except UnreadableCheckpoint as error:
            logger.warning("unreadable checkpoint: %s", error)
            return False

    def _make_room(self, step: int, needed: int) -> None:
        """See that there are `needed` bytes. Raises OSError where there are not.

        A process that was killed between writing a checkpoint and deleting an older one has left one too many. On a
        disk with room for `keep` and one more, no other could be written. It is deleted first, if a newer one is good.
        """
        if shutil.disk_usage(self.folder).free < needed:
            older = [each for each in self.steps() if each < step]
            if older and self._is_good(self.path(older[-1])):
                self._delete_old(older[-1])
        _check_space(self.folder, needed)

    def _write_new(
        self, target: Path, snapshot: Snapshot, step: int, facts: Mapping[str, Any], score: float | None
    ) -> None:
        hidden = self._hidden(target, "writing")
        try:
            write_folder(hidden, snapshot, step, facts, score)
            self.check()
            if target.exists():  # unreadable: nothing is lost if the process ends between these two lines
                self._delete(target)
            os.rename(hidden, target)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)  # at once: what is left of it would keep a full disk full
            raise

    def _delete_old(self, step: int) -> None:
        """Steps beyond `step` are left from before a return to an older checkpoint: they stay, and do not count."""
        if not self.keep:
            return
        scores = self._own_scores(each for each in self.steps() if each <= step)
        scored = [each for each, score in scores.items() if score is not None]
        milestones = [each for each in scores if self.milestones and each and each % self.milestones == 0]
        kept = {*list(scores)[-self.keep :], min(scored, key=scores.__getitem__, default=None), *milestones}
        for old in scores.keys() - kept:
            try:
                self._delete(self.path(old))
            except OSError as error:
                logger.warning("old checkpoint %s could not be deleted: %s", self.path(old), error.strerror)

    def _delete(self, path: Path) -> None:
        hidden = self._hidden(path, "deleting")
        os.rename(path, hidden)  # at once, so that nobody sees half of it
        shutil.rmtree(hidden)

    def _hidden(self, path: Path, why: str) -> Path:
        return self.folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{why}"

    def _remove_leftovers(self) -> None:
        """Remove hidden folders of dead processes. The writer holds the run's lock: other hosts' are dead."""
        for entry in os.scandir(self.folder):
            match = _HIDDEN.fullmatch(entry.name)
            if match and not _is_other_live_process(match["host"], int(match["pid"])):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_other_live_process(host: str, pid: int) -> bool:
    return host == socket.gethostname() and pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free")

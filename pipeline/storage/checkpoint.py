"""Checkpoints: folders that are whole or invisible, checked byte by byte when they are read, and free of pickle.

    checkpoints/step_00001000/model.safetensors ...   one file per stem of `tensors`
    checkpoints/step_00001000/meta.json               step, score, run facts, size and sha256 of each file and of itself

A checkpoint is written into a hidden folder beside, synced to disk and renamed; only then do older ones go. One process
writes to a folder of checkpoints: `run_lock` sees to that. `snapshot` (fast) is apart from `Checkpoints.write` (slow),
which `CheckpointWriter` calls off the training thread.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.schema import Section
from pipeline.storage.safetensors_writer import write_tensors

logger = logging.getLogger(__name__)

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""{file stem: {tensor name: contiguous CPU tensor that shares memory with nothing}}."""

META = "meta.json"
_STEM = re.compile(r"[A-Za-z0-9_]+")
_VISIBLE = re.compile(r"step_(\d{8,})")
_HIDDEN = re.compile(r"\.step_\d{8,}\.(?P<host>.+)\.(?P<pid>\d+)\.(writing|deleting)")
_Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_]+\.safetensors$")]


class CheckpointConfig(Section):
    """When checkpoints are written and which stay."""

    every: int = pydantic.Field(1000, ge=0)
    """Steps between checkpoints; also after the last step. 0: never."""
    keep: int | None = pydantic.Field(3, ge=1)
    """How many of the latest stay, beside the best by validation; null: all."""


class UnreadableCheckpoint(ValueError):
    """A checkpoint is incomplete, altered or not ours. The message names the file and what is wrong with it."""


class FileFacts(Section):
    """What `meta.json` promises of one file."""

    sha256: _Sha256
    bytes: Annotated[int, pydantic.Field(ge=0)]


class Meta(Section):
    """The content of `meta.json`, apart from the hash of itself."""

    format: Literal["nvae-pipeline-checkpoint"] = "nvae-pipeline-checkpoint"
    version: Literal[1] = 1
    step: Annotated[int, pydantic.Field(ge=0)]
    score: float | None
    files: dict[_FileName, FileFacts]
    facts: dict[str, Any]

    def render(self) -> bytes:
        """The one byte sequence that stands for this content."""
        content = self.model_dump()
        digest = hashlib.sha256(_json(content)).hexdigest()
        return _json({**content, "sha256": digest})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and verified."""

    path: Path
    step: int
    score: float | None
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """{file stem: {tensor name: CPU tensor}}."""
    passed_over: tuple[str, ...] = ()
    """Why better candidates were not taken, one line each."""


def snapshot(tensors: Snapshot) -> Snapshot:
    """Copies on the CPU that later training steps cannot change.

    safetensors stores contiguous tensors only, so channels_last ones are copied in plain order; values are the same to
    the bit. Tensors that share memory become separate: whoever loads them ties them again.
    """
    return {stem: {name: _copy(tensor) for name, tensor in group.items()} for stem, group in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def size_of(snapshot: Snapshot) -> int:
    """Bytes that a checkpoint of these tensors needs on disk, with room for headers and `meta.json`."""
    tensors = [tensor for group in snapshot.values() for tensor in group.values()]
    return sum(tensor.nbytes + 512 for tensor in tensors) + 2**20


def write_folder(folder: Path, snapshot: Snapshot, step: int, facts: Mapping[str, Any], score: float | None) -> None:
    """Make `folder` and fill it, `meta.json` last; everything is on the disk when this returns."""
    folder.mkdir()
    files = {}
    for stem, group in snapshot.items():
        assert _STEM.fullmatch(stem), f"not a file stem: {stem!r}"
        digest, size = write_tensors(folder / f"{stem}.safetensors", group)
        files[f"{stem}.safetensors"] = FileFacts(sha256=digest, bytes=size)
    meta = Meta(step=step, score=score, files=files, facts=dict(facts))
    _write_synced(folder / META, meta.render())
    sync_folder(folder)


def read_folder(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises UnreadableCheckpoint."""
    meta = read_meta(folder)
    named = _VISIBLE.fullmatch(folder.name)
    if named and int(named[1]) != meta.step:
        raise UnreadableCheckpoint(f"{folder / META}: belongs to step {meta.step}, not to the folder that it lies in")
    tensors = {name.removesuffix(".safetensors"): _read_tensors(folder / name, meta.files[name]) for name in meta.files}
    return Checkpoint(folder, meta.step, meta.score, meta.facts, tensors)


def read_meta(folder: Path) -> Meta:
    """Read and verify `meta.json` alone. Raises UnreadableCheckpoint."""
    path = folder / META
    content = _read(path)
    try:
        fields = json.loads(content)
        digest = fields.pop("sha256")
        meta = Meta.model_validate(fields)
        intact = meta.render() == content  # no other spelling passes, so that a flip of any bit is seen
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: not the facts of a checkpoint ({_first_line(error)})") from error
    if not intact:
        raise UnreadableCheckpoint(f"{path}: its content does not match its own hash {str(digest)[:12]}...")
    return meta


def _read_tensors(path: Path, facts: FileFacts) -> dict[str, Tensor]:
    content = _read(path)  # read once: what is hashed is what is used
    if len(content) != facts.bytes:
        raise UnreadableCheckpoint(f"{path}: {len(content)} bytes instead of {facts.bytes}")
    if hashlib.sha256(content).hexdigest() != facts.sha256:
        raise UnreadableCheckpoint(f"{path}: sha256 differs from the one in {META}")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise UnreadableCheckpoint(f"{path}: not a safetensors file ({_first_line(error)})") from error


def _read(path: Path) -> bytes:
    """The bytes of a regular file that is no symbolic link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableCheckpoint(f"{path}: not a regular file")
            return file.read()
    except OSError as error:
        fault = "is a symbolic link, which is refused" if error.errno == errno.ELOOP else error.strerror
        raise UnreadableCheckpoint(f"{path}: {fault}") from error


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the entries of a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no sync of folders
            raise
    finally:
        os.close(descriptor)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("ascii")


def _first_line(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


class Checkpoints:
    """The checkpoints of one run: `save`, `latest`, `best`, `load`.

    `keep`: how many of the latest stay, beside the best one; None or 0 keeps all.
    """

    def __init__(self, folder: Path | str, keep: int | None = None):
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Snapshot, facts: Mapping[str, Any], score: float | None = None) -> Path:
        """Write the checkpoint of `step` and delete those that are no longer kept. Returns its folder.

        `tensors`: {file stem: {name: tensor on any device, of any layout}}. `facts`: JSON values, with string keys and
        finite numbers. `score`: lower is better; None or a non-finite one never makes a checkpoint the best. A good
        checkpoint of the same step stays as it is, a damaged one is replaced. Raises OSError, naming the folder, where
        it cannot be written: nothing is lost then.
        """
        return self.write(step, snapshot(tensors), facts, score)

    def write(self, step: int, snapshot: Snapshot, facts: Mapping[str, Any], score: float | None = None) -> Path:
        """`save` for tensors that are a snapshot already. May run on another thread, one call at a time."""
        target = self.path(step)
        score = float(score) if score is not None and math.isfinite(score) else None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            if not self._is_good(target):
                self._make_room(step, size_of(snapshot))
                self._write_new(target, snapshot, step, facts, score)
            sync_folder(self.folder)  # also where the name was there: whoever gave it may have died before this
            self._delete_old(step)
        except OSError as error:
            message = f"the checkpoint of step {step} could not be written to {self.folder}: {error.strerror or error}"
            raise OSError(error.errno, f"{message}; check space, quota and permissions there") from error
        return target

    def latest(self) -> Checkpoint | None:
        """The good checkpoint of the highest step, or None where there is no checkpoint.

        Damaged ones are passed over, logged, and named in the result. Raises UnreadableCheckpoint where all are
        damaged.
        """
        return self._first_good(reversed(self.steps()))

    def best(self) -> Checkpoint | None:
        """The good checkpoint of the lowest score, or None where none has a score. Raises as `latest` does."""
        return self._first_good(self._by_score(self.steps()))

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
        """Steps of the checkpoints that are there, good or damaged, ascending."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False))
        return sorted(int(match[1]) for match in map(_VISIBLE.fullmatch, names) if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / f"step_{step:08d}"

    def _first_good(self, steps: Iterable[int]) -> Checkpoint | None:
        passed_over: list[str] = []
        for step in steps:
            try:
                found = read_folder(self.path(step))
            except UnreadableCheckpoint as damage:
                logger.warning("checkpoint of step %d passed over: %s", step, damage)
                passed_over.append(str(damage))
            else:
                return replace(found, passed_over=tuple(passed_over))
        if passed_over:
            faults = "\n  ".join(passed_over)
            raise UnreadableCheckpoint(
                f"every checkpoint in {self.folder} is damaged:\n  {faults}\n"
                "To start afresh, use another run folder or move this one away."
            )
        return None

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
            read_folder(target)
        except UnreadableCheckpoint as damage:
            logger.warning("damaged checkpoint: %s", damage)
            return False
        return True

    def _make_room(self, step: int, needed: int) -> None:
        """See that there are `needed` bytes. Raises OSError where there are not.

        A process that died between writing a checkpoint and deleting an older one has left one too many, which would
        fill a disk with room for `keep` and one more for good. It goes first, if what makes it superfluous is good.
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
            if target.exists():  # a damaged one: nothing is lost if the process ends between these two lines
                self._delete(target)
            os.rename(hidden, target)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)  # at once: what is left of it would keep a full disk full
            raise

    def _delete_old(self, step: int) -> None:
        """Steps beyond `step` are left from before a return to an older checkpoint: they stay, and do not count."""
        if not self.keep:
            return
        steps = [each for each in self.steps() if each <= step]
        kept = {*steps[-self.keep :], *self._by_score(steps)[:1]}
        for old in set(steps) - kept:
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

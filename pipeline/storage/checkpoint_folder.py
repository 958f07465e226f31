"""One checkpoint folder: written completely, verified byte by byte when read, and free of pickle.

    model.safetensors, optimizer.safetensors ...   one file for each stem of a snapshot
    meta.json                                      step, score, run facts, size and sha256 of each file and of itself

Sizes are compared with `meta.json` before a file is read, so that an enlarged file costs no memory.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.schema import Section
from pipeline.storage.safetensors_writer import write_tensors
from shard_data.files import open_regular, read_bounded

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""{file stem: {tensor name: contiguous CPU tensor that shares memory with no other}}."""

META = "meta.json"
MAX_META_BYTES = 4 * 2**20
"""Size limit of `meta.json`; a run's settings and class names take some 10 KiB."""
_STEM = re.compile(r"[A-Za-z0-9_]+")
FOLDER_NAME = re.compile(r"step_(\d{8,})")
_Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_]+\.safetensors$")]


class UnreadableCheckpoint(ValueError):
    """A checkpoint is incomplete, altered or not from this project. The message names the file and the problem."""


class FileFacts(Section):
    """What `meta.json` states about one file."""

    sha256: _Sha256
    bytes: Annotated[int, pydantic.Field(ge=0)]


class Meta(Section):
    """The content of `meta.json`, except for its own hash."""

    format: Literal["nvae-pipeline-checkpoint"] = "nvae-pipeline-checkpoint"
    version: Literal[1] = 1
    step: Annotated[int, pydantic.Field(ge=0)]
    score: float | None
    files: dict[_FileName, FileFacts]
    facts: dict[str, Any]

    def render(self) -> bytes:
        """The one byte sequence that represents this content."""
        content = self.model_dump()
        digest = hashlib.sha256(_json(content)).hexdigest()
        return _json({**content, "sha256": digest})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    score: float | None
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """{file stem: {tensor name: CPU tensor}}."""
    sha256: Mapping[str, str]
    """{file stem: sha256 of the file, in hexadecimal}."""
    passed_over: tuple[str, ...] = ()
    """Why better candidates were not used, one line each."""


def snapshot(tensors: Snapshot) -> Snapshot:
    """Copies on the CPU that later training steps cannot change.

    safetensors stores contiguous tensors only, so channels_last tensors are copied in plain order; the values are equal
    to the bit. Tensors that share memory become separate; the loading code ties them again.
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
    content = Meta(step=step, score=score, files=files, facts=dict(facts)).render()
    if len(content) > MAX_META_BYTES:
        raise ValueError(f"the facts of a checkpoint take {len(content)} bytes; at most {MAX_META_BYTES} can be read")
    _write_synced(folder / META, content)
    sync_folder(folder)


def read_folder(folder: Path, follow: bool = False) -> Checkpoint:
    """Read and verify one checkpoint. Raises UnreadableCheckpoint, also for symbolic links unless `follow`."""
    meta = read_meta(folder, follow)
    named = FOLDER_NAME.fullmatch(folder.name)
    if named and int(named[1]) != meta.step:
        raise UnreadableCheckpoint(f"{folder / META}: is of step {meta.step}, unlike the name of its folder")
    for name, facts in meta.files.items():
        _check_size(folder / name, facts.bytes, follow)
    tensors = {
        name.removesuffix(".safetensors"): _read_tensors(folder / name, facts, follow)
        for name, facts in meta.files.items()
    }
    sha256 = {name.removesuffix(".safetensors"): facts.sha256 for name, facts in meta.files.items()}
    return Checkpoint(folder, meta.step, meta.score, meta.facts, tensors, sha256)


def read_meta(folder: Path, follow: bool = False) -> Meta:
    """Read and verify `meta.json` alone. Raises UnreadableCheckpoint."""
    path = folder / META
    try:
        content = read_bounded(path, MAX_META_BYTES, follow)
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: {error.strerror}") from error
    try:
        fields = json.loads(content)
        digest = fields.pop("sha256")
        meta = Meta.model_validate(fields)
        intact = meta.render() == content  # no other spelling passes, so that a flip of any bit is detected
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: not the facts of a checkpoint ({_first_line(error)})") from error
    if not intact:
        raise UnreadableCheckpoint(f"{path}: its content does not match its own hash {str(digest)[:12]}...")
    return meta


def _check_size(path: Path, expected: int, follow: bool) -> None:
    try:
        with open_regular(path, follow) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: {error.strerror}") from error
    if size != expected:
        raise UnreadableCheckpoint(f"{path}: {size} bytes instead of {expected}")


def _read_tensors(path: Path, facts: FileFacts, follow: bool) -> dict[str, Tensor]:
    try:
        content = read_bounded(
            path, facts.bytes, follow
        )  # read once: the bytes that are hashed are those that are used
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != facts.sha256:
        raise UnreadableCheckpoint(f"{path}: sha256 differs from the one in {META}")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UnreadableCheckpoint(f"{path}: not a safetensors file of torch tensors ({_first_line(error)})") from error


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("ascii")


def _first_line(error: Exception) -> str:
    """The first line of an error's message, of printable characters only: parts of it come from the file."""
    if isinstance(error, pydantic.ValidationError):
        problem = error.errors()[0]
        text = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    else:
        text = (str(error).splitlines() or [type(error).__name__])[0]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:300])

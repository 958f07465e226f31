"""Copies a shard set to this node's own disk, and compares every file with its hash.

    python slurm/stage.py SET FOLDER           into FOLDER/NAME-FINGERPRINT; complete files are kept
    python slurm/stage.py --where SET FOLDER   only print that folder

Needs the repository on PYTHONPATH. Exit codes: 0 the copy is complete, 1 this node cannot store it, 2 the original
is corrupt.
"""

import math
import shutil
import socket
import sys
import time
from pathlib import Path

from shard_data.errors import DataError
from shard_data.file_lock import FileLock
from shard_data.files import replacing, sha256
from shard_data.manifest import FILE, Manifest, all_shards, load

SECONDS_PER_LINE = 10


def where(manifest: Manifest, folder: Path) -> Path:
    """The copy's folder. Each set, and each version of it, has its own. `load` has checked that its name has no `/`."""
    return folder / f"{manifest['name']}-{manifest['fingerprint'][:12]}"


def stage(root: Path, folder: Path) -> None:
    """Completes the copy. Raises DataError where the original is corrupt, OSError where the copy cannot be made."""
    manifest = load(root)
    target = where(manifest, folder)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / ".lock").acquire(math.inf, say_wait):  # one job per node copies; then all use its copy
        copied = copy_shards(manifest, root, target)
        copy(root / FILE, target / FILE, sha256(root / FILE))
    say(f"{target} is complete: {len(hashes(manifest))} files, {copied} of them copied now")


def say_wait(holder: str) -> None:
    say(f"waiting for {holder}, which copies the same shards")


def copy_shards(manifest: Manifest, root: Path, target: Path) -> int:
    """Returns how many files had to be copied."""
    files = hashes(manifest)
    copied, last_line = 0, time.monotonic()
    for number, (name, digest) in enumerate(files.items(), start=1):
        if not is_complete(target / name, digest):
            copy(root / name, target / name, digest)
            copied += 1
        if time.monotonic() - last_line > SECONDS_PER_LINE:
            say(f"{number} of {len(files)} files of {root} are complete")
            last_line = time.monotonic()
    return copied


def hashes(manifest: Manifest) -> dict[str, str]:
    """File name -> sha256, of all tars and indices."""
    shards = all_shards(manifest)
    return {s["file"]: s["sha256"] for s in shards} | {s["index"]: s["index_sha256"] for s in shards}


def is_complete(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def copy(source: Path, target: Path, digest: str) -> None:
    """Copies one file, then reads the copy back."""
    with replacing(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file, 2**20)
    if is_complete(target, digest):
        return
    target.unlink()
    if is_complete(source, digest):
        raise OSError(f"{target} differs from what was written; this node's disk is faulty")
    raise DataError(f"{source} is corrupt; `python -m shard_data verify {source.parent}` lists the problems")


def say(text: str) -> None:
    print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--where"]:
        print(where(load(Path(arguments[1])), Path(arguments[2])))
        return 0
    try:
        stage(Path(arguments[0]), Path(arguments[1]))
    except DataError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(f"error: the shards could not be copied to {arguments[1]}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

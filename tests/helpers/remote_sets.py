"""What tests of shard sets behind an address share (their fixtures are in tests/data/conftest.py)."""

from pathlib import Path

from pipeline.data.remote import fetch_manifest, fetch_set
from tests.helpers.shard_server import ShardServer

FILES = [f"train-{n:06d}{end}" for n in range(4) for end in (".tar", ".index.npy")]
"""The files of the training split of the fixture `root`."""


def fetch(server: ShardServer, cache: Path, splits=("train",)) -> Path:
    return fetch_set(server.address, fetch_manifest(server.address), splits, cache)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix != ".lock" and path.is_file()}

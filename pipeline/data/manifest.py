"""The reader's side of manifest.json, which says what a shard set holds, and by being there that it is complete."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FILE_NAME = "manifest.json"
VERSION = 1

Positive = Annotated[int, Field(ge=1)]
# A plain name: a manifest does not reach outside its own folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


class Entry(BaseModel):
    """Part of a manifest. Further keys are allowed: a later writer may tell more."""

    model_config = ConfigDict(frozen=True, strict=True)


class ShardEntry(Entry):
    file: FileName
    sha256: str
    bytes: Positive
    count: Positive
    index: FileName
    index_sha256: str


class SplitEntry(Entry):
    count: Positive
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _adds_up(self):
        total = sum(shard.count for shard in self.shards)
        if total != self.count:
            raise ValueError(f"the shards hold {total} samples, but count says {self.count}")
        return self


class ImageEntry(Entry):
    height: Positive
    width: Positive
    channels: Literal[1, 3]


class Manifest(Entry):
    format: Literal["webdataset-shards"]
    version: Literal[1]
    name: str
    image: ImageEntry
    encoding: Literal["npy", "png"]
    transform: dict[str, Any]
    classes: list[str] | None
    attributes: list[str] | None
    splits: dict[str, SplitEntry]
    fingerprint: str


def check_splits(manifest: Manifest, place: str, wanted: Mapping[str, str]) -> None:
    """Raises ValueError for a split that the set at `place` does not have. `wanted`: {setting: split}."""
    for setting, split in wanted.items():
        if split not in manifest.splits:
            raise ValueError(f"{setting}: {place}: no split '{split}'; it has: {', '.join(manifest.splits)}")


def load_manifest(root: Path) -> Manifest:
    """Read and check ROOT/manifest.json. Raises ValueError that says what is wrong with the folder and what to do."""
    path = root / FILE_NAME
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; make a shard set with: python -m shard_data SOURCE --out {root}")
    if not path.is_file():
        raise ValueError(
            f"{root}: no {FILE_NAME}, so this is not a complete shard set; "
            f"make it, or finish it, with: python -m shard_data SOURCE --out {root}"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, place: str) -> Manifest:
    """The manifest that this JSON is. Raises ValueError, naming `place` as where it lies, when it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not readable as JSON ({error}); make the shard set again") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version is not None and version != VERSION:
        raise ValueError(
            f"{place}: version {version}, but this release reads version {VERSION}; make the shard set again with it"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{place}: {where}: {first['msg']}; make the shard set again") from error

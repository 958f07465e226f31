"""manifest.json: what a shard set holds, with the hash of every file. It is written last, so a set that has one is
complete.

Manifests are untrusted: `load` and `parse` check sizes, types, names and counts, and recompute the fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from shard_data.errors import Damaged, DataError
from shard_data.files import read_bounded, replacing, sync_folder

if TYPE_CHECKING:  # numpy comes with it
    from shard_data.source import Omission, Source

FILE = "manifest.json"
FORMAT = "webdataset-shards"
VERSION = 1
MAX_BYTES = 2**26
"""Bytes of a manifest that are read at most; a shard needs about 350."""
MIN_SAMPLE_BYTES = 2**10
"""Bytes of a sample in a tar at least: the header of a member and one block."""
NOT_IN_FINGERPRINT = ("fingerprint", "source", "omitted")
REMAKE = "copy the set there again, or make the shard set again"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}$")]
# File names without folders: a manifest cannot refer to files outside its own folder.
TarName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.tar$")]
IndexName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.index\.npy$")]
# The set's own name becomes part of the name of a folder.
SetName = Annotated[str, Field(pattern=r"^[^/\\\p{C}\p{Zl}\p{Zp}]{1,100}$")]
# Shown in messages, so without control characters.
Text = Annotated[str, Field(pattern=r"^\P{Cc}{0,1000}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=2**40)]
Side = Annotated[int, Field(ge=1, le=2**16)]

_strict = with_config(ConfigDict(strict=True, extra="allow"))  # a later writer may add keys


@_strict
class Shard(TypedDict):
    """One tar and its index."""

    file: TarName
    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=2**60)]
    count: Count
    index: IndexName
    index_sha256: Sha256


def _samples_fit(shard: Shard) -> Shard:
    if shard["count"] * MIN_SAMPLE_BYTES > shard["bytes"]:
        raise ValueError(f"{shard['bytes']} bytes are too few for {shard['count']} samples")
    return shard


@_strict
class Split(TypedDict):
    """The shards of one split, in the order of its samples."""

    count: Count
    shards: list[Annotated[Shard, AfterValidator(_samples_fit)]]


def _adds_up(split: Split) -> Split:
    total = sum(shard["count"] for shard in split["shards"])
    if total != split["count"]:
        raise ValueError(f"the shards hold {total} samples, but count says {split['count']}")
    return split


@_strict
class Image(TypedDict):
    """The shape of every image."""

    height: Side
    width: Side
    channels: Literal[1, 3]


@_strict
class Omitted(TypedDict):
    """Originals of one split that were not converted, all for the same reason."""

    split: Text
    reason: Text
    count: Annotated[int, Field(ge=1)]
    names: list[str]


@_strict
class Manifest(TypedDict):
    """The content of manifest.json."""

    format: Literal["webdataset-shards"]
    version: Literal[1]
    name: SetName
    image: Image
    encoding: Literal["npy", "png"]
    transform: dict[str, Any]
    classes: list[Text] | None
    attributes: list[Text] | None
    splits: Annotated[dict[Name, Annotated[Split, AfterValidator(_adds_up)]], Field(min_length=1)]
    fingerprint: str
    omitted: NotRequired[list[Omitted]]


def _names_once(manifest: Manifest) -> Manifest:
    names = [shard[kind] for shard in all_shards(manifest) for kind in ("file", "index")]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        raise ValueError(f"names {next(name for name in names if name in seen or seen.add(name))} twice")
    return manifest


_CHECKED = TypeAdapter(Annotated[Manifest, AfterValidator(_names_once)])
_SET_NAME = TypeAdapter(SetName)


# ------------------------------------------------------------------------------------------------------------- reading


def load(root: Path) -> Manifest:
    """Read a set's manifest. Raises DataError where the folder holds no complete set of this format, and Damaged where
    the manifest breaks the format or does not fit its fingerprint; the message says what to do.
    """
    root = Path(root)
    path, make = root / FILE, f"with: python -m shard_data SOURCE --out {root}"
    try:
        content = read_bounded(path, MAX_BYTES, follow=True)
    except (FileNotFoundError, NotADirectoryError):
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; make a shard set {make}") from None
        raise DataError(f"{root}: no {FILE}, so not a complete shard set; make it, or finish it, {make}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); look at the disk that holds it") from None
    return parse(content, str(path))


def parse(content: bytes, place: str) -> Manifest:
    """The manifest with this content; `place` is its path or address, for messages. Raises as `load` does."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{place}: not readable as JSON ({_printable(error)}); {REMAKE}") from None
    if not isinstance(manifest, dict):
        raise Damaged(f"{place}: not a JSON object; {REMAKE}")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{place}: format: Input should be '{FORMAT}', so this is no shard set; choose another folder")
    if manifest.get("version") != VERSION:
        found = _printable(manifest.get("version"))
        raise DataError(
            f"{place}: version {found}, but this release reads version {VERSION}; make the shard set again with it"
        )
    try:
        _CHECKED.validate_python(manifest)
        fits = fingerprint(manifest) == manifest["fingerprint"]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{_printable(part)}." for part in first["loc"]).removesuffix(".")
        problem = _printable(first["msg"].removeprefix("Value error, "))
        raise Damaged(f"{place}: {where}{': ' if where else ''}{problem}; {REMAKE}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{place}: holds what no shard set has ({_printable(error)}); {REMAKE}") from None
    if not fits:
        raise Damaged(f"{place}: its content does not fit its fingerprint, so it was edited or damaged; {REMAKE}")
    return manifest


def fingerprint(manifest: Manifest) -> str:
    """sha256 of everything that determines the samples. Where the originals lay, and what was omitted, is excluded."""
    content = {key: value for key, value in manifest.items() if key not in NOT_IN_FINGERPRINT}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def all_shards(manifest: Manifest) -> list[Shard]:
    """The entries of all shards, split by split."""
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def check_splits(manifest: Manifest, place: str, wanted: Mapping[str, str]) -> None:
    """Raises ValueError for a split that the set at `place` does not have. `wanted`: {setting: split}."""
    for setting, split in wanted.items():
        if split not in manifest["splits"]:
            raise ValueError(f"{setting}: {place}: no split '{split}'; it has: {', '.join(manifest['splits'])}")


def _printable(value: Any) -> str:
    return "".join(filter(str.isprintable, str(value)))[:200]


# ------------------------------------------------------------------------------------------------------------- writing


def header(source: "Source", encoding: str, shuffle_seed: int | None = None) -> dict[str, Any]:
    """A source's manifest without splits, omissions and fingerprint.

    Raises DataError for originals that cannot be used, and for a name that a manifest cannot have.
    """
    try:
        _SET_NAME.validate_python(source.name)
    except ValidationError:
        raise DataError(f"--name {source.name!r}: give 1 to 100 printable characters without / and \\") from None
    description = source.description()
    height, width, channels = source.image_shape
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": source.name,
        "image": {"height": height, "width": width, "channels": channels},
        "encoding": encoding,
        "transform": source.transform(),
        "classes": source.classes and list(source.classes),
        "attributes": source.attributes and list(source.attributes),
        "source": description,
        **({} if shuffle_seed is None else {"shuffle_seed": shuffle_seed}),
    }


def complete(head: dict[str, Any], shards: dict[str, list[Shard]], omissions: Iterable["Omission"] = ()) -> Manifest:
    """The header with the shards of the splits, the omissions, and the fingerprint of the whole."""
    splits = {
        split: {"count": sum(s["count"] for s in entries), "shards": entries} for split, entries in shards.items()
    }
    manifest = {**head, "splits": splits, "omitted": omitted(omissions)}
    return {**manifest, "fingerprint": fingerprint(manifest)}


def omitted(omissions: Iterable["Omission"]) -> list[Omitted]:
    """One entry for each split and reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for split, name, reason in omissions:
        names.setdefault((split, reason), []).append(name)
    return [{"split": s, "reason": r, "count": len(found), "names": found} for (s, r), found in names.items()]


def save(manifest: Manifest, root: Path) -> None:
    """Write manifest.json in one rename, after everything that it refers to is on the disk."""
    sync_folder(root)
    with replacing(root / FILE) as file:
        file.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    sync_folder(root)

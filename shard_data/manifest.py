"""manifest.json: what a shard set is, with the hash of every part. Written last: where it is, the set is complete."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shard_data.errors import Damaged, DataError
from shard_data.files import replacing, sync_folder
from shard_data.source import Omission, Source

FILE = "manifest.json"
FORMAT = "webdataset-shards"
VERSION = 1
NOT_IN_FINGERPRINT = ("fingerprint", "source", "omitted")
REMAKE = "delete the folder and make the set again"

Manifest = dict[str, Any]


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(manifest: Manifest) -> str:
    """sha256 over everything that decides the samples; where the originals lay and what was left out is not in it."""
    content = {key: value for key, value in manifest.items() if key not in NOT_IN_FINGERPRINT}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def header(source: Source, encoding: str, shuffle_seed: int | None = None) -> Manifest:
    """A source's manifest but for splits, omissions and fingerprint. Raises DataError for originals of no use."""
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


def complete(head: Manifest, shards: dict[str, list[dict[str, Any]]], omissions: Iterable[Omission] = ()) -> Manifest:
    """The header joined by the splits' shards, what was left out, and the fingerprint of the whole."""
    splits = {
        split: {"count": sum(s["count"] for s in entries), "shards": entries} for split, entries in shards.items()
    }
    manifest = {**head, "splits": splits, "omitted": omitted(omissions)}
    return {**manifest, "fingerprint": fingerprint(manifest)}


def omitted(omissions: Iterable[Omission]) -> list[dict[str, Any]]:
    """What was left out, with one entry per split and reason: {"split", "reason", "count", "names"}."""
    names: dict[tuple[str, str], list[str]] = {}
    for split, name, reason in omissions:
        names.setdefault((split, reason), []).append(name)
    return [{"split": s, "reason": r, "count": len(found), "names": found} for (s, r), found in names.items()]


def save(manifest: Manifest, root: Path) -> None:
    """Write manifest.json in one rename, after everything that it speaks of is on the disk."""
    sync_folder(root)
    with replacing(root / FILE) as file:
        file.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    sync_folder(root)


def load(root: Path) -> Manifest:
    """Read a set's manifest. Raises DataError where there is none of this format, Damaged where it is broken."""
    path = Path(root) / FILE
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: not found, so {root} holds no complete set; make one: python -m shard_data") from None
    except ValueError as error:
        raise Damaged(f"{path}: not readable as JSON ({error}); {REMAKE}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a shard set (its format is not {FORMAT}); choose another folder")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path}: format version {manifest.get('version')}; this program reads {VERSION}: {REMAKE}")
    if "fingerprint" not in manifest or fingerprint(manifest) != manifest["fingerprint"]:
        raise Damaged(f"{path}: its content does not fit its fingerprint, so it was edited or damaged; {REMAKE}")
    if any(Path(shard[name]).name != shard[name] for shard in all_shards(manifest) for name in ("file", "index")):
        raise Damaged(f"{path}: names a file outside of its folder; do not use this set")
    return manifest


def all_shards(manifest: Manifest) -> list[dict[str, Any]]:
    """The entries of all shards, split by split."""
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]
